"""Which neuron of one MLP is which of another, and whether two answers agree by more than chance.

Everything here takes arrays. The rows of a matrix are neurons, its columns the axes of the hidden
state. `independence` reads models and asks these functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wdlib import WdlibError

IN_PLACE = 0.95
"""Embeddings whose tokens have this mean cosine are in one basis already."""

_ROWS = 1024  # of which cosines are taken at a time


@dataclass(frozen=True)
class Alignment:
    """A map of the hidden states of two models into one basis.

    name: "none", "axes" (a permutation with signs) or "rotation". of_a: (d_a, d), of_b: (d_b, d),
    arrays or sparse arrays; None leaves rows as they are. quality: mean cosine of the embeddings of
    tokens that the map was not fitted to; NaN where there are none.
    """

    name: str
    of_a: Any = None
    of_b: Any = None
    quality: float = float("nan")

    def a(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n, d_a) of the first model in the common basis: (n, d)."""
        return rows if self.of_a is None else rows @ self.of_a

    def b(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n, d_b) of the second model in the common basis: (n, d)."""
        return rows if self.of_b is None else rows @ self.of_b


NONE = Alignment("none")


def rotation(a: np.ndarray, b: np.ndarray) -> Alignment:
    """The partial isometry that brings rows of a nearest to those of b (orthogonal Procrustes).

    a: (v, d_a), b: (v, d_b), the same token in a row of both. Undoes any rotation of the hidden
    state, and where one width is the smaller, a projection onto a part of it.
    """
    left, _, right = np.linalg.svd(_tokens(a).T @ _tokens(b), full_matrices=False)
    return Alignment("rotation", of_a=left @ right)


def axes(a: np.ndarray, b: np.ndarray) -> Alignment:
    """The permutation of axes, with signs, that brings rows of a nearest to those of b.

    a: (v, d_a), b: (v, d_b) as for `rotation`. Axes of the wider model that find no partner are
    dropped: d is the smaller width. Linear assignment on the absolute cosines of columns.
    Source: arXiv 2510.06738, section 4.
    """
    from scipy import sparse
    from scipy.optimize import linear_sum_assignment

    cosines = unit(_tokens(a).T) @ unit(_tokens(b).T).T
    i, j = linear_sum_assignment(np.abs(cosines), maximize=True)
    signs, at = np.where(cosines[i, j] < 0, -1, 1).astype(np.float32), np.arange(len(i))
    of_a = sparse.csr_array((signs, (i, at)), shape=(a.shape[1], len(i)))
    of_b = sparse.csr_array((np.ones_like(signs), (j, at)), shape=(b.shape[1], len(j)))
    return Alignment("axes", of_a, of_b)


def token_cosine(alignment: Alignment, a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of the embeddings of shared tokens, (v, d_a) and (v, d_b), in the common basis.

    0 for other vocabularies, 1 for the same embedding. Embeddings are centred before.
    """
    return float((unit(alignment.a(_tokens(a))) * unit(alignment.b(_tokens(b)))).sum(1).mean())


def alignments(a: np.ndarray, b: np.ndarray) -> dict[str, Alignment]:
    """Every alignment by name, fitted to the even tokens and judged by the odd ones.

    a: (v, d_a), b: (v, d_b), embeddings of the tokens 0 to v - 1 of both models. "none" is there
    where the widths agree.
    """
    even, odd = slice(0, None, 2), slice(1, None, 2)
    found = [NONE] if a.shape[1] == b.shape[1] else []
    found += [axes(a[even], b[even]), rotation(a[even], b[even])]
    judged = [replace(one, quality=token_cosine(one, a[odd], b[odd])) for one in found]
    return {one.name: one for one in judged}


def chosen(found: Mapping[str, Alignment]) -> list[Alignment]:
    """The alignments worth a test, of those that `alignments` gives, by the embeddings alone.

    "none" alone where the embeddings are in place. Else "axes", or "rotation" where that fits
    better by a tenth; and "none" too where it can be, since the embedding may have been exchanged.
    """
    none, by_axes, rotated = (found.get(name) for name in ("none", "axes", "rotation"))
    kept = [none] if none else []
    if none and rotated and none.quality > min(IN_PLACE, 0.9 * rotated.quality):
        return kept
    if by_axes and rotated:
        kept.append(rotated if rotated.quality > 1.1 * by_axes.quality else by_axes)
    return kept


def _tokens(embedding: np.ndarray) -> np.ndarray:
    """Embeddings less their mean, of unit length: frequent tokens are not to decide alone."""
    return unit(embedding - embedding.mean(axis=0))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) scaled to unit length; rows of zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def matching(a: np.ndarray, b: np.ndarray, *, signed: bool = True) -> np.ndarray:
    """For each row of a (m, d) its own row of b (n, d), m <= n: (m,) ints, none twice.

    The assignment of the largest total cosine, or absolute cosine unless `signed`. Lengths of rows
    play no part.
    Raises: WdlibError for m > n.
    """
    from scipy.optimize import linear_sum_assignment

    if len(a) > len(b):
        raise WdlibError(f"{len(a)} rows cannot be matched into {len(b)}: give the fewer first")
    cosines = unit(a) @ unit(b).T
    return linear_sum_assignment(cosines if signed else np.abs(cosines), maximize=True)[1]


