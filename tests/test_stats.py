"""wdlib.stats: known answers, scipy's tests, and simulations in which the truth is planted."""

import csv
import itertools
from math import inf

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose, assert_array_equal

from wdlib import WdlibError, paths, stats


def crossed(
    rng: np.random.Generator, seeds: int, items: int, *, spread: tuple[float, float, float]
) -> np.ndarray:
    """(seeds, items) scores of true mean 0: seed, item and rest have these deviations."""
    shapes = (seeds, 1), (1, items), (seeds, items)
    return sum(s * rng.standard_normal(shape) for s, shape in zip(spread, shapes, strict=True))


def answers(rng: np.random.Generator, n: int, *, discordance: float, difference: float):
    """Two bool arrays that disagree on a share of the items, the first ahead by `difference`."""
    draw = rng.random(n)
    ahead, behind = (discordance + difference) / 2, (discordance - difference) / 2
    common = rng.random(n) < 0.3
    first = np.where(draw < ahead + behind, draw < ahead, common)
    second = np.where(draw < ahead + behind, draw >= ahead, common)
    return first, second


def test_concordance_is_friedmans_statistic_and_its_test_as_sure():
    rng = np.random.default_rng(0)
    for pull in (0.0, 1.0, 3.0):
        scores = rng.standard_normal((5, 7)) + pull * np.arange(7)
        found = stats.concordance(scores)
        chi, _ = scipy.stats.friedmanchisquare(*scores.T)
        assert_allclose(found.w, chi / (5 * 6))
        left = [stats.concordance(np.delete(scores, i, 0), replicates=1).w for i in range(5)]
        assert_allclose(found.without, left)
    assert_allclose(stats.concordance(np.tile(np.arange(4), (3, 1))).w, 1)


def test_concordance_errs_as_often_as_it_says():
    rng = np.random.default_rng(1)
    p = [stats.concordance(rng.standard_normal((4, 6)), replicates=199).p for _ in range(400)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    sure = np.arange(6) + 0.1 * rng.standard_normal((4, 6))
    assert stats.concordance(sure, replicates=199).p == 1 / 200


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((1, 3)), np.full((3, 3), np.nan)])
def test_what_ranks_nothing_is_refused(scores):
    with pytest.raises(WdlibError, match="are no rankings"):
        stats.concordance(scores)


def symmetric(rng: np.random.Generator, k: int) -> np.ndarray:
    table = rng.integers(0, 6, (k, k))
    return table + table.T


def test_a_renamed_table_is_the_table_of_renamed_things():
    table = symmetric(np.random.default_rng(2), 4)
    found = stats.relabelled(table)
    upper = np.triu_indices(4)
    for row, order in zip(found, itertools.permutations(range(4)), strict=True):
        assert_array_equal(row, table[np.ix_(order, order)][upper])
    corner = stats.relabelled(table, [(0, 1), (1, 2)])
    assert corner.shape == (24, 2)
    assert_array_equal(corner[0], [table[0, 1], table[1, 2]])
    for bad in (np.zeros((2, 3)), np.zeros((9, 9))):
        with pytest.raises(WdlibError, match="cannot be renamed"):
            stats.relabelled(bad)


def test_correlations_under_renaming_are_scipys():
    rng, upper = np.random.default_rng(3), np.triu_indices(4)
    a, b = symmetric(rng, 4), symmetric(rng, 4)
    found = stats.relabelled_correlations(a, b)
    for r, order in zip(found, itertools.permutations(range(4)), strict=True):
        renamed = b[np.ix_(order, order)]
        assert_allclose(r, scipy.stats.spearmanr(a[upper], renamed[upper]).statistic)
    assert np.isnan(stats.relabelled_correlations(a, np.ones((4, 4)))).all()
    order = [2, 0, 3, 1]
    assert_allclose(stats.relabelled_correlations(a, a[np.ix_(order, order)]).max(), 1)


def test_mcnemar_counts_the_items_that_tell_two_runs_apart():
    first = np.array([1] * 5 + [0] * 14 + [1] * 30 + [0] * 10, bool)
    second = np.array([0] * 5 + [1] * 14 + [1] * 30 + [0] * 10, bool)
    result = stats.mcnemar(first, second)
    assert (result.n01, result.n10) == (14, 5)
    assert_allclose(result.p, scipy.stats.binomtest(5, 19).pvalue)
    assert_allclose(result.p, 2 * sum([1, 19, 171, 969, 3876, 11628]) / 2**19)
    assert stats.mcnemar(second, first) == stats.McNemar(5, 14, result.p)
    assert stats.mcnemar(first, first) == stats.McNemar(0, 0, 1.0)


