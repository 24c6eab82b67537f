"""GGUF files of many architectures: what llama.cpp's converter does to the weights is undone."""

import numpy as np
import pytest
import tiny

from wdlib import WdlibError
from wdlib.checkpoints.plan import inventory

HEADS, KV_HEADS = 4, 2
RNG = np.random.default_rng(17)


def made(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of llama.cpp's converter leaves the rows of q and k."""
    paired = matrix.reshape(heads, 2, len(matrix) // heads // 2, -1)
    return paired.swapaxes(1, 2).reshape(matrix.shape)


PERMUTED = (
    *("llama", "deci", "baichuan", "bailingmoe", "granite", "granitemoe", "granitehybrid"),
    *("granite_swa", "smollm3", "mistral3", "arcee", "olmo", "deepseek", "minicpm", "internlm2"),
    *("xverse", "llama-embed", "arctic", "chameleon", "llada", "nanbeige"),
)
"""Where a class of llama.cpp's conversion/ permutes q and k (as of llama-cpp-python 0.3.36)."""


@pytest.mark.parametrize("architecture", [*PERMUTED, "qwen2", "apertus", "llama4", "afmoe"])
@pytest.mark.parametrize("joined", [False, True])
def test_rows_of_q_and_k_come_back_in_order(architecture, joined, tmp_path):
    tensors = tiny.gguf_tensors(1)
    stored = dict(tensors)
    for layer in (0, 1):
        names = [f"blk.{layer}.attn_{kind}.weight" for kind in "qkv"]
        if architecture in PERMUTED:
            for name, heads in zip(names, (HEADS, KV_HEADS), strict=False):
                stored[name] = permuted(tensors[name], heads)
        if joined:  # its option --fuse-qkv
            rows = np.concatenate([stored.pop(name) for name in names])
            stored[f"blk.{layer}.attn_qkv.weight"] = rows
    found = tiny.read(tiny.write_gguf(tmp_path / "tiny.gguf", architecture, stored))
    assert len(found) == 14
    for (layer, kind, _), matrix in found.items():
        np.testing.assert_array_equal(matrix, tensors[tiny.gguf_name(layer, kind)], strict=True)


def write(tmp_path, architecture: str, blocks: list[dict], **fields) -> tuple:
    """A file whose blocks hold these tensors; returns its path, and all it holds."""
    tensors = {
        f"blk.{n}.{name}.weight": data
        for n, block in enumerate(blocks)
        for name, data in block.items()
    }
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    path = tiny.write_gguf(tmp_path / "tiny.gguf", architecture, tensors, fields)
    return path, tensors


MLP = ("ffn_gate", "ffn_up", "ffn_down")


def mlp() -> dict:
    return {"ffn_gate": made(48, 32), "ffn_up": made(48, 32), "ffn_down": made(32, 48)}


def attention() -> dict:
    q, k, v = made(32, 32), made(16, 32), made(16, 32)
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": made(32, 32)}


def types(path) -> list[set[str]]:
    """The types that each layer lists."""
    entries = inventory(path)
    return [{e.type for e in entries if e.layer == n} for n in range(entries[-1].layer + 1)]


def test_latent_attention_keeps_its_own_names(tmp_path):
    """deepseek2: the converter splits kv_b by heads, and stores the part of the keys transposed."""
    latent, nope, size = 12, 6, 10
    keys, values = made(HEADS, nope, latent), made(HEADS, size, latent)
    block = {
        "attn_q_a": made(16, 32),
        "attn_q_b": made(HEADS * 8, 16),
        "attn_kv_a_mqa": made(latent + 2, 32),
        "attn_k_b": keys.swapaxes(1, 2).copy(),
        "attn_v_b": values,
        "attn_output": made(32, HEADS * size),
    } | mlp()
    path, tensors = write(tmp_path, "deepseek2", [block, block])
    own = ["q_a", "q_b", "kv_a", "k_b", "v_b"]
    assert types(path) == [{"o", "gate", "up", "down", *own}] * 2
    found = tiny.read(path, types=["o", *own])
    np.testing.assert_array_equal(found[1, "k_b", None], keys.reshape(HEADS * nope, latent))
    np.testing.assert_array_equal(found[1, "v_b", None], values.reshape(HEADS * size, latent))
    np.testing.assert_array_equal(found[0, "q_a", None], tensors["blk.0.attn_q_a.weight"])
    assert {kind for _, kind, _ in tiny.read(path)} == {"o", "gate", "up", "down"}


def test_linear_and_full_attention_take_turns(tmp_path):
    """qwen3next: of full attention, q_proj holds each head's query and then its output gate."""
    q, gate = made(HEADS, 8, 32), made(HEADS, 8, 32)
    full = attention() | {"attn_q": np.concatenate([q, gate], axis=1).reshape(64, 32)}
    linear = {"attn_qkv": made(64, 32), "attn_gate": made(32, 32), "ssm_ba": made(8, 32)}
    linear |= {"ssm_out": made(32, 32), "ssm_conv1d": made(64, 4)}
    blocks = [linear | mlp(), full | mlp()]
    path, _ = write(tmp_path, "qwen3next", blocks, full_attention_interval=2)
    found = types(path)
    assert found[0] == {"in_proj_qkv", "in_proj_z", "out_proj", "gate", "up", "down"}
    assert found[1] == {*"qkvo", "gate", "up", "down", "attention_gate"}
    read = tiny.read(path, types=["q", "attention_gate"])
    np.testing.assert_array_equal(read[1, "q", None], q.reshape(32, 32))
    np.testing.assert_array_equal(read[1, "attention_gate", None], gate.reshape(32, 32))


def test_convolution_and_attention_take_turns(tmp_path):
    """lfm2: the heads of keys and values of each layer say which layers attend."""
    conv = {"shortconv.in_proj": made(96, 32), "shortconv.out_proj": made(32, 32)}
    conv |= {"shortconv.conv": made(32, 3)}
    heads = {"attention__head_count_kv": [0, 2]}
    path, _ = write(tmp_path, "lfm2", [conv | mlp(), attention() | mlp()], **heads)
    assert types(path)[0] == {"in_proj", "out_proj", "gate", "up", "down"}
    assert types(path)[1] == {*"qkvo", "gate", "up", "down"}
    lost = attention() | mlp()
    path, _ = write(tmp_path, "lfm2", [lost, mlp()], attention__head_count_kv=[2, 0])
    with pytest.raises(WdlibError, match="Layer 1 of tiny has no q"):
        inventory(path)


def test_state_space_models_have_types_of_their_own(tmp_path):
    block = {"ssm_in": made(128, 32), "ssm_x": made(20, 64), "ssm_dt": made(64, 4)}
    block |= {"ssm_out": made(32, 64), "ssm_a": made(64, 8), "ssm_conv1d": made(64, 4)}
    path, _ = write(tmp_path, "mamba", [block, block])
    assert types(path) == [{"in_proj", "x_proj", "dt_proj", "out_proj"}] * 2
    with pytest.raises(WdlibError, match="no projection type 'z' .*: give some of q, .* x_proj"):
        tiny.read(path, types=["z"])


def test_encoder_and_decoder(tmp_path):
    """t5: one file holds both, and the decoder's attention to the encoder."""
    names = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32)}
    tensors = {}
    for stack, layers in (("enc", 3), ("dec", 2)):
        for n in range(layers):
            block = {f"attn_{k}": made(*shape) for k, shape in names.items()} | mlp()
            if stack == "dec":
                block |= {f"cross_attn_{k}": made(*shape) for k, shape in names.items()}
            block["attn_rel_b"] = made(8, 4)
            tensors |= {f"{stack}.blk.{n}.{name}.weight": data for name, data in block.items()}
    counts = {"block_count": 3, "decoder_block_count": 2}
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "t5", tensors, counts)
    for stack, start, length in ((None, "dec.blk", 14), ("encoder", "enc.blk", 21)):
        found = inventory(path, stack=stack)
        assert len(found) == length
        assert all(entry.name.startswith(start) for entry in found)
    cross = inventory(path, stack="cross-attention")
    assert [e.type for e in cross] == [*"qkvo"] * 2
    assert all("cross_attn" in entry.name for entry in cross)


