"""The operations in which numpy and torch differ: what the kernel needs of each, under one name.

The kernel's mathematics is written once, in operators that both kinds of array have, and in the
methods below, which `Numpy` and `Torch` share. A new backend is a third class.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from scipy import linalg
from scipy.linalg import blas, lapack
from threadpoolctl import ThreadpoolController

from wdlib import WdlibError
from wdlib.checkpoints.formats import BFLOAT16, widen

DEVICES = ("cpu", "cuda", "mps")
"""Where singular values can be computed: "cpu" is numpy's BLAS and LAPACK, the others torch's."""

SUMMANDS = 1024
"""Columns per piece of a device's float32 product: rounding grows with the length of a sum."""

_FAST_DOUBLE = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""CUDA's compute capabilities whose float64 is half as fast as float32: P100, V100, A100, H100,
B200. Elsewhere it is a 32nd or less."""

Array = Any
"""An array of either backend: `numpy.ndarray` or `torch.Tensor`."""


class Numpy:
    """Arrays in the machine's memory; BLAS and LAPACK."""

    exact = True
    """Whether there is float64. Where not, what is proven in float64 is made by `Numpy`."""

    single_product = True
    """Whether W W^T is made in float32, which costs less, or in float64, which proves more."""

    block = 4
    """Vectors per Lanczos step. A value that is repeated more often than this needs a dense
    method."""

    dense_dimension = 320
    """Up to this smaller dimension, all eigenvalues cost less than the r largest."""

    dense_fraction = 12
    """With r above n / dense_fraction, all eigenvalues cost less than the r largest."""

    first_check = 0
    """Dimensions of the Krylov space, beside five per value, before its first look at the error."""

    chunk_bytes = 2**20
    """Float64 copies of narrower matrices are made in pieces of about this size."""

    product_bytes = 2**28
    """In the float64 product, in pieces of at most this size; smaller matrices are copied whole."""

    def take(self, x: Array) -> np.ndarray:
        """An array of either backend as one of this; bfloat16 becomes float32."""
        if not isinstance(x, np.ndarray):
            x = (x.float() if x.element_size() == 2 else x).cpu().numpy()
        return widen(x)

    def host(self, x: np.ndarray) -> np.ndarray:
        """As `Numpy.take`: an array as numpy's."""
        return x

    def gather(self, blocks: Sequence[np.ndarray]) -> np.ndarray:
        """Small arrays of one shape as one of numpy's."""
        return np.array(blocks)

    def empty(self, shape: tuple[int, int]) -> np.ndarray:
        """Float32, not set to anything."""
        return np.empty(shape, np.float32)

    def zeros(self, shape: tuple[int, int]) -> np.ndarray:
        """Float64."""
        return np.zeros(shape)

    def double(self, x: np.ndarray) -> np.ndarray:
        """In float64, not copied if it is already."""
        return x.astype(np.float64, copy=False)

    def largest(self, W: np.ndarray) -> float:
        """The largest absolute value; NaN where there is one."""
        return max(abs(float(W.max())), abs(float(W.min())))

    def frobenius(self, x: np.ndarray) -> float:
        """The Frobenius norm."""
        return float(np.linalg.norm(x.ravel(order="K")))

    def single(self, x: np.ndarray) -> np.ndarray:
        """In float32, not copied if it is already."""
        return x.astype(np.float32, copy=False)

    def gram(self, W: np.ndarray) -> np.ndarray:
        """Float32 W W^T, symmetric, in row-major order. A device may have it in float64."""
        return mirror(syrk(self.single(W)))

    def gram_double(self, W: np.ndarray, add: np.ndarray | None = None) -> np.ndarray:
        """Float64 W W^T + add, of which the lower triangle counts. `add` is overwritten."""
        if add is None:
            return syrk(self.double(W))
        piece = W.astype(np.float64, order="F")
        return blas.dsyrk(1.0, piece, beta=1.0, c=add, lower=1, overwrite_c=1)

    def eigenvalues(self, G: np.ndarray) -> np.ndarray:
        """All eigenvalues (n,) of a lower triangle, ascending, as numpy's. G is overwritten."""
        return linalg.eigh(
            G, lower=True, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd"
        )

    def eigenpairs(self, T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, descending, of a symmetric (k, k), and eigenvectors in columns."""
        theta, S = np.linalg.eigh(T)
        return theta[::-1], S[:, ::-1]

    def lift(self, Q: np.ndarray, S: np.ndarray) -> np.ndarray:
        """Q^T S in float64, of Q (k, n) in float32 and S (k, c) in float64."""
        return Q.T @ S

    def orthonormal_rows(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """X = C Q: orthonormal rows of Q, lower triangular C (Cholesky QR). None if singular."""
        C, info = lapack.spotrf(X @ X.T, lower=1, clean=1)
        if info:
            return None
        return blas.strsm(1.0, C, X.T, side=1, lower=1, trans_a=1).T, C

    def deflated_factor(self, G: np.ndarray, S: np.ndarray, tau: float) -> np.ndarray | None:
        """L L^T = tau I - G + S S^T in G's type, None if there is none. G is overwritten."""
        S = np.asfortranarray(S, dtype=np.float32)
        M = blas.ssyrk(1.0, S, beta=-1.0, c=G.T, lower=1, overwrite_c=1)
        M[np.diag_indices(len(G))] += np.float32(tau)
        L, info = lapack.spotrf(M, lower=1, clean=1, overwrite_a=1)
        return None if info else L


class Torch:
    """Arrays on a device, by torch. The same methods as `Numpy`, which describes them."""

    block = 16
    dense_dimension = 1024
    dense_fraction = 16
    first_check = 128
    chunk_bytes = product_bytes = 2**27

    def __init__(self, device: str) -> None:
        """device: as torch names it. Raises WdlibError where this machine has none such."""
        check_device(device)
        import torch

        self.torch, self.device = torch, torch.device(device)
        with _FIRST:
            _wake(self.device)
        self.exact = self.device.type != "mps"
        self.single_product = not (
            self.device.type == "cuda"
            and torch.cuda.get_device_capability(self.device) in _FAST_DOUBLE
        )

    def take(self, x: Array) -> Array:
        """As Numpy's, in the type that it has; float64 is rounded where there is none."""
        if not isinstance(x, np.ndarray):
            return x.to(self.device)
        if not self.exact and x.dtype == np.float64:
            x = x.astype(np.float32)
        bits = x.view("<i2") if x.dtype == BFLOAT16 else x
        if not bits.flags.writeable or min(bits.strides, default=0) < 0:
            bits = bits.copy()
        moved = self.torch.from_numpy(bits).to(self.device)
        return moved.view(self.torch.bfloat16) if x.dtype == BFLOAT16 else moved

    def host(self, x: Array) -> np.ndarray:
        return NUMPY.take(x)

    def gather(self, blocks: Sequence[Array]) -> np.ndarray:
        return self.torch.stack(list(blocks)).cpu().numpy()

    def empty(self, shape: tuple[int, int]) -> Array:
        return self.torch.empty(shape, device=self.device)

    def zeros(self, shape: tuple[int, int]) -> Array:
        return self.torch.zeros(shape, dtype=self.torch.float64, device=self.device)

    def double(self, x: Array) -> Array:
        return x.double()

    def largest(self, W: Array) -> float:
        least, most = self.torch.stack(self.torch.aminmax(W)).tolist()
        return max(abs(least), abs(most))

    def frobenius(self, x: Array) -> float:
        return float(self.torch.linalg.vector_norm(x, dtype=self.torch.float64))

    def single(self, x: Array) -> Array:
        return x.float()

    def gram(self, W: Array) -> Array:
        if self.single_product:
            as_type, step = self.single, SUMMANDS
        else:
            as_type, step = self.double, max(1, self.product_bytes // (8 * len(W)))
        first = as_type(W[:, :step])
        G = first @ first.T
        for j in range(step, W.shape[1], step):
            piece = as_type(W[:, j : j + step])
            G.addmm_(piece, piece.T)
        return G

    def gram_double(self, W: Array, add: Array | None = None) -> Array:
        piece = W.double()
        return piece @ piece.T if add is None else add.addmm_(piece, piece.T)

    def eigenvalues(self, G: Array) -> np.ndarray:
        return np.sort(self.torch.linalg.eigvalsh(G).cpu().numpy())  # cuSOLVER's are nearly sorted

    def eigenpairs(self, T: np.ndarray) -> tuple[np.ndarray, Array]:
        if not self.exact:
            theta, S = NUMPY.eigenpairs(T)
            return theta, self.take(S)
        theta, S = self.torch.linalg.eigh(self.take(T))
        return theta.cpu().numpy()[::-1], S.flip(1)

    def lift(self, Q: Array, S: Array) -> Array:
        return Q.T.to(S.dtype) @ S

    def orthonormal_rows(self, X: Array) -> tuple[Array, Array]:
        """As Numpy's, but NaN if singular: to ask the device at every step would cost its time."""
        C, info = self.torch.linalg.cholesky_ex(X @ X.T)
        C = self.torch.where(info == 0, C, self.torch.nan)
        return self.torch.linalg.solve_triangular(C, X, upper=False), C

    def deflated_factor(self, G: Array, S: Array, tau: float) -> Array | None:
        S = S.to(G.dtype)
        G.addmm_(S, S.T, beta=-1).diagonal().add_(tau)
        L, info = self.torch.linalg.cholesky_ex(G)
        return None if info.item() else L


_FIRST = Lock()


@cache
def _wake(device: Any) -> None:
    """Loads torch's linear algebra for a device, which fails if two threads do it at once."""
    import torch

    one = torch.eye(2, device=device)
    torch.linalg.solve_triangular(torch.linalg.cholesky_ex(one).L, one, upper=False)
    if device.type != "mps":
        torch.linalg.eigh(one.double())


NUMPY = Numpy()

Backend = Numpy | Torch


def check_device(device: str) -> None:
    """Raise WdlibError unless `device` is one of DEVICES, or "cuda:1", and this machine has it."""
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdecimal())):
        raise WdlibError(f"there is no device {device!r}: choose one of {', '.join(DEVICES)}.")
    if kind == "cpu":
        return
    try:
        import torch
    except ImportError as error:
        raise WdlibError(
            f"the device {device} needs torch, which is not installed: install wdlib[lora]."
        ) from error
    backend = torch.cuda if kind == "cuda" else torch.backends.mps
    if not backend.is_available() or (index and int(index) >= torch.cuda.device_count()):
        raise WdlibError(f"torch finds no {device} device on this machine: choose cpu.")


def own_stream(device: str) -> None:
    """Gives the calling thread a queue of its own on a CUDA device, so that threads overlap."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_stream(torch.cuda.Stream(device))


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_thread() -> Iterator[None]:
    """Holds BLAS at one thread: several wait for each other, 20 times as long on busy cores."""
    if all(library.num_threads == 1 for library in _libraries().lib_controllers):
        yield
    else:
        with _libraries().limit(limits=1):
            yield


def syrk(W: np.ndarray) -> np.ndarray:
    """Lower triangle of W W^T in W's own precision, in column-major order."""
    of_dtype = blas.ssyrk if W.dtype == np.float32 else blas.dsyrk
    if W.flags.c_contiguous:
        return of_dtype(1.0, W.T, trans=1, lower=1)
    return of_dtype(1.0, W, lower=1)


def mirror(G: np.ndarray, block: int = 256) -> np.ndarray:
    """The full symmetric matrix from its lower triangle (column-major), in row-major order."""
    n = len(G)
    G = G.T
    for i in range(0, n, block):
        j = min(i + block, n)
        G[j:, i:j] = G[i:j, j:].T
        G[i:j, i:j] += np.triu(G[i:j, i:j], 1).T
    return G
