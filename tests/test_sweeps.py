"""wdlib.sweeps: planted curves, planted differences, and choices that must not flatter."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from wdlib import WdlibError, stats, sweeps

RATES = np.geomspace(1e-4, 1e-2, 7)


def parabola(rates: np.ndarray, *, best: float, lowest: float = 1.0) -> np.ndarray:
    return lowest + 0.1 * np.log(rates / best) ** 2


def noise(rng: np.random.Generator, *shape: int, size: float = 0.2) -> np.ndarray:
    return size * rng.standard_normal(shape)


def test_a_parabola_gives_its_own_optimum_and_its_value_there():
    found = sweeps.optimum(RATES, np.tile(parabola(RATES, best=7e-4)[:, None], 5), replicates=50)
    assert_allclose([found.setting, found.loss], [7e-4, 1.0])
    assert_allclose([found.low, found.high], 7e-4)
    uneven = np.array([1e-4, 2e-4, 9e-4, 1e-3, 6e-3])
    losses = np.tile(parabola(uneven, best=8e-4, lowest=2.0)[:, None], 5)
    found = sweeps.optimum(uneven, losses, replicates=50)
    assert_allclose([found.setting, found.loss], [8e-4, 2.0])


@pytest.mark.parametrize(("best", "low", "high"), [(1e-6, 0, 0), (1.0, np.inf, np.inf)])
def test_an_optimum_at_the_edge_is_none(best, low, high):
    found = sweeps.optimum(RATES, np.tile(parabola(RATES, best=best)[:, None], 5), replicates=50)
    assert np.isnan([found.setting, found.loss]).all()
    assert (found.low, found.high) == (low, high)


def test_the_interval_of_an_optimum_covers_it():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        losses = parabola(RATES, best=1e-3)[:, None] + noise(rng, 7, 100, size=0.5)
        losses += noise(rng, 1, 100, size=3)  # what items have in common drops out
        found = sweeps.optimum(RATES, losses, replicates=300)
        covered += found.low <= 1e-3 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_one_setting_each_is_the_paired_bootstrap():
    rng = np.random.default_rng(0)
    first, second = noise(rng, 1, 3, 100) + 0.03, noise(rng, 1, 3, 100)
    found = sweeps.difference_at_best(first, second, replicates=50_000)
    known = stats.paired_bootstrap(first[0], second[0], replicates=50_000)
    assert_allclose(found.difference.estimate, known.estimate)
    assert_allclose(
        [found.difference.low, found.difference.high], [known.low, known.high], atol=0.004
    )
    assert_allclose(found.difference.p, known.p, atol=0.02)
    assert (found.difference.seeds, found.difference.items) == (3, 100)
    assert (found.first, found.second) == ((1.0,), (1.0,))


def test_more_settings_do_not_flatter_a_treatment():
    """Nothing differs: the best of twenty by the same items wins, the best by others does not."""
    rng, plain, fair, covered = np.random.default_rng(0), [], [], 0
    for _ in range(200):
        many, one = noise(rng, 20, 1, 100), noise(rng, 1, 1, 100)
        found = sweeps.difference_at_best(many, one, replicates=300).difference
        plain.append(many.mean((1, 2)).min() - one.mean())
        fair.append(found.estimate)
        covered += found.low <= 0 <= found.high
    error = np.std(fair) / np.sqrt(200)
    assert np.mean(plain) < -10 * error
    assert abs(np.mean(fair)) < 3 * error
    assert covered / 200 >= 0.92


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_planted_difference_of_the_optima_is_covered(seeds):
    rng, covered, reported = np.random.default_rng(0), 0, []
    for _ in range(150):
        common = noise(rng, 1, seeds, 100, size=1)
        of_runs = noise(rng, 2, 7, seeds, 1, size=0.01 if seeds > 1 else 0)
        first, second = (
            parabola(RATES, best=best, lowest=low)[:, None, None] + common + luck
            for best, low, luck in zip((RATES[2], RATES[4]), (0.95, 1.0), of_runs, strict=True)
        )
        first = first + noise(rng, *first.shape)
        found = sweeps.difference_at_best(first, second, replicates=300)
        covered += found.difference.low <= -0.05 <= found.difference.high
        reported.append(found)
    assert 0.89 <= covered / 150 <= 0.995
    assert np.mean([f.first for f in reported], 0).argmax() == 2
    assert np.mean([f.second for f in reported], 0)[4] > 0.9
    assert_allclose(sum(reported[0].first), 1)


def test_a_verdict_takes_the_seeds_that_the_chosen_settings_have():
    """The choice has one seed with all rates; the verdict has a second one at the best."""
    first = np.tile(parabola(RATES, best=RATES[3])[:, None, None], (1, 2, 10))
    second = first[:3] + 0.5
    first[:, 1] += 0.2
    first[[0, 1, 2, 4, 5, 6], 1] = np.nan
    found = sweeps.difference_at_best(first, second, replicates=20)
    assert_allclose(found.difference.estimate, 1.0 + 0.1 - second[2].mean())
    assert found.difference.seeds == 2
    assert found.first == (0, 0, 0, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones((2, 1, 9)), np.ones((2, 2, 9)), "do not pair"),
        (np.ones((2, 9)), np.ones((2, 9)), "none of settings"),
        (np.full((1, 1, 9), np.nan), np.ones((1, 1, 9)), "no seed was tried"),
        (np.where(np.arange(9) < 4, np.nan, np.ones((1, 1, 9))), np.ones((1, 1, 9)), "finite"),
        (
            np.stack([np.ones((1, 9)), np.full((1, 9), np.nan)], 1),
            np.stack([np.full((1, 9), np.nan), np.ones((1, 9))], 1),
            "no seed in common",
        ),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(first, second, message):
    with pytest.raises(WdlibError, match=message):
        sweeps.difference_at_best(first, second, replicates=10)


@pytest.mark.parametrize(
    ("settings", "losses"),
    [
        ([1, 2], np.ones((2, 9))),
        ([1, 3, 2], np.ones((3, 9))),
        ([0, 1, 2], np.ones((3, 9))),
        ([1, 2, 3], np.ones((2, 9))),
    ],
)
def test_settings_without_an_order_have_no_optimum(settings, losses):
    with pytest.raises(WdlibError, match="none of the settings"):
        sweeps.optimum(settings, losses)
