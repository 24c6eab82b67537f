"""Checkpoints as people have them: whole models quantised, split, sharded, and not to be read."""

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Quant
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wdlib import WdlibError
from wdlib.checkpoints import companions, files, formats, quantised, stream
from wdlib.checkpoints.headers import gguf_header, read_headers, safetensors_header
from wdlib.checkpoints.plan import inventory
from wdlib.spectra import jobs

Tensors = dict[str, torch.Tensor]


def requantised(folder: Path, other: Path, change: Callable, settings: Mapping) -> Path:
    """A copy of a checkpoint with its projections quantised.

    change: (name without ".weight", matrix) -> what is stored in its place.
    """
    shutil.copytree(folder, other)
    found: Tensors = {}
    for name, tensor in load_file(other / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_projection = tensor.ndim == 2 and not re.search("embed|head|wte|wpe", name)
        found |= change(module, tensor) if is_projection else {name: tensor}
    save_file({key: t.contiguous() for key, t in found.items()}, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return other


def fp8(module: str, matrix: torch.Tensor) -> Tensors:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    codes = (matrix / scale).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def nf4(module: str, matrix: torch.Tensor) -> Tensors:
    """As bitsandbytes stores it, in blocks of 64 that go on over rows; codes by the nearest."""
    levels = torch.linspace(-1, 1, 16)
    blocks = matrix.reshape(-1, 64)
    scale = blocks.abs().amax(1)
    codes = (blocks / scale[:, None])[..., None].sub(levels).abs().argmin(-1).to(torch.uint8)
    pairs = codes.reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [*matrix.shape]}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        f"{module}.weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        f"{module}.weight.absmax": scale,
        f"{module}.weight.quant_map": levels,
        f"{module}.weight.quant_state.bitsandbytes__nf4": text,
    }


