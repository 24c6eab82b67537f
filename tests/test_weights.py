"""Matrices read from checkpoints equal the weights of the modules that wrote them."""

import json
import re
import shutil
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file, save_file

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import catalogue, files, formats, stream
from wdlib.checkpoints.formats import decode, read_rows
from wdlib.checkpoints.headers import gguf_header
from wdlib.checkpoints.plan import inventory
from wdlib.fingerprints.values import value_distributions

COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
ROUTED = GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 64}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64}

LLAMA_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
BERT_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
DISTILBERT_NAMES = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
}
T = transformers
# name -> class, configuration, where the layers are, module of each type that has one of its own
ARCHITECTURES = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, GROUPED, "model.layers", LLAMA_NAMES),
    "mistral": (T.MistralForCausalLM, T.MistralConfig, GROUPED, "model.layers", LLAMA_NAMES),
    "qwen2": (T.Qwen2ForCausalLM, T.Qwen2Config, GROUPED, "model.layers", LLAMA_NAMES),
    "qwen3": (
        T.Qwen3ForCausalLM,
        T.Qwen3Config,
        GROUPED | {"head_dim": 16},
        "model.layers",
        LLAMA_NAMES,
    ),
    "gemma2": (
        T.Gemma2ForCausalLM,
        T.Gemma2Config,
        GROUPED | {"head_dim": 16},
        "model.layers",
        LLAMA_NAMES,
    ),
    "gemma3": (
        T.Gemma3ForCausalLM,
        T.Gemma3TextConfig,
        GROUPED | {"head_dim": 16},
        "model.layers",
        LLAMA_NAMES,
    ),
    "gemma3-vision": (
        T.Gemma3ForConditionalGeneration,
        T.Gemma3Config,
        {"text_config": GROUPED | {"head_dim": 16}, "vision_config": VISION},
        "model.language_model.layers",
        LLAMA_NAMES,
    ),
    "phi3": (
        T.Phi3ForCausalLM,
        T.Phi3Config,
        GROUPED,
        "model.layers",
        {"o": "self_attn.o_proj", "down": "mlp.down_proj"},
    ),
    "gpt2": (
        T.GPT2LMHeadModel,
        T.GPT2Config,
        GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
        "transformer.h",
        {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    ),
    "gpt-neox": (
        T.GPTNeoXForCausalLM,
        T.GPTNeoXConfig,
        COMMON,
        "gpt_neox.layers",
        {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    ),
    "bert": (T.BertForMaskedLM, T.BertConfig, COMMON, "bert.encoder.layer", BERT_NAMES),
    "roberta": (T.RobertaForMaskedLM, T.RobertaConfig, COMMON, "roberta.encoder.layer", BERT_NAMES),
    "distilbert": (
        T.DistilBertForMaskedLM,
        T.DistilBertConfig,
        DISTILBERT,
        "distilbert.transformer.layer",
        DISTILBERT_NAMES,
    ),
    "mixtral": (
        T.MixtralForCausalLM,
        T.MixtralConfig,
        GROUPED | {"num_local_experts": 3},
        "model.layers",
        {key: LLAMA_NAMES[key] for key in "qkvo"},
    ),
    "qwen2-moe": (
        T.Qwen2MoeForCausalLM,
        T.Qwen2MoeConfig,
        ROUTED | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
        "model.layers",
        {key: LLAMA_NAMES[key] for key in "qkvo"},
    ),
    "qwen3-moe": (
        T.Qwen3MoeForCausalLM,
        T.Qwen3MoeConfig,
        ROUTED | {"head_dim": 8},
        "model.layers",
        {key: LLAMA_NAMES[key] for key in "qkvo"},
    ),
    "glm4-moe": (
        T.Glm4MoeForCausalLM,
        T.Glm4MoeConfig,
        ROUTED | {"head_dim": 8, "n_routed_experts": 3, "first_k_dense_replace": 1},
        "model.layers",
        {key: LLAMA_NAMES[key] for key in "qkvo"},
    ),
    "hunyuan-moe": (
        T.HunYuanMoEV1ForCausalLM,
        T.HunYuanMoEV1Config,
        ROUTED | {"head_dim": 8, "moe_topk": 2},
        "model.layers",
        {key: LLAMA_NAMES[key] for key in "qkvo"},
    ),
}
SHARED = {"qwen2-moe": "shared_expert", "glm4-moe": "shared_experts", "hunyuan-moe": "shared_mlp"}


def make(name: str) -> torch.nn.Module:
    """A tiny model with every parameter random (some classes start their biases at zero)."""
    build, configure, options, _, _ = ARCHITECTURES[name]
    torch.manual_seed(len(name))
    model = build(configure(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def as_linear(module: torch.nn.Module) -> np.ndarray:
    weight = module.weight.detach().float().numpy()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def own_weights(name: str, model: torch.nn.Module) -> dict[tuple, np.ndarray]:
    """(layer, type, expert) -> the weight of the module itself, where a type has its own module."""
    *_, path, names = ARCHITECTURES[name]
    wanted = {}
    for layer, block in enumerate(model.get_submodule(path)):
        for kind, module in names.items():
            wanted[layer, kind, None] = as_linear(block.get_submodule(module))
        experts = getattr(getattr(block, "mlp", None), "experts", None)
        if experts is not None:
            for expert in range(3):
                gate, up = experts.gate_up_proj[expert].detach().chunk(2)
                wanted[layer, "gate", expert] = gate.numpy()
                wanted[layer, "up", expert] = up.numpy()
                wanted[layer, "down", expert] = experts.down_proj[expert].detach().numpy()
        if name in SHARED:
            dense = getattr(block.mlp, SHARED[name], block.mlp)
            for kind in ("gate", "up", "down"):
                wanted[layer, kind, None] = as_linear(getattr(dense, f"{kind}_proj"))
    return wanted


def read(model) -> dict[tuple, np.ndarray]:
    return {(p.layer, p.type, p.expert): p.matrix for p in stream.projections(model)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder, model), each made once."""
    made = {}

    def get(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            model, folder = make(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrices_are_the_modules_own_weights(name, saved):
    folder, model = saved(name)
    found, wanted = read(folder), own_weights(name, model)
    fused = {"phi3": "qkv gate up", "gpt2": "qkv", "gpt-neox": "qkv"}.get(name, "")
    assert wanted
    for key, matrix in wanted.items():
        np.testing.assert_array_equal(found[key], matrix, err_msg=str(key), strict=True)
    for layer, kind, _ in set(found) - set(wanted):
        assert kind in fused
        assert layer in (0, 1)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt-neox", "llama"])
def test_q_k_v_of_a_fused_tensor_give_the_attentions_own_inputs(name, saved):
    """At position 0 a rotary embedding is the identity: attention gets q = W_q x and so on."""
    folder, model = saved(name)
    found, seen = read(folder), []

    def probe(module, query, key, value, *_, **__):
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    T.AttentionInterface.register("probe", probe)
    model.set_attn_implementation("probe")
    attention = {"phi3": "qkv_proj", "gpt2": "c_attn", "gpt-neox": "query_key_value"}
    inputs, biases = [], []
    for path, module in model.named_modules():
        if path.endswith(attention.get(name, "q_proj")):
            module.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
            biases.append(module.bias)
    with torch.no_grad():
        model(torch.arange(64)[:, None])
    assert len(inputs) == len(seen) == 2
    assert all(bias is None or not bias.any() for bias in biases)
    for layer, states in enumerate(seen):
        for kind, state in zip("qkv", states, strict=True):
            got = inputs[layer][:, 0].numpy() @ found[layer, kind, None].T
            np.testing.assert_allclose(got, state.flatten(1).numpy(), atol=2e-6, err_msg=kind)


def test_gate_and_up_of_phi3_give_the_activations_own_inputs(saved):
    folder, model = saved("phi3")
    found = read(folder)
    for layer, block in enumerate(model.model.layers):
        x, seen = torch.randn(40, 32), {}
        hooks = [
            block.mlp.activation_fn.register_forward_hook(
                lambda _, args, out, seen=seen: seen.update(gate=args[0], act=out)
            ),
            block.mlp.down_proj.register_forward_hook(
                lambda _, args, __, seen=seen: seen.update(product=args[0])
            ),
        ]
        with torch.no_grad():
            block.mlp(x)
        for hook in hooks:
            hook.remove()
        gate, up = (x.numpy() @ found[layer, kind, None].T for kind in ("gate", "up"))
        np.testing.assert_allclose(gate, seen["gate"].numpy(), atol=2e-6)
        np.testing.assert_allclose(up * seen["act"].numpy(), seen["product"].numpy(), atol=2e-6)


def test_inventory_lists_what_is_streamed_in_order(saved):
    for name in ARCHITECTURES:
        folder, _ = saved(name)
        entries, streamed = inventory(folder), list(stream.projections(folder))
        keys = [
            (e.layer, TYPES.index(e.type), -1 if e.expert is None else e.expert) for e in entries
        ]
        assert keys == sorted(set(keys))
        assert [(e.layer, e.type, e.name, e.shape, e.expert) for e in entries] == [
            (p.layer, p.type, p.name, p.matrix.shape, p.expert) for p in streamed
        ]
        for p in streamed:
            assert p.matrix.dtype == np.float32
            assert p.matrix.flags.c_contiguous
            assert p.matrix.flags.writeable
    assert Counter(e.type for e in inventory(saved("bert")[0])) == dict.fromkeys(
        ("q", "k", "v", "o", "up", "down"), 2
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_data_types_and_shards(name, dtype, tmp_path):
    model = make(name).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many, wanted = (
        *map(read, (tmp_path / "one", tmp_path / "many")),
        own_weights(name, model),
    )
    assert one.keys() == many.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], many[key], strict=True)
    for key, matrix in wanted.items():
        np.testing.assert_array_equal(one[key], matrix, strict=True)
    stored = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}[dtype]
    assert {e.dtype for e in inventory(tmp_path / "many")} == {stored}


def test_bfloat16_keeps_every_finite_value(saved, tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    with np.errstate(invalid="ignore"):
        got = decode(bits.view(np.uint8), "BF16")
    np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))


def test_only_what_is_asked_for_is_read(saved, monkeypatch):
    folder, _ = saved("llama")
    reads = []
    real = read_rows
    monkeypatch.setattr(formats, "read_rows", lambda *args: reads.append(args) or real(*args))
    got = [(p.layer, p.type) for p in stream.projections(folder, layers=[1], types=("down", "q"))]
    assert got == [(1, "q"), (1, "down")]
    assert len(reads) == 2
    assert list(stream.projections(saved("gpt2")[0], types=["gate"])) == []
    with pytest.raises(WdlibError, match="no layer 2: its layers are 0 to 1"):
        stream.projections(folder, layers=[1, 2])
    with pytest.raises(WdlibError, match="no projection type 'query'"):
        stream.projections(folder, types=["query"])


def test_fused_tensors_are_read_by_their_rows(saved, monkeypatch):
    read_rows = []
    real = read_rows
    monkeypatch.setattr(
        formats, "read_rows", lambda t, first, n: read_rows.append((first, n)) or real(t, first, n)
    )
    list(stream.projections(saved("phi3")[0], layers=[0]))
    assert read_rows == [(0, 32), (32, 16), (48, 16), (0, 32), (0, 48), (48, 48), (0, 32)]


def test_one_matrix_in_memory_at_a_time(tmp_path):
    config = T.LlamaConfig(**GROUPED | {"hidden_size": 256, "intermediate_size": 512})
    model = T.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    largest = 4 * 256 * 512
    total = sum(4 * e.shape[0] * e.shape[1] for e in inventory(tmp_path))
    tracemalloc.start()
    for projection in stream.projections(tmp_path):
        del projection
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest < total / 2


# Mixture of experts, as other programs store it --------------------------------------------------


def test_experts_in_one_tensor(saved, tmp_path):
    """The layout that transformers has in memory: (expert, gate above up, hidden)."""
    folder, model = saved("qwen3-moe")
    shutil.copy(folder / "config.json", tmp_path)
    save_file(
        {key: value.detach().numpy() for key, value in model.named_parameters()},
        tmp_path / "model.safetensors",
    )
    apart, together = read(folder), read(tmp_path)
    assert apart.keys() == together.keys()
    for key in apart:
        np.testing.assert_array_equal(apart[key], together[key])


@pytest.mark.parametrize("name", ["qwen2-moe", "glm4-moe"])
def test_the_shared_expert_counts_as_the_dense_matrix(saved, name):
    entries = inventory(saved(name)[0])
    assert [e.expert for e in entries if e.layer == 0 and e.type == "up"] == [None]
    assert [e.expert for e in entries if e.layer == 1 and e.type == "up"] == [None, 0, 1, 2]


def test_a_shared_expert_lacks_a_matrix(saved, tmp_path):
    folder = Path(shutil.copytree(saved("glm4-moe")[0], tmp_path / "moe"))
    lost = "model.layers.1.mlp.shared_experts.down_proj.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != lost})
    with pytest.raises(WdlibError, match="Layer 1 of moe has no down of some expert"):
        inventory(folder)


# GGUF --------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str, tensors: dict, fields: dict | None = None) -> Path:
    """Write arrays, or (bytes, quantisation) pairs, with the settings of the tiny models."""
    writer = gguf.GGUFWriter(path, architecture)
    settings = {
        "block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "context_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
    }
    for key, value in (settings | (fields or {})).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i} é" for i in range(64)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 64)
    for number, token in enumerate(("padding", "bos", "eos")):
        writer.add_uint32(f"tokenizer.ggml.{token}_token_id", number)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    for name, data in tensors.items():
        raw, kind = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def llama_tensors(rng, hidden=32, inner=48, kv=16, heads=4) -> dict[str, np.ndarray]:
    shapes = {
        "q": (hidden, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    return {
        f"blk.{layer}.{GGUF_NAMES[kind]}.weight": rng.standard_normal(shape).astype(np.float32)
        for layer in (0, 1)
        for kind, shape in shapes.items()
    }


def surroundings(rng, extra: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The tensors of a tiny model that are no projections."""
    norms = [f"blk.{n}.{norm}.weight" for n in (0, 1) for norm in ("attn_norm", "ffn_norm")]
    ones = {name: np.ones(32, np.float32) for name in (*norms, "output_norm.weight", *extra)}
    tables = {name: rng.standard_normal((64, 32)).astype(np.float32) for name in ("token_embd",)}
    return ones | {f"{name}.weight": table for name, table in tables.items()}


def test_gguf_equals_what_transformers_loads(tmp_path):
    """llama.cpp reorders the rows of q and k of Llama; both readers must undo it."""
    rng = np.random.default_rng(0)
    path = write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors(rng) | surroundings(rng))
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    found = read(path)
    assert len(found) == 14
    for layer, block in enumerate(model.model.layers):
        for kind, module in LLAMA_NAMES.items():
            np.testing.assert_array_equal(
                found[layer, kind, None], as_linear(block.get_submodule(module)), err_msg=kind
            )


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_fused_gguf_equals_what_transformers_loads(architecture, tmp_path):
    """Save what transformers made of the GGUF; the matrices read from both are the same."""
    rng = np.random.default_rng(9)
    shapes = {"attn_qkv": (96, 32), "attn_output": (32, 32), "ffn_up": (128, 32)}
    shapes |= {"ffn_down": (32, 128)}
    settings = {"attention.head_count_kv": 4, "feed_forward_length": 128}
    if architecture == "phi3":
        shapes |= {"attn_qkv": (64, 32), "ffn_up": (256, 32)}
        settings["attention.head_count_kv"] = 2
    tensors = surroundings(rng) | {
        f"blk.{layer}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    path = write_gguf(tmp_path / "tiny.gguf", architecture, tensors, settings)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "saved")
    ours, theirs = read(path), read(tmp_path / "saved")
    assert ours.keys() == theirs.keys()
    assert len(ours) == {"gpt2": 12, "phi3": 14}[architecture]
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=str(key))


def test_gguf_of_other_architectures_keeps_the_order_of_rows(tmp_path):
    tensors = llama_tensors(np.random.default_rng(1))
    found = read(write_gguf(tmp_path / "tiny.gguf", "qwen2", tensors))
    for layer in (0, 1):
        for kind, name in GGUF_NAMES.items():
            wanted = tensors[f"blk.{layer}.{name}.weight"]
            np.testing.assert_array_equal(found[layer, kind, None], wanted)


@pytest.mark.parametrize("architecture", ["phi3", "glm4", "chatglm", "plamo2", "plamo3"])
def test_fused_gguf(architecture, tmp_path):
    tensors = llama_tensors(np.random.default_rng(2))
    fused = {}
    for n in (0, 1):
        old = {kind: tensors[f"blk.{n}.{name}.weight"] for kind, name in GGUF_NAMES.items()}
        fused[f"blk.{n}.attn_qkv.weight"] = np.concatenate([old[kind] for kind in "qkv"])
        fused[f"blk.{n}.attn_output.weight"] = old["o"]
        fused[f"blk.{n}.ffn_up.weight"] = np.concatenate([old["gate"], old["up"]])
        fused[f"blk.{n}.ffn_down.weight"] = old["down"]
    found = read(write_gguf(tmp_path / "tiny.gguf", architecture, fused))
    for layer in (0, 1):
        for kind, name in GGUF_NAMES.items():
            wanted = tensors[f"blk.{layer}.{name}.weight"]
            np.testing.assert_array_equal(found[layer, kind, None], wanted)


def test_gate_and_up_joined_where_no_rule_says_so_are_refused(tmp_path):
    tensors = llama_tensors(np.random.default_rng(2))
    for n in (0, 1):
        gate, up = tensors.pop(f"blk.{n}.ffn_gate.weight"), f"blk.{n}.ffn_up.weight"
        tensors[up] = np.concatenate([tensors[up], gate])
    path = write_gguf(tmp_path / "tiny.gguf", "neo-bert", tensors)
    with pytest.raises(WdlibError, match=r"ffn_up\.weight .* 96 rows.* 48 columns: it joins gate"):
        inventory(path)


@pytest.mark.parametrize("form", ["one tensor", "gate and up joined", "a tensor each"])
def test_experts_in_gguf(tmp_path, form):
    rng = np.random.default_rng(3)
    tensors = {k: v for k, v in llama_tensors(rng).items() if "attn" in k}
    gate, up = rng.standard_normal((2, 3, 24, 32)).astype(np.float32)
    down = rng.standard_normal((3, 32, 24)).astype(np.float32)
    experts = {"gate": gate, "up": up, "down": down}
    for layer in (0, 1):
        block = f"blk.{layer}.ffn_"
        if form == "one tensor":
            tensors |= {f"{block}{kind}_exps.weight": data for kind, data in experts.items()}
            shared = ((kind, data[0]) for kind, data in experts.items())
            tensors |= {f"{block}{kind}_shexp.weight": data for kind, data in shared}
        elif form == "gate and up joined":
            tensors[f"{block}gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
            tensors[f"{block}down_exps.weight"] = down
        else:
            for kind, data in experts.items():
                tensors |= {f"{block}{kind}.{e}.weight": data[e] for e in range(3)}
    found = read(write_gguf(tmp_path / "tiny.gguf", "qwen2moe", tensors))
    for kind, data in experts.items():
        for expert in range(3):
            np.testing.assert_array_equal(found[1, kind, expert], data[expert])
        assert ((1, kind, None) in found) == (form == "one tensor")


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
    path = write_gguf(tmp_path / "tiny.gguf", "phi3", pairs, fields)
    found = read(path)
    qkv, up = whole["blk.0.attn_qkv.weight"], whole["blk.0.ffn_up.weight"]
    wanted = {"q": qkv[:512], "k": qkv[512:768], "v": qkv[768:], "gate": up[:256], "up": up[256:]}
    wanted |= {"o": whole["blk.0.attn_output.weight"], "down": whole["blk.0.ffn_down.weight"]}
    for key, matrix in wanted.items():
        np.testing.assert_array_equal(found[0, key, None], matrix, err_msg=key)
    assert {e.dtype for e in inventory(path)} == {kind.name}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_values_are_near_those_that_went_in(kind, tmp_path):
    tensors = llama_tensors(np.random.default_rng(5), inner=64)
    pairs = {k: (gguf.quants.quantize(v, Quant[kind]), Quant[kind]) for k, v in tensors.items()}
    found = read(write_gguf(tmp_path / "tiny.gguf", "qwen2", pairs))
    step = {"Q4": 1 / 7, "Q5": 1 / 15, "Q8": 1 / 127, "BF": 1 / 256, "F1": 1 / 2048}[kind[:2]]
    for layer in (0, 1):
        for type_, name in GGUF_NAMES.items():
            wanted = tensors[f"blk.{layer}.{name}.weight"]
            assert np.abs(found[layer, type_, None] - wanted).max() < step * np.abs(wanted).max()


def test_gguf_header_is_the_one_of_gguf_reader(tmp_path):
    rng = np.random.default_rng(6)
    tensors = llama_tensors(rng) | surroundings(rng)
    path = write_gguf(tmp_path / "tiny.gguf", "llama", tensors)
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
        assert metadata[key] == (None if is_array else field.contents())


# What cannot be read -----------------------------------------------------------------------------


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(saved("llama")[0], tmp_path / "llama"))


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(change(tensors), path)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_the_tensor(llama, bad):
    def spoil(tensors):
        tensors[DOWN] = tensors[DOWN].copy()
        tensors[DOWN][3, 5] = bad
        return tensors

    rewrite(llama, spoil)
    with pytest.raises(WdlibError, match=re.escape(f"{DOWN} of model.safetensors holds NaN")):
        list(stream.projections(llama))


def test_huge_finite_values_are_no_error(llama):
    rewrite(llama, lambda t: t | {DOWN: np.full_like(t[DOWN], np.finfo(np.float32).max)})
    assert len(list(stream.projections(llama))) == 14


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_truncated_safetensors(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WdlibError, match=r"model\.safetensors is truncated"):
        inventory(llama)


def test_truncated_after_the_header_was_read(llama):
    stream = stream.projections(llama, types=["down"])
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(WdlibError, match=r"ends inside the tensor model\.layers\.0\.mlp\.down"):
        list(stream)


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
        (edit(DOWN, dtype="F8_E4M3"), f"{re.escape(DOWN)} .* is stored as F8_E4M3"),
        (edit(DOWN, dtype="X7"), f"{re.escape(DOWN)} .* is stored as X7"),
        (edit(DOWN, dtype="U8"), f"{re.escape(DOWN)} .* is stored as U8"),
    ],
)
def test_damaged_safetensors_headers(llama, change, message):
    change_header(llama / "model.safetensors", change)
    with pytest.raises(WdlibError, match=message):
        stream.projections(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != DOWN}, "Layer 1 of llama has no down"),
        (
            lambda t: {k: v for k, v in t.items() if "layers.1." not in k},
            "Layer 1 of llama has no q",
        ),
        (lambda t: {k.replace("q_proj", "qry"): v for k, v in t.items()}, "Layer 0 .* has no q"),
        (lambda t: {f"other.{k}": v for k, v in t.items()}, r"\(seen: other\..*add rows"),
        (lambda t: {k.replace("weight", "qweight"): v for k, v in t.items()}, "quantised weights"),
        (lambda t: t | {DOWN: t[DOWN].T.copy()}, f"{re.escape(DOWN)} .* does not fit a hidden"),
        (lambda t: t | {DOWN: t[DOWN].ravel()}, f"{re.escape(DOWN)} .* is no matrix"),
        (lambda t: t | {f"language_model.{DOWN}": t[DOWN]}, "has down twice"),
    ],
)
def test_names_that_do_not_fit(llama, change, message):
    rewrite(llama, change)
    with pytest.raises(WdlibError, match=message):
        inventory(llama)


