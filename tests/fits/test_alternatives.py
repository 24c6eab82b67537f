"""The other families: planted truth, quadrature, closed forms, scipy and powerlaw."""

import time
import warnings
from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.integrate import quad
from scipy.special import gammaincc, gammaln

from wdlib import WdlibError
from wdlib.fits import alternatives
from wdlib.fits.alternatives import (
    ALTERNATIVES,
    AlternativeFit,
    ccdf,
    compare,
    compare_vectors,
    logpdf,
)

N = 4000


def truncated(law, rng: np.random.Generator, xmin: float, n: int = N) -> np.ndarray:
    """Draws of a scipy law, given that they are at least xmin."""
    return law.isf(rng.random(n) * law.sf(xmin))


def cut_off(rng: np.random.Generator, alpha: float, rate: float, xmin: float, n: int) -> np.ndarray:
    """A power law with an exponential cut-off, by rejection."""
    x = xmin * (1 + rng.pareto(alpha - 1, 40 * n))
    return x[rng.random(x.size) < np.exp(-rate * (x - xmin))][:n]


PLANTED = {
    "power_law": ({"alpha": 2.5}, lambda rng, n: 0.02 * (1 + rng.pareto(1.5, n)), 0.02),
    "lognormal": (
        {"mu": -2.0, "sigma": 0.7},
        lambda rng, n: truncated(stats.lognorm(0.7, scale=np.exp(-2)), rng, 0.1, n),
        0.1,
    ),
    "exponential": ({"rate": 20.0}, lambda rng, n: 0.1 + rng.exponential(0.05, n), 0.1),
    "stretched_exponential": (
        {"shape": 0.6, "scale": 0.05},
        lambda rng, n: truncated(stats.weibull_min(0.6, scale=0.05), rng, 0.02, n),
        0.02,
    ),
    "truncated_power_law": (
        {"alpha": 1.6, "rate": 5.0},
        lambda rng, n: cut_off(rng, 1.6, 5.0, 0.02, n),
        0.02,
    ),
    "gamma": (
        {"shape": 3.0, "rate": 30.0},
        lambda rng, n: truncated(stats.gamma(3, scale=1 / 30), rng, 0.04, n),
        0.04,
    ),
    "normal": (
        {"mu": 0.3, "sigma": 0.1},
        lambda rng, n: truncated(stats.norm(0.3, 0.1), rng, 0.25, n),
        0.25,
    ),
}


def planted(name: str, seed: int, n: int = N) -> np.ndarray:
    return PLANTED[name][1](np.random.default_rng([seed, ALTERNATIVES.index(name)]), n)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_planted_parameters_come_back(name):
    truth, _, xmin = PLANTED[name]
    fitted = [alternatives.fit(planted(name, seed), name, xmin=xmin) for seed in range(40)]
    assert all(fit.limit is None and fit.n == N for fit in fitted)
    for parameter, value in truth.items():
        estimates = np.array([fit.parameters[parameter] for fit in fitted])
        spread = estimates.std(ddof=1) / np.sqrt(len(fitted))
        assert abs(estimates.mean() - value) < 3.5 * spread
        assert spread < 0.1 * abs(value)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_no_other_family_beats_the_truth(name):
    xmin = PLANTED[name][2]
    for other in ALTERNATIVES:
        if other == name:
            continue
        results = [compare(planted(name, s), name, other, xmin=xmin) for s in range(5)]
        for result in results:
            assert_allclose(result.per_point, result.ratio / N)
        # a larger family is the likelier, but not by more than chance
        if all(result.nested for result in results) and results[0].ratio <= 0:
            assert np.median([result.p for result in results]) > 0.1
        else:
            assert sum(result.ratio for result in results) >= -5


@pytest.mark.parametrize(
    ("truth", "other"),
    [
        ("power_law", "exponential"),
        ("power_law", "normal"),
        ("lognormal", "power_law"),
        ("exponential", "power_law"),
        ("stretched_exponential", "power_law"),
        ("truncated_power_law", "power_law"),
        ("truncated_power_law", "lognormal"),
        ("gamma", "lognormal"),
        ("gamma", "power_law"),
        ("normal", "lognormal"),
        ("normal", "power_law"),
    ],
)
def test_the_ratio_prefers_the_truth(truth, other):
    result = compare(planted(truth, 1), truth, other, xmin=PLANTED[truth][2])
    assert result.ratio > 0
    assert result.p < 0.05
    back = compare(planted(truth, 1), other, truth, xmin=PLANTED[truth][2])
    assert_allclose([back.ratio, back.p], [-result.ratio, result.p], rtol=1e-9)


