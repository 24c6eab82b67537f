"""The stored notebooks with another model and rank, and with parameters that cannot be."""

import re
import warnings

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import tiny
from matplotlib.figure import Figure

from wdlib import WdlibError, characterise, cli, notebooks, paper, paths, plots
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
        return names

    plt.switch_backend("Agg")
    with plt.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel's are dropped from the stored outputs
        yield execute
    plt.close("all")


def declared(path, **given):
    """Those of the given parameters that the notebook has."""
    known = notebooks.declared_parameters(path)
    return {name: value for name, value in given.items() if name in known}


@pytest.fixture
def tables(monkeypatch):
    """The tables of texts that notebooks show, in a list that fills as they run."""
    shown, show = [], plots.text_table
    monkeypatch.setattr(plots, "text_table", lambda table: (shown.append(table), show(table))[1])
    return shown


def misjudged(table, subject):
    """Claims about some model in a table of verdicts that were judged from another one.

    subject: the model that the run is about; a cell that names another model is about that one.
    """
    for row in table.to_dict("records") if "verdict" in table else ():
        words = [subject, *re.findall(r"[\w.-]+", str(row.get("ours", "")))]
        for claim in paper.CLAIMS.values():
            stated = claim.model and any(claim.statement in str(cell) for cell in row.values())
            if stated and not any(map(claim.concerns, words)):
                yield from [claim.id] * ("another model" not in row["verdict"])


@each
@pytest.mark.usefixtures("elsewhere", "quick")
def test_other_model_and_rank(path, tiny_model, here, tables):
    """That the prose holds no number of the stored run is for `test_structure`."""
    model = str(tiny_model)
    given = declared(path, model=model, precise=model, rank=8, **QUICK)
    assert "model" in given
    names = here(path, given)
    subject = names.get("target", model)
    assert [claim for table in tables for claim in misjudged(table, subject)] == []


@pytest.mark.parametrize(
    ("subject", "ours", "verdict", "found"),
    [
        ("gemma-3-270m", "16 of 28", "not reproduced", ["pairs-all-power-law"]),
        ("gemma-3-270m", "16 of 28", "cannot be tested here: another model", []),
        ("gemma-3-270m", "smollm2-135m-instruct: 16 of 28", "not reproduced", []),
        ("smollm2-135m", "16 of 28", "not reproduced", []),
    ],
)
def test_a_claim_judged_from_another_model_is_found(subject, ours, verdict, found):
    claim = paper.CLAIMS["pairs-all-power-law"]
    row = {"paper": f"{claim.model}: {claim.statement}", "ours": ours, "verdict": verdict}
    assert list(misjudged(pd.DataFrame([row]), subject)) == found


def test_other_model_and_rank_in_a_kernel(tiny_model, elsewhere):
    output = elsewhere / "out.ipynb"
    notebooks.run_notebook(NOTEBOOKS[0], {"model": str(tiny_model), "rank": 8}, output=output)
    cells = nbformat.read(output, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    said = [o.data.get("text/markdown", "") for cell in code for o in cell.outputs if "data" in o]
    assert f"**Not the default run:** `model = '{tiny_model}'`, `rank = 8`" in said[0]
    stored = nbformat.read(NOTEBOOKS[0], as_version=4).cells
    assert any(cell.source.startswith("*In the default run*") for cell in stored)
    assert not any(cell.source.startswith("*In the default run*") for cell in cells)


# What is refused ------------------------------------------------------------------------------


def files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]


@pytest.mark.parametrize("path", [NOTEBOOKS[0], NOTEBOOKS[12]], ids=lambda path: path.stem)
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
