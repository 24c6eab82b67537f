"""Every type of model that transformers knows: each matrix is the module's own, and none is missed.

The types and what is found of them are the tables of docs/architectures.md.
"""

import pytest
import tiny_zoo
import zoo_truth

from wdlib import paths

REMEDY = "run `PYTHONPATH=tests .venv/bin/python docs/architectures.py`, and look at what changes"


def documented() -> dict[tuple[str, str], tuple[str, ...]]:
    """The cells of the page's tables, by mapping and type."""
    task, found = "", {}
    page = (paths.ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if line.startswith("## "):
            task = line.removeprefix("## ")
        elif line.startswith("| ") and task in tiny_zoo.MAPPINGS:
            name, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
            if name != "type":
                found[task, name] = tuple(cells)
    return found


TABLE = documented()
BUILT = [key for key, cells in TABLE.items() if not cells[0].startswith("not built")]


@pytest.mark.parametrize(("task", "name"), BUILT, ids=lambda text: text.replace(", ", "+"))
def test_every_matrix_is_the_modules_own(task, name, tmp_path):
    assert zoo_truth.examine(task, name, tmp_path).row == TABLE[task, name], REMEDY


def test_the_page_lists_the_types_of_this_release():
    for task in tiny_zoo.MAPPINGS:
        there = {name for at, name in BUILT if at == task}
        assert there == set(tiny_zoo.names(task)), REMEDY
        assert {name for at, name in TABLE if at == task} >= set(tiny_zoo.mapping(task)), REMEDY


def test_as_many_are_read_as_the_project_promises():
    read = dict.fromkeys(tiny_zoo.MAPPINGS, 0)
    for (task, name), cells in TABLE.items():
        read[task] += cells[0].startswith("`") and ", " not in name
    promised = {"causal": 165, "seq2seq": 28, "masked": 38, "image-text": 75}
    assert all(read[task] >= number for task, number in promised.items()), read
