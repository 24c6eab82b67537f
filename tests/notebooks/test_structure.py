"""The stored notebooks: how they are built. That they give the outputs they store is for nbval."""

import ast
import copy
import itertools
import re
from collections.abc import Iterator

import nbformat
import pytest
from nbstripout import strip_output

from wdlib import notebooks, paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
HEADINGS = ("What you will do", "What you need", "What you will learn")
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|mnt|var)/|\b[A-Z]:\\")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
REMARK = "*In the default run* "
"""How a cell begins whose numbers are those of the stored run."""
NUMBER = re.compile(r"(?<![\w.,/-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w-])")
CONSTANT = re.compile(
    r"`[^`]*`|\$\$[^$]*\$\$|\$[^$]*\$|\]\([^)]*\)|\d-\w+"  # code, formulas, links, 4-bit
    r"|\b(?:arXiv|notebooks?|sections?|figures?|LLaMA|Llama)\s\d[\d.]*(?: (?:and|to) \d+)?"
    r"|\b(?:19|20)\d\d\b"  # years
    r"|\b95 %|\b5 %|(?<![\d.])[01](?![\d.]*\d)"  # levels of intervals and tests; zero and unit
)
"""What is the same in every run: no number of one."""
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def problems(notebook) -> list[str]:
    """What is wrong with a notebook by the rules of the house, one line each."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [*_opening(notebook), *_parameters(notebook), *_changed(notebook), *_checks(notebook)]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("the code cells were not executed once each, in order, from the first")
    if not any(cell.outputs for cell in code):
        found.append("no outputs are stored")
    compared = [c for c in code if "nbval-check-output" in c.metadata.get("tags", [])]
    if not compared or not all(cell.outputs for cell in compared):
        found.append("no output is tagged nbval-check-output, or a tagged cell has none")
    kept = {"keep_output": True, "keep_count": True, "keep_id": True}
    stripped = strip_output(copy.deepcopy(notebook), **kept)
    if not notebook == stripped == notebooks.normalise(copy.deepcopy(notebook)):
        found.append("metadata or stderr of one run is stored: run `make notebooks`")
    for index, cell in enumerate(notebook.cells[1:], start=1):
        if cell.cell_type == "markdown":
            found += [f"cell {index}: {problem}" for problem in _prose(cell, notebook)]
    for index, cell in enumerate(notebook.cells):
        found += [f"cell {index}: {problem}" for problem in _cell(cell)]
        if _draws(cell) and notebook.cells[index + 1 : index + 2] == []:
            found.append(f"cell {index}: nothing follows the figure")
        elif _draws(cell) and notebook.cells[index + 1].cell_type != "markdown":
            found.append(f"cell {index}: the figure is not followed by its reading")
    return found


def _opening(notebook):
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        return ["the first cell is not markdown with a title"]
    if "arXiv" not in first.source:
        return ["the opening cell does not cite the paper"]
    missing = [
        h for h in HEADINGS if not re.search(rf"^#+ {h}|\*\*{h}:", first.source, re.M | re.I)
    ]
    return [f"the opening cell lacks {heading!r}" for heading in missing]


def _parameters(notebook):
    at = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    if len(at) != 1:
        return [f"{len(at)} cells are tagged parameters"]
    cell, following = notebook.cells[at[0]], notebook.cells[at[0] + 1]
    statements = ast.parse(cell.source).body
    found = []
    if not statements or not all(isinstance(s, ast.AnnAssign) and s.value for s in statements):
        found.append("the parameters cell has other than annotated assignments")
    if "changed = notebooks.check_parameters(globals())" not in following.source:
        found.append("the parameters cell is not followed by check_parameters(globals())")
    if "notebooks.banner(changed, model=model" not in following.source:
        found.append("a run with other parameters does not open with a banner")
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    if any(re.search(r"plots\.folder\((?![^)]*changed\))", source) for source in code):
        found.append("the folder of the figures is not made of all that is changed")
    return found


def _changed(notebook):
    """`changed`, which says where figures go, keeps what `check_parameters` returned."""
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    names = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name) and n.id == "changed"]
    again = [n for n in names if isinstance(n.ctx, ast.Store)][1:]
    return ["a cell assigns `changed` anew"] if again else []


def _checks(notebook):
    last = max(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    text = "\n".join(c.source for c in notebook.cells[:last] if c.cell_type == "markdown")
    headings = re.findall(r"^#+ (.*)", text, re.M)
    if not headings or headings[-1].strip() != "Checks":
        return ["the last code cell is not under the heading Checks"]
    if "assert_allclose" not in notebook.cells[last].source:
        return ["the last code cell does not assert_allclose"]
    return []


def _prose(cell, notebook) -> Iterator[str]:
    """Numbers in a markdown cell that a run need not have.

    A cell tagged `default-run` speaks of the stored run, says so, and is left out of others
    (`notebooks.run_notebook`): its numbers stand in the stored outputs. Other cells are read in
    every run, and have none but constants; a number of the run is computed, by a code cell.
    The opening cell is not read: its numbers are the paper's, and the minutes and megabytes of the
    default run.
    """
    numbers = NUMBER.findall(CONSTANT.sub(" ", cell.source))
    if notebooks.runs.DEFAULT_RUN not in cell.metadata.get("tags", []):
        yield from (f"the prose says {number}, whatever the run" for number in numbers)
        if REMARK.strip() in cell.source:
            yield "a remark on the default run is not tagged default-run"
        return
    if not cell.source.startswith(REMARK):
        yield f"a remark on the default run does not begin with {REMARK}"
    if "\n#" in cell.source:
        yield "a remark on the default run holds a heading, which other runs would lack"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    texts = [text for c in code for output in c.outputs for text in _texts(output)]
    shown = {
        float(number.replace(",", ""))
        for text in [*texts, *(c.source for c in code)]
        for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", text)
    }
    for number in numbers:
        value = float(number.replace(",", ""))
        half = 0.5 * 10.0 ** -len(number.partition(".")[2]) * 1.0001
        if not any(abs(x - value) <= half or abs(100 * x - value) <= half for x in shown):
            yield f"the stored run does not show the {number} of the remark on it"


def _cell(cell):
    """Problems of one cell and its outputs."""
    if cell.cell_type == "markdown":
        return ["a path of one machine"] if MACHINE_PATH.search(cell.source) else []
    found = []
    if len(cell.source.splitlines()) > 15:
        found.append("more than 15 lines of code")
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 5:
            found.append(f"the function {node.name} has more than 5 lines")
    texts = [text for output in cell.outputs for text in _texts(output)]
    if any(MACHINE_PATH.search(text) for text in [cell.source, *texts]):
        found.append("a path of one machine")
    if any(ADDRESS.search(text) for text in texts):
        found.append("an output shows an address in memory")
    if any(text.count("<tr" if "<table" in text else "\n") > 40 for text in texts):
        found.append("an output is longer than 40 lines")
    if any(output.output_type == "error" for output in cell.outputs):
        found.append("an error is stored")
    return found


def _texts(output):
    """The text of an output: streams, plain text and tables, not pictures."""
    data = output.get("data", {})
    shown = [text for kind, text in data.items() if kind in ("text/html", "text/markdown")]
    plain = [] if shown else [data.get("text/plain", "")]
    return [output.get("text", ""), *shown, *plain]


def _draws(cell):
    outputs = cell.get("outputs", [])
    return any(kind.startswith("image/") for o in outputs for kind in o.get("data", {}))


def good():
    """A notebook with nothing wrong; the tests below spoil it in one way each."""
    v4 = nbformat.v4
    opening = "# Title\nA claim (arXiv 2509.00046).\n" + "".join(f"## {h}\n" for h in HEADINGS)
    sources = [
        "import matplotlib\n\nfrom wdlib import notebooks",
        "rank: int = 16  # how many",
        "changed = notebooks.check_parameters(globals())\nnotebooks.banner(changed, model=model)",
        "draw(plots.folder(model, rank, changed))",
        "print(rank)",
        "from numpy.testing import assert_allclose\n\nassert_allclose(rank, 16)",
    ]
    cells = [v4.new_code_cell(s, execution_count=i) for i, s in enumerate(sources, start=1)]
    cells[1].metadata = {"tags": ["parameters"]}
    cells[3].outputs = [v4.new_output("display_data", {"image/png": "iVBO", "text/plain": "<Fig>"})]
    cells[4].outputs = [v4.new_output("stream", text="16\n")]
    cells[4].metadata = {"tags": ["nbval-check-output"]}
    cells.insert(4, v4.new_markdown_cell("What the figure shows."))
    cells.insert(6, v4.new_markdown_cell("## Checks"))
    remark = v4.new_markdown_cell(f"{REMARK}it is 16.", metadata={"tags": ["default-run"]})
    cells.insert(5, remark)
    cells[4].source += " In 2025 `r = 3` was 95 % of `7` in notebook 04, section 6, of LLaMA 3: 0."
    return notebooks.normalise(v4.new_notebook(cells=[v4.new_markdown_cell(opening), *cells]))


def test_a_good_notebook_has_no_problems():
    assert problems(good()) == []


SPOILED = {
    "title": lambda n: n.cells[0].update(source=n.cells[0].source[2:]),
    "cite": lambda n: n.cells[0].update(source=n.cells[0].source.replace("arXiv", "")),
    "lacks 'What you will do'": lambda n: n.cells[0].update(source="# T arXiv\n## What you need"),
    "0 cells are tagged": lambda n: n.cells[2].update(metadata={}),
    "2 cells are tagged": lambda n: n.cells[1].update(metadata={"tags": ["parameters"]}),
    "annotated assign": lambda n: n.cells[2].update(source="rank = 16"),
    "assigns `changed` anew": lambda n: n.cells[4].update(source="changed = 1"),
    "open with a banner": lambda n: n.cells[3].update(source="check_parameters(globals())"),
    "followed by check_parameters": lambda n: n.cells[3].update(source="pass"),
    "all that is changed": lambda n: n.cells[4].update(source="draw(plots.folder(model, rank))"),
    "heading Checks": lambda n: n.cells.pop(8),
    "does not assert_allclose": lambda n: n.cells[9].update(source="assert rank == 16"),
    "in order": lambda n: n.cells[4].update(execution_count=9),
    "executed once": lambda n: n.cells[4].update(execution_count=None),
    "no outputs": lambda n: [cell.update(outputs=[]) for cell in n.cells if "outputs" in cell],
    "tagged nbval-check-output": lambda n: n.cells[7].update(metadata={}),
    "metadata": lambda n: n.cells[4].update(metadata={"papermill": {"duration": 3}}),
    "run is stored": lambda n: n.metadata.update(papermill={}),
    "stderr": lambda n: n.cells[1].outputs.append(
        nbformat.v4.new_output("stream", name="stderr", text="warning")
    ),
    "15 lines": lambda n: n.cells[4].update(source="a = 1\n" * 16),
    "function f has": lambda n: n.cells[4].update(source="def f():\n" + "    a = 1\n" * 5),
    "path of one": lambda n: n.cells[4].update(source="open('/home/me/x')"),
    "of one machine": lambda n: n.cells[7].outputs[0].update(text="wrote /opt/x\n"),
    "address": lambda n: n.cells[7].outputs[0].update(text="<object at 0x7f00>"),
    "40 lines": lambda n: n.cells[7].outputs[0].update(text="1\n" * 41),
    "error is stored": lambda n: n.cells[1].outputs.append(
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    ),
    "followed by its reading": lambda n: [n.cells.pop(5), n.cells.pop(5)],
    "the prose says 0.16, whatever": lambda n: n.cells[5].update(source="Nearly 0.16."),
    "the prose says 16, whatever": lambda n: n.cells[6].update(metadata={}),
    "is not tagged default-run": lambda n: n.cells[5].update(source=f"{REMARK}all is well."),
    "does not begin with": lambda n: n.cells[6].update(source="It is 16."),
    "holds a heading": lambda n: n.cells[6].update(source=f"{REMARK}it is\n## 16"),
    "does not show the 17": lambda n: n.cells[6].update(source=f"{REMARK}it is 17."),
    "does not show the 15.9": lambda n: n.cells[6].update(source=f"{REMARK}it is 15.9."),
}


@pytest.mark.parametrize("words", SPOILED)
def test_each_rule_finds_what_it_is_there_for(words):
    notebook = good()
    SPOILED[words](notebook)
    assert any(words in problem for problem in problems(notebook)), problems(notebook)


def test_the_notebooks_are_numbered_once_each_and_lead_from_one_to_the_next():
    assert [path.name[:2] for path in NOTEBOOKS[:8]] == [f"{n:02d}" for n in range(8)]
    assert len({path.name[:2] for path in NOTEBOOKS}) == len(NOTEBOOKS)
    for path, following in itertools.pairwise(NOTEBOOKS):
        assert f"({following.name})" in read(path).cells[0].source
        assert f"({path.name})" in read(following).cells[0].source


@each
def test_links_lead_somewhere(path):
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    assert missing == []


@each
def test_structure(path):
    assert problems(read(path)) == []
