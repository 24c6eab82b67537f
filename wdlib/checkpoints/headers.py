"""Headers of safetensors and GGUF files -> where each tensor lies."""

import dataclasses
import json
import math
import mmap
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from wdlib import WdlibError, first_line
from wdlib.checkpoints import companions
from wdlib.checkpoints.files import Checkpoint, config_file
from wdlib.checkpoints.formats import VALUE_BYTES, Tensor
from wdlib.checkpoints.geometry import Configuration, parse
from wdlib.checkpoints.hub import RemoteFile

HEADER_BYTES = 100_000_000
"""The format's own limit to the header of a safetensors file."""

GGML_TYPES = 1024
"""Numbers of types are below, those of forks of llama.cpp included; another one is damage."""

HEADERS_AT_ONCE = 8
"""Headers of so many files are read at the same time: on the hub, each waits for two answers."""


def read_headers(checkpoint: Checkpoint) -> tuple[Configuration, dict[str, Tensor]]:
    """Configuration and table of all files of a checkpoint; names as unquantised."""
    first = checkpoint.files[0]
    if isinstance(first, Path) and first.suffix == ".gguf":
        return _read_gguf([file for file in checkpoint.files if isinstance(file, Path)])
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        tables = list(pool.map(safetensors_header, checkpoint.files))
    file = config_file(checkpoint)
    found = Configuration({}, "")
    if file is not None:
        content = file.content() if isinstance(file, RemoteFile) else file.read_bytes()
        found = parse(content, str(file))
    joined: dict[str, Tensor] = {}
    for table in tables:
        if twice := joined.keys() & table.keys():
            raise WdlibError(
                f"The files of {checkpoint.name} hold {min(twice)} twice: they are of two models, "
                "or one is out of place; download them again."
            )
        joined |= table
    return found, companions.of_safetensors(joined, found.quantisation)


def _read_gguf(paths: list[Path]) -> tuple[Configuration, dict[str, Tensor]]:
    """Configuration and tensors of a GGUF file, or of all parts of a split one, in order."""
    tensors: dict[str, Tensor] = {}
    first: dict[str, Any] = {}
    for number, path in enumerate(paths):
        metadata, table = gguf_header(path)
        first = first or metadata
        count = metadata.get("split.count", 1) or 1
        if (metadata.get("split.no", 0), count) != (number, len(paths)):
            raise WdlibError(
                f"{path} says that it is part {metadata.get('split.no', 0) + 1} of {count}: give "
                "all parts the names that `llama-gguf-split` gave them, in one folder, or join "
                "them with `llama-gguf-split --merge`."
            )
        if twice := tensors.keys() & table.keys():
            raise WdlibError(f"{path} holds {min(twice)}, as another part does: download it again.")
        tensors |= table
    if first.get("split.tensors.count", len(tensors)) != len(tensors):
        raise WdlibError(
            f"The parts of {paths[0]} hold {len(tensors)} tensors of "
            f"{first['split.tensors.count']}: download them again."
        )
    return Configuration(first, str(paths[0]), is_gguf=True), companions.of_gguf(tensors)


def safetensors_header(path: Path | RemoteFile) -> dict[str, Tensor]:
    """Table of the tensors of a safetensors file, by name."""
    size = path.size if isinstance(path, RemoteFile) else path.stat().st_size
    start = _beginning(path, 0, min(8, size))
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, HEADER_BYTES):
        raise WdlibError(f"{path} is truncated or no safetensors file: download it again.")
    text = _beginning(path, 8, length)
    table = {}
    try:
        for name, item in json.loads(text, object_pairs_hook=_once).items():
            if name == "__metadata__":
                continue
            begin, end = item["data_offsets"]
            shape, dtype = tuple(item["shape"]), item["dtype"]
            if type(dtype) is not str or {type(n) for n in (begin, end, *shape)} != {int}:
                raise ValueError(f"another type of value for {name}")
            if min(begin, end - begin, *shape, 0) < 0:
                raise ValueError(f"a negative number for {name}")
            table[name] = Tensor(name, shape, dtype, path, 8 + length + begin, end - begin)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise WdlibError(
            f"The header of {path} is corrupt ({error!r}): download it again."
        ) from error
    for tensor in table.values():
        value = VALUE_BYTES.get(tensor.dtype)
        _check_extent(tensor, size, value and value * math.prod(tensor.shape))
    _check_order(list(table.values()), 8 + length, size, alignment=1)
    if isinstance(path, Path):
        _check_by_library(path)
    return table


