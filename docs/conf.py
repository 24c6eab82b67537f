"""The site: `make site` builds it from the README, docs/ and the notebooks as they are stored.

The source folder is the repository, so that the links that work there work here. Nothing is
executed, and nothing of `wdlib` is imported: docs/faces.py reads docstrings from the source, and
docs/plumbing.py hides cells of notebooks.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

project = "wdlib"
author = re.search(r'- name: "?([^"\n]+)', (ROOT / "CITATION.cff").read_text(encoding="utf-8"))[1]
version = re.search(r'__version__ = "(.+)"', (ROOT / "wdlib/__init__.py").read_text())[1]

extensions = ["myst_nb", "sphinx_design", "sphinx.ext.mathjax", "faces", "plumbing"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "notebooks/*.ipynb",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]

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
html_favicon = "website/favicon.svg"
html_extra_path = ["website/index.html"]

ONE_FILE = "tex-svg.js"
"""All that is taken of MathJax: it holds its fonts, and loads nothing."""

(_mathjax,) = (
    path.locate()
    for path in metadata.files("sphinx-mathjax-offline") or ()
    if path.name == ONE_FILE
)
html_static_path = ["website/site.css", str(_mathjax)]
html_css_files = ["site.css"]
mathjax_path = ONE_FILE