FITS = [
    AlternativeFit("power_law", {"alpha": 1.05}, 0, 4, 0.3),
    AlternativeFit("power_law", {"alpha": 6.0}, 0, 4, 0.3),
    AlternativeFit("lognormal", {"mu": -1.0, "sigma": 2.0}, 0, 4, 0.3),
    AlternativeFit("lognormal", {"mu": -60.0, "sigma": 6.0}, 0, 4, 0.3),
    AlternativeFit("lognormal", {"mu": 2.0, "sigma": 0.1}, 0, 4, 0.3),
    AlternativeFit("lognormal", {"mu": -1.0, "sigma": 2.0}, 0, 4, 0.0),
    AlternativeFit("exponential", {"rate": 40.0}, 0, 4, 0.3),
    AlternativeFit("exponential", {"rate": 40.0}, 0, 4, 0.0),
    AlternativeFit("stretched_exponential", {"shape": 0.1, "scale": 1e-9}, 0, 4, 0.3),
    AlternativeFit("stretched_exponential", {"shape": 5.0, "scale": 0.5}, 0, 4, 0.3),
    AlternativeFit("stretched_exponential", {"shape": 0.7, "scale": 0.5}, 0, 4, 0.0),
    AlternativeFit("truncated_power_law", {"alpha": 0.0, "rate": 3.0}, 0, 4, 0.3),
    AlternativeFit("truncated_power_law", {"alpha": 1.0, "rate": 1e-6}, 0, 4, 0.3),
    AlternativeFit("truncated_power_law", {"alpha": 2.5, "rate": 1e-9}, 0, 4, 0.3),
    AlternativeFit("truncated_power_law", {"alpha": 2.5, "rate": 400.0}, 0, 4, 0.3),
    AlternativeFit("gamma", {"shape": 0.0, "rate": 3.0}, 0, 4, 0.3),
    AlternativeFit("gamma", {"shape": 0.4, "rate": 1e-3}, 0, 4, 0.3),
    AlternativeFit("gamma", {"shape": 300.0, "rate": 200.0}, 0, 4, 0.3),
    AlternativeFit("gamma", {"shape": 0.4, "rate": 3.0}, 0, 4, 0.0),
    AlternativeFit("normal", {"mu": -40.0, "sigma": 2.0}, 0, 4, 0.3),
    AlternativeFit("normal", {"mu": 0.9, "sigma": 0.1}, 0, 4, 0.3),
    AlternativeFit("normal", {"mu": 0.1, "sigma": 0.1}, 0, 4, 0.0),
]


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.name} {dict(fit.parameters)}")
def test_densities_integrate_to_one(fit):
    start = np.log(fit.xmin) if fit.xmin else -80.0
    far = start
    while ccdf(fit, np.exp(far)) > 1e-13 and far < 650:
        far += 0.1

    def integral(lower: float, upper: float) -> float:
        edges = np.linspace(lower, upper, 41)
        return sum(
            quad(lambda w: np.exp(w + logpdf(fit, np.exp(w))), *p)[0] for p in pairwise(edges)
        )

    assert_allclose(integral(start, far) + ccdf(fit, np.exp(far)), 1, atol=1e-9)
    middle = start + 0.4 * (far - start)
    assert_allclose(integral(middle, far) + ccdf(fit, np.exp(far)), ccdf(fit, np.exp(middle)))
    assert_array_equal(logpdf(fit, fit.xmin * np.array([0.0, 0.5])), -np.inf)
    assert_array_equal(ccdf(fit, np.array([0.0, fit.xmin])), 1)


