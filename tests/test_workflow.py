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

from wdlib import characterize, cli, experiments, paths, run, spectra
from wdlib.models import catalogue

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
        assert model["name"] in catalogue()
        assert spectra.load(model["name"]).rank == max(model["ranks"])
    for notebook in CONFIG["notebooks"]:
        assert {"model", "rank"} <= set(run.declared_parameters(run.find_notebook(notebook)))
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
    cells = experiments.cells()
    assert [row[1] for row in rows] == [cell.run.key for cell in cells]
    assert {row[3] for row in rows} <= set(experiments.STATES)
    needed = [cell.run.characterisation() for cell in cells]
    assert [row[2] for row in rows] == [path.stem if path else "-" for path in needed]
    assert {path.parent for path in needed if path} == {paths.RESULTS / "characterisation"}


def test_a_characterisation_from_the_command_line_is_that_of_the_library(tmp_path, capsys):
    rng = np.random.default_rng(0)
    values = {t: np.sort(rng.pareto(2, (6, 8)) + 1)[:, ::-1] for t in ("q", "k")}
    rows = {t: tuple((layer, None) for layer in range(6)) for t in values}
    error = {t: np.zeros((6, 8)) for t in values}
    made = spectra.Spectra("planted", values, error, rows, {"created": "today"})
    spectra.save(made, tmp_path / "planted.safetensors")
    out = tmp_path / "new" / "planted-r4.json"
    given = ["characterise", str(tmp_path / "planted.safetensors"), "--out", str(out)]
    assert cli.main([*given, "--rank", "4"]) == 0
    found = characterize.load(out)
    assert found == characterize.characterise(made, rank=4)
    assert (found.model, found.rank) == ("planted", 4)
    before = out.read_bytes()
    assert cli.main([*given, "--rank", "9"]) == 1
    assert capsys.readouterr().err.startswith("wdlib: ")
    assert out.read_bytes() == before


def test_a_notebook_that_was_given_parameters_is_the_same_each_time():
    given = [nbformat.v4.new_code_cell(metadata={"tags": ["injected-parameters"]}) for _ in "ab"]
    assert given[0].id != given[1].id
    one, two = (run.normalise(nbformat.v4.new_notebook(cells=[cell])) for cell in given)
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
