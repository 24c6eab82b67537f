"""Attacks on what a model comes as: safetensors, their index and configuration, GGUF, the hub."""

import json
import os
import re
import time
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import tiny
from fuzz.engine import Kind
from fuzz.mutations import INTEGERS, as_json, flipped
from fuzz.schemas import conform
from gguf import GGUFReader, GGUFValueType, dequantize
from huggingface_hub import constants, set_client_factory
from safetensors import deserialize
from safetensors.numpy import save, save_file
from tiny_hub import COMMIT

from wdlib.checkpoints import files, headers, hub, listing

# Safetensors ------------------------------------------------------------------------------------

WHOLE = "model.safetensors"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def make_safetensors(folder: Path) -> Path:
    """Two layers in float32, and beside them tensors of other types and shapes."""
    others = {"a.scalar": np.array(3, np.int64), "b.none": np.ones((0, 4), np.float16)}
    others |= {"c.flags": np.array([True, False]), "model.norm.weight": np.ones(8, np.float64)}
    tiny.write_llama(folder, hidden=8)
    tiny.rewrite(folder, lambda tensors: tensors | others)
    return folder / WHOLE


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, content = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(10):
        case 0:
            return flipped(rng, data)
        case 1:
            number = rng.choice((*INTEGERS, length + rng.randrange(-9, 9))) % 2**64
            return number.to_bytes(8, "little") + data[8:]
        case 2:
            header = flipped(rng, header)
        case 3 | 4:
            header = _moved(rng, header)
        case _:
            header = as_json(rng, header)
    return len(header).to_bytes(8, "little") + header + content


def _moved(rng: Random, header: bytes) -> bytes:
    """Names, types, shapes or places of two tensors exchanged or changed alike."""
    table = json.loads(header)
    one, other = rng.sample([name for name in table if name != "__metadata__"], 2)
    match rng.randrange(5):
        case 0:
            table[one], table[other] = table[other], table[one]
        case 1:
            table[one]["data_offsets"] = table[other]["data_offsets"]
        case 2:
            table[one]["dtype"] = rng.choice(
                ("F64", "F32", "F16", "BF16", "I32", "U8", "F8_E4M3", "f32", "F4", "C64", "")
            )
        case 3:
            table[one]["shape"] = rng.choice(
                (table[one]["shape"][::-1], [2**40, 2**40], [0, 2**63], [1] * 1000, [-8, -8], [])
            )
        case _:
            table[one]["data_offsets"] = [n + rng.choice((-4, 4, 8)) for n in (0, 256)]
    return json.dumps(table).encode()


def read_header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {
        name: (t.dtype, list(t.shape), data[t.offset : t.offset + t.size])
        for name, t in headers.safetensors_header(path).items()
    }


def library_header(path: Path) -> dict[str, Any]:
    """By the safetensors library, whole."""
    found = dict(deserialize(path.read_bytes()))
    return {n: (t["dtype"], list(t["shape"]), bytes(t["data"])) for n, t in found.items()}


def library_weights(path: Path) -> dict[tuple, np.ndarray]:
    """The matrices of a Llama by the library: those of the two layers, and no others."""
    found = {}
    for name, (dtype, shape, data) in library_header(path).items():
        for layer in (0, 1):
            for kind in tiny.LLAMA_NAMES:
                if name == tiny.llama_name(layer, kind):
                    values = _values(dtype, data).reshape(shape)
                    found[layer, kind, None] = values
                    if values.ndim != 2 or not np.isfinite(values).all():
                        raise ValueError("no matrix of numbers")
    return found


def _values(dtype: str, data: bytes) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    values = np.frombuffer(data, DTYPES[dtype])
    return values if dtype == "F64" else values.astype(np.float32)


# Index and configuration ------------------------------------------------------------------------


def make_index(folder: Path) -> Path:
    """The same in two files, with the index that joins them."""
    tiny.write_llama(folder, hidden=8)
    tensors, where = tiny.llama_tensors(hidden=8), {}
    (folder / WHOLE).unlink(missing_ok=True)
    for number in (0, 1):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = {n: t for n, t in tensors.items() if f"layers.{number}." in n}
        where |= dict.fromkeys(part, name)
        save_file(part, folder / name)
    index = folder / listing.INDEX
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def library_index(path: Path) -> Any:
    """All files that it names, each by the library."""
    content = conform(path, {"weight_map": {str: str}}, more=True)
    found: dict[tuple, np.ndarray] = {}
    for name in set(content["weight_map"].values()):
        if "/" in name:
            raise ValueError("elsewhere")
        found |= library_weights(path.parent / name)
    return found


