"""Figures and stored outputs: what is out of date is made anew, and nothing else."""

import io

import nbformat
import pytest

from wdlib import WdlibError, cli, notebooks, paths

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
    notebooks.figures(progress=notebooks.runs.Progress(stream), **options)
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
    states = [notebooks.runs._state(notebook)]
    (paths.SPECTRA / "m.safetensors").write_bytes(b"1")
    states.append(notebooks.runs._state(notebook))
    paths.CATALOGUE.write_text("[model]")
    states.append(notebooks.runs._state(notebook))
    assert len({state["sources"] for state in states}) == 3


def test_an_edit_in_any_room_puts_all_out_of_date(two, monkeypatch):
    package, notebook = two / "package", paths.NOTEBOOKS / "00_a.ipynb"
    monkeypatch.setattr(paths, "PACKAGE", package)
    states = [notebooks.runs._state(notebook)]
    for one, other, style in [("1", "2", ""), ("2", "1", ""), ("2", "1", "lines.linewidth: 1")]:
        for name, text in (("fits/a.py", one), ("plots/a.py", other), ("plots/s.mplstyle", style)):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(text)
        states.append(notebooks.runs._state(notebook))
    assert len({state["sources"] for state in states}) == 4


def test_a_notebook_that_fails_stays_out_of_date(two, write_notebook):
    write_notebook(paths.NOTEBOOKS / "01_b.ipynb", "raise ValueError('no')")
    with pytest.raises(WdlibError, match=r"01_b.ipynb stopped in cell"):
        notebooks.figures()
    assert notebooks.runs._recorded(paths.NOTEBOOKS / "00_a.ipynb") is not None
    assert notebooks.runs._recorded(paths.NOTEBOOKS / "01_b.ipynb") is None


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
    notebooks.figures(progress=notebooks.runs.Progress(stream))
    assert stream.getvalue().startswith("notebook 1 of 2, 00_a, cell 1 of 4, 0:0")
    stream.isatty = lambda: True
    stream.truncate(0)
    notebooks.figures(progress=notebooks.runs.Progress(stream), only="01", force=True)
    assert "\r\x1b[Knotebook 1 of 1, 01_b, cell 4 of 4, 0:" in stream.getvalue()


def test_a_number_that_no_notebook_has_is_an_error(two):
    with pytest.raises(WdlibError, match="starts with '07'"):
        notebooks.figures(only="07")
    with pytest.raises(WdlibError, match="called '7': choose one of 00_a, 01_b"):
        notebooks.find_notebook("7")
    for name in ("1", "01", "01_"):
        assert notebooks.find_notebook(name).stem == "01_b"


def test_where_there_are_no_notebooks_that_is_said(house):
    for call in (lambda: notebooks.find_notebook("03"), notebooks.figures, notebooks.refresh):
        with pytest.raises(WdlibError, match=r"no notebooks in .*: they are in a checkout"):
            call()
    assert notebooks.numbered() == []


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
