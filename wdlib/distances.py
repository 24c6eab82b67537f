"""From singular values to the distances between them (arXiv 2509.00046; docs/method.md, section 3).

`values` is everywhere the content of a `Spectra`: a dictionary from projection type to the float64
array (L, r) whose row l holds the r largest singular values of that type's matrix in layer l.
"""

from collections.abc import Mapping
from itertools import combinations_with_replacement

import numpy as np
from scipy.spatial.distance import cdist, pdist

from wdlib import TYPES, WdlibError


def cosine_distances(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Cosine distances between the rows of `a`, or between the rows of `a` and those of `b`.

    d(x, y) = || x/|x| - y/|y| ||^2 / 2, which equals 1 - cos(x, y) but keeps its digits when the
    distance is small: the differences are taken first, and squared after. Equal rows are at 0
    exactly; the relative error is about 3e-16 / sqrt(d).

    Arguments: a (n, r) and b (m, r), real numbers of any one unit.
    Returns: float64, no unit, from 0 to 2: (n, m), or without `b` the n(n-1)/2 pairs above the
    diagonal, row by row.
    Raises: WdlibError for a row that is zero or not finite (it has no direction), and for arrays
    that are not matrices of the same number of columns.
    """
    unit_a = _unit_rows(a, "the first matrix")
    if b is None:
        return pdist(unit_a, "sqeuclidean") / 2
    unit_b = _unit_rows(b, "the second matrix")
    if unit_a.shape[1] != unit_b.shape[1]:
        raise WdlibError(
            f"the rows to compare have {unit_a.shape[1]} and {unit_b.shape[1]} entries: "
            "compute both spectra at the same rank"
        )
    return cdist(unit_a, unit_b, "sqeuclidean") / 2


def msv(values: Mapping[str, np.ndarray], type: str) -> np.ndarray:
    """MSV[type]: the singular value vectors of one projection type, a row per layer.

    Returns: float64 (L, r), descending along each row, in the unit of the weights.
    Raises: WdlibError if the type is absent from `values`, or if a row is zero or not finite.
    Source: arXiv 2509.00046 (docs/method.md, section 2).
    """
    if type not in values:
        raise WdlibError(f"no singular values of type {type!r}: this model has {', '.join(values)}")
    return _checked(values[type], f"MSV[{type}]")


def dsv(values: Mapping[str, np.ndarray], p: str, q: str) -> np.ndarray:
    """DSV[p,q]: the cosine distances between the singular value vectors of two types.

    Returns: float64, one axis, no unit: all L x L distances row by row if p and q differ, the
    L(L-1)/2 pairs above the diagonal if they are the same type.
    Raises: WdlibError as `msv` and `cosine_distances` do.
    Source: arXiv 2509.00046 (docs/method.md, section 3).
    """
    if p == q:
        return cosine_distances(msv(values, p))
    return cosine_distances(msv(values, p), msv(values, q)).ravel()


def dsv_pairs(values: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """DSV[p,q] of every unordered pair of the types present, p before q in the order of `TYPES`.

    Returns: a dictionary from (p, q) to what `dsv(values, p, q)` returns. Together the arrays hold
    the same distances as `dsv_all`, told apart by pair of types.
    Raises: WdlibError as `dsv` does.
    """
    return {
        (p, q): dsv(values, p, q) for p, q in combinations_with_replacement(_present(values), 2)
    }


def dsv_all(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """DSV over everything: the cosine distances between all pairs of singular value vectors.

    Returns: float64, no unit: n(n-1)/2 distances between the n vectors taken by type in the order
    of `TYPES`, then by layer (n = 7L when all types are present): the pairs above the diagonal, row
    by row.
    Raises: WdlibError as `msv` and `cosine_distances` do, and for ranks that differ between types.
    Source: arXiv 2509.00046 (docs/method.md, section 3).
    """
    rows = [msv(values, type) for type in _present(values)]
    ranks = {row.shape[1] for row in rows}
    if len(ranks) != 1:
        raise WdlibError(f"the types differ in rank ({sorted(ranks)}): compute them at one rank")
    return cosine_distances(np.concatenate(rows))


def _present(values: Mapping[str, np.ndarray]) -> list[str]:
    unknown = set(values) - set(TYPES)
    if unknown or not values:
        found = ", ".join(sorted(unknown)) or "nothing"
        raise WdlibError(f"expected types among {', '.join(TYPES)} but found {found}")
    return [type for type in TYPES if type in values]


def _unit_rows(matrix: np.ndarray, name: str) -> np.ndarray:
    rows = _checked(matrix, name)
    rows = rows / np.abs(rows).max(axis=1, keepdims=True)  # so that no square over- or underflows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _checked(matrix: np.ndarray, name: str) -> np.ndarray:
    if np.ma.is_masked(matrix):
        raise WdlibError(f"{name} has masked entries: leave out their rows")
    rows = np.asarray(matrix, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise WdlibError(f"{name} has shape {rows.shape}: expected a matrix, a vector per row")
    bad = np.flatnonzero(~(np.isfinite(rows).all(axis=1) & rows.any(axis=1)))
    if bad.size:
        raise WdlibError(
            f"row {bad[0]} of {name} is zero or not finite and has no direction: "
            "check the weights that it was computed from"
        )
    return rows
