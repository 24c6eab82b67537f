"""Where things are, and how a file gets there whole and comes back. Nothing else computes a path.

A checkout (`make`, or `pip install -e .`) has data, notebooks and figures beside the package, and
everything is written there. An installed copy carries the catalogue, stored spectra, fingerprints
and characterisations inside the package. Its cache is the user's, and results of one's own go to
the working folder, in the same folders as in a checkout. Three environment variables move what is
written: `WDLIB_CACHE` downloads and intermediate results, `WDLIB_HOME` results and figures,
`WDLIB_FIGURES` the figures alone.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from glob import escape
from itertools import islice
from pathlib import Path
from shutil import rmtree
from stat import S_ISDIR, S_ISREG
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from filelock import FileLock, Timeout

from wdlib import WdlibError, first_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

PACKAGE = Path(__file__).resolve().parent
_CARRIED = PACKAGE / "data"
_IS_INSTALLED = _CARRIED.is_dir()


def _user_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("wdlib", appauthor=False)


def _given(variable: str, default: Path) -> Path:
    """The folder that an environment variable names, if it is set and not empty."""
    return Path(os.environ.get(variable) or default).expanduser().absolute()


HOME = _given("WDLIB_HOME", Path.cwd() if _IS_INSTALLED else PACKAGE.parent)
ROOT = HOME if _IS_INSTALLED else PACKAGE.parent
DATA = _CARRIED if _IS_INSTALLED else ROOT / "data"
CACHE = _given("WDLIB_CACHE", _user_cache() if _IS_INSTALLED else DATA / "cache")
NOTEBOOKS = ROOT / "notebooks"
CATALOGUE = DATA / "models.toml"
SPECTRA = DATA / "spectra"
RESULTS = DATA / "results"
OWN_RESULTS = HOME / "data" / "results"
FIGURES = _given("WDLIB_FIGURES", HOME / "figures")
STYLE = PACKAGE / "wdlib.mplstyle"

TEXT_BYTES = 2**28
"""Larger files, unpacked, are no texts of this project, nor data that it is made for."""

_LOCK = ".lock"
"""In a folder of `scratch`, locked as long as its process lives."""

_T = TypeVar("_T")
Others = Literal["forbid", "ignore"]
"""What becomes of names in a JSON object that its type lacks: refused, or left out."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, renamed to it if the block succeeds, else removed.

    Makes the folder. A reader of `path` sees the file that was there before or the new one.
    """
    # In a folder of this process alone, nobody can have planted a link where the file is written.
    with scratch(path.parent, path.name) as folder:
        part = folder / path.name
        try:
            yield part
            os.replace(part, path)
        except OSError as error:
            if error.filename is None and error.errno:  # a full disk says no name
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder of this process alone inside `folder`, which is made; removed at the end.

    name: of the work. What killed processes of the same user left of work of this name is removed
    first. The folder of a live process is locked, on whichever machine it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{escape(name)}.*.part"):
        _remove_unlocked(left)
    made, lock = _locked_folder(folder, name)
    try:
        yield made
    finally:
        lock.release()
        rmtree(made, ignore_errors=True)


def _locked_folder(folder: Path, name: str) -> tuple[Path, FileLock]:
    while True:
        made = Path(mkdtemp(dir=folder, prefix=f".{name}.", suffix=".part"))
        lock = FileLock(made / _LOCK)
        with suppress(OSError):  # it is gone: taken for one that nobody has locked
            lock.acquire()
            if (made / _LOCK).exists():
                return made, lock


def _remove_unlocked(folder: Path) -> None:
    """Remove a folder of `scratch` whose process has ended."""
    with suppress(OSError, Timeout):  # gone since, or of a live process
        seen = folder.lstat()
        mine = S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid()  # a link may be planted
        if mine and (folder / _LOCK).exists():
            with FileLock(folder / _LOCK, timeout=0):
                rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_WHOLE = "whole"
"""The file that says of a folder that it is written to its end."""


def mark_whole(folder: Path) -> None:
    """Say of a folder that it is written to its end, and what its files hold."""
    found = {p: p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*"))}
    held = {name: file_sha256(p) for p, name in found.items() if p.is_file()}
    write_text(folder / _WHOLE, json.dumps(held))


def is_whole(folder: Path) -> bool:
    """Whether a folder was written to its end and all of its files are as they were then."""
    try:
        mark = (folder / _WHOLE).read_bytes() or b"{}"  # of an earlier version
        held = parse_json(mark, dict[str, str], what="no mark", remedy="")
    except (OSError, WdlibError):
        return False
    found = {folder / name: sha256 for name, sha256 in held.items()}
    return all(p.is_file() and file_sha256(p) == sha256 for p, sha256 in found.items())


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically; returns its path."""
    path = Path(path)
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def json_lines(path: Path) -> list[Any]:
    """What the lines of a JSON-lines file hold, gzipped or not; empty lines hold nothing.

    Not by `splitlines`: a text may hold other separators, such as U+2028.
    Raises: what `open` and `json.loads` raise.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
        pieces = iter(partial(lines.read, 2**20), "")
        text = "".join(islice(pieces, TEXT_BYTES // 2**20))
        if next(pieces, ""):
            raise ValueError(f"it has more than {TEXT_BYTES} characters")
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def read_json(
    path: str | Path, kind: type[_T], *, what: str, remedy: str, others: Others = "forbid"
) -> _T:
    """The content of a JSON file, as `parse_json` reads it.

    Raises: WdlibError as `parse_json` does, and where the file cannot be read.
    """
    try:
        seen = os.stat(path)
        if not S_ISREG(seen.st_mode) or seen.st_size > TEXT_BYTES:
            raise OSError(f"it is no file of up to {TEXT_BYTES} bytes")
        content = Path(path).read_bytes()
    except OSError as error:
        raise WdlibError(f"{path} does not hold {what} ({first_line(error)}): {remedy}") from error
    return parse_json(
        content, kind, what=f"{path} does not hold {what}", remedy=remedy, others=others
    )


def parse_json(
    content: str | bytes | bytearray,
    kind: type[_T],
    *,
    what: str,
    remedy: str,
    others: Others = "forbid",
) -> _T:
    """JSON that comes from anywhere, as a value of a type: dataclasses, tuples, typed dictionaries.

    Types are strict: a number in quotes is a text, 1.0 is no integer and a truth value no number.

    Arguments: what, the sentence for what is no such JSON, without its end; remedy, what to do.
    Raises: WdlibError made of the two and the reason, also where the type itself refuses its fields
    with one.
    """
    from pydantic import ValidationError

    try:
        return _adapter(cast(Any, kind)).validate_json(content, strict=True, extra=others)
    except (ValidationError, WdlibError) as error:
        raise WdlibError(f"{what} ({_reason(error)}): {remedy}") from error


def of_type(value: Any, kind: type[_T]) -> _T:
    """A value made of lists, dictionaries, texts and numbers, of a strict type, as in `parse_json`.

    Raises: ValueError with the place in the value and the reason.
    """
    from pydantic import ValidationError

    try:
        return _adapter(cast(Any, kind)).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(_reason(error)) from None


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _reason(error: "ValidationError | WdlibError") -> str:
    """The first of pydantic's reasons, with the place that it is about."""
    if isinstance(error, WdlibError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:40] for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]
