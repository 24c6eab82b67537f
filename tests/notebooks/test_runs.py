"""Strict runs of notebooks: real kernels, small notebooks."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from wdlib import WdlibError, notebooks, paths

PARAMETERS = """\
model: str = "a"  # a name
rank: int = 16
scale: float = 0.5
quick: bool = False
layers: list[int] | None = None
"""


def namespace(source=PARAMETERS, **injected):
    """What a kernel's globals look like after the parameters cell and papermill's cell."""
    names = {}
    exec(source, names)
    names |= injected
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in injected.items())
    return names | {"In": ["", source, cell if injected else "x = 1"], "np": os, "later": 3}


# Parameters ----------------------------------------------------------------------------------


def test_defaults_pass_whatever_else_is_defined():
    notebooks.check_parameters(namespace())


def test_values_of_the_declared_types_pass():
    notebooks.check_parameters(namespace(model="b", rank=8, scale=1, quick=True, layers=[0, 2]))


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ({"modle": "b"}, r"unknown parameter 'modle', did you mean 'model'\?.*model, rank, scale"),
        ({"zzz": 1}, r"unknown parameter 'zzz': The notebook's are: model, rank"),
        ({"rank": "8"}, r"'rank' must be of type int, but is '8' of type str"),
        ({"rank": 8.0}, r"'rank' must be of type int, but is 8.0 of type float"),
        ({"rank": True}, r"'rank' must be of type int, but is True of type bool"),
        ({"scale": True}, r"'scale' must be of type float, but is True of type bool"),
        ({"quick": 1}, r"'quick' must be of type bool, but is 1 of type int"),
        ({"model": None}, r"'model' must be of type str, but is None"),
        ({"layers": [1, "2"]}, r"'layers' must be of type list\[int\] \| None, but is \[1, '2'\]"),
    ],
)
def test_an_unknown_name_or_a_wrong_type_is_named(injected, message):
    with pytest.raises(WdlibError, match=message):
        notebooks.check_parameters(namespace(**injected))


def test_what_is_not_as_declared_is_returned():
    assert notebooks.check_parameters(namespace()) == {}
    assert notebooks.check_parameters(namespace(model="a", rank=8)) == {"rank": 8}
    later = namespace()
    later["In"] += ["%matplotlib inline", "texts: list[str] = ['a']"]
    assert notebooks.check_parameters(later | {"texts": ["b"], "layers": [1]}) == {"layers": [1]}


def test_a_value_edited_in_a_session_is_not_as_declared():
    again = namespace()
    edited = PARAMETERS.replace("16", "64")
    exec(edited, again)
    again["In"].append(edited)
    assert notebooks.check_parameters(again) == {"rank": 64}


def test_a_default_is_a_plain_value():
    with pytest.raises(WdlibError, match=r"declared as len\('a'\): write a number, a text, or"):
        notebooks.check_parameters(namespace("rank: int = len('a')"))


def test_the_last_injected_cell_counts():
    names = namespace(rank=8)
    names["In"].insert(2, "# Parameters\nmodle = 'b'\n")
    names["modle"] = "b"
    notebooks.check_parameters(names)


def test_a_run_that_is_not_the_default_one_says_so():
    usual = {"model": "smollm2-135m-instruct", "rank": 16}
    assert notebooks.banner({}, **usual) is None
    said = notebooks.banner({"scale": 0.25, "rank": 8}, **usual | {"rank": 8}).data
    assert said.startswith("> **Not the default run:** `rank = 8`, `scale = 0.25`. Tables")
    edited = notebooks.banner({}, **usual | {"model": "m"}).data
    assert edited.startswith("> **Not the default run:** `model = 'm'`. Tables")


@pytest.mark.parametrize("given", [{}, {"rank": 16}, {"rank": 8}])
def test_remarks_on_the_default_run_are_left_out_of_others(house, write_notebook, given):
    notebook = write_notebook(house / "n.ipynb", "rank")
    stored = nbformat.read(notebook, as_version=4)
    remark = nbformat.v4.new_markdown_cell("In the default run", metadata={"tags": ["default-run"]})
    stored.cells.insert(4, remark)
    nbformat.write(stored, notebook)
    notebooks.run_notebook(notebook, given, output=house / "out.ipynb")
    cells = nbformat.read(house / "out.ipynb", as_version=4).cells
    assert ("In the default run" in [cell.source for cell in cells]) == (given != {"rank": 8})


def test_plain_papermill_is_strict_too(tmp_path, write_notebook):
    notebook = write_notebook(tmp_path / "n.ipynb", "print(rank)", "extra = 5")
    command = [sys.executable, "-m", "papermill", "n.ipynb", "out.ipynb", "--no-progress-bar"]
    for name, value, words in [
        ("rank", "8", ""),
        ("rnak", "8", "unknown parameter 'rnak', did you mean 'rank'?"),
    ]:
        done = subprocess.run(
            [*command, "-p", name, value], cwd=notebook.parent, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (not words), done.stderr
        assert words in done.stderr


def test_a_second_run_of_the_cell_in_the_same_session_passes(tmp_path, write_notebook):
    """JupyterLab: cells are run again after later cells have defined and annotated names."""
    again = "check_parameters(globals())"
    notebook = write_notebook(
        tmp_path / "n.ipynb",
        "import numpy as np\nextra = 5\ntexts: list[str] = ['a']\nrows: np.ndarray = np.zeros(2)",
        again,
    )
    notebooks.run_notebook(notebook, {"rank": 8}, output=tmp_path / "out.ipynb")
    notebooks.run_notebook(notebook, output=tmp_path / "out.ipynb")


def test_what_is_no_notebook_is_named(house, write_notebook):
    broken = house / "broken.ipynb"
    broken.write_text("{")
    with pytest.raises(WdlibError, match=r"broken.ipynb is not a Jupyter notebook"):
        notebooks.declared_parameters(broken)
    broken.write_text('{"a": 1}')
    with pytest.raises(WdlibError, match=r"broken.ipynb is not a Jupyter notebook"):
        notebooks.declared_parameters(broken)
    with pytest.raises(WdlibError, match="there is no notebook"):
        notebooks.declared_parameters(house / "absent.ipynb")
    notebook = nbformat.read(write_notebook(house / "n.ipynb"), as_version=4)
    notebook.cells[1].metadata = {}
    nbformat.write(notebook, house / "n.ipynb")
    with pytest.raises(WdlibError, match=r"n.ipynb has 0 cells tagged `parameters`: tag exactly"):
        notebooks.declared_parameters(house / "n.ipynb")


def test_text_is_read_by_the_declared_type(house, write_notebook):
    notebook = write_notebook(house / "n.ipynb", parameters=PARAMETERS)
    texts = {"model": "1", "rank": "8", "scale": "1e-3", "quick": "true", "layers": "[1, 2]"}
    values = {"model": "1", "rank": 8, "scale": 1e-3, "quick": True, "layers": [1, 2]}
    assert notebooks.parameters_from_text(notebook, texts) == values
    assert notebooks.parameters_from_text(notebook, {"rank": "x", "layers": "none"}) == {
        "rank": "x",
        "layers": None,
    }


# Runs ----------------------------------------------------------------------------------------


def test_the_copy_holds_the_outputs_and_nothing_of_this_run(house, write_notebook):
    notebook = write_notebook(
        house / "n.ipynb",
        "import os, sys\nprint(os.path.basename(os.getcwd()), sys.executable == EXE, rank)",
        "print('bar', file=sys.stderr)\nrank",
        parameters=f"rank: int = 16\nEXE: str = {sys.executable!r}",
    )
    seen = []
    output = house / "new" / "out.ipynb"
    notebooks.run_notebook(
        notebook, {"rank": 8}, output=output, on_cell=lambda i, n: seen.append((i, n))
    )
    cells = nbformat.read(output, as_version=4).cells
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2, 3, 4, 5]
    assert cells[4].outputs[0].text == f"{house.name} True 8\n"
    assert [o.output_type for o in cells[5].outputs] == ["execute_result"]
    assert cells[2].metadata == {"tags": ["injected-parameters"]}
    assert cells[4].metadata == {}
    assert seen[-1] == (6, 6)
    assert list(paths.CACHE.rglob("*.failed.ipynb")) == []
    first = output.read_text()
    notebooks.run_notebook(notebook, {"rank": 8}, output=output)
    ids = [cell.id for cell in cells]
    same = nbformat.read(output, as_version=4)
    for cell, name in zip(same.cells, ids, strict=True):
        cell.id = name  # papermill gives its own cell a new random id
    assert nbformat.writes(same) + "\n" == first


def test_a_slider_leaves_its_figure_and_a_bar_nothing(house, write_notebook):
    notebook = write_notebook(
        house / "n.ipynb",
        "%matplotlib inline\nfrom wdlib import plots",
        "def draw(x, ax):\n    return f'it is {x}'",
        "plots.slider(draw, 'x', (1, 2), value=2, model='m')",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass",
        "from tqdm import tqdm\nfor _ in tqdm(range(3)): pass",
    )
    notebooks.run_notebook(notebook, output=house / "out.ipynb")
    stored = nbformat.read(house / "out.ipynb", as_version=4)
    *_, slider, widget, bar = (cell.get("outputs") for cell in stored.cells)
    assert [set(output.data) for output in slider] == [{"image/png", "text/plain"}]
    assert slider[0].data["text/plain"].startswith("<Figure size")
    assert widget == bar == []
    assert "widgets" not in stored.metadata


def test_no_bar_of_ours_is_a_widget():
    rooms = {path: path.read_text(encoding="utf-8") for path in paths.PACKAGE.rglob("*.py")}
    bars = [path.stem for path, source in rooms.items() if "import tqdm" in source]
    assert len(bars) == 4
    assert [path for path, source in rooms.items() if "tqdm.auto" in source] == []


def test_results_of_a_notebook_go_where_ours_do(house, write_notebook, monkeypatch):
    monkeypatch.setattr(paths, "HOME", house / "home")
    code = "from wdlib import paths\nprint(paths.HOME, paths.OWN_RESULTS)"
    notebook = write_notebook(house / "n.ipynb", code)
    notebooks.run_notebook(notebook, output=house / "out.ipynb")
    said = nbformat.read(house / "out.ipynb", as_version=4).cells[-1].outputs[0].text
    assert said == f"{house / 'home'} {house / 'home' / 'data' / 'results'}\n"


def test_another_python3_kernel_does_not_get_in(house, write_notebook, monkeypatch):
    wrong = house / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (wrong / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(house / "jupyter"))
    notebooks.run_notebook(write_notebook(house / "n.ipynb"), output=house / "out.ipynb")
    assert (house / "out.ipynb").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"rnak": 8}, "unknown parameter 'rnak'"), ({"rank": "x"}, "'rank' must be of type int")],
)
def test_wrong_parameters_are_refused_before_anything_runs(house, write_notebook, given, message):
    notebook = write_notebook(house / "n.ipynb", "open('ran', 'w').close()")
    with pytest.raises(WdlibError, match=message):
        notebooks.run_notebook(notebook, given, output=house / "out.ipynb")
    assert not (house / "ran").exists()
    assert not (house / "out.ipynb").exists()


def test_a_failure_is_one_sentence_and_leaves_the_old_result(house, write_notebook):
    notebook = write_notebook(house / "n.ipynb", "x = 1", "raise ValueError('too\\nbad')")
    output = house / "out.ipynb"
    output.write_text("old")
    with pytest.raises(WdlibError) as caught:
        notebooks.run_notebook(notebook, {"rank": 3}, output=output)
    failed = paths.CACHE / "executed" / "out.failed.ipynb"
    assert str(caught.value) == (
        f"n.ipynb stopped in cell [5] with ValueError: too; the copy with its traceback is {failed}"
    )
    assert "ValueError" in failed.read_text()
    assert output.read_text() == "old"
    assert list(house.glob(".*")) == []


def test_an_error_of_ours_is_passed_on_as_it_is(house, write_notebook):
    cell = "from wdlib import WdlibError\nraise WdlibError('rank 99 is too large: at most 16')"
    with pytest.raises(WdlibError, match=r"^rank 99 is too large: at most 16$"):
        notebooks.run_notebook(write_notebook(house / "n.ipynb", cell), output=house / "out.ipynb")
    assert not list(house.rglob("*out*"))
    assert not list(house.rglob("*failed*"))


def test_a_dead_kernel_is_one_sentence(house, write_notebook):
    notebook = write_notebook(house / "n.ipynb", "import os\nos._exit(1)")
    with pytest.raises(WdlibError, match=r"^the kernel of n.ipynb stopped \(.*\): most often"):
        notebooks.run_notebook(notebook, output=house / "out.ipynb")
    assert not (house / "out.ipynb").exists()


def test_a_notebook_that_was_given_parameters_is_the_same_each_time():
    given = [nbformat.v4.new_code_cell(metadata={"tags": ["injected-parameters"]}) for _ in "ab"]
    assert given[0].id != given[1].id
    one, two = (notebooks.normalise(nbformat.v4.new_notebook(cells=[cell])) for cell in given)
    assert one == two
    nbformat.validate(one)


@pytest.mark.parametrize(
    "annotation", ["__import__('os').mkdir('made')", "9**9**9**9", "(lambda: int)()", "int.real"]
)
def test_a_type_is_not_executed(annotation, tmp_path, write_notebook, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = write_notebook(tmp_path / "n.ipynb", parameters=f"rank: {annotation} = 16\n")
    with pytest.raises(WdlibError, match=r"the type .* of the parameter 'rank' .* not known here"):
        notebooks.declared_parameters(notebook)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b'{"cells": 1, "nbformat": 4, "nbformat_minor": 5}']
)
def test_what_is_no_notebook_is_a_sentence(content, tmp_path):
    (tmp_path / "n.ipynb").write_bytes(content)
    with pytest.raises(WdlibError, match=r"n\.ipynb is not a Jupyter notebook"):
        notebooks.declared_parameters(tmp_path / "n.ipynb")
