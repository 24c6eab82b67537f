"""Where things are, and how a file gets there whole and comes back. Nothing else computes a path.

The project runs from a checkout (`make`, or `pip install -e .`): data, notebooks and figures stand
beside the package. Two environment variables move what is written: `WDLIB_CACHE` the downloads and
intermediate results, `WDLIB_FIGURES` the figures.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from wdlib import WdlibError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
SPECTRA = DATA / "spectra"
RESULTS = DATA / "results"
CATALOGUE = DATA / "models.toml"
CACHE = Path(os.environ.get("WDLIB_CACHE", DATA / "cache")).expanduser().absolute()
FIGURES = Path(os.environ.get("WDLIB_FIGURES", ROOT / "figures")).expanduser().absolute()
STYLE = ROOT / "wdlib" / "wdlib.mplstyle"

_T = TypeVar("_T")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, renamed to it if the block succeeds, else removed.

    Makes the folder. A reader of `path` sees the file that was there before or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of this process alone: nobody can have planted a link where the file is written.
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder:
        part = Path(folder) / path.name
        try:
            yield part
            os.replace(part, path)
        except OSError as error:
            if error.filename is None and error.errno:  # a full disk says no name
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


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
    if not (folder / _WHOLE).is_file():
        return False
    held = json.loads((folder / _WHOLE).read_text(encoding="utf-8") or "{}")
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
        return [json.loads(line) for line in lines if line.strip()]


def read_json(path: str | Path, parse: Callable[[Any], _T], *, what: str, remedy: str) -> _T:
    """What `parse` makes of the content of a JSON file.

    Raises: WdlibError, naming the file, what it should be and the remedy, where the file cannot be
    read or `parse` cannot use it.
    """
    try:
        return parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, WdlibError) as error:
        reason = error if isinstance(error, OSError | WdlibError) else repr(error)
        raise WdlibError(f"{path} does not hold {what} ({reason}): {remedy}") from error