def test_without_differences_between_items_the_interval_is_students_over_seeds():
    by_seed = np.array([0.01, 0.05, 0.03, -0.02])
    result = stats.paired_bootstrap(
        np.tile(by_seed[:, None], 50), np.zeros(50), replicates=200_000, level=0.9
    )
    known = scipy.stats.ttest_1samp(by_seed, 0)
    assert_allclose(result.estimate, by_seed.mean())
    assert_allclose([result.low, result.high], known.confidence_interval(0.9), atol=3e-4)
    assert_allclose(result.p, known.pvalue, atol=0.005)
    assert (result.seeds, result.items, result.level) == (4, 50, 0.9)


def test_one_seed_is_the_percentile_bootstrap_over_items():
    rng = np.random.default_rng(0)
    first, second = answers(rng, 400, discordance=0.25, difference=0.1)
    result = stats.paired_bootstrap(first, second, replicates=100_000)
    difference = first.astype(float) - second
    known = scipy.stats.bootstrap(
        (difference,), np.mean, n_resamples=20_000, batch=1000, method="percentile", rng=rng
    )
    assert_allclose([result.low, result.high], known.confidence_interval, atol=0.003)
    assert_allclose(result.estimate, difference.mean())
    assert abs(np.log(result.p / stats.mcnemar(first, second).p)) < 0.5


def test_with_many_seeds_the_interval_has_the_standard_error_of_the_two_way_layout():
    rng = np.random.default_rng(1)
    table = crossed(rng, 60, 300, spread=(0.05, 0.1, 1.0))
    result = stats.paired_bootstrap(table, np.zeros(300), replicates=50_000)
    error = np.sqrt(table.mean(1).var(ddof=1) / 60 + table.mean(0).var(ddof=1) / 300 - 1 / 18_000)
    assert_allclose(result.high - result.low, 2 * 1.96 * error, rtol=0.05)
    assert_allclose(result.detectable, 2.80 * error, rtol=0.05)


@pytest.mark.parametrize(("seeds", "spread"), [
    (1, (0, 0.3, 0.3)), (3, (0.1, 0.3, 0.3)), (3, (0.01, 0.3, 0.3)), (5, (0.03, 0.3, 0.3)),
])  # fmt: skip
def test_the_interval_covers_a_planted_difference_and_p_agrees_with_it(seeds, spread):
    results = [
        stats.paired_bootstrap(
            0.7 + crossed(np.random.default_rng([seeds, i]), seeds, 60, spread=spread),
            np.full(60, 0.7), replicates=500, seed=i,
        )
        for i in range(400)
    ]  # fmt: skip
    covered = np.array([r.low <= 0 <= r.high for r in results])
    assert covered.mean() > 0.92
    rejected = np.array([r.p < 0.05 for r in results])
    assert np.mean(rejected == covered) < 0.02


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_detectable_difference_is_found_four_times_in_five(seeds):
    zero = np.zeros(60)
    tables = [
        crossed(np.random.default_rng([seeds, i]), seeds, 60, spread=(0.05 * (seeds > 1), 0.3, 0.3))
        for i in range(400)
    ]
    draws = [stats.paired_bootstrap(t, zero, replicates=500, seed=i) for i, t in enumerate(tables)]
    effect = np.mean([d.detectable for d in draws])
    found = [d.low + effect > 0 for d in draws]  # adding a constant moves the interval by it
    assert_allclose(np.mean(found), 0.8, atol=0.07)


def test_one_run_is_compared_with_every_seed_of_the_other():
    rng = np.random.default_rng(2)
    trained, untrained = rng.random((5, 80)) < 0.4, rng.random(80) < 0.3
    alone = stats.paired_bootstrap(trained, untrained)
    assert alone == stats.paired_bootstrap(trained, np.tile(untrained, (5, 1)))
    assert alone == stats.paired_bootstrap(trained, untrained[None])
    assert_allclose(alone.estimate, trained.mean() - untrained.mean())
    back = stats.paired_bootstrap(untrained, trained)
    assert back.seeds == alone.seeds == 5
    assert_allclose(back.estimate, -alone.estimate)
    assert alone != stats.paired_bootstrap(trained, untrained, seed=1)


