"""Tiny models and made-up results, which tests read in place of real ones: one home for all.

torch, transformers and gguf are imported where they are used: most tests need none of them.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from wdlib import TYPES, paths
from wdlib.characterise import Characterisation, Group, Pair, Verdict
from wdlib.checkpoints.stream import projections
from wdlib.lora.benchmarks import option_orders
from wdlib.lora.scores import Scores
from wdlib.spectra.kernel import SingularValues
from wdlib.spectra.store import Spectra


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def script(name: str) -> ModuleType:
    """A script of the workflow, imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(paths.ROOT / "workflow" / "scripts")
        return importlib.import_module(name)


# Names ----------------------------------------------------------------------------------------

LLAMA_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The module of each type, below a layer."""

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
MPNET_NAMES = BERT_NAMES | {kind: f"attention.attn.{kind}" for kind in "qkvo"}
GGUF_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def llama_name(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{LLAMA_NAMES[kind]}.weight"


def gguf_name(layer: int, kind: str) -> str:
    return f"blk.{layer}.{GGUF_NAMES[kind]}.weight"


DOWN = llama_name(1, "down")
"""A tensor that tests damage."""


def shapes(hidden: int, inner: int | None = None) -> dict[str, tuple[int, int]]:
    """Of the seven matrices of a layer; k and v have half as many rows as q."""
    half, inner = hidden // 2, inner or hidden * 3 // 2
    square, wide = (hidden, hidden), (inner, hidden)
    attention = {"q": square, "k": (half, hidden), "v": (half, hidden), "o": square}
    return attention | {"gate": wide, "up": wide, "down": (hidden, inner)}


# Checkpoints as arrays ------------------------------------------------------------------------


def llama_tensors(layers: int = 2, hidden: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """The projections of a Llama, float32, by the names of transformers."""
    rng = np.random.default_rng(seed)
    return {
        llama_name(layer, kind): rng.standard_normal(shape, dtype=np.float32)
        for layer in range(layers)
        for kind, shape in shapes(hidden).items()
    }


def write_llama(folder: Path, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A checkpoint as transformers writes one."""
    tensors = llama_tensors(layers, hidden, seed)
    tensors["model.embed_tokens.weight"] = np.ones((5, hidden), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_mixture(folder: Path) -> Path:
    """Two layers with three routed experts and a shared one each."""

    def change(tensors: dict) -> dict:
        for name, W in [item for item in tensors.items() if ".mlp." in item[0]]:
            tensors[name.replace("mlp.", "mlp.shared_expert.")] = tensors.pop(name)
            for expert in range(3):
                tensors[name.replace("mlp.", f"mlp.experts.{expert}.")] = W * (expert + 2)
        return tensors

    rewrite(write_llama(folder), change)
    return folder


def write_alike(path: Path, matrices: Iterable[np.ndarray]) -> Path:
    """A file with Llama's names in which all seven matrices of a layer are the one given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = enumerate(matrices)
    save_file({llama_name(n, kind): matrix for n, matrix in layers for kind in TYPES}, path)
    return path


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Change the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(change(tensors), path)


def spoil(folder: Path, name: str, value: float) -> None:
    """Change one entry of a tensor."""

    def change(tensors: dict) -> dict:
        tensors[name][1, 1] = value
        return tensors

    rewrite(folder, change)


def read(model: Any, **options: Any) -> dict[tuple, np.ndarray]:
    """(layer, type, expert) -> matrix, as `projections` streams them."""
    return {(p.layer, p.type, p.expert): p.matrix for p in projections(model, **options)}


LAYERS = 6


def falling_llama(seed: int, *, slope: float = 0.7, gate: bool = True) -> dict[str, np.ndarray]:
    """Weights of LAYERS layers whose spectra fall like a power law that differs by type."""
    square, wide = (96, 96), (128, 96)
    sizes = {"q": square, "k": (32, 96), "v": (32, 96), "o": square}
    sizes |= {"gate": wide, "up": wide, "down": (96, 128)}
    found = {}
    for layer in range(LAYERS):
        for i, (kind, (rows, columns)) in enumerate(sizes.items()):
            if kind == "gate" and not gate:
                continue
            draw = np.random.default_rng([seed, layer, i])
            falling = np.arange(1, columns + 1.0) ** -(slope * (1 + 0.1 * i) * draw.uniform(0.5, 1))
            matrix = draw.standard_normal((rows, columns)) * falling * draw.uniform(0.5, 1.5)
            found[llama_name(layer, kind)] = matrix.astype(np.float32)
    return found


# GGUF -----------------------------------------------------------------------------------------


def gguf_tensors(seed: int, *, inner: int = 48) -> dict[str, np.ndarray]:
    """The projections of two layers, float32, by the names of llama.cpp."""
    rng = np.random.default_rng(seed)
    return {
        gguf_name(layer, kind): rng.standard_normal(shape).astype(np.float32)
        for layer in (0, 1)
        for kind, shape in shapes(32, inner).items()
    }


def gguf_surroundings(seed: int) -> dict[str, np.ndarray]:
    """The tensors of a tiny model that are no projections."""
    norms = [f"blk.{n}.{norm}.weight" for n in (0, 1) for norm in ("attn_norm", "ffn_norm")]
    ones = {name: np.ones(32, np.float32) for name in (*norms, "output_norm.weight")}
    table = np.random.default_rng([seed, 1]).standard_normal((64, 32)).astype(np.float32)
    return ones | {"token_embd.weight": table}


def write_gguf(path: Path, architecture: str, tensors: dict, fields: dict | None = None) -> Path:
    """Write arrays, or (bytes, quantisation) pairs, with the settings of the tiny models."""
    import gguf

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
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{key}", value)
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


def write_gguf_llama(path: Path, *, tied: bool = True, digits: bool = True) -> Path:
    """A Llama as llama.cpp writes one: partly quantised, with a byte-level BPE and a template."""
    import gguf
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "t h", "th e", "Ġ the"]
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges), "<start>", "<end>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if digits else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for m in messages %}<start>{{ m.content }}<end>{% endfor %}")
    rng = np.random.default_rng(0)
    tables = {"token_embd.weight": (len(tokens), 32)}
    tables |= {} if tied else {"output.weight": (len(tokens), 32)}
    for layer in (0, 1):
        tables |= {gguf_name(layer, k): shape for k, shape in shapes(32, 64).items()}
        tables |= {f"blk.{layer}.{norm}.weight": (32,) for norm in ("attn_norm", "ffn_norm")}
    for name, shape in (tables | {"output_norm.weight": (32,)}).items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_1
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Models of transformers -----------------------------------------------------------------------

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def model(kind: str = "llama", *, layers: int = LAYERS, **options: Any) -> Any:
    """A causal language model of small layers, with the weights of seed 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = {**SIZES, **HEADS, "num_hidden_layers": layers, **options}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()


_COMMON = {
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
GROUPED = _COMMON | {"num_key_value_heads": 2}
_WIDE = GROUPED | {"head_dim": 16}
_ROUTED = GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 64}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64}
_DECODER, _ATTENTION = "model.layers", {kind: LLAMA_NAMES[kind] for kind in "qkvo"}

