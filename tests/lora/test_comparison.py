"""The rows of comparisons: planted curves, losses and rates."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny_lora import LITERAL

from wdlib.lora import comparison
from wdlib.lora.benchmarks import Protocol
from wdlib.lora.results import LOSS, CellResult
from wdlib.lora.runs import Hyperparameters, Run
from wdlib.lora.scores import Evaluation

ITEMS = 40
RATES = (6e-5, 2e-4, 6e-4, 2e-3)


def cell(after, *, before=2.0, curve=()):
    """A finished run with held-out losses (items,) per token, ten tokens each."""
    tokens = [10] * ITEMS
    sums = [(np.zeros(ITEMS) + loss) * 10 for loss in (before, after)]
    parts = [{"loss": float(np.mean(s)) / 10, "sums": s.tolist(), "tokens": tokens} for s in sums]
    report = {
        "held_out": dict(zip(("before", "after"), parts, strict=True)),
        "curve": [{"step": i, "loss": loss} for i, loss in enumerate(curve, start=1)],
        "hashes": {"data": "1"},
        "dtype": "float32",
        "machine": {"device": "cpu"},
        "step0": None,
    }
    return CellResult(report, Evaluation(Protocol(()), {}, {"tasks": {}}))


def at(rate, **settings):
    return Run(hyperparameters=Hyperparameters(learning_rate=rate), **settings)


def bowl(rate, best, lowest):
    return lowest + 0.1 * np.log(rate / best) ** 2


@pytest.fixture
def swept():
    """Default is best at 6e-4 and pissa at 2e-4, equally good there but for 0.01."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal(ITEMS) * 0.1
    found = {}
    for init, best, lowest in (("default", 6e-4, 1.4), ("pissa", 2e-4, 1.41)):
        for rate in RATES:
            noise = 0.005 * rng.standard_normal(ITEMS)
            found[at(rate, init=init)] = cell(bowl(rate, best, lowest) + items + noise)
    return found


def test_curves_stand_beside_the_base_of_their_seed():
    found = {
        Run(): cell(1.4, curve=[3.0, 2.0, 1.0]),
        Run(init="pissa"): cell(1.4, curve=[3.0, 1.7, 1.0]),
        Run(init="pissa", seed=1): cell(1.4, curve=[1.0, 1.0, 1.0]),
        Run(init="untrained"): cell(2.0),
    }
    rows = comparison.curves(found, window=3)
    assert [(r["variant"], r["step"], r["loss"]) for r in rows[3:]] == [
        ("pissa", 1, 3.0), ("pissa", 2, 1.7), ("pissa", 3, 1.0)
    ]  # fmt: skip
    assert_allclose([r["gap"] for r in rows], [0, 0, 0, -0.15, -0.1, -0.15], atol=1e-12)
    assert_allclose([r["gap"] for r in comparison.curves(found, window=1)[3:]], [0, -0.3, 0])


def test_held_out_losses_are_held_against_the_model_and_the_base():
    found = {
        Run(init="untrained"): cell(2.0),
        Run(seed=1): cell(1.5),
        Run(init="pissa", seed=1): cell(1.4, before=2.2),
        Run(init="pissa", seed=2): cell(1.3, before=2.2),
    }
    rows = {(r["variant"], r["seed"]): r for r in comparison.held_out(found)}
    assert_allclose(rows["pissa", 1]["shift"], 0.2)
    assert_allclose(rows["pissa", 1]["lead"], -0.1)
    assert np.isnan(rows["pissa", 2]["lead"])
    assert np.isnan(comparison.held_out({Run(): cell(1.4)})[0]["shift"])