PACKED = {
    "bitsandbytes": lambda q: {"weight": np.zeros((512, 1), np.uint8), "weight.absmax": q[0]},
    "bitsandbytes, stored as float": lambda q: {"weight": q.reshape(-1, 1), "weight.absmax": q[0]},
    "MLX": lambda q: {"weight": q[:, :4].astype(np.uint32), "scales": q[:, :1], "biases": q[:, :1]},
}


@pytest.mark.parametrize("by", PACKED)
def test_quantised_weights_of_another_shape_are_called_so(llama, by):
    def pack(tensors):
        found = {k: v for k, v in tensors.items() if "_proj" not in k}
        for name in tensors.keys() - found.keys():
            packed = PACKED[by](tensors[name])
            found |= {name.replace("weight", end): data for end, data in packed.items()}
        return found

    rewrite(llama, pack)
    with pytest.raises(WdlibError, match="holds quantised weights .*: use the unquantised check"):
        inventory(llama)


def test_an_expert_is_missing(saved, tmp_path):
    folder = Path(shutil.copytree(saved("mixtral")[0], tmp_path / "moe"))
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != lost})
    with pytest.raises(WdlibError, match="Layer 1 of moe has no down of some expert"):
        inventory(folder)


def test_a_shard_lacks_a_layer(saved, tmp_path):
    saved("llama")[1].save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    kept = {k: v for k, v in table.items() if v != table[DOWN]}
    index.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(WdlibError, match=r"Layer 1 of .* has no"):
        inventory(tmp_path)


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
    config.write_text(json.dumps({"num_attention_heads": 5, "num_key_value_heads": 3}))
    with pytest.raises(WdlibError, match=r"qkv_proj.* has 64 rows, which does not fit 5"):
        inventory(folder)
    config.write_text("no json")
    with pytest.raises(WdlibError, match=r"config\.json is not a model's configuration"):
        inventory(folder)


