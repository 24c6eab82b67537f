"""config.json or the metadata of a GGUF file -> the geometry of one stack of layers, checked."""

import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from wdlib import WdlibError
from wdlib.checkpoints import lexicon


@dataclass(frozen=True)
class Geometry:
    """What the names and shapes of the tensors do not say; None where the checkpoint does not.

    architectures: the `model_type` of the stack and of the model around it. width: the size of the
    hidden states. experts: routed ones of a layer that has any. mixers, mlps: a value for each
    layer; those of one value hold the same in attention, or what stands for it, and in the MLP.
    """

    architectures: tuple[str, ...] = ()
    layers: int | None = None
    heads: int | tuple[int, ...] | None = None
    kv_heads: int | tuple[int, ...] | None = None
    width: int | None = None
    experts: int | None = None
    mixers: tuple[Hashable, ...] = ()
    mlps: tuple[Hashable, ...] = ()
    predictors: int = 0
    """Layers after the stack's that predict further tokens."""
    shared_kv: int = 0
    """So many layers, the last ones, may take keys and values from others."""
    values_from_keys: bool = False

    def may_lack(self, kind: str, layer: int) -> bool:
        """Whether a layer may have no keys, or no values, of its own."""
        if kind == "v" and self.values_from_keys:
            return True
        shares = self.shared_kv and layer >= (self.layers or 0) - self.shared_kv
        return kind in ("k", "v") and bool(shares)

    def heads_of(self, layer: int) -> tuple[int | None, int | None]:
        """Heads of queries, and of keys and values, of a layer."""
        return _at(self.heads, layer), _at(self.kv_heads, layer)


def _at(value: int | tuple[int, ...] | None, layer: int) -> int | None:
    if isinstance(value, tuple):
        return value[layer] if layer < len(value) else None
    return value


@dataclass(frozen=True)
class Configuration:
    """The fields of a model, and what they are from. `is_gguf`: by the names of llama.cpp."""

    fields: Mapping[str, Any]
    where: str
    is_gguf: bool = False

    def geometry(self, kind: str) -> Geometry:
        """The geometry of a stack of a kind: "language", "encoder", "vision", ...

        Raises WdlibError for a field of another type than it has to have.
        """
        return _of_gguf(self, kind) if self.is_gguf else _of_config(self, kind)


def parse(content: bytes | bytearray, where: str) -> Configuration:
    """The content of a config.json. Raises WdlibError for what is none."""
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError(f"it is a {type(fields).__name__}")
    except ValueError as error:
        raise WdlibError(f"{where} is not a model's configuration ({error}).") from error
    return Configuration(fields, where)


_PARTS = {
    "language": "thinker_config text_config llm_config language_config decoder generator",
    "decoder": "decoder text_config text_decoder_config",
    "encoder": "encoder text_config text_encoder_config",
    "vision": "thinker_config vision_config encoder",
    "audio": "thinker_config audio_config audio_encoder_config speech_config encoder_config",
}
"""Where the configuration of a stack lies in that of a model that has several."""


def _of_config(configuration: Configuration, kind: str) -> Geometry:
    kind = kind if kind in _PARTS else "language"
    levels = [configuration.fields]
    while inner := next(
        (f for p in _PARTS[kind].split() if isinstance(f := levels[-1].get(p), dict) and f), None
    ):
        levels.append(inner)
    if kind in ("vision", "audio") and len(levels) == 1:
        own = configuration.fields.get("model_type")
        return Geometry((own,) if isinstance(own, str) else ())
    fields = _Fields(levels[-1], configuration.where)
    types = [_Fields(level, configuration.where).text("model_type") for level in reversed(levels)]
    own = () if kind not in ("encoder", "decoder") else (f"{kind}_layers", f"num_{kind}_layers")
    own_heads = (f"{kind}_attention_heads", f"num_{kind}_attention_heads") if own else ()
    layers = fields.number(*own, *_LAYERS)
    of_lists = (len(v) for name in _LISTS if isinstance(v := fields.content.get(name), list))
    layers = next(of_lists, None) if layers is None else layers
    heads = fields.number(*own_heads, *_HEADS)
    kv_heads = fields.number(*_KV_HEADS)
    # Falcon and StarCoder 1 say in a field of their own that all heads share keys and values.
    shared, new = fields.content.get("multi_query"), fields.content.get("new_decoder_architecture")
    if isinstance(shared, bool) and not new:
        kv_heads = 1 if shared else heads
    experts = fields.numbers(*_EXPERTS)
    borrowing = fields.number("num_kv_shared_layers") or 0
    if fields.content.get("kv_source_layers"):
        borrowing = layers or 0
    from_keys = not set(lexicon.VALUES_FROM_KEYS.split()).isdisjoint(types)
    return Geometry(
        architectures=tuple(t for t in types if t),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        width=fields.number("hidden_size", "d_model", "n_embd", "dim"),
        experts=experts if isinstance(experts, int) else None,  # else of several modalities
        mixers=_kinds(fields.content, layers or 0, _MIXERS),
        mlps=_kinds(fields.content, layers or 0, _MLPS),
        predictors=fields.number("num_nextn_predict_layers", "num_mtp_layers") or 0,
        shared_kv=borrowing,
        values_from_keys=from_keys or bool(fields.content.get("attention_k_eq_v")),
    )


