"""Singular values: right against LAPACK, and never further off than they say."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wdlib import TYPES, WdlibError, cli, paths
from wdlib.checkpoints import catalogue, files, stream
from wdlib.checkpoints.plan import projection_parts
from wdlib.spectra import jobs, kernel, store
from wdlib.spectra.kernel import SingularValues, top_singular_values
from wdlib.spectra.store import Spectra

EPS = np.finfo(float).eps
N, M = 333, 501  # above DENSE_DIMENSION, and no multiple of the block size


def check(matrix: np.ndarray, result: SingularValues, exact: np.ndarray | None = None) -> None:
    """The result keeps its own bound and the promised accuracy, against float64 LAPACK."""
    r = len(result.values)
    if exact is None:
        exact = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    off = np.abs(result.values - exact[:r])
    rounding = max(np.shape(matrix)) * EPS * exact[0]  # LAPACK's own
    assert result.values.dtype == result.error.dtype == np.float64
    assert result.values.shape == result.error.shape == (r,)
    assert np.all(np.diff(result.values) <= 0)
    assert np.all(result.values >= 0)
    assert np.all(off <= result.error + rounding), (off / result.error).max()
    assert np.all(result.error <= np.maximum(1e-5 * result.values, rounding) * (1 + 1e-9))
    assert np.all(off <= np.maximum(1e-5 * exact[:r], 2 * rounding))


def planted(n: int, m: int, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A float64 matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    V, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
    return (U * values) @ V.T


def gaussian(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, m), dtype=np.float32)


# Accuracy ----------------------------------------------------------------------------------------

i = np.arange(1, N + 1)
falling = np.linspace(0.9, 0.1, N)
SPECTRA = {
    "geometric 0.8": 0.8**i,
    "geometric 0.3": 0.3**i,
    "geometric 0.99": 0.99**i,
    "power 0.3": i**-0.3,
    "power 1": 1.0 / i,
    "power 3": i**-3.0,
    "uniform": np.linspace(1, 0, N),
    "nearly constant": np.linspace(1, 1 - 1e-6, N),
    "equal at the cut": np.r_[np.linspace(2, 1.2, 15), 1, 1, falling[17:]],
    "top 20 equal": np.r_[np.ones(20), falling[20:]],
    "top 20 nearly equal": np.r_[1 + 1e-9 * np.arange(20), falling[20:]],
    "all in eights": np.repeat(np.linspace(1, 0.1, 42), 8)[:N],
    "outlier 30": np.r_[30, falling[1:]],
    "outlier 1e3": np.r_[1e3, falling[1:]],
    "outlier 1e6": np.r_[1e6, falling[1:]],
    "outlier 1e9": np.r_[1e9, falling[1:]],
    "three outliers": np.r_[1e7, 1e4, 1e2, falling[3:]],
    "step": np.r_[np.linspace(2, 1, 20), np.full(N - 20, 1e-5)],
    **{f"rank {k}": np.linspace(2, 1, k) for k in (1, 3, 4, 10, 15, 16, 17)},
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_planted_spectra(name: str, dtype: type) -> None:
    W = planted(N, M, SPECTRA[name]).astype(dtype)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in (1, 5, 16, N // 12, N // 12 + 1):
        check(W, top_singular_values(W, r), exact)
        check(W.T, top_singular_values(W.T, r), exact)


@pytest.mark.parametrize("name", [s for s in SPECTRA if "equal" not in s and "eights" not in s])
def test_bounds_without_certificate_hold_when_no_value_is_repeated(name: str) -> None:
    W = planted(N, M, SPECTRA[name]).astype(np.float32)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in (1, 5, 16, N // 12):
        check(W, top_singular_values(W, r, certify=False), exact)


def block_diagonal(block: np.ndarray, times: int) -> np.ndarray:
    return np.kron(np.eye(times), block)


INTEGERS = np.random.default_rng(3).integers(-3, 4, (N, 10))
STRUCTURED = {
    "zeros": np.zeros((N, M)),
    "one entry": np.pad([[7.0]], ((3, N - 4), (5, M - 6))),
    "ones": np.ones((N, M)),
    "identity": np.eye(N, M),
    "permutation with signs": np.eye(N)[np.random.default_rng(4).permutation(N)] * (-1) ** i,
    "repeated block": block_diagonal(gaussian(45, 60), 8),
    "repeated flat block": block_diagonal(np.linalg.qr(gaussian(45, 45))[0], 8),
    "exact rank 10": INTEGERS @ np.random.default_rng(5).integers(-3, 4, (10, M)),
    "two-valued diagonal": np.diag(np.r_[np.full(12, 2.0), np.ones(N - 12)]),
    "outlier row": gaussian(N, M) * np.r_[100, np.ones(N - 1)][:, None],
    "outlier column": gaussian(N, M) * np.r_[100, np.ones(M - 1)],
    "hilbert": 1 / (np.arange(N)[:, None] + np.arange(M) + 1.0),
    "zero rows": gaussian(N, M) * (i % 3 == 0)[:, None],
}


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("certify", [True, False])
def test_structured_matrices(name: str, certify: bool) -> None:
    W = STRUCTURED[name].astype(np.float32)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in (1, 16):
        check(W, top_singular_values(W, r, certify=certify), exact)


def test_flat_matrices_are_answered_by_the_fast_method() -> None:
    for n, m in ((321, 321), (333, 500), (577, 1153), (641, 700)):
        for r in (1, 16, n // 24):
            W = gaussian(n, m)
            result = top_singular_values(W, r)
            assert result.method == "gram-lanczos"
            check(W, result)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 319, 320, 321, 322, 324])
def test_every_rank_around_the_thresholds(n: int) -> None:
    W = gaussian(n, n + 5)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in {1, 2, n // 12 - 1, n // 12, n // 12 + 1, n // 2, n - 1, n}:
        if 1 <= r <= n:
            check(W, top_singular_values(W, r), exact)


def test_which_method_answers() -> None:
    n = kernel.DENSE_DIMENSION
    assert top_singular_values(gaussian(n, n), 1).method == "gram-float64"
    assert top_singular_values(gaussian(n + 1, n + 1), 1).method == "gram-lanczos"
    falling = planted(n + 4, n + 4, np.arange(1, n + 5) ** -0.3)
    assert top_singular_values(falling, 27).method == "gram-lanczos"
    assert top_singular_values(falling, 28).method == "gram-float64"
    deficient = planted(40, 50, np.linspace(2, 1, 10))
    assert top_singular_values(deficient, 10).method == "gram-float64"
    assert top_singular_values(deficient, 11).method == "svd-float64"
    check(deficient, top_singular_values(deficient, 40))


def test_closed_forms() -> None:
    row = gaussian(1, 1000)
    length = np.linalg.norm(row.astype(np.float64))
    for W in (row, row.T, row.T.copy()):
        np.testing.assert_allclose(top_singular_values(W, 1).values, [length], rtol=1e-14)
    W = np.diag([3.0, -5.0, 0.0, 1.0])
    np.testing.assert_allclose(top_singular_values(W, 4).values, [5, 3, 1, 0], atol=1e-15)
    zeros = top_singular_values(np.zeros((400, 500)), 16)
    assert not zeros.values.any()
    assert not zeros.error.any()


def test_memory_order_does_not_matter() -> None:
    W = gaussian(N, M)
    wide = np.zeros((2 * N, 3 * M), np.float32)
    wide[::2, ::3] = W
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    views = [W, np.asfortranarray(W), wide[::2, ::3], W[::-1], W[:, ::-1]]
    for V in views:
        for oriented in (V, V.T, np.asfortranarray(V.T)):
            before = oriented.copy()
            check(V, top_singular_values(oriented, 16), exact)
            np.testing.assert_array_equal(oriented, before)
    read_only = W.copy()
    read_only.flags.writeable = False
    check(W, top_singular_values(read_only, 16), exact)


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int32, np.int64, np.bool_])
def test_other_data_types(dtype: type) -> None:
    W = (30 * gaussian(N, M)).astype(dtype) if dtype != np.bool_ else gaussian(N, M) > 1
    check(W, top_singular_values(W, 16))


def test_values_rounded_to_bfloat16() -> None:
    W = (gaussian(N, M).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    result = top_singular_values(W, 16)
    assert result.method == "gram-lanczos"
    check(W, result)


SCALES = [1e-40, 1e-30, 1e-13, 1e-11, 1e-6, 1.2e-4, 5e-5, 3e3, 1.1e4, 1e8, 1e11, 1e13, 1e30]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, s) for s in SCALES] + [(np.float64, s) for s in (*SCALES, 1e-200, 1e200)],
)
def test_scales(dtype: type, scale: float) -> None:
    W = (gaussian(N, M).astype(np.float64) * scale).astype(dtype)
    result = top_singular_values(W, 16)
    assert result.method == "gram-lanczos"
    check(W, result)
    spike = np.zeros((N, M), dtype)
    spike[4, 2], spike[9, 9] = scale, scale / 2
    check(spike, top_singular_values(spike, 2))


def test_a_power_of_two_scales_values_and_bounds_alike() -> None:
    W = gaussian(N, M).astype(np.float64)
    one, small = top_singular_values(W, 8), top_singular_values(W * 2.0**-100, 8)
    np.testing.assert_allclose(small.values, one.values * 2.0**-100, rtol=1e-9)
    np.testing.assert_allclose(small.error, one.error * 2.0**-100, rtol=0.2)


@pytest.fixture(scope="module")
def real() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Matrices of the default model, with all their singular values."""
    found = stream.projections(files.resolve(catalogue.DEFAULT), layers=(0, 14, 29))
    return [
        (f"{p.type}{p.layer}", p.matrix, np.linalg.svd(p.matrix.astype(float), compute_uv=False))
        for p in found
    ]


