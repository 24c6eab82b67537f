"""The script that measures sizes of the goodness-of-fit tests."""

import csv

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from scipy import stats

from wdlib import paths, provenance


@pytest.fixture(scope="module")
def size_experiment():
    return tiny.script("goodness_of_fit_size")


@pytest.fixture
def quick(size_experiment, monkeypatch):
    """The script with two small tables of each kind, and few replicates."""
    for name in ("REPETITIONS", "HELD_OUT_REPETITIONS"):
        monkeypatch.setattr(size_experiment, name, 2)
    monkeypatch.setattr(size_experiment, "REPLICATES", 19)
    monkeypatch.setattr(size_experiment, "SIZES", ((10, None), (8, 9)))
    monkeypatch.setattr(size_experiment, "HELD_OUT_SIZES", ((9, None),))
    return size_experiment


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("held_out", [False, True])
def test_the_measurement_of_sizes_runs(quick, house, held_out):
    quick.main(["--held-out"] * held_out)
    (out,) = (house / "results").glob("*.csv")
    rows = rows_of(out)
    truths, sizes = (quick.HELD_OUT, {"36"}) if held_out else (quick.TRUTHS, {"45", "72"})
    assert out.stem == "goodness_of_fit_size" + "_held_out" * held_out
    assert len(rows) == len(sizes) * sum(len(dependences) for dependences in truths.values())
    assert {row["distances"] for row in rows} == sizes
    assert {row["repetitions"] for row in rows} == {"2"}
    assert provenance.load(out).parameters["repetitions"] == 2


def test_held_out_tables_are_others(quick):
    case = "power law", "product", 10, None
    (old,), (new,) = (quick.measure(*case, held_out=held_out) for held_out in (False, True))
    assert old["tail_share"] != new["tail_share"]


def test_the_method_states_the_held_out_sizes():
    rows = rows_of(paths.RESULTS / "goodness_of_fit_size_held_out.csv")
    rates = {name: [] for name in ("designed", "cauchy", "walk")}
    for row in rows:
        family = row["dependence"] if row["dependence"] in rates else "designed"
        rates[family].append(100 * float(row["rejected_vectors"]))
    text = (paths.ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for family, sentence in (("designed", "rejects"), ("cauchy", "should:"), ("walk", "law,")):
        low, high = (f"{value:.0f}" for value in (min(rates[family]), max(rates[family])))
        assert f"{sentence} {low} to {high} %" in text


def test_the_planted_tables_are_what_they_are_said_to_be(size_experiment):
    module = size_experiment
    laws = {
        "power law": stats.pareto(module.SHAPE),
        "lognormal": stats.lognorm(1),
        "exponential": stats.expon(),
    }
    rng = np.random.default_rng(1)
    for truth, law in laws.items():
        for dependence in ("ultrametric", "product"):
            for m in (None, 2):
                # one distance of each table, so that the draws are independent
                x = [module.table(truth, dependence, 2, m, rng)[0, 1] for _ in range(2000)]
                assert stats.kstest(x, law.cdf).pvalue > 1e-3
    for dependence in ("cauchy", "walk"):
        x = []
        for _ in range(2000):  # one distance of each table
            i, j = rng.choice(6, 2, replace=False)
            x.append(module.table("power law", dependence, 6, None, rng)[i, j])
        assert stats.kstest(x, laws["power law"].cdf).pvalue > 1e-3
    mixed = module.table("power law, body", "product", 400, None, rng)
    tail = mixed[mixed > 1]
    assert_allclose(tail.size / mixed.size, 0.4, atol=0.1)
    assert stats.kstest(rng.choice(tail, 300), stats.pareto(module.SHAPE).cdf).pvalue > 1e-3