NEOX = {
    "query_key_value": (48, 16), "dense": (16, 16), "dense_h_to_4h": (64, 16),
    "dense_4h_to_h": (16, 64),
}  # fmt: skip


def make_config(folder: Path) -> Path:
    """A GPT-NeoX, whose joined matrices are split by the number of heads that the file says."""
    rng = np.random.default_rng(0)
    tensors = {
        f"gpt_neox.layers.{layer}.{'attention' if i < 2 else 'mlp'}.{name}.weight": (
            rng.standard_normal(shape).astype(np.float32)
        )
        for layer in (0, 1)
        for i, (name, shape) in enumerate(NEOX.items())
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WHOLE)
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 16,
        "num_attention_heads": 4, "num_hidden_layers": 2, "rope_scaling": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def library_config(path: Path) -> dict[tuple, np.ndarray]:
    """The split as GPT-NeoX's own code makes it: per head, its q, k and v."""
    config = conform(path, {}, more=True)
    if isinstance(inner := config.get("text_config") or config, dict):
        config = inner
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    shared = _first(config, "num_key_value_heads") or heads
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
    extra = _first(config, "num_nextn_predict_layers", "num_mtp_layers") or 0
    model_type = config.get("model_type")
    if type(heads) is not int or type(shared) is not int or not 1 <= heads == shared or 16 % heads:
        raise ValueError("heads")
    if (layers is not None and type(layers) is not int) or type(extra) is not int or extra < 0:
        raise ValueError("layers")
    if not (model_type is None or isinstance(model_type, str)):
        raise ValueError("model_type")
    shown = 2 if layers is None else layers
    if shown < 1 or shown > 2 or shown + extra < 2:
        raise ValueError("layers")
    found = {}
    for name, (dtype, shape, data) in library_header(path.parent / WHOLE).items():
        layer, end = int(name.split(".")[2]), name.split(".")[-2]
        if layer >= shown:
            continue
        matrix = _values(dtype, data).reshape(shape)
        if end == "query_key_value":
            parts = matrix.reshape(heads, 3, -1, 16)
            for i, kind in enumerate("qkv"):
                found[layer, kind, None] = np.ascontiguousarray(parts[:, i]).reshape(16, 16)
        else:
            kind = {"dense": "o", "dense_h_to_4h": "up", "dense_4h_to_h": "down"}[end]
            found[layer, kind, None] = matrix
    return found


