"""The record of a model: what the weights say, where it is kept, what is shipped."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from wdlib import TYPES, WdlibError, paths
from wdlib.checkpoints import catalogue
from wdlib.fingerprints import record
from wdlib.fingerprints.ancestors import report
from wdlib.spectra import jobs, store

SHIPPED = sorted(path.stem for path in (paths.RESULTS / "fingerprints").glob("*.json"))


def test_a_fingerprint_holds_what_the_weights_say(saved):
    tensors = tiny.falling_llama(0)
    found = record.compute(saved("made", tensors), rank=8, k=3)
    assert (found.model, found.family, found.types) == ("made", "", TYPES)
    assert (found.rank, found.k, found.matrices) == (8, 3, tiny.LAYERS)
    for t in TYPES:
        own = [m for name, m in tensors.items() if tiny.LLAMA_NAMES[t] in name]
        values = np.concatenate([m.ravel() for m in own]).astype(np.float64)
        assert_allclose(found.deviations[t], values.std(), rtol=1e-12)
        exact = np.linalg.svd(own[2].astype(np.float64), compute_uv=False)[:8]
        assert_allclose(found.singular_values[t][2], exact, rtol=1e-5)
        assert found.clustering_vector()[t].sum() == pytest.approx(1)
    assert_allclose(np.linalg.norm(list(found.deviation_vector().values())), 1)


def test_a_stored_fingerprint_comes_back_and_equal_ones_give_equal_bytes(saved, house, caplog):
    found = record.compute(saved("made", tiny.falling_llama(0)), rank=8, k=3, family="Toy")
    path = record.keep(found)
    assert path.parent == paths.CACHE / "fingerprints"
    back = record.load(path)
    assert back.to_json() == found.to_json()
    assert back.family == "Toy"
    assert [f.model for f in record.library()] == ["made"]
    assert record.of(house / "made.safetensors", rank=8, k=3).to_json() == found.to_json()
    fewer = record.of(house / "made.safetensors", rank=4, k=2)
    assert (fewer.rank, fewer.k, fewer.family) == (4, 2, "Toy")
    path.write_text('{"model": "x"}')
    assert record.library() == []
    assert re.search(r"left out: .*made-\w+\.json does not hold a fingerprint", caplog.text)
    shipped = paths.RESULTS / "fingerprints" / "made.json"
    paths.write_text(shipped, path.read_text())
    with pytest.raises(WdlibError, match=r"made\.json does not hold a fingerprint"):
        record.library()


def test_a_folder_named_like_a_shipped_model_is_read(saved, house, monkeypatch):
    monkeypatch.chdir(house)
    shipped = record.compute(saved("made", tiny.falling_llama(0)), rank=8, k=3)
    (house / catalogue.DEFAULT).mkdir()
    saved(f"{catalogue.DEFAULT}/model", tiny.falling_llama(1))
    record.save(shipped, paths.RESULTS / "fingerprints" / f"{catalogue.DEFAULT}.json")
    for model in (f"./{catalogue.DEFAULT}", Path(catalogue.DEFAULT), house / catalogue.DEFAULT):
        found = record.of(model, rank=8, k=3)
        assert (found.model, found.family) == (catalogue.DEFAULT, "")
        assert found.provenance["sha256"] != shipped.provenance["sha256"]


def test_a_shipped_fingerprint_is_not_stored_again(saved):
    found = record.compute(saved("made", tiny.falling_llama(0)), rank=8, k=3)
    shipped = record.save(found, paths.RESULTS / "fingerprints" / "made.json")
    assert record.keep(found) == shipped
    other = record.compute(saved("made", tiny.falling_llama(1)), rank=8, k=3)
    assert record.keep(other).parent == paths.CACHE / "fingerprints"
    assert len(record.library()) == 2


def test_what_is_stored_keeps_its_larger_rank_and_its_family(saved):
    path = saved("made", tiny.falling_llama(0))
    found = record.compute(path, rank=8, k=3, family="Toy")
    file = record.keep(found)
    assert record.keep(found.clustered(rank=4)) == file
    assert record.keep(record.compute(path, rank=4, k=3)) == file
    assert record.load(file).to_json() == found.to_json()
    record.keep(replace(found.clustered(rank=4), family="Other"))
    assert record.load(file).to_json() == replace(found, family="Other").to_json()
    record.keep(record.compute(path, rank=16, k=3))
    assert (record.load(file).rank, record.load(file).family) == (16, "Other")
    assert record.of(path, rank=32, k=3).family == "Other"


def test_who_made_a_fingerprint_is_said_of_the_one_that_is_there(saved):
    found = record.compute(saved("made", tiny.falling_llama(0)), rank=8, k=3)
    assert found.provenance["made by"].endswith("compute(rank=8, k=3)")
    fewer = found.clustered(rank=4, k=2).provenance
    assert fewer["made by"].endswith("clustered(rank=4, k=2)")
    assert fewer | {"made by": ""} == found.provenance | {"made by": ""}


def test_ranks_and_clusters_that_are_not_there_are_refused(saved, monkeypatch):
    path = saved("made", tiny.falling_llama(0))
    with pytest.raises(WdlibError, match="rank 33 is out of range for made.*from 1 to 32"):
        record.of(path, rank=33)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "of", None)
        for k in (0, 43):
            with pytest.raises(WdlibError, match=f"42 matrices of .* do not make {k} clusters"):
                record.of(path, rank=8, k=k)
    found = record.compute(path, rank=8, k=3)
    with pytest.raises(WdlibError, match="holds ranks 1 to 8, not 9"):
        found.clustered(rank=9)
    with pytest.raises(WdlibError, match="do not make 99 clusters"):
        found.clustered(k=99)


def test_halves_are_the_layers_of_even_and_odd_number(saved):
    tensors = tiny.falling_llama(0)
    even, odd = record.compute(saved("made", tensors), rank=8, k=3).halves()
    kept = {n: m for n, m in tensors.items() if int(n.split(".")[2]) % 2}
    values = np.concatenate([m.ravel() for n, m in kept.items() if "q_proj" in n])
    assert_allclose(odd.deviations["q"], values.astype(np.float64).std(), rtol=1e-12)
    assert even.matrices == odd.matrices == tiny.LAYERS // 2
    assert not set(map(tuple, even.singular_values["q"])) & set(
        map(tuple, odd.singular_values["q"])
    )


def test_a_mixture_of_experts_has_no_halves_and_says_how_many_matrices_it_has(saved, tmp_path):
    dense = record.compute(saved("made", tiny.falling_llama(0)), rank=8, k=3)
    moments, values = dense.moments, dense.singular_values
    mixture = replace(
        dense,
        moments=moments | {"up": moments["up"] * 4},
        singular_values=values | {"up": np.tile(values["up"], (4, 1))},
    )
    with pytest.raises(WdlibError, match=r"made have \[6, 24\] vectors"):
        mixture.halves()
    assert "6 to 24 matrices of each type" in report(mixture, [])
    assert "6 matrices of each type" in report(dense, [])
    assert json.loads(dense.to_json())["layers"] == 6
    content = json.loads(mixture.to_json())
    assert "layers" not in content
    assert (content["matrices"]["q"], content["matrices"]["up"]) == (6, 24)
    path = record.save(mixture, tmp_path / "mixture.json")
    assert record.load(path).to_json() == mixture.to_json()


# What is shipped -----------------------------------------------------------------------------


def test_the_shipped_fingerprints_are_those_of_the_stored_spectra_and_pinned_weights():
    from wdlib.checkpoints.catalogue import models

    assert {"smollm2-135m-instruct", "gemma-3-270m", "all-minilm-l6-v2"} < set(SHIPPED)
    for model in SHIPPED:
        kept, known = record.of(model), models()[model]
        assert (kept.model, kept.family, kept.rank, kept.k) == (model, known.family, 16, 7)
        assert kept.provenance["sha256"] == known.sources[0].sha256
        for t, values in store.load(model, rank=16).values.items():
            assert_allclose(kept.singular_values[t], values, rtol=1e-6)
            squares = sum(m.squares for m in kept.moments[t])
            assert (values**2).sum() < squares + sum(m.n * m.mean**2 for m in kept.moments[t])
        assert (paths.RESULTS / "fingerprints" / f"{model}.json").read_text() == kept.to_json()


def test_a_larger_rank_comes_from_the_stored_spectra():
    assert record.of("gemma-3-270m", rank=64, k=3).rank == 64