@pytest.mark.parametrize("certify", [True, False])
def test_real_matrices(real: list, certify: bool) -> None:
    assert {name.rstrip("0123456789") for name, _, _ in real} == set(TYPES)
    for name, W, exact in real:
        for r in (16, 64, 192):
            result = top_singular_values(W, r, certify=certify, name=name)
            check(W, result, exact)
            fast = min(W.shape) == 576 and r == 16
            assert result.method == ("gram-lanczos" if fast else "gram-float64"), name


def test_random_sweep() -> None:
    rng = np.random.default_rng(2024)
    for case in range(150):
        n = int(rng.integers(1, 200) if case % 3 else rng.integers(321, 400))
        m = int(n + rng.integers(0, 120))
        r = int(min(n, rng.integers(1, 34)))
        k = np.arange(1, n + 1)
        values = [
            k ** -rng.uniform(0.1, 3),
            rng.uniform(0.3, 0.99) ** k,
            np.where(k <= rng.integers(1, 30), 1, 10.0 ** -rng.uniform(1, 8)),
            np.r_[10.0 ** rng.uniform(0, 7, 3), rng.uniform(0.5, 1, n)][:n],
            np.repeat(rng.uniform(0.1, 1, n), rng.integers(1, 9))[:n],
            rng.uniform(0, 1, n) ** rng.integers(1, 12),
            1 - k / n * 10.0 ** -rng.uniform(0, 6),
        ][case % 7]
        W = planted(n, m, np.sort(values)[::-1], seed=case)
        W = W.astype(np.float32) if rng.random() < 0.7 else W
        W = W.T if rng.random() < 0.5 else W
        W = np.asfortranarray(W) if rng.random() < 0.3 else W
        check(W, top_singular_values(W, r))


# What it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_infinity_are_refused_by_name(bad: float, dtype: type) -> None:
    for shape in ((5, 7), (7, 5), (400, 500)):
        W = np.ones(shape, dtype)
        W[-1, 2] = bad
        with pytest.raises(WdlibError, match=r"tensor blk\.7\.w contains NaN or infinity"):
            top_singular_values(W, 2, name="tensor blk.7.w")


@pytest.mark.parametrize(("shape", "r"), [((5, 7), 0), ((5, 7), 6), ((7, 5), 6), ((5, 7), -1)])
def test_rank_out_of_range_is_refused_by_name(shape: tuple[int, int], r: int) -> None:
    with pytest.raises(WdlibError, match=r"tensor x of shape .* rank from 1 to 5"):
        top_singular_values(np.ones(shape), r, name="tensor x")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WdlibError, match="tensor x of shape"):
        top_singular_values(np.ones(shape), 1, name="tensor x")


# Attacks: the fast method is fed what is wrong, and must notice ----------------------------------


def missing(G: np.ndarray, which: int) -> np.ndarray:
    """G without its eigenvector number `which`, in float32."""
    values, vectors = np.linalg.eigh(G.astype(np.float64))
    u = vectors[:, -1 - which]
    return (G - values[-1 - which] * np.outer(u, u)).astype(np.float32)


