"""Singular values: from a matrix to its r largest with proven errors, from a model to a file.

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
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg
from scipy.linalg import blas, lapack

from wdlib import WdlibError

TOLERANCE = 1e-5
"""Relative error that every reported value is proven to keep."""

DENSE_DIMENSION = 320
"""Up to this smaller dimension, all eigenvalues cost less than the r largest."""

DENSE_FRACTION = 12
"""With r above n / DENSE_FRACTION, all eigenvalues cost less than the r largest."""

BLOCK = 4
"""Vectors per Lanczos step. A value that is repeated more often than this needs a dense method."""

PROBES = 8
PROBE_FACTOR = 10.0
"""||F|| <= PROBE_FACTOR sqrt(2/pi) max_j ||F x_j|| over PROBES Gaussian x_j, except with
probability PROBE_FACTOR ** -PROBES (Halko, Martinsson, Tropp, arXiv 0909.4061, lemma 4.1)."""

CHUNK_BYTES = 2**20
"""Float64 copies of float32 matrices are made in pieces of about this size."""

PRODUCT_BYTES = 2**28
"""In the float64 product, in pieces of at most this size; smaller matrices are copied whole."""

DEVICES = ("cpu", "cuda", "mps")
"""Where the float32 product can be made. On the CPU it is BLAS's, elsewhere torch's."""


@dataclass(frozen=True)
class SingularValues:
    """The r largest singular values of one matrix.

    values: (r,) float64, descending. error: (r,) float64, a bound on |values - exact|.
    method: which algorithm gave them.
    """

    values: np.ndarray
    error: np.ndarray
    method: str


def check_device(device: str) -> None:
    """Raise WdlibError unless `device` is one of DEVICES and this machine has it."""
    if device not in DEVICES:
        raise WdlibError(f"there is no device {device!r}: choose one of {', '.join(DEVICES)}.")
    if device == "cpu":
        return
    try:
        import torch
    except ImportError as error:
        raise WdlibError(
            f"the device {device} needs torch, which is not installed: install wdlib[lora]."
        ) from error
    backend = torch.cuda if device == "cuda" else torch.backends.mps
    if not backend.is_available():
        raise WdlibError(f"torch finds no {device} device on this machine: choose cpu.")


def top_singular_values(
    matrix: np.ndarray,
    r: int,
    *,
    device: str = "cpu",
    name: str = "the matrix",
) -> SingularValues:
    """The r largest singular values of a matrix, with a bound on the error of each.

    matrix: (rows, columns) real, any memory order; types wider than float64 are rounded to it, and
    the bounds say so. r: 1 <= r <= min(rows, columns).
    The bounds are proven: the values above the cut are counted, so that none can be missed. Where
    the proof fails, a slower method answers.
    device: of DEVICES, where the float32 product is made, most of the work on a large matrix. It
    need not be trusted: what rounding did to it is in the proof. All else stays on the CPU.

    Raises WdlibError for NaN, infinity, an r out of range (`name` is named in the message), or a
    device that is not there.
    Source: arXiv 2509.00046, section 2 (the paper names no algorithm).
    """
    check_device(device)
    if np.ma.is_masked(matrix):
        raise WdlibError(f"{name} has masked entries: fill them, or leave its rows or columns out.")
    W = np.asarray(matrix)
    if W.dtype.kind not in "fiub":
        raise WdlibError(f"{name} holds {W.dtype}, not real numbers: give an array of floats.")
    if W.ndim != 2 or not 1 <= r <= min(W.shape):
        raise WdlibError(
            f"{name} of shape {W.shape} has no {r} singular values: "
            f"ask for a rank from 1 to {min(W.shape) if W.ndim == 2 else 0}."
        )
    rounding = 0.0
    if W.dtype not in (np.float32, np.float64):
        given, W = W, W.astype(np.float64)
        if not np.array_equal(W.astype(given.dtype), given):
            rounding = float(np.finfo(float).eps * np.linalg.norm(W))  # Weyl: ||W - given||_2
    if W.shape[0] > W.shape[1]:
        W = W.T
    largest = max(abs(float(W.max())), abs(float(W.min())))
    if not np.isfinite(largest):
        raise WdlibError(f"{name} contains NaN or infinity: its singular values do not exist.")
    scale = 1.0
    if largest and not 1e-4 < largest < 1e4:  # its fourth power must fit into float32
        scale = 2.0 ** np.floor(np.log2(largest))
        W = W.astype(np.float64) / scale
    result = None
    if W.shape[0] > DENSE_DIMENSION and r * DENSE_FRACTION <= W.shape[0]:
        result = _gram_lanczos(W, r, device)
    if result is None:
        result = _gram_float64(W, r)
    if result is None:
        result = _svd_float64(W, r)
    error = result.error * scale + rounding
    return SingularValues(result.values * scale, error, result.method)


def _gram_float64(W: np.ndarray, r: int) -> SingularValues | None:
    """All eigenvalues of W W^T in float64; None where squaring costs too many digits."""
    n, m = W.shape
    # All of a matrix up to PRODUCT_BYTES in one piece, so that it takes one product.
    step = max(1, m if 8 * W.size <= PRODUCT_BYTES else PRODUCT_BYTES // (8 * n))
    G = gram(W[:, :step].astype(np.float64, copy=False))
    for j in range(step, m, step):
        piece = W[:, j : j + step].astype(np.float64, order="F")
        G = blas.dsyrk(1.0, piece, beta=1.0, c=G, lower=1, overwrite_c=1)
    eigenvalues = linalg.eigh(
        G, lower=True, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd"
    )
    eps = np.finfo(float).eps
    # Rounding of the product (columnwise worst case) and backward error of the eigenvalue solver.
    shift = m * eps * np.linalg.norm(W.ravel(order="K")) ** 2 + n * eps * eigenvalues[-1]
    return _accept(np.maximum(eigenvalues[::-1][:r], 0.0), shift, W.shape, "gram-float64")


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


def gram(W: np.ndarray) -> np.ndarray:
    """Lower triangle of W W^T in W's own precision, in column-major order."""
    syrk = blas.ssyrk if W.dtype == np.float32 else blas.dsyrk
    if W.flags.c_contiguous:
        return syrk(1.0, W.T, trans=1, lower=1)
    return syrk(1.0, W, lower=1)


