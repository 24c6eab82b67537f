"""Headers of safetensors and GGUF files: read as the formats say, or refused by name."""

import json
import re
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from tiny import DOWN

from wdlib import WdlibError
from wdlib.checkpoints import catalogue, files, stream
from wdlib.checkpoints.headers import gguf_header
from wdlib.checkpoints.plan import inventory


def test_gguf_header_is_the_one_of_gguf_reader(tmp_path):
    tensors = tiny.gguf_tensors(6) | tiny.gguf_surroundings(6)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "llama", tensors)
    same_header(path)


def test_gguf_header_of_the_default_model():
    """The real file, with its tokenizer of 49,152 entries."""
    (path,) = files.resolve(catalogue.DEFAULT).files
    same_header(path)
    entries = inventory(catalogue.DEFAULT)
    assert len(entries) == 7 * 30
    assert {e.dtype for e in entries} == {"Q4_1"}
    assert {e.shape for e in entries if e.type == "k"} == {(192, 576)}
    first = next(stream.projections(catalogue.DEFAULT))
    assert 0.01 < first.matrix.std() < 1


def same_header(path: Path) -> None:
    metadata, table = gguf_header(path)
    reader = gguf.GGUFReader(path)
    assert list(table) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = table[tensor.name]
        assert mine.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (mine.offset, mine.size) == (tensor.data_offset, tensor.n_bytes)
        assert mine.dtype == tensor.tensor_type.name
    fields = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert metadata.keys() == fields.keys()
    for key, field in fields.items():
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        is_short = is_array and len(field.data) <= 1024
        is_text = gguf.GGUFValueType.STRING in field.types
        skipped = is_array and (is_text or not is_short)
        assert metadata[key] == (None if skipped else field.contents())


# What cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_truncated_safetensors(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WdlibError, match=r"model\.safetensors is truncated"):
        inventory(llama)


def change_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length].decode())
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[8 + length :])


def edit(name: str, **fields):
    def change(header):
        table = json.loads(header)
        table[name] |= fields
        return json.dumps(table)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.replace("{", "[", 1), "header of .* is corrupt"),
        (lambda h: h.replace("data_offsets", "dataoffsets"), "header of .* is corrupt"),
        (edit(DOWN, data_offsets=[0, 8]), f"corrupt: the tensor {re.escape(DOWN)} .* has 8 bytes"),
        (edit(DOWN, shape=[32, 47]), f"corrupt: the tensor {re.escape(DOWN)} of shape"),
        (edit(DOWN, shape=[-32, -48]), "corrupt"),
        (
            edit(DOWN, data_offsets=[10**9, 10**9 + 6144]),
            f"truncated: the tensor {re.escape(DOWN)}",
        ),
        (edit(DOWN, dtype="F8_E4M3"), "header of .* is corrupt"),
        (edit(DOWN, dtype="X7"), "header of .* is corrupt .*X7"),
        (edit(DOWN, dtype=7), "header of .* is corrupt"),
        (edit(DOWN, shape=["32", "48"]), "header of .* is corrupt"),
        (edit(DOWN, shape=[32.0, 48.0]), "header of .* is corrupt"),
        (edit(DOWN, dtype="I32"), f"{re.escape(DOWN)} .* is stored as I32, quantised by a tool"),
    ],
)
def test_damaged_safetensors_headers(llama, change, message):
    change_header(llama / "model.safetensors", change)
    with pytest.raises(WdlibError, match=message):
        stream.projections(llama)


def test_a_type_that_is_no_float_is_named(llama):
    tiny.rewrite(llama, lambda tensors: tensors | {DOWN: tensors[DOWN].astype(np.uint8)})
    with pytest.raises(WdlibError, match=rf"{re.escape(DOWN)} .* is stored as U8"):
        stream.projections(llama)


def test_a_file_without_its_configuration(saved, tmp_path):
    for name in ("llama", "phi3", "gpt2", "gpt-neox"):
        shutil.copy(saved(name)[0] / "model.safetensors", tmp_path / f"{name}.safetensors")
    assert len(inventory(tmp_path / "llama.safetensors")) == 14
    for name in ("phi3", "gpt2", "gpt-neox"):
        with pytest.raises(WdlibError, match=r"put the model's config\.json beside the file"):
            inventory(tmp_path / f"{name}.safetensors")


def test_a_configuration_that_does_not_fit(saved, tmp_path):
    folder = Path(shutil.copytree(saved("phi3")[0], tmp_path / "phi3"))
    config = folder / "config.json"
    config.write_text(
        json.dumps({"model_type": "phi3", "num_attention_heads": 5, "num_key_value_heads": 3})
    )
    with pytest.raises(WdlibError, match=r"qkv_proj.* has 64 rows, which does not fit 5"):
        inventory(folder)
    config.write_text("no json")
    with pytest.raises(WdlibError, match=r"config\.json is not a model's configuration"):
        inventory(folder)


@pytest.fixture
def tiny_gguf(tmp_path):
    return tiny.write_gguf(tmp_path / "tiny.gguf", "llama", tiny.gguf_tensors(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:10], "truncated or no GGUF file"),
        (lambda raw: b"GGML" + raw[4:], "does not begin with GGUF"),
        (lambda raw: raw[:4] + b"\1" + raw[5:], "version 1 of the GGUF format"),
        (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "little-endian"),
        (lambda raw: raw[:300], "header of .* is truncated or corrupt"),
        (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "header of .* is truncated or corrupt"),
        (lambda raw: raw[:8] + b"\xff" * 16 + raw[24:], "header of .* is truncated or corrupt"),
        (lambda raw: raw[:-2000], r"truncated: the tensor blk\.1\.ffn_"),
        (
            lambda raw: raw.replace(struct.pack("<Q", 10) + b"token 0", b"\xff" * 15),
            "header of .* is truncated or corrupt",
        ),
    ],
)
def test_damaged_gguf(tiny_gguf, change, message):
    tiny_gguf.write_bytes(change(tiny_gguf.read_bytes()))
    with pytest.raises(WdlibError, match=message):
        inventory(tiny_gguf)


def test_gguf_that_is_one_part_of_several(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WdlibError, match="says that it is part 1 of 3: .*llama-gguf-split --merge"):
        inventory(tmp_path / "part.gguf")