def gptq(module: str, matrix: torch.Tensor) -> Tensors:
    """8 bits, one group, as AutoGPTQ packs them: word by word from the lowest bits on."""
    scale = matrix.abs().amax(1) / 127
    codes = (matrix / scale[:, None]).round().int() + 128
    words = codes.T.reshape(-1, 4, len(matrix)).to(torch.uint8).permute(0, 2, 1).contiguous()
    return {
        f"{module}.qweight": words.view(torch.int32)[..., 0],
        f"{module}.qzeros": torch.full((1, len(matrix) // 4), 0x7F7F7F7F, dtype=torch.int32),
        f"{module}.scales": scale[None],
        f"{module}.g_idx": torch.zeros(matrix.shape[1], dtype=torch.int32),
    }


def transposed(change: Callable) -> Callable:
    """A Conv1D is (inputs, outputs), and is turned around before it is quantised."""
    return lambda module, matrix: change(module, matrix.T.contiguous())


FP8, GPTQ = {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 8}
WHOLE = {
    "llama, FP8": ("llama", fp8, FP8, "FP8 E4M3 1x", 0.07),
    "llama, NF4": ("llama", nf4, {}, "NF4 (bitsandbytes)", 0.14),
    "llama, GPTQ": ("llama", gptq, GPTQ, "GPTQ 8-bit", 0.008),
    "phi3, FP8": ("phi3", fp8, FP8, "FP8 E4M3 1x", 0.07),
    "phi3, NF4": ("phi3", nf4, {}, "NF4 (bitsandbytes)", 0.14),
    "phi3, GPTQ": ("phi3", gptq, GPTQ, "GPTQ 8-bit", 0.008),
    "gpt-neox, GPTQ": ("gpt-neox", gptq, GPTQ, "GPTQ 8-bit", 0.008),
    "gpt2, GPTQ": ("gpt2", transposed(gptq), GPTQ, "GPTQ 8-bit", 0.008),
    "gpt2, NF4": ("gpt2", transposed(nf4), {}, "NF4 (bitsandbytes)", 0.14),
}
"""Architecture, how it is quantised, configuration, what is told of it, largest relative error."""


@pytest.mark.parametrize("name", WHOLE)
def test_a_quantised_model_has_the_matrices_of_the_model(name, saved, tmp_path, monkeypatch):
    """Fused, by heads, transposed: each is near the unquantised one, row by row."""
    architecture, change, settings, told, error = WHOLE[name]
    folder = requantised(saved(architecture)[0], tmp_path / "other", change, settings)
    exact, entries = tiny.read(saved(architecture)[0]), inventory(folder)
    unquantised = inventory(saved(architecture)[0])
    assert [(e.place, e.name, e.shape) for e in entries] == [
        (e.place, e.name, e.shape) for e in unquantised
    ]
    assert {e.dtype.rstrip("0123456789") for e in entries} == {told.rstrip("0123456789")}
    asked = []
    real = formats.read_rows

    def counted(tensor, first, count):
        raw = real(tensor, first, count)
        asked.append(raw.nbytes)
        return raw

    monkeypatch.setattr(formats, "read_rows", counted)
    found = tiny.read(folder)
    monkeypatch.undo()
    assert found.keys() == exact.keys()
    for key, matrix in exact.items():
        assert np.abs(found[key] - matrix).max() < error * np.abs(matrix).max()
    stored = sum(t.size for t in quantised_of(folder))
    assert sum(asked) <= 1.05 * stored


def quantised_of(folder: Path) -> list[quantised.QuantisedTensor]:
    tensors = {part.tensor.name: part.tensor for part in stream.projection_parts(folder)}
    return [t for t in tensors.values() if isinstance(t, quantised.QuantisedTensor)]


def test_results_say_how_the_weights_are_stored(saved, tmp_path):
    folder = requantised(saved("llama")[0], tmp_path / "other", gptq, GPTQ)
    assert jobs.compute(folder, 4).provenance["quantisation"] == "GPTQ 8-bit"


def test_the_configuration_of_the_quantiser_decides_what_is_kept(saved, tmp_path):
    """It is in config.json, which is part of the key: here, it moves every zero by one."""
    folder = requantised(saved("llama")[0], tmp_path / "other", gptq, GPTQ)
    before, key = tiny.read(folder), files.reading_key(files.resolve(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    after = tiny.read(folder)
    assert all((after[place] != before[place]).all() for place in before)
    assert files.reading_key(files.resolve(folder)) != key


def test_gpt_oss_in_mxfp4_has_the_matrices_of_its_unquantised_form(tmp_path):
    """Experts in one tensor, inputs before outputs, gate and up in turns."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(12)
    GptOssForCausalLM(GptOssConfig(**sizes, **heads, **experts)).save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "mxfp4")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed = dict(plain)
    for name in [n for n in plain if re.fullmatch(r".*experts\.(gate_up|down)_proj", n)]:
        number, inputs, outputs = packed.pop(name).shape
        blocks = torch.randint(0, 256, (number, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for form, tensors in (("plain", plain), ("mxfp4", packed)):
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, tmp_path / form / "model.safetensors"
        )
    expected = tiny.read(tmp_path / "plain")
    assert same(tmp_path / "mxfp4", expected)
    assert (1, "gate", 2) in expected
    told = {e.dtype for e in inventory(tmp_path / "mxfp4") if e.expert is not None}
    assert told == {"MXFP4"}


# What is not read -----------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
BYTES = torch.zeros(8, 8, dtype=torch.uint8)
WORDS = torch.zeros(8, 8, dtype=torch.int32)
HALVES = torch.ones(8, 8).half()
CODES = torch.ones(8, 8).to(torch.float8_e4m3fn)

FOREIGN = {
    "MLX": ({"weight": WORDS.view(torch.uint32), "scales": HALVES, "biases": HALVES}, {}),
    "HQQ": ({"W_q": BYTES, "scale": HALVES, "zero": HALVES}, {"quant_method": "hqq"}),
    "torchao": ({"_weight_qdata": BYTES, "_weight_scale": HALVES}, {"quant_method": "torchao"}),
    "EETQ": ({"weight": BYTES.view(torch.int8), "weight_scales": HALVES[0]}, {}),
    "AQLM": ({"codes": BYTES, "codebooks": HALVES, "scales": HALVES}, {"quant_method": "aqlm"}),
    "BitNet": ({"weight": BYTES, "weight_scale": HALVES[0, :1]}, {"quant_method": "bitnet"}),
    "Quanto": ({"weight._data": BYTES, "weight._scale": HALVES}, {"quant_method": "quanto"}),
    "ExLlamaV2": ({"q_weight": WORDS, "q_scale": WORDS, "q_groups": WORDS}, {}),
    "ExLlamaV3": ({"trellis": WORDS, "suh": HALVES, "svh": HALVES}, {}),
    "VPTQ": ({"indices": WORDS, "centroids.weight": HALVES}, {"quant_method": "vptq"}),
    "HIGGS": ({"weight": BYTES, "scales": HALVES, "tables": HALVES}, {}),
    "compressed-tensors with sparsity": ({"bitmask": BYTES, "compressed": HALVES}, {}),
    "a tool that its files do not name": ({"weight": BYTES}, {}),
    "newquant": ({"weight": WORDS}, {"quant_method": "newquant"}),
}
"""Tool -> what it stores for a matrix, and its quantization_config."""

TRIPLE = {"qweight": WORDS, "qzeros": WORDS[:1, :1], "scales": HALVES[:1]}

ODD = {
    r"packed as marlin": (TRIPLE, {"quant_method": "gptq", "checkpoint_format": "marlin"}),
    r"qzeros of shape \(1, 1\) and .* does not fit its codes of shape \(8, 8\)": (
        {**TRIPLE, "g_idx": WORDS[0]},
        {"quant_method": "gptq"},
    ),
    r"packed as gemv": ({"qweight": WORDS}, {"quant_method": "awq", "version": "gemv"}),
    r"qzeros of shape \(1, 3\)": (
        {"qweight": WORDS, "qzeros": WORDS[:1, :3], "scales": HALVES[:1]},
        {"quant_method": "gptq"},
    ),
    r"config\.json beside the file": ({"qweight": WORDS}, {}),
    r"weight_scale of shape \(3, 3\) does not fit": (
        {"weight": CODES, "weight_scale": HALVES[:3, :3]},
        {},
    ),
    r"pre_quant_scale beside it changes its values": (
        {"weight": CODES, "weight_scale": HALVES[:1, :1], "pre_quant_scale": HALVES[0]},
        {},
    ),
    r"q_proj\.odd_scale beside it changes": ({"weight": CODES, "odd_scale": HALVES[0]}, {}),
    r"weight_scale beside it changes its values": (
        {"weight": HALVES, "weight_scale": HALVES[0]},
        {},
    ),
    r"weight_packed is packed in a way": ({"weight_packed": WORDS}, {}),
    r"quant_state with its shape is not there": (
        {"weight": BYTES, "weight.absmax": HALVES[0], "weight.quant_map": HALVES[0]},
        {},
    ),
}
"""What is said -> what is stored for a matrix, and its quantization_config."""


def with_query(folder: Path, stored: Tensors, settings: Mapping) -> Path:
    """Store the query of the first layer otherwise."""
    path = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if name != f"{Q}.weight"}
    tensors |= {f"{Q}.{part}": tensor.clone() for part, tensor in stored.items()}
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("tool", FOREIGN)
def test_what_other_tools_wrote_is_refused_by_their_names(tool, llama):
    message = rf"{Q}\.weight of .* is not read, because it is .*quantised by {tool}: use the un"
    with pytest.raises(WdlibError, match=message):
        inventory(with_query(llama, *FOREIGN[tool]))


@pytest.mark.parametrize("message", ODD)
def test_what_does_not_fit_is_refused(message, llama):
    with pytest.raises(WdlibError, match=rf"{Q}\.weight of .* is not read, because .*{message}"):
        inventory(with_query(llama, *ODD[message]))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("auto-gptq-gptq-4-act-order", {"x.g_idx": 3}, "names a group that its 3 groups"),
        ("compressed-tensors-pack-quantized-4-group", {"x.weight_shape": 80}, "has the shape"),
        ("bitsandbytes-int8", {"x.weight_format": 1}, "in the order of one kind of GPU"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_as_they_are_read(
    name, changes, message, tmp_path
):
    path = Path(__file__).parent / "quantised" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        settings = file.metadata()["quantization_config"]
    stored = load_file(path)
    del stored["expected"]
    for part, value in changes.items():
        stored[part] = torch.full_like(stored[part], value)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {settings}}}')
    tensor = read_headers(files.resolve(tmp_path))[1]["x.weight"]
    with pytest.raises(WdlibError, match=message):
        quantised.decode(tensor, quantised.read_rows(tensor, 0, 2))


def test_scales_of_activations_change_no_weight(llama):
    tensors = load_file(llama / "model.safetensors")
    query = tensors[f"{Q}.weight"]
    stored = fp8(Q, query) | {f"{Q}.{n}": torch.tensor(2.0) for n in ("input_scale", "k_scale")}
    folder = with_query(llama, {name.removeprefix(f"{Q}."): t for name, t in stored.items()}, {})
    found = next(stream.projections(folder, layers=[0], types=["q"])).matrix
    assert np.abs(found - query.numpy()).max() < 0.07 * query.abs().max()


# GGUF -----------------------------------------------------------------------------------------


def test_a_scale_beside_a_tensor_of_gguf_multiplies_it(tmp_path):
    tensors = tiny.gguf_tensors(5, inner=64)
    rng = np.random.default_rng(6)
    nvfp4 = rng.integers(0, 0x3C, (32, 36), dtype=np.uint8)  # one block of 64 in each row
    pairs = tensors | {"blk.0.ffn_down.weight": (nvfp4, Quant.NVFP4)}
    pairs["blk.0.ffn_down.scale"] = np.array([0.25], np.float32)
    pairs["blk.1.attn_q.scale"] = np.array([3], np.float32)
    pairs["blk.1.attn_q.input_scale"] = np.array([7], np.float32)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2", pairs)
    found = tiny.read(path)
    expected = gguf.quants.dequantize(nvfp4, Quant.NVFP4) * np.float32(0.25)
    np.testing.assert_array_equal(found[0, "down", None], expected)
    np.testing.assert_array_equal(found[1, "q", None], tensors["blk.1.attn_q.weight"] * 3)
    np.testing.assert_array_equal(found[0, "q", None], tensors["blk.0.attn_q.weight"])
    assert {e.dtype for e in inventory(path)} == {"F32", "NVFP4"}
    part = stream.projection_parts(path, layers=[1], types=["q"])[0]
    raw = quantised.read_rows(part.tensor, *part.rows)
    once, twice = (quantised.decode(part.tensor, raw) for _ in range(2))
    np.testing.assert_array_equal(once, twice)


def test_each_expert_of_a_gguf_file_has_its_own_scale(tmp_path):
    tensors = tiny.gguf_tensors(7)
    rng = np.random.default_rng(8)
    for layer in (0, 1):
        for kind, shape in (("gate", (3, 48, 32)), ("up", (3, 48, 32)), ("down", (3, 32, 48))):
            del tensors[f"blk.{layer}.ffn_{kind}.weight"]
            tensors[f"blk.{layer}.ffn_{kind}_exps.weight"] = rng.random(shape, np.float32)
    scales = np.array([1, 2, 4], np.float32)
    pairs = tensors | {"blk.1.ffn_up_exps.scale": scales}
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2moe", pairs)
    found, raw = tiny.read(path), tensors["blk.1.ffn_up_exps.weight"]
    for expert in range(3):
        np.testing.assert_array_equal(found[1, "up", expert], raw[expert] * scales[expert])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (31, r"blk\.0\.attn_q\.weight of tiny\.gguf is stored as GGML type 31, .*newer gguf"),
        (339, "is stored as GGML type 339"),
        (2**31, "header of .* is truncated or corrupt"),
    ],
)
def test_a_type_that_is_not_known_is_no_damage(number, message, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2", tiny.gguf_tensors(9))
    raw = path.read_bytes()
    start = raw.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    path.write_bytes(raw[:start] + number.to_bytes(4, "little") + raw[start + 4 :])
    with pytest.raises(WdlibError, match=message):
        stream.projections(path)
    if number < 1024:
        size = gguf_header(path)[1]["blk.0.attn_q.weight"].size
        assert size == 4 * 32 * 32
        assert len(list(stream.projections(path, types=["k"]))) == 2


def split(folder: Path, tensors: Mapping[str, np.ndarray], parts: int = 3, **claims) -> list[Path]:
    """A GGUF file in parts, as llama-gguf-split writes them."""
    paths = []
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        path = folder / f"model-Q8-{part + 1:05d}-of-{parts:05d}.gguf"
        writer = gguf.GGUFWriter(path, "qwen2")
        if part == 0:
            for key, value in (("block_count", 2), ("attention.head_count", 4)):
                writer.add_uint32(f"qwen2.{key}", value)
        fields = {"no": part, "count": parts, "tensors.count": len(tensors)} | claims
        for key, value in fields.items():
            writer.add_uint16(f"split.{key}", value)
        for name in list(tensors)[part::parts]:
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_split_gguf_file_is_read_as_one(tmp_path):
    tensors = tiny.gguf_tensors(10)
    one = tiny.read(tiny.write_gguf(tmp_path / "one.gguf", "qwen2", tensors))
    paths = split(tmp_path / "parts", tensors)
    for model in (tmp_path / "parts", *paths):
        checkpoint = files.resolve(model)
        assert checkpoint.files == tuple(paths)
        found = tiny.read(checkpoint)
        assert found.keys() == one.keys()
        for key, matrix in one.items():
            np.testing.assert_array_equal(found[key], matrix)
        assert files.matches_source({"source": checkpoint.source}, model)
    assert files.resolve(paths[1]).name == "model-Q8"
    paths[1].unlink()
    for model in (tmp_path / "parts", paths[0]):
        with pytest.raises(WdlibError, match=r"lacks model-Q8-00002-of-00003\.gguf, which goes"):
            files.resolve(model)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"count": 2}, "part 1 of 2"),
        ({"no": 1}, "part 2 of 3"),
        ({"tensors.count": 9}, "14 tensors of"),
    ],
)
def test_parts_of_gguf_that_do_not_belong_together_are_refused(claims, message, tmp_path):
    split(tmp_path / "parts", tiny.gguf_tensors(11), **claims)
    with pytest.raises(WdlibError, match=message):
        inventory(tmp_path / "parts")


# Names of files -------------------------------------------------------------------------------


def sharded(saved, folder: Path, **options) -> tuple[Path, dict]:
    model = saved("llama")[1]
    model.save_pretrained(folder, max_shard_size="20KB", **options)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, tiny.read(saved("llama")[0])


def same(folder: Path, expected: dict) -> bool:
    found = tiny.read(folder)
    return found.keys() == expected.keys() and all(
        np.array_equal(found[key], matrix) for key, matrix in expected.items()
    )


def test_shards_need_no_index(saved, tmp_path):
    folder, expected = sharded(saved, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    assert same(folder, expected)
    shards = sorted(folder.glob("*.safetensors"))
    assert same(shards[1], expected)
    (folder / "consolidated.safetensors").write_bytes(b"Mistral's own")
    assert files.resolve(folder).files == tuple(shards)
    shards[1].unlink()
    with pytest.raises(
        WdlibError, match=f"lacks {shards[1].name}, which goes with {shards[0].name}"
    ):
        files.resolve(folder)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one", "many"])
def test_a_variant_is_read_where_there_is_no_other(options, saved, tmp_path):
    saved("llama")[1].save_pretrained(tmp_path / "model", variant="fp16", **options)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert any("fp16" in name for name in names)
    assert same(tmp_path / "model", tiny.read(saved("llama")[0]))
    shutil.copy(saved("llama")[0] / "model.safetensors", tmp_path / "model")
    assert files.resolve(tmp_path / "model").files == (tmp_path / "model" / "model.safetensors",)


@pytest.mark.parametrize("where", ["inner", "models--lab--tiny/snapshots/abc"][:1])
def test_the_one_folder_with_weights(where, saved, tmp_path):
    folder = tmp_path / "model"
    inner = Path(shutil.copytree(saved("llama")[0], folder / where))
    (folder / "logs").mkdir()
    (folder / "logs" / "train.txt").write_text("1")
    expected = tiny.read(saved("llama")[0])
    assert same(folder, expected)
    (inner / "config.json").rename(folder / "config.json")  # which is theirs then
    checkpoint = files.resolve(folder)
    assert files.config_file(checkpoint) == folder / "config.json"
    assert same(folder, expected)
    shutil.copytree(saved("gpt2")[0], folder / "other")
    with pytest.raises(WdlibError, match=r"2 folders in it do \(inner, other\): give one"):
        files.resolve(folder)


def test_a_download_of_the_hub_is_found_by_its_folder(saved, tmp_path):
    snapshot = tmp_path / "models--lab--tiny" / "snapshots" / "abc"
    shutil.copytree(saved("llama")[0], snapshot)
    assert files.resolve(snapshot.parent.parent).files == (snapshot / "model.safetensors",)


def to_consolidated(folder: Path, heads: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The tensors of a Llama by the names and in the order of rows of Meta and Mistral."""
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"}
    names |= {"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3"}
    names |= {"mlp.down_proj": "feed_forward.w2"}
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not (match := re.fullmatch(r"model\.(layers\.\d+)\.(\w+\.\w+_proj)\.weight", name)):
            continue
        kind = names[match[2]]
        if kind[-2:] in heads:  # of each head, the first half of the rows and the second alternate
            halves = tensor.reshape(heads[kind[-2:]], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        found[f"{match[1]}.{kind}.weight"] = tensor.contiguous()
    return found


def test_consolidated_weights_are_read_as_transformers_converts_them(saved, tmp_path):
    folder, model = saved("llama")
    heads = {"wq": model.config.num_attention_heads, "wk": model.config.num_key_value_heads}
    save_file(to_consolidated(folder, heads), tmp_path / "consolidated.safetensors")
    params = {"dim": 64, "n_layers": 2, "n_heads": heads["wq"], "n_kv_heads": heads["wk"]}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert same(tmp_path, tiny.read(folder))
    shutil.copy(folder / "model.safetensors", tmp_path)
    assert files.resolve(tmp_path).files == (tmp_path / "model.safetensors",)


ADAPTER = json.dumps({"base_model_name_or_path": "lab/base", "peft_type": "LORA"})

FOLDERS = {
    "adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": ""},
        r"is an adapter for lab/base, and no model: .*merge_and_unload\(\).*save_pretrained",
    ),
    "runs of an adapter": (
        {"adapter_config.json": "{", "checkpoint-1/adapter_model.safetensors": ""},
        "is an adapter for another model, and no model",
    ),
    "FSDP": (
        {"config.json": "{}", "pytorch_model_fsdp_0/__0_0.distcp": ""},
        "parts of a model as FSDP trains it .*accelerate merge-weights",
    ),
    "DeepSpeed": (
        {"zero_to_fp32.py": "", "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": ""},
        "parts of a model as DeepSpeed trains it .*zero_to_fp32",
    ),
    "TensorFlow": ({"tf_model.h5": ""}, r"tf_model\.h5 holds weights as TensorFlow keeps them"),
    "Flax": ({"flax_model.msgpack": ""}, "as Flax keeps them"),
    "ONNX": ({"onnx/model.onnx": "", "config.json": "{}"}, "as ONNX keeps them"),
    "Meta": (
        {"consolidated.00.pth": "", "params.json": "{}"},
        r"consolidated\.00\.pth is a pickle",
    ),
    "pickle and others": (
        {"pytorch_model.bin": "", "tf_model.h5": ""},
        r"pytorch_model\.bin is a p",
    ),
    "nothing": ({"config.json": "{}"}, r"holds no \.safetensors or \.gguf file"),
    "a vision tower alone": ({"mmproj-model.gguf": ""}, r"holds no \.safetensors or \.gguf file"),
}
"""Files of a folder, and what is said of it."""


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_read_say_why(name, tmp_path):
    contents, message = FOLDERS[name]
    for file, text in contents.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    with pytest.raises(WdlibError, match=rf"^{re.escape(str(tmp_path))} .*{message}"):
        files.resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.onnx", "as ONNX keeps them"),
        ("a.h5", "TensorFlow"),
        ("__0_0.distcp", "as FSDP trains it"),
    ],
)
def test_files_that_cannot_be_read_say_why(name, message, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(WdlibError, match=f"{re.escape(name)} .*{message}"):
        files.resolve(tmp_path / name)


def test_the_file_of_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    (tmp_path / "adapter_model.safetensors").write_text("")
    with pytest.raises(WdlibError, match=r"adapter_model\.safetensors is an adapter for lab/base"):
        files.resolve(tmp_path / "adapter_model.safetensors")


# Cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "settings"), [(fp8, FP8), (nf4, {}), (gptq, GPTQ)])
def test_decoding_takes_little_more_than_the_matrix(change, settings, tmp_path):
    rows, columns = 1024, 2048
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    save_file(
        {k: t.contiguous() for k, t in change("x", matrix).items()}, tmp_path / "a.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    tensor = read_headers(files.resolve(tmp_path))[1]["x.weight"]
    raw = quantised.read_rows(tensor, 0, rows)
    tracemalloc.start()
    found = quantised.decode(tensor, raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes == 4 * rows * columns
    assert peak < 1.6 * found.nbytes


def test_a_table_without_quantised_matrices_is_not_changed(saved):
    table = safetensors_header(saved("llama")[0] / "model.safetensors")
    assert companions.of_safetensors(table, {}) == table
