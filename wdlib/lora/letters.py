"""What a benchmark of lettered options says of its letters: GPQA in several orders of the options.

A model that prefers a letter scores by where the right answers happen to stand. All functions take
finished runs, of which those count that answered GPQA; rows are dictionaries with the names of
columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wdlib import WdlibError
from wdlib.lora.benchmarks import TASKS, Protocol, option_orders
from wdlib.lora.results import CellResult
from wdlib.lora.runs import UNTRAINED, Run
from wdlib.lora.scores import Evaluation, Scores, correct, letters

GPQA = TASKS[0]
LETTERS = "ABCD"

Found = Mapping[Run, CellResult]
Row = dict[str, Any]


def answered(found: Found) -> dict[Run, Scores]:
    """The scores on GPQA of the runs that were asked it.

    Raises: WdlibError where two were not asked the same questions in the same orders.
    """
    every = {run: stored.evaluation.scores.get(GPQA) for run, stored in found.items()}
    scores = {run: asked for run, asked in every.items() if asked is not None}
    alike = {(tuple(s.items), s.orders.tobytes(), tuple(s.gold)) for s in scores.values()}
    if len(alike) > 1:
        raise WdlibError(
            "these runs were not asked the same questions in the same orders of the options: "
            "evaluate them again alike, or leave some out"
        )
    return scores


def right_letters(scores: Scores) -> np.ndarray:
    """Share of the questions whose right answer stands at each letter: (orders, letters)."""
    at = np.argmax(scores.orders == scores.gold[:, None, None], axis=2)  # (questions, orders)
    count = scores.orders.shape[1]
    return np.stack([np.bincount(column, minlength=count) for column in at.T]) / len(at)


def shares(found: Found, *, order: int = 0) -> list[Row]:
    """How often each letter is the answer in one order: a row for the truth and each variant.

    Columns: variant, which is "the right answers" in the first row, and A to D, means over seeds.
    """
    scores = answered(found)
    if not scores:
        return []
    rows = {"the right answers": right_letters(next(iter(scores.values())))[order]}
    for variant in dict.fromkeys(run.variant for run in scores):
        chosen = [letters(s)[order] for run, s in scores.items() if run.variant == variant]
        rows[variant] = np.mean(chosen, axis=0) / np.sum(chosen[0])
    return [{"variant": v, **dict(zip(LETTERS, row, strict=True))} for v, row in rows.items()]


def by_order(found: Found) -> list[Row]:
    """Accuracy of every run in every order of the options, beside what its letters give.

    Columns: variant, seed, order, expected (the accuracy if its letters fell on the questions at
    random), observed.
    """
    rows = []
    for run, scores in answered(found).items():
        expected = (letters(scores) / len(scores.gold) * right_letters(scores)).sum(1)
        for order, right in enumerate(correct(scores).mean(0)):
            named = {"variant": run.variant, "seed": run.seed, "order": order}
            rows.append(named | {"expected": float(expected[order]), "observed": float(right)})
    return rows


def explained(rows: Sequence[Row]) -> tuple[float, float]:
    """Share of the variance of accuracies that the letters explain, of rows of `by_order`.

    Returns: over orders and runs, and between runs in the same order: squared correlations.
    """
    both = np.array([(row["expected"], row["observed"]) for row in rows])
    order = np.array([row["order"] for row in rows])
    within = both - np.array([both[order == o].mean(0) for o in order])
    every, same = (float(np.corrcoef(*values.T)[0, 1] ** 2) for values in (both, within))
    return every, same


def gaps(rows: Sequence[Row], questions: int) -> dict[str, np.ndarray]:
    """By how many right answers results are apart, of rows of `by_order`; every pair once.

    Returns: "one model in two orders", and "two trained models in one order".
    """
    right = {(r["variant"], r["seed"], r["order"]): r["observed"] * questions for r in rows}
    runs = list(dict.fromkeys((variant, seed) for variant, seed, _ in right))
    orders = sorted({order for *_, order in right})
    table = np.array([[right[(*run, order)] for order in orders] for run in runs]).round()
    trained = table[[variant != UNTRAINED for variant, _ in runs]]
    return {
        "one model in two orders": _apart(table),
        "two trained models in one order": _apart(trained.T),
    }


def _apart(table: np.ndarray) -> np.ndarray:
    """Differences between all pairs of columns, of all rows."""
    one, other = np.triu_indices(table.shape[1], 1)
    return np.abs(table[:, one] - table[:, other]).ravel()


def made_up(runs: Sequence[Run], *, questions: int, orders: int = 4, seed: int = 0) -> Found:
    """Answers of models that know nothing and prefer letters, for want of others.

    Each run has a preference of its own for each letter, and for each option of a question one that
    has nothing to do with its being right, the same in all orders.

    Arguments: runs, for which answers are made up; orders, of the options, as `Protocol` has them.
    """
    rng = np.random.default_rng(seed)
    shown = option_orders(orders)
    gold = rng.integers(0, 4, questions).astype(np.int8)
    items = np.arange(questions, dtype=np.uint32)
    characters = np.ones((questions, 4), np.int32)
    common = rng.standard_normal((questions, 4))
    found = {}
    for run in runs:
        liked = common + 0.5 * rng.standard_normal((questions, 4))
        options = liked[:, shown]  # (questions, orders, positions)
        values = (options + 2 * rng.standard_normal(4)).astype(np.float32) - 10
        scores = Scores(values, shown, gold, characters, items)
        made: dict[str, Any] = {"tasks": {GPQA: {}}, "adapter": None}
        report = {"hashes": {"adapter": None}, "machine": {"device": "cpu"}, "step0": None}
        evaluation = Evaluation(Protocol((GPQA,), orders=orders), {GPQA: scores}, made)
        found[run] = CellResult(report, evaluation)
    return found
