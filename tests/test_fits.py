"""wdlib.fits: the reference library, planted truth, closed forms. And wdlib.paper: well-formed."""

import importlib
import time
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.integrate import quad

from wdlib import TYPES, WdlibError, paper, paths
from wdlib.fits import estimators, goodness
from wdlib.fits.estimators import (
    alpha_by_xmin,
    ccdf,
    power_law,
    power_law_ccdf,
    power_law_full,
    power_law_loglog,
)
from wdlib.fits.goodness import goodness_of_fit, goodness_of_fit_vectors
from wdlib.fits.resampling import vector_bootstrap


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


def product(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distances between n vectors that are exactly Pareto, ln d_kl = u_k + u_l."""
    u = rng.gamma(0.5, 1 / 1.5, n)
    return np.exp(u[:, None] + u)


def test_vector_bootstrap_draws_whole_vectors():
    table = 10.0 * np.arange(5)[:, None] + np.arange(5)
    table = np.minimum(table, table.T)  # the entry names its pair: 10 * smaller + larger
    rng = np.random.default_rng(0)
    draws = []
    vector_bootstrap(table, lambda d: draws.append(d) or 0.0, replicates=200, rng=rng)
    for drawn in draws:
        first, second = np.divmod(drawn, 10)
        assert (first != second).all()
        present = np.unique([first, second])
        pairs, counts = np.unique(drawn, return_counts=True)
        assert pairs.size == present.size * (present.size - 1) // 2
        # how often each vector was drawn explains how often each pair occurs
        if pairs.size == 1:
            assert counts[0] in (4, 6)
    # as in notebook 03: the statistic, the count and the generator decide alone
    results = [
        vector_bootstrap(table, np.mean, replicates=9, rng=np.random.default_rng(3))
        for _ in range(2)
    ]
    assert_array_equal(*results)


def test_vector_bootstrap_between_two_sets_draws_rows_and_columns_apart():
    table = 10.0 * np.arange(4)[:, None] + np.arange(7)
    draws = []
    vector_bootstrap(
        table,
        lambda d: draws.append(d) or 0.0,
        replicates=100,
        rng=np.random.default_rng(0),
        symmetric=False,
    )
    for drawn in draws:
        rows, columns = np.divmod(drawn.reshape(4, 7), 10)
        assert (rows == rows[:, :1]).all()
        assert (columns == columns[:1]).all()
    rows, columns = np.divmod(np.concatenate(draws), 10)
    assert set(rows) == set(range(4))
    assert set(columns) == set(range(7))
    assert any((np.unique(d // 10).size, np.unique(d % 10).size) == (2, 5) for d in draws)


def test_vector_bootstrap_spread_is_that_of_the_mean():
    rng = np.random.default_rng(2)
    u = rng.normal(size=200)
    table = u[:, None] + u
    results = vector_bootstrap(table, np.mean, replicates=400, rng=rng)
    assert_allclose(results.std(), 2 * u.std() / np.sqrt(200), rtol=0.15)


@pytest.mark.parametrize("function", [vector_bootstrap, goodness_of_fit_vectors])
def test_a_table_must_have_its_shape(function):
    options = {"replicates": 2}
    if function is vector_bootstrap:
        options |= {"statistic": np.mean, "rng": np.random.default_rng(0)}
    with pytest.raises(WdlibError, match=r"shape \(3, 4\): expected all distances within"):
        function(np.ones((3, 4)), **options)
    with pytest.raises(WdlibError, match=r"shape \(4,\)"):
        function(np.ones(4), symmetric=False, **options)


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
    fit, fit_once = power_law(x), estimators.power_law
    draws = []
    monkeypatch.setattr(estimators, "power_law", lambda d: draws.append(d) or fit_once(d))
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
    fit = power_law(x)
    one = alpha_by_xmin(x, [0.999999 * fit.xmin])  # moved up to the next value
    assert_allclose([one.xmin[0], one.alpha[0], one.ks[0]], [fit.xmin, fit.alpha, fit.ks])
    with pytest.raises(WdlibError, match="fewer than three distinct values: the largest"):
        alpha_by_xmin(x, [1.0, 2 * x.max()])


@pytest.fixture
def size_experiment(monkeypatch):
    """docs/experiments/goodness_of_fit_size.py as a module."""
    monkeypatch.syspath_prepend(paths.ROOT / "docs" / "experiments")
    return importlib.import_module("goodness_of_fit_size")


@pytest.mark.parametrize("held_out", [False, True])
def test_the_measurement_of_sizes_runs_and_goes_on(
    size_experiment, tmp_path, monkeypatch, held_out
):
    module = size_experiment
    monkeypatch.setattr(module, "SIZES", ((10, None), (8, 9)))
    monkeypatch.setattr(module, "HELD_OUT_SIZES", ((9, None),))
    out = tmp_path / "results" / "sizes.csv"
    options = ["--repetitions", "2", "--replicates", "19", "--out", str(out)]
    options += ["--held-out"] * held_out
    module.main(options)
    rows = module.read(out)
    truths, sizes = module.TRUTHS, {"45", "72"}
    if held_out:
        truths, sizes = module.HELD_OUT, {"36"}
    assert len(rows) == len(sizes) * sum(len(dependences) for dependences in truths.values())
    assert {row["distances"] for row in rows} == sizes
    module.write(rows[:-1], out)
    monkeypatch.setattr(module, "measure", lambda *case, **_: rows[-1] | {"tail_share": "again"})
    module.main(options)
    assert module.read(out) == [*rows[:-1], rows[-1] | {"tail_share": "again"}]


def test_held_out_tables_are_others(size_experiment):
    case = "power law", "product", (10, None), 5, 19
    old, new = (size_experiment.measure(*case, held_out=held_out) for held_out in (False, True))
    assert old["tail_share"] != new["tail_share"]


def test_the_method_states_the_held_out_sizes(size_experiment):
    rows = size_experiment.read(paths.RESULTS / "goodness_of_fit_size_held_out.csv")
    rates = {name: [] for name in ("designed", "cauchy", "walk")}
    for row in rows:
        family = row["dependence"] if row["dependence"] in rates else "designed"
        rates[family].append(100 * float(row["rejected_vectors"]))
    text = (paths.ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for family, sentence in (("designed", "rejects"), ("cauchy", "should:"), ("walk", "law,")):
        low, high = (f"{value:.0f}" for value in (min(rates[family]), max(rates[family])))
        assert f"{sentence} {low} to {high} %" in text


def test_the_planted_tables_are_what_they_are_said_to_be(size_experiment):
    module = size_experiment
    laws = {
        "power law": stats.pareto(module.SHAPE),
        "lognormal": stats.lognorm(1),
        "exponential": stats.expon(),
    }
    rng = np.random.default_rng(1)
    for truth, law in laws.items():
        for dependence in ("ultrametric", "product"):
            for m in (None, 2):
                # one distance of each table, so that the draws are independent
                x = [module.table(truth, dependence, 2, m, rng)[0, 1] for _ in range(2000)]
                assert stats.kstest(x, law.cdf).pvalue > 1e-3
    for dependence in ("cauchy", "walk"):
        x = []
        for _ in range(2000):  # one distance of each table
            i, j = rng.choice(6, 2, replace=False)
            x.append(module.table("power law", dependence, 6, None, rng)[i, j])
        assert stats.kstest(x, laws["power law"].cdf).pvalue > 1e-3
    mixed = module.table("power law, body", "product", 400, None, rng)
    tail = mixed[mixed > 1]
    assert_allclose(tail.size / mixed.size, 0.4, atol=0.1)
    assert stats.kstest(rng.choice(tail, 300), stats.pareto(module.SHAPE).cdf).pvalue > 1e-3


def test_claims_of_the_papers_are_well_formed():
    assert all(key == claim.id for key, claim in paper.CLAIMS.items())
    assert len(paper.CLAIMS) == len(paper._CLAIMS)
    assert {claim.paper for claim in paper.CLAIMS.values()} == {paper.RESHAPING, paper.CLUSTERING}
    for claim in paper.CLAIMS.values():
        if isinstance(claim.value, tuple):
            assert all(p in TYPES and q in TYPES for p, q in claim.value)
    for id, right in (("gpqa-pretrained", 44), ("gpqa-reshaped", 57)):
        assert round(right / paper.GPQA_ITEMS, 4) == paper.CLAIMS[id].value
