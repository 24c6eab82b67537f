"""Checkpoint -> a transformers causal language model and its tokenizer.

What `transformers` makes of a GGUF file can't be saved, and its tokenizer lacks a step that the
model was trained with. Both are repaired here, so that the rest of the package sees one kind of
model wherever the weights come from.
"""

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wdlib import WdlibError
from wdlib.models import Checkpoint, resolve
from wdlib.weights import gguf_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIGIT_SPLITTING = ("smollm",)
"""Values of a GGUF file's `tokenizer.ggml.pre` whose tokenizers make each digit a token."""


@dataclass(frozen=True)
class Pretrained:
    """A causal language model in evaluation mode, its tokenizer, and the files they came from.

    tokenizer is None where the folder has none.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    checkpoint: Checkpoint


def load(model: str | Path | Checkpoint, *, dtype: str = "float32") -> Pretrained:
    """The model that a name of the catalogue, a hub id, a folder or a GGUF file stands for.

    Weights of a GGUF file are dequantised into an ordinary model, which can be saved and trained.

    Arguments: dtype, of the weights in memory: "float32", "bfloat16" or "float16".
    Raises: WdlibError as `resolve` does, for an unknown dtype, and for files without config.json
    or of an architecture that transformers does not know as a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in ("float32", "bfloat16", "float16"):
        raise WdlibError(f"there is no dtype {dtype!r} here: give float32, bfloat16 or float16")
    checkpoint = model if isinstance(model, Checkpoint) else resolve(model)
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
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, **gguf
            )
            tokenizer = _tokenizer(folder, gguf)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WdlibError(
            f"transformers cannot load {checkpoint.name} as a causal language model ({reason}): "
            "give a decoder's checkpoint with its config.json"
        ) from error
    if gguf:
        loaded = _plain(loaded)
        if gguf_header(file)[0].get("tokenizer.ggml.pre") in DIGIT_SPLITTING:
            _split_digits(tokenizer)
    return Pretrained(loaded.eval(), tokenizer, checkpoint)


def _tokenizer(folder: Path, gguf: dict[str, str]) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    if not gguf and not any(folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf)


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notices out of the caller's output, and its progress bars.

    The bar of its GGUF reader knows no switch, so what is written to stderr is dropped.
    """
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
