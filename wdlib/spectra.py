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

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise
from scipy import linalg
from scipy.linalg import blas, lapack
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from wdlib import TYPES, WdlibError, __version__, models, paths, weights

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


@dataclass(frozen=True)
class SingularValues:
    """The r largest singular values of one matrix.

    values: (r,) float64, descending. error: (r,) float64, a bound on |values - exact|.
    method: which algorithm gave them.
    """

    values: np.ndarray
    error: np.ndarray
    method: str


@dataclass(frozen=True)
class Spectra:
    """The largest singular values of all projections of one model.

    values[type]: (rows, r) float64, one descending row per layer (and expert), layers ascending.
    error[type]: the same shape, a bound on the absolute error of each value.
    rows[type]: the (layer, expert) of each row; expert is None in dense models.
    provenance: where the numbers come from, as text.
    """

    model: str
    values: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    rows: dict[str, tuple[tuple[int, int | None], ...]]
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return next(iter(self.values.values())).shape[1]

    def truncate(self, rank: int) -> "Spectra":
        """The same spectra with only the `rank` largest values of each row.

        Raises WdlibError if fewer are there.
        """
        if not 1 <= rank <= self.rank:
            raise WdlibError(
                f"the spectra of {self.model} hold ranks 1 to {self.rank}, not {rank}: "
                f"ask for one of these, or compute more with `wdlib spectra {self.model}`."
            )
        return replace(
            self,
            values={t: v[:, :rank] for t, v in self.values.items()},
            error={t: e[:, :rank] for t, e in self.error.items()},
        )


def compute(
    model: str | Path | models.Checkpoint,
    rank: int,
    *,
    types: tuple[str, ...] = TYPES,
    certify: bool = True,
    threads: int = 1,
    progress: bool = False,
) -> Spectra:
    """The `rank` largest singular values of every projection of a model, one matrix in memory.

    threads: as in `collect`. progress: show a bar of the matrices done.

    Raises WdlibError before any work if `rank` exceeds the smallest dimension of a matrix in use
    (arXiv 2509.00046, section 2, leaves that case open), and for unreadable weights.
    """
    checkpoint = models.resolve(model) if not isinstance(model, models.Checkpoint) else model
    entries = [e for e in weights.inventory(checkpoint) if e.type in types]
    if not entries:
        raise WdlibError(
            f"{checkpoint.name} has no matrix of type {' or '.join(types)}: ask for others."
        )
    _check_rank(checkpoint.name, entries, rank)
    stream = weights.projections(checkpoint, types=types)
    bar = tqdm(stream, total=len(entries), unit="matrix", disable=not progress)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(models.content_hash, checkpoint)
        found = collect(bar, rank, certify=certify, threads=threads)
    values = {t: np.stack([f.values for f in found[t]]) for t in found}
    error = {t: np.stack([f.error for f in found[t]]) for t in found}
    methods = Counter(f.method for rows in found.values() for f in rows)
    # Of values that are zero within their error, a relative one says nothing.
    worst = max(
        float(np.max(error[t] / np.where(v > error[t], v, np.inf))) for t, v in values.items()
    )
    provenance = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "sha256": content.result(),
        "quantisation": ", ".join(sorted({e.dtype for e in entries})),
        "note": checkpoint.note,
        "methods": ", ".join(f"{m} {k}" for m, k in sorted(methods.items())),
        "certified": "yes" if certify else "no",
        "largest relative error": f"{worst:.1e}",
        "made by": f"wdlib {__version__} spectra.compute(rank={rank})",
        "created": datetime.now(UTC).date().isoformat(),
    }
    rows = {t: tuple((e.layer, e.expert) for e in entries if e.type == t) for t in values}
    return Spectra(checkpoint.name, values, error, rows, {k: v for k, v in provenance.items() if v})


def collect(
    projections: Iterable[weights.Projection],
    rank: int,
    *,
    certify: bool = True,
    threads: int = 1,
) -> dict[str, list[SingularValues]]:
    """`top_singular_values` of a stream of projections, by type in the order of `TYPES`.

    threads: of the linear algebra; more than one rarely pays for a single matrix, and costs dearly
    on a busy machine.

    Raises WdlibError as `top_singular_values` does, naming the tensor.
    """
    found = {t: [] for t in TYPES}
    with threadpool_limits(threads, "blas"):
        for p in projections:
            result = top_singular_values(p.matrix, rank, certify=certify, name=f"tensor {p.name}")
            found[p.type].append(result)
    return {t: results for t, results in found.items() if results}


