"""Power-law fits of a set of distances, by three named estimators (docs/method.md, section 4).

`alpha` is always the exponent of the density p(x) ~ x^-alpha, so a Pareto law has shape alpha - 1.
Which estimator the paper used is not known, so a value of alpha is always given with its `method`:

csn     maximum likelihood above an xmin chosen by Kolmogorov-Smirnov distance
        (Clauset, Shalizi, Newman, SIAM Review 51, 2009, arXiv 0706.1062): `fit_power_law`
full    maximum likelihood over all values, xmin = the smallest: `fit_full`
loglog  least squares on a log-binned histogram: `fit_loglog`

Zeros (the distance between identical vectors) are outside the support of every power law. They are
left out of the fits and counted in `n_zero`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from wdlib import WdlibError

MIN_DISTINCT = 4
"""Distinct positive values that a fit needs: two candidates for xmin, and two above both."""


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted power law: density proportional to x^-alpha for xmin <= x <= xmax.

    alpha: exponent of the density, no unit.
    xmin, xmax: support of the law, in the unit of the data; xmax is inf unless `method` is loglog.
    ks: largest |F(x) - P(X < x)| over the distinct values in the support, P among those values.
    n: values given; n_tail: values in the support; n_zero: zeros left out.
    sigma: standard error of alpha for independent draws, (alpha - 1) / sqrt(n_tail); None for
        loglog. Distances that share vectors are not independent: it is then too small.
    method: csn, full or loglog.
    on_bound: csn chose the last xmin open to it, with two distinct values left above: the minimum
        may lie beyond, and alpha is not to be reported. The exponent itself has no bound.
    """

    alpha: float
    xmin: float
    xmax: float
    ks: float
    n: int
    n_tail: int
    n_zero: int
    sigma: float | None
    method: str
    on_bound: bool


def fit_power_law(x: np.ndarray) -> PowerLawFit:
    """Fit a power law to the tail of `x`, the start of the tail being part of the fit (csn).

    For every candidate xmin, alpha = 1 + n_tail / sum(ln(x / xmin)); the candidate with the
    smallest Kolmogorov-Smirnov distance wins, the smallest among equals. Candidates are the
    distinct values but the two largest. The scan is exact and gives what `powerlaw.Fit` 2.0 gives
    with `parameter_ranges={"alpha": (None, None)}`, its conventions included: the distance is taken
    at the distinct values, against P(X < x).

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError for negative or non-finite values, and for fewer than four distinct positive
    values (`powerlaw.Fit` then returns NaN).
    Source: Clauset, Shalizi, Newman, arXiv 0706.1062, section 3.
    Differs from `powerlaw.Fit`: as it comes, that refuses candidates with alpha above 2.99, which
    moves xmin; with a lower range of 1 it refuses those below 1.01. Negative values it drops if a
    zero is among the data and keeps if not.
    """
    sample = _Sample.of(x)
    return _likelihood_fit(sample, _scan(sample), "csn")


def fit_full(x: np.ndarray) -> PowerLawFit:
    """Fit a power law to all positive values of `x` by maximum likelihood (full).

    xmin is the smallest positive value, alpha = 1 + n_tail / sum(ln(x / xmin)). This is what
    `scipy.stats.pareto.fit(x, floc=0)` does: shape alpha - 1 and scale xmin.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `fit_power_law` does.
    """
    return _likelihood_fit(_Sample.of(x), 0, "full")


def fit_loglog(x: np.ndarray, *, bins_per_decade: float = 10) -> PowerLawFit:
    """Fit a straight line to the log-binned histogram of `x` in log-log axes (loglog).

    The bins have equal width in log x and span the positive values exactly, at least
    `bins_per_decade` to a decade. The density of a bin, count / (n_tail * width), belongs to its
    geometric centre; empty bins are left out; every other bin counts the same. alpha is minus the
    slope. The estimator is a common one, not a good one: sparse bins in the tail bend the line.

    The law is taken on the range of the data, xmin to xmax, where any alpha can be normalised, and
    `ks` is measured against that truncated law.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `fit_power_law` does, and for fewer than three bins that hold values.
    """
    sample = _Sample.of(x)
    xmin, xmax = sample.values[0], sample.values[-1]
    n_bins = max(1, int(np.ceil(bins_per_decade * np.log10(xmax / xmin))))
    edges = np.geomspace(xmin, xmax, n_bins + 1)
    counts, _ = np.histogram(sample.values, edges, weights=sample.counts)
    filled = counts > 0
    if filled.sum() < 3:
        raise WdlibError(
            f"the values span {np.log10(xmax / xmin):.2g} decades and fill {filled.sum()} bins, "
            "a line needs 3: raise bins_per_decade"
        )
    density = counts[filled] / (sample.below[-1] * np.diff(edges)[filled])
    centre = np.sqrt(edges[1:] * edges[:-1])[filled]
    alpha = -float(np.polyfit(np.log(centre), np.log(density), 1)[0])
    return _fit(sample, 0, alpha=alpha, xmax=float(xmax), sigma=None, method="loglog")


