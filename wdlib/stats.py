"""Intervals and tests for benchmark scores (docs/method.md, section 8).

Scores are compared on the same items, and, where there are several runs, on the same seeds. `level`
is always a confidence level: a test at `level` 0.95 errs in 5 % of the cases in which nothing
differs. All tests are two-sided. Differences are first minus second, and shares, not percent.

Beside them, whether models agree: `concordance` of rankings, `relabelled_correlations` of tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf, sqrt

import numpy as np
from scipy import optimize, stats

from wdlib import WdlibError

LEVEL = 0.95
"""Confidence of every interval and one minus the error of every test, unless told otherwise."""

POWER = 0.8
"""Chance at which a difference counts as detectable, unless told otherwise."""

REPLICATES = 10_000
"""Bootstrap replicates: p-values go down to 2e-4, and survive a correction for 100 comparisons."""


@dataclass(frozen=True)
class McNemar:
    """Items on which exactly one of two runs is right, and what the imbalance is worth.

    n01: items that only the second gets right. n10: items that only the first gets right.
    p: exact p-value of "either is as likely".
    """

    n01: int
    n10: int
    p: float


@dataclass(frozen=True)
class Difference:
    """A difference of mean scores, in the unit of the scores.

    estimate: first minus second. low, high: interval at `level`. p: of "no difference".
    detectable: the true difference that such a comparison finds with probability POWER, nearly (a
        quantile above 0 plus one for the power, as in a t test); a smaller one may well be there.
    seeds, items: what the means were taken over.
    """

    estimate: float
    low: float
    high: float
    p: float
    detectable: float
    seeds: int
    items: int
    level: float


@dataclass(frozen=True)
class Concordance:
    """Agreement of rankings: Kendall's W, 1 where all rank alike, about 0 where none does.

    p: of "each ranks at random". without: (m,), W with one ranking left out.
    """

    w: float
    p: float
    without: np.ndarray


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's exact test of two runs on the same items.

    Arguments: first, second (n,) bool, whether each item is answered rightly. Runs of several
    seeds are not to be laid end to end, since their items are the same: see `paired_bootstrap`.
    Raises: WdlibError for anything else.
    Source: docs/method.md, section 8.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape or not (first.dtype == second.dtype == bool):
        raise WdlibError(
            f"McNemar's test needs two bool arrays of one length, not {first.dtype} {first.shape} "
            f"and {second.dtype} {second.shape}: give one run's right answers on the same items"
        )
    n01, n10 = int((~first & second).sum()), int((first & ~second).sum())
    p = float(stats.binomtest(n01, n01 + n10).pvalue) if n01 + n10 else 1.0
    return McNemar(n01, n10, p)


def blocked_permutation_test(
    values: np.ndarray, *, replicates: int = REPLICATES, seed: int = 0
) -> float:
    """p-value of "all treatments are one", each of which was tried once in every block.

    Blocks differ as they like. Within a block the values are dealt to the treatments anew, and the
    variance of the treatments' means is compared with the real one; all deals are taken where they
    are fewer than the replicates.

    Arguments: values (treatments, blocks), such as the losses of some initialisations (rows) with
    some seeds (columns).
    Raises: WdlibError unless there are two treatments or more, and finite values.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or len(values) < 2 or not values.size or not np.isfinite(values).all():
        raise WdlibError(
            f"values of shape {values.shape} are no treatments in blocks: give finite ones, a row "
            "for each of two treatments or more and a column for each block"
        )

    def spread(*treatments: np.ndarray, axis: int) -> np.ndarray:
        return np.var([t.mean(axis=axis) for t in treatments], axis=0)

    found = stats.permutation_test(
        tuple(values),
        spread,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=replicates,
        rng=seed,
    )
    return float(found.pvalue)