def _gram_lanczos(W: np.ndarray, r: int, device: str = "cpu") -> SingularValues | None:
    """Block Lanczos on the float32 product, corrected by the exact W; None where unproven."""
    n = W.shape[0]
    W32 = W.astype(np.float32, copy=False)
    G = _mirror(gram(W32) if device == "cpu" else _product_on(device, W32))
    del W32
    krylov = _block_lanczos(G, r)
    if krylov is None:
        return None
    V, ritz_next = krylov
    c = V.shape[1]
    probes = np.random.default_rng(1).standard_normal((n, PROBES))
    Z, AX = _gram_apply(W, np.hstack([V, probes]))
    theta, Y = linalg.eigh(Z[:, :c].T @ Z[:, :c], V.T @ V, check_finite=False)
    theta, Y = np.maximum(theta[::-1], 0.0), Y[:, ::-1]
    V, AV = V @ Y, AX[:, :c] @ Y
    residual = float(np.linalg.norm(AV - V * theta))
    rest = _proven_rest(G, V, theta, (theta[-1] + ritz_next) / 2, (probes, AX[:, c:]))
    gap = theta[:r] - rest
    if not gap[-1] > 0:
        return None
    # Ritz values of a subspace whose complement lies below `rest`: Li and Li 2005, theorem 2.
    shift = 2 * residual**2 / (gap + np.sqrt(gap**2 + 4 * residual**2))
    rounding = max(W.shape) * np.finfo(float).eps * theta[0]
    return _accept(theta[:r], shift + rounding, W.shape, "gram-lanczos")


def _product_on(device: str, W: np.ndarray) -> np.ndarray:
    """As `gram` for float32, made by torch on another device."""
    import torch

    X = torch.from_numpy(np.require(W, requirements="W")).to(device)
    return np.triu((X @ X.T).cpu().numpy()).T


def _mirror(G: np.ndarray, block: int = 256) -> np.ndarray:
    """The full symmetric matrix from its lower triangle (column-major), in row-major order."""
    n = len(G)
    G = G.T
    for i in range(0, n, block):
        j = min(i + block, n)
        G[j:, i:j] = G[i:j, j:].T
        G[i:j, i:j] += np.triu(G[i:j, i:j], 1).T
    return G


