"""The stored notebooks with another model and rank, and with parameters that cannot be."""

import warnings

import matplotlib.pyplot as plt
import nbformat
import pytest
import tiny
from matplotlib.figure import Figure

from wdlib import WdlibError, characterise, cli, notebooks, paths
from wdlib.fingerprints.clusters import choices, cluster

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
QUICK = {
    "replicates": 20,
    "resamples": 2,
    "draws": 2,
    "arrays": 400,
    "sets": 6,
    "compared": ["all-minilm-l6-v2"],
    "others": ["gemma-3-270m", "all-minilm-l6-v2"],
}
"""Parameters, where a notebook has them, with which it draws and resamples little."""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Llama of six small layers, as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model().save_pretrained(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Figures and cache in folders of the test: nothing in the checkout changes."""
    for name in ("FIGURES", "CACHE"):
        monkeypatch.setenv(f"WDLIB_{name}", str(tmp_path / name.lower()))
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Few starts and resamples where a notebook leaves their number to the library.

    And every figure is drawn once, as svg.
    """
    draw = Figure.savefig

    def draw_svg(figure, path, *, format, **options):
        draw(figure, path, format=format, **options) if format == "svg" else path.touch()

    monkeypatch.setattr(Figure, "savefig", draw_svg)
    monkeypatch.setitem(cluster.__kwdefaults__, "starts", 20)
    for name, number in (("starts", 5), ("resamples", 3)):
        monkeypatch.setitem(choices.__kwdefaults__, name, number)
    for function in (characterise.characterise, characterise.stability, characterise.classify):
        monkeypatch.setitem(function.__kwdefaults__, "replicates", 20)


@pytest.fixture
def here(monkeypatch):
    """Runs the cells of a notebook in this process, with parameters as papermill gives them.

    No kernel has to start, import everything and show the figures that are saved anyway.
    """

    def execute(path, given):
        monkeypatch.chdir(path.parent)
        names = {"__name__": "__main__", "In": [""]}
        for cell in nbformat.read(path, as_version=4).cells:
            sources = [cell.source] if cell.cell_type == "code" else []
            if "parameters" in cell.metadata.get("tags", []):
                lines = (f"{name} = {value!r}\n" for name, value in given.items())
                sources.append("".join(["# Parameters\n", *lines]))
            for source in sources:
                names["In"].append(source)  # as a kernel does
                exec(source, names)

    plt.switch_backend("Agg")
    with plt.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel's are dropped from the stored outputs
        yield execute
    plt.close("all")


def declared(path, **given):
    """Those of the given parameters that the notebook has."""
    known = notebooks.declared_parameters(path)
    return {name: value for name, value in given.items() if name in known}


@each
@pytest.mark.usefixtures("elsewhere", "quick")
def test_other_model_and_rank(path, tiny_model, here):
    model = str(tiny_model)
    given = declared(path, model=model, precise=model, rank=8, **QUICK)
    assert "model" in given
    here(path, given)


def test_other_model_and_rank_in_a_kernel(tiny_model, elsewhere):
    output = elsewhere / "out.ipynb"
    notebooks.run_notebook(NOTEBOOKS[0], {"model": str(tiny_model), "rank": 8}, output=output)
    cells = nbformat.read(output, as_version=4).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")


# What is refused ------------------------------------------------------------------------------


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


@pytest.mark.parametrize("path", [NOTEBOOKS[0], NOTEBOOKS[-1]], ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("modle", "x", "unknown parameter 'modle', did you mean 'model'?"),
        ("rank", "many", "parameter 'rank' must be of type int, but is 'many'"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(path, name, value, words, elsewhere, capsys):
    """The check is the same for every notebook, and `test_structure` sees that all call it."""
    output = ["--output", str(elsewhere / "out.ipynb")]
    assert cli.main(["run", str(path), "-p", f"{name}={value}", *output]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"wdlib: {words}")
    assert said.count("\n") == 1
    assert files(elsewhere) == []


@each
def test_an_unknown_model_is_refused(path, elsewhere, here):
    with pytest.raises(WdlibError, match="no-such-model"):
        here(path, {"model": "no-such-model"})
    assert files(elsewhere) == []


@each
def test_a_rank_too_large_is_refused(path, tiny_model, elsewhere, here):
    given = declared(path, model=str(tiny_model), precise=str(tiny_model), rank=33)
    if "rank" not in given:
        pytest.skip("this notebook has no rank")
    with pytest.raises(WdlibError, match=r"33\b.*\b32\b"):  # what the tiny model's k and v allow
        here(path, given)
    assert files(elsewhere) == []
