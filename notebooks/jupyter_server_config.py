"""Settings of `make lab`: a numbered notebook is saved as it is stored, whatever JupyterLab adds.

JupyterLab writes the kernel's version into every notebook that it opens, and saves it by itself.
"""

from pathlib import Path

import nbformat

from wdlib.notebooks import normalise


def as_stored(model: dict, path: str, **_: object) -> None:
    """A pre-save hook of the server: drops what differs from machine to machine."""
    if model["type"] == "notebook" and Path(path).match("notebooks/[0-9][0-9]_*.ipynb"):
        model["content"] = normalise(nbformat.from_dict(model["content"]))


c.FileContentsManager.pre_save_hook = as_stored  # noqa: F821 (traitlets brings `c`)