def _orthonormal_rows(X: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """X = C Q with orthonormal rows of Q and lower triangular C (Cholesky QR); None if singular."""
    C, info = lapack.spotrf(X @ X.T, lower=1, clean=1)
    if info:
        return None
    return blas.strsm(1.0, C, X.T, side=1, lower=1, trans_a=1).T, C


def _block_lanczos(G: np.ndarray, r: int) -> tuple[np.ndarray, float] | None:
    """Approximate leading eigenvectors (n, c) of G, r <= c < r + 8, and the Ritz value after them.

    G: (n, n) float32. c is chosen where the Ritz values leave the best gap. Every new block is
    orthogonalised twice against all before it: once leaves errors of tens of percent. None when the
    Krylov space breaks down or outgrows n / 2: a dense method is then cheaper, or needed.
    """
    n, b = len(G), BLOCK
    limit = n // 2 // b * b
    Q = np.empty((limit, n), np.float32)
    T = np.zeros((limit, limit))
    X = np.random.default_rng(0).standard_normal((b, n), dtype=np.float32)
    k, check, checked = 0, 5 * r + b, (0, np.log(1e4))
    while k < limit:
        block = _orthonormal_rows(X)
        if block is not None:
            X, C1 = block
            X -= (X @ Q[:k].T) @ Q[:k]
            block = _orthonormal_rows(X)
        if block is None:
            return None
        X, C2 = block
        if k:
            C = C1 @ C2  # the off-diagonal block: G's action leaves the space so far by C X
            if k >= check:
                theta, S = np.linalg.eigh(T[:k, :k])
                theta, S = theta[::-1], S[:, ::-1]
                if not theta[r - 1] > 0:
                    return None
                residual = np.linalg.norm(C.T @ S[k - b :, : r + 7], axis=0)
                gap = (theta[r - 1 : r + 7] - theta[r : r + 8]) / 2
                error = np.cumsum(residual**2)[r - 1 :] / np.maximum(gap, 1e-30 * theta[0])
                c = r + int(np.argmin(error))
                excess = np.log(error[c - r] / (TOLERANCE / 2 * theta[r - 1]))
                if excess <= 0:
                    return Q[:k].T @ S[:, :c], float(theta[c])
                slope = max((checked[1] - excess) / (k - checked[0]), 0.05)
                checked, check = (k, excess), k + min(max(excess / slope, b), k / 2)
            T[k : k + b, k - b : k], T[k - b : k, k : k + b] = C.T, C
        Q[k : k + b] = X
        k += b
        X = X @ G
        H = X @ Q[:k].T
        T[k - b : k, k - b : k] = (H[:, k - b :] + H[:, k - b :].T) / 2
        X -= H @ Q[:k]
    return None


def _gram_apply(W: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W^T X and W W^T X in float64; W is converted once, some columns at a time."""
    n, m = W.shape
    Z, Y = np.empty((m, X.shape[1])), np.zeros((n, X.shape[1]))
    step = max(1, CHUNK_BYTES // (8 * n))
    for j in range(0, m, step):
        piece = W[:, j : j + step].astype(np.float64)
        Z[j : j + step] = piece.T @ X
        Y += piece @ Z[j : j + step]
    return Z, Y


def _proven_rest(
    G: np.ndarray,
    V: np.ndarray,
    theta: np.ndarray,
    tau: float,
    probes: tuple[np.ndarray, np.ndarray],
) -> float:
    """A proven upper bound on the eigenvalues of A = W W^T in the complement of V; NaN if unproven.

    L L^T = tau I - G + V diag(theta) V^T exists only if the complement of V lies below tau. What
    rounding changed, in G, in the deflation and in L, is measured on probes = (X, A X) with the
    exact A and added to tau. V: (n, c) float64 orthonormal; theta: (c,) its Ritz values. G is
    overwritten: for the largest matrices, a copy would be much of the memory.
    """
    S = np.asfortranarray(V * np.sqrt(theta), dtype=np.float32)
    M = blas.ssyrk(1.0, S, beta=-1.0, c=G.T, lower=1, overwrite_c=1)
    M[np.diag_indices(len(G))] += np.float32(tau)
    L, info = lapack.spotrf(M, lower=1, clean=1, overwrite_a=1)
    if info:
        return np.nan
    X, AX = probes
    defect = tau * X - AX + V @ (theta[:, None] * (V.T @ X)) - _gram_apply(L, X)[1]
    return float(tau + PROBE_FACTOR * np.sqrt(2 / np.pi) * np.linalg.norm(defect, axis=0).max())
