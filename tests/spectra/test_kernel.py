"""Singular values: right against LAPACK, and never further off than they say."""

import numpy as np
import pytest
from tiny import assert_proven, gaussian, planted
from tiny_matrices import SPECTRA, STRUCTURED, M, N

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import catalogue, files, stream
from wdlib.spectra import arrays, kernel
from wdlib.spectra.arrays import NUMPY, Numpy
from wdlib.spectra.kernel import top_singular_values

# Accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_planted_spectra(name: str, dtype: type) -> None:
    W = planted(N, M, SPECTRA[name]).astype(dtype)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in (1, 5, 16, N // 12, N // 12 + 1):
        assert_proven(W, top_singular_values(W, r), exact)
        assert_proven(W.T, top_singular_values(W.T, r), exact)


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_matrices(name: str) -> None:
    W = STRUCTURED[name].astype(np.float32)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in (1, 16):
        assert_proven(W, top_singular_values(W, r), exact)


def test_flat_matrices_are_answered_by_the_fast_method() -> None:
    for n, m in ((321, 321), (333, 500), (577, 1153), (641, 700)):
        for r in (1, 16, n // 24):
            W = gaussian(n, m)
            result = top_singular_values(W, r)
            assert result.method == "gram-lanczos"
            assert_proven(W, result)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 319, 320, 321, 322, 324])
def test_every_rank_around_the_thresholds(n: int) -> None:
    W = gaussian(n, n + 5)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in {1, 2, n // 12 - 1, n // 12, n // 12 + 1, n // 2, n - 1, n}:
        if 1 <= r <= n:
            assert_proven(W, top_singular_values(W, r), exact)


def test_which_method_answers() -> None:
    n = NUMPY.dense_dimension
    assert top_singular_values(gaussian(n, n), 1).method == "gram-float64"
    assert top_singular_values(gaussian(n + 1, n + 1), 1).method == "gram-lanczos"
    falling = planted(n + 4, n + 4, np.arange(1, n + 5) ** -0.3)
    assert top_singular_values(falling, 27).method == "gram-lanczos"
    assert top_singular_values(falling, 28).method == "gram-float64"
    deficient = planted(40, 50, np.linspace(2, 1, 10))
    assert top_singular_values(deficient, 10).method == "gram-float64"
    assert top_singular_values(deficient, 11).method == "svd-float64"
    assert_proven(deficient, top_singular_values(deficient, 40))


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
            assert_proven(V, top_singular_values(oriented, 16), exact)
            np.testing.assert_array_equal(oriented, before)
    read_only = W.copy()
    read_only.flags.writeable = False
    assert_proven(W, top_singular_values(read_only, 16), exact)


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.int32, np.int64, np.bool_])
def test_other_data_types(dtype: type) -> None:
    W = (30 * gaussian(N, M)).astype(dtype) if dtype != np.bool_ else gaussian(N, M) > 1
    assert_proven(W, top_singular_values(W, 16))


def test_values_rounded_to_bfloat16() -> None:
    W = (gaussian(N, M).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    result = top_singular_values(W, 16)
    assert result.method == "gram-lanczos"
    assert_proven(W, result)


SCALES = [1e-40, 1e-30, 1e-13, 1e-11, 1e-6, 1.2e-4, 5e-5, 3e3, 1.1e4, 1e8, 1e11, 1e13, 1e30]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, s) for s in SCALES] + [(np.float64, s) for s in (*SCALES, 1e-200, 1e200)],
)
def test_scales(dtype: type, scale: float) -> None:
    W = (gaussian(N, M).astype(np.float64) * scale).astype(dtype)
    result = top_singular_values(W, 16)
    assert result.method == "gram-lanczos"
    assert_proven(W, result)
    spike = np.zeros((N, M), dtype)
    spike[4, 2], spike[9, 9] = scale, scale / 2
    assert_proven(spike, top_singular_values(spike, 2))


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


def test_real_matrices(real: list) -> None:
    assert {name.rstrip("0123456789") for name, _, _ in real} == set(TYPES)
    for name, W, exact in real:
        for r in (16, 64, 192):
            result = top_singular_values(W, r, name=name)
            assert_proven(W, result, exact)
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
        assert_proven(W, top_singular_values(W, r))


def test_the_float64_product_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numpy, "product_bytes", 8 * N * 40)
    W = gaussian(N, M)
    for V in (W, np.asfortranarray(W), W.T, W.astype(np.float64), W.astype(np.float16)):
        result = top_singular_values(V, 200)
        assert result.method == "gram-float64"
        assert_proven(V, result)


def test_building_blocks() -> None:
    W = gaussian(70, 90)
    exact = W.astype(np.float64) @ W.T.astype(np.float64)
    for V in (W, np.asfortranarray(W), np.repeat(W, 2, axis=1)[:, ::2]):
        for dtype, tolerance in ((np.float32, 1e-4), (np.float64, 1e-11)):
            G = arrays.syrk(V.astype(dtype, order="K"))
            assert G.dtype == dtype
            np.testing.assert_allclose(np.tril(G), np.tril(exact), atol=tolerance)
            full = arrays.mirror(G, block=16)
            np.testing.assert_allclose(full, exact, atol=tolerance)
            assert full.flags.c_contiguous
    X = np.random.default_rng(0).standard_normal((700, 3))
    tall = gaussian(700, 900)
    for V in (tall, np.asfortranarray(tall)):
        down, around = kernel._gram_apply(NUMPY, V, X)
        np.testing.assert_allclose(down, V.T.astype(np.float64) @ X, atol=1e-10)
        np.testing.assert_allclose(around, V.astype(np.float64) @ down, atol=1e-9)


# What it refuses -----------------------------------------------------------------------------


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
