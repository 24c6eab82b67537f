"""Weight arrays with a chosen distribution of distances between their singular values.

A template of Gaussian entries is copied, and in every copy some entries are drawn again. How many
is drawn from a Pareto or a Gaussian law, and that law decides what the distances look like
(arXiv 2509.00046; docs/method.md, section 6).

To first order in the share c / N of new entries, singular value i of T + E moves by u_i^T E v_i, so
an array of r rows is c / N^2 times a chi-square of r - 1 degrees of freedom away from its template,
and two copies are that apart with the number of entries new in either for c. Three things limit it.
Where fewer than about a hundred entries are new, single ones matter, and the law is more skewed.
From a share of about 0.01 on, neighbouring singular values hold each other back. At c = N arrays
are independent, and their distance, about 1 / N, is not exceeded.

`calibrate` looks for the parameters whose sets of distances are like a reference's; `counts_for` is
the closed form, without a search.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import product
from math import prod

import numpy as np

from wdlib import WdlibError
from wdlib.characterize import NORMAL, POWER_LAW, REPLICATES, Pair, classify
from wdlib.distances import cosine_distances, msv
from wdlib.fits import MIN_DISTINCT, fit_power_law, table_distances, vector_bootstrap

SHAPES = (0.5, 0.75)
"""Shapes of ParetoCounts that `counts_for` gives. Of sets between two types of 24 to 30 layers the
rule of `characterize` calls nine in ten a power law with these, within one type six in ten; fewer
with larger shapes. With smaller ones the counts reach N too often."""

LARGEST_SCALE = 3e-4
"""Scale that `counts_for` gives at most: above, the tail of the counts reaches N too early."""

CLASS_RATE = 0.95
"""Share of generated sets that are to have the class of the reference."""

SCALE_TOLERANCE = 0.1
"""Relative deviation of the median distance that a calibration may have."""

COLUMNS = (16, 32, 64, 128, 256, 512, 1024)
RATIOS = (1.0, 3.0, 6.0, 10.0, 15.0, 25.0)
PARETO_GRID = tuple(product((0.5, 0.7, 1.0, 2.0), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)))
GAUSSIAN_GRID = tuple((mean, mean / 5) for mean in (0.001, 0.003, 0.01, 0.03, 0.1))
"""What `candidates` combines: columns of arrays, ratios, (shape, scale), (mean, deviation)."""

FINALISTS = 4
"""Candidates that `calibrate` tries again, with the scale moved and without."""

QUICK_REPLICATES = 40
"""Resamples of a class while candidates are compared; the chosen one has `REPLICATES`."""


@dataclass(frozen=True)
class ParetoCounts:
    """Counts scale * N * (1 + Lomax(shape)): P(count > x) = (scale * N / x)^shape above scale * N.

    shape: tail index of the counts, no unit, positive.
    scale: smallest share of the N entries that is drawn again, positive.
    Source: docs/method.md, section 6.
    """

    shape: float
    scale: float

    def draw(self, arrays: int, entries: int, rng: np.random.Generator) -> np.ndarray:
        """(arrays,) integers from 1 to `entries`."""
        return _clipped(self.scale * entries * (1 + rng.pareto(self.shape, arrays)), entries)


@dataclass(frozen=True)
class GaussianCounts:
    """Counts Normal(mean * N, deviation * N): both are shares of the N entries.

    Source: docs/method.md, section 6.
    """

    mean: float
    deviation: float

    def draw(self, arrays: int, entries: int, rng: np.random.Generator) -> np.ndarray:
        """(arrays,) integers from 1 to `entries`."""
        return _clipped(rng.normal(self.mean * entries, self.deviation * entries, arrays), entries)


def _clipped(counts: np.ndarray, entries: int) -> np.ndarray:
    return np.clip(np.rint(counts), 1, entries).astype(np.int64)


def template(entries: int, *, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """(entries,) float32 draws from Normal(0, sigma^2)."""
    return rng.standard_normal(entries, dtype=np.float32) * np.float32(sigma)


def replace(
    template: np.ndarray,
    shape: tuple[int, ...],
    counts: np.ndarray,
    *,
    sigma: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Copies of a template, each with its own number of entries drawn again.

    Copy k is the first prod(shape) entries of the template, row by row, in which counts[k]
    positions, chosen without replacement, hold new draws from Normal(0, sigma^2).

    Arguments: template (N,) float32, N at least prod(shape); counts (n,) integers from 0 to
    prod(shape).
    Returns: (n, *shape) float32.
    Raises: WdlibError for a template that is too short and for counts out of range.
    Source: docs/method.md, section 6.
    """
    entries = prod(shape)
    if len(template) < entries:
        raise WdlibError(
            f"a template of {len(template)} entries is too short for arrays of shape {shape}: draw "
            f"{entries}"
        )
    counts = np.asarray(counts)
    if counts.size and not 0 <= counts.min() <= counts.max() <= entries:
        raise WdlibError(
            f"counts from {counts.min()} to {counts.max()} do not fit arrays of {entries} entries: "
            "clip them"
        )
    arrays = np.tile(template[:entries], (len(counts), 1))
    for array, count in zip(arrays, counts, strict=True):
        chosen = rng.choice(entries, count, replace=False, shuffle=False)
        array[chosen] = rng.standard_normal(count, dtype=np.float32) * np.float32(sigma)
    return arrays.reshape(len(counts), *shape)


