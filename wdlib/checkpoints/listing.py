"""Names of the files of a model -> those that hold its weights, or why none can be read.

For a folder and for a repository of the hub alike: nothing here opens a file but an index.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from wdlib import WdlibError, paths

INDEX = "model.safetensors.index.json"
"""The file that says in which shard a tensor lies."""

FORMATS = (".safetensors", ".gguf")

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.gguf)")
_INDEX = re.compile(r".+\.safetensors\.index(?:\.[^.]+)?\.json")
_BESIDE = re.compile(r"adapter_model.*|mmproj.*|.*[.-]mmproj[.-].*|imatrix.*")
"""Files of these formats that hold no model."""

ADAPTER = "adapter_config.json"
"""Beside the weights of an adapter alone."""

_Content = Callable[[str], bytes | bytearray]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHERS = {
    ".h5": "TensorFlow", ".pb": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX",
    ".npz": "MLX or NumPy", ".nemo": "NeMo", ".tflite": "TensorFlow Lite", ".engine": "TensorRT",
    ".mlpackage": "Core ML",
}  # fmt: skip
"""Ends of the names of weights that other libraries keep -> the library."""

_RESAVE = (
    "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)`, which writes "
    "safetensors, and give that folder"
)


def weights_among(names: Collection[str], content: _Content, where: str) -> tuple[str, ...]:
    """The files with the weights: all shards, or the one safetensors or GGUF file.

    Of a name with an index, or model.safetensors, or the one file or complete set of shards; if
    there is none, so of the one folder that has one. Mistral's `consolidated` files count where
    there are no others.

    Arguments: names, with "/" between folders; content, of an index or another small file by its
    name; where, the folder or repository in words.
    Raises WdlibError where there is none, or more than one.
    """
    top = sorted(name for name in names if "/" not in name)
    if found := _of_level(top, content, where):
        return found
    below = _folders(names)
    if not below:
        raise WdlibError(f"{where} {why_none(names, content)}.")
    if len(below) > 1:
        raise WdlibError(
            f"{where} holds no weights itself, and {len(below)} folders in it do "
            f"({', '.join(sorted(below)[:3])}{', ...' * (len(below) > 3)}): give one of them."
        )
    ((folder, inside),) = below.items()
    found = weights_among(inside, lambda name: content(f"{folder}/{name}"), f"{where}/{folder}")
    return tuple(f"{folder}/{name}" for name in found)


def _folders(names: Collection[str]) -> dict[str, list[str]]:
    """The folders of the next level with weights in or below them, and what they hold."""
    below: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, slash, inside = name.partition("/")
        if slash:
            below[folder].append(inside)
    return {
        folder: inside
        for folder, inside in below.items()
        if any(_is_model(name) for name in inside)
    }


def _is_model(name: str) -> bool:
    return name.endswith(FORMATS) and not _BESIDE.fullmatch(PurePosixPath(name).name)


def _of_level(top: list[str], content: _Content, where: str) -> tuple[str, ...]:
    """The files with the weights among the names of one level; none if there are none."""
    whole = "model.safetensors"
    if INDEX in top:
        joined = shard_names(INDEX, content(INDEX), where)
        if whole in top and joined != (whole,):
            raise WdlibError(
                f"{where} holds {whole} and {INDEX}, which names other files: put one of the two "
                "into a folder of its own, with config.json, and give that."
            )
        return all_there(joined, top, where, f"which {INDEX} names")
    if whole in top:
        return (whole,)
    sets: dict[str, tuple[str, ...]] = {}
    for name in top:
        if _INDEX.fullmatch(name):
            joined = shard_names(name, content(name), where)
            sets[name] = all_there(joined, top, where, f"which {name} names")
    taken = {name for joined in sets.values() for name in joined}
    for name in top:
        joined = series(name)
        if _is_model(name) and name not in taken and joined[0] not in sets:
            sets[joined[0]] = all_there(joined, top, where, f"which goes with {name}")
    return _one_of(sets, where)


def _one_of(sets: dict[str, tuple[str, ...]], where: str) -> tuple[str, ...]:
    """The one set of files, safetensors before GGUF, and Mistral's own after the others."""
    for suffix in FORMATS:
        found = {name: files for name, files in sets.items() if files[0].endswith(suffix)}
        usual = {name: f for name, f in found.items() if not name.startswith("consolidated")}
        found = usual or found
        if len(found) > 1:
            first, second, *_ = sorted(files[0] for files in found.values())
            raise WdlibError(
                f"{where} holds {len(found)} files with weights ({first}, {second}, ...) and no "
                f"{INDEX} that joins them: give one of the files."
            )
        if found:
            return next(iter(found.values()))
    return ()


