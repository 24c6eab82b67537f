"""Calibrations of the generator, which reach a planted target or say that they do not."""

from dataclasses import replace as changed

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from wdlib import WdlibError, calibration, generator
from wdlib.calibration import (
    Candidate,
    Outcomes,
    Target,
    calibrate,
    candidates,
    generated,
    measure,
    outcomes,
    survey,
    target,
)
from wdlib.characterise import NORMAL, POWER_LAW, UNDECIDED, Pair, Verdict
from wdlib.distances import cosine_distances
from wdlib.fits.estimators import power_law
from wdlib.fits.resampling import vector_draws
from wdlib.generator import GaussianCounts, ParetoCounts, counts_for

SHAPE = (16, 512)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_counts_for_starts_the_distances_where_it_is_asked_to():
    shape, xmin = (16, 4096), 1e-7
    scale = counts_for(1.6, xmin, shape).scale
    assert scale < generator.LARGEST_SCALE
    fewest = Candidate(shape, GaussianCounts(scale, 0))
    tables = [generated(fewest, (5, 5), rank=16, rng=rng(s)) for s in range(30)]
    assert_allclose(np.mean(tables), xmin, rtol=0.15)


def test_two_templates_are_farther_apart_than_copies_of_one():
    counts = GaussianCounts(0.001, 0)
    one, two = (
        generated(Candidate(SHAPE, counts, templates=t), (6, 5), rank=16, rng=rng()) for t in (1, 2)
    )
    assert one.shape == two.shape == (6, 5)
    assert two.min() > one.max()
    within = generated(Candidate(SHAPE, counts), (6, None), rank=16, rng=rng())
    assert_array_equal(within, within.T)
    assert_allclose(np.diag(within), 0)


TRUE = Candidate((16, 512), ParetoCounts(0.7, 1e-4))


@pytest.fixture(scope="module")
def planted() -> Target:
    """A target that `TRUE` reaches by construction."""
    found = outcomes(TRUE, (30, 30), rank=16, replicates=40, draws=40, seed=3)
    low, high = np.quantile(found.alphas, (0.025, 0.975))
    return Target(
        label=POWER_LAW,
        alpha=float(np.median(found.alphas)),
        xmin=1e-6,
        low=float(low),
        high=float(high),
        median=float(np.median(found.medians)),
        vectors=(30, 30),
        rank=16,
    )


@pytest.fixture(scope="module")
def surveyed():
    laws = [(shape, scale) for shape in (0.5, 0.7, 2.0) for scale in (2e-5, 6e-5, 2e-3)]
    grid = tuple(Candidate((16, 512), ParetoCounts(*law)) for law in laws)
    return survey(grid, (30, 30), rank=16, draws=6)


def test_a_planted_target_is_found_again(planted, surveyed):
    found = calibrate(planted, surveyed, draws=30)
    assert found.label_rate >= 0.8
    assert found.alpha_rate >= 0.6
    assert found.misses()["alpha"] == 0
    assert 0.8 < found.scale < 1.25
    assert found.scale_low < found.scale < found.scale_high
    assert found.candidate.counts.shape in (0.5, 0.7)
    assert measure(planted, TRUE, draws=2) == measure(planted, TRUE, draws=2)


def test_a_target_out_of_reach_is_missed_and_the_result_says_by_how_much(planted, surveyed):
    far = changed(planted, median=0.02, low=20.0, high=30.0, alpha=25.0)
    found = calibrate(far, surveyed, draws=20)
    assert not found.reached
    assert found.misses()["alpha"] == pytest.approx(20.0 - found.alpha)
    assert found.misses()["scale"] == pytest.approx(np.log10(found.scale))
    assert found.scale < 0.1


def test_misses_in_closed_form(planted):
    found = measure(planted, TRUE, draws=5)
    good = changed(found, label_rate=0.97, alpha=planted.alpha, scale=0.91)
    assert good.reached
    assert good.misses() == {"class": 0.0, "alpha": 0.0, "scale": 0.0}
    bad = changed(good, label_rate=0.90, alpha=planted.high + 0.5, scale=0.01)
    assert bad.misses() == pytest.approx({"class": 0.05, "alpha": 0.5, "scale": -2.0})
    assert not bad.reached


