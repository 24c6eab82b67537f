"""What finished cells say: measures, and which runs pair."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from tiny_lora import ARC, GPQA, LITERAL

from wdlib import WdlibError, stats
from wdlib.lora.benchmarks import Protocol
from wdlib.lora.results import DRIFT, LOSS, MEASURES, CellResult, by_rate, measured, paired
from wdlib.lora.runs import Hyperparameters, Run
from wdlib.lora.scores import Evaluation


def stored(
    right,
    *,
    losses=(3.0, 5.0),
    tokens=(1, 3),
    dtype="bfloat16",
    device="cpu",
    untrained=None,
    **hashes,
):
    """A cell whose ARC answers are right where the list says so."""
    values = np.full((len(right), 1, 4), -2.0, np.float32)
    values[np.arange(len(right)), 0, np.where(right, 0, 3)] = -1.0
    arc = tiny.scores(values, [0] * len(right))
    after = {"sums": list(losses), "tokens": list(tokens)}
    report = {"held_out": {"after": after}, "hashes": {"data": "1", **hashes}, "dtype": "float32"}
    report["machine"] = {"device": device}
    report["step0"] = {"base_loss": untrained} if untrained else None
    made = {"tasks": {ARC: {}, GPQA: {}}}
    return CellResult(report, Evaluation(Protocol((ARC,), dtype=dtype), {ARC: arc}, made))


def test_a_measure_is_the_mean_of_its_items():
    found = {Run(): stored([True, False, True, True])}
    assert measured(found, "default", "ARC").tolist() == [[1, 0, 1, 1]]
    assert measured(found, "default", "HellaSwag") is None
    assert measured(found, "default", LOSS).mean() == pytest.approx(8 / 4)  # per token
    shown = np.zeros((3, 4, 4))
    shown[..., 0] = 1  # always "A"
    gpqa = tiny.scores(shown, [0, 0, 2])
    lazy = replace(
        found[Run()],
        evaluation=Evaluation(Protocol((GPQA,)), {GPQA: gpqa}, found[Run()].evaluation.made),
    )
    assert measured({Run(): lazy}, "default", "GPQA").tolist() == [[1, 1, 0]]
    assert measured({Run(): lazy}, "default", "GPQA, orders").tolist() == [[0.25] * 3]
    assert set(MEASURES) >= {"GPQA, debiased", "ARC, norm", "HellaSwag, norm"}


def test_runs_pair_by_seed_and_item():
    found = {
        Run(init="untrained"): stored([True] * 5),
        Run(seed=7): stored([False, True, True, True]),
        Run(seed=2): stored([True, True, False, True]),
        Run(**LITERAL, seed=2): stored([False] * 3),  # of fewer items
        Run(**LITERAL, seed=9): stored([True] * 4),
    }
    literal = Run(**LITERAL).variant
    assert measured(found, "default", "ARC").tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]
    assert measured(found, literal, "ARC").tolist() == [[0, 0, 0], [1, 1, 1]]
    first, second = paired(found, literal, "default", "ARC")
    assert (first.tolist(), second.tolist()) == ([[0, 0, 0]], [[1, 1, 0]])  # seed 2, three items
    first, second = paired(found, "default", "untrained", "ARC")
    assert first.tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]
    assert second.tolist() == [[1, 1, 1, 1]]
    assert paired(found, "default", "pissa", "ARC") is None
    assert measured(found, "default", "GPQA") is None
    del found[Run(seed=2)]
    assert paired(found, literal, "default", "ARC") is None  # no seed in common


def test_what_was_not_measured_alike_does_not_pair():
    def compare(measure=LOSS, **other):
        found = {Run(): stored([True] * 4), Run(**LITERAL): stored([True] * 4, **other)}
        return paired(found, "default", Run(**LITERAL).variant, measure)

    assert compare() is not None
    alike = "not measured on the same items in the same way"
    with pytest.raises(WdlibError, match=alike):
        compare(data="2")
    with pytest.raises(WdlibError, match=alike):
        compare(losses=(3.0, 5.0, 1.0), tokens=(1, 3, 1))
    with pytest.raises(WdlibError, match=alike):
        compare("ARC", dtype="float32")
    for measure in (LOSS, "ARC"):
        with pytest.raises(WdlibError, match=alike):
            compare(measure, device="cuda:0")
    found = {Run(): stored([True] * 4), Run(init="untrained"): stored([True] * 4)}
    arc = found[Run()].evaluation.scores[ARC]
    arc.items[2] = 77
    with pytest.raises(WdlibError, match=alike):
        paired(found, "default", "untrained", "ARC")


def test_runs_whose_tokens_differ_do_not_pair():
    """Lengths can be equal where the tokens are not; old runs do not know their tokens."""

    def compare(*known, measure=LOSS):
        hashes = [{"held-out tokens": tokens} if tokens else {} for tokens in known]
        found = {
            Run(): stored([True], **hashes[0]),
            Run(init="pissa"): stored([False], **hashes[1]),
        }
        return paired(found, "default", "pissa", measure)

    assert compare("a", "a") is not None
    assert compare("a", None) is not None
    for measure in (LOSS, "ARC"):
        with pytest.raises(WdlibError, match="in the same way .data, tokens"):
            compare("a", "b", measure=measure)


def test_an_evaluation_on_another_device_does_not_pair():
    found = {Run(): stored([True]), Run(init="pissa"): stored([False])}
    found[Run()].evaluation.made["tasks"][ARC]["device"] = "cuda"
    with pytest.raises(WdlibError, match="in the same way .data, tokens, device"):
        paired(found, "default", "pissa", "ARC")
    assert paired(found, "default", "pissa", LOSS) is not None


def test_runs_of_machines_that_compute_differently_do_not_pair():
    def compare(here, there):
        found = {
            Run(): stored([True], untrained=here),
            Run(init="pissa"): stored([False], untrained=there),
        }
        return paired(found, "default", "pissa", LOSS)

    assert compare(1.75, 1.75 + DRIFT / 2) is not None
    assert compare(1.75, None) is not None
    with pytest.raises(WdlibError, match="is 1.75000 on one and 1.75100 on another"):
        compare(1.75, 1.751)


def at_rate(rate, **settings):
    return Run(hyperparameters=Hyperparameters(learning_rate=rate), **settings)


def test_starts_that_were_run_at_several_rates_are_found():
    rates = (1e-4, 2e-4, 1e-3)
    found = {at_rate(r, seed=7): stored([], losses=(1e3 * r, 3.0)) for r in rates[::-1]}
    found |= {at_rate(2e-4, seed=3): stored([], losses=(5.0, 3.0))}
    found |= {at_rate(r, **LITERAL, seed=7): stored([], losses=(1.0, 1.0)) for r in rates}
    found |= {
        at_rate(r, init="pissa", seed=s): stored([]) for r, s in zip(rates, (1, 2, 3), strict=True)
    }
    found |= {at_rate(r, b_scale=0.1, seed=9, **LITERAL): stored([]) for r in rates}
    found |= {Run(init="untrained"): stored([])}
    sweeps = by_rate(found)
    assert list(sweeps) == ["default", Run(**LITERAL).variant]
    sweep = sweeps["default"]
    assert (sweep.rates, sweep.seeds, sweep.losses.shape) == (rates, (3, 7), (3, 2, 2))
    assert_allclose(sweep.losses[:, 1].mean(1), [3.1 / 4, 3.2 / 4, 4.0 / 4])
    assert_allclose(sweep.common, sweep.losses[:, 1])
    assert np.isnan(sweep.losses[[0, 2], 0]).all()
    assert_allclose(sweep.losses[1, 0].mean(), 8 / 4)
    assert by_rate(found, least=4) == {}


def test_runs_that_a_variant_does_not_tell_apart_are_refused():
    freer = Run(hyperparameters=Hyperparameters(weight_decay=0.0))
    with pytest.raises(WdlibError, match="two runs are 'default' with seed 3407"):
        measured({Run(): stored([True]), freer: stored([False])}, "default", "ARC")


def test_the_interval_of_a_loss_knows_that_lengths_differ():
    """A loss is a ratio of two sums; its interval must hold that of the population."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, 400, 20_000)
    sums = {"b": tokens * rng.gamma(4, 0.5, 20_000)}
    sums["a"] = sums["b"] + rng.normal(50, 10, 20_000)  # the same for a short example as for a long
    truth = (sums["a"].sum() - sums["b"].sum()) / tokens.sum()
    inside = 0
    for _ in range(200):
        drawn = rng.integers(0, 20_000, 100)
        first, second = (
            stored([True], losses=sums[name][drawn], tokens=tokens[drawn]) for name in "ab"
        )
        found = {Run(): first, Run(init="pissa"): second}
        pair = paired(found, "default", "pissa", LOSS)
        result = stats.paired_bootstrap(*pair, replicates=500)
        inside += result.low <= truth <= result.high
        assert_allclose(pair[0].mean(), sums["a"][drawn].sum() / tokens[drawn].sum())
    assert 0.9 < inside / 200 < 0.99
