"""Goodness of fit: size where the law is planted, power where another is."""

import time

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from wdlib.fits import goodness
from wdlib.fits.estimators import power_law
from wdlib.fits.goodness import goodness_of_fit, goodness_of_fit_vectors


def pareto(rng: np.random.Generator, n: int, alpha: float) -> np.ndarray:
    return 1 + rng.pareto(alpha - 1, n)


def product(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distances between n vectors that are exactly Pareto, ln d_kl = u_k + u_l."""
    u = rng.gamma(0.5, 1 / 1.5, n)
    return np.exp(u[:, None] + u)


def test_goodness_of_fit_holds_its_size_and_has_power():
    def rejected(draw) -> float:
        results = [
            goodness_of_fit(draw(np.random.default_rng([i, 1])), replicates=39, seed=i)
            for i in range(60)
        ]
        return float(np.mean([result.p <= 0.05 for result in results]))

    # xmin is free, so the test may reject less often than 5 %, never much more
    assert rejected(lambda rng: pareto(rng, 300, 2.5)) < 0.14
    assert rejected(lambda rng: np.r_[rng.uniform(0, 1, 100), pareto(rng, 300, 2.5)]) < 0.14
    # two values that occur very often in the middle of the tail are no power law
    assert rejected(lambda rng: np.r_[pareto(rng, 300, 2.5), [9.0] * 60, [900.0] * 60]) > 0.9


def test_replicates_are_drawn_from_the_law_and_from_the_body(monkeypatch):
    x = np.r_[0.0, np.full(3000, 0.5), pareto(np.random.default_rng(0), 1000, 2.5)]
    fit, fit_once = power_law(x), goodness.power_law
    draws = []
    monkeypatch.setattr(goodness, "power_law", lambda d: draws.append(d) or fit_once(d))
    goodness_of_fit(x, replicates=30)
    tails = [drawn[drawn >= fit.xmin] for drawn in draws[1:]]
    assert {drawn.size for drawn in draws[1:]} == {4000}
    assert all(np.isin(drawn[drawn < fit.xmin], x).all() for drawn in draws[1:])
    sizes = np.array([tail.size for tail in tails])
    spread = np.sqrt(4000 * 0.25 * 0.75)
    assert abs(sizes.mean() - fit.n_tail) < 4 * spread / np.sqrt(30)
    assert 0.5 * spread < sizes.std() < 1.6 * spread
    law = stats.pareto(fit.alpha - 1, scale=fit.xmin)
    assert stats.kstest(np.concatenate(tails), law.cdf).pvalue > 1e-3


def test_p_counts_the_data_and_carries_its_error():
    x = pareto(np.random.default_rng(3), 200, 2.5)
    result = goodness_of_fit(x, replicates=99, seed=7)
    assert result == goodness_of_fit(x, replicates=99, seed=7)
    assert result.p != goodness_of_fit(x, replicates=99, seed=8).p
    assert_allclose(100 * result.p, np.round(100 * result.p))
    assert_allclose(result.p_error, np.sqrt(result.p * (1 - result.p) / 99))
    assert (result.replicates, result.seed, result.method) == (99, 7, "iid")
    lumps = np.repeat([1.0, 2, 3, 9, 9.1, 50, 51], 100)
    assert goodness_of_fit(lumps, replicates=99).p == 0.01


def test_goodness_of_fit_of_many_values_is_fast():
    x = pareto(np.random.default_rng(4), 22_000, 2.0)
    start = time.process_time()
    goodness_of_fit(x, replicates=40)
    assert time.process_time() - start < 40 * 60 / 1000


# Shared vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_vectors_hold_the_size_that_independence_loses(symmetric):
    def table(i: int) -> np.ndarray:
        square = product(np.random.default_rng([i, 5]), 60)
        return square[:24, :24] if symmetric else square[:24, 36:]

    def independent(square: np.ndarray) -> np.ndarray:
        return square[np.triu_indices(24, 1)] if symmetric else square.ravel()

    tables = [table(i) for i in range(40)]
    ours = [
        goodness_of_fit_vectors(t, symmetric=symmetric, replicates=39, seed=i).p <= 0.05
        for i, t in enumerate(tables)
    ]
    theirs = [goodness_of_fit(independent(t), replicates=39).p <= 0.05 for t in tables]
    assert np.mean(ours) <= 0.16  # binomial: 5 % of 40, three standard errors
    assert np.mean(theirs) > 0.3


def test_independent_distances_keep_their_size_too():
    rejected = []
    for i in range(100):
        values = np.triu(pareto(np.random.default_rng([i, 6]), 576, 2.5).reshape(24, 24), 1)
        result = goodness_of_fit_vectors(values + values.T, replicates=39, seed=i)
        rejected.append(result.p <= 0.05)
    # without the shrinking of the weights it is 0
    assert 0 < np.mean(rejected) < 0.12


def test_vectors_reject_what_is_no_power_law():
    rng = np.random.default_rng(8)
    values = pareto(rng, 3600, 2.5)
    values[:1500] = np.where(np.arange(1500) % 2, 9.0, 900.0)
    values = rng.permutation(values).reshape(60, 60)
    result = goodness_of_fit_vectors(values, symmetric=False, replicates=199)
    assert result.p < 0.05
    assert result.method == "vectors"


def test_shrinking_lies_between_independent_and_shared():
    rng = np.random.default_rng(9)
    alone = np.triu(rng.random((60, 60)), 1)
    assert_allclose(goodness._shrink(alone + alone.T, True, 0.0), np.sqrt(1 / 3), atol=0.03)
    assert_allclose(goodness._shrink(rng.random((90, 80)), False, 0.0), np.sqrt(1 / 3), atol=0.03)
    u = rng.random(60)
    assert goodness._shrink(np.maximum(u[:, None], u), True, 0.0) == 1
    half = product(rng, 60) + 3 * (alone + alone.T)
    assert 0.6 < goodness._shrink(half, True, 0.0) <= 1


def test_weights_have_unit_moments():
    w = goodness._mammen(1_000_000, np.random.default_rng(0))
    assert (w > 0).all()
    assert_allclose(w.mean(), 1)
    assert_allclose([w.var(), ((w - 1) ** 3).mean()], [1, 1], atol=0.02)