def test_equal_scores_differ_by_nothing():
    same = np.random.default_rng(0).random((3, 20))
    result = stats.paired_bootstrap(same, same)
    assert (result.estimate, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_holm_gives_the_textbook_values_in_the_order_given():
    assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert_array_equal(stats.holm([0.6, 0.7]), [1, 1])
    assert_array_equal(stats.holm([]), [])


def test_holm_keeps_the_error_of_the_whole_family():
    rng = np.random.default_rng(4)
    p = rng.random((20_000, 6))
    p[:, 4:] /= 1e4  # two effects that are there
    adjusted = np.apply_along_axis(stats.holm, 1, p)
    assert_allclose((adjusted[:, :4] < 0.05).any(1).mean(), 1 - (1 - 0.05 / 4) ** 4, atol=0.006)
    assert np.all(adjusted[:, 4:] < 0.05)


@pytest.mark.parametrize(("n", "discordance", "difference"), [(198, 0.2, 0.08), (60, 0.5, -0.25)])
def test_paired_power_is_that_of_the_test_itself(n, discordance, difference):
    rng = np.random.default_rng(5)
    pairs = (answers(rng, n, discordance=discordance, difference=difference) for _ in range(2000))
    found = np.mean([stats.mcnemar(*pair).p < 0.05 for pair in pairs])
    power = stats.paired_power(n, difference, discordance=discordance)
    assert_allclose(power, found, atol=0.035)


def test_paired_power_at_no_difference_is_the_level_kept_exactly():
    m = np.arange(1, 41)
    weights = scipy.stats.binom.pmf(m, 40, 0.3)
    errors = [
        sum(
            scipy.stats.binom.pmf(k, j, 0.5)
            for k in range(j + 1)
            if scipy.stats.binomtest(k, j).pvalue <= 0.05
        )
        for j in m.tolist()
    ]
    assert_allclose(stats.paired_power(40, 0.0, discordance=0.3), weights @ errors, rtol=1e-9)


@pytest.mark.parametrize(("n", "accuracy"), [(198, 0.25), (1172, 0.4)])
def test_an_unpaired_detectable_effect_is_found_four_times_in_five(n, accuracy):
    effect = stats.minimum_detectable_effect(n, accuracy=accuracy)
    rng = np.random.default_rng(6)
    first, second = rng.binomial(n, [accuracy, accuracy + effect], (40_000, 2)).T / n
    mean = (first + second) / 2
    z = (second - first) / np.sqrt(2 * mean * (1 - mean) / n)
    assert_allclose((abs(z) > 1.96).mean(), 0.8, atol=0.02)


def test_minimum_detectable_effects_match_the_textbook_and_their_own_power():
    bound = scipy.stats.norm.isf(0.025) + scipy.stats.norm.isf(0.2)
    large = stats.minimum_detectable_effect(10**6, accuracy=0.5)
    assert_allclose(large, bound * np.sqrt(0.5 / 10**6), rtol=1e-3)
    paired = stats.minimum_detectable_effect(10_042, discordance=0.2)
    assert_allclose(paired, bound * np.sqrt(0.2 / 10_042), rtol=0.02)
    assert_allclose(stats.paired_power(10_042, paired, discordance=0.2), 0.8, atol=1e-6)
    assert stats.minimum_detectable_effect(198, discordance=0.02) == inf
    assert stats.minimum_detectable_effect(20, accuracy=0.95) == inf
    strict = stats.minimum_detectable_effect(198, discordance=0.2, level=0.99, power=0.9)
    assert strict > stats.minimum_detectable_effect(198, discordance=0.2)


def test_the_chance_of_thirteen_questions_is_that_of_simulated_runs():
    rng = np.random.default_rng(7)
    apart = np.subtract(*rng.binomial(198, 0.25, (2, 400_000)))
    unpaired = stats.chance_of_difference(198, 13, accuracy=0.25)
    assert_allclose(unpaired, (abs(apart) >= 13).mean(), atol=0.003)
    counts = rng.multinomial(198, [0.1, 0.1, 0.8], 400_000)
    paired = stats.chance_of_difference(198, 13, discordance=0.2)
    assert_allclose(paired, (abs(counts[:, 0] - counts[:, 1]) >= 13).mean(), atol=0.002)
    assert_allclose(stats.chance_of_difference(2, 2, accuracy=0.5), 2 / 16)
    assert_allclose(stats.chance_of_difference(2, 1, discordance=0.5), 1 - 0.25 - 0.5 * 0.25)
    assert stats.chance_of_difference(198, 0, accuracy=0.25) == 1


ONE, TWO = np.ones(3, bool), np.ones((2, 3))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: stats.paired_power(10, 0.1, discordance=0.2, level=95), "level 95 is not a share"),
    (lambda: stats.mcnemar(ONE, ONE[:2]), "two bool arrays"),
    (lambda: stats.mcnemar(ONE, TWO[0]), "two bool arrays"),
    (lambda: stats.mcnemar(np.ones((2, 3), bool), np.ones((2, 3), bool)), "two bool arrays"),
    (lambda: stats.paired_bootstrap(TWO, np.ones((3, 3))), "do not pair"),
    (lambda: stats.paired_bootstrap(TWO, np.ones((2, 4))), "do not pair"),
    (lambda: stats.paired_bootstrap(np.ones((2, 3, 2)), TWO), "do not pair"),
    (lambda: stats.paired_bootstrap(TWO, np.array([0, 1, np.nan])), "finite"),
    (lambda: stats.paired_bootstrap(TWO[:, :1], TWO[:, :1]), "two items"),
    (lambda: stats.holm([0.1, np.nan]), "from 0 to 1"),
    (lambda: stats.paired_power(10, 0.3, discordance=0.2), "larger discordance"),
    (lambda: stats.unpaired_power(10, 0.8, accuracy=0.3), "smaller difference"),
    (lambda: stats.minimum_detectable_effect(10), "paired runs or"),
    (lambda: stats.minimum_detectable_effect(10, accuracy=0.2, power=0.01), "without any effect"),
    (lambda: stats.chance_of_difference(9, 2, accuracy=0.2, discordance=0.2), "paired runs or"),
    (lambda: stats.chance_of_difference(9, 2, accuracy=1.2), "not a share"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(WdlibError, match=message):
        call()


def test_treatments_that_are_one_have_uniform_p():
    rng = np.random.default_rng(8)
    blocks = 10 * rng.standard_normal(3)
    p = [
        stats.blocked_permutation_test(rng.standard_normal((5, 3)) + blocks, replicates=200)
        for _ in range(300)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_a_treatment_that_is_other_is_found_by_counting_deals():
    """Three nines in one row: any of 3 rows, the rest of each column in any of 2 orders."""
    values = np.array([[1, 2, 3], [1, 2, 3], [10, 11, 12]])
    assert stats.blocked_permutation_test(values) == 3 * 2**3 / 6**3


@pytest.mark.parametrize("values", [np.ones(3), np.ones((1, 3)), np.full((2, 2), np.nan)])
def test_treatments_without_blocks_are_refused(values):
    with pytest.raises(WdlibError, match="a column for each block"):
        stats.blocked_permutation_test(values)


def test_the_parts_of_a_ratio_say_what_it_would_be_without_an_item():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 50, 9)
    sums = sizes * rng.gamma(2, size=(3, 9))
    parts = stats.ratio_parts(sums, sizes)
    ratios = sums.sum(1) / sizes.sum()
    np.testing.assert_allclose(parts.mean(1), ratios)
    for i in range(9):
        others = np.arange(9) != i
        without = sums[:, others].sum(1) / sizes[others].sum()
        change = (parts[:, i] - ratios) * sizes.mean() / sizes[others].sum()
        np.testing.assert_allclose(ratios - without, change)


def test_the_docstring_states_the_coverage_that_was_measured():
    with (paths.RESULTS / "interval_coverage.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["seeds"]) > 1]
    text = " ".join(stats.paired_bootstrap.__doc__.split())
    for interval in ("paired_bootstrap", "two-level percentile"):
        for one_sided in (False, True):
            shares = [
                float(row["coverage"])
                for row in rows
                if row["interval"] == interval and (row["scores"] == "one-sided") == one_sided
            ]
            assert f"{min(shares):.2f} to {max(shares):.2f}" in text