def ratio_parts(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Scores of items whose mean score is a ratio, such as a loss per token: (..., items) float64.

    An item's score is its part of the linearised ratio, R + (sum - R size) / (mean size) with
    R = (sum of sums) / (sum of sizes): their mean is R, and they vary as R does with other items,
    whose sizes would have been others too.

    Arguments: sums (..., items); sizes, of the same shape or (items,), positive.
    Source: docs/method.md, section 8.
    """
    sums, sizes = np.asarray(sums, float), np.asarray(sizes, float)
    ratio = (sums.sum(-1) / sizes.sum(-1))[..., None]
    return ratio + (sums - ratio * sizes) / sizes.mean(-1, keepdims=True)


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    *,
    level: float = LEVEL,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Difference:
    """Difference of two mean scores whose seeds and items are both samples of many.

    Every replicate is the mean over items drawn with replacement, plus what other seeds could have
    added. Few seeds cannot be resampled: with three, the spread of a resampled mean is too small by
    sqrt(2/3) and its quantiles are those of a normal law. So the seeds' part is a normal draw with
    a variance from its generalised (fiducial) distribution given the mean squares of the two-way
    layout, MS_seed / U - MS_rest / V, not below zero, with U and V chi-square over their degrees of
    freedom. Without differences between items this is the t interval over seeds; with one seed it
    is the percentile bootstrap over items, and speaks for these runs only.

    Measured coverage of the 95 % interval with 3 and 5 seeds, 100 to 1172 items
    (data/results/interval_coverage.csv, made by workflow/scripts/intervals.py): 0.94 to 0.99,
    where resampling both levels gives 0.74 to 0.98. No interval from a few seeds knows what they do
    not show: where one run in five collapses, of the first only, it covers 0.54 to 0.90 (both
    levels resampled: 0.48 to 0.84). Look at every run.

    Arguments: first, second (seeds, items) scores: right or not, shares over option orders, losses.
    Row s of both is the same seed and column i the same item. An array with one row, or (items,),
    is one run compared with every run of the other, as the untrained model is.
    Raises: WdlibError for shapes that do not pair and for scores that are not finite.
    Source: docs/method.md, section 8.
    """
    check_shares(level=level)
    difference = _paired(first, second)
    seeds, items = difference.shape
    rng = np.random.default_rng(seed)
    estimate = float(difference.mean())
    shift = _resampled_means(difference.mean(0), replicates, rng) - estimate
    if seeds > 1:
        shift += rng.standard_normal(replicates) * np.sqrt(
            seed_variances(difference, replicates, rng)
        )
    return summary(estimate, shift, (seeds, items), level)


def summary(estimate: float, shift: np.ndarray, shape: tuple[int, int], level: float) -> Difference:
    """What bootstrap replicates say of a difference.

    Arguments: shift (replicates,), less the estimate; shape, (seeds, items).
    """
    low, high, strong = np.quantile(shift, [(1 - level) / 2, (1 + level) / 2, POWER])
    tail = min((shift <= -estimate).sum(), (shift >= -estimate).sum())
    return Difference(
        estimate=estimate,
        low=float(estimate + low),
        high=float(estimate + high),
        p=min(1.0, float(2 * (tail + 1) / (len(shift) + 1))),
        detectable=float(high + strong),
        seeds=shape[0],
        items=shape[1],
        level=level,
    )


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(seeds, items) float64, first minus second."""
    first, second = (np.atleast_2d(np.asarray(scores, float)) for scores in (first, second))
    seeds = {len(first), len(second)} - {1}
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or len(seeds) > 1:
        raise WdlibError(
            f"scores of shapes {first.shape} and {second.shape} do not pair: give (seeds, items) "
            "with the same seeds and items, or one run"
        )
    difference = first - second
    if difference.shape[1] < 2 or not np.isfinite(difference).all():
        raise WdlibError("scores must be finite and of two items at least: leave out the others")
    return difference


def _resampled_means(values: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Means of as many values drawn with replacement: equal values are drawn as one."""
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(len(values), counts / len(values), replicates) @ distinct / len(values)


def seed_variances(difference: np.ndarray, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of what the seeds add to the variance of a mean, (replicates,): see `paired_bootstrap`.

    Arguments: difference (seeds, items), of two seeds or more.
    """
    seeds, items = difference.shape
    by_seed = difference.mean(1, keepdims=True) - difference.mean()
    rest = difference - difference.mean(0) - by_seed
    freedom = seeds - 1, (seeds - 1) * (items - 1)
    squares = items * (by_seed**2).sum(), (rest**2).sum()
    draws = [s / rng.chisquare(f, replicates) for s, f in zip(squares, freedom, strict=True)]
    return np.maximum(draws[0] - draws[1], 0) / (seeds * items)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values: below 1 - level, that comparison stands within its family.

    Whatever the dependence, the chance that any true null hypothesis falls is at most 1 - level.

    Arguments: p_values (m,).
    Returns: (m,), in the same order.
    Raises: WdlibError for a p-value outside 0 to 1.
    Source: docs/method.md, section 8.
    """
    p = np.asarray(p_values, float)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise WdlibError(
            "p-values must be a list of numbers from 0 to 1: leave out what is missing"
        )
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)


def concordance(scores: np.ndarray, *, replicates: int = REPLICATES, seed: int = 0) -> Concordance:
    """Do judges rank the same things alike? Kendall's W, and a permutation test of it.

    W is 12 S / (m^2 (k^3 - k)), S the sum of squares of the k sums of ranks about their mean. For p
    each judge's ranks are dealt anew. Ties get mean ranks, and W is not corrected for them.

    Arguments: scores (m, k), a row for each judge (a model) and a column for each thing (a type).
    Raises: WdlibError for fewer than two of either, and for scores that are not finite.
    Source: Kendall and Babington Smith, Annals of Mathematical Statistics 10 (1939), 275.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or min(scores.shape) < 2 or not np.isfinite(scores).all():
        raise WdlibError(
            f"scores of shape {scores.shape} are no rankings: give finite ones, a row for each of "
            "two judges or more and a column for each of two things or more"
        )
    ranks = stats.rankdata(scores, axis=1)
    w = float(_kendall(ranks))
    dealt = np.tile(ranks, (replicates, 1, 1))
    dealt = _kendall(np.random.default_rng(seed).permuted(dealt, axis=-1))
    p = (1 + np.count_nonzero(dealt >= w - 1e-9)) / (1 + replicates)
    left = [_kendall(np.delete(ranks, judge, axis=0)) for judge in range(len(ranks))]
    return Concordance(w, p, np.array(left))


def _kendall(ranks: np.ndarray) -> np.ndarray:
    """W of (..., m, k) ranks."""
    m, k = ranks.shape[-2:]
    return 12 * np.square(ranks.sum(-2) - m * (k + 1) / 2).sum(-1) / (m**2 * (k**3 - k))


def relabelled(table: np.ndarray, places: Sequence[tuple[int, int]] | None = None) -> np.ndarray:
    """Entries of a table under every renaming of its rows and columns, both renamed alike.

    Arguments: table (k, k), k at most 8; places, (row, column) of n entries, those on and above the
    diagonal by default.
    Returns: (k!, n), of which the first row is without renaming.
    Raises: WdlibError for a table that is not square, or too large.
    """
    table = np.asarray(table)
    k = len(table)
    if table.shape != (k, k) or not 1 <= k <= 8:
        raise WdlibError(f"a table of shape {table.shape} cannot be renamed: give (k, k), k to 8")
    rows, columns = np.triu_indices(k) if places is None else np.transpose(places)
    orders = np.array(list(permutations(range(k))))
    return table[orders[:, rows], orders[:, columns]]


def relabelled_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlations of two symmetric tables, as they are and under every renaming of one.

    Entries of one row depend on each other, so a correlation over entries has no usual p-value. The
    share of all k! that are at least as large as the first is one.

    Arguments: a, b (k, k), of which the entries on and above the diagonal are compared.
    Returns: (k!,) Spearman's correlations, the first without renaming; NaN where a table is
    constant.
    Raises: WdlibError as `relabelled` does.
    """
    x = stats.rankdata(relabelled(a)[0])
    y = stats.rankdata(relabelled(b), axis=1)
    x, y = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(x) * np.linalg.norm(y, axis=1)
    return np.divide(y @ x, norm, out=np.full(len(y), np.nan), where=norm > 0)


def paired_power(n: int, difference: float, *, discordance: float, level: float = LEVEL) -> float:
    """Chance that McNemar's exact test finds a true difference of accuracies.

    Arguments: n items; difference of the two accuracies, at most `discordance` in size, which is
    the share of items that one of the two answers rightly and the other does not.
    Raises: WdlibError for shares outside these ranges.
    Source: docs/method.md, section 8.
    """
    check_shares(discordance=discordance, level=level)
    if abs(difference) > discordance:
        raise WdlibError(
            f"accuracies cannot differ by {difference} if {discordance} of the items tell the two "
            "apart: give a larger discordance"
        )
    m, weights = _binomial(n, discordance)
    half = (1 - level) / 2
    last = stats.binom.ppf(half, m, 0.5)
    last -= stats.binom.cdf(last, m, 0.5) > half
    share = (1 + difference / discordance) / 2
    rejected = stats.binom.cdf(last, m, share) + stats.binom.cdf(last, m, 1 - share)
    return float(weights @ rejected)


def unpaired_power(n: int, difference: float, *, accuracy: float, level: float = LEVEL) -> float:
    """Chance that the pooled z test of two shares finds a true difference, for large n.

    Arguments: n items for each of the two, drawn apart; the accuracies are `accuracy` and
    `accuracy + difference`.
    Raises: WdlibError for an accuracy outside 0 to 1.
    Source: docs/method.md, section 8.
    """
    accuracies = np.array([accuracy, accuracy + difference])
    check_shares(accuracy=accuracy, level=level)
    if not 0 <= accuracies[1] <= 1:
        raise WdlibError(f"accuracy cannot be {accuracies[1]}: give a smaller difference")
    mean = accuracies.mean()
    bound = stats.norm.isf((1 - level) / 2) * sqrt(2 * mean * (1 - mean) / n)
    found = stats.norm(difference, sqrt((accuracies * (1 - accuracies)).sum() / n))
    return float(found.sf(bound) + found.cdf(-bound))


def minimum_detectable_effect(
    n: int,
    *,
    accuracy: float | None = None,
    discordance: float | None = None,
    power: float = POWER,
    level: float = LEVEL,
) -> float:
    """The smallest gain in accuracy that a test on n items finds with probability `power`.

    Arguments: give `discordance` for two runs on the same items (`paired_power`), or `accuracy`,
    that of the worse, for two runs on n items each (`unpaired_power`).
    Returns: a difference of accuracies; inf where none is large enough.
    Raises: WdlibError unless exactly one of the two is given, within 0 to 1.
    Source: docs/method.md, section 8.
    """
    share, paired = _design(accuracy, discordance)
    check_shares(power=power, level=level)
    if power <= 1 - level:
        raise WdlibError(f"power {power} is met without any effect: give more than {1 - level:.3g}")

    def excess(difference: float) -> float:
        if paired:
            return paired_power(n, difference, discordance=share, level=level) - power
        return unpaired_power(n, difference, accuracy=share, level=level) - power

    most = share if paired else 1 - share
    return float(optimize.brentq(excess, 0, most)) if excess(most) >= 0 else inf


def chance_of_difference(
    n: int, items: int, *, accuracy: float | None = None, discordance: float | None = None
) -> float:
    """Chance that two runs of equal true accuracy differ by `items` right answers or more.

    Exact, and two-sided: half of it is the chance that a named one of them leads by so many.

    Arguments: n items; give `discordance` for two runs on the same items, the share on which
    exactly one is right, or `accuracy` for two runs on n items each.
    Raises: WdlibError unless exactly one of the two is given, within 0 to 1.
    Source: docs/method.md, section 8.
    """
    share, paired = _design(accuracy, discordance)
    if items <= 0:
        return 1.0
    m, weights = _binomial(n, share)
    if paired:
        ahead = stats.binom.sf(np.ceil((m + items) / 2) - 1, m, 0.5)
    else:
        ahead = stats.binom.sf(m + items - 1, n, share)
    return float(min(1.0, 2 * weights @ ahead))


def _binomial(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The counts out of n that can be met, and their probabilities."""
    counts = np.arange(n + 1)
    weights = stats.binom.pmf(counts, n, share)
    met = weights > 1e-16
    return counts[met], weights[met]


def _design(accuracy: float | None, discordance: float | None) -> tuple[float, bool]:
    """The one that is given, and whether it is the discordance of paired runs."""
    given = [share for share in (accuracy, discordance) if share is not None]
    if len(given) != 1:
        raise WdlibError("give `discordance` for paired runs or `accuracy` for unpaired ones")
    check_shares(share=given[0])
    return given[0], discordance is not None


def check_shares(**shares: float) -> None:
    """Raise WdlibError, naming the share, unless it is between 0 and 1."""
    for name, share in shares.items():
        if not 0 < share < 1:
            raise WdlibError(f"{name} {share} is not a share: give a number between 0 and 1")