def test_stacks_beyond_the_decoder_are_left_out(llama):
    """Multi-token prediction stores further layers behind the last one."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    rewrite(llama, lambda t: t | {"mtp.layers.0.self_attn.q_proj.weight": t[DOWN]})
    assert {e.layer for e in inventory(llama)} == {0}
    (llama / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 1}}))
    assert {e.layer for e in inventory(llama)} == {0}
    (llama / "config.json").write_text(json.dumps(config | {"text_config": None}))
    assert {e.layer for e in inventory(llama)} == {0, 1}
    tensors, more = llama_tensors(np.random.default_rng(10)), {"nextn_predict_layers": 1}
    path = write_gguf(llama / "tiny.gguf", "glm4moe", tensors, more)
    assert {e.layer for e in inventory(path)} == {0}


@pytest.fixture
def tiny_gguf(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", "llama", llama_tensors(np.random.default_rng(7)))


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
    with pytest.raises(WdlibError, match="one part of a split model"):
        inventory(tmp_path / "part.gguf")


def test_gguf_type_that_cannot_be_dequantised(tmp_path):
    tensors = llama_tensors(np.random.default_rng(8))
    tensors["blk.1.ffn_up.weight"] = np.ones((48, 32), np.int32)
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", tensors)
    with pytest.raises(WdlibError, match=r"blk\.1\.ffn_up\.weight .* is stored as I32"):
        stream.projections(path)


# --- values and requantisation ------------------------------------------------------------------


def test_value_distributions_have_the_moments_of_all_layers_together(tmp_path):
    rng = np.random.default_rng(0)
    layers = [rng.laplace(0.3, 1.0 + layer, (64, 64)).astype(np.float32) for layer in range(3)]
    save_llama(tmp_path / "model.safetensors", layers)
    found = value_distributions(tmp_path / "model.safetensors", reach=40)
    together = np.concatenate([matrix.ravel() for matrix in layers]).astype(np.float64)
    for v in found.values():
        assert v.n == together.size
        assert v.mean == pytest.approx(together.mean())
        assert v.standard_deviation == pytest.approx(together.std())
        assert v.excess_kurtosis == pytest.approx(scipy.stats.kurtosis(together))
        width = v.centres[1] - v.centres[0]
        assert (v.density * width).sum() == pytest.approx(1)
        assert (v.density * width * v.centres**2).sum() == pytest.approx(1, abs=0.01)


def save_llama(path, layers):
    """A checkpoint with Llama's names whose seven matrices per layer are one and the same."""
    attention = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    names = [*attention, *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))]
    tensors = {
        f"model.layers.{layer}.{name}.weight": matrix
        for layer, matrix in enumerate(layers)
        for name in names
    }
    save_file(tensors, path)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_values_that_are_all_equal_have_no_distribution(value, tmp_path):
    save_llama(tmp_path / "flat.safetensors", [np.full((64, 64), value, np.float32)] * 2)
    with pytest.raises(WdlibError, match="values of type q of flat are all equal"):
        value_distributions(tmp_path / "flat.safetensors")


def test_requantising_is_what_gguf_does_and_keeps_the_rest():
    matrix = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    before = stream.Projection(3, "up", "some.weight", matrix)
    after = stream.requantise(before, "Q4_1")
    kind = Quant.Q4_1
    expected = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
    np.testing.assert_array_equal(after.matrix, expected)
    assert (after.layer, after.type, after.name) == (3, "up", "some.weight")
    again = stream.requantise(after, "Q4_1").matrix
    step = np.ptp(matrix.reshape(-1, 32), axis=1).max() / 15
    assert 0 < np.abs(after.matrix - matrix).max() < 0.52 * step
    assert np.abs(again - after.matrix).max() < 0.01 * step


@pytest.mark.parametrize(("columns", "kind"), [(33, "Q4_1"), (64, "Q4_K"), (64, "nonsense")])
def test_requantising_refuses_what_cannot_be_stored(columns, kind):
    p = stream.Projection(0, "q", "some.weight", np.zeros((2, columns), np.float32))
    with pytest.raises(WdlibError, match=f"some.weight.*{kind}"):
        stream.requantise(p, kind)