ARCHITECTURES: dict[str, tuple[str, str, dict, str, dict[str, str]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, _DECODER, LLAMA_NAMES),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, _DECODER, LLAMA_NAMES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, _DECODER, LLAMA_NAMES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _WIDE, _DECODER, LLAMA_NAMES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _WIDE, _DECODER, LLAMA_NAMES),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _WIDE, _DECODER, LLAMA_NAMES),
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": _WIDE, "vision_config": _VISION},
        "model.language_model.layers",
        LLAMA_NAMES,
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        GROUPED,
        _DECODER,
        {"o": "self_attn.o_proj", "down": "mlp.down_proj"},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        "transformer.h",
        {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _COMMON,
        "gpt_neox.layers",
        {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _COMMON, "bert.encoder.layer", BERT_NAMES),
    "roberta": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        _COMMON,
        "roberta.encoder.layer",
        BERT_NAMES,
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", _COMMON, "encoder.layer", MPNET_NAMES),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        _DISTILBERT,
        "distilbert.transformer.layer",
        DISTILBERT_NAMES,
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 3},
        _DECODER,
        _ATTENTION,
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _ROUTED | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
        _DECODER,
        _ATTENTION,
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _ROUTED | {"head_dim": 8},
        _DECODER,
        _ATTENTION,
    ),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _ROUTED | {"head_dim": 8, "n_routed_experts": 3, "first_k_dense_replace": 1},
        _DECODER,
        _ATTENTION,
    ),
    "hunyuan-moe": (
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        _ROUTED | {"head_dim": 8, "moe_topk": 2},
        _DECODER,
        _ATTENTION,
    ),
}
"""Name -> class, configuration, its options, where the layers are, and the module of each type that
has one of its own."""

_SHARED = {"qwen2-moe": "shared_expert", "glm4-moe": "shared_experts", "hunyuan-moe": "shared_mlp"}