def generate(
    arrays: int,
    shape: tuple[int, ...],
    counts: ParetoCounts | GaussianCounts,
    *,
    sigma: float = 1.0,
    ratio: float = 1.0,
    rng: np.random.Generator,
) -> np.ndarray:
    """`arrays` weight arrays around one new template: (arrays, *shape) float32.

    sigma: standard deviation of the template's entries, any unit; ratio: that of new entries in
    units of sigma.
    Source: arXiv 2509.00046 (docs/method.md, section 6).
    Differs from the paper: ratio, which is 1 there. With larger ones single new entries stand out
    of the array, and their values decide the distances, no longer their number.
    """
    if not (sigma > 0 and ratio > 0):
        raise WdlibError(f"sigma = {sigma} and ratio = {ratio}: both are to be positive")
    entries = prod(shape)
    drawn = template(entries, sigma=sigma, rng=rng)
    number = counts.draw(arrays, entries, rng)
    return replace(drawn, shape, number, sigma=ratio * sigma, rng=rng)


def spectra_of(arrays: np.ndarray, rank: int | None = None) -> np.ndarray:
    """The largest singular values of many arrays at once, from the eigenvalues of A A^T.

    Squaring costs digits in the smallest values of nearly singular arrays: the error is at most
    about 1e-8 of the largest value, and 1e-15 for values of its size.

    Arguments: arrays (n, rows, columns), any unit; rank, all by default.
    Returns: float64 (n, rank), descending along each row.
    Raises: WdlibError for a rank that the arrays do not have.
    """
    arrays = np.asarray(arrays, dtype=np.float64)
    if arrays.shape[-2] > arrays.shape[-1]:
        arrays = arrays.swapaxes(-1, -2)
    rank = arrays.shape[-2] if rank is None else rank
    if not 1 <= rank <= arrays.shape[-2]:
        raise WdlibError(
            f"arrays of shape {arrays.shape[-2:]} have no {rank} singular values: ask for a rank "
            f"from 1 to {arrays.shape[-2]}"
        )
    squares = np.linalg.eigvalsh(arrays @ arrays.swapaxes(-1, -2))
    return np.sqrt(np.maximum(squares[:, : -rank - 1 : -1], 0))


def distances_to_template(
    arrays: int,
    shape: tuple[int, int],
    counts: ParetoCounts | GaussianCounts,
    *,
    templates: int = 1,
    rng: np.random.Generator,
) -> np.ndarray:
    """Cosine distances of the spectra of `arrays` copies to that of their template.

    Given the template they are independent, unlike the distances between copies.

    Returns: float64 (templates, arrays), no unit, a row for every new template.
    """
    rows = []
    for _ in range(templates):
        base = template(prod(shape), sigma=1.0, rng=rng)
        made = replace(base, shape, counts.draw(arrays, prod(shape), rng), sigma=1.0, rng=rng)
        rows.append(cosine_distances(spectra_of(base.reshape(1, *shape)), spectra_of(made))[0])
    return np.array(rows)


