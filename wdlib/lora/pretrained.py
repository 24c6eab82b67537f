"""Checkpoint -> a transformers causal language model and its tokenizer.

What `transformers` makes of a GGUF file can't be saved, and its tokenizer lacks a step that the
model was trained with. Both are repaired here, so that the rest of the package sees one kind of
model wherever the weights come from.
"""

import contextlib
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdlib import WdlibError, first_line, paths
from wdlib.checkpoints.architectures import tensor_role
from wdlib.checkpoints.files import INDEX, Checkpoint, resolve, shards
from wdlib.checkpoints.headers import gguf_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DIGIT_SPLITTING = ("smollm",)
"""Values of a GGUF file's `tokenizer.ggml.pre` whose tokenizers make each digit a token."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Pretrained:
    """A causal language model in evaluation mode, its tokenizer, and the files they came from.

    model: of transformers, or peft's wrapper of one. tokenizer: None where the folder has none.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase | None"
    checkpoint: Checkpoint

    def needed_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer. Raises: WdlibError where there is none."""
        if self.tokenizer is None:
            name = self.checkpoint.name
            raise WdlibError(f"{name} has no tokenizer: give the model's whole folder")
        return self.tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices out of the caller's output; errors still show."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load(model: str | Path | Checkpoint, *, dtype: str = "float32") -> Pretrained:
    """The model that a name of the catalogue, a hub id, a folder or a GGUF file stands for.

    Weights of a GGUF file are dequantised into an ordinary model, which can be saved and trained.

    Arguments: dtype, of the weights in memory: "float32", "bfloat16" or "float16".
    Raises: WdlibError as `resolve` does, for an unknown dtype, for files without config.json, of an
    architecture that transformers does not know as a causal language model, that do not fill it or
    are of more layers, or beside others that transformers would read in their place or with them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in ("float32", "bfloat16", "float16"):
        raise WdlibError(f"there is no dtype {dtype!r} here: give float32, bfloat16 or float16")
    checkpoint = resolve(model)
    folder, gguf = _source(checkpoint)
    with _reading(checkpoint):
        loaded, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, **_LOCAL, **gguf
        )
        tokenizer = _tokenizer(folder, gguf)
    _check_whole(checkpoint, loaded, told)
    if gguf:
        loaded = _plain(loaded)
        metadata, _ = gguf_header(folder / gguf["gguf_file"])
        if tokenizer and metadata.get("tokenizer.ggml.pre") in DIGIT_SPLITTING:
            _split_digits(tokenizer)
    return Pretrained(loaded.eval(), tokenizer, checkpoint)


def configuration(model: str | Path) -> "PretrainedConfig":
    """The configuration that `load` would give its model, without the weights.

    Raises: WdlibError as `load` does.
    """
    from transformers import AutoConfig

    checkpoint = resolve(model)
    folder, gguf = _source(checkpoint)
    with _reading(checkpoint):
        return AutoConfig.from_pretrained(folder, **_LOCAL, **gguf)


def miniature(
    config: "PretrainedConfig",
    folder: str | Path,
    *,
    layers: int = 2,
    width: int = 64,
    seed: int = 0,
) -> Path:
    """Save a small model of the same architecture, with random weights and a byte tokenizer.

    For showing and testing in seconds what is done with a large one.

    Arguments: config, of the large one, a decoder (see `configuration`); layers, width (a multiple
    of 8), of the small one; seed, of its weights.
    Returns: folder, to be read by `load`.
    Raises: ValueError, of transformers, for an architecture that cannot be made so small.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    end = len(vocabulary) - 1
    small = copy.deepcopy(config)
    small.update(
        {
            "vocab_size": 320,  # more than there are bytes: some families add tokens of their own
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": 3 * width // 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": width // 4,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        }
    )
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
        tokenizer.save_pretrained(folder)
    return Path(folder)


def _source(checkpoint: Checkpoint) -> tuple[Path, dict[str, str]]:
    """The folder that transformers reads, and what it needs to be told of a GGUF file."""
    file = checkpoint.files[0]
    if not isinstance(file, Path):
        raise WdlibError(
            f"{checkpoint.name} leaves its weights on the hub: give the plain hub id, without hf://"
        )
    folder = file.parent
    gguf = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    if not gguf and not (folder / "config.json").is_file():
        raise WdlibError(
            f"{folder} holds weights but no config.json: give the model's whole folder"
        )
    if (folder / "adapter_config.json").is_file():
        raise WdlibError(
            f"{folder} holds adapter_config.json, and transformers would load the adapter with the "
            "weights: give a folder without it"
        )
    if not gguf and "transformers_weights" in _config(folder):
        raise WdlibError(
            f"config.json in {folder} names the weights for transformers to load, whatever else is "
            "there: take transformers_weights out of it"
        )
    if not gguf and set(checkpoint.files) != _read_from(folder):
        raise WdlibError(
            f"transformers would not read {file.name} alone from {folder}: put it as "
            "model.safetensors into a folder of its own, with config.json"
        )
    return folder, gguf


def _check_whole(checkpoint: Checkpoint, loaded: "PreTrainedModel", told: dict[str, Any]) -> None:
    """Refuse weights that are not those of the configuration.

    told: transformers' report. It fills what is missing with random numbers, and drops layers that
    the configuration does not count.
    """
    roles = (tensor_role(name, loaded.config.model_type) for name in told["unexpected_keys"])
    dropped = {role.layer for role in roles if role}
    predictors = getattr(loaded.config, "num_nextn_predict_layers", None) or 0
    wrong = [*sorted(told["missing_keys"]), *(str(key) for key in told["mismatched_keys"])]
    if wrong or len(dropped) > predictors:
        what = f"no {wrong[0]} of the shape" if wrong else f"a layer {max(dropped)} beyond those"
        raise WdlibError(
            f"{checkpoint.name} has {what} that its configuration says: that is another model's, "
            "or the weights are incomplete; download both again"
        )


def _config(folder: Path) -> dict[str, Any]:
    remedy = "download it again"
    path, kind = folder / "config.json", dict[str, Any]
    return paths.read_json(path, kind, what="a configuration", remedy=remedy)


def _read_from(folder: Path) -> set[Path]:
    """The safetensors files that transformers reads of a folder, by their names."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return {whole}
    return set(shards(index)) if index.is_file() else set()


@contextlib.contextmanager
def _reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers says of a folder that it cannot read into one sentence."""
    try:
        # The progress bar of the GGUF reader knows no switch, so what goes to stderr is dropped.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # whatever damage makes a library raise
        if "trust_remote_code" in str(error):
            raise WdlibError(
                f"{checkpoint.name} needs code that comes with it, which is never run here: give a "
                "model of an architecture that transformers itself has"
            ) from error
        raise WdlibError(
            f"transformers cannot load {checkpoint.name} as a causal language model "
            f"({first_line(error)}): give a decoder's checkpoint with its config.json"
        ) from error


def _tokenizer(folder: Path, gguf: dict[str, str]) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    if not gguf and not any(folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(folder, **_LOCAL, **gguf)


def _plain(loaded: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in a model that does not remember a quantised file: it can be saved."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with init_empty_weights():
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    for name, buffer in loaded.named_buffers():
        module, _, leaf = name.rpartition(".")
        plain.get_submodule(module).register_buffer(leaf, buffer, persistent=False)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain


def _split_digits(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Put back the step of SmolLM's tokenizer that transformers' GGUF reader drops."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