@pytest.mark.parametrize("a", [0.3, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("s", [1e-6, 0.1, 1.0, 30.0])
def test_incomplete_gamma_equals_scipy_where_scipy_can(a, s):
    logarithm, _, _ = alternatives._log_integral(a, s)
    assert_allclose(logarithm, np.log(gammaincc(a, s)) + gammaln(a) + s - a * np.log(s), atol=1e-11)


@pytest.mark.parametrize(("a", "s"), [(-1.5, 1e-5), (-0.2, 3.0), (2.0, 0.01), (50.0, 30.0)])
def test_moments_of_the_incomplete_gamma_are_its_derivatives(a, s):
    _, mean, covariance = alternatives._log_integral(a, s)
    h = 1e-5
    by_a = (alternatives._log_integral(a + h, s)[0] - alternatives._log_integral(a - h, s)[0]) / (
        2 * h
    )
    by_s = (
        alternatives._log_integral(a, s * (1 + h))[0]
        - alternatives._log_integral(a, s * (1 - h))[0]
    )
    assert_allclose([by_a, -by_s / (2 * h)], mean, rtol=1e-6)
    steps = alternatives._log_integral(a + h, s)[1] - alternatives._log_integral(a - h, s)[1]
    assert_allclose(steps / (2 * h), covariance[0], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_closed_forms(seed):
    x = np.random.default_rng(seed).gamma(2.0, 0.1, 500)
    xmin = float(np.median(x))
    tail = x[x >= xmin]
    assert_allclose(
        alternatives.fit(x, "exponential", xmin=xmin).parameters["rate"], 1 / (tail - xmin).mean()
    )
    assert_allclose(
        alternatives.fit(x, "power_law", xmin=xmin).parameters["alpha"],
        1 + 1 / np.log(tail / xmin).mean(),
    )
    for name, law in {
        "exponential": stats.expon,
        "lognormal": stats.lognorm,
        "gamma": stats.gamma,
        "stretched_exponential": stats.weibull_min,
    }.items():
        ours = alternatives.fit(x, name, xmin=0)
        theirs = law.logpdf(x, *law.fit(x, floc=0)).sum()
        assert_allclose(ours.loglikelihood, theirs, rtol=1e-6)
        assert ours.loglikelihood > theirs - 1e-7


def test_truncated_normal_equals_scipy():
    x = planted("normal", 3)
    fit = alternatives.fit(x, "normal", xmin=0.25)
    mu, sigma = fit.parameters["mu"], fit.parameters["sigma"]
    law = stats.truncnorm((0.25 - mu) / sigma, np.inf, mu, sigma)
    assert_allclose(logpdf(fit, x), law.logpdf(x), rtol=1e-9, atol=1e-9)
    assert_allclose(fit.loglikelihood, law.logpdf(x).sum())
    assert_allclose(law.mean(), x.mean())  # the likelihood equations of an exponential family
    assert_allclose(law.var() + law.mean() ** 2, (x**2).mean())


THEIRS = {
    "lognormal": lambda law: {"mu": law.mu, "sigma": law.sigma},
    "exponential": lambda law: {"rate": law.Lambda},
    "stretched_exponential": lambda law: {"shape": law.beta, "scale": 1 / law.Lambda},
    "truncated_power_law": lambda law: {"alpha": law.alpha, "rate": law.Lambda},
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("family", ALTERNATIVES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_worse_than_powerlaw(name, family, share):
    x = planted(family, 5, 600)
    xmin = float(np.quantile(x, share, method="lower"))
    ours = alternatives.fit(x, name, xmin=xmin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import powerlaw

        reference = getattr(powerlaw.Fit(x, xmin=xmin, verbose=0), name)
        likelihood = float(np.sum(reference.loglikelihoods(x[x >= xmin])))
    found = {key: float(value) for key, value in THEIRS[name](reference).items()}
    theirs = AlternativeFit(name, found, likelihood, ours.n, xmin)
    # their parameters in our density, because theirs need not integrate to one
    at_theirs = float(logpdf(theirs, x[x >= xmin]).sum())
    if ours.limit != name and not (name == "truncated_power_law" and found["alpha"] < 0):
        assert ours.loglikelihood > at_theirs - 2e-3
    if ours.limit is None and at_theirs > ours.loglikelihood - 1e-4:
        assert_allclose(likelihood, ours.loglikelihood, atol=1e-3)
        fitted = [ours.parameters[key] for key in found]
        assert_allclose(fitted, list(found.values()), rtol=0.02, atol=2e-3)


def test_powerlaw_makes_a_lognormal_of_a_power_law():
    x = 1 + np.random.default_rng(0).pareto(3, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import powerlaw

        law = powerlaw.Fit(x, xmin=x.min(), verbose=0).lognormal
        claimed = float(np.sum(law.loglikelihoods(x)))
    parameters = {"mu": float(law.mu), "sigma": float(law.sigma)}
    true = logpdf(AlternativeFit("lognormal", parameters, claimed, x.size, x.min()), x).sum()
    ours = alternatives.fit(x, "lognormal")
    assert ours.loglikelihood >= true - 1e-6
    assert abs(claimed - true) < 1e-3 or claimed > true


@pytest.mark.parametrize("name", alternatives.LIMITS)
def test_a_family_runs_into_its_limit(name):
    limit = alternatives.LIMITS[name]
    w = np.random.default_rng(3).weibull(0.7, 500)  # a heavier tail than the exponential
    x = np.exp(w / 5) if limit == "power_law" else 1 + w
    fit, edge = alternatives.fit(x, name, xmin=1.0), alternatives.fit(x, limit, xmin=1.0)
    assert fit.limit == limit
    assert (fit.name, fit.loglikelihood, fit.parameters) == (
        name,
        edge.loglikelihood,
        edge.parameters,
    )
    assert_array_equal(logpdf(fit, x), logpdf(edge, x))
    result = compare(x, limit, name, xmin=1.0)
    assert (result.ratio, result.p, result.nested) == (0, 1, True)
    # just inside of the limit the family is less likely
    near = {
        "lognormal": {"mu": -20.0 * edge.parameters.get("alpha", 0), "sigma": 20.0**0.5},
        "stretched_exponential": {"shape": 0.05, "scale": 1e-30},
        "truncated_power_law": {"alpha": edge.parameters.get("alpha", 0), "rate": 1e-3},
        "normal": {"mu": -100 * edge.parameters.get("rate", 0), "sigma": 10.0},
    }[name]
    assert logpdf(AlternativeFit(name, near, 0, 500, 1.0), x).sum() < fit.loglikelihood


@pytest.mark.parametrize("name", ["lognormal", "stretched_exponential", "truncated_power_law"])
def test_half_of_all_power_laws_are_likeliest_as_power_laws(name):
    draws = (1 + np.random.default_rng([4, s]).pareto(4, 400) for s in range(300))
    results = [compare(x, "power_law", name, xmin=1.0) for x in draws]
    assert max(result.ratio for result in results) <= 1e-6
    # chi-square of one degree of freedom and zero, half and half: p < 0.05 in 5 % of the draws
    assert abs(np.mean([result.p < 0.05 for result in results]) - 0.05) < 0.04
    assert 0.3 < np.mean([result.ratio == 0 for result in results]) < 0.7


@pytest.mark.parametrize("name", ["gamma", "stretched_exponential"])
def test_size_where_the_smaller_family_is_inside(name):
    draws = (np.random.default_rng([5, s]).exponential(size=400) for s in range(300))
    results = [compare(x, "exponential", name, xmin=0) for x in draws]
    assert abs(np.mean([result.p < 0.05 for result in results]) - 0.05) < 0.04


def test_parameters_stay_in_their_range_and_at_its_edge_are_the_best():
    light, heavy = planted("gamma", 4), planted("power_law", 4)
    fit = alternatives.fit(light, "truncated_power_law", xmin=0.04)
    assert fit.parameters["alpha"] == 0
    exponential = alternatives.fit(light, "exponential", xmin=0.04)
    assert_allclose(fit.loglikelihood, exponential.loglikelihood)
    fit = alternatives.fit(heavy, "gamma", xmin=0.02)
    assert fit.parameters["shape"] == 0
    for factor in (0.99, 1.01):
        other = {"shape": 0.0, "rate": factor * fit.parameters["rate"]}
        moved = AlternativeFit("gamma", other, 0, N, 0.02)
        assert logpdf(moved, heavy).sum() < fit.loglikelihood


def test_p_of_nested_families_by_hand():
    x = planted("stretched_exponential", 2, 60)
    result = compare(x, "power_law", "stretched_exponential", xmin=0.02)
    assert_allclose(result.statistic, -2 * result.ratio)
    assert_allclose(result.p, stats.chi2.sf(-2 * result.ratio, 1) / 2)
    result = compare(x, "exponential", "gamma", xmin=0.02)
    assert_allclose(result.p, stats.chi2.sf(-2 * result.ratio, 1))


def test_vuong_by_hand_and_by_powerlaw():
    x = planted("lognormal", 2)
    a, b = (alternatives.fit(x, name, xmin=0.1) for name in ("lognormal", "gamma"))
    difference = logpdf(a, x) - logpdf(b, x)
    statistic = difference.sum() / (difference.std() * np.sqrt(N))
    result = compare(x, "lognormal", "gamma", xmin=0.1)
    assert not result.nested
    assert_allclose(result.statistic, statistic)
    assert_allclose(result.p, 2 * stats.norm.sf(abs(statistic)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import powerlaw

        fit = powerlaw.Fit(x, xmin=0.1, verbose=0)
        ratio, p = fit.distribution_compare("lognormal", "exponential")
    result = compare(x, "lognormal", "exponential", xmin=0.1)
    assert_allclose([result.ratio, result.p], [ratio, p], rtol=5e-3)


def test_vectors_agree_on_a_clear_case_and_keep_the_pairs():
    rng = np.random.default_rng(6)
    u, v = 1.5 * rng.normal(size=30), 1.5 * rng.normal(size=20)
    table = np.exp(u[:, None] + v)
    options = {"symmetric": False, "replicates": 50, "seed": 1}
    result = compare_vectors(table, "lognormal", "normal", **options)
    assert result == compare_vectors(table, "lognormal", "normal", **options)
    assert result.positive > 0.9
    assert_allclose(result.positive + result.negative, 1)
    assert 0 < result.low < result.per_point < result.high
    assert_allclose(result.per_point, compare(table, "lognormal", "normal").per_point)
    square = np.exp(u[:, None] + u)
    np.fill_diagonal(square, 0)
    within = compare_vectors(square, "lognormal", "normal", replicates=50)
    distances = square[np.triu_indices(30, 1)]
    assert_allclose(within.per_point, compare(distances, "lognormal", "normal").per_point)
    # what the vectors share widens the interval beyond that of independent draws
    independent = compare(distances, "lognormal", "normal")
    error = abs(independent.per_point / independent.statistic)
    assert within.high - within.low > 1.2 * 2 * 1.96 * error


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_the_unit_of_the_data_changes_nothing(name):
    x = planted("gamma", 7, 500)
    before, after = alternatives.fit(x, name), alternatives.fit(1e6 * x, name)
    assert_allclose(after.loglikelihood, before.loglikelihood - 500 * np.log(1e6), rtol=1e-9)
    assert before.xmin == x.min()


def test_all_families_are_fast():
    x = planted("lognormal", 8)
    alternatives.fit(x, "gamma")
    start = time.process_time()
    for name in ALTERNATIVES:
        alternatives.fit(x, name, xmin=0.1)
    assert time.process_time() - start < 0.3


def test_zeros_and_values_below_are_left_out(capfd):
    x = np.array([0.0, 0.1, 1.0, 2.0, 4.0, 5.0])
    fit = alternatives.fit(x, "exponential", xmin=1.0)
    assert fit.n == 4
    assert_allclose(fit.parameters["rate"], 0.5)
    assert alternatives.fit(x, "exponential", xmin=0).n == 5
    assert alternatives.fit(x, "exponential").xmin == 0.1
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_fitted_is_named():
    x = np.arange(1.0, 9)
    with pytest.raises(WdlibError, match="no family 'pareto': there are power_law"):
        alternatives.fit(x, "pareto")
    with pytest.raises(WdlibError, match="power_law cannot be normalised on"):
        alternatives.fit(x, "truncated_power_law", xmin=0)
    with pytest.raises(WdlibError, match="3 distinct positive values of at least xmin = 6"):
        compare(x, "gamma", "normal", xmin=6)
    with pytest.raises(WdlibError, match="value 1 of 2 is -1.0"):
        alternatives.fit(np.array([1.0, -1.0]), "gamma")
