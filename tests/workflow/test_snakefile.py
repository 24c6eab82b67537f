"""The workflow's files without Snakemake: they name only what exists, and call what is there.

That it gives the same results on a cluster is `make test-cluster`.
"""

import re
import shlex
import string

import pytest
import yaml

from wdlib import cli, notebooks, paths, provenance
from wdlib.checkpoints.catalogue import models
from wdlib.cli.parser import joined, parser
from wdlib.lora.grid import STATES, cells
from wdlib.spectra import store

FOLDER = paths.ROOT / "workflow"
SNAKEFILE = (FOLDER / "Snakefile").read_text()
RULES = set(re.findall(r"^rule (\w+):", SNAKEFILE, re.M))
CONFIG = yaml.safe_load((FOLDER / "config.yaml").read_text())
TABLES = yaml.safe_load((FOLDER / "tables.yaml").read_text())
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
        assert callable(parser().parse_args(joined(words[1:])).command)


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


def test_every_table_is_made_by_a_script_that_is_there():
    made = [file for table in TABLES.values() for file in table["makes"]]
    assert len(made) == len(set(made))
    stored = {path.relative_to(paths.ROOT).as_posix() for path in provenance.tables()}
    assert {file for file in made if file.endswith(".csv")} == stored
    read = [file for table in TABLES.values() for file in table.get("reads", [])]
    assert [file for file in (*made, *read) if not (paths.ROOT / file).is_file()] == []
    scripts = {table["run"].split()[0] for table in TABLES.values()}
    parts = {"suspects.py", "relatives.py"}  # of identification.py, which imports them
    assert scripts | parts == {path.name for path in (FOLDER / "scripts").glob("*.py")}
    for table in TABLES.values():
        script = f"workflow/scripts/{table['run'].split()[0]}"
        for file in table["makes"]:
            if file.endswith(".csv"):
                assert provenance.load(paths.ROOT / file).script == script


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
    expected = cells()
    assert [row[1] for row in rows] == [cell.run.key for cell in expected]
    assert {row[3] for row in rows} <= set(STATES)
    needed = [cell.run.characterisation() for cell in expected]
    assert [row[2] for row in rows] == [path.stem if path else "-" for path in needed]
    assert {path.parent for path in needed if path} == {paths.RESULTS / "characterisation"}


# Locks ---------------------------------------------------------------------------------------


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
