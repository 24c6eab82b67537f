"""Headers that contradict themselves or their configuration are refused, as their libraries do."""

import json
import struct

import numpy as np
import pytest
import tiny
from safetensors import SafetensorError, safe_open

from wdlib import WdlibError
from wdlib.checkpoints import files, headers, listing
from wdlib.checkpoints.plan import inventory
from wdlib.spectra import jobs


def parts(path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header: str | dict, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def overlap(header, data):
    q, k = (f"model.layers.0.self_attn.{t}_proj.weight" for t in "kv")
    header[q]["data_offsets"] = header[k]["data_offsets"]
    return header, data


def hole(header, data):
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [n + 64 for n in header[last]["data_offsets"]]
    return header, data + bytes(64)


def shifted(header, data):
    for item in header.values():
        item["data_offsets"] = [n + 4 for n in item["data_offsets"]]
    return header, data + bytes(4)


def surplus(header, data):
    return header, data + bytes(8)


def twice(header, data):
    name, item = next(iter(header.items()))
    text = json.dumps(header)
    return f'{text[:-1]}, "{name}": {json.dumps(item)}}}', data


@pytest.mark.parametrize("change", [overlap, hole, shifted, surplus, twice])
def test_a_header_that_contradicts_itself_is_refused(change, tmp_path):
    path = tiny.write_llama(tmp_path / "toy") / "model.safetensors"
    header, data = parts(path)
    header.pop("__metadata__", None)
    write(path, header, data)
    assert headers.safetensors_header(path)
    write(path, *change(*parts(path)))
    with pytest.raises(WdlibError, match="corrupt"):
        headers.safetensors_header(path)
    if change is not twice:  # of which the format's library takes the last
        with pytest.raises(SafetensorError), safe_open(path, "numpy") as file:
            file.keys()


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:  # sparse: it takes no room
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(WdlibError, match="no safetensors file"):
        headers.safetensors_header(path)


def configure(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("number", "message"), [(1, "holds a layer 1"), (10**9, "no layer 2")])
def test_a_number_of_layers_that_is_anothers_is_refused(number, message, tmp_path):
    folder = tiny.write_llama(tmp_path / "toy")
    configure(folder, num_hidden_layers=number)
    with pytest.raises(WdlibError, match=message):
        inventory(folder)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    folder = tiny.write_llama(tmp_path / "toy", layers=3)
    configure(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    assert {entry.layer for entry in inventory(folder)} == {0, 1}


def test_an_index_names_files_of_its_own_folder_alone(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(WdlibError, match="elsewhere"):
        files.shards(index)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = tiny.write_llama(tmp_path / "toy")
    first = (folder / "model.safetensors").rename(folder / "first.safetensors")
    (folder / "other.safetensors").write_bytes(first.read_bytes())
    weight_map = {"a": first.name, "b": "other.safetensors"}
    (folder / listing.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WdlibError, match=r"files of toy hold model\.\S+ twice"):
        inventory(folder)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10**5])
def test_an_index_that_names_no_files_is_refused(content, tmp_path):
    (tmp_path / listing.INDEX).write_text(content)
    with pytest.raises(WdlibError, match=r"index\.json is corrupt"):
        files.resolve(tmp_path)


@pytest.mark.parametrize(
    "given",
    [{"num_attention_heads": "4"}, {"num_hidden_layers": 2.0}, {"num_hidden_layers": -2},
     {"num_attention_heads": 0}, {"model_type": ["llama"]}, {"num_key_value_heads": True}],
)  # fmt: skip
def test_a_configuration_of_other_types_is_refused(given, tmp_path):
    folder = tiny.write_llama(tmp_path / "toy")
    configure(folder, **given)
    with pytest.raises(WdlibError, match=r"config\.json (says that|is not a model)"):
        inventory(folder)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WdlibError, match="no model, file or folder"):
        files.resolve(tmp_path / "model.safetensors")


def test_a_home_that_is_not_there_is_a_sentence():
    with pytest.raises(WdlibError, match="names no folder"):
        files.resolve("~nobody-of-this-name/model")


# What decides the numbers decides what they are kept by ---------------------------------------


def test_another_configuration_is_another_reading(tmp_path):
    folder = tiny.write_llama(tmp_path / "toy")
    before = files.resolve(folder)
    keys = files.reading_key(before), files.listing_key(before)
    configure(folder, num_attention_heads=1)
    after = files.resolve(folder)
    assert files.content_hash(after) == files.content_hash(before)
    assert files.reading_key(after) != keys[0]
    assert files.listing_key(after) != keys[1]


@pytest.mark.parametrize("scale", [1.0, 1e-60, 1e296])
def test_float64_is_read_as_float64(scale, tmp_path):
    folder = tiny.write_llama(tmp_path / "toy")
    rng = np.random.default_rng(0)

    def wide(tensors):
        return {name: rng.standard_normal(t.shape) * scale for name, t in tensors.items()}

    tiny.rewrite(folder, wide)
    matrices = tiny.read(folder)
    found = jobs.compute(folder, 8)
    for (layer, kind, _), matrix in matrices.items():
        assert matrix.dtype == np.float64
        exact = np.linalg.svd(matrix / scale, compute_uv=False)[:8] * scale
        off = np.abs(found.values[kind][layer] - exact)
        assert (off <= found.error[kind][layer] + 1e-15 * exact[0]).all()
        assert (off < 1e-12 * exact[0]).all()