ESTIMATORS: dict[str, Callable[[np.ndarray], PowerLawFit]] = {
    "csn": fit_power_law,
    "full": fit_full,
    "loglog": fit_loglog,
}
"""The three estimators by name: what is reported, it reports by all three."""


def vector_bootstrap(
    table: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    replicates: int,
    rng: np.random.Generator,
    symmetric: bool = True,
) -> np.ndarray:
    """A statistic of all distances between vectors, recomputed as the vectors are resampled.

    Distances that share a vector are dependent, so it is vectors that are drawn, with replacement.
    Within one set of vectors, pairs that then compare a vector with itself are left out: they would
    add zeros that the data cannot have. Between two sets, each is drawn on its own.

    Arguments: table, the distances, no unit: (n, n) and symmetric within one set of vectors, or
    with `symmetric=False` (n, m) between two; statistic, of one axis of distances.
    Returns: float64 (replicates,), the statistic of each resample. Its quantiles bound an interval.
    Raises: WdlibError for a symmetric table that is not square.
    """
    draws = vector_draws(table, symmetric=symmetric, replicates=replicates, rng=rng)
    return np.array([statistic(distances) for distances in draws])


@dataclass(frozen=True)
class GoodnessOfFit:
    """How often data that do follow the fitted power law lie at least as far from it.

    p: (1 + replicates with a KS distance of at least `ks`) / (1 + replicates), never 0: small means
        that the power law is rejected, large that these data do not contradict it.
    p_error: Monte Carlo standard error of p, sqrt(p (1 - p) / replicates).
    ks: KS distance between the data and the fit.
    replicates, seed: what to give to have the same p again.
    method: iid (independent draws) or vectors (distances that share vectors).
    """

    p: float
    p_error: float
    ks: float
    replicates: int
    seed: int
    method: str


def goodness_of_fit(x: np.ndarray, *, replicates: int = 1000, seed: int = 0) -> GoodnessOfFit:
    """Whether independent draws follow the power law that `fit_power_law` finds in their tail.

    Each replicate draws as many values as `x` has positive ones: from the fitted law with
    probability n_tail / n, else from the values below xmin, with replacement. It is fitted from the
    start, xmin included.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `fit_power_law` does.
    Source: Clauset, Shalizi, Newman, arXiv 0706.1062, section 4.1.
    Differs from the source: p is counted with the data as one more replicate. Distances that share
    vectors are not independent draws: see `goodness_of_fit_vectors`.
    """
    fit = fit_power_law(x)
    null = _independent_null(fit, flat(x), np.random.default_rng(seed))
    return _goodness(fit, null, replicates, seed, "iid")


def goodness_of_fit_vectors(
    table: np.ndarray, *, symmetric: bool = True, replicates: int = 1000, seed: int = 0
) -> GoodnessOfFit:
    """Whether distances that share vectors follow the power law that `fit_power_law` finds in them.

    The null hypothesis is imposed on the table: every distance in the tail moves to the quantile of
    the fitted law at its rank, so that the law holds and what the vectors share stays. A replicate
    then weights vector k by w_k, of mean, variance and third central moment 1, and the distance
    between k and l by W = w_k w_l; it is fitted from the start, xmin included. Weights, not draws
    with replacement: those repeat vectors, and the tied distances lengthen every KS distance.

    The variance of W is 3, and its covariance 1 between distances that share a vector. That is
    right for what the vectors contribute and three times too much for what is particular to each
    distance; 1 + s (W - 1) takes the place of W, with s <= 1 such that the variance of the share of
    distances below a level, averaged over ten levels of the tail, is that estimated from the table.

    Arguments: table, symmetric: as `vector_bootstrap`; non-negative.
    Raises: WdlibError as `fit_power_law` and `vector_bootstrap` do.
    Source: ours. The weights are those of Mammen, Annals of Statistics 21 (1993), 255. Size and
    power are measured by docs/experiments/goodness_of_fit_size.py: on families that it was not
    designed on it rejects up to three times too often at 5 % (docs/method.md, section 4).
    """
    fit = fit_power_law(table_distances(table, symmetric))
    rng = np.random.default_rng(seed)
    null = _vector_null(fit, _checked_table(table, symmetric), symmetric, rng)
    return _goodness(fit, null, replicates, seed, "vectors")