def test_gate_and_up_of_modern_bert_are_one_tensor(tmp_path):
    inner, outer = made(96, 32), made(32, 48)
    block = {"attn_qkv": made(96, 32), "attn_output": made(32, 32)}
    block |= {"ffn_up": inner, "ffn_down": outer}
    path, _ = write(tmp_path, "modern-bert", [block, block], attention__head_count_kv=4)
    found = tiny.read(path)
    np.testing.assert_array_equal(found[0, "gate", None], inner[:48])
    np.testing.assert_array_equal(found[0, "up", None], inner[48:])


def test_layers_have_their_own_numbers_of_heads(tmp_path):
    """openelm: heads of 8 rows, as many as the metadata say for each layer."""
    q, k = [made(16, 32), made(32, 32)], [made(8, 32), made(16, 32)]
    blocks = [
        {"attn_qkv": np.concatenate([q[n], k[n], k[n]]), "attn_output": made(32, len(q[n]))} | mlp()
        for n in (0, 1)
    ]
    heads = {"attention__head_count": [2, 4], "attention__head_count_kv": [1, 2]}
    found = tiny.read(write(tmp_path, "openelm", blocks, **heads)[0])
    for n in (0, 1):
        np.testing.assert_array_equal(found[n, "q", None], q[n])
        np.testing.assert_array_equal(found[n, "v", None], k[n])