def nearest(a: np.ndarray, b: np.ndarray, *, signed: bool = True) -> np.ndarray:
    """For each row of a (m, d) the row of b (n, d) with the largest cosine: (m,) ints."""
    a, b = unit(a), unit(b)
    found = []
    for start in range(0, len(a), _ROWS):
        cosines = a[start : start + _ROWS] @ b.T
        found.append((cosines if signed else np.abs(cosines, out=cosines)).argmax(axis=1))
    return np.concatenate(found)


def log10_tail(agreements: int, m: int, n: int) -> float:
    """log10 of the chance that two random injections agree in so many places, or more.

    The injections, of m things into n >= m, are uniform and independent (m = n: the problem of
    rencontres). Exact: P(K >= k) = sum over s >= k of (-1)^(s-k) C(s-1, k-1) C(m, s) (n-s)! / n!,
    by inclusion and exclusion. The terms fall by more than 1/j at the j-th step, so nothing is
    lost to cancellation, and the first is taken out as a logarithm.

    Raises: WdlibError unless 0 <= agreements <= m <= n and n > 0.
    """
    from scipy.special import gammaln

    k = int(agreements)
    if not (0 <= k <= m <= n and n > 0):
        raise WdlibError(f"{k} of {m} things cannot agree in {n} places")
    if k == 0:
        return 0.0
    total = term = 1.0
    for s in range(k, m):
        term *= -s * (m - s) / ((s - k + 1) * (s + 1) * (n - s))
        total += term
        if abs(term) < 1e-17:
            break
    first = gammaln(m + 1) - gammaln(k + 1) - gammaln(m - k + 1) + gammaln(n - k + 1)
    return float(min(0.0, (first - gammaln(n + 1) + np.log(total)) / np.log(10)))


def log10_binomial_tail(successes: int, trials: int, chance: float) -> float:
    """log10 P(X >= successes) for X binomial; finite where the chance underflows."""
    from scipy.special import logsumexp
    from scipy.stats import binom

    terms = binom.logpmf(np.arange(successes, trials + 1), trials, chance)
    return float(min(0.0, logsumexp(terms) / np.log(10)))


def log10_spearman(one: np.ndarray, two: np.ndarray) -> float:
    """log10 of the one-sided p-value of Spearman's correlation of two matchings, (m,) each.

    By Student's t with m - 2 degrees of freedom, as arXiv 2502.12292 has it (its algorithm
    SPEARMAN); no less than 1/m!, which equal matchings have. 0 for m < 3.
    """
    from scipy.special import gammaln
    from scipy.stats import rankdata, t

    m = len(one)
    if m < 3:
        return 0.0
    r = float(np.corrcoef(rankdata(one), rankdata(two))[0, 1])
    least = -gammaln(m + 1) / np.log(10)
    if r >= 1:
        return float(least)
    x = r * np.sqrt((m - 2) / (1 - r * r))
    p = t.sf(x, m - 2)
    # Beyond the range of floats, the density's tail: C x^-(m-2), which is exact in the limit.
    found = np.log10(p) if p > 1e-290 else _log10_far(x, m - 2)
    return float(max(least, found))


def _log10_far(x: float, degrees: int) -> float:
    """log10 of the tail of Student's t at a large x, by the first term of its expansion."""
    from scipy.stats import t

    density = t.logpdf(x, degrees)
    return float((density + np.log((x + degrees / x) / degrees)) / np.log(10))


def log10_fisher(log10_ps: np.ndarray) -> float:
    """log10 of Fisher's combination of p-values, given as log10: they have to be independent.

    Chi-squared with 2L degrees of freedom in closed form, in logarithms.
    """
    from scipy.special import gammaln, logsumexp

    half, count = -float(np.sum(log10_ps)) * np.log(10), np.arange(len(log10_ps))
    if half <= 0:
        return 0.0
    terms = count * np.log(half) - gammaln(count + 1)
    return float(min(0.0, (logsumexp(terms) - half) / np.log(10)))


def log10_bonferroni(log10_ps: np.ndarray | list[float], tests: int) -> float:
    """log10 of the smallest of some p-values times the number of tests that were looked at."""
    return float(min(0.0, np.min(log10_ps) + np.log10(tests)))


def u_centred(rows: np.ndarray) -> np.ndarray:
    """The Gram matrix of rows (n, p), centred for the unbiased estimator and of unit norm: (n, n).

    The inner product of two such matrices is the unbiased CKA of their rows, for a linear kernel.
    Source: Szekely and Rizzo (2014), U-centring; arXiv 2510.06738, section 4.

    Raises: WdlibError for fewer than four rows.
    """
    n = len(rows)
    if n < 4:
        raise WdlibError(f"unbiased CKA takes four rows at least, and there are {n}")
    wide = rows.astype(np.float64)
    gram = wide @ wide.T
    np.fill_diagonal(gram, 0)
    sums = gram.sum(axis=0)
    gram -= (sums[:, None] + sums) / (n - 2) - sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    length = np.linalg.norm(gram)
    return gram / (length if length > 0 else 1)


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased CKA with a linear kernel of two sets of rows, (n, p) and (n, q): about 0 to 1.

    Near 0 for unrelated rows whatever p and q are; 1 where one set is the other rotated, scaled or
    shifted. Source: arXiv 2510.06738, section 4; the estimator is that of Song et al. (2012).
    """
    return float((u_centred(a) * u_centred(b)).sum())
