"""Matchings of neurons: planted answers, exact tails against brute force, closed forms of CKA."""

from itertools import permutations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from wdlib import WdlibError
from wdlib.fingerprints import matching


def rng(seed=0):
    return np.random.default_rng(seed)


def rotated(width, seed=0):
    """A random rotation, (width, width) float32."""
    return stats.ortho_group.rvs(width, random_state=rng(seed)).astype(np.float32)


# Alignments ------------------------------------------------------------------------------------


def test_a_rotation_of_the_hidden_state_is_found_and_undone():
    a, turn = rng().standard_normal((600, 24)), rotated(24)
    found = matching.alignments(a, a @ turn)
    assert list(found) == ["none", "axes", "rotation"]
    assert_allclose(found["rotation"].of_a, turn, atol=1e-5)
    assert found["rotation"].quality == pytest.approx(1)
    assert found["axes"].quality < 0.7
    assert [one.name for one in matching.chosen(found)] == ["none", "rotation"]


def test_permuted_axes_with_signs_are_found_and_undone():
    a, order = rng().standard_normal((400, 24)), rng(1).permutation(24)
    signs = rng(2).choice([-1, 1], 24)
    b = a[:, order] * signs
    found = matching.alignments(a, b)
    assert [one.name for one in matching.chosen(found)] == ["none", "axes"]
    assert_allclose(found["axes"].a(a), found["axes"].b(b), atol=1e-6)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_axes_that_were_pruned_away_are_dropped(narrow_first):
    wide = rng().standard_normal((400, 24))
    narrow = wide[:, [20, 3, 7, 11]]
    pair = (narrow, wide) if narrow_first else (wide, narrow)
    found = matching.alignments(*pair)
    assert list(found) == ["axes", "rotation"]
    assert_allclose(found["axes"].a(pair[0]), found["axes"].b(pair[1]), atol=1e-6)
    assert found["axes"].quality == pytest.approx(1)


def test_embeddings_in_place_need_no_other_alignment_and_foreign_ones_have_none():
    a = rng().standard_normal((600, 24))
    near = matching.alignments(a, a + 0.2 * rng(1).standard_normal(a.shape))
    assert [one.name for one in matching.chosen(near)] == ["none"]
    foreign = matching.alignments(a, rng(1).standard_normal((600, 20)))
    assert max(one.quality for one in foreign.values()) < 0.1


# Matchings -------------------------------------------------------------------------------------


def test_matching_finds_permuted_noisy_rescaled_rows():
    a, order = rng().standard_normal((40, 64)), rng(1).permutation(60)
    more = np.concatenate([a, rng(2).standard_normal((20, 64))])[order]
    scales = rng(3).uniform(0.1, 10, (60, 1))
    b = scales * (more + 0.5 * rng(4).standard_normal(more.shape))
    found = matching.matching(a, b)
    np.testing.assert_array_equal(order[found], np.arange(40))
    np.testing.assert_array_equal(matching.nearest(a, b), found)
    flipped = b * rng(5).choice([-1, 1], (60, 1))
    np.testing.assert_array_equal(matching.matching(a, flipped, signed=False), found)
    np.testing.assert_array_equal(matching.nearest(a, flipped, signed=False), found)
    assert (matching.matching(a, flipped) != found).any()
    assert (matching.nearest(a, flipped) != found).any()
    with pytest.raises(WdlibError, match="60 rows cannot be matched into 40"):
        matching.matching(b, a)


def test_nearest_is_the_same_in_pieces(monkeypatch):
    a, b = rng().standard_normal((50, 8)), rng(1).standard_normal((70, 8))
    whole = matching.nearest(a, b)
    monkeypatch.setattr(matching, "_ROWS", 7)
    np.testing.assert_array_equal(matching.nearest(a, b), whole)


# Tails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 4), (6, 6), (3, 5), (4, 7), (1, 6)])
def test_the_tail_of_agreements_is_that_of_all_injections(m, n):
    counts = [sum(i == j for i, j in enumerate(p)) for p in permutations(range(n), m)]
    for k in range(m + 1):
        share = np.mean(np.array(counts) >= k)
        assert matching.log10_tail(k, m, n) == pytest.approx(np.log10(share), abs=1e-12)


def test_the_tail_of_agreements_is_poisson_in_the_limit_and_a_factorial_at_its_end():
    for k in (1, 5, 20, 60):
        limit = stats.poisson.logsf(k - 1, 0.25) / np.log(10)
        assert matching.log10_tail(k, 50_000, 200_000) == pytest.approx(limit, abs=0.01 + 0.002 * k)
    whole = -np.log10(np.arange(1, 1001)).sum()
    assert matching.log10_tail(1000, 1000, 1000) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(WdlibError, match="4 of 3 things cannot agree in 9 places"):
        matching.log10_tail(4, 3, 9)


