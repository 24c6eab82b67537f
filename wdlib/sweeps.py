"""Treatments that were tried at several settings: where each does best, and how they differ there.

A treatment is such as a start of LoRA, its settings are such as learning rates. Losses are per
seed and item, as in `stats`, and less is better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wdlib import WdlibError, stats
from wdlib.stats import Difference


@dataclass(frozen=True)
class AtBest:
    """A difference of two treatments, each in that of its settings at which it does best.

    difference: of the losses there. first, second: shares of the choices that fell on each setting,
    (settings,); where several have one, the data do not say which is best.
    """

    difference: Difference
    first: tuple[float, ...]
    second: tuple[float, ...]


@dataclass(frozen=True)
class Optimum:
    """Where a loss over the settings of a treatment is lowest.

    setting, loss: of the fitted curve; nan where the lowest setting is the first or the last, so
    that nothing bounds the optimum. low, high: interval of the setting at `level`; 0 and inf where
    resamples put it beyond the settings that were tried.
    """

    setting: float
    loss: float
    low: float
    high: float
    level: float


def difference_at_best(
    first: np.ndarray,
    second: np.ndarray,
    *,
    level: float = stats.LEVEL,
    replicates: int = stats.REPLICATES,
    seed: int = 0,
) -> AtBest:
    """Difference of two treatments' losses, each at its best setting, such as a learning rate.

    A setting that is chosen by a loss looks better by it than it is, the more so the more settings
    there are. So the items are dealt to two halves, the even and the odd: each half chooses for the
    other, which judges, and the estimate is the mean over both. Every replicate draws the items of
    both halves anew, chooses anew, and adds what other seeds could have added at the chosen
    settings, as `stats.paired_bootstrap` does. A choice reads the seeds with which all settings of
    its treatment were tried, and the verdict those with which both chosen ones were: where these
    are the same few seeds, their luck is in both.

    Arguments: first, second (settings, seeds, items) losses, of which less is better; row s of both
    is the same seed, and nan stands for a setting that was not tried with it. The settings of the
    two need not be alike.
    Raises: WdlibError for shapes that do not pair, scores that are infinite or nan in part, and
    where no seed has what a choice or a verdict reads.
    Source: docs/method.md, section 8.
    """
    stats.check_shares(level=level)
    both = _checked_settings(first), _checked_settings(second)
    if both[0].shape[1:] != both[1].shape[1:]:
        raise WdlibError(
            f"losses of shapes {both[0].shape} and {both[1].shape} do not pair: give (settings, "
            "seeds, items) with the same seeds and items"
        )
    items, rng = both[0].shape[2], np.random.default_rng(seed)
    halves = np.arange(0, items, 2), np.arange(1, items, 2)
    weights = [_with_observed(len(half), replicates, rng) for half in halves]
    draws = np.concatenate([[0], rng.standard_normal(replicates)])
    total, chosen = np.zeros(replicates + 1), []
    for judge, chooser in ((0, 1), (1, 0)):
        by_chooser = (_chosen(s[..., halves[chooser]], weights[chooser]) for s in both)
        picks = np.stack([*by_chooser], axis=1)
        means = _judged(both, picks, halves[judge], weights[judge])
        total += (means + draws * _seed_deviations(both, picks, seed)) * len(halves[judge]) / items
        chosen.append(picks)
    every = np.concatenate(chosen)
    counts = [np.bincount(every[:, k], minlength=len(both[k])) / len(every) for k in (0, 1)]
    seeds = min(len(_paired(both, *picks[0])) for picks in chosen)
    found = stats.summary(float(total[0]), total[1:] - total[0], (seeds, items), level)
    return AtBest(found, *(tuple(share.tolist()) for share in counts))


def _checked_settings(scores: np.ndarray) -> np.ndarray:
    """(settings, seeds, items) float64: each row is whole, or nan as a whole."""
    scores = np.asarray(scores, float)
    if scores.ndim != 3 or scores.shape[2] < 4:
        raise WdlibError(
            f"scores of shape {scores.shape} are none of settings: give (settings, seeds, items) "
            "with four items or more"
        )
    missing = np.isnan(scores)
    if (missing.any(2) != missing.all(2)).any() or np.isinf(scores).any():
        raise WdlibError("scores must be finite: leave out the items or seeds that are not")
    return scores


def _with_observed(items: int, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Weights of items, (1 + replicates, items): as they are, then drawn with replacement."""
    drawn = rng.multinomial(items, np.full(items, 1 / items), replicates)
    return np.concatenate([np.ones((1, items)), drawn]) / items


