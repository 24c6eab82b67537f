"""The workflow's files without Snakemake: they name only what exists, and call what is there.

That it gives the same results on a cluster is `make test-cluster`.
"""

import re
import shlex
import string

import nbformat
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from wdlib import WdlibError, characterise, cli, notebooks, paths
from wdlib.checkpoints import files
from wdlib.checkpoints.catalogue import models
from wdlib.lora.grid import STATES, cells
from wdlib.spectra import store

FOLDER = paths.ROOT / "workflow"
SNAKEFILE = (FOLDER / "Snakefile").read_text()
RULES = set(re.findall(r"^rule (\w+):", SNAKEFILE, re.M))
CONFIG = yaml.safe_load((FOLDER / "config.yaml").read_text())
SAMPLES = {"rank": "16", "number": "1", "shards": "2", "threads": "2", "DATA": "--data-folder d"}
LOCKS = ("requirements.lock", "requirements-workflow.lock")
DIFFERENT = {"packaging"}
"""Snakemake refuses the release that the project has: hence an environment of its own."""


class Filled(string.Formatter):
    """Replaces every placeholder of a rule's command by a word that its place takes."""

    def get_field(self, name, args, kwargs):
        return SAMPLES.get(name.rpartition(".")[2], "word"), name

    def format_field(self, value, spec):
        return value


def commands():
    """The `wdlib` commands of the rules, with their arguments."""
    for block in re.findall(r"^    shell:\n((?: {8}.*\n)+)", SNAKEFILE, re.M):
        line = "".join(re.findall(r'^ +"(.*)"$', block, re.M))
        for part in re.split(r"&& !|&&|\|", Filled().format(line)):
            words = shlex.split(part)
            if words[0] != "grep":
                yield words


def test_the_rules_call_commands_that_exist():
    found = list(commands())
    assert len(found) == len(RULES)  # that for experiments calls two, that for results none
    assert {words[0] for words in found} == {"wdlib"}
    for words in found:
        assert callable(cli._parser().parse_args(words[1:]).command)


def test_the_configuration_names_what_exists():
    assert set(CONFIG) == set(re.findall(r'config\["(\w+)"\]', SNAKEFILE.replace("'", '"')))
    for model in CONFIG["models"]:
        assert set(model) <= {"name", "source", "ranks", "shards", "memory_mb"}
        assert model["name"] in models()
        assert store.load(model["name"]).rank == max(model["ranks"])
    for notebook in CONFIG["notebooks"]:
        assert {"model", "rank"} <= set(
            notebooks.declared_parameters(notebooks.find_notebook(notebook))
        )
    named = re.findall(r"\[(data/\S+yaml)\]", (FOLDER / "config.yaml").read_text())
    assert named
    assert all((paths.ROOT / grid).is_file() for grid in [*CONFIG["grids"], *named])


def test_the_profiles_name_what_is_in_the_snakefile():
    default, slurm = (
        yaml.safe_load((FOLDER / "profiles" / name / "config.yaml").read_text())
        for name in ("default", "slurm")
    )
    assert set(slurm["set-resources"]) <= RULES
    # What both set, the default profile decides, also on a cluster.
    assert not set(default) & set(slurm)
    assert default["keep-going"]
    assert default["keep-incomplete"]


def test_the_workflow_reads_the_list_of_cells_as_it_is_printed(capsys):
    assert cli.main(["experiments", "--dry-run"]) == 0
    rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    cells = cells()
    assert [row[1] for row in rows] == [cell.run.key for cell in cells]
    assert {row[3] for row in rows} <= set(STATES)
    needed = [cell.run.characterisation() for cell in cells]
    assert [row[2] for row in rows] == [path.stem if path else "-" for path in needed]
    assert {path.parent for path in needed if path} == {paths.RESULTS / "characterisation"}


def planted(rank=8, **provenance):
    """Spectra of a model "planted", of which each value is what it is at any rank."""
    rng = np.random.default_rng(0)
    values = {t: np.sort(rng.pareto(2, (6, 8)) + 1)[:, ::-1][:, :rank] for t in ("q", "k")}
    rows = {t: tuple((layer, None) for layer in range(6)) for t in values}
    error = {t: np.zeros((6, rank)) for t in values}
    return store.Spectra("planted", values, error, rows, {"source": "hub planted", **provenance})


def test_a_characterisation_from_the_command_line_is_that_of_the_library(tmp_path, capsys):
    made = planted()
    store.save(made, tmp_path / "planted.safetensors")
    out = tmp_path / "new" / "planted-r4.json"
    given = ["characterise", str(tmp_path / "planted.safetensors"), "--out", str(out)]
    assert cli.main([*given, "--rank", "4"]) == 0
    found = characterise.load(out)
    assert found == characterise.characterise(made, rank=4)
    assert (found.model, found.rank) == ("planted", 4)
    before = out.read_bytes()
    assert cli.main([*given, "--rank", "9"]) == 1
    assert capsys.readouterr().err.startswith("wdlib: ")
    assert out.read_bytes() == before


