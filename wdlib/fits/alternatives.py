"""What else a set of distances may follow: alternatives to the power law, all on the same support.

Every family is renormalised on x >= xmin, and fitted there by maximum likelihood. With x = xmin e^w
the densities in x are, up to the factor that makes them integrate to one,

power_law              x^-alpha
truncated_power_law    x^-alpha e^(-rate x), alpha >= 0
lognormal              1/x e^(-(ln x - mu)^2 / (2 sigma^2))
stretched_exponential  x^(shape - 1) e^(-(x / scale)^shape), the Weibull law
gamma                  x^(shape - 1) e^(-rate x), shape >= 0 (above 0 where xmin = 0)
exponential            e^(-rate x)
normal                 e^(-(x - mu)^2 / (2 sigma^2))

Each likelihood is concave in the right parameters, so its maximum is unique and no search has to be
started more than once. It may lie in the limit of a family: lognormal, stretched_exponential and
truncated_power_law all contain the power law as a limit, normal the exponential.
`AlternativeFit.limit` then names the law that is reached. By the likelihood alone a power law can
thus never beat these three; the question is whether they beat it, and `compare` tests that.

`xmin` is a positive number, or 0 (all positive values, on the support (0, inf), for the families
that can be normalised there: not the two power laws), or None: the smallest positive value.

Sources: Clauset et al., arXiv 0706.1062, table 2.1, section 5; Vuong, Econometrica 57 (1989), 307.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import optimize, special

from wdlib import WdlibError
from wdlib.fits.estimators import MIN_DISTINCT
from wdlib.fits.resampling import checked_distances, table_distances, vector_draws

LIMITS = {
    "lognormal": "power_law",
    "stretched_exponential": "power_law",
    "truncated_power_law": "power_law",
    "normal": "exponential",
}
"""The law at the edge of each family that has one."""

CONTAINED = {("exponential", "stretched_exponential"), ("exponential", "gamma")}
"""Families (smaller, larger) of which the larger has the smaller in its inside."""


@dataclass(frozen=True)
class AlternativeFit:
    """One family fitted to the values of at least xmin.

    name: one of `ALTERNATIVES`. parameters: by the names in the head of this module; rate in 1 /
        unit of the data, scale and sigma and mu of `normal` in that unit, the rest without.
    limit: None, or the family that the fit runs into (see the head); `parameters` are then that
        family's, and so are likelihood, density and ccdf.
    loglikelihood: natural logarithm, of all n values. n: values of at least xmin. xmin: start of
        the support, 0 for (0, inf).
    """

    name: str
    parameters: Mapping[str, float]
    loglikelihood: float
    n: int
    xmin: float
    limit: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Likelihood ratio of two families on the same values.

    ratio: log-likelihood of the first minus that of the second. per_point: ratio / n, natural
        logarithm.
    p: two-sided probability of so large a ratio if both are equally far from the truth; if
        `nested`, of so large a one if the smaller family is the truth. For independent draws.
    statistic: ratio / (sd sqrt(n)), sd of the n differences: standard normal if both are equally
        far from the truth. If nested, 2 |ratio|. nested: whether one family contains the other.
    """

    ratio: float
    statistic: float
    p: float
    per_point: float
    nested: bool


@dataclass(frozen=True)
class VectorComparison:
    """The ratio of `compare`, with what resampled vectors say about it.

    per_point: of the data, natural logarithm. low, high: quantiles 0.025 and 0.975 of it over the
    resamples. positive, negative: share of resamples where the first, the second is the likelier;
    they sum to less than 1 where a family runs into its limit. replicates, seed: as given.
    """

    per_point: float
    low: float
    high: float
    positive: float
    negative: float
    replicates: int
    seed: int