_LAYERS = (
    *("num_hidden_groups", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = (
    *("attn_config.kv_n_heads", "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv"),
    "multi_query_group_num",
)
_EXPERTS = (
    *("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    *("num_moe_experts", "num_experts_per_layer", "ffn_config.moe_num_experts"),
)


@dataclass(frozen=True)
class _Kinds:
    """Fields that say which layers are of which kind.

    lists: a value for each layer. numbers: the numbers of some layers. periods: every so many
    layers are of another kind. borders: before this layer another kind begins.
    """

    lists: tuple[str, ...]
    numbers: tuple[str, ...]
    periods: tuple[str, ...]
    borders: tuple[str, ...] = ()


_LISTS = ("layers_block_type", "block_types", "_block_types", "hybrid_override_pattern")
_MIXERS = _Kinds(
    lists=(*_LISTS, "layer_types", "indexer_types", "attn_type_list", "attn_layers"),
    numbers=(
        *("cross_attention_layers", "full_attn_idxs", "hybrid_layer_ids", "attn_layer_indices"),
    ),
    periods=(
        *("attn_layer_period", "full_attention_interval", "layer_group_size"),
        "global_attn_every_n_layers",
    ),
)
_MLPS = _Kinds(
    lists=(*_LISTS, "mlp_layer_types", "moe_layer_freq"),
    numbers=("moe_layers", "mlp_only_layers"),
    periods=(
        *("expert_layer_period", "decoder_sparse_step", "encoder_sparse_step", "moe_layer_freq"),
        *("moe_layer_interval", "interleave_moe_layer_step"),
    ),
    borders=(
        *("first_k_dense_replace", "moe_first_k_dense_replace", "num_dense_layers"),
        *("moe_layer_start_index", "moe_layer_end_index", "leading_dense_block_count"),
    ),
)


def _kinds(fields: Mapping[str, Any], layers: int, names: _Kinds) -> tuple[Hashable, ...]:
    """A value for each layer: those of one value hold the same projections."""
    columns: list[list[Hashable]] = []
    for name in names.lists:
        value = fields.get(name)
        if isinstance(value, str | list) and len(value) == layers:
            columns.append([str(item) for item in value])
    for name in names.numbers:
        if isinstance(value := fields.get(name), list):
            columns.append([layer in value for layer in range(layers)])
    for name in names.periods:
        if isinstance(value := fields.get(name), int) and value > 1:
            columns.append([layer % value for layer in range(layers)])
    for name in names.borders:
        if isinstance(value := fields.get(name), int):
            columns.append([layer < value for layer in range(layers)])
    return tuple(zip(*columns, strict=True)) if columns else ()


class _Fields:
    """Fields of a configuration by any of their names; one of another type is refused."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        inner = (
            (f"{part}.{key}", value)
            for part, fields in content.items()
            if isinstance(fields, dict)
            for key, value in fields.items()
        )
        self.content, self.where = {**content, **dict(inner)}, where

    def text(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._refusal(key, "a text")

    def number(self, *keys: str) -> int | None:
        key = self._key(keys)
        if key is None:
            return None
        value = self.content[key]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise self._refusal(key, "a whole number")

    def numbers(self, *keys: str) -> int | tuple[int, ...] | None:
        """A number, or one for each layer."""
        key = self._key(keys)
        if key is None or not isinstance(value := self.content[key], list):
            return self.number(*keys)
        if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
            return tuple(value)
        raise self._refusal(key, "a whole number, or one for each layer")

    def _key(self, keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if self.content.get(key) is not None), None)

    def _refusal(self, key: str, what: str) -> WdlibError:
        given = json.dumps(self.content[key])
        return WdlibError(
            f"{self.where} says that {key} is {given[:40]}{'...' * (len(given) > 40)}, and it has "
            f"to be {what}: take the configuration that came with the weights."
        )


def _of_gguf(configuration: Configuration, kind: str) -> Geometry:
    where = configuration.where
    architecture = _Fields(configuration.fields, where).text("general.architecture")
    prefix = re.compile(rf"{re.escape(str(architecture))}\.(.*)")
    found = ((prefix.fullmatch(key), value) for key, value in configuration.fields.items())
    fields = _Fields({name[1]: value for name, value in found if name}, where)
    own = ("decoder_block_count",) if kind == "decoder" else ()
    layers, heads = fields.number(*own, "block_count"), fields.numbers("attention.head_count")
    # The last blocks of some models predict further tokens and are no part of the decoder.
    predictors = fields.number("nextn_predict_layers") or 0
    if layers is not None:
        layers -= predictors
    kv_heads = fields.numbers("attention.head_count_kv") or heads
    # Hybrids: a layer without attention has no heads of keys and values, one without MLP no rows.
    inner = fields.content.get("feed_forward_length")
    columns = {
        name: [n > 0 for n in numbers]
        for name, numbers in (("layer_types", kv_heads), ("mlp_layer_types", inner))
        if isinstance(numbers, tuple | list)
    }
    return Geometry(
        architectures=(architecture,) if architecture else (),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        width=fields.number("embedding_length"),
        experts=fields.number("expert_count") or None,
        mixers=_kinds({**fields.content, **columns}, layers or 0, _MIXERS),
        mlps=_kinds({**fields.content, **columns}, layers or 0, _MLPS),
        predictors=predictors,
        shared_kv=fields.number("attention.shared_kv_layers") or 0,
    )
