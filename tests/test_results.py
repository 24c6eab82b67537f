"""docs/results.md: what it says is what the notebooks store."""

import re
import runpy

import nbformat
import pytest

from wdlib import WdlibError, paths

RESULTS = runpy.run_path(str(paths.ROOT / "docs" / "results.py"))
PAGE = paths.ROOT / "docs" / "results.md"


@pytest.fixture
def stored(tmp_path):
    """A copy of the notebooks, and how to replace text in the outputs of one."""
    for path in paths.NOTEBOOKS.glob("*.ipynb"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def replace(number, old, new):
        (path,) = tmp_path.glob(f"{number}_*.ipynb")
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        return tmp_path

    return replace


def test_the_page_is_what_the_notebooks_store():
    assert PAGE.read_text(encoding="utf-8") == RESULTS["page"](), "run `python docs/results.py`"


def test_another_number_in_a_notebook_is_another_page(stored):
    page = RESULTS["page"](stored("05", "16 of 28 pairs", "27 of 28 pairs"))
    assert "| not reproduced | 27 of 28 pairs; " in page


def test_another_verdict_in_a_notebook_is_another_page(stored):
    folder = stored("05", ">not reproduced<", ">reproduced<")
    assert "| reproduced | 16 of 28 pairs; " in RESULTS["page"](folder)


def test_a_verdict_that_is_not_known_is_refused(stored):
    folder = stored("05", ">not reproduced<", ">perhaps<")
    with pytest.raises(WdlibError, match="the verdict 'perhaps'"):
        RESULTS["page"](folder)


def test_a_number_that_is_gone_is_refused(stored):
    folder = stored("14", ">invariants<", ">other<")
    with pytest.raises(WdlibError, match=r"14_whose_model\.ipynb shows no"):
        RESULTS["page"](folder)


def test_every_link_of_the_page_leads_somewhere():
    links = re.findall(r"\]\((\.\./[^)#]+)(?:#([^)]*))?\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 50
    for name, anchor in links:
        target = PAGE.parent / name
        assert target.is_file(), name
        if anchor:
            cells = nbformat.read(target, as_version=4).cells
            headings = re.findall(r"^## (.*)", "\n".join(c.source for c in cells), re.M)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, name