def _chosen(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The setting of the lowest mean for each row of weights."""
    complete = ~np.isnan(scores).any((0, 2))
    if not complete.any():
        raise WdlibError("no seed was tried with all settings: leave out a setting, or a treatment")
    return (weights @ scores[:, complete].mean(1).T).argmin(1)


def _paired(both: tuple[np.ndarray, np.ndarray], one: int, other: int) -> np.ndarray:
    """Differences of two settings, (seeds, items), of the seeds that both were tried with."""
    difference = both[0][one] - both[1][other]
    kept = difference[~np.isnan(difference).any(1)]
    if not len(kept):
        raise WdlibError("two settings that are chosen have no seed in common: leave one out")
    return kept


def _judged(
    both: tuple[np.ndarray, np.ndarray], picks: np.ndarray, half: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Mean differences over the judging items, of the settings that each row of picks chose."""
    means = np.empty(len(picks))
    for pair in np.unique(picks, axis=0):
        rows = (picks == pair).all(1)
        means[rows] = weights[rows] @ _paired(both, *pair)[:, half].mean(0)
    return means


def _seed_deviations(
    both: tuple[np.ndarray, np.ndarray], picks: np.ndarray, seed: int
) -> np.ndarray:
    """What other seeds could have added, as a standard deviation, for each row of picks.

    The draws come from one stream, so that both halves of a replicate have the same luck of seeds.
    """
    found = np.zeros(len(picks))
    for pair in np.unique(picks, axis=0):
        difference, rows = _paired(both, *pair), (picks == pair).all(1)
        if len(difference) > 1:
            stream = np.random.default_rng([seed, 1])
            found[rows] = np.sqrt(stats.seed_variances(difference, len(picks), stream))[rows]
    return found


def optimum(
    settings: Sequence[float] | np.ndarray,
    losses: np.ndarray,
    *,
    level: float = stats.LEVEL,
    replicates: int = stats.REPLICATES,
    seed: int = 0,
) -> Optimum:
    """The setting of the lowest loss, by a parabola in its logarithm.

    The parabola goes through the lowest mean and its two neighbours: over orders of magnitude a
    loss is no parabola. The interval is of resampled items and speaks for these seeds alone.

    Arguments: settings (settings,), positive and rising; losses (settings, items).
    Raises: WdlibError for others, and for fewer than three settings.
    Source: docs/method.md, section 8.
    """
    stats.check_shares(level=level)
    settings, losses = np.asarray(settings, float), np.asarray(losses, float)
    rising = settings.ndim == 1 and settings.min() > 0 and (np.diff(settings) > 0).all()
    if not rising or len(settings) < 3 or losses.ndim != 2 or len(losses) != len(settings):
        raise WdlibError(
            f"losses of shape {losses.shape} are none of the settings {settings.tolist()}: give "
            "three settings or more, positive and rising, and a row of losses for each"
        )
    weights = _with_observed(losses.shape[1], replicates, np.random.default_rng(seed))
    found, lowest = _vertices(np.log(settings), weights @ losses.T)
    low, high = np.quantile(found[1:], [(1 - level) / 2, (1 + level) / 2], method="nearest")
    inside = np.isfinite(found[0])
    return Optimum(
        setting=float(np.exp(found[0])) if inside else float("nan"),
        loss=float(lowest[0]) if inside else float("nan"),
        low=float(np.exp(low)),
        high=float(np.exp(high)),
        level=level,
    )


def _vertices(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of parabolas through the lowest of each row of y and its neighbours.

    Arguments: x (n,), y (rows, n). Returns: x and y of each vertex; x is -inf or inf, and y nan,
    where the lowest is at an edge.
    """
    at, last = y.argmin(1), len(x) - 1
    middle, rows = np.clip(at, 1, last - 1), np.arange(len(y))
    left, right = x[middle] - x[middle - 1], x[middle + 1] - x[middle]
    falls, rises = (y[rows, middle] - y[rows, middle + k] for k in (-1, 1))
    # Of the parabola about its middle point: y = middle + slope t + bend t^2.
    bend = -(falls / left + rises / right) / (left + right)
    slope = (falls / left * right - rises / right * left) / (left + right)
    inside = (at > 0) & (at < last)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = np.where(bend > 0, -slope / (2 * bend), 0.0)
    vertex = np.where(inside, x[middle] + step, np.where(at == 0, -np.inf, np.inf))
    return vertex, np.where(inside, y[rows, middle] + slope * step + bend * step**2, np.nan)
