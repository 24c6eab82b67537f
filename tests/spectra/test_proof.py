"""Attacks: the fast method is fed what is wrong, and must notice."""

import numpy as np
import pytest
from tiny import assert_proven, gaussian, planted

from wdlib.spectra import arrays, kernel
from wdlib.spectra.arrays import NUMPY, Numpy
from wdlib.spectra.kernel import top_singular_values

N, M = 333, 501  # above dense_dimension, and no multiple of the block size
FALLING = 1.0 / np.arange(1, N + 1)


def missing(G: np.ndarray, which: int) -> np.ndarray:
    """G without its eigenvector number `which`, in float32."""
    values, vectors = np.linalg.eigh(G.astype(np.float64))
    u = vectors[:, -1 - which]
    return (G - values[-1 - which] * np.outer(u, u)).astype(np.float32)


def seen_in(V: np.ndarray, W: np.ndarray, r: int) -> np.ndarray:
    """The r largest singular values of W that a subspace shows, by Rayleigh-Ritz."""
    Q, _ = np.linalg.qr(V.astype(np.float64))
    return np.linalg.svd(Q.T @ W.astype(np.float64), compute_uv=False)[:r]


@pytest.mark.parametrize("which", [0, 3, 14, 15])
@pytest.mark.parametrize("kind", ["flat", "power 1"])
def test_a_missed_value_is_noticed(kind: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W = gaussian(N, M) if kind == "flat" else planted(N, M, FALLING).astype(np.float32)
    krylov, spaces = kernel._block_lanczos, []

    def blind(xp: Numpy, G: np.ndarray, r: int) -> tuple[np.ndarray, float]:
        spaces.append(krylov(xp, missing(G, which), r))
        return spaces[-1]

    monkeypatch.setattr(kernel, "_block_lanczos", blind)
    result = top_singular_values(W, 16)
    assert result.method == "gram-float64"
    assert_proven(W, result)
    # All that the space shows is right, and without the proof it would be the answer.
    ((V, _),) = spaces
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(seen_in(V, W, 16), np.delete(exact, which)[:16], rtol=1e-5)


def test_a_start_that_cannot_see_the_largest_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    W = np.zeros((N, M), np.float32)
    W[1:, 1:] = gaussian(N - 1, M - 1) * 0.01
    W[0, 0] = 5
    krylov, spaces = kernel._block_lanczos, []

    def structured(xp: Numpy, G: np.ndarray, r: int) -> tuple[np.ndarray, float]:
        V, after = krylov(xp, np.ascontiguousarray(G[1:, 1:]), r)
        spaces.append(np.vstack([np.zeros((1, V.shape[1]), V.dtype), V]))
        return spaces[-1], after

    monkeypatch.setattr(kernel, "_block_lanczos", structured)
    assert_proven(W, top_singular_values(W, 16))
    assert seen_in(*spaces, W, 1) < 1


def test_values_that_are_repeated_beyond_the_block_are_missed_and_noticed() -> None:
    W = planted(400, 900, np.r_[np.ones(20), np.linspace(0.9, 0.1, 380)]).astype(np.float32)
    result = top_singular_values(W, 16)
    assert result.method == "gram-float64"
    assert_proven(W, result)
    V, _ = kernel._block_lanczos(NUMPY, NUMPY.gram(W), 16)
    assert seen_in(V, W, 16)[-1] < 0.95


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
    syrk, used = arrays.syrk, []

    def wrong(W: np.ndarray) -> np.ndarray:
        G = syrk(W)
        if W.dtype == np.float64:
            return G
        used.append(W.shape)
        return np.asfortranarray(SABOTAGE[name](G))

    monkeypatch.setattr(arrays, "syrk", wrong)
    for W in (gaussian(N, M), planted(N, M, FALLING).astype(np.float32)):
        for r in (1, 16):
            assert_proven(W, top_singular_values(W, r))
    assert len(used) == 4


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_wrong_factor_cannot_break_the_bound(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Cholesky factor that is off, over a product in which the largest value is missing."""
    spotrf = arrays.lapack.spotrf

    def wrong(a: np.ndarray, **options: int) -> tuple[np.ndarray, int]:
        L, info = spotrf(a, **options)
        return (L * np.float32(factor) if len(L) > NUMPY.block else L), info

    monkeypatch.setattr(arrays.lapack, "spotrf", wrong)
    W = gaussian(N, M)
    result = top_singular_values(W, 16)
    assert result.method == "gram-float64"
    assert_proven(W, result)


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
        rest = kernel._proven_rest(NUMPY, G, V, theta, tau, (X, truth @ X))
        inside = vectors[:, :-4]
        assert rest >= np.linalg.eigvalsh(inside.T @ truth @ inside)[-1]
        assert np.isnan(
            kernel._proven_rest(NUMPY, truth.astype(np.float32), V, theta, tau, (X, A @ X))
        )


def test_the_bound_on_squared_values_is_that_of_two_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ritz vector tilted by phi between two eigenvectors is where Li and Li's bound is sharp."""
    squares = np.r_[1.0, 0.5, np.linspace(0.2, 0.1, N - 2)]
    phi = 1e-3
    V = np.zeros((N, 1))
    V[0], V[1] = np.cos(phi), np.sin(phi)
    after = float(squares[0] * np.sin(phi) ** 2 + squares[1] * np.cos(phi) ** 2)
    monkeypatch.setattr(kernel, "_block_lanczos", lambda *_: (V, after))
    monkeypatch.setattr(kernel, "_proven_rest", lambda *_: after)
    result = top_singular_values(np.diag(np.sqrt(squares)), 1)
    assert result.method == "gram-lanczos"
    shift = (result.error * result.values).item()
    off = 1 - result.values.item() ** 2
    assert off == pytest.approx(0.5 * np.sin(phi) ** 2, rel=1e-3)
    assert off <= shift <= 1.01 * off
    V[0], V[1] = 1, 0
    exact = top_singular_values(np.diag(np.sqrt(squares)), 1)
    assert (
        exact.error.item() >= N * np.finfo(float).eps
    )  # rounding remains where the vector is exact


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
