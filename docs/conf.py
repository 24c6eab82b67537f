"""The site: `make site` builds it from the README, docs/ and the notebooks as they are stored.

The source folder is the repository, so that the links that work there work here. Nothing is
executed, and nothing of `wdlib` is imported: docs/faces.py reads docstrings from the source.
"""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

project = "wdlib"
author = re.search(r'- name: "?([^"\n]+)', (ROOT / "CITATION.cff").read_text(encoding="utf-8"))[1]
version = re.search(r'__version__ = "(.+)"', (ROOT / "wdlib/__init__.py").read_text())[1]

extensions = ["myst_nb", "sphinx_design", "sphinx.ext.mathjax", "faces"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]

nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

python_maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "Weight distributions of language models"
html_show_copyright = False
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "navbar_persistent": []}
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_context = {"default_mode": "light"}
html_favicon = "site/favicon.svg"
html_extra_path = ["site/index.html"]

ONE_FILE = "tex-svg.js"
"""All that is taken of MathJax: it holds its fonts, and loads nothing."""

(_mathjax,) = (
    path.locate()
    for path in metadata.files("sphinx-mathjax-offline") or ()
    if path.name == ONE_FILE
)
html_static_path = ["site/site.css", str(_mathjax)]
html_css_files = ["site.css"]
mathjax_path = ONE_FILE

PLUMBING = re.compile(r"^(?:import|from) |check_parameters\(|plots\.(?:save|text_table)\(", re.M)
"""Cells that import, check parameters, or only show what others computed."""


def hide_plumbing(_app: Sphinx, name: str, source: list[str]) -> None:
    """Give the cells that a reader can do without the tag that hides them behind a click."""
    if not name.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and PLUMBING.search("".join(cell["source"])):
            cell["metadata"].setdefault("tags", []).append("hide-input")
    source[0] = json.dumps(notebook)


def setup(app: Sphinx) -> None:
    """Hide plumbing as notebooks are read."""
    app.connect("source-read", hide_plumbing)
