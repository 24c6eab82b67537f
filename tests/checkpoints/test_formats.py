"""Bytes as they are stored -> float32."""

import re

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Quant

from wdlib import WdlibError
from wdlib.checkpoints import stream
from wdlib.checkpoints.formats import decode
from wdlib.checkpoints.plan import inventory


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_data_types_and_shards(name, dtype, tmp_path):
    model = tiny.architecture(name).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many, wanted = (
        *map(tiny.read, (tmp_path / "one", tmp_path / "many")),
        tiny.own_weights(name, model),
    )
    assert one.keys() == many.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], many[key], strict=True)
    for key, matrix in wanted.items():
        kept = np.float64 if dtype == "float64" else np.float32
        np.testing.assert_array_equal(one[key], matrix.astype(kept), strict=True)
    stored = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}[dtype]
    assert {e.dtype for e in inventory(tmp_path / "many")} == {stored}


def test_bfloat16_keeps_every_finite_value():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    with np.errstate(invalid="ignore"):
        got = decode(bits.view(np.uint8), "BF16")
    np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_tensor(llama, bad):
    def spoil(tensors):
        tensors[tiny.DOWN] = tensors[tiny.DOWN].copy()
        tensors[tiny.DOWN][3, 5] = bad
        return tensors

    tiny.rewrite(llama, spoil)
    with pytest.raises(WdlibError, match=re.escape(f"{tiny.DOWN} of model.safetensors holds NaN")):
        list(stream.projections(llama))


def test_huge_finite_values_are_no_error(llama):
    largest = np.finfo(np.float32).max
    tiny.rewrite(llama, lambda t: t | {tiny.DOWN: np.full_like(t[tiny.DOWN], largest)})
    assert len(list(stream.projections(llama))) == 14


def random_bytes(rng, kind: Quant, rows: int, columns: int) -> np.ndarray:
    """Valid blocks of any quantisation: bytes so small that no float16 in them is NaN or huge."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 0x3C, (rows, columns // block * size), dtype=np.uint8)


def supported() -> list[Quant]:
    found = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", supported(), ids=lambda kind: kind.name)
def test_every_quantisation_is_dequantised_as_gguf_does(kind, tmp_path):
    """With gate above up in one tensor, so that quantised rows are also read in part."""
    rng = np.random.default_rng(4)
    shapes = {"attn_qkv": (1024, 256), "attn_output": (256, 512), "ffn_up": (512, 256)}
    shapes["ffn_down"] = (256, 256)
    tensors = {
        f"blk.0.{name}.weight": random_bytes(rng, kind, *shape) for name, shape in shapes.items()
    }
    whole = {name: gguf.quants.dequantize(raw, kind) for name, raw in tensors.items()}
    fields = {"block_count": 1}
    pairs = {name: (raw, kind) for name, raw in tensors.items()}
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "phi3", pairs, fields)
    found = tiny.read(path)
    qkv, up = whole["blk.0.attn_qkv.weight"], whole["blk.0.ffn_up.weight"]
    wanted = {"q": qkv[:512], "k": qkv[512:768], "v": qkv[768:], "gate": up[:256], "up": up[256:]}
    wanted |= {"o": whole["blk.0.attn_output.weight"], "down": whole["blk.0.ffn_down.weight"]}
    for key, matrix in wanted.items():
        np.testing.assert_array_equal(found[0, key, None], matrix, err_msg=key)
    assert {e.dtype for e in inventory(path)} == {kind.name}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_values_are_near_those_that_went_in(kind, tmp_path):
    tensors = tiny.gguf_tensors(5, inner=64)
    pairs = {k: (gguf.quants.quantize(v, Quant[kind]), Quant[kind]) for k, v in tensors.items()}
    found = tiny.read(tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2", pairs))
    step = {"Q4": 1 / 7, "Q5": 1 / 15, "Q8": 1 / 127, "BF": 1 / 256, "F1": 1 / 2048}[kind[:2]]
    for layer in (0, 1):
        for type_, name in tiny.GGUF_NAMES.items():
            wanted = tensors[f"blk.{layer}.{name}.weight"]
            assert np.abs(found[layer, type_, None] - wanted).max() < step * np.abs(wanted).max()


def test_gguf_type_that_cannot_be_dequantised(tmp_path):
    tensors = tiny.gguf_tensors(8)
    tensors["blk.1.ffn_up.weight"] = np.ones((48, 32), np.int32)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2", tensors)
    with pytest.raises(WdlibError, match=r"blk\.1\.ffn_up\.weight .* is stored as I32"):
        stream.projections(path)
