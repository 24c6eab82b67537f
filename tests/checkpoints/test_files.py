"""A model, however it is named -> its files: local ones, and what they are known by."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import sha256

from wdlib import WdlibError
from wdlib.checkpoints import files
from wdlib.checkpoints.catalogue import DEFAULT


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_folder_and_file(tmp_path):
    touch(tmp_path, "model.safetensors", "other.safetensors", "small.gguf", "config.json")
    folder = files.resolve(tmp_path)
    assert folder.files == (tmp_path / "model.safetensors",)
    assert (folder.name, folder.source) == (tmp_path.name, f"folder {tmp_path.name}")
    for name in ("other.safetensors", "small.gguf"):
        file = files.resolve(str(tmp_path / name))
        assert file.files == (tmp_path / name,)
        assert (file.name, file.source) == (Path(name).stem, f"file {name}")
        assert files.content_hash(file) == sha256(name.encode())


@pytest.mark.parametrize("name", ["only.safetensors", "only.gguf"])
def test_folder_with_one_file_of_another_name(tmp_path, name):
    touch(tmp_path, name, "pytorch_model.bin")
    assert files.resolve(tmp_path).files == (tmp_path / name,)


def write_index(folder: Path, *shards: str) -> None:
    table = {f"tensor{n}": shard for n, shard in enumerate(shards)}
    text = json.dumps({"metadata": {}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_checkpoint_is_its_own_answer(tmp_path):
    checkpoint = files.resolve(touch(tmp_path, "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    assert files.resolve(checkpoint) is checkpoint


def test_shards_and_their_hash(tmp_path):
    touch(tmp_path, "b.safetensors", "a.safetensors", "consolidated.safetensors")
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    checkpoint = files.resolve(tmp_path)
    assert checkpoint.files == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    lines = "".join(f"{n} {sha256(n.encode())}\n" for n in ("a.safetensors", "b.safetensors"))
    turned = dataclasses.replace(checkpoint, files=checkpoint.files[::-1])
    assert files.content_hash(checkpoint) == sha256(lines.encode()) == files.content_hash(turned)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"holds no \.safetensors or \.gguf file"),
        (("pytorch_model.bin",), r"pytorch_model\.bin is a pickle.*save_pretrained"),
        (("model.pth",), r"model\.pth is a pickle"),
        (("a.safetensors", "b.safetensors"), "2 files with weights"),
        (("a.gguf", "b.gguf"), "2 files with weights"),
    ],
)
def test_folders_without_usable_weights(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(WdlibError, match=message):
        files.resolve(tmp_path)


def test_missing_shard_and_broken_index(tmp_path):
    touch(tmp_path, "a.safetensors")
    write_index(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(WdlibError, match=r"lacks b\.safetensors"):
        files.resolve(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WdlibError, match=r"index\.json is corrupt"):
            files.resolve(tmp_path)


def test_shards_beside_a_whole_file_are_refused_unless_they_are_it(tmp_path):
    touch(tmp_path, "model.safetensors", "a.safetensors")
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(
        WdlibError, match=r"model\.safetensors and .*index\.json, which names other"
    ):
        files.resolve(tmp_path)
    write_index(tmp_path, "model.safetensors")
    assert files.resolve(tmp_path).files == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt"])
def test_pickles_are_not_opened(tmp_path, name):
    touch(tmp_path, name)
    with pytest.raises(WdlibError, match=r"is a pickle.*save_pretrained"):
        files.resolve(tmp_path / name)


def test_unknown_names(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(WdlibError, match=r"notes\.txt is neither"):
        files.resolve(tmp_path / "notes.txt")
    with pytest.raises(WdlibError, match=r"no model, file or folder 'smollm2-135'.*smollm2-135m"):
        files.resolve("smollm2-135")
    for name in ("", "zzz", "folder/absent.gguf", str(tmp_path / "absent")):
        with pytest.raises(WdlibError, match="There is no model, file or folder"):
            files.resolve(name)
    with pytest.raises(WdlibError, match="There is no model, file or folder"):
        files.resolve(Path("organisation/absent"))


def test_where_weights_are_from_is_told_as_it_is_when_they_are_read(tmp_path):
    file = tmp_path / "folder" / "model.safetensors"
    file.parent.mkdir()
    save_file({"a": np.zeros((2, 2))}, file)
    for model in (file, file.parent, str(file), DEFAULT):
        checkpoint = files.resolve(model)
        given = {"source": checkpoint.source, "sha256": checkpoint.sha256}
        assert files.matches_source(given, model)
        for other in ("gemma-3-270m", "llama-3-8b", f"hf://{DEFAULT}", "a/b", tmp_path):
            assert not files.matches_source(given, other)
        assert files.matches_source({**given, "sha256": "0" * 64}, model) == (model != DEFAULT)
    commit = "0123456789abcdef0123456789abcdef01234567"
    on_hub = {"source": "hub meta-llama/Meta-Llama-3-8B", "revision": commit}
    for model in ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"):
        for same in (model, f"hf://{model}", f"hf://{model}@main", f"hf://{model}@{commit[:8]}"):
            assert files.matches_source(on_hub, same)
        assert not files.matches_source(on_hub, f"hf://{model}@{commit[::-1]}")
    assert not files.matches_source({}, "llama-3-8b")
    assert files.matches_source({}, "no-such-model")
