"""The benchmark of identification: what it keeps, what it recognises, on tiny models."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from numpy.testing import assert_allclose

from wdlib import WdlibError
from wdlib.fingerprints import decoder


@pytest.fixture(scope="module")
def benchmark():
    return tiny.script("identification")


@pytest.fixture
def quick(benchmark, saved_models, house, monkeypatch):
    """The script with two tiny decoders, another model, and what it keeps in the test's folder."""
    first, second, other = saved_models
    places = {"DECODERS": {first: 1, second: 1}, "OTHERS": (other,), "FULL": first, "RANK": 8}
    places["STRANGER"] = second
    for name, value in (places | {"KEPT": house / "kept"}).items():
        monkeypatch.setattr(benchmark.suspects, name, value)
    for cached in ("original", "stored", "stored_record"):
        getattr(benchmark.suspects, cached).cache_clear()
    return benchmark


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    folders = []
    for i, (name, layers) in enumerate((("llama", 6), ("qwen2", 6), ("llama", 5))):
        build, configure, options, _, _ = tiny.ARCHITECTURES[name]
        torch.manual_seed(i)
        config = getattr(transformers, configure)(**options | {"num_hidden_layers": layers})
        made = getattr(transformers, build)(config)
        folders.append(str(tmp_path_factory.mktemp(f"{name}{i}")))
        made.save_pretrained(folders[-1])
    return folders


def case(benchmark, name):
    return next(c for c in benchmark.suspects.cases() if c.name == name)


def test_a_suspect_is_held_against_every_model_and_its_numbers_are_kept(quick, monkeypatch):
    model, permuted = quick.suspects.FULL, case(quick, "neurons permuted")
    found = list(quick.rows(model, permuted))
    for name in quick.MEASURES:
        own = [row["related"] for row in found if row["measure"] == name]
        assert sorted(own) == [False, False, True]
    for name in ("spectral difference", "unit length"):
        (score,) = (r["score"] for r in found if r["measure"] == name and r["related"])
        assert_allclose(score, 0, atol=1e-6)
        assert all(r["score"] < -1e-3 for r in found if r["measure"] == name and not r["related"])
    monkeypatch.setattr(decoder, "write", None)
    again = list(quick.rows(model, permuted))
    np.testing.assert_equal(again, found)
    kept = list(quick.suspects.KEPT.iterdir())
    assert {path.suffix for path in kept} == {".json", ".npz", ""}
    assert [path.name for path in kept if path.is_dir()] == ["originals"]


def test_a_suspect_is_made_again_only_where_it_would_be_another(quick, monkeypatch):
    plain, suspects = case(quick, "as it is"), quick.suspects
    kept = [suspects.key(suspects.FULL, plain)]
    kept.append(suspects.key(suspects.FULL, case(quick, "norms moved")))
    kept += [suspects.key(model, plain) for model in list(suspects.DECODERS)[1:]]
    monkeypatch.setattr(suspects, "TOKENS", 20)
    kept.append(suspects.key(suspects.FULL, plain))
    assert len(set(kept)) == 4


def test_a_case_that_the_layout_does_not_allow_has_no_rows(quick):
    def refuse(d):
        raise WdlibError("not of this model")

    refused = quick.Case("refused", "", quick.suspects.SAME, refuse)
    assert list(quick.rows(quick.suspects.FULL, refused)) == []


def test_every_case_has_a_name_of_its_own(benchmark):
    suspects = benchmark.suspects
    cases = suspects.cases()
    assert len({(c.kind, c.name, c.strength) for c in cases}) == len(cases)
    mains = [c.name for c in cases if c.is_main]
    whole = {c.name for c in cases if c.kind in (suspects.SAME, suspects.CHANGED)}
    assert set(mains) >= whole
    assert len(set(mains)) == len(mains)


def test_curves_of_another_depth_and_scale_correlate(benchmark):
    curve = np.linspace(1, 2, 9) ** 2
    longer = 3 * np.interp(np.linspace(0, 1, 30), np.linspace(0, 1, 9), curve)
    a, b, c, d = (
        benchmark.Record({}, dict.fromkeys("qkvo", x), {})
        for x in (curve, longer, -curve, np.ones(9))
    )
    assert_allclose(benchmark.intrinsic(a, b), 1, atol=1e-3)
    assert_allclose(benchmark.intrinsic(a, c), -1)
    assert benchmark.intrinsic(a, d) == 0


def planted(benchmark, scores, *, related):
    shared = {"model": "m", "strength": "", "kind": "k", "measure": next(iter(benchmark.MEASURES))}
    return [
        shared | {"case": f"{i}", "stored": "m" if related else "x", "related": related, "score": s}
        for i, s in enumerate(scores)
    ]


def test_the_threshold_leaves_one_stranger_in_a_hundred_above_it(benchmark):
    strangers = np.random.default_rng(0).permutation(200) / 200
    own = [0.985, 0.99, 0.995, np.nan]
    table = planted(benchmark, strangers, related=False) + planted(benchmark, own, related=True)
    found = list(benchmark.power(table))
    assert sum(strangers > found[0]["threshold"]) == 2
    assert [row["recognised"] for row in found] == [False, True, True, False]
    assert [row["best"] for row in found] == [o > s for o, s in zip(own, strangers, strict=False)]


def test_every_relative_has_a_place_of_its_own(house):
    relatives = tiny.script("relatives")
    for name, recipe in relatives.RECIPES.items():
        assert relatives.MADE[name] != recipe.is_new
        assert relatives.folder(name).parent == house / "cache" / "relatives"
    assert len({relatives.folder(name) for name in relatives.MADE}) == len(relatives.MADE)