def tail_exponent(x: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Exponent of the density of `x` between two bounds, by maximum likelihood.

    Values of at least `high` count, but where they lie does not: there, distances saturate.

    Returns: alpha, and its standard error for independent draws.
    Raises: WdlibError where no value lies between the bounds.
    """
    tail = x[x >= low]
    inside = np.count_nonzero(tail < high)
    if not inside:
        raise WdlibError(f"no value lies between {low:g} and {high:g}: move the bounds apart")
    shape = inside / np.log(np.minimum(tail, high) / low).sum()
    return 1 + float(shape), float(shape / np.sqrt(inside))


def counts_for(
    alpha: float, xmin: float, shape: tuple[int, int], *, rank: int | None = None
) -> ParetoCounts:
    """Counts whose distances have, as far as it can be had, a given exponent and a given start.

    The shape is alpha - 1, kept within SHAPES. Between two copies with the fewest entries replaced
    the distance is 2 scale / N times a chi-square of rank - 1 degrees of freedom; scale makes its
    mean xmin, and is kept at or below LARGEST_SCALE. At the sizes of real models that bound is what
    decides: the distances of large Gaussian arrays are far smaller than those of trained weights.

    Arguments: alpha, exponent of the density, above 1; xmin, positive, no unit; shape of the
    arrays; rank, singular values in use, all by default.
    Raises: WdlibError for arguments out of range.
    Source: docs/method.md, section 6.
    """
    rank = min(shape) if rank is None else rank
    if not (alpha > 1 and xmin > 0 and 2 <= rank <= min(shape)):
        raise WdlibError(
            f"no counts for alpha = {alpha}, xmin = {xmin} and {rank} singular values of arrays of "
            f"shape {shape}: alpha is above 1, xmin positive, rank from 2 to {min(shape)}"
        )
    tail = float(np.clip(alpha - 1, *SHAPES))
    return ParetoCounts(tail, min(xmin * prod(shape) / (2 * (rank - 1)), LARGEST_SCALE))


# Calibration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What generated distances are to be like: the distances between two types of a model.

    label: power-law or normal. alpha, xmin: exponent and start of the tail by csn; low, high: 95 %
    interval of alpha as vectors are resampled; all None for a normal set. median: of the distances.
    vectors: how many on either side, (n, None) within one type. rank: singular values of a vector.
    """

    label: str
    alpha: float | None
    xmin: float | None
    low: float | None
    high: float | None
    median: float
    vectors: tuple[int, int | None]
    rank: int


def target(
    values: Mapping[str, np.ndarray], pair: Pair, *, replicates: int = 500, seed: int = 0
) -> Target:
    """The target that a pair of types of a model is.

    Resamples of few vectors can lack the distinct distances that a fit needs; the interval of alpha
    is that of the others.

    Arguments: values, content of a `Spectra` at the rank of the characterisation that `pair` comes
    from.
    Raises: WdlibError for an undecided pair, and for spectra that do not have its types or number
    of distances.
    """
    if pair.verdict.label not in (POWER_LAW, NORMAL):
        raise WdlibError(
            f"the pair {'-'.join(pair.types)} is {pair.verdict.label}: there is no class to reach, "
            "so calibrate to a power-law or a normal pair"
        )
    rows, columns = (msv(values, type) for type in pair.types)
    same = pair.types[0] == pair.types[1]
    table = cosine_distances(rows, columns)
    distances = table_distances(table, same)
    if np.count_nonzero(distances) != pair.verdict.n:
        raise WdlibError(
            f"the spectra give {np.count_nonzero(distances)} distances between "
            f"{'-'.join(pair.types)}, the characterisation has {pair.verdict.n}: it is another "
            "model's, or another rank's"
        )
    alpha = low = high = xmin = None
    if pair.verdict.label == POWER_LAW:
        fit = fit_power_law(distances)
        alpha, xmin = fit.alpha, fit.xmin
        resampled = vector_bootstrap(
            table,
            _alpha,
            replicates=replicates,
            rng=np.random.default_rng(seed),
            symmetric=same,
        )
        low, high = (float(q) for q in np.nanquantile(resampled, (0.025, 0.975)))
    vectors = (len(rows), None if same else len(columns))
    median = float(np.median(distances))
    return Target(pair.verdict.label, alpha, xmin, low, high, median, vectors, rows.shape[1])


def _alpha(distances: np.ndarray) -> float:
    """The exponent by csn, NaN for too few distinct distances."""
    distinct = np.unique(distances[distances > 0]).size
    return fit_power_law(distances).alpha if distinct >= MIN_DISTINCT else np.nan


@dataclass(frozen=True)
class Candidate:
    """Parameters of the generator: `generate` with them, around one template or one per side.

    shape: of the arrays. ratio, sigma: see `generate`; no distance depends on sigma. templates: 1,
    or 2 (the types of two groups).
    """

    shape: tuple[int, int]
    counts: ParetoCounts | GaussianCounts
    ratio: float = 1.0
    templates: int = 1
    sigma: float = 1.0


def candidates(
    label: str,
    *,
    shapes: tuple[tuple[int, int], ...],
    ratios: tuple[float, ...] = (1.0,),
) -> tuple[Candidate, ...]:
    """All combinations of the grids: Pareto counts for power-law, Gaussian ones for normal.

    shapes: of the arrays, one where it is given by the use. ratios: (1.0,) is the paper's method,
    `RATIOS` a wider choice.
    """
    if label == POWER_LAW:
        laws = [ParetoCounts(*law) for law in PARETO_GRID]
        return tuple(Candidate(s, law, r) for s, law, r in product(shapes, laws, ratios))
    laws = [GaussianCounts(*law) for law in GAUSSIAN_GRID]
    grid = product(shapes, laws, ratios, (1, 2))
    return tuple(Candidate(s, law, r, t) for s, law, r, t in grid)


@dataclass(frozen=True)
class Outcomes:
    """What sets of a candidate came out as, a value per set: label, alpha by csn, median."""

    labels: tuple[str, ...]
    alphas: np.ndarray
    medians: np.ndarray


def outcomes(
    candidate: Candidate,
    vectors: tuple[int, int | None],
    *,
    rank: int,
    replicates: int = REPLICATES,
    draws: int = 100,
    seed: int | list[int] = 0,
) -> Outcomes:
    """Generate sets of distances between as many vectors as `vectors` says, and look at them.

    Raises: WdlibError where the arrays have no `rank` singular values or too few vectors.
    """
    found = []
    for rng in np.random.default_rng(seed).spawn(draws):
        table = generated(candidate, vectors, rank=rank, rng=rng)
        distances = table_distances(table, vectors[1] is None)
        verdict = classify(
            table,
            symmetric=vectors[1] is None,
            replicates=replicates,
            seed=int(rng.integers(2**31)),
        )
        found.append((verdict.label, fit_power_law(distances).alpha, np.median(distances)))
    labels, alphas, medians = zip(*found, strict=True)
    return Outcomes(labels, np.array(alphas), np.array(medians))


def generated(
    candidate: Candidate,
    vectors: tuple[int, int | None],
    *,
    rank: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Distances between the singular value vectors of generated arrays: (n, m), or (n, n)."""
    n, m = vectors
    settings = {"sigma": candidate.sigma, "ratio": candidate.ratio, "rng": rng}
    if m is None:
        rows = columns = generate(n, candidate.shape, candidate.counts, **settings)
    elif candidate.templates == 2:
        rows, columns = (
            generate(k, candidate.shape, candidate.counts, **settings) for k in vectors
        )
    else:
        both = generate(n + m, candidate.shape, candidate.counts, **settings)
        rows, columns = both[:n], both[n:]
    return cosine_distances(spectra_of(rows, rank), spectra_of(columns, rank))


Survey = Mapping[Candidate, Outcomes]
"""The outcomes of a grid of candidates, for all targets of one number of vectors and one rank."""


def survey(
    grid: tuple[Candidate, ...],
    vectors: tuple[int, int | None],
    *,
    rank: int,
    draws: int = 10,
    seed: int = 0,
) -> Survey:
    """`outcomes` of every candidate, few and quick: about 0.2 s each."""
    settings = {"rank": rank, "replicates": QUICK_REPLICATES, "draws": draws}
    return {c: outcomes(c, vectors, seed=[seed, i], **settings) for i, c in enumerate(grid)}


@dataclass(frozen=True)
class Calibration:
    """Parameters, and what they reach; from `calibrate` in sets that had no part in the choice.

    label_rate: share of the `draws` sets with the class of the target. alpha_rate: share with alpha
    in its interval; alpha: the median alpha; both None for a normal target. scale: median over the
    sets of the median distance, divided by the target's; scale_low, scale_high: quantiles 0.05 and
    0.95 of the same.
    """

    target: Target
    candidate: Candidate
    label_rate: float
    alpha: float | None
    alpha_rate: float | None
    scale: float
    scale_low: float
    scale_high: float
    draws: int

    def misses(self) -> dict[str, float]:
        """By how much each target is missed, 0 where it is reached.

        class: what the share of sets lacks to CLASS_RATE. alpha: how far the median alpha lies
        outside the interval. scale: log10 of the factor, 0 within SCALE_TOLERANCE.
        """
        alpha = 0.0
        if self.alpha is not None:
            alpha = max(self.target.low - self.alpha, self.alpha - self.target.high, 0.0)
        near = abs(self.scale - 1) <= SCALE_TOLERANCE
        return {
            "class": max(0.0, CLASS_RATE - self.label_rate),
            "alpha": alpha,
            "scale": 0.0 if near else float(np.log10(self.scale)),
        }

    @property
    def reached(self) -> bool:
        """Whether no target is missed."""
        return not any(self.misses().values())


def calibrate(goal: Target, surveyed: Survey, *, draws: int = 100, seed: int = 1) -> Calibration:
    """Choose the candidate whose sets are most like the target, and measure it on new sets.

    Class and exponent come first, then the scale. Of the candidates whose share of sets of the
    right class is within 0.1 of the best (or of CLASS_RATE), and of which half the sets have an
    exponent in the interval, those with the nearest median go on, FINALISTS of them, each as it is
    and with its scale moved to the target's. They are tried on 20 new sets each, the choice is made
    anew, within 0.05 of the best, and the chosen one is measured on `draws` others.

    Arguments: surveyed, from `survey` with the target's vectors and rank.
    Raises: WdlibError for a survey without candidates.
    Source: docs/method.md, section 6.
    """
    if not surveyed:
        raise WdlibError("the survey has no candidates: give `candidates` shapes and ratios")
    finalists = _best(goal, surveyed, FINALISTS, 0.1)
    free = len({c.shape for c in surveyed}) > 1
    tuned = [_tuned(c, goal, free, [seed, 0, i]) for i, c in enumerate(finalists)]
    quick = {"rank": goal.rank, "replicates": QUICK_REPLICATES, "draws": 20}
    again = {
        c: outcomes(c, goal.vectors, seed=[seed, 1, i], **quick)
        for i, c in enumerate(dict.fromkeys([*finalists, *tuned]))
    }
    (chosen,) = _best(goal, again, 1, 0.05)
    return measure(goal, chosen, draws=draws, seed=[seed, 2])


def measure(
    goal: Target, candidate: Candidate, *, draws: int = 100, seed: int | list[int] = 1
) -> Calibration:
    """What a candidate reaches in `draws` sets.

    Raises: WdlibError as `outcomes` does.
    """
    found = outcomes(candidate, goal.vectors, rank=goal.rank, draws=draws, seed=seed)
    label_rate, alpha_rate, _ = _rates(goal, found)
    low, scale, high = np.quantile(found.medians / goal.median, (0.05, 0.5, 0.95))
    exponent = goal.alpha is not None
    return Calibration(
        target=goal,
        candidate=candidate,
        label_rate=label_rate,
        alpha=float(np.median(found.alphas)) if exponent else None,
        alpha_rate=alpha_rate if exponent else None,
        scale=float(scale),
        scale_low=float(low),
        scale_high=float(high),
        draws=draws,
    )


def _rates(goal: Target, found: Outcomes) -> tuple[float, float, float]:
    """Share of sets of the right class, share of right exponents, and median over the target's."""
    label = float(np.mean([label == goal.label for label in found.labels]))
    alpha = 1.0
    if goal.alpha is not None:
        alpha = float(np.mean((goal.low <= found.alphas) & (found.alphas <= goal.high)))
    return label, alpha, float(np.median(found.medians) / goal.median)


def _best(goal: Target, surveyed: Survey, n: int, slack: float) -> list[Candidate]:
    """The n candidates with the nearest scale among those that are best in class and exponent.

    A median alpha within the interval is what is asked for: half the sets.
    """
    rates = {c: _rates(goal, found) for c, found in surveyed.items()}
    both = {c: min(label, 2 * alpha, CLASS_RATE) for c, (label, alpha, _) in rates.items()}
    good = [c for c in surveyed if both[c] >= max(both.values()) - slack]
    return sorted(good, key=lambda c: abs(np.log(rates[c][2])))[:n]


def _tuned(candidate: Candidate, goal: Target, free: bool, seed: list[int]) -> Candidate:
    """The candidate with one parameter moved until the median is the target's, if it gets there."""
    for step in range(4):
        table = [
            table_distances(
                generated(candidate, goal.vectors, rank=goal.rank, rng=rng), not goal.vectors[1]
            )
            for rng in np.random.default_rng([*seed, step]).spawn(10)
        ]
        factor = goal.median / np.median([np.median(distances) for distances in table])
        if candidate.ratio > 1:
            ratio = max(1.0, candidate.ratio * factor**0.4)
            candidate = changed(candidate, ratio=float(ratio))
        elif isinstance(candidate.counts, ParetoCounts):
            scale = float(np.clip(candidate.counts.scale * factor, 1e-9, 1))
            candidate = changed(candidate, counts=changed(candidate.counts, scale=scale))
        elif free:
            rows, columns = candidate.shape
            candidate = changed(candidate, shape=(rows, max(rows, round(columns / factor))))
    return candidate