def _check_by_library(path: Path) -> None:
    """Refuse what the format's own library refuses."""
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise WdlibError(
            f"The header of {path} is corrupt ({first_line(error)}): download it again."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which no name stands twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _check_order(tensors: list[Tensor], start: int, size: int, *, alignment: int) -> None:
    """Refuse a file whose tensors overlap or leave holes, but for padding: one is misplaced.

    start: of the data, in the file; size: of the file, which safetensors fill to its end.
    """
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size)):
        if tensor.offset != start:
            raise WdlibError(
                f"The header of {tensor.file} is corrupt: the tensor {tensor.name} begins at byte "
                f"{tensor.offset}, and the one before it leads to {start}; download the file again."
            )
        start += -(-tensor.size // alignment) * alignment
    if alignment == 1 and start != size and tensors:
        raise WdlibError(
            f"{tensors[0].file} is corrupt: its tensors end at byte {start} of {size}; download it "
            "again."
        )


def _beginning(path: Path | RemoteFile, offset: int, size: int) -> bytes:
    if isinstance(path, RemoteFile):
        return bytes(path.read(offset, size))
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _check_extent(tensor: Tensor, file_size: int, wanted: int | None) -> None:
    if wanted not in (None, tensor.size):
        raise WdlibError(
            f"The header of {tensor.file} is corrupt: the tensor {tensor.name} of shape "
            f"{tensor.shape} has {tensor.size} bytes; download the file again."
        )
    if tensor.offset + tensor.size > file_size:
        raise WdlibError(
            f"{tensor.file} is truncated: the tensor {tensor.name} ends at byte "
            f"{tensor.offset + tensor.size} of {file_size}; download the file again."
        )


def gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and table of the tensors of a GGUF file; long arrays (the tokenizer) are skipped.

    Shapes are in row-major order, the reverse of the file's.
    """
    size = path.stat().st_size
    if size < 24:
        raise WdlibError(f"{path} is truncated or no GGUF file: download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        if buffer[:4] != b"GGUF":
            raise WdlibError(f"{path} is no GGUF file: it does not begin with GGUF.")
        cursor = _Cursor(buffer, 4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise WdlibError(
                f"{path} has version {version} of the GGUF format, and only the little-endian "
                "versions 2 and 3 are read: convert the model again with llama.cpp."
            )
        try:
            tensors, fields = cursor.scalar("Q"), cursor.scalar("Q")
            rows = [(cursor.name(), cursor.value(cursor.scalar("I"))) for _ in range(fields)]
            metadata = _once(rows)
            table = [_gguf_tensor(cursor, path) for _ in range(tensors)]
        except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
            raise WdlibError(
                f"The header of {path} is truncated or corrupt ({error}): download it again."
            ) from error
    alignment = metadata.get("general.alignment") or 32
    aligned = type(alignment) is int and not (alignment % 8 or alignment & (alignment - 1))
    if not aligned or len({t.name for t in table}) < len(table):
        raise WdlibError(
            f"The header of {path} is corrupt (an alignment of {alignment} bytes, or a tensor "
            "twice): download it again."
        )
    data = -(-cursor.position // alignment) * alignment
    ends = sorted({t.offset for t in table} | {size - data})
    following = dict(pairwise(ends))  # of a type that is not known, all bytes up to the next tensor
    placed = {
        t.name: dataclasses.replace(
            t, offset=data + t.offset, size=following.get(t.offset, 0) if t.size < 0 else t.size
        )
        for t in table
    }
    for tensor in placed.values():
        _check_extent(tensor, size, None)
    _check_order(list(placed.values()), data, size, alignment=alignment)
    return metadata, placed


def _gguf_tensor(cursor: "_Cursor", path: Path) -> Tensor:
    """One row of a GGUF file's table of tensors; its offset still counts from the data's start.

    A type that the gguf package does not know, of a newer llama.cpp, a fork of it or a former
    version, is called by its number, and has a size of -1.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.name()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
    number = cursor.scalar("I")
    if number not in GGML_QUANT_SIZES and number < GGML_TYPES:
        return Tensor(name, shape, f"GGML type {number}", path, cursor.scalar("Q"), -1)
    kind = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise ValueError(f"the rows of {name} are no multiple of {block}")
    size = math.prod(shape) // block * block_bytes
    return Tensor(name, shape, kind.name, path, cursor.scalar("Q"), size)


_GGUF_TYPES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_U64 = struct.Struct("<Q")
_PER_LAYER = 1024
"""An array of so many numbers at most may hold one for each layer; longer ones are passed over."""


class _Cursor:
    """Walks through the header of a GGUF file."""

    def __init__(self, buffer: mmap.mmap, position: int) -> None:
        self.buffer, self.position = buffer, position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.buffer, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def name(self) -> str:
        return self._text().decode()

    def _text(self) -> bytes:
        length = self.scalar("Q")
        if length > len(self.buffer) - self.position:
            raise ValueError(f"a text of {length} bytes at byte {self.position}")
        self.position += length
        return self.buffer[self.position - length : self.position]

    def value(self, kind: int) -> Any:
        """A number, a truth value or a text; None for an array, but for one of a few numbers."""
        if kind == _GGUF_STRING:
            return self._text().decode("utf-8", "replace")
        if kind != _GGUF_ARRAY:
            return self.scalar(_GGUF_TYPES[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _GGUF_STRING:
            # Vocabularies have up to 262k entries: this loop is most of the time of a header.
            buffer, position, length = self.buffer, self.position, _U64.unpack_from
            for _ in range(count):
                position += 8 + length(buffer, position)[0]
            self.position = position
        elif kind == _GGUF_ARRAY:
            for _ in range(count):
                self.value(kind)
        elif count <= _PER_LAYER:
            return [self.scalar(_GGUF_TYPES[kind]) for _ in range(count)]
        else:
            self.position += count * struct.calcsize(f"<{_GGUF_TYPES[kind]}")
        return None