def fit(x: np.ndarray, name: str, *, xmin: float | None = None) -> AlternativeFit:
    """Fit one family of `ALTERNATIVES` to the values of at least `xmin` by maximum likelihood.

    Arguments: x, one axis or more, non-negative, of any unit; xmin, in that unit: see the head of
    this module.
    Raises: WdlibError for an unknown name, for negative or non-finite values, for fewer than four
    distinct values of at least xmin, and for a power law with xmin = 0.
    Differs from `powerlaw` 2.0: on data that follow a power law that stops its search short of the
    limit, by several units of log-likelihood for the stretched exponential; and there its lognormal
    density comes from the ratio of two numbers near the smallest there are, so that it does not
    integrate to one, which can make a lognormal law seem likelier than the truth by as much.
    """
    if name not in ALTERNATIVES:
        raise WdlibError(f"no family {name!r}: there are {', '.join(ALTERNATIVES)}")
    tail, xmin = _tail(x, xmin)
    if xmin == 0 and name.endswith("power_law"):
        raise WdlibError(f"{name} cannot be normalised on (0, inf): give an xmin above 0, or None")
    found = _ESTIMATORS[name](tail, xmin)
    limit = LIMITS[name] if found is None else None
    parameters = found or _ESTIMATORS[LIMITS[name]](tail, xmin) or {}
    loglikelihood = float(_logpdf(limit or name, parameters, xmin, tail).sum())
    return AlternativeFit(name, parameters, loglikelihood, tail.size, xmin, limit)


def logpdf(fit: AlternativeFit, x: np.ndarray) -> np.ndarray:
    """Logarithm of the density of a fitted family, -inf below its xmin; in the shape of `x`."""
    return _on_support(fit, x, _logpdf, -np.inf)


def ccdf(fit: AlternativeFit, x: np.ndarray) -> np.ndarray:
    """P(X >= x) of a fitted family, 1 at its xmin and below; in the shape of `x`.

    To lie on the `estimators.ccdf` of all data it is to be multiplied by n / (number of data).
    """
    return np.exp(_on_support(fit, x, _logsf, 0.0))


def compare(x: np.ndarray, a: str, b: str, *, xmin: float | None = None) -> Comparison:
    """Which of two families is the likelier, and whether by more than chance (Vuong's test).

    If one family contains the other, the smaller is the null hypothesis, and 2 |ratio| is compared
    with chi-square of one degree of freedom; where the smaller lies on the edge of the larger, with
    the mixture of that and a point at zero, half and half (Self and Liang 1987). For the truncated
    power law that is only near: a true power law of alpha 1.5 gives p < 0.05 in 13 of 100 draws of
    400 values, one of alpha 2.5 in 7.

    Arguments: as `fit`.
    Raises: WdlibError as `fit` does.
    Source: Vuong 1989, equation 5.6 (no correction for the number of parameters).
    Differs from `powerlaw`: that takes families as nested by their names alone, and p for those
    from the whole chi-square.
    """
    tail, xmin = _tail(x, xmin)
    first, second = (fit(tail, name, xmin=xmin) for name in (a, b))
    difference = logpdf(first, tail) - logpdf(second, tail)
    ratio = float(difference.sum())
    spread = float(np.sqrt(tail.size) * difference.std())
    if abs(ratio) <= _SAME * tail.size:
        ratio = 0.0
    edge = LIMITS.get(a) == b or LIMITS.get(b) == a
    nested = edge or (a, b) in CONTAINED or (b, a) in CONTAINED
    if ratio == 0:
        statistic, p = 0.0, 1.0
    elif nested:
        statistic = 2 * abs(ratio)
        p = float(special.chdtrc(1, statistic)) / (2 if edge else 1)
    else:
        statistic = ratio / spread
        p = float(special.erfc(abs(statistic) / np.sqrt(2)))
    return Comparison(ratio, statistic, p, ratio / tail.size, nested)


