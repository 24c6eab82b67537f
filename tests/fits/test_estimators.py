"""Power-law fits: the reference library, planted truth, closed forms."""

import dataclasses
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.integrate import quad

from wdlib import WdlibError
from wdlib.fits import estimators
from wdlib.fits.estimators import (
    alpha_by_xmin,
    ccdf,
    power_law,
    power_law_ccdf,
    power_law_full,
    power_law_loglog,
)


def test_an_xmin_of_ones_own_gives_the_fit_of_what_is_above_it():
    x = pareto(np.random.default_rng(3), 500, 2.5)
    chosen = power_law(x)
    same = power_law(x, xmin=chosen.xmin)
    assert same == dataclasses.replace(chosen, method="given")
    for xmin in (0.0, 1.5, 4.0):
        tail, fit = x[x >= xmin], power_law(x, xmin=xmin)
        alone = power_law_full(tail)
        assert (fit.alpha, fit.xmin, fit.ks) == (alone.alpha, tail.min(), alone.ks)
        assert (fit.n, fit.n_tail) == (500, len(tail))
    last = np.sort(x)[-3]
    assert power_law(x, xmin=last).n_tail == 3
    with pytest.raises(WdlibError, match=r"2 distinct values from .* start at .* or below"):
        power_law(x, xmin=np.nextafter(last, np.inf))


def pareto(rng: np.random.Generator, n: int, alpha: float) -> np.ndarray:
    return 1 + rng.pareto(alpha - 1, n)


