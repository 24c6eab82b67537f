"""wdlib.run and the `wdlib` command: real kernels, small notebooks."""

import io
import json
import os
import subprocess
import sys

import nbformat
import pytest

from wdlib import WdlibError, cli, notebooks, paths

PARAMETERS = """\
model: str = "a"  # a name
rank: int = 16
scale: float = 0.5
quick: bool = False
layers: list[int] | None = None
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A project folder of its own: notebooks, figures, cache, catalogue, stored spectra."""
    for name in ("notebooks", "figures", "cache", "spectra"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(paths, name.upper(), tmp_path / name)
    monkeypatch.setattr(paths, "CATALOGUE", tmp_path / "models.toml")
    paths.CATALOGUE.write_text("")
    return tmp_path


def namespace(source=PARAMETERS, **injected):
    """What a kernel's globals look like after the parameters cell and papermill's cell."""
    names = {}
    exec(source, names)
    names |= injected
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in injected.items())
    return names | {"In": ["", source, cell if injected else "x = 1"], "np": os, "later": 3}


# --- check_parameters ------------------------------------------------------------------------


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


def test_the_last_injected_cell_counts():
    names = namespace(rank=8)
    names["In"].insert(2, "# Parameters\nmodle = 'b'\n")
    names["modle"] = "b"
    notebooks.check_parameters(names)


def test_plain_papermill_is_strict_too(tmp_path, write_notebook):
    notebook = write_notebook(tmp_path / "n.ipynb", "print(rank)", "extra = 5")
    command = [sys.executable, "-m", "papermill", "n.ipynb", "out.ipynb", "--no-progress-bar"]
    for name, value, words in [
        ("rank", "8", ""),
        ("rnak", "8", "unknown parameter 'rnak', did you mean 'rank'?"),
        ("rank", "x", "parameter 'rank' must be of type int"),
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


# --- run_notebook ----------------------------------------------------------------------------


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


# --- figures and refresh ---------------------------------------------------------------------

DRAW = "from wdlib import paths\n(paths.FIGURES / '{0}_a.svg').write_text('drawn')\nprint(rank)"


@pytest.fixture
def two(house, write_notebook, monkeypatch):
    """Two numbered notebooks that draw one file each, and what the kernels need to find them."""
    monkeypatch.setenv("WDLIB_FIGURES", str(paths.FIGURES))
    for name in ("00_a", "01_b"):
        write_notebook(paths.NOTEBOOKS / f"{name}.ipynb", DRAW.format(name[:2]))
    write_notebook(paths.NOTEBOOKS / "draft.ipynb", "raise ValueError")
    return house


def ran(**options):
    """The numbered notebooks that a call of `figures` ran, from what it says."""
    stream = io.StringIO()
    notebooks.figures(progress=notebooks.Progress(stream), **options)
    lines = [line for line in stream.getvalue().splitlines() if " elapsed" not in line]
    assert [line[:2] for line in lines] == (
        [options["only"]] if "only" in options else ["00", "01"]
    )
    assert all(line.endswith((": up to date", "1 figure files")) for line in lines)
    return [line[:2] for line in lines if not line.endswith("up to date")]


def test_only_what_is_out_of_date_runs(two):
    assert ran() == ["00", "01"]
    assert (paths.FIGURES / "00_a.svg").read_text() == "drawn"
    assert ran() == []
    (paths.FIGURES / "01_a.svg").write_text("edited by hand")
    assert ran() == ["01"]
    (paths.FIGURES / "00_a.svg").unlink()
    assert ran() == ["00"]
    notebook = nbformat.read(paths.NOTEBOOKS / "00_a.ipynb", as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="stored")]
    nbformat.write(notebook, paths.NOTEBOOKS / "00_a.ipynb")
    assert ran() == []
    notebook.cells[-1].source += "\n"
    nbformat.write(notebook, paths.NOTEBOOKS / "00_a.ipynb")
    assert ran() == ["00"]
    assert ran(only="01", force=True) == ["01"]