def _first(config: dict[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


# GGUF -------------------------------------------------------------------------------------------


def make_gguf(folder: Path) -> Path:
    """Two layers of a Llama, k as Q8_0, with a small vocabulary."""
    from gguf import GGMLQuantizationType, quants

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = tiny.gguf_tensors(0) | {"output_norm.weight": np.ones(32, np.float32)}
    for layer in (0, 1):
        name = tiny.gguf_name(layer, "k")
        kind = GGMLQuantizationType.Q8_0
        tensors[name] = (quants.quantize(tensors[name], kind), kind)
    return tiny.write_gguf(folder / "model.gguf", "llama", tensors)


_parts: dict[int, list[tuple[int, int, bool]]] = {}


def _fields(data: bytes) -> list[tuple[int, int, bool]]:
    """Where the header's numbers and texts lie, by gguf: (offset, size, is a number)."""
    if len(data) not in _parts:
        path = Path(f"/proc/self/fd/{_memory_file(data)}")
        reader = GGUFReader(path)
        base = reader.data.__array_interface__["data"][0]
        fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
        _parts[len(data)] = [
            (
                part.__array_interface__["data"][0] - base,
                part.nbytes,
                part.dtype.kind in "iu" and part.nbytes > 1,
            )
            for field in fields
            for part in field.parts
        ]
    return _parts[len(data)]


def _memory_file(data: bytes) -> int:
    file = os.memfd_create("gguf")
    os.write(file, data)
    return file


def mutate_gguf(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return flipped(rng, data)
    out, fields = bytearray(data), _fields(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size, number = rng.choice(fields)
        held = int.from_bytes(out[at : at + size], "little")
        if not number and rng.random() < 0.5:
            out[at : at + size] = rng.randbytes(size)
        elif rng.random() < 0.3:
            other, width, _ = rng.choice(fields)
            out[at : at + size] = out[other : other + width][:size].ljust(size, b"\0")
        else:
            new = rng.choice((*INTEGERS, held + 1, held - 1, held * 2, held // 2, held + 32))
            out[at : at + size] = (new % 256**size).to_bytes(size, "little")
    return bytes(out)


def read_gguf(path: Path) -> Any:
    metadata, tensors = headers.gguf_header(path)
    data = path.read_bytes()
    table = {
        name: (t.dtype, list(t.shape), data[t.offset : t.offset + t.size])
        for name, t in tensors.items()
    }
    return {k: v for k, v in metadata.items() if v not in (None, [])}, table


def library_gguf(path: Path) -> Any:
    """By the gguf library; its own names for a file's version and counts are left out."""
    reader = GGUFReader(path)
    metadata = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            numbers = len(field.types) == 2 and field.types[1] != GGUFValueType.STRING
            if numbers and len(field.data) <= headers._PER_LAYER:
                metadata[name] = [field.parts[index][0].item() for index in field.data]
            continue
        value = field.parts[field.data[0]]
        text = field.types[0] == GGUFValueType.STRING
        metadata[name] = bytes(value).decode("utf-8", "replace") if text else value[0].item()
    table = {
        t.name: (t.tensor_type.name, t.shape.tolist()[::-1], t.data.tobytes())
        for t in reader.tensors
    }
    return metadata, table


def library_gguf_weights(path: Path) -> dict[tuple, np.ndarray]:
    """Dequantised by the library; q and k of architecture "llama" with their rows put back."""
    metadata, _ = library_gguf(path)
    architecture = metadata.get("general.architecture")

    def number(key: str) -> int:
        value = metadata[f"{architecture}.{key}"]
        if type(value) is not int or value < 1:
            raise ValueError(key)
        return value

    found = {}
    for tensor in GGUFReader(path).tensors:
        for layer in (0, 1):
            for kind in tiny.GGUF_NAMES:
                if tensor.name == tiny.gguf_name(layer, kind):
                    matrix = dequantize(tensor.data, tensor.tensor_type)
                    if architecture == "llama" and kind in "qk":
                        heads = number("attention.head_count")
                        key = "attention.head_count_kv"
                        if kind == "k" and f"llama.{key}" in metadata:
                            heads = number(key)
                        matrix = matrix.reshape(heads, -1, 2, 32).swapaxes(1, 2).reshape(-1, 32)
                    found[layer, kind, None] = np.ascontiguousarray(matrix)
    if f"{architecture}.block_count" in metadata and number("block_count") == 1:
        return {key: matrix for key, matrix in found.items() if key[0] == 0}
    return found


# The hub ----------------------------------------------------------------------------------------

_files: dict[str, bytes] = {}


def make_hub(folder: Path) -> Path:
    """All that a hub answers to a reading of two matrices, in one JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    _files[WHOLE] = save(tiny.llama_tensors(1, 8))
    _files["config.json"] = json.dumps({"model_type": "llama", "num_hidden_layers": 1}).encode()
    siblings = [
        {
            "rfilename": name,
            "size": len(data),
            "lfs": {"sha256": tiny.sha256(data), "size": len(data), "pointerSize": 1},
        }
        for name, data in _files.items()
    ]
    answers = {
        "info": {"status": 200, "headers": {"Content-Type": "application/json"},
                 "body": {"id": "lab/tiny", "sha": COMMIT, "siblings": siblings}},
        "range": {"status": 206, "headers": {"ETag": '"one"', "Content-Type": "binary"},
                  "shift": 0, "cut": 0},
        "fault": {"status": 429, "headers": {"Retry-After": "1", "ratelimit": '"api";r=0;t=2'},
                  "every": 0},
    }  # fmt: skip
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder / "answers.json"


def read_hub(path: Path) -> Any:
    """The matrices and names of a model on a hub whose answers the file holds."""
    text = path.read_bytes()
    try:
        answers = json.loads(text)
    except (ValueError, RecursionError):
        answers = {"info": {"body": text}}
    asked = [0]

    def part(name: str) -> dict[str, Any]:
        found = answers.get(name) if isinstance(answers, dict) else answers
        return found if isinstance(found, dict) else {"body": found}

    def answer(request: httpx.Request) -> httpx.Response:
        asked[0] += 1
        fault = part("fault")
        if (every := fault.get("every")) and isinstance(every, int) and asked[0] % every == 0:
            return _response(fault, fault.get("body", b"{}"))
        if request.url.path.startswith("/api/"):
            return _response(part("info"), part("info").get("body"))
        name, given = request.url.path.rsplit("/", 1)[-1], part("range")
        span = re.fullmatch(r"bytes=(\d+)-(-?\d+)", request.headers["Range"])
        if span is None or name not in _files:
            return httpx.Response(404)
        shift, cut = (given.get(k, 0) if type(given.get(k)) is int else 0 for k in ("shift", "cut"))
        first, last = int(span[1]) + shift, int(span[2]) + shift
        usual = {"Content-Range": f"bytes {first}-{last}/{len(_files[name])}"}
        body = _files[name][max(0, first) : last + 1][: cut or None]
        return _response(given, given.get("body", body), usual)

    def waited(seconds: float) -> None:
        if not 0 <= seconds <= hub.PATIENCE.longest:
            raise ValueError(f"a wait of {seconds} s")

    constants.ENDPOINT = "https://hub.test"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = (
        "https://hub.test/{repo_id}/resolve/{revision}/{filename}"
    )
    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    real, time.sleep = time.sleep, waited
    try:
        return tiny.read("hf://lab/tiny", types=["q", "down"])
    finally:
        time.sleep = real


def _response(given: dict[str, Any], body: Any, usual: dict | None = None) -> httpx.Response:
    status = given.get("status")
    valid = type(status) is int and 100 <= status <= 599
    content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "replace")
    named = given.get("headers")
    lines = {**(usual or {}), **(named if isinstance(named, dict) else {})}
    sent = [
        (k.encode("ascii", "replace"), str(v).encode("utf-8", "replace")) for k, v in lines.items()
    ]
    stream = httpx.ByteStream(content)
    return httpx.Response(status if valid else 200, headers=sent, stream=stream)


def library_hub(path: Path) -> Any:
    """Only what the files hold is right."""
    return {
        (0, kind, None): tiny.llama_tensors(1, 8)[tiny.llama_name(0, kind)]
        for kind in ("q", "down")
    }


# Names ------------------------------------------------------------------------------------------


def make_name(folder: Path) -> Path:
    tiny.write_llama(folder / "toy", hidden=8)
    (folder / "name.json").write_text(json.dumps({"model": "toy"}))
    return folder / "name.json"


def mutate_name(rng: Random, data: bytes) -> bytes:
    """Odd texts, none of which is a hub's name: the network is not asked."""
    odd = (
        "x" * 300,
        "x" * 70_000,
        "a\0b",
        "~nobody-of-this-name",
        "\udcff",
        "",
        ".",
        "/",
        "\x1b[2J",
        "toy/",
        "./toy",
        "../toy",
        "TOY",
    )
    joined = "".join(rng.choice((*odd, "toy")) for _ in range(rng.choice((1, 2))))
    return json.dumps({"model": joined}).encode()


def read_name(path: Path) -> Any:
    os.chdir(path.parent)
    name = json.loads(path.read_bytes())["model"]
    return "" if files._HUB_ID.fullmatch(name) and not os.path.isdir(name) else tiny.read(name)


def library_name(path: Path) -> Any:
    name = json.loads(path.read_bytes())["model"]
    if files._HUB_ID.fullmatch(name) and not os.path.isdir(name):
        return ""
    at = [folder / WHOLE for folder in (Path(name), *sorted(Path(name).glob("*/")))]
    at = [file for file in at if file.is_file()]
    if len(at) != 1 and at[:1] != [Path(name) / WHOLE]:
        raise FileNotFoundError(name)
    return library_weights(at[0])


def _folder(path: Path) -> Any:
    return tiny.read(path.parent)


KINDS = (
    Kind(
        "safetensors: table", make_safetensors, mutate_safetensors, read_header, library_header, 400
    ),
    Kind(
        "safetensors: weights", make_safetensors, mutate_safetensors, _folder, library_weights, 200
    ),
    Kind("safetensors: index", make_index, as_json, _folder, library_index, 200),
    Kind("config.json", make_config, as_json, _folder, library_config, 200),
    Kind("GGUF: header", make_gguf, mutate_gguf, read_gguf, library_gguf, 300),
    Kind("GGUF: weights", make_gguf, mutate_gguf, tiny.read, library_gguf_weights, 200),
    Kind("names of models", make_name, mutate_name, read_name, library_name, 100),
    Kind("hub: answers", make_hub, as_json, read_hub, library_hub, 200),
)
