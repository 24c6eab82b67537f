"""Checkpoint -> a transformers causal language model and its tokenizer.

transformers parses a GGUF file four times, which takes half a minute, and drops a step of some
tokenizers. So a GGUF file is converted once, into an ordinary folder in the cache: float32 weights
(four bytes a parameter), configuration and tokenizer. The rest of the package sees one kind of
model wherever the weights come from.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from wdlib import WdlibError, first_line, paths
from wdlib.checkpoints.architectures import tensor_role
from wdlib.checkpoints.files import Checkpoint, content_hash, resolve, shards
from wdlib.checkpoints.headers import gguf_header
from wdlib.checkpoints.listing import INDEX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DIGIT_SPLITTING = ("smollm",)
"""Values of a GGUF file's `tokenizer.ggml.pre` whose tokenizers make each digit a token."""

_CONVERSION = 1
"""Raised when `_convert` makes another folder of the same file."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_log = logging.getLogger(__name__)


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
    """Keep transformers' notices and bars out of the caller's output; errors still show."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # That of the GGUF reader knows no switch, and would be a widget in a notebook.
    bar, gguf_reader.tqdm = gguf_reader.tqdm, lambda tensors, **_: tensors
    try:
        yield
    finally:
        logging.set_verbosity(level)
        gguf_reader.tqdm = bar
        if has_bars:
            logging.enable_progress_bar()


def load(model: str | Path | Checkpoint, *, dtype: str = "float32") -> Pretrained:
    """The model that a name of the catalogue, a hub id, a folder or a GGUF file stands for.

    A GGUF file is dequantised into an ordinary model, which can be saved and trained; the first
    call keeps it in the cache.

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
    if gguf:
        folder = _converted(checkpoint)
    with _reading(checkpoint):
        loaded, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, **_LOCAL
        )
        tokenizer = _tokenizer(folder)
    _check_whole(checkpoint, loaded, told)
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
    if file.suffix == ".gguf" and len(checkpoint.files) > 1:
        raise WdlibError(
            f"{file} is one part of a split model, of which transformers would read no other: join "
            "the parts with `llama-gguf-split --merge`"
        )
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


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(folder, **_LOCAL)


def _converted(checkpoint: Checkpoint) -> Path:
    """The folder in the cache that holds a GGUF file's model; made where it is not there whole."""
    (file,) = checkpoint.files
    decides = {name: metadata.version(name) for name in ("gguf", "tokenizers", "transformers")}
    decides |= {"file": content_hash(checkpoint), "conversion": str(_CONVERSION)}
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    folder = paths.CACHE / "converted" / f"{Path(file.name).stem}-{key[:16]}"
    if paths.is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if paths.is_whole(folder):
            return folder
        if folder.exists():
            _log.warning("%s is damaged and is made again", folder)
            shutil.rmtree(folder)
        with paths.scratch(folder.parent, folder.name) as scratch:
            made = scratch / folder.name
            try:
                _convert(checkpoint, made)
                paths.mark_whole(made)
            except OSError as error:
                raise WdlibError(
                    f"{checkpoint.name} is kept in {folder.parent} with 4 bytes a parameter, which "
                    f"failed ({first_line(error)}): make room, or set WDLIB_CACHE to another folder"
                ) from error
            made.rename(folder)
    return folder


def _convert(checkpoint: Checkpoint, folder: Path) -> None:
    """Save what transformers reads of a GGUF file, its tokenizer repaired, as an ordinary model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    beside, gguf = _source(checkpoint)
    with _reading(checkpoint):
        loaded, told = AutoModelForCausalLM.from_pretrained(
            beside, dtype="float32", output_loading_info=True, **_LOCAL, **gguf
        )
        tokenizer = AutoTokenizer.from_pretrained(beside, **_LOCAL, **gguf)
    _check_whole(checkpoint, loaded, told)
    header, _ = gguf_header(beside / gguf["gguf_file"])
    if header.get("tokenizer.ggml.pre") in DIGIT_SPLITTING:
        _split_digits(tokenizer)
    # transformers saves no model that remembers a quantised file.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.generation_config = loaded.generation_config
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        plain.save_pretrained(folder, state_dict=loaded.state_dict())
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Put back the step of SmolLM's tokenizer that transformers' GGUF reader drops."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