def test_p_values_of_unrelated_rows_are_uniform():
    """Of 400 pairs of unrelated MLPs; the discrete tail is spread evenly over its last step."""
    draw, chances, found = rng(7), rng(8).uniform(size=400), []
    for chance in chances:
        gate, up = ([draw.standard_normal((n, 16)) for n in (40, 50)] for _ in range(2))
        one, two = matching.matching(*gate), matching.matching(*up, signed=False)
        k = int((one == two).sum())
        here = 10 ** matching.log10_tail(k, 40, 50)
        beyond = 10 ** matching.log10_tail(k + 1, 40, 50) if k < 40 else 0
        found.append(here - chance * (here - beyond))
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_a_binomial_tail_beyond_the_range_of_floats():
    assert matching.log10_binomial_tail(3, 10, 0.3) == pytest.approx(
        np.log10(stats.binom.sf(2, 10, 0.3))
    )
    assert matching.log10_binomial_tail(5000, 5000, 0.5) == pytest.approx(-5000 * np.log10(2))
    assert matching.log10_binomial_tail(0, 9, 0.5) == pytest.approx(0)


def test_spearman_of_matchings_is_scipys_and_goes_on_where_that_is_zero():
    draw = rng()
    one, noise = draw.permutation(200), draw.standard_normal(200)
    for weight in (0, 5, 50, 300):
        two = np.argsort(np.argsort(one + weight * noise))
        p = stats.spearmanr(one, two, alternative="greater").pvalue
        if p > 0:
            assert matching.log10_spearman(one, two) == pytest.approx(np.log10(p), abs=1e-6)
    equal = matching.log10_spearman(one, one)
    assert equal == pytest.approx(-np.log10(np.arange(1, 201)).sum())
    long = np.arange(3000)
    swapped = long.copy()
    swapped[:60] = swapped[:60][::-1]
    assert stats.spearmanr(long, swapped, alternative="greater").pvalue == 0
    assert -np.log10(np.arange(1, 3001)).sum() < matching.log10_spearman(long, swapped) < -1000
    far = matching._log10_far(30.0, 40)
    assert far == pytest.approx(np.log10(stats.t.sf(30.0, 40)), abs=0.02)
    assert matching.log10_spearman(long[:2], long[:2]) == 0


def test_fishers_combination_is_scipys_and_goes_on_where_that_is_zero():
    ps = np.array([0.3, 0.02, 0.7, 0.1])
    expected = np.log10(stats.combine_pvalues(ps, "fisher").pvalue)
    assert matching.log10_fisher(np.log10(ps)) == pytest.approx(expected)
    assert matching.log10_fisher(np.array([-800.0])) == pytest.approx(-800)
    assert matching.log10_fisher(np.zeros(3)) == 0
    assert matching.log10_bonferroni([-1, -7.0], 100) == pytest.approx(-5)
    assert matching.log10_bonferroni([-1.0], 100) == 0


# CKA -------------------------------------------------------------------------------------------


def unbiased_hsic(a, b):
    """Song et al. 2012, equation 5, written out."""
    n, ones = len(a), np.ones(len(a))
    k, m = a @ a.T, b @ b.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    first = np.trace(k @ m)
    second = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ m @ ones)
    return (first + second - third) / (n * (n - 3))


def test_cka_is_the_ratio_of_unbiased_estimators():
    a, b = rng().standard_normal((12, 5)), rng(1).standard_normal((12, 9))
    expected = unbiased_hsic(a, b) / np.sqrt(unbiased_hsic(a, a) * unbiased_hsic(b, b))
    assert matching.cka(a, b) == pytest.approx(expected)


def test_cka_ignores_rotation_scale_and_shift_and_sees_the_order_of_rows():
    a = rng().standard_normal((60, 20))
    same = 3 * a @ rotated(20) + rng(1).standard_normal(20)
    assert matching.cka(a, same) == pytest.approx(1)
    assert matching.cka(a, np.hstack([a, a])) == pytest.approx(1)
    assert abs(matching.cka(a, a[::-1])) < 0.1


def test_cka_of_unrelated_rows_is_zero_on_average_however_many_columns():
    found = [matching.cka(rng(i).standard_normal((30, 90)), rng(99 + i).standard_normal((30, 90)))
             for i in range(60)]  # fmt: skip
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(60)
    assert np.std(found) < 0.1
    with pytest.raises(WdlibError, match="there are 3"):
        matching.cka(np.eye(3), np.eye(3))