def test_class_and_exponent_come_before_scale(planted):
    def found(labels: str, alpha: float, median: float) -> Outcomes:
        names = tuple({"p": POWER_LAW, "u": UNDECIDED}[c] for c in labels)
        return Outcomes(names, np.full(len(names), alpha), np.full(len(names), median))

    right, near = (Candidate((16, n), TRUE.counts) for n in (20, 30))
    given = {
        near: found("uuup", planted.alpha, planted.median),
        right: found("pppp", planted.alpha, planted.median / 50),
    }
    assert calibration._best(planted, given, 1, 0.1) == [right]
    given[near] = found("pppp", planted.alpha, planted.median)
    assert calibration._best(planted, given, 1, 0.1) == [near]
    given[near] = found("pppp", planted.high + 1, planted.median)
    assert calibration._best(planted, given, 1, 0.1) == [right]


def test_a_normal_target_is_reached_by_two_templates():
    grid = candidates(NORMAL, shapes=((64, 256),))
    assert all(isinstance(c.counts, GaussianCounts) for c in grid)
    few = tuple(c for c in grid if c.counts.mean in (0.001, 0.1))
    goal = Target(NORMAL, None, None, None, None, 1e-4, (24, 24), 64)
    found = calibrate(goal, survey(few, goal.vectors, rank=64, draws=6), draws=20)
    assert found.candidate.templates == 2
    assert found.candidate.counts.mean == 0.001
    assert found.label_rate >= 0.75
    assert found.alpha is None
    assert 0.7 < found.scale < 1.4


@pytest.mark.parametrize(
    ("start", "median"),
    [
        (Candidate((16, 512), ParetoCounts(0.7, 1e-5)), 5e-6),
        (Candidate((16, 128), ParetoCounts(0.7, 1e-4), ratio=20.0), 3e-3),
        (Candidate((16, 512), GaussianCounts(0.01, 0.001), templates=2), 1e-3),
    ],
    ids=["scale", "ratio", "columns"],
)
def test_one_parameter_is_moved_to_the_target_s_scale(planted, start, median):
    goal = changed(planted, median=median)
    found = calibration._tuned(start, goal, True, [0])
    medians = [
        np.median(generated(found, (30, 30), rank=16, rng=rng(s))) / median for s in range(20)
    ]
    assert 0.6 < np.median(medians) < 1.6


def test_candidates_combine_everything_once():
    grid = candidates(POWER_LAW, shapes=((16, 64), (16, 128)), ratios=(1.0, 3.0))
    assert len(set(grid)) == len(grid) == 4 * len(calibration.PARETO_GRID)
    assert {c.templates for c in grid} == {1}


def pair(label: str, n: int) -> Pair:
    return Pair(("q", "k"), Verdict(label, 1.0, 1.0, 0.0, 0.1, n), 2.0, 0.1)


def test_target_is_that_of_the_spectra():
    values = {t: rng(i).exponential(size=(12, 8)) for i, t in enumerate("qk")}
    found = target(values, pair(POWER_LAW, 144), replicates=50)
    table = cosine_distances(values["q"], values["k"])
    assert found.vectors == (12, 12)
    assert found.rank == 8
    assert found.median == np.median(table)
    assert found.low < found.alpha < found.high
    assert found == target(values, pair(POWER_LAW, 144), replicates=50)
    normal = target(values, pair(NORMAL, 144))
    assert normal.alpha is normal.low is normal.high is normal.xmin is None


def test_a_target_within_a_type_of_few_layers_is_that_of_the_resamples_that_can_be_fitted():
    values = {"q": rng(3).exponential(size=(6, 8))}
    own = changed(pair(POWER_LAW, 15), types=("q", "q"))
    found = target(values, own, replicates=300)
    table = cosine_distances(values["q"], values["q"])
    drawn = list(vector_draws(table, symmetric=True, replicates=300, rng=rng(0)))
    fitted = [power_law(d).alpha for d in drawn if len(set(d)) > 3]
    assert 0 < len(fitted) < 300
    assert_allclose((found.low, found.high), np.quantile(fitted, (0.025, 0.975)), rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"), [((UNDECIDED, 144), "q-k is undecided"), ((POWER_LAW, 100), "has 100")]
)
def test_a_target_that_is_none_is_refused(given, message):
    values = {t: rng(i).exponential(size=(12, 8)) for i, t in enumerate("qk")}
    with pytest.raises(WdlibError, match=message):
        target(values, pair(*given))


def test_a_survey_of_nothing_is_refused(planted):
    with pytest.raises(WdlibError, match="no candidates"):
        calibrate(planted, {})
