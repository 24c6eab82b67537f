"""config.json or the metadata of a GGUF file -> the model's geometry, checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wdlib import WdlibError
from wdlib.checkpoints.hub import RemoteFile


@dataclass(frozen=True)
class Geometry:
    """What the names and shapes of the tensors do not say; None where the checkpoint does not."""

    architecture: str | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    predictors: int = 0
    """Layers after the decoder's that predict further tokens."""
    experts: int | None = None
    """Routed experts of a layer that has any."""
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    """`quantization_config` of config.json."""


_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads")
_PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers")
_EXPERTS = (
    *("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    *("num_moe_experts", "num_experts_per_layer"),
)


def of_config(file: Path | RemoteFile | None) -> Geometry:
    """Geometry by a model's config.json.

    Raises WdlibError for a file that is no configuration, and for a field of another type.
    """
    if file is None:
        return Geometry()
    content = file.content() if isinstance(file, RemoteFile) else file.read_bytes()
    try:
        config = json.loads(content)
        quantisation = config.get("quantization_config") or config.get("compression_config") or {}
        quantisation = quantisation if isinstance(quantisation, dict) else {}
        config = config.get("text_config") or config
        quantisation = quantisation or config.get("quantization_config") or {}
        fields = _Fields(config, f"{file}")
    except (ValueError, AttributeError, TypeError) as error:
        raise WdlibError(f"{file} is not a model's configuration ({error}).") from error
    heads = fields.number(*_HEADS)
    return Geometry(
        architecture=fields.text("model_type"),
        layers=fields.number(*_LAYERS),
        heads=heads,
        kv_heads=fields.number(*_KV_HEADS) or heads,
        predictors=fields.number(*_PREDICTORS) or 0,
        experts=fields.number(*_EXPERTS),
        quantisation=quantisation,
    )


class _Fields:
    """Fields of a configuration by any of their names; one of another type is refused."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = dict(content), where

    def text(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._refusal(key, "a text")

    def number(self, *keys: str) -> int | None:
        key = next((key for key in keys if self.content.get(key) is not None), None)
        if key is None:
            return None
        value = self.content[key]
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise self._refusal(key, "a whole number")

    def _refusal(self, key: str, what: str) -> WdlibError:
        given = json.dumps(self.content[key])
        return WdlibError(
            f"{self.where} says that {key} is {given[:40]}{'...' * (len(given) > 40)}, and it has "
            f"to be {what}: take the configuration that came with the weights."
        )


def of_gguf(metadata: Mapping[str, Any], where: str) -> Geometry:
    """Geometry by the metadata of a GGUF file. Raises WdlibError for a field of another type."""
    architecture = _Fields(metadata, where).text("general.architecture")
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    fields = _Fields(own, where)
    layers, heads = fields.number("block_count"), fields.number("attention.head_count")
    # The last blocks of some models predict further tokens and are no part of the decoder.
    predictors = fields.number("nextn_predict_layers") or 0
    return Geometry(
        architecture,
        None if layers is None else layers - predictors,
        heads,
        # An array, of a number for each layer, is read as None.
        fields.number("attention.head_count_kv") if "attention.head_count_kv" in own else heads,
        predictors,
        fields.number("expert_count") or None,
    )
