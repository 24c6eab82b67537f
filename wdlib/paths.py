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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from wdlib import WdlibError, first_line

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
        reason = first_line(error) if isinstance(error, OSError | WdlibError) else repr(error)
        raise WdlibError(f"{path} does not hold {what} ({reason}): {remedy}") from error