def compare_vectors(
    table: np.ndarray,
    a: str,
    b: str,
    *,
    symmetric: bool = True,
    xmin: float | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> VectorComparison:
    """The likelihood ratio of two families as whole vectors are resampled.

    Arguments: table, symmetric: as `fits.vector_bootstrap`; the rest as `fit`. xmin is that
    of the data in every resample.
    Raises: WdlibError as `fit` does, also where a resample is left with too few values.
    """
    tail, xmin = _tail(table_distances(table, symmetric), xmin)
    rng = np.random.default_rng(seed)
    draws = vector_draws(table, symmetric=symmetric, replicates=replicates, rng=rng)
    per_point = np.array([compare(drawn, a, b, xmin=xmin).per_point for drawn in draws])
    low, high = (float(q) for q in np.quantile(per_point, (0.025, 0.975)))
    positive, negative = float((per_point > 0).mean()), float((per_point < 0).mean())
    found = compare(tail, a, b, xmin=xmin).per_point
    return VectorComparison(found, low, high, positive, negative, replicates, seed)


_Real = TypeVar("_Real", float, np.ndarray)

_SAME = 1e-10  # two log-densities of one law, reached by two ways, differ by less in the mean


def _tail(x: np.ndarray, xmin: float | None) -> tuple[np.ndarray, float]:
    x = checked_distances(x)
    positive = x[x > 0]
    if xmin is None:
        xmin = float(positive.min(initial=np.inf))
    tail = positive[positive >= xmin]
    distinct = np.unique(tail).size
    if distinct < MIN_DISTINCT:
        raise WdlibError(
            f"{distinct} distinct positive values of at least xmin = {xmin:g}: a fit needs "
            f"{MIN_DISTINCT}, so lower xmin or compare more vectors"
        )
    return tail, float(xmin)


def _on_support(
    fit: AlternativeFit, x: np.ndarray, function: Callable[..., np.ndarray], outside: float
) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    inside = (x >= fit.xmin) & (x > 0)
    values = np.full(x.shape, outside)
    values[inside] = function(fit.limit or fit.name, fit.parameters, fit.xmin, x[inside])
    return values


def _logpdf(name: str, parameters: Mapping, xmin: float, x: np.ndarray) -> np.ndarray:
    return _log_kernel(name, parameters, xmin, x) - _log_mass(name, parameters, xmin, xmin)


def _logsf(name: str, parameters: Mapping, xmin: float, x: np.ndarray) -> np.ndarray:
    mass = np.vectorize(lambda lower: _log_mass(name, parameters, xmin, lower), otypes=[float])
    return mass(x) - _log_mass(name, parameters, xmin, xmin)


def _log_kernel(name: str, parameters: Mapping, xmin: float, x: _Real) -> _Real:
    """Logarithm of the density up to a factor."""
    match name, dict(parameters):
        case "power_law", {"alpha": alpha}:
            return -alpha * np.log(x / xmin)
        case "exponential", {"rate": rate}:
            return -rate * (x - xmin)
        case "truncated_power_law", {"alpha": alpha, "rate": rate}:
            return -alpha * np.log(x / xmin) - rate * (x - xmin)
        case "gamma", {"shape": shape, "rate": rate}:
            return (shape - 1) * np.log(rate * x) - rate * (x - xmin)
        case "stretched_exponential", {"shape": shape, "scale": scale}:
            return (shape - 1) * np.log(x / scale) - _power_gap(x, xmin, shape, scale)
        case "lognormal", {"mu": mu, "sigma": sigma}:
            return -np.log(x) - ((np.log(x) - mu) / sigma) ** 2 / 2
        case "normal", {"mu": mu, "sigma": sigma}:
            return -(((x - mu) / sigma) ** 2) / 2
    raise ValueError(name)


def _log_mass(name: str, parameters: Mapping, xmin: float, lower: float) -> float:
    """Logarithm of the integral of `_log_kernel` from `lower` to infinity."""
    match name, dict(parameters):
        case "power_law", {"alpha": alpha}:
            return np.log(xmin / (alpha - 1)) - (alpha - 1) * np.log(lower / xmin)
        case "exponential", {"rate": rate}:
            return -np.log(rate) - rate * (lower - xmin)
        case "truncated_power_law", {"alpha": alpha, "rate": rate}:
            kernel = _log_kernel(name, parameters, xmin, lower)
            return kernel + np.log(lower) + _log_integral(1 - alpha, rate * lower)[0]
        case "gamma", {"shape": shape, "rate": rate}:
            if lower == 0:
                return special.gammaln(shape) - np.log(rate)
            kernel = _log_kernel(name, parameters, xmin, lower)
            return kernel + np.log(lower) + _log_integral(shape, rate * lower)[0]
        case "stretched_exponential", {"shape": shape, "scale": scale}:
            return np.log(scale / shape) - _power_gap(lower, xmin, shape, scale)
        case "lognormal", {"mu": mu, "sigma": sigma}:
            z = (np.log(lower) - mu) / sigma if lower > 0 else -np.inf
            return np.log(sigma * np.sqrt(2 * np.pi)) + special.log_ndtr(-z)
        case "normal", {"mu": mu, "sigma": sigma}:
            return np.log(sigma * np.sqrt(2 * np.pi)) + special.log_ndtr((mu - lower) / sigma)
    raise ValueError(name)


def _power_gap(x: _Real, xmin: float, shape: float, scale: float) -> _Real:
    """(x / scale)^shape - (xmin / scale)^shape, without cancellation."""
    with np.errstate(over="ignore"):  # so far out, the density is 0
        if xmin == 0:
            return (x / scale) ** shape
        return (xmin / scale) ** shape * np.expm1(shape * np.log(x / xmin))


def _log_integral(a: float, s: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Logarithm of the integral of e^(a w - s (e^w - 1)) over w >= 0, with mean and covariance.

    With t = s e^w it is the incomplete gamma function Gamma(a, s) e^s s^-a, for any real a, which
    scipy has for a > 0 alone and not where it underflows. The integrand has one peak and is smooth:
    between the points where it is e^-40 of the peak, Gauss-Legendre is exact to rounding.

    Returns: the logarithm; mean (2,) and covariance (2, 2) of w and s (e^w - 1) under it.
    """

    def exponent(w: _Real) -> _Real:
        return a * w - s * np.expm1(w)

    peak = np.log(a / s) if a > s else 0.0
    height = exponent(peak) - 40
    reach = 1.0
    while exponent(peak + reach) > height:
        reach *= 2
    upper = optimize.brentq(lambda w: exponent(w) - height, peak, peak + reach)
    lower = 0.0
    if exponent(0.0) < height:
        lower = optimize.brentq(lambda w: exponent(w) - height, 0.0, peak)
    w = lower + (upper - lower) * _NODES
    values = exponent(w)
    weights = _WEIGHTS * np.exp(values - values.max())
    total = weights.sum()
    moments = np.array([w, s * np.expm1(w)])
    mean = moments @ weights / total
    centred = moments - mean[:, None]
    covariance = (centred * weights) @ centred.T / total
    return float(values.max() + np.log(total * (upper - lower))), mean, covariance


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


_Parameters = dict[str, float]  # None in place of them stands for the limit of a family


def _fit_power_law(tail: np.ndarray, xmin: float) -> _Parameters:
    return {"alpha": float(1 + 1 / np.log(tail / xmin).mean())}


def _fit_exponential(tail: np.ndarray, xmin: float) -> _Parameters:
    return {"rate": float(1 / (tail - xmin).mean())}


def _fit_lognormal(tail: np.ndarray, xmin: float) -> _Parameters | None:
    if xmin == 0:
        logs = np.log(tail)
        return {"mu": float(logs.mean()), "sigma": float(logs.std())}
    found = _truncated_normal(np.log(tail / xmin))
    return found and {"mu": float(np.log(xmin) + found[0]), "sigma": found[1]}


def _fit_normal(tail: np.ndarray, xmin: float) -> _Parameters | None:
    unit = 2.0 ** np.floor(np.log2(tail.max()))  # no square over- or underflows
    found = _truncated_normal((tail - xmin) / unit)
    return found and {"mu": xmin + unit * found[0], "sigma": unit * found[1]}


def _truncated_normal(z: np.ndarray) -> tuple[float, float] | None:
    """mu and sigma of a normal law on z >= 0, None if the exponential law is likelier than any.

    mean(z^2) / mean(z)^2 of the law depends on t = mu / sigma alone and falls from 2 (exponential)
    to 1: the data's is met at one t.
    """
    mean = z.mean()
    target = (z**2).mean() / mean**2

    def excess(t: float) -> float:
        return (1 + t * _mean(t)) / _mean(t) ** 2 - target

    if excess(_FAR) <= 0:
        return None
    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
    t = optimize.brentq(excess, _FAR, upper, xtol=1e-12)
    sigma = mean / _mean(t)
    return float(t * sigma), float(sigma)


def _mean(t: float) -> float:
    """Mean of a normal law of mean t and variance 1 on z >= 0."""
    return t + np.sqrt(2 / np.pi) / special.erfcx(-t / np.sqrt(2))


_FAR = -100.0  # beyond, a truncated normal law is the exponential to 1e-4, and `_mean` loses digits


def _fit_stretched(tail: np.ndarray, xmin: float) -> _Parameters | None:
    """With the shape given, x^shape is exponential; the profile likelihood is concave in shape."""
    unit = xmin or np.exp(np.log(tail).mean())
    w = np.log(tail / unit)
    largest = w.max()

    def weights(shape: float) -> tuple[np.ndarray, np.ndarray]:
        grown = np.exp(shape * (w - largest))
        return grown, grown - (np.exp(-shape * largest) if xmin else 0)

    def score(shape: float) -> float:
        grown, gap = weights(shape)
        return 1 / shape + w.mean() - (w * grown).mean() / gap.mean()

    if xmin and (w**2).mean() >= 2 * w.mean() ** 2:
        return None
    lower = upper = 1 / largest if xmin else 1 / w.std()
    while score(upper) > 0:
        upper *= 2
    while score(lower) < 0:
        lower /= 2
    shape = optimize.brentq(score, lower, upper, xtol=1e-14)
    log_scale = largest + np.log(weights(shape)[1].mean()) / shape
    if log_scale < -600:
        return None
    if not (scale := float(unit * np.exp(log_scale))) > np.finfo(float).tiny:
        raise WdlibError(f"a scale of {unit:g} e^{log_scale:.0f}: give the data in a smaller unit")
    return {"shape": float(shape), "scale": scale}


def _fit_truncated(tail: np.ndarray, xmin: float) -> _Parameters | None:
    w = np.log(tail / xmin)
    growth = np.expm1(w).mean()
    alpha = 1 + 1 / w.mean()
    if alpha > 2 and growth >= 1 / (alpha - 2):
        return None
    a, s = _incomplete_gamma(w.mean(), growth)
    if a > 1:
        a, s = 1.0, 1 / growth
    return {"alpha": 1 - a, "rate": float(s / xmin)}


def _fit_gamma(tail: np.ndarray, xmin: float) -> _Parameters:
    if xmin == 0:
        mean = tail.mean()
        gap = np.log(mean) - np.log(tail).mean()
        shape = optimize.brentq(
            lambda k: np.log(k) - special.digamma(k) - gap, 0.4 / gap, 1.1 / gap, xtol=1e-14
        )
        return {"shape": float(shape), "rate": float(shape / mean)}
    w = np.log(tail / xmin)
    growth = np.expm1(w).mean()
    alpha = 1 + 1 / w.mean()
    if not (alpha > 2 and growth >= 1 / (alpha - 2)):
        a, s = _incomplete_gamma(w.mean(), growth)
        if a >= 0:
            return {"shape": a, "rate": float(s / xmin)}
    log_s = optimize.brentq(
        lambda u: _log_integral(0.0, np.exp(u))[1][1] / np.exp(u) - growth,
        -np.log(growth) - 40,
        -np.log(growth),
        xtol=1e-13,
    )
    return {"shape": 0.0, "rate": float(np.exp(log_s) / xmin)}


def _incomplete_gamma(mean_w: float, growth: float) -> tuple[float, float]:
    """a and s > 0 for which the means of w and e^w - 1 under `_log_integral` are those given.

    The log-likelihood a w - s (e^w - 1) - log integral is concave: Newton, halved where it does not
    climb; from the exponential law on, or, if few values are near the start, from the gamma law.
    """

    def climb(a: float, s: float) -> float:
        return a * mean_w - s * growth - _log_integral(a, s)[0]

    a, s = 1.0, 1 / growth
    variance = 2 * (np.log1p(growth) - mean_w)  # of w, if it is small
    if 0 < 2 * variance < mean_w**2:
        a, s = 1 / variance, 1 / variance / (1 + growth)
    here = climb(a, s)
    rounding = 1e-15 * (1 + a * mean_w)
    for _ in range(200):
        _, mean, covariance = _log_integral(a, s)
        slope = np.array([mean_w - mean[0], mean[1] - s * growth])  # in a and in ln s
        signs = np.array([[1, -1], [-1, 1]])
        step = np.linalg.solve(covariance * signs, slope)
        gain = float(step @ slope)
        if gain < rounding**1.5:
            break
        longest = min(1.0, 0.9 / max(-step[1], 1e-300))  # s stays positive
        for length in longest * 0.5 ** np.arange(40):
            tried = a + length * step[0], s * (1 + length * step[1])
            there = climb(*tried)
            if there >= here:
                break
        if there <= here + rounding:
            break
        (a, s), here = tried, there
    return float(a), float(s)


_ESTIMATORS = {
    "power_law": _fit_power_law,
    "lognormal": _fit_lognormal,
    "exponential": _fit_exponential,
    "stretched_exponential": _fit_stretched,
    "truncated_power_law": _fit_truncated,
    "gamma": _fit_gamma,
    "normal": _fit_normal,
}

ALTERNATIVES = tuple(_ESTIMATORS)
