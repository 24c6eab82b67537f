"""The classes of pairs of types and their groups: planted ones, closed forms, the stored form."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from scipy import stats

from wdlib import TYPES, WdlibError, characterise, paths
from wdlib.characterise import (
    NORMAL,
    POWER_LAW,
    UNDECIDED,
    Characterisation,
    Group,
    classify,
    group,
    stability,
)
from wdlib.distances import cosine_distances
from wdlib.fits.estimators import power_law
from wdlib.spectra import store
from wdlib.spectra.store import Spectra


@pytest.fixture(scope="module")
def experiment():
    """The script that plants sets of every class."""
    return tiny.script("confusion")


def labels(experiment, truth: str, name: str, n: int, draws: int = 25) -> Counter:
    plant = experiment.PLANTS[truth][name]
    return experiment.count(plant, experiment.SHAPES[n], draws, seed=1)


# The rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [276, 576])
@pytest.mark.parametrize(
    "name", ["template, share 0.30 +- 0.06", "ultrametric, 1.0 +- 0.2", "noise"]
)
def test_planted_normals_are_never_called_power_law(experiment, name, n):
    found = labels(experiment, NORMAL, name, n)
    assert found[POWER_LAW] == 0
    assert found[NORMAL] >= (1 if "ultra" in name else 15)


@pytest.mark.parametrize("name", ["template, alpha 1.8", "ultrametric, alpha 2.5"])
def test_planted_power_laws_are_found_and_never_called_normal(experiment, name):
    found = labels(experiment, POWER_LAW, name, 576)
    assert found[NORMAL] == 0
    assert found[POWER_LAW] >= 20


def test_light_power_laws_are_hardly_ever_called_normal(experiment):
    found = labels(experiment, POWER_LAW, "template, alpha 3.5", 276, draws=40)
    assert found[NORMAL] <= 4


def test_an_exponential_set_favours_neither():
    x = stats.expon.ppf((np.arange(300) + 0.5) / 300)
    assert characterise._favoured(x) == 0
    assert characterise._favoured(stats.norm(5, 1).ppf((np.arange(300) + 0.5) / 300)) == -1
    assert characterise._favoured(stats.pareto(1.5).ppf((np.arange(300) + 0.5) / 300)) == 1


def test_exponential_sets_are_hardly_ever_called_power_law(experiment):
    found = labels(experiment, "neither", "ultrametric, exponential", 576, draws=40)
    assert found[POWER_LAW] <= 2
    assert found[NORMAL] <= 2


def test_a_tail_of_one_vector_is_no_evidence():
    rng = np.random.default_rng(0)
    size = np.concatenate([rng.normal(1, 0.1, 19), [30]])
    table = np.add.outer(size, size)
    assert classify(table, symmetric=True).label == UNDECIDED


def test_the_likelihoods_are_those_of_densities_that_integrate_to_one():
    x = np.random.default_rng(0).lognormal(size=400)
    start, pareto, normal, exponential = characterise._likelihoods(x)
    tail = x[x >= start]
    assert tail.size == 360
    shape, _, _ = stats.pareto.fit(tail, floc=0, fscale=start)
    assert_allclose(pareto, stats.pareto(shape, scale=start).logpdf(tail).mean(), rtol=1e-10)
    law = stats.truncnorm((start - x.mean()) / x.std(), np.inf, x.mean(), x.std())
    assert_allclose(normal, law.logpdf(tail).mean(), rtol=1e-10)
    law = stats.expon(*stats.expon.fit(tail, floc=start))
    assert_allclose(exponential, law.logpdf(tail).mean(), rtol=1e-10)


def test_a_verdict_does_not_depend_on_the_unit_and_repeats_with_its_seed():
    table = np.random.default_rng(0).lognormal(size=(12, 9))
    verdict = classify(table, symmetric=False, replicates=50, seed=4)
    assert verdict == classify(table, symmetric=False, replicates=50, seed=4)
    assert verdict != classify(table, symmetric=False, replicates=50, seed=5)
    scaled = classify(1024 * table, symmetric=False, replicates=50, seed=4)
    assert scaled.start == 1024 * verdict.start
    assert_allclose(scaled.evidence, verdict.evidence)
    assert (scaled.label, scaled.power_law_share) == (verdict.label, verdict.power_law_share)


def test_only_the_part_above_the_diagonal_of_a_symmetric_table_counts():
    upper = np.triu(np.random.default_rng(0).pareto(1.5, (20, 20)), 1)
    one = classify(upper + upper.T, symmetric=True, replicates=40)
    assert one.n == 190
    drawn = upper + upper.T + np.diag(np.full(20, 1e6))
    assert classify(drawn, symmetric=True, replicates=40) == one


def test_zeros_are_left_out():
    table = 1 + np.random.default_rng(0).pareto(1.5, (20, 20))
    doubled = np.vstack([table, np.zeros((5, 20))])
    verdict = classify(doubled, symmetric=False, replicates=20)
    assert verdict.n == 400
    assert verdict.start >= 1


@pytest.mark.parametrize("table", [np.ones((5, 5)), np.zeros((3, 3)), np.ones((0, 4))])
def test_a_table_without_four_different_distances_has_no_class(table):
    with pytest.raises(WdlibError, match="compare more vectors"):
        classify(table, symmetric=False)


# Groups --------------------------------------------------------------------------------------


def test_the_type_tied_to_most_others_is_referenced_and_the_rest_is_grouped_again():
    ties = dict.fromkeys([("q", "k"), ("k", "v"), ("k", "o"), ("o", "gate"), ("gate", "up")], 1.0)
    expected = (Group("k", ("q", "v", "o")), Group("gate", ("up",)), Group("down", ()))
    assert group(TYPES, ties) == expected
    assert group(TYPES, {pair[::-1]: e for pair, e in ties.items()}) == expected


def test_equals_are_decided_by_the_median_evidence_and_then_by_order():
    ties = {("q", "k"): 1.0, ("v", "o"): 3.0, ("gate", "up"): 3.0}
    expected = (Group("v", ("o",)), Group("gate", ("up",)), Group("q", ("k",)), Group("down", ()))
    assert group(TYPES, ties) == expected
    chain = {("q", "k"): 0.1, ("k", "v"): 9.0, ("v", "o"): 0.3}  # medians: k 4.55, v 4.65
    assert group(("q", "k", "v", "o"), chain)[0] == Group("v", ("k", "o"))


def test_a_tie_with_itself_makes_no_group_and_negative_evidence_no_exception():
    assert group(("q", "k"), {("q", "q"): 5.0}) == (Group("q", ()), Group("k", ()))
    assert group(("q", "k"), {("q", "k"): -0.5}) == (Group("q", ("k",)),)


# Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gate apart", "two groups"])
def test_a_planted_grouping_comes_back(experiment, name):
    planted = experiment.GROUPINGS[name]
    for i in range(5):
        model = experiment.planted_model(np.random.default_rng(i), planted)
        assert experiment.grouping(model) == {frozenset(types) for types in planted}


@pytest.fixture(scope="module")
def smollm2() -> Characterisation:
    return characterise.characterise(store.load("smollm2-135m-instruct"), rank=16, replicates=60)


def test_a_characterisation_holds_every_pair_with_its_fit(smollm2):
    assert len(smollm2.pairs) == 28
    assert smollm2.rank == 16
    values = store.load("smollm2-135m-instruct", rank=16).values
    pair = smollm2.pair("up", "v")
    assert pair is smollm2.pair("v", "up")
    assert pair.verdict.label == POWER_LAW
    fit = power_law(characterise._table(values, ("v", "up")))
    assert (pair.alpha, pair.xmin) == (fit.alpha, fit.xmin)
    own = smollm2.pair("up", "up")
    assert own.verdict.n == 30 * 29 / 2
    assert own.alpha == power_law(cosine_distances(values["up"])).alpha
    assert all((p.alpha is None) == (p.verdict.label != POWER_LAW) for p in smollm2.pairs)
    named = [t for g in smollm2.groups for t in (g.referenced, *g.members)]
    assert sorted(named) == sorted(TYPES)
    with pytest.raises(WdlibError, match="no pair"):
        smollm2.pair("q", "router")


def test_an_exponent_whose_start_was_not_found_is_not_reported(monkeypatch):
    stored = store.load("smollm2-135m-instruct", rank=16)
    two = replace(stored, values={t: stored.values[t] for t in ("k", "up")})
    fit = characterise.power_law
    monkeypatch.setattr(characterise, "power_law", lambda x: replace(fit(x), on_bound=True))
    found = characterise.characterise(two, replicates=60)
    assert found.pair("k", "up").verdict.label == POWER_LAW
    assert all(pair.alpha is pair.xmin is None for pair in found.pairs)


def test_a_class_depends_on_its_own_pair_alone(smollm2):
    stored = store.load("smollm2-135m-instruct", rank=16)
    two = replace(stored, values={t: stored.values[t] for t in ("k", "up")})
    few = characterise.characterise(two, replicates=60)
    assert few.pair("k", "up") == smollm2.pair("k", "up")
    assert few.groups[0].referenced == "k"


def test_a_characterisation_is_stored_with_its_provenance(smollm2, tmp_path):
    path = characterise.save(smollm2, tmp_path / "new" / "model.json")
    assert characterise.load(path) == smollm2
    assert [p.name for p in path.parent.iterdir()] == ["model.json"]
    content = json.loads(path.read_text())
    assert content["provenance"] == store.load("smollm2-135m-instruct").provenance
    assert len(content["provenance"]["sha256"]) == 64
    assert content["rule"]["power_law_confidence"] == characterise.POWER_LAW_CONFIDENCE
    assert path.stat().st_size < 50_000


@pytest.mark.parametrize("text", ["", "[]", '{"model": "m"}', '{"groups": [], "pairs": [1]}'])
def test_another_file_is_refused_by_name(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(WdlibError, match="other.json does not hold a characterisation"):
        characterise.load(path)
    with pytest.raises(WdlibError, match="absent.json"):
        characterise.load(tmp_path / "absent.json")


def test_stored_results_are_what_the_code_gives():
    found = sorted((paths.DATA / "results" / "characterisation").glob("*-r16.json"))
    assert found
    for path in found:
        kept = characterise.load(path)
        assert kept.model in path.name
        again = characterise.characterise(store.load(kept.model), rank=16)
        assert again.labels() == kept.labels()
        assert again.groups == kept.groups


def test_stability_counts_classes_over_layers_and_ranks():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((2, 400))
    values = {
        "q": base[0] + 0.1 * rng.standard_normal((30, 400)),  # normal among themselves
        "up": base[1] + rng.pareto(0.8, (30, 1)) ** 0.5 * rng.standard_normal((30, 400)) / 50,
    }
    model = Spectra("m", values, {t: 0 * v for t, v in values.items()}, {}, {})
    found = stability(model, rank=400, ranks=(2, 400), resamples=10, replicates=60)
    assert found.labels[("q", "q")] == NORMAL
    assert found.labels[("up", "up")] == POWER_LAW
    assert found.by_rank[400] == found.labels
    assert found.by_rank[2][("q", "q")] != NORMAL  # two dimensions: squared distances are skewed
    for pair, counts in found.counts.items():
        assert sum(counts.values()) == 10
        assert found.changed(pair) == 1 - counts[found.labels[pair]] / 10
    assert found.counts[("up", "up")][NORMAL] == found.counts[("q", "q")][POWER_LAW] == 0
    assert found == stability(model, rank=400, ranks=(2, 400), resamples=10, replicates=60)


def test_stability_draws_other_layers():
    stored = store.load("smollm2-135m-instruct", rank=16)
    two = replace(stored, values={t: stored.values[t] for t in ("gate", "down")})
    found = stability(two, resamples=12, replicates=40)
    assert any(0 < found.changed(pair) < 1 for pair in found.labels)


def test_every_pair_draws_its_own_resamples():
    pairs = characterise._pairs(dict.fromkeys(TYPES))
    assert len({tuple(characterise._seed(0, pair)) for pair in pairs}) == 28


def test_layers_cannot_be_drawn_where_types_have_different_numbers_of_vectors():
    values = {"q": np.ones((4, 3)), "up": np.ones((8, 3))}
    model = Spectra("moe", values, values, {}, {})
    with pytest.raises(WdlibError, match="moe have \\[4, 8\\] vectors"):
        stability(model, rank=3)
