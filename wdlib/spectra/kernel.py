"""One matrix -> its r largest singular values, with proven errors.

The spectra of language model weights are flat: next to the r-th singular value stand others within
a fraction of a percent. Sketching methods, which rely on decay, are wrong by percents there. What
is used instead is chosen per matrix (arXiv 2509.00046, section 2, asks for r = 16, 64, 256 and
names no algorithm):

`gram-lanczos`
    Float32 product G = W W^T, block Lanczos on G, then Rayleigh-Ritz with the exact W in float64.
`gram-float64`
    Float64 product and all its eigenvalues. For small matrices, for many values, and whenever the
    first method cannot prove its result.
`svd-float64`
    LAPACK's singular value decomposition, where squaring W would cost too many digits.

The same lines run on numpy's arrays and on a device's (`wdlib.spectra.arrays`).
"""

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg

from wdlib import WdlibError
from wdlib.checkpoints.formats import BFLOAT16
from wdlib.spectra.arrays import NUMPY, Array, Backend, Torch, one_thread

TOLERANCE = 1e-5
"""Relative error that every reported value is proven to keep."""

PROBES = 8
PROBE_FACTOR = 10.0
"""||F|| <= PROBE_FACTOR sqrt(2/pi) max_j ||F x_j|| over PROBES Gaussian x_j, except with
probability PROBE_FACTOR ** -PROBES (Halko, Martinsson, Tropp, arXiv 0909.4061, lemma 4.1)."""


@dataclass(frozen=True)
class SingularValues:
    """The r largest singular values of one matrix.

    values: (r,) float64, descending. error: (r,) float64, a bound on |values - exact|.
    method: which algorithm gave them.
    """

    values: np.ndarray
    error: np.ndarray
    method: str


def top_singular_values(
    matrix: Any,
    r: int,
    *,
    device: str | None = None,
    name: str = "the matrix",
) -> SingularValues:
    """The r largest singular values of a matrix, with a bound on the error of each.

    matrix: (rows, columns) real, any memory order, an array or a torch tensor (of any float type,
    on any device); types wider than float64 are rounded to it, and the bounds say so. r: 1 <= r <=
    min(rows, columns).
    The bounds are proven: the values above the cut are counted, so that none can be missed. Where
    the proof fails, a slower method answers.
    device: "cpu", "cuda", "cuda:1", ... or "mps", where all is computed; None is where the matrix
    is. The device need not be trusted in float32: what rounding did is in the proof. A device
    without float64 (mps) leaves what is proven in float64 to the CPU. Where the device's memory or
    torch's operations on it do not suffice, the CPU computes the matrix, with a RuntimeWarning. The
    CPU uses one thread of BLAS: matrices side by side are faster (`wdlib.spectra.compute`).

    Raises WdlibError for NaN, infinity, an r out of range (`name` is named in the message), or a
    device that is not there.
    Source: arXiv 2509.00046, section 2 (the paper names no algorithm).
    """
    W, rounding = _real(matrix, name)
    if W.ndim != 2 or not 1 <= r <= min(W.shape):
        raise WdlibError(
            f"{name} of shape {tuple(W.shape)} has no {r} singular values: "
            f"ask for a rank from 1 to {min(W.shape) if W.ndim == 2 else 0}."
        )
    where = device or ("cpu" if isinstance(W, np.ndarray) else str(W.device))
    with one_thread():
        result = None
        if where != "cpu":
            result = _on_device(W, r, where, name)
        if result is None:
            result = _values(NUMPY, NUMPY.take(W), r, name)
    return SingularValues(result.values, result.error + rounding, result.method)


