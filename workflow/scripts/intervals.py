"""How often the 95 % intervals of `wdlib.stats.paired_bootstrap` hold the true difference.

`python workflow/scripts/intervals.py`, about nine minutes on one core, writes
data/results/interval_coverage.csv. Finished cells are kept, so an interrupted run goes on where it
stopped.

Two initialisations of equal quality are compared over seeds and items, in five ways:

answers   right where a latent normal variable is above a threshold: the item's difficulty, common
          to both, plus the run's luck, plus the item's liking for the initialisation, plus the rest
collapse  the same, but the luck is all or nothing: one run in five loses 0.8 of the latent unit
losses    difference = run's luck (normal) + item's part (exponential) + the rest (normal)
ratios    losses per token of items with unlike numbers of tokens (lognormal, as those of the
          held-out examples are), and a difference that grows with the number
one-sided collapse of the first only, and its mean taken off: few seeds may not meet it at all

`luck` is the standard deviation of a run's luck, in latent units or that of the loss;
`seed_deviation` what it makes of a run's expected score, as a standard deviation of the difference
between two runs. For comparison: the percentile bootstrap that resamples seeds and items alike.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import sqrt

import numpy as np
from scipy import stats

from wdlib import paths, provenance
from wdlib.stats import paired_bootstrap, ratio_parts

DRAWS = 1000
REPLICATES = 1000
SEEDS = (1, 3, 5)
LUCK = {
    "answers": (0.0, 0.05, 0.15, 0.5),
    "collapse": (0.32,),
    "losses": (0.05,),
    "one-sided": (0.32,),
    "ratios": (0.05,),
}
ITEMS = dict.fromkeys(LUCK, (198, 1172))
ITEMS |= {"losses": (198,), "ratios": (100,)}  # the slowest: every value is another
ACCURACY = 0.25
DIFFICULTY, LIKING, REST = 1.0, 0.3, 0.3  # standard deviations of the latent parts
WITHOUT_LUCK = sqrt(DIFFICULTY**2 + LIKING**2 + REST**2)
COLLAPSE = 0.2
LOSS_LIKING, LOSS_REST = 0.2, 0.1
TOKENS = 0.64  # standard deviation of the logarithm


def lucks(scores: str, luck: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A run's luck, of standard deviation `luck` and mean 0."""
    if scores not in ("collapse", "one-sided"):
        return luck * rng.standard_normal(shape)
    fallen = rng.random(shape) < COLLAPSE
    return luck * (COLLAPSE - fallen) / np.sqrt(COLLAPSE * (1 - COLLAPSE))


def differences(
    scores: str, luck: float, seeds: int, items: int, rng: np.random.Generator
) -> np.ndarray:
    """(seeds, items) differences whose true mean is 0."""
    if scores == "losses":
        liking = LOSS_LIKING * (rng.exponential(size=(1, items)) - 1)
        rest = LOSS_REST * rng.standard_normal((seeds, items))
        return lucks(scores, luck, (seeds, 1), rng) + liking + rest
    if scores == "ratios":
        logarithm = TOKENS * rng.standard_normal(items)
        loss = 1.5 + LOSS_LIKING * rng.standard_normal(items)
        # The mean of the logarithms by tokens is TOKENS^2, so 0 is what the tokens lose in all.
        liking = LOSS_LIKING * (logarithm - TOKENS**2)
        rest = LOSS_REST * rng.standard_normal((seeds, items))
        tokens = np.exp(logarithm)
        first = loss + lucks(scores, luck, (seeds, 1), rng) + liking + rest
        return ratio_parts(first * tokens, tokens) - ratio_parts(loss * tokens, tokens)
    difficulty = DIFFICULTY * rng.standard_normal(items)
    luck_of_both = lucks(scores, luck, (2, seeds, 1), rng)
    if scores == "one-sided":
        luck_of_both[1] = 0
    latent = (
        threshold(luck)
        + difficulty
        + luck_of_both
        + LIKING * rng.standard_normal((2, 1, items))
        + REST * rng.standard_normal((2, seeds, items))
    )
    first, second = (latent > 0).astype(float)
    return first - second - truth(scores, luck)


def threshold(luck: float) -> float:
    return float(np.hypot(WITHOUT_LUCK, luck) * stats.norm.ppf(ACCURACY))


def expected(scores: str, luck: float) -> np.ndarray:
    """Expected accuracies of many runs."""
    draws = lucks(scores, luck, (200_000,), np.random.default_rng(0))
    return stats.norm.cdf((threshold(luck) + draws) / WITHOUT_LUCK)


@cache
def truth(scores: str, luck: float) -> float:
    """The true mean difference, which only a luck of the first alone makes other than 0."""
    if scores != "one-sided":
        return 0.0
    return float(expected(scores, luck).mean() - stats.norm.cdf(threshold(luck) / WITHOUT_LUCK))


def seed_deviation(scores: str, luck: float) -> float:
    """Standard deviation of the difference of two runs' expected scores."""
    if scores in ("losses", "ratios"):
        return luck
    return float(sqrt(1 if scores == "one-sided" else 2) * expected(scores, luck).std())


def two_level_percentile(difference: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The bootstrap that draws seeds and items with replacement and takes percentiles."""
    columns, counts = np.unique(difference, axis=1, return_counts=True)
    seeds, items = difference.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), REPLICATES) / seeds
    by_item = rng.multinomial(items, counts / items, REPLICATES) / items
    low, high = np.quantile(((by_seed @ columns) * by_item).sum(1), (0.025, 0.975))
    return low, high


def rows(scores: str, luck: float, seeds: int, items: int) -> Iterator[dict[str, str]]:
    """A row for each interval: how often 0 lay inside, and how wide the interval was."""
    intervals = {"two-level percentile": [], "paired_bootstrap": []}
    for draw in range(DRAWS):
        rng = np.random.default_rng([draw, seeds, items])
        table = differences(scores, luck, seeds, items, rng)
        ours = paired_bootstrap(table, np.zeros((1, items)), replicates=REPLICATES, seed=draw)
        intervals["paired_bootstrap"].append((ours.low, ours.high))
        intervals["two-level percentile"].append(two_level_percentile(table, rng))
    for name, pairs in intervals.items():
        low, high = np.array(pairs).T
        covered = int(((low <= 0) & (high >= 0)).sum())
        share = stats.binomtest(covered, DRAWS).proportion_ci(0.95, method="wilson")
        yield {
            "scores": scores,
            "seeds": str(seeds),
            "items": str(items),
            "luck": str(luck),
            "seed_deviation": f"{seed_deviation(scores, luck):.4f}",
            "interval": name,
            "covered": str(covered),
            "draws": str(DRAWS),
            "coverage": f"{covered / DRAWS:.3f}",
            "low": f"{share.low:.3f}",
            "high": f"{share.high:.3f}",
            "half_width": f"{(high - low).mean() / 2:.4f}",
        }


def main() -> None:
    """Write the table."""
    parameters = {"draws": DRAWS, "replicates": REPLICATES, "luck": LUCK, "items": ITEMS}
    cells = [
        (scores, luck, seeds, items)
        for scores in LUCK
        for luck, seeds, items in product(LUCK[scores], SEEDS, ITEMS[scores])
    ]
    made = provenance.of(__file__, parameters | {"seeds": SEEDS})
    provenance.write_by_cell(cells, rows, paths.RESULTS / "interval_coverage.csv", made)


if __name__ == "__main__":
    main()