def architecture(name: str) -> Any:
    """A model of ARCHITECTURES, every matrix random (some classes start with zeros)."""
    import torch
    import transformers

    build, configure, options, _, _ = ARCHITECTURES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, configure)(**options)
    made = getattr(transformers, build)(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return made


def as_linear(module: Any) -> np.ndarray:
    """A module's weight, float32, (d_out, d_in)."""
    weight = module.weight.detach().float().numpy()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def own_weights(name: str, made: Any) -> dict[tuple, np.ndarray]:
    """(layer, type, expert) -> the weight of the module itself, where a type has its own module."""
    *_, path, names = ARCHITECTURES[name]
    wanted = {}
    for layer, block in enumerate(made.get_submodule(path)):
        for kind, module in names.items():
            wanted[layer, kind, None] = as_linear(block.get_submodule(module))
        experts = getattr(getattr(block, "mlp", None), "experts", None)
        if experts is not None:
            for expert in range(3):
                gate, up = experts.gate_up_proj[expert].detach().chunk(2)
                wanted[layer, "gate", expert] = gate.numpy()
                wanted[layer, "up", expert] = up.numpy()
                wanted[layer, "down", expert] = experts.down_proj[expert].detach().numpy()
        if name in _SHARED:
            dense = getattr(block.mlp, _SHARED[name], block.mlp)
            for kind in ("gate", "up", "down"):
                wanted[layer, kind, None] = as_linear(getattr(dense, f"{kind}_proj"))
    return wanted


# Matrices and spectra -------------------------------------------------------------------------


def gaussian(n: int, m: int, seed: int = 0) -> np.ndarray:
    """A float32 matrix of standard normal entries: its spectrum is flat."""
    return np.random.default_rng(seed).standard_normal((n, m), dtype=np.float32)


def planted(n: int, m: int, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A float64 matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((n, len(values))))
    V, _ = np.linalg.qr(rng.standard_normal((m, len(values))))
    return (U * values) @ V.T


def assert_proven(
    matrix: np.ndarray, result: SingularValues, exact: np.ndarray | None = None
) -> None:
    """The result keeps its own bound and the promised accuracy, against float64 LAPACK."""
    r = len(result.values)
    if exact is None:
        exact = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    off = np.abs(result.values - exact[:r])
    rounding = max(np.shape(matrix)) * np.finfo(float).eps * exact[0]  # LAPACK's own
    assert result.values.dtype == result.error.dtype == np.float64
    assert result.values.shape == result.error.shape == (r,)
    assert np.all(np.diff(result.values) <= 0)
    assert np.all(result.values >= 0)
    assert np.all(off <= result.error + rounding), (off / result.error).max()
    assert np.all(result.error <= np.maximum(1e-5 * result.values, rounding) * (1 + 1e-9))
    assert np.all(off <= np.maximum(1e-5 * exact[:r], 2 * rounding))


def spectra(rows: Sequence[tuple[int, int | None]], rank: int = 3) -> Spectra:
    """Made-up spectra of two types of a model "toy", both with these (layer, expert)."""
    values = np.sort(np.random.default_rng(0).uniform(1, 2, (len(rows), rank)))[:, ::-1]
    return Spectra(
        "toy",
        {"q": values, "down": values * 2},
        {"q": values * 1e-7, "down": values * 1e-8},
        {"q": tuple(rows), "down": tuple(rows)},
        {"source": "a test", "note": "ünïcode"},
        {"q": ((8, 5 + rank),) * len(rows), "down": ((7, 8),) * len(rows)},
    )


def assert_same(one: Spectra, other: Spectra) -> None:
    assert (one.model, one.rows, one.provenance) == (other.model, other.rows, other.provenance)
    assert one.shapes == other.shapes
    assert list(one.values) == list(other.values)
    for t in one.values:
        np.testing.assert_array_equal(one.values[t], other.values[t])
        np.testing.assert_array_equal(one.error[t], other.error[t])


def steep_vectors(
    k: int = 4, per: int = 12, noise: float = 0.01, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors i^-s of k steepnesses s, each `per` times, of any length; and the truth."""
    index, rng = np.arange(1, 17.0), np.random.default_rng(seed)
    truth = np.repeat(np.arange(k), per)
    falling = index ** -(0.05 + 0.3 * truth[:, None])
    noisy = falling * (1 + noise * rng.standard_normal(falling.shape))
    return noisy * np.random.default_rng(seed + 1).uniform(1, 9, (len(truth), 1)), truth


# Characterisations and scores -----------------------------------------------------------------


def characterisation(
    *groups: tuple[str, ...],
    alpha: float = 2.5,
    xmin: float = 1e-3,
    alone: tuple[str, ...] = (),
    rank: int = 8,
) -> Characterisation:
    """With these groups; all their pairs are power laws, but those of `alone`."""
    kinds = [kind for group in groups for kind in group]
    home = {kind: group for group in groups for kind in group}
    pairs = []
    for i, p in enumerate(kinds):
        for q in kinds[i:]:
            tied = home[p] is home[q] and p not in alone
            verdict = Verdict("power-law" if tied else "undecided", 0.1, 0.9, 0.0, 1e-4, 15)
            fit = (alpha, xmin) if tied else (None, None)
            pairs.append(Pair((p, q), verdict, *fit))
    return Characterisation(
        model="planted",
        rank=rank,
        groups=tuple(Group(group[0], tuple(group[1:])) for group in groups),
        pairs=tuple(pairs),
        replicates=1,
        seed=0,
        rule={},
        provenance={},
        made_by="a test",
    )


def scores(
    loglikelihood: np.ndarray, gold: Sequence[int], characters: Sequence | None = None
) -> Scores:
    """Scores (items, orders, options) of made-up items; several orders are balanced ones."""
    items, orders, width = loglikelihood.shape
    shown = np.arange(width, dtype=np.int8)[None] if orders == 1 else option_orders(orders)
    lengths = np.full((items, width), 3) if characters is None else np.array(characters)
    lengths, right = lengths.astype(np.int32), np.array(gold, np.int8)
    names = np.arange(items, dtype=np.uint32)
    return Scores(loglikelihood.astype(np.float32), shown, right, lengths, names)