def largest_rank(model: str | Path | models.Checkpoint) -> int:
    """The smallest dimension of any projection of a model: no more singular values can be asked."""
    return min(min(e.shape) for e in weights.inventory(model))


def available_rank(model: str | Path) -> int:
    """The largest rank that `of` gives for a model: what is stored, or else `largest_rank`."""
    path = stored(str(model))
    return load(path).rank if path.is_file() else largest_rank(model)


def check_rank(model: str | Path | models.Checkpoint, rank: int) -> None:
    """Raise WdlibError unless every matrix of a model has `rank` singular values."""
    checkpoint = models.resolve(model) if not isinstance(model, models.Checkpoint) else model
    _check_rank(checkpoint.name, weights.inventory(checkpoint), rank)


def _check_rank(model: str, entries: list[weights.Entry], rank: int) -> None:
    smallest = min(entries, key=lambda e: min(e.shape))
    if not 1 <= rank <= min(smallest.shape):
        raise WdlibError(
            f"rank {rank} is out of range for {model}: its matrix {smallest.name} has shape "
            f"{smallest.shape}, so ask for a rank from 1 to {min(smallest.shape)}."
        )


def save(spectra: Spectra, path: str | Path) -> Path:
    """Write spectra to a safetensors file, atomically; equal spectra give equal bytes.

    One float64 tensor per type, `q` to `down`, of shape (layers, r), and its error bounds under
    `q.error` to `down.error`; in mixture-of-experts models also `q.rows` ..., int64 (rows, 2): the
    layer and expert (-1 for none) of each row. The metadata hold model and provenance as JSON.
    """
    path = Path(path)
    tensors = {}
    for t, v in spectra.values.items():
        tensors[t] = np.ascontiguousarray(v)
        tensors[f"{t}.error"] = np.ascontiguousarray(spectra.error[t])
        if spectra.rows[t] != _one_row_a_layer(len(v)):
            rows = [(layer, -1 if expert is None else expert) for layer, expert in spectra.rows[t]]
            tensors[f"{t}.rows"] = np.array(rows, dtype=np.int64)
    about = json.dumps({"model": spectra.model, **spectra.provenance})
    with paths.whole(path) as part:
        part.write_bytes(serialise(tensors, metadata={"wdlib": about}))
    return path


