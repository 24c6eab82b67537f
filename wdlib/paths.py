"""Where things are, and how a file gets there whole. Nothing else computes a path.

The project runs from a checkout (`make`, or `pip install -e .`): data, notebooks and figures stand
beside the package. Two environment variables move what is written: `WDLIB_CACHE` the downloads and
intermediate results, `WDLIB_FIGURES` the figures.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
SPECTRA = DATA / "spectra"
RESULTS = DATA / "results"
CATALOGUE = DATA / "models.toml"
CACHE = Path(os.environ.get("WDLIB_CACHE", DATA / "cache")).expanduser().absolute()
FIGURES = Path(os.environ.get("WDLIB_FIGURES", ROOT / "figures")).expanduser().absolute()
STYLE = ROOT / "wdlib" / "wdlib.mplstyle"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, renamed to it if the block succeeds, else removed.

    Makes the folder. A reader of `path` sees the file that was there before or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
