"""Cells that a reader can do without are hidden behind a click on the site."""

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PLUMBING = re.compile(
    r"^(?:import|from) |check_parameters\(|plots\.(?:save|text_table)\(|^(?:display\()?Markdown\(",
    re.M,
)
"""Occurs in cells that import, check parameters, or only show or tell what others computed."""


def hide(notebook: dict) -> None:
    """Give the tag that hides code to the cells of plumbing, in place."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and PLUMBING.search("".join(cell["source"])):
            cell["metadata"].setdefault("tags", []).append("hide-input")


def on_read(_app: "Sphinx", name: str, source: list[str]) -> None:
    """What Sphinx calls with the name and the text of a page; the text is replaced."""
    if name.startswith("notebooks/"):
        notebook = json.loads(source[0])
        hide(notebook)
        source[0] = json.dumps(notebook)


def setup(app: "Sphinx") -> dict[str, bool]:
    """Hide plumbing as notebooks are read."""
    app.connect("source-read", on_read)
    return {"parallel_read_safe": True}