def _real(matrix: Any, name: str) -> tuple[Array, float]:
    """A tensor of floats or an array of numpy's, and what rounding it to float64 took, in norm."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(matrix, torch.Tensor):
        matrix = matrix.detach()
        if matrix.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return matrix, 0.0
        matrix = matrix.cpu().numpy()
    if np.ma.is_masked(matrix):
        raise WdlibError(f"{name} has masked entries: fill them, or leave its rows or columns out.")
    W = np.asarray(matrix)
    if W.dtype in (np.float32, np.float64, BFLOAT16):
        return W, 0.0
    if W.dtype.kind not in "fiub":
        raise WdlibError(f"{name} holds {W.dtype}, not real numbers: give an array of floats.")
    wide = W.astype(np.float64)
    same = np.array_equal(wide.astype(W.dtype), W)
    # Weyl: a value moves by at most ||wide - W||_2.
    return wide, 0.0 if same else float(np.finfo(float).eps * np.linalg.norm(wide))


_SHORT = {
    "out of memory": "its memory is too small",
    "ALLOC_FAILED": "its memory is too small",
    "failed to converge": "its eigenvalue solver fails",
    "implemented for": "torch lacks an operation there",
}
"""Words of torch's errors where a device cannot do a matrix, and why; others are faults."""


