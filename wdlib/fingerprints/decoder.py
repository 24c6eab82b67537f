"""A decoder in memory, taken from transformers and given back: what `disguises` rewrite."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import TYPES, WdlibError, paths
from wdlib.checkpoints.stream import Projection

_PLAIN = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
NORMS = {
    "llama": _PLAIN,
    "qwen2": _PLAIN,
    "gemma3_text": {
        "attention": "input_layernorm",
        "after attention": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "after mlp": "post_feedforward_layernorm",
        "q": "self_attn.q_norm",
        "k": "self_attn.k_norm",
    },
}
"""Types of models that can be taken; the norms of a layer, and their modules in transformers."""

_MODULES = {t: f"self_attn.{t}_proj" for t in "qkvo"}
_MODULES |= {t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}


@dataclass(frozen=True)
class Block:
    """One layer.

    matrices[type]: (d_out, d_in), all seven of `wdlib.TYPES`. biases[type]: (d_out,), of q, k and v
    where the model has them. norms: what each norm multiplies the normalised values by, float64:
    "attention" and "mlp" before the two parts of the layer, "after attention" and "after mlp"
    before these are added to the hidden state, "q" and "k" of each head. layer_type: as the
    configuration says ("sliding_attention", ...), or empty.
    """

    matrices: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    layer_type: str = ""

    def changed(self, **matrices: np.ndarray) -> "Block":
        """The same layer with other matrices, by type."""
        return replace(self, matrices=self.matrices | matrices)


@dataclass(frozen=True)
class Decoder:
    """A model of the layout of Llama, Qwen2 or Gemma 3 (text). No array is ever written to.

    config: as `config.json` of transformers. embedding: (vocabulary, width). output: of the same
    shape, or None where the model takes its embedding for it. norm: (width,), as `Block.norms`.
    """

    config: Mapping[str, Any]
    embedding: np.ndarray
    output: np.ndarray | None
    norm: np.ndarray
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        return self.embedding.shape[1]

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config["num_key_value_heads"])

    @property
    def head_size(self) -> int:
        return len(self.blocks[0].matrices["k"]) // self.kv_heads

    @property
    def has_head_norms(self) -> bool:
        """Whether queries and keys are normalised."""
        return "q" in self.blocks[0].norms

    @property
    def has_norms_after(self) -> bool:
        """Whether what attention and MLP add to the hidden state is normalised."""
        return "after attention" in self.blocks[0].norms

    def each(self, change: Callable[[Block, np.random.Generator], Block], seed: int) -> "Decoder":
        """The model with every layer changed, each with random numbers of its own."""
        blocks = (change(b, np.random.default_rng([seed, i])) for i, b in enumerate(self.blocks))
        return replace(self, blocks=tuple(blocks))

    def projections(self) -> Iterator[Projection]:
        """The matrices as `checkpoints.projections` streams them."""
        for i, block in enumerate(self.blocks):
            for t in TYPES:
                name = f"model.layers.{i}.{_MODULES[t]}.weight"
                yield Projection(i, t, name, block.matrices[t])


def of(model: Any) -> Decoder:
    """A causal language model of transformers, taken apart; it shares the model's memory.

    Raises: WdlibError for a type of model that `NORMS` lacks, for a tensor that no field holds
    (biases of o or of the MLP), and for weights that are neither float32 nor float64.
    """
    import torch

    config = model.config.to_dict()
    kind = config.get("model_type", "")
    if kind not in NORMS:
        raise WdlibError(f"a {kind} cannot be taken apart: give one of {', '.join(NORMS)}")
    if model.dtype not in (torch.float32, torch.float64):
        raise WdlibError(f"weights of {model.dtype} cannot be taken apart: load them as float32")
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    tied = config.get("tie_word_embeddings", False)
    embedding, output = tensors.pop("model.embed_tokens.weight"), tensors.pop("lm_head.weight")
    offset = _offset(kind)
    norm = tensors.pop("model.norm.weight").astype(np.float64) + offset
    types = config.get("layer_types") or [""] * config["num_hidden_layers"]
    blocks = tuple(_block(tensors, i, kind, layer_type) for i, layer_type in enumerate(types))
    if tensors:
        raise WdlibError(f"the tensor {min(tensors)} of a {kind} is not known here: leave it out")
    return Decoder(config, embedding, None if tied else output, norm, blocks)


def _offset(kind: str) -> float:
    """Gemma stores the weights of its norms minus one."""
    return 1.0 if kind.startswith("gemma") else 0.0


def _block(tensors: dict[str, np.ndarray], i: int, kind: str, layer_type: str) -> Block:
    """A layer, whose tensors are taken out of the dictionary."""
    names = {t: f"model.layers.{i}.{module}" for t, module in _MODULES.items()}
    norms = {n: f"model.layers.{i}.{module}.weight" for n, module in NORMS[kind].items()}
    return Block(
        {t: tensors.pop(f"{name}.weight") for t, name in names.items()},
        {t: tensors.pop(f"{names[t]}.bias") for t in "qkv" if f"{names[t]}.bias" in tensors},
        {n: tensors.pop(name).astype(np.float64) + _offset(kind) for n, name in norms.items()},
        layer_type,
    )


def _tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """The tensors by their names in transformers, all of the embedding's type."""
    dtype, kind = decoder.embedding.dtype, decoder.config["model_type"]
    found = {"model.embed_tokens.weight": decoder.embedding}
    found["model.norm.weight"] = decoder.norm - _offset(kind)
    if decoder.output is not None:
        found["lm_head.weight"] = decoder.output
    for i, block in enumerate(decoder.blocks):
        start = f"model.layers.{i}"
        found |= {f"{start}.{_MODULES[t]}.weight": W for t, W in block.matrices.items()}
        found |= {f"{start}.{_MODULES[t]}.bias": b for t, b in block.biases.items()}
        for n, weights in block.norms.items():
            found[f"{start}.{NORMS[kind][n]}.weight"] = weights - _offset(kind)
    return {name: np.ascontiguousarray(tensor, dtype) for name, tensor in found.items()}


def _config(decoder: Decoder) -> Any:
    """The configuration of transformers that fits the arrays."""
    from transformers import AutoConfig

    changed: dict[str, Any] = {
        "num_hidden_layers": len(decoder.blocks),
        "intermediate_size": len(decoder.blocks[0].matrices["up"]),
        "tie_word_embeddings": decoder.output is None,
    }
    if decoder.blocks[0].layer_type:
        changed["layer_types"] = [block.layer_type for block in decoder.blocks]
    fields = {**decoder.config, **changed}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def model(decoder: Decoder) -> Any:
    """The causal language model of transformers with these weights, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    tensors = {name: torch.tensor(tensor) for name, tensor in _tensors(decoder).items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    dtype = tensors["lm_head.weight"].dtype
    made = AutoModelForCausalLM.from_config(_config(decoder), dtype=dtype)
    made.load_state_dict(tensors)
    return made.eval()


def write(decoder: Decoder, folder: str | Path) -> Path:
    """Write a checkpoint, config.json and model.safetensors, in place of the folder if it is there.

    Returns: the folder, which `checkpoints` and transformers read.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with paths.scratch(folder.parent, folder.name) as scratch:
        made = scratch / folder.name
        _config(decoder).save_pretrained(made)
        save_file(_tensors(decoder), made / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder
