"""Where things are. Nothing else in the project computes a path.

The project runs from a checkout (`make`, or `pip install -e .`): data, notebooks and figures stand
beside the package. Two environment variables move what is written: `WDLIB_CACHE` the downloads and
intermediate results, `WDLIB_FIGURES` the figures.
"""

import os
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