def _on_device(W: Array, r: int, device: str, name: str) -> SingularValues | None:
    """The values by a device; None where its memory, types or operations do not suffice."""
    import torch

    try:
        xp = Torch(device)
        if not xp.exact and W.dtype in (np.float64, torch.float64):
            return None
        return _values(xp, xp.take(W), r, name)
    except RuntimeError as error:
        why = next((text for words, text in _SHORT.items() if words in str(error)), None)
        if why is None:
            raise
    warnings.warn(
        f"{device} cannot compute some matrices ({why}): the CPU computes these.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _values(xp: Backend, W: Array, r: int, name: str) -> SingularValues:
    """The values of a matrix by the first method that can prove them."""
    if W.shape[0] > W.shape[1]:
        W = W.T
    largest = xp.largest(W)
    if not np.isfinite(largest):
        raise WdlibError(f"{name} contains NaN or infinity: its singular values do not exist.")
    if largest and not 1e-4 < largest < 1e4:  # its fourth power must fit into float32
        scale = 2.0 ** np.floor(np.log2(largest))
        if not xp.exact:
            xp, W = NUMPY, xp.host(W)
        found = _proven(xp, xp.double(W) / scale, r)
        return SingularValues(found.values * scale, found.error * scale, found.method)
    return _proven(xp, W, r)


def _proven(xp: Backend, W: Array, r: int) -> SingularValues:
    """As `_values`, of a wide matrix whose largest entry is of moderate size."""
    result = None
    if W.shape[0] > xp.dense_dimension and r * xp.dense_fraction <= W.shape[0]:
        result = _gram_lanczos(xp, W, r)
    if not xp.exact:
        xp, W = NUMPY, xp.host(W)
    return result or _gram_float64(xp, W, r) or _svd_float64(xp.host(W), r)


def _gram_float64(xp: Backend, W: Array, r: int) -> SingularValues | None:
    """All eigenvalues of W W^T in float64; None where squaring costs too many digits."""
    n, m = W.shape
    # All of a matrix up to product_bytes in one piece, so that it takes one product.
    step = max(1, m if 8 * n * m <= xp.product_bytes else xp.product_bytes // (8 * n))
    G = xp.gram_double(W[:, :step])
    for j in range(step, m, step):
        G = xp.gram_double(W[:, j : j + step], G)
    eigenvalues = xp.eigenvalues(G)
    eps = np.finfo(float).eps
    # Rounding of the product (columnwise worst case) and backward error of the eigenvalue solver.
    shift = m * eps * xp.frobenius(W) ** 2 + n * eps * eigenvalues[-1]
    return _accept(np.maximum(eigenvalues[::-1][:r], 0.0), shift, (n, m), "gram-float64")


def _svd_float64(W: np.ndarray, r: int) -> SingularValues:
    """LAPACK's singular values of the tall orientation, in float64."""
    values = linalg.svd(W.T.astype(np.float64), compute_uv=False, overwrite_a=True)
    error = max(W.shape) * np.finfo(float).eps * values[0]
    return SingularValues(values[:r], np.full(r, error), "svd-float64")


def _accept(
    squares: np.ndarray, shift: float | np.ndarray, shape: tuple[int, int], method: str
) -> SingularValues | None:
    """Values and errors from squared values known to +-shift; None if TOLERANCE is not kept."""
    values = np.sqrt(squares)
    # |sqrt(a) - sqrt(b)| <= |a - b| / sqrt(max(a, b)), and <= sqrt(|a - b|) when a is about zero.
    shift = np.broadcast_to(shift, squares.shape)
    error = np.minimum(
        np.divide(shift, values, where=values > 0, out=np.sqrt(shift)), np.sqrt(shift)
    )
    floor = max(shape) * np.finfo(float).eps * values[0]
    if np.all(error <= np.maximum(TOLERANCE * values, floor)):
        return SingularValues(values, error, method)
    return None


def _gram_lanczos(xp: Backend, W: Array, r: int) -> SingularValues | None:
    """Block Lanczos on the float32 product, corrected by the exact W; None where unproven."""
    n = W.shape[0]
    G = xp.gram(W)
    krylov = _block_lanczos(xp, xp.single(G), r)
    if krylov is None:
        return None
    V, ritz_next = krylov
    c = V.shape[1]
    exact, A = (xp, W) if xp.exact else (NUMPY, xp.host(W))
    V = exact.double(exact.take(V))
    probes = exact.take(np.random.default_rng(1).standard_normal((n, PROBES)))
    Z, AX = _gram_apply(exact, A, V, probes)
    squares, overlaps = exact.host(Z[:, :c].T @ Z[:, :c]), exact.host(V.T @ V)
    try:
        theta, Y = linalg.eigh(squares, overlaps, check_finite=False)
    except (linalg.LinAlgError, ValueError):  # a device that went wrong
        return None
    theta, Y = np.maximum(theta[::-1], 0.0), exact.take(np.ascontiguousarray(Y[:, ::-1]))
    V, AV = V @ Y, AX[:, :c] @ Y
    residual = exact.frobenius(AV - V * exact.take(theta))
    rest = _proven_rest(xp, G, V, theta, (theta[-1] + ritz_next) / 2, (probes, AX[:, c:]))
    gap = theta[:r] - rest
    if not gap[-1] > 0:
        return None
    # Ritz values of a subspace whose complement lies below `rest`: Li and Li 2005, theorem 2.
    shift = 2 * residual**2 / (gap + np.sqrt(gap**2 + 4 * residual**2))
    rounding = max(W.shape) * np.finfo(float).eps * theta[0]
    return _accept(theta[:r], shift + rounding, W.shape, "gram-lanczos")


def _block_lanczos(xp: Backend, G: Array, r: int) -> tuple[Array, float] | None:
    """Approximate leading eigenvectors (n, c) of G, r <= c < r + 8, and the Ritz value after them.

    G: (n, n) float32. c is chosen where the Ritz values leave the best gap. Every new block is
    orthogonalised twice against all before it: once leaves errors of tens of percent. None when the
    Krylov space breaks down or outgrows n / 2: a dense method is then cheaper, or needed.
    """
    n, b = len(G), xp.block
    limit = n // 2 // b * b
    Q = xp.empty((limit, n))
    diagonal: list[Array] = []  # the blocks of T = Q G Q^T
    below: list[Array] = []
    X = xp.take(np.random.default_rng(0).standard_normal((b, n), dtype=np.float32))
    k, check, checked = 0, min(5 * r + b + xp.first_check, limit - b), (0, np.log(1e4))
    while k < limit:
        block = xp.orthonormal_rows(X)
        if block is not None:
            X, C1 = block
            X -= (X @ Q[:k].T) @ Q[:k]
            block = xp.orthonormal_rows(X)
        if block is None:
            return None
        X, C2 = block
        if k:
            below.append(C1 @ C2)  # G's action leaves the space so far by this times X
            if k >= check:
                found = _look(xp, diagonal, below, r)
                if found is None:
                    return None
                S, c, ritz_next, excess = found
                if excess <= 0:
                    return xp.lift(Q[:k], S[:, :c]), ritz_next
                slope = max((checked[1] - excess) / (k - checked[0]), 0.05)
                checked, check = (k, excess), k + min(max(excess / slope, b), k / 2)
        Q[k : k + b] = X
        k += b
        X = X @ G
        H = X @ Q[:k].T
        diagonal.append((H[:, k - b :] + H[:, k - b :].T) / 2)
        X -= H @ Q[:k]
    return None


def _look(
    xp: Backend, diagonal: list[Array], below: list[Array], r: int
) -> tuple[Array, int, float, float] | None:
    """How good a Krylov space is: T's eigenvectors, c, the Ritz value after c, and by how much the
    logarithm of the error is above what it may be. None if the space broke down."""
    on, off = xp.gather(diagonal), xp.gather(below)
    b = on.shape[1]
    k = b * len(on)
    T = np.zeros((k, k))
    for i, block in enumerate(on):
        T[i * b : (i + 1) * b, i * b : (i + 1) * b] = block
    for i, block in enumerate(off[:-1]):
        j = (i + 1) * b
        T[j : j + b, j - b : j], T[j - b : j, j : j + b] = block.T, block
    C = off[-1]
    if not (np.isfinite(T).all() and np.isfinite(C).all()):
        return None
    theta, S = xp.eigenpairs(T)
    if not theta[r - 1] > 0:
        return None
    residual = np.linalg.norm(C.T @ xp.host(S[k - b :, : r + 7]), axis=0)
    gap = (theta[r - 1 : r + 7] - theta[r : r + 8]) / 2
    error = np.cumsum(residual**2)[r - 1 :] / np.maximum(gap, 1e-30 * theta[0])
    c = r + int(np.argmin(error))
    with np.errstate(divide="ignore"):  # an invariant space has no error
        excess = float(np.log(error[c - r] / (TOLERANCE / 2 * theta[r - 1])))
    return S, c, float(theta[c]), excess


def _gram_apply(xp: Backend, W: Array, *vectors: Array) -> tuple[Array, Array]:
    """W^T X and W W^T X in float64; W is converted once, some columns at a time.

    vectors: arrays (n, ...) of which X is made, side by side.
    """
    n, m = W.shape
    width = sum(x.shape[1] for x in vectors)
    X, start = xp.zeros((n, width)), 0
    for x in vectors:
        X[:, start : start + x.shape[1]] = x
        start += x.shape[1]
    Z, Y = xp.zeros((m, width)), xp.zeros((n, width))
    step = max(1, xp.chunk_bytes // (8 * n))
    for j in range(0, m, step):
        piece = xp.double(W[:, j : j + step])
        Z[j : j + step] = piece.T @ X
        Y += piece @ Z[j : j + step]
    return Z, Y


def _proven_rest(
    xp: Backend,
    G: Array,
    V: Array,
    theta: np.ndarray,
    tau: float,
    probes: tuple[Array, Array],
) -> float:
    """A proven upper bound on the eigenvalues of A = W W^T in the complement of V; NaN if unproven.

    L L^T = tau I - G + V diag(theta) V^T exists only if the complement of V lies below tau. What
    rounding changed, in G, in the deflation and in L, is measured on probes = (X, A X) with the
    exact A and added to tau. V: (n, c) float64 orthonormal; theta: (c,) its Ritz values. G is
    overwritten: for the largest matrices, a copy would be much of the memory.
    """
    exact = xp if xp.exact else NUMPY
    L = xp.deflated_factor(G, xp.take(V * exact.take(np.sqrt(theta))), tau)
    if L is None:
        return np.nan
    X, AX = probes
    weights = exact.take(theta)[:, None]
    defect = tau * X - AX + V @ (weights * (V.T @ X)) - _gram_apply(exact, exact.take(L), X)[1]
    columns = np.linalg.norm(exact.host(defect), axis=0)
    return float(tau + PROBE_FACTOR * np.sqrt(2 / np.pi) * columns.max())