@dataclass(frozen=True)
class AlphaByXmin:
    """Fits of one data set at a grid of xmin, a value of each array per xmin.

    xmin: in the unit of the data; alpha: exponent; sigma: its standard error for independent draws;
    ks: KS distance; n_tail: values of at least xmin.
    """

    xmin: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    ks: np.ndarray
    n_tail: np.ndarray


def alpha_by_xmin(x: np.ndarray, xmins: np.ndarray | None = None) -> AlphaByXmin:
    """The maximum likelihood exponent as the start of the tail moves.

    Arguments: x, one axis or more, non-negative, of any unit; xmins, one axis, in the unit of x:
    each is moved up to the next value of x. Without it, 50 values with equal numbers of distinct
    values of x between them, from the smallest to the last that leaves ten values above.
    Raises: WdlibError as `fit_power_law` does, and for an xmin with fewer than three distinct
    values at or above it.
    """
    sample = _Sample.of(x)
    last = sample.values.size - 3
    if xmins is None:
        ten_left = np.searchsorted(sample.below, sample.below[-1] - 10, side="right") - 1
        starts = np.linspace(0, np.clip(ten_left, 0, last), 50).round().astype(int)
    else:
        starts = np.searchsorted(sample.values, np.asarray(xmins, dtype=np.float64))
        if starts.size and starts.max() > last:
            raise WdlibError(
                f"xmin = {np.max(xmins):g} leaves fewer than three distinct values: the largest "
                f"that can be fitted is {sample.values[last]:g}"
            )
    found = [_likelihood_fit(sample, int(start), "csn") for start in np.unique(starts)]
    columns = ("xmin", "alpha", "sigma", "ks", "n_tail")
    return AlphaByXmin(**{name: np.array([getattr(f, name) for f in found]) for name in columns})


