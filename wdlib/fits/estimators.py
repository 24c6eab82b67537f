"""Power-law fits of a set of distances, by three named estimators (docs/method.md, section 4).

`alpha` is always the exponent of the density p(x) ~ x^-alpha, so a Pareto law has shape alpha - 1.
Which estimator the paper used is not known, so a value of alpha is always given with its `method`:

csn     maximum likelihood above an xmin chosen by Kolmogorov-Smirnov distance
        (Clauset, Shalizi, Newman, SIAM Review 51, 2009, arXiv 0706.1062): `power_law`
full    maximum likelihood over all values, xmin = the smallest: `power_law_full`
loglog  least squares on a log-binned histogram: `power_law_loglog`

Zeros (the distance between identical vectors) are outside the support of every power law. They are
left out of the fits and counted in `n_zero`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wdlib import WdlibError
from wdlib.fits.resampling import checked_distances

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
    method: csn, full, loglog, or given for an xmin that the caller chose.
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


def power_law(x: np.ndarray, *, xmin: float | None = None) -> PowerLawFit:
    """Fit a power law to the tail of `x`, the start of the tail being part of the fit (csn).

    For every candidate xmin, alpha = 1 + n_tail / sum(ln(x / xmin)); the candidate with the
    smallest Kolmogorov-Smirnov distance wins, the smallest among equals. Candidates are the
    distinct values but the two largest. The scan is exact and gives what `powerlaw.Fit` 2.0 gives
    with `parameter_ranges={"alpha": (None, None)}`, its conventions included: the distance is taken
    at the distinct values, against P(X < x).

    Arguments: x, one axis or more, non-negative, of any unit; xmin, in the same unit, where the
    tail is to start instead, at the smallest value that it does not exceed (`method` is given).
    Raises: WdlibError for negative or non-finite values, for fewer than four distinct positive
    values (`powerlaw.Fit` then returns NaN), and for fewer than three from xmin on.
    Source: Clauset, Shalizi, Newman, arXiv 0706.1062, section 3.
    Differs from `powerlaw.Fit`: as it comes, that refuses candidates with alpha above 2.99, which
    moves xmin; with a lower range of 1 it refuses those below 1.01. Negative values it drops if a
    zero is among the data and keeps if not.
    """
    sample = Sample.of(x)
    if xmin is None:
        return _likelihood_fit(sample, best_start(sample), "csn")
    start = int(np.searchsorted(sample.values, xmin))
    if start > sample.values.size - 3:
        raise WdlibError(
            f"{sample.values.size - start} distinct values from {xmin:g} on: a power-law fit needs "
            f"3, so start at {sample.values[-3]:g} or below"
        )
    return _likelihood_fit(sample, start, "given")


def power_law_full(x: np.ndarray) -> PowerLawFit:
    """Fit a power law to all positive values of `x` by maximum likelihood (full).

    xmin is the smallest positive value, alpha = 1 + n_tail / sum(ln(x / xmin)). This is what
    `scipy.stats.pareto.fit(x, floc=0)` does: shape alpha - 1 and scale xmin.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `power_law` does.
    """
    return _likelihood_fit(Sample.of(x), 0, "full")


def power_law_loglog(x: np.ndarray, *, bins_per_decade: float = 10) -> PowerLawFit:
    """Fit a straight line to the log-binned histogram of `x` in log-log axes (loglog).

    The bins have equal width in log x and span the positive values exactly, at least
    `bins_per_decade` to a decade. The density of a bin, count / (n_tail * width), belongs to its
    geometric centre; empty bins are left out; every other bin counts the same. alpha is minus the
    slope. The estimator is a common one, not a good one: sparse bins in the tail bend the line.

    The law is taken on the range of the data, xmin to xmax, where any alpha can be normalised, and
    `ks` is measured against that truncated law.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `power_law` does, and for fewer than three bins that hold values.
    """
    sample = Sample.of(x)
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
    "csn": power_law,
    "full": power_law_full,
    "loglog": power_law_loglog,
}
"""The three estimators by name: what is reported, it reports by all three."""


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


def alpha_by_xmin(x: np.ndarray) -> AlphaByXmin:
    """The maximum likelihood exponent as the start of the tail moves.

    Fits at 50 values with equal numbers of distinct values of x between them, from the smallest to
    the last that leaves ten values above.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `power_law` does.
    """
    sample = Sample.of(x)
    ten_left = np.searchsorted(sample.below, sample.below[-1] - 10, side="right") - 1
    last = np.clip(ten_left, 0, sample.values.size - 3)
    starts = np.unique(np.linspace(0, last, 50).round().astype(int))
    found = [_likelihood_fit(sample, int(start), "csn") for start in starts]
    columns = ("xmin", "alpha", "sigma", "ks", "n_tail")
    return AlphaByXmin(**{name: np.array([getattr(f, name) for f in found]) for name in columns})


def ccdf(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The empirical complementary distribution, to be drawn on log axes.

    Returns: the distinct values of `x`, ascending, and the share of all values that are at least as
    large: from 1 down to the share of the largest, never 0.
    Raises: WdlibError for negative or non-finite values.
    """
    x = checked_distances(x)
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
class Sample:
    values: np.ndarray  # (m,) distinct positive values, ascending
    counts: np.ndarray  # (m,) how often each occurs; not whole numbers if weighted
    below: np.ndarray  # (m + 1,) how many positive values are smaller; the last entry counts all
    n: int
    n_zero: int

    @classmethod
    def of(cls, x: np.ndarray) -> "Sample":
        x = checked_distances(x)
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
    def weighted(cls, values: np.ndarray, weights: np.ndarray) -> "Sample":
        """Distinct positive values, ascending, that occur as often as the weights say."""
        return cls(values, weights, np.concatenate([[0], np.cumsum(weights)]), values.size, 0)


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
    sample: Sample, start: int, *, alpha: float, xmax: float, sigma: float | None, method: str
) -> PowerLawFit:
    return PowerLawFit(
        alpha=alpha,
        xmin=float(sample.values[start]),
        xmax=xmax,
        ks=ks_distance(sample, start, alpha, xmax),
        n=sample.n,
        n_tail=int(sample.below[-1] - sample.below[start]),
        n_zero=sample.n_zero,
        sigma=sigma,
        method=method,
        on_bound=start == sample.values.size - 3,
    )


def ks_distance(sample: Sample, start: int, alpha: float, xmax: float) -> float:
    law = 1 - _survival(sample.values[start:], alpha, sample.values[start], xmax)
    data = (sample.below[start:-1] - sample.below[start]) / (sample.below[-1] - sample.below[start])
    return float(np.abs(law - data).max())


def tail_index(sample: Sample, start: int) -> float:
    """The maximum likelihood estimate of alpha - 1 above a value of the sample."""
    logs = np.log(sample.values[start:] / sample.values[start])
    return (sample.below[-1] - sample.below[start]) / float(sample.counts[start:] @ logs)


def _likelihood_fit(sample: Sample, start: int, method: str) -> PowerLawFit:
    shape = tail_index(sample, start)
    sigma = float(shape / np.sqrt(sample.below[-1] - sample.below[start]))
    return _fit(sample, start, alpha=float(1 + shape), xmax=np.inf, sigma=sigma, method=method)


def best_start(sample: Sample) -> int:
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
