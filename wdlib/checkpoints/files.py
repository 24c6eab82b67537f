"""A model, however it is named -> the files with its weights.

Anywhere a model is asked for, a name of the catalogue, a hub id, a local folder or a file works.
Nothing here opens the weights, and code that comes with a model is never run.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wdlib import WdlibError, first_line, paths
from wdlib.checkpoints import hub, wheels
from wdlib.checkpoints.catalogue import Model, catalogue_model, models
from wdlib.checkpoints.hub import RemoteFile

INDEX = "model.safetensors.index.json"
"""The file that says in which shard a tensor lies."""

_FORMATS = (".safetensors", ".gguf")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-]")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Checkpoint:
    """Files with weights, and where they came from.

    `files` is one GGUF file or the safetensors file(s). Those of an "hf://" model lie on the hub,
    and `config` is its config.json; that of local files lies beside them. `source` says in words
    where they came from, without a path of this machine; `revision` is the commit of a hub
    repository. `quantisation` is filled where the catalogue knows it (the data types are in
    `checkpoints.inventory`), `sha256` where the file has been checked against it, `note` with what
    else one has to know about these weights. Empty text means unknown or none.
    """

    name: str
    files: tuple[Path, ...] | tuple[RemoteFile, ...]
    source: str
    quantisation: str = ""
    revision: str = ""
    sha256: str = ""
    note: str = ""
    config: RemoteFile | None = None


def resolve(model: str | Path | Checkpoint) -> Checkpoint:
    """Find the files of a model, and fetch them if need be.

    `model` is a name of the catalogue (its first source is taken: the wheel where there is one,
    the hub otherwise), a local file or folder, or a hub id "organisation/name". A name of the
    catalogue wins over a folder of that name (write ./name for the folder, or give a Path), a
    folder over the hub. A Checkpoint is returned as it is.
    "hf://" before a hub id or a name of the catalogue (and "@revision" after it, if need be) leaves
    the weights on the hub: whoever reads a matrix then reads just its bytes from there.

    Raises WdlibError with the remedy when nothing is found, or it cannot be fetched or read.
    """
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, str) and model.startswith(hub.PREFIX):
        return _on_hub(model.removeprefix(hub.PREFIX))
    if row := catalogue_model(model):
        if row.sources[0].kind == "wheel":
            return _from_wheels(row)
        return _from_hub(row.hub_id, row.name)
    path = _expanded(model)
    if model and path.is_dir():
        return Checkpoint(path.resolve().name, _weight_files(path), f"folder {path.resolve().name}")
    if model and path.is_file():  # never a pipe, which would be waited for
        return Checkpoint(path.stem, (_checked_file(path),), f"file {path.name}")
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix not in _FORMATS:
        return _from_hub(model, model.rsplit("/", 1)[-1])
    near = difflib.get_close_matches(str(model).lower(), models(), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise WdlibError(
        f"There is no model, file or folder {str(model)!r}: give a name that `wdlib models` lists, "
        f"a hub id (organisation/name), an existing folder or an existing file.{hint}"
    )


def _expanded(model: str | Path) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError as error:  # "~nobody" names no home
        raise WdlibError(
            f"{model} names no folder ({first_line(error)}): give its path."
        ) from error


def content_hash(checkpoint: Checkpoint) -> str:
    """sha256 (hex) of a checkpoint's file; of several, of their sorted lines "name sha256"."""
    if checkpoint.sha256:
        return checkpoint.sha256
    if len(checkpoint.files) == 1:
        return _sha256(checkpoint.files[0])
    with ThreadPoolExecutor(min(len(checkpoint.files), os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, checkpoint.files))
    names = [path.name for path in checkpoint.files]
    lines = sorted(f"{name} {found}\n" for name, found in zip(names, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def listing_key(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint from others without reading it: hex, of the files as they are here.

    Made of names, sizes and (where the sha256 is not known already) times of last change, so it is
    good for going on with interrupted work, and not for saying what weights a result is from.
    """
    lines = [f"{checkpoint.name} {checkpoint.sha256}\n"]
    for file in checkpoint.files:
        if isinstance(file, RemoteFile):
            lines.append(f"{file.name} {file.size} {file.sha256 or file.commit}\n")
        else:
            seen = file.stat()
            lines.append(f"{file.name} {seen.st_size} {seen.st_mtime_ns}\n")
    lines.append(f"config {config_hash(checkpoint)}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def config_file(checkpoint: Checkpoint) -> Path | RemoteFile | None:
    """The config.json by which safetensors are read; None for GGUF, and where there is none."""
    first = checkpoint.files[0]
    if isinstance(first, RemoteFile):
        return checkpoint.config
    beside = first.parent / "config.json"
    return beside if first.suffix != ".gguf" and beside.is_file() else None


def config_hash(checkpoint: Checkpoint) -> str:
    """sha256 (hex) of `config_file`: with the weights it decides the matrices. "" without one."""
    file = config_file(checkpoint)
    return _sha256(file) if file else ""


def reading_key(checkpoint: Checkpoint) -> str:
    """Hex, of all that decides the matrices: the weights, and config.json where it is read."""
    return joined_key(content_hash(checkpoint), config_hash(checkpoint))


def joined_key(content: str, config: str) -> str:
    """`reading_key` from the two hashes, as provenance has them."""
    return hashlib.sha256(f"{content} {config}".encode()).hexdigest() if config else content


def matches_source(provenance: Mapping[str, str], model: str | Path) -> bool:
    """Whether results can be of a model's weights, by names alone: nothing is fetched or read.

    provenance: with the `source`, `sha256` and `revision` of the `Checkpoint` that they are from.
    What the catalogue knows the sha256 of is compared by it; the rest by where it is from, a folder
    by its name, and by the commit if one is asked for. A model that is not found contradicts
    nothing.
    """
    text = str(model)
    name, _, revision = text.removeprefix(hub.PREFIX).partition("@")
    on_hub = text.startswith(hub.PREFIX)
    row, path = catalogue_model(name if on_hub else model), _expanded(model)
    if row and not on_hub and row.sources[0].sha256:
        return provenance.get("sha256") == row.sources[0].sha256
    if row or on_hub or (not path.exists() and _HUB_ID.fullmatch(text)):
        source = f"hub {row.hub_id if row else name}"
    elif path.exists():
        source = f"folder {path.resolve().name}" if path.is_dir() else f"file {path.name}"
    else:
        return True
    commit = revision if on_hub and _COMMIT.fullmatch(revision) else ""
    is_there = provenance.get("revision", "").startswith(commit)
    return provenance.get("source") == source and is_there


def _sha256(file: Path | RemoteFile) -> str:
    if isinstance(file, RemoteFile):
        # The hub knows it of all but small files, which it keeps in git.
        return file.sha256 or hashlib.sha256(file.content()).hexdigest()
    return paths.file_sha256(file)


def _from_wheels(model: Model) -> Checkpoint:
    source = model.sources[0]
    first = source.packages[0]
    more = f" and {len(source.packages) - 1} more" if len(source.packages) > 1 else ""
    return Checkpoint(
        model.name,
        (wheels.cached(source),),
        f"wheel {first.name} {first.version}{more}",
        source.quantisation,
        sha256=source.sha256,
        note=source.note,
    )


# Local files -------------------------------------------------------------------------------------

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _checked_file(path: Path) -> Path:
    if path.suffix in _FORMATS:
        return path
    if path.suffix in _PICKLES:
        raise WdlibError(_convert(path))
    raise WdlibError(f"{path} is neither a .safetensors nor a .gguf file: give one of these.")


def _convert(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is read: convert it on a machine you can "
        "lose with transformers' `AutoModel.from_pretrained(folder).save_pretrained(other)`, which "
        "writes safetensors, and give that folder."
    )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files with the weights in a folder: all shards, or the one safetensors or GGUF file."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if index.is_file():
        joined = shards(index)
        if whole.is_file() and joined != (whole,):
            raise WdlibError(
                f"{folder} holds {whole.name} and {index.name}, which names other files: put one "
                "of the two into a folder of its own, with config.json, and give that."
            )
        return joined
    if whole.is_file():
        return (whole,)
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise WdlibError(
            f"{folder} holds {len(found)} files with weights ({found[0].name}, {found[1].name}, "
            f"...) and no {INDEX} that joins them: give one of the files."
        )
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES:
            raise WdlibError(_convert(path))
    raise WdlibError(f"{folder} holds no .safetensors or .gguf file: give the model's folder.")


def shards(index: Path) -> tuple[Path, ...]:
    """The files that a safetensors index names, in order, all of which have to be there."""
    names = _shard_names(index, index.read_bytes())
    for name in names:
        if not (index.parent / name).is_file():
            raise WdlibError(f"{index.parent} lacks {name}, which {index.name} names: download it.")
    return tuple(index.parent / name for name in names)


def _shard_names(index: Path | RemoteFile, content: bytes | bytearray) -> list[str]:
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
        if any(name != Path(name).name for name in names):
            raise ValueError("it names files elsewhere")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WdlibError(f"{index} is corrupt ({error!r}): download it again.") from error


# The hub -----------------------------------------------------------------------------------------

_WANTED = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "vocab*"]
_UNWANTED = ["*/*", "consolidated*"]
_PATIENCE = 8.0  # seconds


def _from_hub(hub_id: str, name: str) -> Checkpoint:
    """Download a snapshot (safetensors, configuration and tokenizer only) into the hub's cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    refused = unreachable = None
    try:
        # The client waits without a limit for a silent network: ask once, with one.
        HfApi().model_info(hub_id, timeout=_PATIENCE)
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        refused = error  # the download below gives the same answer, or finds a copy in the cache
    except Exception as error:  # whatever the client's network library raises
        unreachable = error
    try:
        folder = Path(
            snapshot_download(
                hub_id,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:
        raise _not_fetched(hub_id, unreachable or error) from error
    if not any(folder.glob("*.safetensors")):
        if failure := refused or unreachable:
            raise _not_fetched(hub_id, failure) from failure
        raise WdlibError(
            f"The hub's {hub_id} has no weights as safetensors: choose another repository of the "
            "model, or convert it and give the folder."
        )
    return Checkpoint(name, _weight_files(folder), f"hub {hub_id}", revision=folder.name)


def _not_fetched(hub_id: str, error: Exception) -> WdlibError:
    return hub.refusal(hub_id, error) or WdlibError(
        f"{hub_id} cannot be fetched from the hub ({first_line(error)}) and is not whole in the "
        "local cache: check the network, or download the model elsewhere and give its folder."
    )


def _on_hub(model: str) -> Checkpoint:
    """The files of "organisation/name", or of a name of the catalogue, left where they are."""
    name, _, revision = model.partition("@")
    row = catalogue_model(name)
    hub_id = row.hub_id if row else name
    if not _HUB_ID.fullmatch(hub_id):
        raise WdlibError(
            f"{hub.PREFIX}{model} names no model: write {hub.PREFIX}organisation/name, and "
            "@revision after it for another than the newest."
        )
    there = hub.files(hub_id, revision or None)
    index = there.get(INDEX)
    if index:
        names = _shard_names(index, index.content())
    else:
        names = [n for n in there if n.endswith(".safetensors") and "/" not in n]
        names = [n for n in names if n == "model.safetensors"] or names
    if (not index and len(names) != 1) or not there.keys() >= set(names):
        raise WdlibError(
            f"The hub's {hub_id} has no model.safetensors, and no {INDEX} whose files are all "
            "there: choose another repository of the model."
        )
    files = tuple(there[n] for n in names)
    name = row.name if row else hub_id.rsplit("/", 1)[-1]
    source, config = f"hub {hub_id}", there.get("config.json")
    return Checkpoint(name, files, source, revision=files[0].commit, config=config)
