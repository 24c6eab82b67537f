"""Attacks on what transformers and peft read for us: a model's folder and an adapter."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import tiny
from fuzz.checkpoint_kinds import mutate_safetensors
from fuzz.engine import Kind
from fuzz.mutations import as_json

from wdlib.lora import adapters, pretrained


@cache
def _model() -> Any:
    return tiny.model(layers=1)


def make_model(folder: Path) -> Path:
    """A small Llama with a tokenizer, as `miniature` writes one."""
    shutil.rmtree(folder, ignore_errors=True)
    pretrained.miniature(_model().config, folder, layers=1, width=16)
    return folder / "config.json"


def make_weights(folder: Path) -> Path:
    return make_model(folder) and folder / "model.safetensors"


def make_tokenizer(folder: Path) -> Path:
    return make_model(folder) and folder / "tokenizer.json"


def read_model(path: Path) -> Any:
    return told(pretrained.load(path.parent).model, pretrained.load(path.parent).tokenizer)


def library_model(path: Path) -> Any:
    """What transformers itself makes of the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(path.parent, **given).float()
    return told(model, AutoTokenizer.from_pretrained(path.parent, **given))


def told(model: Any, tokenizer: Any) -> Any:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return state, None if tokenizer is None else tokenizer("a text, 12")["input_ids"]


def make_adapter(folder: Path) -> Path:
    """A LoRA adapter of another small Llama."""
    from peft import LoraConfig, get_peft_model

    shutil.rmtree(folder, ignore_errors=True)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with adapters.expected_peft_warnings():
        adapters.export(get_peft_model(tiny.model(layers=1), config), folder)
    return folder / "adapter_config.json"


def make_adapter_weights(folder: Path) -> Path:
    return make_adapter(folder) and folder / "adapter_model.safetensors"


def read_adapter(path: Path) -> Any:
    model = adapters.load(tiny.model(layers=1), path.parent)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def library_adapter(path: Path) -> Any:
    """What peft itself makes of it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = PeftModel.from_pretrained(tiny.model(layers=1), path.parent)
    json.loads((path.parent / "adapter_config.json").read_bytes().decode())
    return {name: value.numpy() for name, value in model.state_dict().items()}


KINDS = (
    Kind("model: config.json", make_model, as_json, read_model, library_model, 12),
    Kind("model: weights", make_weights, mutate_safetensors, read_model, library_model, 12),
    Kind("model: tokenizer.json", make_tokenizer, as_json, read_model, library_model, 12),
    Kind("adapter: configuration", make_adapter, as_json, read_adapter, library_adapter, 12),
    Kind(
        "adapter: weights",
        make_adapter_weights,
        mutate_safetensors,
        read_adapter,
        library_adapter,
        12,
    ),
)