def stored(capsys, *arguments):
    """What the workflow reads of the list of what is stored: kind and name -> rank, state."""
    assert cli.main(["stored", *arguments]) == 0
    rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    return {(kind, name): (rank, state) for kind, name, rank, state in rows}


def test_all_that_is_stored_is_up_to_date_whatever_the_times_of_its_files(capsys):
    found = stored(capsys)
    files = {"spectra": paths.SPECTRA.glob("*.safetensors")}
    files["characterisation"] = (paths.RESULTS / "characterisation").glob("*.json")
    assert set(found) == {(kind, path.stem) for kind in files for path in files[kind]}
    assert {state for _, state in found.values()} == {"up to date"}
    assert all(
        name.endswith(f"-r{rank}") or kind == "spectra" for (kind, name), (rank, _) in found.items()
    )


@pytest.fixture
def planted_store(tmp_path, monkeypatch):
    """A store with spectra and two characterisations of a planted model, and its spectra's file."""
    monkeypatch.setattr(paths, "SPECTRA", tmp_path / "spectra")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    file = store.save(planted(), store.stored("planted"))
    for rank in (4, 8):
        made = characterise.characterise(planted(), rank=rank, replicates=20)
        characterise.save(made, tmp_path / "results" / "characterisation" / f"planted-r{rank}.json")
    return file


KEYS = [("spectra", "planted"), *(("characterisation", f"planted-r{rank}") for rank in (4, 8))]


def test_a_characterisation_is_out_of_date_with_its_spectra(planted_store, capsys, monkeypatch):
    def states(*arguments):
        found = stored(capsys, *arguments)
        return [found.pop(key)[1] == "up to date" for key in KEYS if key in found]

    assert states() == [True, True, True]
    assert states("planted=hf://planted") == [True, True, True]
    assert states("planted=hf://another") == [False, True, True]
    changed = planted()
    changed.values["k"][5, 6] *= 1.001  # of the values that only the second one uses
    store.save(changed, planted_store)
    assert states() == [True, True, False]
    store.save(planted(rank=4), planted_store)
    assert states() == [True, True, False]
    store.save(planted(sha256="other"), planted_store)
    assert states() == [True, False, False]
    store.save(planted(), planted_store)
    with monkeypatch.context() as patch:
        patch.setattr(characterise, "NORMAL_CONFIDENCE", 0.5)
        assert states() == [True, False, False]
    planted_store.unlink()
    assert states() == [False, False]
    (paths.RESULTS / "characterisation" / "planted-r4.json").write_text("{")
    assert cli.main(["stored"]) == 1
    assert "planted-r4.json" in capsys.readouterr().err


def test_where_weights_are_from_is_told_as_it_is_when_they_are_read(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "model.safetensors"
    file.parent.mkdir()
    save_file({"a": np.zeros((2, 2))}, file)
    for model in (file, file.parent, str(file), "smollm2-135m-instruct"):
        checkpoint = files.resolve(model)
        given = {"source": checkpoint.source, "sha256": checkpoint.sha256}
        assert files.matches_source(given, model)
        for other in ("gemma-3-270m", "llama-3-8b", "hf://smollm2-135m-instruct", "a/b", tmp_path):
            assert not files.matches_source(given, other)
    commit = "0123456789abcdef0123456789abcdef01234567"
    on_hub = {"source": "hub meta-llama/Meta-Llama-3-8B", "revision": commit}
    for model in ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"):
        for same in (model, f"hf://{model}", f"hf://{model}@main", f"hf://{model}@{commit[:8]}"):
            assert files.matches_source(on_hub, same)
        assert not files.matches_source(on_hub, f"hf://{model}@{commit[::-1]}")
    assert not files.matches_source({}, "llama-3-8b")
    assert files.matches_source({}, "no-such-model")


def test_without_a_checkout_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CATALOGUE", tmp_path / "models.toml")
    models.cache_clear()
    try:
        with pytest.raises(WdlibError, match=r"models\.toml is not there: .*pip install -e"):
            files.resolve("hf://organisation/name")
    finally:
        models.cache_clear()


def test_a_notebook_that_was_given_parameters_is_the_same_each_time():
    given = [nbformat.v4.new_code_cell(metadata={"tags": ["injected-parameters"]}) for _ in "ab"]
    assert given[0].id != given[1].id
    one, two = (notebooks.normalise(nbformat.v4.new_notebook(cells=[cell])) for cell in given)
    assert one == two
    nbformat.validate(one)


@pytest.mark.parametrize("name", LOCKS)
def test_the_locks_are_exact(name):
    assert all("==" in line for line in pins(name))


def test_the_workflow_has_the_projects_versions_where_it_can():
    ours, workflow = (dict(line.split("==") for line in pins(name)) for name in LOCKS)
    assert list(workflow) == sorted(workflow, key=str.lower)
    assert {"snakemake", "snakemake-executor-plugin-slurm"} <= set(workflow)
    differ = {name for name in ours.keys() & workflow.keys() if ours[name] != workflow[name]}
    assert differ == DIFFERENT


def pins(name):
    lines = (paths.ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]
