"""What follows from scores, by hand and planted; and the file of an evaluation."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from tiny_lora import ARC, GPQA

from wdlib import WdlibError
from wdlib.lora import scores
from wdlib.lora.benchmarks import Protocol, option_orders
from wdlib.lora.scores import Evaluation, answers, correct, debiased, letters


def test_an_evaluation_comes_back_as_it_was_saved(tmp_path) -> None:
    rng = np.random.default_rng(0)
    gpqa, arc = rng.normal(size=(3, 4, 4)), rng.normal(size=(5, 1, 5))
    arc[2, 0, 4] = np.nan
    given = {GPQA: tiny.scores(gpqa, [0, 3, 1]), ARC: tiny.scores(arc, [0, 1, 2, 3, 4])}
    made = {"seconds": 1.5, "tasks": {GPQA: {"tokens": 7}}, "versions": {"torch": "2"}}
    protocol = Protocol((GPQA, ARC), {ARC: 5}, seed=3, dtype="bfloat16")
    path = tmp_path / "new" / "run.npz"
    scores.save(Evaluation(protocol, given, made), path)
    again = scores.load(path)
    assert again.protocol == protocol
    assert again.made == made
    assert again.scores.keys() == given.keys()
    for name, one in given.items():
        for part, value in vars(one).items():
            np.testing.assert_array_equal(getattr(again.scores[name], part), value)
            assert getattr(again.scores[name], part).dtype == value.dtype
    assert [file.name for file in path.parent.iterdir()] == ["run.npz"]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive"])
def test_what_is_no_evaluation_is_refused(content, tmp_path) -> None:
    path = tmp_path / "run.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        WdlibError, match=r"run.npz is not a stored evaluation \(.*\): evaluate again"
    ):
        scores.load(path)


def test_an_evaluation_of_an_unknown_protocol_names_its_file(tmp_path) -> None:
    path = tmp_path / "run.npz"
    given = Evaluation(Protocol((ARC,)), {ARC: tiny.scores(np.zeros((2, 1, 4)), [0, 1])}, {})
    scores.save(given, path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["about"] = np.array(str(arrays["about"]).replace("float32", "float8"))
    np.savez_compressed(path, **arrays)
    with pytest.raises(WdlibError, match=r"run.npz is not .* dtype 'float8' here.*evaluate again"):
        scores.load(path)


def test_accuracy_by_hand() -> None:
    nan = np.nan
    by_hand = np.array([[[-1, -2, -3]], [[-2, -2, nan]], [[-4, -5, -9]], [[-5, -4, -3]]])
    found = tiny.scores(by_hand, [0, 0, 0, 2], [[1, 2, 3], [1, 1, 0], [1, 5, 1], [9, 4, 2]])
    np.testing.assert_array_equal(answers(found)[:, 0], [0, 0, 0, 2])
    assert correct(found).mean() == 1
    np.testing.assert_array_equal(answers(found, normalised=True)[:, 0], [0, 0, 1, 0])
    assert correct(found, normalised=True).mean() == 0.5


@pytest.mark.parametrize("orders", [4, 8, 24])
def test_always_the_same_letter_is_chance_over_orders(orders) -> None:
    lazy = np.tile([0.0, -1.0, -2.0, -3.0], (50, orders, 1))
    found = tiny.scores(lazy, np.random.default_rng(0).integers(0, 4, 50))
    assert (correct(found).mean(axis=1) == 0.25).all()
    np.testing.assert_array_equal(letters(found), [[50, 0, 0, 0]] * orders)


def test_one_cycle_of_orders_stands_for_all_and_its_spread_covers_the_choice_of_it() -> None:
    rng = np.random.default_rng(3)
    cycle, every = [], []
    for _ in range(1000):  # other items each time, in an order of their own
        gold = rng.integers(0, 4, 60)
        worth = rng.normal(size=(60, 4)) + np.eye(4)[gold]
        shown = worth[:, option_orders(24)] + np.array([1.5, 0.0, 0.0, 1.0])
        cycle.append(correct(tiny.scores(shown[:, :4], gold)).mean(axis=1))
        every.append(correct(tiny.scores(shown, gold)).mean(axis=1))
    means, errors = [], []
    for shares in map(np.array, (cycle, every)):
        means.append(shares.mean())
        errors.append(np.mean(shares.var(axis=1, ddof=1) / 60))
        np.testing.assert_allclose(errors[-1], shares.mean(axis=1).var(), rtol=0.15)
    np.testing.assert_allclose(*means, atol=0.002)
    assert errors[0] > 1.03 * errors[1]


def test_debiasing_takes_a_planted_liking_for_letters_away() -> None:
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 4, 80)
    worth = rng.normal(size=(80, 4)) + 4 * np.eye(4)[gold]  # of each option
    shown = worth[:, option_orders(4)]
    clean, biased = (
        tiny.scores(shown, gold),
        tiny.scores(shown + np.array([9.0, 3.0, 0.0, -5.0]), gold),
    )
    assert correct(biased).mean() < 0.4
    found = debiased(biased)
    np.testing.assert_array_equal(correct(found), correct(clean))
    shifted = debiased(replace(clean, loglikelihood=clean.loglikelihood - 7))
    np.testing.assert_allclose(shifted.loglikelihood, found.loglikelihood, atol=1e-4)


def test_a_letter_is_worth_its_mean_over_orders() -> None:
    worth, liking = np.array([-3.0, -1.0, -2.0, -6.0]), np.array([2.0, 0.0, -1.0, 4.0])
    shown = worth[option_orders(4)][None]
    found = debiased(tiny.scores(shown + liking, [1]))
    np.testing.assert_allclose(found.loglikelihood, shown - worth.mean(), atol=1e-6)