def all_there(
    wanted: tuple[str, ...], there: Collection[str], where: str, why: str
) -> tuple[str, ...]:
    """The names wanted. Raises WdlibError for one that is not there; why: half a sentence."""
    for name in wanted:
        if name not in there:
            raise WdlibError(f"{where} lacks {name}, {why}: download it.")
    return wanted


def series(name: str) -> tuple[str, ...]:
    """The names of all shards of which one has this name; the name alone if it is no shard's."""
    shard = _SHARD.fullmatch(name)
    if not shard:
        return (name,)
    stem, _, count, suffix = shard.groups()
    return tuple(f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1))


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def shard_names(index: str, content: bytes | bytearray, where: str) -> tuple[str, ...]:
    """The files that an index names, in order. Raises WdlibError for one that is damaged."""
    what, remedy = f"{where}/{index} is corrupt", "download it again"
    found = paths.parse_json(content, _Index, what=what, remedy=remedy, others="ignore")
    names = sorted(set(found.weight_map.values()))
    if not names or any(n != PurePosixPath(n).name or len(n.encode()) > 255 for n in names):
        raise WdlibError(f"{what} (it names no files, or files elsewhere): {remedy}.")
    return tuple(names)


# Why there are none ------------------------------------------------------------------------------


def why_none(names: Collection[str], content: _Content) -> str:
    """Why a folder or repository with these files is not read, as "holds ...: do ..."."""
    if ADAPTER in names:
        return adapter_of(content(ADAPTER))
    ends = {PurePosixPath(name).suffix: name for name in sorted(names, reverse=True)}
    if ".distcp" in ends:
        return (
            f"holds the parts of a model as FSDP trains it ({ends['.distcp']}): join them with "
            "`accelerate merge-weights folder other`, and give that folder with config.json in it"
        )
    deep = re.compile(r"(?:.*/)?(?:zero_to_fp32\.py|.*optim_states\.pt|zero_pp_rank_.*)")
    if found := next(filter(deep.fullmatch, sorted(names)), None):
        return (
            f"holds the parts of a model as DeepSpeed trains it ({found}): join them with "
            "`python zero_to_fp32.py folder other --safe_serialization`, and give that folder "
            "with config.json in it"
        )
    for suffix in (*_PICKLES, *_OTHERS):
        if suffix in ends:
            return f"holds no safetensors and no GGUF: {why_not(ends[suffix])}"
    return "holds no .safetensors or .gguf file: give a folder or repository that does"


def adapter_of(config: bytes | bytearray) -> str:
    """Why an adapter is not read, by its adapter_config.json."""
    try:
        base = json.loads(config)["base_model_name_or_path"] or "another model"
    except (ValueError, KeyError, TypeError):
        base = "another model"
    return (
        f"is an adapter for {base}, and no model: merge the two with peft (`PeftModel"
        ".from_pretrained(lora.pretrained.load(base).model, adapter).merge_and_unload()"
        ".save_pretrained(other)`), and give that folder"
    )


def why_not(name: str) -> str:
    """Why a file of this name is not read, as a sentence without a full stop."""
    suffix = PurePosixPath(name).suffix
    if suffix in _PICKLES:
        return (
            f"{name} is a pickle, which can run code when it is read: convert it on a machine you "
            f"can lose with transformers' {_RESAVE}"
        )
    if suffix in _OTHERS:
        return (
            f"{name} holds weights as {_OTHERS[suffix]} keeps them, which are not read: take the "
            "model's safetensors or GGUF file, or convert it to one"
        )
    if suffix == ".distcp":
        return f"{name} is a part of a model as FSDP trains it: give the folder above it"
    return f"{name} is neither a .safetensors nor a .gguf file: give one of these"
