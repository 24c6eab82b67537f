"""What the site is made of: conf.py and index.md of docs/. The browser is in browse.py."""

import json
import re
import runpy

import pytest
import yaml

from wdlib import paths

DOCS = paths.ROOT / "docs"
PLUMBING = runpy.run_path(str(DOCS / "plumbing.py"))
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")


def test_every_notebook_has_a_card_and_a_line_of_contents():
    names = sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    assert len(names) == 15
    for name in names:
        assert f":link: ../notebooks/{name}\n" in INDEX
        assert f"<../notebooks/{name}>" in INDEX


def test_every_picture_of_a_card_is_there():
    pictures = re.findall(r"^:img-top: (.*)", INDEX, re.M)
    assert len(pictures) == 15
    assert [name for name in pictures if not (DOCS / name).is_file()] == []


def test_every_page_of_docs_is_in_the_contents():
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages == {name for name in pages if f"<{name}>\n" in INDEX}


def test_every_station_that_notebooks_use_has_its_functions_shown():
    shown = set(re.findall(r"```\{face\} (\w+)", (DOCS / "api.md").read_text(encoding="utf-8")))
    code = "\n".join(
        "".join(cell["source"])
        for path in paths.NOTEBOOKS.glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    )
    used = set(
        re.findall(r"\b(\w+)\b", " ".join(re.findall(r"^from wdlib import (.*)", code, re.M)))
    )
    stations = {p.stem for p in (paths.ROOT / "wdlib").iterdir() if not p.name.startswith("_")}
    assert len(used & stations) > 8
    assert (used & stations) - shown == {"paths"}


@pytest.mark.parametrize(
    ("source", "hidden"),
    [
        ("import numpy as np", True),
        ("from wdlib import fits\nx = 1", True),
        ("notebooks.check_parameters(globals())", True),
        ("fig, ax = plt.subplots()\nplots.save(fig, 'x', table)", True),
        ("said = f'{alpha:.2f}'\nMarkdown(said)", True),
        ("fit = fits.power_law(values)", False),
        ("model: str = 'x'", False),
    ],
)
def test_plumbing_is_hidden_and_ideas_are_not(source, hidden):
    cells = [
        {"cell_type": kind, "metadata": {}, "source": [source]} for kind in ("code", "markdown")
    ]
    PLUMBING["hide"]({"cells": cells})
    assert ["tags" in cell["metadata"] for cell in cells] == [hidden, False]


def test_some_code_of_each_notebook_is_seen_and_some_hidden():
    for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"):
        source = [path.read_text(encoding="utf-8")]
        PLUMBING["on_read"](None, f"notebooks/{path.stem}", source)
        code = [cell for cell in json.loads(source[0])["cells"] if cell["cell_type"] == "code"]
        hidden = ["hide-input" in cell["metadata"].get("tags", []) for cell in code]
        assert 2 <= sum(hidden) <= len(code) - 2, path.name


def test_the_site_is_built_and_published_as_everybody_builds_it():
    workflow = paths.ROOT / ".github" / "workflows" / "site.yml"
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert [step["run"] for step in jobs["build"]["steps"] if "run" in step] == ["make test-site"]
    (folder,) = (s["with"]["path"] for s in jobs["build"]["steps"] if "path" in s.get("with", {}))
    assert f". {folder}" in (paths.ROOT / "Makefile").read_text(encoding="utf-8")


def test_its_environment_is_exact_and_agrees_with_ours():
    def pins(name: str) -> dict[str, str]:
        lines = (paths.ROOT / name).read_text(encoding="utf-8").splitlines()
        pairs = (line.split("==") for line in lines if "==" in line)
        return {re.sub(r"[-_.]+", "-", pair[0]).lower(): pair[1] for pair in pairs}

    ours, site = pins("requirements.lock"), pins("requirements-site.lock")
    assert {"myst-nb", "sphinx-book-theme", "playwright"} <= set(site)
    assert {name: v for name, v in site.items() if ours.get(name, v) != v} == {}


def test_the_first_page_shows_what_the_readme_opens_with():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    end = re.search(r'^:end-before: "(.*)"', INDEX, re.M)[1]
    assert readme.count(end) == 1
    assert re.findall(r"^(\d)\. \*\*", readme[: readme.index(end)], re.M) == list("12345")
    assert (DOCS / "pipeline.png").is_file()
    assert "](docs/pipeline.png)" in readme[: readme.index(end)]
