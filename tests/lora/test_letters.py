"""The letters of a benchmark: counted by hand, and planted preferences."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from tiny_lora import GPQA, LITERAL

from wdlib import WdlibError
from wdlib.lora import letters
from wdlib.lora.benchmarks import option_orders
from wdlib.lora.runs import Run

RUNS = [Run(init="untrained"), *(Run(seed=s) for s in (1, 2)), Run(**LITERAL, seed=1)]


@pytest.fixture(scope="module")
def found():
    return letters.made_up(RUNS, questions=200)


def lazy(found, letter):
    """Runs that answer every question with one letter."""
    answered = {}
    for run, stored in found.items():
        values = np.full_like(stored.evaluation.scores[GPQA].loglikelihood, -2)
        values[..., letter] = -1
        scores = replace(stored.evaluation.scores[GPQA], loglikelihood=values)
        evaluation = replace(stored.evaluation, scores={GPQA: scores})
        answered[run] = replace(stored, evaluation=evaluation)
    return answered


def test_who_always_says_a_is_right_where_a_is(found):
    runs = lazy(found, 0)
    truth = letters.right_letters(letters.answered(found)[RUNS[0]])
    assert_allclose(truth.sum(1), 1)
    assert_allclose(truth.mean(0), 0.25)  # over whole cycles of orders
    rows = letters.by_order(runs)
    assert len(rows) == len(RUNS) * 4
    for row in rows:
        assert_allclose([row["observed"], row["expected"]], truth[row["order"], 0])
    assert letters.shares(runs)[1] == {"variant": "untrained", "A": 1, "B": 0, "C": 0, "D": 0}
    first = letters.shares(runs)[0]
    assert_allclose([first[letter] for letter in "ABCD"], truth[0])
    assert letters.gaps(rows, 200)["two trained models in one order"].tolist() == [0] * 12


def test_right_answers_are_counted_where_they_stand():
    gold = [0, 0, 3]
    shown = np.zeros((3, 4, 4))
    scores = replace(tiny.scores(shown, gold), orders=option_orders(4))
    assert option_orders(4)[1].tolist() == [1, 2, 3, 0]
    assert_allclose(letters.right_letters(scores)[:2] * 3, [[2, 0, 0, 1], [0, 0, 1, 2]])


def test_models_that_know_nothing_stand_at_chance_and_move_with_the_order(found):
    rows = letters.by_order(found)
    assert_allclose(np.mean([row["observed"] for row in rows]), 0.25, atol=0.03)
    every, same = letters.explained(rows)
    assert every > 0.2
    assert 0 <= same <= 1
    gaps = letters.gaps(rows, 200)
    assert len(gaps["one model in two orders"]) == len(RUNS) * 6
    assert len(gaps["two trained models in one order"]) == 3 * 4
    assert [row["variant"] for row in letters.shares(found)] == [
        "the right answers", "untrained", "default", Run(**LITERAL).variant
    ]  # fmt: skip


def test_the_same_seed_makes_up_the_same_answers():
    first, again, other = (
        letters.by_order(letters.made_up(RUNS, questions=50, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_letters_that_decide_explain_all():
    rows = [
        {"order": o, "expected": 0.2 + 0.1 * o + 0.01 * r, "observed": 0.3 + 0.2 * o + 0.02 * r}
        for o in range(4)
        for r in range(3)
    ]
    assert_allclose(letters.explained(rows), 1)
    for row in rows:  # within an order, all is the same but for the other sign
        row["observed"] = (
            0.3 + 0.2 * row["order"] - 2 * (row["expected"] - 0.2 - 0.1 * row["order"])
        )
    assert letters.explained(rows)[0] < 1
    assert_allclose(letters.explained(rows)[1], 1)


def test_runs_that_were_asked_differently_are_refused(found):
    other = letters.made_up([Run(seed=9)], questions=200, seed=1)
    with pytest.raises(WdlibError, match="not asked the same questions"):
        letters.answered({**found, **other})
    assert letters.shares({}) == []