FAMILIES = {
    "pareto 1.05": lambda rng, n: pareto(rng, n, 1.05),
    "pareto 1.5": lambda rng, n: pareto(rng, n, 1.5),
    "pareto 2.5": lambda rng, n: pareto(rng, n, 2.5),
    "pareto 4": lambda rng, n: pareto(rng, n, 4),
    "pareto 9": lambda rng, n: pareto(rng, n, 9),
    "lognormal": lambda rng, n: rng.lognormal(size=n),
    "wide lognormal": lambda rng, n: rng.lognormal(sigma=3, size=n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "uniform": lambda rng, n: rng.random(n),
    "nearly constant": lambda rng, n: 5 + 1e-9 * rng.random(n),
    "pareto, rounded": lambda rng, n: np.round(pareto(rng, n, 2.5), 1),
    "pareto, resampled": lambda rng, n: rng.choice(pareto(rng, n, 3), n),
    "exponential, rounded, zeros": lambda rng, n: np.round(rng.exponential(size=n), 1),
    "integers": lambda rng, n: np.floor(pareto(rng, n, 2)),
}


def reference(x: np.ndarray):
    """`powerlaw.Fit` with the bounds of alpha lifted; what it warns of is not under test here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import powerlaw

        return powerlaw.Fit(x, verbose=0, parameter_ranges={"alpha": (None, None)})


def brute_force(x: np.ndarray) -> tuple[float, float, float]:
    """KS distance, xmin and alpha by the definition, candidate by candidate."""
    results = []
    for xmin in np.unique(x)[:-2]:
        tail = np.sort(x[x >= xmin])
        alpha = 1 + tail.size / np.log(tail / xmin).sum()
        share_below = np.searchsorted(tail, tail, side="left") / tail.size
        law = 1 - (tail / xmin) ** (1 - alpha)
        results.append((np.abs(law - share_below).max(), xmin, alpha))
    return min(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_csn_equals_powerlaw(family):
    compared = 0
    for n in (3, 4, 5, 6, 8, 10, 15, 20, 30, 60, 120):
        for seed in range(3):
            x = FAMILIES[family](np.random.default_rng([seed, n]), n)
            theirs = reference(x)
            if np.unique(x[x > 0]).size < estimators.MIN_DISTINCT:
                assert np.isnan(theirs.alpha)
                with pytest.raises(WdlibError, match="distinct"):
                    power_law(x)
                continue
            ours = power_law(x)
            assert (ours.xmin, ours.n_tail) == (theirs.xmin, theirs.n_tail)
            assert_allclose(ours.alpha, theirs.alpha, rtol=1e-12)
            assert_allclose(ours.ks, theirs.D, atol=1e-14)
            assert_allclose(ours.sigma, theirs.sigma, rtol=1e-12)
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scan_discards_no_winner(family):
    for seed in range(3):
        x = FAMILIES[family](np.random.default_rng([7, seed]), 1500)
        ks, xmin, alpha = brute_force(x[x > 0])
        ours = power_law(x)
        assert ours.xmin == xmin
        assert_allclose([ours.ks, ours.alpha], [ks, alpha], rtol=1e-11)


def test_powerlaw_as_it_comes_stops_at_three():
    x = pareto(np.random.default_rng(0), 200, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import powerlaw

        bounded = powerlaw.Fit(x, verbose=0)
    assert bounded.alpha < 3 < power_law(x).alpha


@pytest.mark.parametrize("alpha", [1.3, 1.78, 2.5, 4.0])
def test_full_recovers_a_planted_exponent(alpha):
    fitted = [
        power_law_full(pareto(np.random.default_rng(seed), 2000, alpha)) for seed in range(200)
    ]
    estimates = np.array([fit.alpha for fit in fitted])
    # the maximum likelihood estimate of alpha - 1, xmin estimated too, is n/(n-2) too large
    truth = 1 + (alpha - 1) * 2000 / 1998
    assert abs(estimates.mean() - truth) < 3 * estimates.std(ddof=1) / np.sqrt(200)
    # and sigma is the spread that it says it is
    assert_allclose(np.mean([fit.sigma for fit in fitted]), estimates.std(ddof=1), rtol=0.15)


@pytest.mark.parametrize("alpha", [1.78, 2.5, 4.0])
def test_csn_recovers_a_planted_exponent_and_start(alpha):
    fitted = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        body = rng.uniform(0, 1, 2000)  # not a power law; the tail starts at 1
        fitted.append(power_law(np.concatenate([body, pareto(rng, 3000, alpha)])))
    estimates = np.array([fit.alpha for fit in fitted])
    assert abs(estimates.mean() - alpha) < 3 * estimates.std(ddof=1) / np.sqrt(100)
    assert 0.95 < np.median([fit.xmin for fit in fitted]) < 1.2


@pytest.mark.parametrize("alpha", [1.3, 1.78, 2.5])
def test_loglog_recovers_the_exponent_of_exact_quantiles(alpha):
    # few empty or sparse bins, so that only the line itself is under test
    x = (1 - (np.arange(200_000) + 0.5) / 200_000 * (1 - 100 ** (1 - alpha))) ** (1 / (1 - alpha))
    fit = power_law_loglog(x)
    assert_allclose(fit.alpha, alpha, atol=0.005)
    assert_allclose([fit.xmin, fit.xmax], [1, 100], rtol=1e-2)
    assert fit.ks < 0.005
    assert fit.sigma is None


def test_loglog_of_a_density_that_rises():
    x = np.sqrt((np.arange(100_000) + 0.5) / 100_000) + 1e-3  # p(x) ~ x: alpha = -1
    fit = power_law_loglog(x)
    assert fit.alpha < 0
    assert fit.ks < 0.1  # the law is normalised on the range of the data


def test_loglog_of_a_flat_density_in_log_x():
    x = np.geomspace(1, 1000, 30_001)  # p(x) ~ 1/x: alpha = 1, cdf log(x) / log(1000)
    fit = power_law_loglog(x)
    assert_allclose(fit.alpha, 1, atol=1e-3)
    assert fit.ks < 1e-3


def test_loglog_leaves_empty_bins_out():
    # ten bins to a decade, the middle of three decades empty: the line goes through the rest
    x = np.concatenate([np.geomspace(1, 9.9, 3000), np.geomspace(101, 1000, 3000)])
    assert_allclose(power_law_loglog(x).alpha, 1, atol=0.02)


def test_loglog_counts_ties():
    x = np.geomspace(1, 100, 2001)  # alone p(x) ~ 1/x; each as often as 1/x makes it x^-2
    tied = np.repeat(x, np.round(1e4 / x).astype(int))
    assert_allclose(power_law_loglog(tied).alpha, 2, atol=0.02)


def test_loglog_has_at_least_the_bins_asked_for():
    x = np.geomspace(1, 1.9, 40)  # 0.28 of a decade
    with pytest.raises(WdlibError, match="0.28 decades and fill 2 bins.*raise bins_per_decade"):
        power_law_loglog(x, bins_per_decade=7)
    assert_allclose(power_law_loglog(x, bins_per_decade=8).alpha, 1, atol=0.2)


@pytest.mark.parametrize("family", ["pareto 2.5", "lognormal", "uniform"])
def test_full_equals_scipy(family):
    x = FAMILIES[family](np.random.default_rng(5), 500)
    shape, _, scale = stats.pareto.fit(x, floc=0)
    fit = power_law_full(x)
    assert_allclose([fit.alpha - 1, fit.xmin], [shape, scale], rtol=1e-12)
    assert fit.n_tail == fit.n == 500


def test_ks_of_full_is_the_distance_from_below():
    x = FAMILIES["lognormal"](np.random.default_rng(6), 300)
    fit = power_law_full(x)
    cdf = stats.pareto(fit.alpha - 1, scale=fit.xmin).cdf(np.sort(x))
    assert_allclose(fit.ks, np.abs(cdf - np.arange(300) / 300).max(), rtol=1e-12)


@pytest.mark.parametrize("method", estimators.ESTIMATORS)
@pytest.mark.parametrize("factor", [1e-6, 0.37, 1e5])
def test_the_unit_of_the_data_changes_nothing(method, factor):
    x = FAMILIES["wide lognormal"](np.random.default_rng(8), 800)
    before, after = estimators.ESTIMATORS[method](x), estimators.ESTIMATORS[method](x * factor)
    assert before.method == method
    assert_allclose(after.xmin, before.xmin * factor, rtol=1e-12)
    assert_allclose([after.alpha, after.ks], [before.alpha, before.ks], rtol=1e-9)
    assert after.n_tail == before.n_tail


@pytest.mark.parametrize("method", estimators.ESTIMATORS)
def test_order_and_shape_change_nothing(method):
    x = FAMILIES["pareto, rounded"](np.random.default_rng(9), 600)
    shuffled = np.random.default_rng(0).permutation(x).reshape(20, 30)
    assert estimators.ESTIMATORS[method](shuffled) == estimators.ESTIMATORS[method](x)


@pytest.mark.parametrize("method", estimators.ESTIMATORS)
def test_zeros_are_left_out_and_counted(method):
    x = FAMILIES["pareto 2.5"](np.random.default_rng(10), 200)
    without, with_zeros = (
        estimators.ESTIMATORS[method](x),
        estimators.ESTIMATORS[method](np.append(x, [0, 0])),
    )
    assert (with_zeros.n, with_zeros.n_zero, without.n_zero) == (202, 2, 0)
    assert (with_zeros.alpha, with_zeros.xmin) == (without.alpha, without.xmin)
    assert (with_zeros.ks, with_zeros.n_tail) == (without.ks, without.n_tail)


@pytest.mark.parametrize("method", estimators.ESTIMATORS)
@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf])
def test_impossible_distances_are_named(method, bad):
    with pytest.raises(WdlibError, match=f"value 3 of 5 is {bad}"):
        estimators.ESTIMATORS[method](np.array([1.0, 2.0, 3.0, bad, 4.0]))


@pytest.mark.parametrize("method", estimators.ESTIMATORS)
def test_too_few_distinct_values_are_refused(method):
    with pytest.raises(WdlibError, match="3 distinct positive values among 6"):
        estimators.ESTIMATORS[method](np.array([1.0, 2.0, 2.0, 3.0, 3.0, 0.0]))


def test_a_scan_that_ends_at_its_last_candidate_says_so():
    assert power_law(np.array([1, 10, 13.2, 20.5])).on_bound
    assert not power_law(pareto(np.random.default_rng(0), 500, 2.5)).on_bound
    assert not power_law_full(np.arange(1.0, 5)).on_bound


def test_alpha_by_xmin():
    rng = np.random.default_rng(12)
    x = np.r_[rng.uniform(0.1, 1, 2000), pareto(rng, 3000, 2.5), 0.0]
    scan = alpha_by_xmin(x)
    assert scan.xmin.size == 50
    assert (np.diff(scan.xmin) > 0).all()
    assert scan.xmin[0] == x[x > 0].min()
    assert scan.n_tail[-1] == 10
    assert_array_equal(scan.n_tail, [(x >= xmin).sum() for xmin in scan.xmin])
    for i in (0, 20, 49):
        full = power_law_full(x[x >= scan.xmin[i]])
        found = [scan.alpha[i], scan.sigma[i], scan.ks[i]]
        assert_allclose(found, [full.alpha, full.sigma, full.ks])
    inside = (scan.xmin > 1) & (scan.n_tail > 300)
    assert (np.abs(scan.alpha - 2.5) < 4 * scan.sigma)[inside].all()
    assert scan.alpha[0] < 2


def test_alpha_by_xmin_of_few_values_holds_every_candidate():
    x = np.round(pareto(np.random.default_rng(13), 60, 2.5), 1)
    scan, fit = alpha_by_xmin(x), power_law(x)
    at = np.flatnonzero(scan.xmin == fit.xmin)
    assert_allclose([scan.alpha[at], scan.ks[at]], [[fit.alpha], [fit.ks]])
    assert fit.ks == scan.ks.min()
    fewest = alpha_by_xmin(np.array([1.0, 2, 3, 4, 0]))
    assert_array_equal(fewest.xmin, [1, 2][: fewest.xmin.size])
    with pytest.raises(WdlibError, match="3 distinct positive values"):
        alpha_by_xmin(np.array([1.0, 2, 3, 3]))


# Survival functions --------------------------------------------------------------------------


def test_ccdf_counts_values_at_least_as_large():
    x, p = ccdf(np.array([3.0, 1, 2, 2, 0]))
    assert_array_equal(x, [0, 1, 2, 3])
    assert_allclose(p, [1, 0.8, 0.6, 0.2])


def test_power_law_ccdf_lies_on_the_data():
    rng = np.random.default_rng(11)
    data = np.concatenate([rng.uniform(0, 1, 5000), pareto(rng, 5000, 2.5)])
    fit = power_law(data)
    x, p = ccdf(data)
    law = power_law_ccdf(fit, x)
    assert np.isnan(law[x < fit.xmin]).all()
    assert_allclose(law[x == fit.xmin], p[x == fit.xmin])
    tail = x >= fit.xmin
    # the same distance as in the fit, in units of all data instead of the tail
    assert_allclose(np.abs(law - p)[tail].max(), fit.ks * fit.n_tail / fit.n, rtol=1e-9)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 1.78, 3.5])
def test_the_truncated_law_integrates_its_density(alpha):
    fit = estimators.PowerLawFit(alpha, 2.0, 50.0, 0.0, 10, 5, 0, None, "loglog", False)
    total = quad(lambda t: t**-alpha, 2, 50)[0]
    for x in (2.0, 3.0, 20.0, 49.0, 50.0, 60.0):
        expected = 0.5 * quad(lambda t: t**-alpha, min(x, 50), 50)[0] / total
        assert_allclose(power_law_ccdf(fit, np.array(x)), expected, rtol=1e-8, atol=1e-15)


def test_far_tail_of_a_law_is_not_rounded_to_zero():
    fit = estimators.PowerLawFit(3.0, 1.0, np.inf, 0.0, 4, 4, 0, None, "csn", False)
    assert_allclose(power_law_ccdf(fit, np.array([1e12])), [1e-24])