def load(model: str | Path, *, rank: int | None = None) -> Spectra:
    """Read spectra back, by the name of a model in data/spectra or by path; truncated to `rank`.

    Raises WdlibError if there is no such file, it is damaged, or it holds fewer values.
    """
    path = Path(model) if Path(model).suffix == ".safetensors" else stored(str(model))
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in paths.SPECTRA.glob("*.safetensors")))
        raise WdlibError(
            f"there are no stored spectra {path.name} (stored: {known}): compute them with "
            f"`wdlib spectra {model} --rank 16 --out FILE`."
        )
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["wdlib"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
        types = [t for t in TYPES if t in tensors]
        rows = {}
        for t in types:
            rows[t] = _one_row_a_layer(len(tensors[t]))
            if f"{t}.rows" in tensors:
                pairs = tensors[f"{t}.rows"].tolist()
                rows[t] = tuple((layer, None if e < 0 else e) for layer, e in pairs)
        spectra = Spectra(
            about.pop("model"),
            {t: tensors[t] for t in types},
            {t: tensors[f"{t}.error"] for t in types},
            rows,
            about,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WdlibError(
            f"{path} does not hold spectra ({error}): write it anew with `wdlib spectra`."
        ) from error
    return spectra if rank is None else spectra.truncate(rank)


def of(model: str | Path, rank: int, *, progress: bool = False) -> Spectra:
    """Spectra of a model at a rank: from the store if they are there, computed otherwise.

    The store is data/spectra for models of the catalogue, whose weights need not be at hand then,
    and after it the cache, where computed ones are kept under the sha256 of the weights.
    """
    if str(model) in models.catalogue() and stored(str(model)).is_file():
        kept = load(str(model))
        if rank <= kept.rank:
            return kept.truncate(rank)
    checkpoint = models.resolve(model)
    check_rank(checkpoint, rank)
    content = models.content_hash(checkpoint)
    path = paths.CACHE / "spectra" / f"{checkpoint.name}-{content[:16]}-r{rank}.safetensors"
    if path.is_file():
        return load(path)
    spectra = compute(replace(checkpoint, sha256=content), rank, progress=progress)
    save(spectra, path)
    return spectra


def stored(model: str) -> Path:
    """Where the spectra of a catalogue model are stored."""
    return paths.SPECTRA / f"{model}.safetensors"


def _one_row_a_layer(layers: int) -> tuple[tuple[int, None], ...]:
    return tuple((layer, None) for layer in range(layers))


def top_singular_values(
    matrix: np.ndarray, r: int, *, certify: bool = True, name: str = "the matrix"
) -> SingularValues:
    """The r largest singular values of a matrix, with a bound on the error of each.

    matrix: (rows, columns) real, any memory order. r: 1 <= r <= min(rows, columns).
    certify=True proves the bounds: it also counts the values above the cut, so that none can be
    missed. Where the proof fails, a slower method answers. certify=False trusts the Krylov space to
    have found the largest values, as any iterative solver does; its bounds hold under that premise.

    Raises WdlibError for NaN, infinity or an r out of range; `name` is named in the message.
    Source: arXiv 2509.00046, section 2 (the paper names no algorithm).
    """
    W = np.asarray(matrix)
    if W.ndim != 2 or not 1 <= r <= min(W.shape):
        raise WdlibError(
            f"{name} of shape {W.shape} has no {r} singular values: "
            f"ask for a rank from 1 to {min(W.shape) if W.ndim == 2 else 0}."
        )
    if W.dtype not in (np.float32, np.float64):
        W = W.astype(np.float64)
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
        result = _gram_lanczos(W, r, certify)
    if result is None:
        result = _gram_float64(W, r)
    if result is None:
        result = _svd_float64(W, r)
    return SingularValues(result.values * scale, result.error * scale, result.method)


def _gram_float64(W: np.ndarray, r: int) -> SingularValues | None:
    """All eigenvalues of W W^T in float64; None where squaring costs too many digits."""
    n, m = W.shape
    G = _syrk(W.astype(np.float64, copy=False))
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


def _syrk(W: np.ndarray) -> np.ndarray:
    """Lower triangle of W W^T in W's own precision, in column-major order."""
    syrk = blas.ssyrk if W.dtype == np.float32 else blas.dsyrk
    if W.flags.c_contiguous:
        return syrk(1.0, W.T, trans=1, lower=1)
    return syrk(1.0, W, lower=1)


def _gram_lanczos(W: np.ndarray, r: int, certify: bool) -> SingularValues | None:
    """Block Lanczos on the float32 product, corrected by the exact W; None where unproven."""
    n = W.shape[0]
    G = _mirror(_syrk(W.astype(np.float32, copy=False)))
    krylov = _block_lanczos(G, r)
    if krylov is None:
        return None
    V, ritz_next = krylov
    c = V.shape[1]
    probes = np.random.default_rng(1).standard_normal((n, PROBES if certify else 0))
    Z, AX = _gram_apply(W, np.hstack([V, probes]))
    theta, Y = linalg.eigh(Z[:, :c].T @ Z[:, :c], V.T @ V, check_finite=False)
    theta, Y = np.maximum(theta[::-1], 0.0), Y[:, ::-1]
    V, AV = V @ Y, AX[:, :c] @ Y
    residual = float(np.linalg.norm(AV - V * theta))
    rest = ritz_next + residual
    if certify:
        rest = _proven_rest(G, V, theta, (theta[-1] + ritz_next) / 2, (probes, AX[:, c:]))
    gap = theta[:r] - rest
    if not gap[-1] > 0:
        return None
    # Ritz values of a subspace whose complement lies below `rest`: Li and Li 2005, theorem 2.
    shift = 2 * residual**2 / (gap + np.sqrt(gap**2 + 4 * residual**2))
    rounding = max(W.shape) * np.finfo(float).eps * theta[0]
    return _accept(theta[:r], shift + rounding, W.shape, "gram-lanczos")


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
    exact A and added to tau. V: (n, c) float64 orthonormal; theta: (c,) its Ritz values.
    """
    S = np.asfortranarray(V * np.sqrt(theta), dtype=np.float32)
    M = blas.ssyrk(1.0, S, beta=-1.0, c=G.T.copy(order="F"), lower=1, overwrite_c=1)
    M[np.diag_indices(len(G))] += np.float32(tau)
    L, info = lapack.spotrf(M, lower=1, clean=1, overwrite_a=1)
    if info:
        return np.nan
    X, AX = probes
    defect = tau * X - AX + V @ (theta[:, None] * (V.T @ X)) - _gram_apply(L, X)[1]
    return float(tau + PROBE_FACTOR * np.sqrt(2 / np.pi) * np.linalg.norm(defect, axis=0).max())
