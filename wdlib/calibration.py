"""Parameters of the generator whose sets of distances are like a reference's."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import product

import numpy as np

from wdlib import WdlibError
from wdlib.characterise import NORMAL, POWER_LAW, REPLICATES, Pair, classify
from wdlib.distances import cosine_distances, msv
from wdlib.fits.estimators import MIN_DISTINCT, power_law
from wdlib.fits.resampling import table_distances, vector_bootstrap
from wdlib.generator import GaussianCounts, ParetoCounts, generate, spectra_of

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
        fit = power_law(distances)
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
    return power_law(distances).alpha if distinct >= MIN_DISTINCT else np.nan


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
        pareto = product(shapes, PARETO_GRID, ratios)
        return tuple(Candidate(s, ParetoCounts(*law), r) for s, law, r in pareto)
    gaussian = product(shapes, GAUSSIAN_GRID, ratios, (1, 2))
    return tuple(Candidate(s, GaussianCounts(*law), r, t) for s, law, r, t in gaussian)


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
        found.append((verdict.label, power_law(distances).alpha, np.median(distances)))
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
    c = candidate

    def arrays(number: int) -> np.ndarray:
        return generate(number, c.shape, c.counts, sigma=c.sigma, ratio=c.ratio, rng=rng)

    if m is None:
        rows = columns = arrays(n)
    elif c.templates == 2:
        rows, columns = arrays(n), arrays(m)
    else:
        both = arrays(n + m)
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
        alpha, low, high = 0.0, self.target.low, self.target.high
        if self.alpha is not None and low is not None and high is not None:
            alpha = max(low - self.alpha, self.alpha - high, 0.0)
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
