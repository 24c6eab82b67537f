"""Whether a power law fits: goodness-of-fit tests for independent draws and for shared vectors."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from wdlib.fits.estimators import (
    PowerLawFit,
    Sample,
    best_start,
    ks_distance,
    power_law,
    tail_index,
)
from wdlib.fits.resampling import checked_distances, checked_table, table_distances


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
    """Whether independent draws follow the power law that `power_law` finds in their tail.

    Each replicate draws as many values as `x` has positive ones: from the fitted law with
    probability n_tail / n, else from the values below xmin, with replacement. It is fitted from the
    start, xmin included.

    Arguments: x, one axis or more, non-negative, of any unit.
    Raises: WdlibError as `power_law` does.
    Source: Clauset, Shalizi, Newman, arXiv 0706.1062, section 4.1.
    Differs from the source: p is counted with the data as one more replicate. Distances that share
    vectors are not independent draws: see `goodness_of_fit_vectors`.
    """
    fit = power_law(x)
    null = independent_null(fit, checked_distances(x), np.random.default_rng(seed))
    return _goodness(fit, null, replicates, seed, "iid")


def goodness_of_fit_vectors(
    table: np.ndarray, *, symmetric: bool = True, replicates: int = 1000, seed: int = 0
) -> GoodnessOfFit:
    """Whether distances that share vectors follow the power law that `power_law` finds in them.

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
    Raises: WdlibError as `power_law` and `vector_bootstrap` do.
    Source: ours. The weights are those of Mammen, Annals of Statistics 21 (1993), 255. Size and
    power are measured by workflow/scripts/goodness_of_fit_size.py: on families that it was not
    designed on it rejects up to three times too often at 5 % (docs/method.md, section 4).
    """
    fit = power_law(table_distances(table, symmetric))
    rng = np.random.default_rng(seed)
    null = vector_null(fit, checked_table(table, symmetric), symmetric, rng)
    return _goodness(fit, null, replicates, seed, "vectors")


def independent_null(fit: PowerLawFit, x: np.ndarray, rng: np.random.Generator) -> Iterator[float]:
    """KS distances of independent draws from a fitted law and from the data below its xmin."""
    body = x[(x > 0) & (x < fit.xmin)]
    n = body.size + fit.n_tail
    while True:
        n_tail = rng.binomial(n, fit.n_tail / n)
        tail = fit.xmin * (1 + rng.pareto(fit.alpha - 1, n_tail))
        drawn = rng.choice(body, n - n_tail) if body.size else body
        yield power_law(np.concatenate([drawn, tail])).ks


def vector_null(
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
        sample = Sample.weighted(values, np.bincount(place, weights))
        start = best_start(sample)
        yield ks_distance(sample, start, 1 + tail_index(sample, start), np.inf)


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