def ccdf(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The empirical complementary distribution, to be drawn on log axes.

    Returns: the distinct values of `x`, ascending, and the share of all values that are at least as
    large: from 1 down to the share of the largest, never 0.
    Raises: WdlibError for negative or non-finite values.
    """
    x = flat(x)
    values, counts = np.unique(x, return_counts=True)
    return values, np.cumsum(counts[::-1])[::-1] / x.size


def power_law_ccdf(fit: PowerLawFit, x: np.ndarray) -> np.ndarray:
    """P(X >= x) of a fitted law, scaled to lie on the `ccdf` of the data that it was fitted to.

    Returns: float64 in the shape of `x`: n_tail / n at xmin, falling from there, 0 from xmax on;
    NaN below xmin, where the law says nothing.
    """
    x = np.asarray(x, dtype=np.float64)
    inside = np.maximum(x, fit.xmin)
    survival = _survival(inside, fit.alpha, fit.xmin, fit.xmax)
    return np.where(x >= fit.xmin, fit.n_tail / fit.n * survival, np.nan)


@dataclass(frozen=True)
class _Sample:
    values: np.ndarray  # (m,) distinct positive values, ascending
    counts: np.ndarray  # (m,) how often each occurs; not whole numbers if weighted
    below: np.ndarray  # (m + 1,) how many positive values are smaller; the last entry counts all
    n: int
    n_zero: int

    @classmethod
    def of(cls, x: np.ndarray) -> "_Sample":
        x = flat(x)
        positive = x[x > 0]
        values, counts = np.unique(positive, return_counts=True)
        if values.size < MIN_DISTINCT:
            raise WdlibError(
                f"{values.size} distinct positive values among {x.size}: a power-law fit needs "
                f"{MIN_DISTINCT}, so compare more vectors"
            )
        below = np.concatenate([[0], np.cumsum(counts)])
        return cls(values, counts, below, x.size, x.size - positive.size)

    @classmethod
    def weighted(cls, values: np.ndarray, weights: np.ndarray) -> "_Sample":
        """Distinct positive values, ascending, that occur as often as the weights say."""
        return cls(values, weights, np.concatenate([[0], np.cumsum(weights)]), values.size, 0)


def flat(x: np.ndarray) -> np.ndarray:
    """Distances along one axis, float64, checked.

    Raises: WdlibError for negative or non-finite values.
    """
    x = np.asarray(x, dtype=np.float64).ravel()
    bad = np.flatnonzero(~(np.isfinite(x) & (x >= 0)))
    if bad.size:
        raise WdlibError(
            f"value {bad[0]} of {x.size} is {x[bad[0]]}: distances are finite and not negative, "
            "check what they were computed from"
        )
    return x


def table_distances(table: np.ndarray, symmetric: bool) -> np.ndarray:
    """The distances of a table along one axis: of a symmetric one those above the diagonal.

    Arguments, Raises: as `vector_bootstrap`.
    """
    table = _checked_table(table, symmetric)
    return table[np.triu_indices(len(table), 1)] if symmetric else table.ravel()


def _checked_table(table: np.ndarray, symmetric: bool) -> np.ndarray:
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or (symmetric and table.shape[0] != table.shape[1]):
        raise WdlibError(
            f"a table of shape {table.shape}: expected all distances within one set of vectors, "
            "(n, n), or with symmetric=False between two, (n, m)"
        )
    return table


def vector_draws(
    table: np.ndarray, *, symmetric: bool, replicates: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The distances, one axis, between vectors drawn with replacement, replicate by replicate.

    Arguments, Raises: as `vector_bootstrap`, which applies a statistic to them.
    """
    table = _checked_table(table, symmetric)
    n, m = table.shape
    upper = np.triu_indices(n, 1)
    for _ in range(replicates):
        rows = rng.integers(n, size=n)
        if symmetric:
            a, b = rows[upper[0]], rows[upper[1]]
            yield table[a, b][a != b]
        else:
            yield table[np.ix_(rows, rng.integers(m, size=m))].ravel()


def _independent_null(fit: PowerLawFit, x: np.ndarray, rng: np.random.Generator) -> Iterator[float]:
    """KS distances of independent draws from a fitted law and from the data below its xmin."""
    body = x[(x > 0) & (x < fit.xmin)]
    n = body.size + fit.n_tail
    while True:
        n_tail = rng.binomial(n, fit.n_tail / n)
        tail = fit.xmin * (1 + rng.pareto(fit.alpha - 1, n_tail))
        drawn = rng.choice(body, n - n_tail) if body.size else body
        yield fit_power_law(np.concatenate([drawn, tail])).ks


def _vector_null(
    fit: PowerLawFit, table: np.ndarray, symmetric: bool, rng: np.random.Generator
) -> Iterator[float]:
    """KS distances of a table that follows a fitted law, as its vectors are weighted at random."""
    n, m = table.shape
    pairs = np.triu(table, 1) > 0 if symmetric else table > 0
    rows, columns = np.nonzero(pairs)
    values, place, counts = np.unique(table[pairs], return_inverse=True, return_counts=True)
    tail = values >= fit.xmin
    above = np.cumsum(counts[::-1])[::-1] - counts / 2
    values[tail] = fit.xmin * (above[tail] / fit.n_tail) ** (-1 / (fit.alpha - 1))
    shrink = _shrink(table, symmetric, fit.xmin)
    while True:
        w = _mammen(n, rng)
        v = w if symmetric else _mammen(m, rng)
        weights = 1 + shrink * (w[rows] * v[columns] - 1)
        sample = _Sample.weighted(values, np.bincount(place, weights))
        start = _scan(sample)
        yield _ks(sample, start, 1 + _shape(sample, start), np.inf)


def _mammen(n: int, rng: np.random.Generator) -> np.ndarray:
    """n weights of mean 1 on two points, with variance and third central moment near 1."""
    golden = (1 + np.sqrt(5)) / 2
    w = np.where(rng.random(n) < (golden - 1) / np.sqrt(5), 1 + golden, 2 - golden)
    return w / w.mean()


def _shrink(table: np.ndarray, symmetric: bool, xmin: float) -> float:
    """The factor s of `goodness_of_fit_vectors`, between sqrt(1/3) and 1.

    With A the indicators of distances below a level, less their mean: `own` sums A^2, `shared` the
    products of all ordered pairs of distances that share a vector. The share of distances below the
    level has variance (shared + own) / N^2, up to what taking off the mean costs; products of
    random weights give it (shared + 3 own) / N^2.
    """
    pairs = ~np.eye(len(table), dtype=bool) if symmetric else np.ones(table.shape, dtype=bool)
    tail = table[pairs & (table >= xmin)]
    own = shared = 0.0
    for level in np.quantile(tail, np.linspace(0.05, 0.95, 10)):
        below = table <= level
        centred = np.where(pairs, below - below[pairs].mean(), 0)
        squares = (centred**2).sum()
        by_vector = (centred.sum(axis=1) ** 2).sum() - squares
        if symmetric:
            own, shared = own + squares / 2, shared + by_vector
        else:
            own, shared = own + squares, shared + by_vector + (centred.sum(0) ** 2).sum() - squares
    shared = max(shared, 0.0)
    n, m = table.shape
    # of all ordered pairs of distances, those that share a vector or are the same
    related = (4 * n - 6) / (n * (n - 1)) if symmetric else (n + m - 1) / (n * m)
    return float(np.sqrt(min(1.0, (shared + own) / (1 - related) / (shared + 3 * own))))


def _goodness(
    fit: PowerLawFit, null: Iterator[float], replicates: int, seed: int, method: str
) -> GoodnessOfFit:
    as_far = sum(ks >= fit.ks for ks in islice(null, replicates))
    p = (1 + as_far) / (1 + replicates)
    error = float(np.sqrt(p * (1 - p) / replicates))
    return GoodnessOfFit(p, error, fit.ks, replicates, seed, method)


def _survival(x: np.ndarray, alpha: float, xmin: float, xmax: float) -> np.ndarray:
    if np.isinf(xmax):
        return (x / xmin) ** (1 - alpha)
    height = np.log(xmax / xmin)
    depth = np.minimum(np.log(x / xmin), height)
    if alpha == 1:
        return 1 - depth / height
    return (
        np.exp((1 - alpha) * depth)
        * np.expm1((1 - alpha) * (height - depth))
        / np.expm1((1 - alpha) * height)
    )


def _fit(
    sample: _Sample, start: int, *, alpha: float, xmax: float, sigma: float | None, method: str
) -> PowerLawFit:
    return PowerLawFit(
        alpha=alpha,
        xmin=float(sample.values[start]),
        xmax=xmax,
        ks=_ks(sample, start, alpha, xmax),
        n=sample.n,
        n_tail=int(sample.below[-1] - sample.below[start]),
        n_zero=sample.n_zero,
        sigma=sigma,
        method=method,
        on_bound=start == sample.values.size - 3,
    )


def _ks(sample: _Sample, start: int, alpha: float, xmax: float) -> float:
    law = 1 - _survival(sample.values[start:], alpha, sample.values[start], xmax)
    data = (sample.below[start:-1] - sample.below[start]) / (sample.below[-1] - sample.below[start])
    return float(np.abs(law - data).max())


def _shape(sample: _Sample, start: int) -> float:
    """The maximum likelihood estimate of alpha - 1 above a value of the sample."""
    logs = np.log(sample.values[start:] / sample.values[start])
    return (sample.below[-1] - sample.below[start]) / float(sample.counts[start:] @ logs)


def _likelihood_fit(sample: _Sample, start: int, method: str) -> PowerLawFit:
    shape = _shape(sample, start)
    sigma = float(shape / np.sqrt(sample.below[-1] - sample.below[start]))
    return _fit(sample, start, alpha=float(1 + shape), xmax=np.inf, sigma=sigma, method=method)


def _scan(sample: _Sample) -> int:
    """Index of the distinct value which, as xmin, gives the smallest KS distance.

    The distance of a candidate is a maximum over its tail, so any position of the tail gives a
    lower bound. All candidates get one from the middle of their tails; then the most promising is
    computed in full, and the position of its maximum sharpens the bound of all others: neighbours
    have theirs at nearly the same place. Whoever's bound exceeds the best distance is out.
    """
    values, below = sample.values, sample.below[:-1]
    n_tail = sample.below[-1] - below
    # sum of ln(x / xmin) over each tail, from the gaps between neighbours: nothing cancels
    gaps = np.log1p(np.diff(values) / values[:-1])
    shape = n_tail[:-1] / np.cumsum((n_tail[1:] * gaps)[::-1])[::-1]
    last = values.size - 1

    def deviation(at: np.ndarray | int, xmin: np.ndarray | int) -> np.ndarray:
        law = 1 - (values[at] / values[xmin]) ** -shape[xmin]
        return np.abs(law - (below[at] - below[xmin]) / n_tail[xmin])

    alive = np.arange(last - 1)
    bound = deviation((alive + last) // 2, alive)
    best = (np.inf, last)
    while alive.size:
        chosen = alive[np.argmin(bound)]
        tail = deviation(np.arange(chosen, last + 1), chosen)
        worst = chosen + np.argmax(tail)
        best = min(best, (tail.max(), chosen))
        seen = alive <= worst
        bound[seen] = np.maximum(bound[seen], deviation(worst, alive[seen]))
        keep = (bound <= best[0] + _SLACK) & (alive != chosen)
        alive, bound = alive[keep], bound[keep]
    return int(best[1])


_SLACK = 1e-14  # above the rounding of a deviation: who is this close is computed, not discarded
