"""Checked samples and tables of distances, and vectors drawn again with replacement."""

from collections.abc import Callable, Iterator

import numpy as np

from wdlib import WdlibError, first_line


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


def checked_distances(x: np.ndarray) -> np.ndarray:
    """Distances along one axis, float64, checked.

    Raises: WdlibError for negative or non-finite values.
    """
    if np.ma.isMaskedArray(x):
        x = np.ma.compressed(x)  # masked distances are not there
    x = _numbers(x).ravel()
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
    table = checked_table(table, symmetric)
    return table[np.triu_indices(len(table), 1)] if symmetric else table.ravel()


def _numbers(x: np.ndarray) -> np.ndarray:
    try:
        return np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WdlibError(
            f"a {type(x).__name__} is no array of numbers ({first_line(error)}): give one without "
            "missing values"
        ) from error


def checked_table(table: np.ndarray, symmetric: bool) -> np.ndarray:
    if np.ma.is_masked(table):
        raise WdlibError("a table with masked distances: leave out their vectors")
    table = _numbers(table)
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
    table = checked_table(table, symmetric)
    n, m = table.shape
    first, second = np.triu_indices(n, 1)
    for _ in range(replicates):
        rows = rng.integers(n, size=(n,))
        if symmetric:
            a, b = rows[first], rows[second]
            yield table[a, b][a != b]
        else:
            yield table[np.ix_(rows, rng.integers(m, size=m))].ravel()