@pytest.mark.parametrize("which", [0, 3, 14, 15])
@pytest.mark.parametrize("kind", ["flat", "power 1"])
def test_a_missed_value_is_noticed(kind: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W = gaussian(N, M) if kind == "flat" else planted(N, M, SPECTRA[kind]).astype(np.float32)
    krylov = kernel._block_lanczos
    monkeypatch.setattr(kernel, "_block_lanczos", lambda G, r: krylov(missing(G, which), r))
    result = top_singular_values(W, 16)
    assert result.method == "gram-float64"
    check(W, result)
    blind = top_singular_values(W, 16, certify=False)
    assert blind.method == "gram-lanczos"
    with pytest.raises(AssertionError):
        check(W, blind)


def test_a_start_that_cannot_see_the_largest_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    W = np.zeros((N, M), np.float32)
    W[1:, 1:] = gaussian(N - 1, M - 1) * 0.01
    W[0, 0] = 5
    krylov = kernel._block_lanczos

    def structured(G: np.ndarray, r: int) -> tuple[np.ndarray, float]:
        V, after = krylov(np.ascontiguousarray(G[1:, 1:]), r)
        return np.vstack([np.zeros((1, V.shape[1]), V.dtype), V]), after

    monkeypatch.setattr(kernel, "_block_lanczos", structured)
    check(W, top_singular_values(W, 16))
    assert top_singular_values(W, 16, certify=False).values[0] < 1


def test_repeated_values_beyond_the_block_are_missed_only_without_certificate() -> None:
    W = planted(400, 900, np.r_[np.ones(20), np.linspace(0.9, 0.1, 380)]).astype(np.float32)
    check(W, top_singular_values(W, 16))
    assert top_singular_values(W, 16, certify=False).values[-1] < 0.95


def symmetric_noise(G: np.ndarray) -> np.ndarray:
    noise = gaussian(len(G), len(G), 9)
    return G + np.float32(3e-3) * np.abs(G).max() * np.tril(noise)


def without_direction(G: np.ndarray, which: int = 0) -> np.ndarray:
    """A product that lacks an eigenvector: neither the Krylov space nor the factor can see it."""
    full = np.tril(G) + np.tril(G, -1).T
    return np.asfortranarray(np.tril(missing(full, which)))


SABOTAGE = {
    "too large": lambda G: G * np.float32(1 + 1e-3),
    "too small": lambda G: G * np.float32(1 - 1e-3),
    "noise": symmetric_noise,
    "a row lost": lambda G: G * np.float32(np.arange(len(G)) != 7),
    "largest lost": without_direction,
    "last lost": lambda G: without_direction(G, 15),
    "negative": lambda G: -G,
    "zero": lambda G: G * np.float32(0),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_product_cannot_break_the_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    syrk, used = kernel._syrk, []

    def wrong(W: np.ndarray) -> np.ndarray:
        G = syrk(W)
        if W.dtype == np.float64:
            return G
        used.append(W.shape)
        return np.asfortranarray(SABOTAGE[name](G))

    monkeypatch.setattr(kernel, "_syrk", wrong)
    for W in (gaussian(N, M), planted(N, M, SPECTRA["power 1"]).astype(np.float32)):
        for r in (1, 16):
            check(W, top_singular_values(W, r))
    assert len(used) == 4


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_wrong_factor_cannot_break_the_bound(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Cholesky factor that is off, over a product in which the largest value is missing."""
    spotrf = spectra.lapack.spotrf

    def wrong(a: np.ndarray, **options: int) -> tuple[np.ndarray, int]:
        L, info = spotrf(a, **options)
        return (L * np.float32(factor) if len(L) > kernel.BLOCK else L), info

    monkeypatch.setattr(spectra.lapack, "spotrf", wrong)
    W = gaussian(N, M)
    result = top_singular_values(W, 16)
    assert result.method == "gram-float64"
    check(W, result)


def test_the_certificate_covers_what_the_product_hides() -> None:
    """300 products that each hide a random direction: the probes measure every one of them."""
    n = 40
    for seed in range(300):
        rng = np.random.default_rng(seed)
        A = planted(n, n, np.linspace(2, 0.5, n), seed)
        A = A @ A.T
        values, vectors = np.linalg.eigh(A)
        theta, V = values[::-1][:4], vectors[:, ::-1][:, :4]
        tau = (values[-4] + values[-5]) / 2
        u = vectors[:, :-4] @ rng.standard_normal(n - 4)
        hidden = np.outer(u, u) / (u @ u)
        X = rng.standard_normal((n, kernel.PROBES))
        truth = A + 3 * hidden
        G = A.astype(np.float32)
        rest = kernel._proven_rest(G, V, theta, tau, (X, truth @ X))
        inside = vectors[:, :-4]
        assert rest >= np.linalg.eigvalsh(inside.T @ truth @ inside)[-1]
        assert np.isnan(kernel._proven_rest(truth.astype(np.float32), V, theta, tau, (X, A @ X)))


def test_the_bound_on_squared_values_is_that_of_two_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ritz vector tilted by phi between two eigenvectors is where Li and Li's bound is sharp."""
    squares = np.r_[1.0, 0.5, np.linspace(0.2, 0.1, N - 2)]
    phi = 1e-3
    V = np.zeros((N, 1))
    V[0], V[1] = np.cos(phi), np.sin(phi)
    after = float(squares[0] * np.sin(phi) ** 2 + squares[1] * np.cos(phi) ** 2)
    monkeypatch.setattr(kernel, "_block_lanczos", lambda G, r: (V, after))
    result = top_singular_values(np.diag(np.sqrt(squares)), 1, certify=False)
    assert result.method == "gram-lanczos"
    shift = (result.error * result.values).item()
    off = 1 - result.values.item() ** 2
    assert off == pytest.approx(0.5 * np.sin(phi) ** 2, rel=1e-3)
    assert off <= shift <= 1.01 * off
    V[0], V[1] = 1, 0
    exact = top_singular_values(np.diag(np.sqrt(squares)), 1, certify=False)
    assert exact.error.item() >= N * EPS  # rounding remains where the vector is exact


def test_from_squares_to_values() -> None:
    shape = (10, 20)
    for square, shift in ((1.0, 1e-6), (4.0, 1e-6), (1.0, 0.0), (0.0, 0.0)):
        found = kernel._accept(np.array([square]), shift, shape, "x")
        assert found.values.item() == np.sqrt(square)
        for exact in (square + shift, max(square - shift, 0)):
            assert abs(np.sqrt(exact) - np.sqrt(square)) <= found.error.item()
    assert kernel._accept(np.array([1.0]), 2e-5, shape, "x") is None
    assert kernel._accept(np.array([1.0, 0.0]), np.array([0.0, 1e-12]), shape, "x") is None
    assert kernel._accept(np.array([1.0, 1e-12]), 1e-15, shape, "x") is None
    assert kernel._accept(np.array([1.0, 1e-12]), np.array([1e-15, 1e-18]), shape, "x")


def test_building_blocks() -> None:
    W = gaussian(70, 90)
    exact = W.astype(np.float64) @ W.T.astype(np.float64)
    for V in (W, np.asfortranarray(W), np.repeat(W, 2, axis=1)[:, ::2]):
        for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-11)):
            G = kernel._syrk(V.astype(dtype, order="K"))
            assert G.dtype == dtype
            np.testing.assert_allclose(np.tril(G), np.tril(exact), atol=tolerance)
            full = kernel._mirror(G, block=16)
            np.testing.assert_allclose(full, exact, atol=tolerance)
            assert full.flags.c_contiguous
    X = np.random.default_rng(0).standard_normal((700, 3))
    tall = gaussian(700, 900)
    for V in (tall, np.asfortranarray(tall)):
        down, around = kernel._gram_apply(V, X)
        np.testing.assert_allclose(down, V.T.astype(np.float64) @ X, atol=1e-10)
        np.testing.assert_allclose(around, V.astype(np.float64) @ down, atol=1e-9)


# Whole models ------------------------------------------------------------------------------------

NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def write_model(folder: Path, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A checkpoint as transformers writes one; k and v have half as many rows."""
    half, wide = hidden // 2, hidden * 3 // 2
    shapes = {"k": (half, hidden), "v": (half, hidden), "down": (hidden, wide)}
    shapes |= {"gate": (wide, hidden), "up": (wide, hidden)}
    rng = np.random.default_rng(seed)
    tensors = {
        f"model.layers.{layer}.{NAMES[t]}.weight": rng.standard_normal(
            shapes.get(t, (hidden, hidden)), dtype=np.float32
        )
        for layer in range(layers)
        for t in TYPES
    }
    tensors["model.embed_tokens.weight"] = np.ones((5, hidden), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def spoil(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][1, 1] = value
    save_file(tensors, folder / "model.safetensors")


def made_by_hand(rows: tuple[tuple[int, int | None], ...], rank: int = 3) -> Spectra:
    values = np.sort(np.random.default_rng(0).uniform(1, 2, (len(rows), rank)))[:, ::-1]
    return Spectra(
        "toy",
        {"q": values, "down": values * 2},
        {"q": values * 1e-7, "down": values * 1e-8},
        {"q": rows, "down": rows},
        {"source": "a test", "note": "ünïcode"},
    )


def assert_same(one: Spectra, other: Spectra) -> None:
    assert (one.model, one.rows, one.provenance) == (other.model, other.rows, other.provenance)
    assert list(one.values) == list(other.values)
    for t in one.values:
        np.testing.assert_array_equal(one.values[t], other.values[t])
        np.testing.assert_array_equal(one.error[t], other.error[t])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty places for stored and cached spectra."""
    monkeypatch.setattr(paths, "SPECTRA", tmp_path / "stored")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path


def test_compute_equals_numpy_matrix_by_matrix(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy", layers=3)
    found = jobs.compute(folder, 16)
    tensors = load_file(folder / "model.safetensors")
    assert tuple(found.values) == TYPES
    assert found.model == "toy"
    assert found.rank == 16
    for t in TYPES:
        assert found.values[t].shape == found.error[t].shape == (3, 16)
        assert found.rows[t] == ((0, None), (1, None), (2, None))
        for layer in range(3):
            W = tensors[f"model.layers.{layer}.{NAMES[t]}.weight"].astype(np.float64)
            exact = np.linalg.svd(W, compute_uv=False)[:16]
            np.testing.assert_allclose(found.values[t][layer], exact, rtol=1e-9)


def test_provenance(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    about = jobs.compute(folder, 4).provenance
    assert about["source"] == "folder toy"
    assert about["sha256"] == files.content_hash(files.resolve(folder))
    assert about["quantisation"] == "F32"
    assert about["methods"] == "gram-float64 14"
    assert about["certified"] == "yes"
    assert 0 < float(about["largest relative error"]) < 1e-5
    assert "rank=4" in about["made by"]
    assert str(tmp_path) not in str(about)
    assert jobs.compute(folder, 4, certify=False).provenance["certified"] == "no"


def test_compute_of_some_types(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    found = jobs.compute(folder, 32, types=("o", "q"))  # k and v would allow 16
    assert list(found.values) == list(found.rows) == ["q", "o"]
    assert "types=('o', 'q')" in found.provenance["made by"]
    with pytest.raises(WdlibError, match="no projection type 'x'"):
        jobs.compute(folder, 1, types=("q", "x"))


def test_compute_of_a_type_that_the_model_has_not(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    tensors = load_file(folder / "model.safetensors")
    rest = {k: v for k, v in tensors.items() if "gate" not in k}
    save_file(rest, folder / "model.safetensors")
    with pytest.raises(WdlibError, match="toy has no matrix of type gate"):
        jobs.compute(folder, 1, types=("gate",))


def test_compute_of_some_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy", layers=4)
    whole, part = jobs.compute(folder, 8), jobs.compute(folder, 8, layers=(3, 1))
    assert part.rows["q"] == ((1, None), (3, None))
    np.testing.assert_array_equal(part.values["q"], whole.values["q"][[1, 3]])
    assert "layers=(3, 1)" in part.provenance["made by"]
    with pytest.raises(WdlibError, match="no layer 4"):
        jobs.compute(folder, 8, layers=(4,))


def test_compute_of_matrices_of_rank_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    tensors = load_file(folder / "model.safetensors")
    for name, W in tensors.items():
        W[:] = "up" not in name
    save_file(tensors, folder / "model.safetensors")
    found = jobs.compute(folder, 4)
    np.testing.assert_allclose(found.values["q"], [[32, 0, 0, 0]] * 2, atol=1e-12)
    assert not found.values["up"].any()
    assert float(found.provenance["largest relative error"]) < 1e-5


@pytest.mark.parametrize("rank", [0, 17, -3])
def test_rank_out_of_range_names_the_matrix(rank: int, store: Path) -> None:
    folder = write_model(store / "toy")
    for function in (jobs.compute, jobs.of):
        with pytest.raises(
            WdlibError, match=r"toy: its matrix model\.layers\.0\.self_attn\.k_proj.*from 1 to 16"
        ):
            function(folder, rank)
    assert not (store / "cache").exists()
    assert jobs.largest_rank(folder) == 16


def test_nan_names_the_tensor_and_writes_nothing(store: Path) -> None:
    folder = write_model(store / "toy")
    spoil(folder, "model.layers.1.self_attn.v_proj.weight", np.nan)
    for function in (jobs.compute, jobs.of):
        with pytest.raises(
            WdlibError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight.* NaN or inf"
        ):
            function(folder, 4)
    assert not list(store.glob("cache/**/*.safetensors"))


def test_collect() -> None:
    W = gaussian(6, 9)
    stream = [stream.Projection(0, "down", "a", W), stream.Projection(0, "q", "b", 2 * W)]
    stream.append(stream.Projection(1, "down", "c", 3 * W))
    found = jobs.collect(iter(stream), 2)
    assert list(found) == ["q", "down"]
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)[:2]
    np.testing.assert_allclose(found["q"][0].values, 2 * exact)
    np.testing.assert_allclose([f.values for f in found["down"]], [exact, 3 * exact])
    with pytest.raises(WdlibError, match="tensor c "):
        jobs.collect([replace(stream[2], matrix=W * np.inf)], 2)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (2, 12):
        folder = write_model(tmp_path / f"toy{layers}", layers=layers, hidden=256)
        sizes.append((folder / "model.safetensors").stat().st_size)
        jobs.compute(folder, 4)
        tracemalloc.start()
        jobs.compute(folder, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 20  # headers, and the results


# Parts of a job: shards, interruptions, workers --------------------------------------------------


def write_mixture(folder: Path) -> Path:
    """Two layers with three routed experts and a shared one each."""
    write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    mlp = {k: v for k, v in tensors.items() if ".mlp." in k}
    for name, W in mlp.items():
        tensors[name.replace("mlp.", "mlp.shared_expert.")] = tensors.pop(name)
        for expert in range(3):
            tensors[name.replace("mlp.", f"mlp.experts.{expert}.")] = W * (expert + 2)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("write", [write_model, write_mixture])
@pytest.mark.parametrize("shards", [1, 2, 3, 14])
def test_shards_merge_into_the_bytes_of_one_job(write, shards: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "toy")
    one, merged = tmp_path / "one.safetensors", tmp_path / "merged.safetensors"
    jobs.compute_to(one, folder, 8)
    parts = []
    for i in range(1, shards + 1):
        path = tmp_path / f"{i}.safetensors"
        jobs.compute_to(path, folder, 8, shard=(i, shards))
        parts.append(store.load(path))
    if shards > 1:
        assert parts[0].provenance["shard"] == f"1 of {shards}"
        parts = [jobs.merge(parts[::-1])]
    store.save(parts[0], merged)
    assert merged.read_bytes() == one.read_bytes()


def test_shards_are_equal_in_cost(tmp_path: Path) -> None:
    plan = projection_parts(write_model(tmp_path / "toy", layers=14))
    shards = [jobs._shard(plan, jobs.Job(8, shard=(i, 7))) for i in range(1, 8)]
    assert sorted(plan.index(p) for shard in shards for p in shard) == list(range(len(plan)))
    seventh = sum(p.stored for p in plan) / 7
    assert [sum(p.stored for p in shard) for shard in shards] == [seventh] * 7
    assert all(shard == sorted(shard, key=plan.index) for shard in shards)


def test_shards_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy")
    one, two = (jobs.compute(folder, 4, shard=(i, 2)) for i in (1, 2))
    for parts in ([one], [one, one], [one, two, two], [jobs.compute(folder, 4)], []):
        with pytest.raises(WdlibError, match="make no whole"):
            jobs.merge(parts)
    thirds = [jobs.compute(folder, 4, shard=(i, 3)) for i in (3, 1)]
    for parts in (thirds, [*thirds, thirds[0]], [thirds[0], one]):
        with pytest.raises(WdlibError, match=r"for want of .*2 of 3: give each"):
            jobs.merge(parts)
    wanted = r"not of one job: made by .*rank=4\)' in 1 of 2 and .*rank=5\)' in 2 of 2"
    with pytest.raises(WdlibError, match=wanted):
        jobs.merge([one, jobs.compute(folder, 5, shard=(2, 2))])
    spoil(folder, "model.layers.1.self_attn.v_proj.weight", 9.0)
    with pytest.raises(WdlibError, match="not of one job: sha256"):
        jobs.merge([one, jobs.compute(folder, 4, shard=(2, 2))])
    for shard in ((0, 2), (3, 2), (1, 15)):
        with pytest.raises(WdlibError, match="there is no shard"):
            jobs.compute(folder, 4, shard=shard)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the matrices that `top_singular_values` was called with."""
    top, seen = kernel.top_singular_values, []

    def counted(matrix: np.ndarray, r: int, *, name: str, **options: bool) -> SingularValues:
        seen.append(name)
        return top(matrix, r, name=name, **options)

    monkeypatch.setattr(kernel, "top_singular_values", counted)
    return seen


def test_a_journal_cut_at_any_byte_goes_on(tmp_path: Path, computed: list[str]) -> None:
    folder, out = write_model(tmp_path / "toy"), tmp_path / "out.safetensors"
    journal = Path(f"{out}.unfinished")
    jobs.compute(folder, 4, journal=journal)
    kept = journal.read_bytes()
    jobs.compute_to(out, folder, 4)
    assert not journal.exists() or pytest.fail("the journal of a finished job is left")
    whole, lines = out.read_bytes(), np.cumsum([len(line) for line in kept.splitlines(True)])
    assert len(lines) == 15
    for cut in [*range(0, len(kept), 97), *lines, *(lines - 1)]:
        journal.write_bytes(kept[:cut])
        computed.clear()
        jobs.compute_to(out, folder, 4)
        finished = int(np.sum(lines - 1 <= cut))  # a line is whole without its end
        assert len(computed) == 14 - max(finished - 1, 0)
        assert out.read_bytes() == whole
        assert not journal.exists()


def test_twice_interrupted(tmp_path: Path, computed: list[str]) -> None:
    folder, journal = write_model(tmp_path / "toy"), tmp_path / "journal"
    whole = jobs.compute(folder, 4, journal=journal)
    journal.write_bytes(journal.read_bytes()[:2000])  # in the middle of a line
    jobs.compute(folder, 4, journal=journal)
    computed.clear()
    assert_same(jobs.compute(folder, 4, journal=journal), whole)
    assert computed == []


def test_the_day_is_that_of_the_beginning(tmp_path: Path) -> None:
    folder, journal = write_model(tmp_path / "toy"), tmp_path / "journal"
    today = jobs.compute(folder, 4, journal=journal).provenance["created"]
    journal.write_text(journal.read_text().replace(today, "2001-02-03"))
    assert jobs.compute(folder, 4, journal=journal).provenance["created"] == "2001-02-03"
    shards = [jobs.compute(folder, 4, shard=(i, 2)) for i in (1, 2)]
    shards[1].provenance["created"] = "2001-02-03"
    assert jobs.merge(shards).provenance["created"] == "2001-02-03"


@pytest.mark.parametrize("change", ["rank", "weights", "certify", "shard", "foreign", "list"])
def test_a_journal_of_something_else_begins_anew(
    change: str, tmp_path: Path, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, journal = write_model(tmp_path / "toy"), tmp_path / "journal"
    options = {"certify": {"certify": False}, "shard": {"shard": (1, 2)}}.get(change, {})
    jobs.compute(folder, 5 if change == "rank" else 4, journal=journal, **options)
    if change == "weights":
        spoil(folder, "model.layers.0.self_attn.q_proj.weight", 50.0)
    if change in ("foreign", "list"):
        journal.write_text("something\n" if change == "foreign" else "[1]\n")
    computed.clear()
    found = jobs.compute(folder, 4, journal=journal)
    assert len(computed) == 14
    assert_same(found, jobs.compute(folder, 4))
    assert "begins anew" in caplog.text


def test_killed_and_called_again(tmp_path: Path, computed: list[str]) -> None:
    """A process that gets SIGKILL while it computes; the next one does only what is missing."""
    folder = write_model(tmp_path / "toy", layers=6, hidden=400)
    out = tmp_path / "killed.safetensors"
    code = "import sys; from wdlib import spectra; spectra.compute_to(sys.argv[2], sys.argv[1], 8)"
    journal = Path(f"{out}.unfinished")
    with subprocess.Popen([sys.executable, "-c", code, folder, out], cwd=paths.ROOT) as process:
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 6:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not out.exists()
    finished = journal.read_bytes().count(b"\n") - 1
    jobs.compute_to(out, folder, 8)
    assert len(computed) == 42 - finished < 42
    jobs.compute_to(tmp_path / "one.safetensors", folder, 8)
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


class Counting(ThreadPoolExecutor):
    """Two threads, and how many items were handed out and not done with, at most."""

    def __init__(self) -> None:
        super().__init__(2)
        self.out = self.most = 0

    def submit(self, *args: object) -> Future:
        self.out += 1
        self.most = max(self.most, self.out)
        future = super().submit(*args)
        future.result, result = lambda: self.fetched(result), future.result
        return future

    def fetched(self, result: Callable) -> object:
        self.out -= 1
        return result()


def test_threads_give_the_same_bits_and_bounded_memory(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy", hidden=336)
    one = jobs.compute(folder, 8)
    with ThreadPoolExecutor(2) as pool:
        assert_same(jobs.compute(folder, 8, executor=pool), one)
    with Counting() as pool:
        found = jobs.collect(stream.projections(folder), 8, executor=pool)
        assert pool.most == jobs.IN_FLIGHT
    values, error = jobs.stack(found)
    for t in TYPES:
        np.testing.assert_array_equal(values[t], one.values[t])
        np.testing.assert_array_equal(error[t], one.error[t])


def test_an_error_in_a_worker_is_raised_and_ends_the_work(
    tmp_path: Path, computed: list[str]
) -> None:
    folder = write_model(tmp_path / "toy", layers=30)
    spoil(folder, "model.layers.1.self_attn.q_proj.weight", np.inf)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(WdlibError, match=r"layers\.1\.self_attn\.q_proj\.weight.* NaN or infinity"),
    ):
        jobs.compute(folder, 4, executor=pool)
    assert len(computed) < 100


def test_a_worker_that_dies_is_said_in_one_sentence(tmp_path: Path) -> None:
    class Dead(Executor):
        def submit(self, *args: object) -> Future:
            future = Future()
            future.set_exception(BrokenExecutor("it is gone"))
            return future

    with pytest.raises(WdlibError, match=r"a worker died \(it is gone\).*same command again"):
        jobs.compute(write_model(tmp_path / "toy"), 4, executor=Dead())


def test_no_matrix_travels(tmp_path: Path) -> None:
    plan = projection_parts(write_model(tmp_path / "toy", hidden=336))
    assert max(len(pickle.dumps((jobs._of_part, jobs.Job(8), p))) for p in plan) < 2000


def test_processes_give_the_same_bits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy", hidden=336)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert_same(jobs.compute(folder, 8, executor=pool), jobs.compute(folder, 8))


def test_workers_end_with_a_parent_that_was_killed() -> None:
    program = """
import os, time
from wdlib import spectra
if __name__ == "__main__":
    with spectra.processes(2) as pool:
        print(*pool.map(os.path.basename, "ab"), flush=True)
        time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"a b\n"
        parent.kill()
        # At its end when the last process that holds it, the parent or a worker, is gone.
        assert parent.communicate(timeout=30) == (b"", None)


def test_what_is_finished_first_is_kept_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, journal = write_model(tmp_path / "toy", layers=3), tmp_path / "journal"
    costly = "tensor model.layers.0.mlp.gate_proj.weight"
    top, order, others_kept = kernel.top_singular_values, [], []

    def slow(matrix: np.ndarray, r: int, *, name: str, **options: bool) -> SingularValues:
        order.append(name)
        if name == costly:
            for _ in range(1000):
                time.sleep(0.01)
                if journal.read_bytes().count(b"\n") == 21:  # the head, and all but one of 21
                    others_kept.append(True)
                    break
        return top(matrix, r, name=name, **options)

    monkeypatch.setattr(kernel, "top_singular_values", slow)
    with ThreadPoolExecutor(2) as pool:
        found = jobs.compute(folder, 4, journal=journal, executor=pool)
    assert others_kept
    kinds = [name.split(".")[4] for name in order]
    assert set(kinds[:9]) == {"gate_proj", "up_proj", "down_proj"}, "the costliest are not first"
    monkeypatch.undo()
    assert_same(found, jobs.compute(folder, 4))


def test_dask_gives_the_same_bits(tmp_path: Path) -> None:
    import distributed

    folder = write_model(tmp_path / "toy", hidden=336)
    local = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        distributed.LocalCluster(**local, local_directory=str(tmp_path)) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as pool,
    ):
        found = jobs.compute(folder, 8, executor=pool)
    assert_same(found, jobs.compute(folder, 8))


def test_progress_says_what_is_done_and_how_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, journal = write_model(tmp_path / "toy"), tmp_path / "journal"
    jobs.compute(folder, 4, journal=journal, progress=True)
    said = capsys.readouterr()
    assert re.search(r"61\.4k/61\.4k .*B/s, 14 of 14 matrices", said.err.replace("\r", "\n"))
    assert not said.out
    jobs.compute(folder, 4)
    assert not capsys.readouterr().err


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_model(tmp_path / "toy", layers=3)
    common = ["spectra", str(folder), "--rank", "4", "--layers", "0,2-2", "--types", "k,q"]
    shards = []
    for shard in ("1/2", "2/2"):
        shards.append(str(tmp_path / f"{shard[0]}.safetensors"))
        assert cli.main([*common, "--shard", shard, "--out", shards[-1]]) == 0
    merged, one = (str(tmp_path / f"{name}.safetensors") for name in ("merged", "one"))
    assert cli.main(["merge", *shards, "--out", merged]) == 0
    assert cli.main([*common, "--workers", "2", "--out", one]) == 0
    assert Path(merged).read_bytes() == Path(one).read_bytes()
    assert store.load(merged).rows == dict.fromkeys("qk", ((0, None), (2, None)))
    capsys.readouterr()
    assert cli.main([*common, "--device", "tpu", "--out", one]) == 1
    assert "no device 'tpu'" in capsys.readouterr().err
    for option in (
        *(["--layers", "1-"], ["--layers", "2-1"], ["--types", "q,x"], ["--shard", "2"]),
        *(["--workers", "0"], ["--workers", "-1"]),
    ):
        with pytest.raises(SystemExit):
            cli.main([*common, *option, "--out", one])


def test_files_that_cannot_hold_spectra_are_refused_before_any_work(
    tmp_path: Path, computed: list[str], capsys: pytest.CaptureFixture
) -> None:
    folder = write_model(tmp_path / "toy")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("folder.safetensors", "toy", "a.npz"):
        with pytest.raises(WdlibError, match=rf"{name} cannot hold spectra: name a file that"):
            jobs.compute_to(tmp_path / name, folder, 4)
        with pytest.raises(WdlibError, match=rf"{name} cannot hold spectra"):
            store.save(made_by_hand(((0, None),)), tmp_path / name)
    assert not computed
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "folder.safetensors"}


def test_files_that_are_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "2.safetensors"
    with pytest.raises(WdlibError, match=r"2\.safetensors holds no spectra \(there is no such"):
        store.load(path)
    Path(f"{path}.unfinished").touch()
    with pytest.raises(WdlibError, match=r"\(its job is unfinished\): run `wdlib spectra MODEL"):
        store.load(path)


# Large matrices ----------------------------------------------------------------------------------


def test_the_peak_is_three_of_the_largest_matrix(tmp_path: Path) -> None:
    """In the proportions of a 70B Llama, where the largest matrix is 3.5 times as wide as high."""
    n, m = 768, 2688
    shapes = dict.fromkeys(("q", "k", "v", "o"), (n, n))
    shapes |= {"gate": (m, n), "up": (m, n), "down": (n, m)}
    tensors = {
        f"model.layers.{layer}.{NAMES[t]}.weight": gaussian(*shape).astype(np.float16)
        for layer in (0, 1)
        for t, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    jobs.compute(tmp_path, 16, layers=(0,), types=("k",))
    for layers in ((0,), (0, 1)):
        tracemalloc.start()
        jobs.compute(tmp_path, 16, types=("q", "gate", "down"), layers=layers)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * 4 * n * m  # three are allowed; one matrix kept too long makes 2.75


def test_the_float64_product_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PRODUCT_BYTES", 8 * N * 40)
    W = gaussian(N, M)
    for V in (W, np.asfortranarray(W), W.T, W.astype(np.float64), W.astype(np.float16)):
        result = top_singular_values(V, 200)
        assert result.method == "gram-float64"
        check(V, result)


# Devices -----------------------------------------------------------------------------------------


def test_the_product_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    W = gaussian(N, M)
    W.flags.writeable = False
    for V in (W, np.asfortranarray(W)):
        G = kernel._mirror(kernel._product_on("cpu", V))
        np.testing.assert_allclose(G, V.astype(np.float64) @ V.T, atol=1e-3)
        np.testing.assert_array_equal(G, G.T)
    monkeypatch.setattr(kernel, "check_device", lambda device: None)
    product = kernel._product_on
    monkeypatch.setattr(kernel, "_product_on", lambda device, W: product("cpu", W))
    result = top_singular_values(W, 16, device="cuda")
    assert result.method == "gram-lanczos"
    check(W, result)
    monkeypatch.setattr(kernel, "_product_on", lambda device, W: product("cpu", W) * 1.001)
    check(W, top_singular_values(W, 16, device="mps"))  # a wrong device cannot break the bound


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    folder = write_model(tmp_path / "toy")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device, message in [
        ("cuda", "no cuda device on this machine: choose cpu"),
        ("mps", "no mps device"),
        ("gpu", "no device 'gpu': choose one of cpu, cuda, mps"),
    ]:
        with pytest.raises(WdlibError, match=message):
            top_singular_values(gaussian(5, 6), 2, device=device)
        with pytest.raises(WdlibError, match=message):
            jobs.compute(folder, 2, device=device)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WdlibError, match=r"cuda needs torch.* wdlib\[lora\]"):
        kernel.check_device("cuda")


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        ((0, None), (1, None)),
        ((0, 0), (0, 1), (1, 0), (1, 1)),
        ((0, None), (0, 0), (3, 1)),
        ((1, None), (4, None)),
    ],
)
def test_round_trip(rows: tuple, tmp_path: Path) -> None:
    written = made_by_hand(rows)
    path = store.save(written, tmp_path / "new" / "toy.safetensors")
    assert_same(store.load(path), written)
    assert_same(store.load(str(path)), written)
    assert_same(store.load(path, rank=2), written.truncate(2))
    tensors = load_file(path)
    assert tensors["q"].dtype == np.float64
    np.testing.assert_array_equal(tensors["down.error"], written.error["down"])
    assert ("q.rows" in tensors) == (rows != ((0, None), (1, None)))
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]


def test_truncate() -> None:
    whole = made_by_hand(((0, None), (1, None)), rank=5)
    part = whole.truncate(2)
    assert part.rank == 2
    np.testing.assert_array_equal(part.values["q"], whole.values["q"][:, :2])
    np.testing.assert_array_equal(part.error["down"], whole.error["down"][:, :2])
    assert_same(whole.truncate(5), whole)
    for rank in (0, 6):
        remedy = "ask .* `wdlib spectra toy --rank R --out FILE`"
        with pytest.raises(WdlibError, match=f"toy hold ranks 1 to 5, not {rank}: {remedy}"):
            whole.truncate(rank)


def test_truncated_spectra_are_saved_as_they_are(tmp_path: Path) -> None:
    part = made_by_hand(((0, None), (1, None)), rank=5).truncate(2)
    assert_same(store.load(store.save(part, tmp_path / "part.safetensors")), part)


def test_load_by_name(store: Path) -> None:
    toy = made_by_hand(((0, None),))
    with pytest.raises(WdlibError, match=r"no stored spectra toy\.safetensors"):
        store.load("toy")
    store.save(toy, store.stored("toy"))
    assert_same(store.load("toy"), toy)
    with pytest.raises(WdlibError, match=r"stored: toy"):
        store.load("other")


def wdlib_file(path: Path, about: object, *left_out: str) -> None:
    tensors = {k: np.ones((2, 3)) for k in ("q", "q.error") if k not in left_out}
    save_file(tensors, path, metadata={"wdlib": json.dumps(about)})


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(1000)),
    "cut": lambda path: path.write_bytes(
        store.save(made_by_hand(((0, None),)), path).read_bytes()[:-9]
    ),
    "foreign": lambda path: save_file({"q": np.ones((2, 3))}, path),
    "other metadata": lambda path: save_file({"q": np.ones(2)}, path, metadata={"format": "pt"}),
    "no json": lambda path: save_file({"q": np.ones(2)}, path, metadata={"wdlib": "{"}),
    "no object": lambda path: wdlib_file(path, [1]),
    "no model": lambda path: wdlib_file(path, {"source": "x"}),
    "no bounds": lambda path: wdlib_file(path, {"model": "x"}, "q.error"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    BROKEN[name](path)
    remedy = r"`wdlib spectra MODEL --rank R --out \S+bad\.safetensors`"
    with pytest.raises(WdlibError, match=rf"bad\.safetensors does not hold spectra .*{remedy}"):
        store.load(path)


@pytest.mark.parametrize("step", ["serialise", "write", "replace"])
def test_a_failed_save_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.safetensors"
    store.save(made_by_hand(((0, None),)), path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    def write_half(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        fail()

    if step == "serialise":
        monkeypatch.setattr(spectra, "serialise", fail)
    elif step == "write":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    for target in (path, tmp_path / "other.safetensors"):
        with pytest.raises(OSError, match="no space left"):
            store.save(made_by_hand(((0, None), (1, None))), target)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.safetensors"]
    assert path.read_bytes() == before


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "toy", hidden=336)
    code = (
        "import sys; from wdlib import spectra; "
        "spectra.save(spectra.compute(sys.argv[1], 8), sys.argv[2])"
    )
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(folder), str(path)],
            check=True,
            cwd=paths.ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert "gram-lanczos" in store.load(path).provenance["methods"]


# From the store, from the cache, computed --------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that `compute` was called with."""
    compute, seen = jobs.compute, []

    def counted(model: files.Checkpoint, rank: int, **options: bool) -> Spectra:
        seen.append(rank)
        return compute(model, rank, **options)

    monkeypatch.setattr(jobs, "compute", counted)
    return seen


def test_of_computes_once_per_content(store: Path, calls: list[int]) -> None:
    folder = write_model(store / "toy")
    first = jobs.of(folder, 4)
    assert_same(jobs.of(folder, 4), first)
    assert_same(jobs.of(str(folder), 4), first)
    assert calls == [4]
    assert jobs.of(folder, 5).rank == 5
    assert calls == [4, 5]
    spoil(folder, "model.layers.0.self_attn.q_proj.weight", 50.0)
    changed = jobs.of(folder, 4)
    assert calls == [4, 5, 4]
    assert changed.values["q"][0, 0] > 49
    assert changed.provenance["sha256"] != first.provenance["sha256"]
    assert len(list((store / "cache" / "spectra").iterdir())) == 3


@pytest.mark.parametrize("as_path", [Path, lambda name: f"./{name}", os.path.abspath])
def test_of_a_folder_named_like_a_model_is_of_the_folder(
    as_path: Callable, store: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store)
    kept = replace(made_by_hand(((0, None),), rank=3), model=catalogue.DEFAULT)
    store.save(kept, store.stored(catalogue.DEFAULT))
    store.save(kept, store / f"{catalogue.DEFAULT}.safetensors")
    folder = as_path(write_model(Path(catalogue.DEFAULT)).name)
    assert jobs.available_rank(folder) == 16
    assert jobs.of(folder, 3).rows["q"] == ((0, None), (1, None))
    assert calls == [3]


def test_of_computes_again_what_is_damaged(
    store: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model(store / "toy")
    first = jobs.of(folder, 4)
    (path,) = (store / "cache" / "spectra").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    assert_same(jobs.of(folder, 4), first)
    assert calls == [4, 4]
    assert path.read_bytes() == good
    assert "does not hold spectra" in caplog.text


def test_of_prefers_the_store_and_needs_no_weights(
    store: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(made_by_hand(((0, None),), rank=3), model=catalogue.DEFAULT)
    store.save(kept, store.stored(catalogue.DEFAULT))
    toy = files.resolve(write_model(store / "toy"))
    resolved = []
    monkeypatch.setattr(files, "resolve", lambda model: resolved.append(model) or toy)
    assert_same(jobs.of(catalogue.DEFAULT, 2), kept.truncate(2))
    assert_same(jobs.of(catalogue.DEFAULT, 3), kept)
    assert not calls
    assert not resolved
    assert jobs.of(catalogue.DEFAULT, 4).model == "toy"  # more than the store holds
    assert resolved == [catalogue.DEFAULT]
    assert calls == [4]