def test_differences_come_with_a_correction_for_all_of_them():
    rng = np.random.default_rng(0)
    found = {Run(seed=s): cell(1.4 + 0.1 * rng.random(ITEMS)) for s in (1, 2)}
    for init, more in (("pissa", 0.5), ("gaussian", 0.0)):
        found |= {
            Run(init=init, seed=s): cell(1.4 + more + 0.1 * rng.random(ITEMS)) for s in (1, 2)
        }
    rows = comparison.against(found, ["default", "pissa", "gaussian", "eva"], (LOSS, "ARC"))
    assert [(r["variant"], r["minus"], r["measure"]) for r in rows] == [
        ("pissa", "default", LOSS), ("gaussian", "default", LOSS)
    ]  # fmt: skip
    assert_allclose(rows[0]["estimate"], 0.5, atol=0.05)
    smaller = min(rows, key=lambda r: r["p"])
    assert smaller["holm"] == min(1, 2 * smaller["p"])
    assert comparison.against(found, [], (LOSS,)) == []


def test_rows_over_rates_know_their_seed_and_the_base_beside_them(swept):
    rate = RATES[0]
    found = {**swept, at(rate, init="pissa", seed=1): cell(1.5), Run(init="untrained"): cell(2.0)}
    rows = {(r["variant"], r["rate"], r["seed"]): r for r in comparison.over_rates(found)}
    assert len(rows) == len(swept) + 1
    single = rows["pissa", rate, 1]
    assert_allclose(single["loss"], 1.5)
    assert (single["whole"], np.isnan(single["lead"])) == (False, True)
    both = [rows[variant, rate, Run.seed] for variant in ("pissa", "default")]
    assert_allclose(both[0]["lead"], both[0]["loss"] - both[1]["loss"])
    assert (both[0]["whole"], both[1]["lead"]) == (True, 0)


def test_each_start_has_its_own_best_rate(swept):
    rows = {row["variant"]: row for row in comparison.optima(swept)}
    assert_allclose(rows["default"]["rate"], 6e-4, rtol=0.1)
    assert_allclose(rows["pissa"]["rate"], 2e-4, rtol=0.1)
    assert (rows["pissa"]["tried"], rows["pissa"]["seeds"]) == (2e-4, 1)
    assert rows["pissa"]["low"] <= rows["pissa"]["rate"] <= rows["pissa"]["high"]


def test_a_lead_at_one_rate_is_not_one_at_the_best(swept):
    rows = {row["how"]: row for row in comparison.leads(swept)}
    template, own = rows[comparison.TEMPLATE], rows[comparison.OWN]
    assert_allclose(template["estimate"], 0.01 - 0.1 * np.log(3) ** 2, atol=0.005)
    assert template["high"] < 0
    assert_allclose(own["estimate"], 0.01, atol=0.005)
    assert (own["rate"], own["base_rate"]) == (2e-4, 6e-4)
    assert own["low"] <= 0.01 <= own["high"]
    without = {run: s for run, s in swept.items() if run.init != "default"}
    assert comparison.leads(without) == []


def test_curvature_foretells_rates_from_that_of_the_base(swept):
    table = [
        {"init": "default", "reference": "", "eigenvalue": "2.0"},
        {"init": "pissa", "reference": "", "eigenvalue": "8.0"},
        {"init": LITERAL["init"], "reference": LITERAL["reference"], "eigenvalue": "1.0"},
    ]
    rows = comparison.sharpness(table, swept)
    found = rows[0]["rate"]
    assert_allclose([row["inverse"] for row in rows], [found, found / 4, found * 2])
    assert_allclose([row["inverse root"] for row in rows], [found, found / 2, found * 2**0.5])
    assert_allclose(rows[1]["rate"], 2e-4, rtol=0.1)
    assert rows[1]["tried"] == 2e-4
    assert np.isnan([rows[2]["rate"], rows[2]["tried"]]).all()
    assert rows[2]["variant"] == Run(**LITERAL).variant


def test_runs_as_by_default_leave_rates_and_sizes_out(swept):
    found = {**swept, Run(**LITERAL, b_scale=0.1): cell(1.0)}
    assert {r.variant for r in comparison.as_by_default(found)} == {"default", "pissa"}