def test_inputs_shared_by_all_put_all_out_of_date(two):
    notebook = paths.NOTEBOOKS / "00_a.ipynb"
    states = [notebooks._state(notebook)]
    (paths.SPECTRA / "m.safetensors").write_bytes(b"1")
    states.append(notebooks._state(notebook))
    paths.CATALOGUE.write_text("[model]")
    states.append(notebooks._state(notebook))
    assert len({state["sources"] for state in states}) == 3


def test_a_notebook_that_fails_stays_out_of_date(two, write_notebook):
    write_notebook(paths.NOTEBOOKS / "01_b.ipynb", "raise ValueError('no')")
    with pytest.raises(WdlibError, match=r"01_b.ipynb stopped in cell"):
        notebooks.figures()
    assert notebooks._recorded(paths.NOTEBOOKS / "00_a.ipynb") is not None
    assert notebooks._recorded(paths.NOTEBOOKS / "01_b.ipynb") is None


def test_refresh_stores_outputs_that_stay_the_same(two):
    stored = paths.NOTEBOOKS / "00_a.ipynb"
    notebooks.refresh(only="00")
    first = stored.read_bytes()
    assert nbformat.reads(first, as_version=4).cells[-1].outputs[0].text == "16\n"
    notebooks.refresh(only="00")
    assert stored.read_bytes() == first
    assert ran() == ["01"]


def test_refresh_leaves_a_notebook_that_fails_as_it_was(two, write_notebook):
    stored = write_notebook(paths.NOTEBOOKS / "01_b.ipynb", "raise ValueError('no')")
    before = stored.read_bytes()
    with pytest.raises(WdlibError):
        notebooks.refresh(only="01")
    assert stored.read_bytes() == before


def test_progress_names_notebook_cell_and_time(two):
    stream = io.StringIO()
    notebooks.figures(progress=notebooks.Progress(stream))
    assert stream.getvalue().startswith("notebook 1 of 2, 00_a, cell 1 of 4, 0:0")
    stream.isatty = lambda: True
    stream.truncate(0)
    notebooks.figures(progress=notebooks.Progress(stream), only="01", force=True)
    assert "\r\x1b[Knotebook 1 of 1, 01_b, cell 4 of 4, 0:" in stream.getvalue()


def test_a_number_that_no_notebook_has_is_an_error(two):
    with pytest.raises(WdlibError, match="starts with '07'"):
        notebooks.figures(only="07")
    with pytest.raises(WdlibError, match="called '0': choose one of 00_a, 01_b"):
        notebooks.find_notebook("0")
    assert notebooks.find_notebook("01").stem == "01_b"


# --- the command -----------------------------------------------------------------------------


def test_the_command_runs_a_notebook_with_both_ways_to_give_a_parameter(two, capsys):
    output = two / "out.ipynb"
    for words in (["-p", "rank", "8"], ["-p", "rank=8"]):
        assert cli.main(["run", "00", *words, "--output", str(output)]) == 0
        assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text == "8\n"
        assert f"wrote {output}" in capsys.readouterr().err
        output.unlink()


def test_an_error_is_one_line_and_exit_1(two, capsys):
    assert cli.main(["run", "00", "-p", "rnak", "8"]) == 1
    assert capsys.readouterr().err == (
        "wdlib: unknown parameter 'rnak', did you mean 'rank'? The notebook's are: rank\n"
    )


@pytest.mark.parametrize("words", [["-p", "rank"], ["-p", "a", "b", "c"], ["--nope"]])
def test_wrong_usage_is_exit_2(words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "00", *words])
    assert caught.value.code == 2


def test_an_interrupt_is_exit_130(monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "figures", interrupted)
    assert cli.main(["figures"]) == 130


def test_the_command_starts_without_the_heavy_libraries():
    heavy = {"torch", "transformers", "peft", "papermill", "numpy", "scipy", "gguf", "matplotlib"}
    code = f"import sys, wdlib.cli, wdlib.run; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_catalogue_is_listed(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "hub"]
    assert any("SmolLM2-135M-Instruct" in line and "Apache-2.0" in line for line in lines)
