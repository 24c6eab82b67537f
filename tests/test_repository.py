"""What stands around the package: checks before a commit, hosted CI, templates, changes."""

import re
import subprocess

import pytest
import yaml

from wdlib import __version__, paths

GITHUB = paths.ROOT / ".github"


def loaded(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def hooks():
    (repository,) = loaded(paths.ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    return {hook["id"]: hook for hook in repository["hooks"]}


def tracked():
    """The files that git keeps, those that are text, with their content."""
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.split("\0"):
        path = paths.ROOT / name
        if name and path.is_file() and b"\0" not in (content := path.read_bytes())[:8000]:
            yield name, content.decode("utf-8")


def test_a_commit_is_checked_as_make_lint_does_and_more():
    makefile = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    lint = re.search(r"^lint: setup; (.*)", makefile, re.M)[1].split(" && ")
    entries = [hook["entry"] for hook in hooks().values()]
    assert set(lint) <= set(entries)
    assert any("tests/notebooks/test_structure.py" in entry for entry in entries)


def test_no_file_names_a_path_of_one_machine():
    hook = hooks()["paths"]
    wrong, exclude = re.compile(hook["entry"]), re.compile(hook["exclude"])
    for text in ("open('/home/me/x')", "at /tmp/x", "(/root/.cache)", "file=/work/models"):
        assert wrong.search(text)
    for text in ("https://host/home/me", "data/tmp/x", "~/opt/x", "${HOME}/work/x", "</work>"):
        assert not wrong.search(text)
    files = {name: text for name, text in tracked() if not exclude.search(name)}
    assert len(files) > 300
    assert [name for name, text in files.items() if wrong.search(text)] == []


def test_hosted_ci_runs_what_everybody_runs():
    (job,) = loaded(GITHUB / "workflows" / "ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    setup = (paths.ROOT / ".ci" / "setup").read_text(encoding="utf-8")
    for version in job["strategy"]["matrix"]["python"]:
        assert f"python{version} " in setup


@pytest.mark.parametrize("name", ["failure", "number"])
def test_a_template_asks_for_model_command_and_version(name):
    fields = {
        field["id"]: field for field in loaded(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")["body"]
    }
    assert {"model", "command", "version"} <= set(fields)
    assert all(field["validations"]["required"] for field in fields.values())


def test_the_newest_release_in_the_list_of_changes_is_this_version():
    changes = (paths.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (\S+)", changes, re.M)
    assert releases[0] == "Unreleased"
    assert releases[1] == __version__


def test_what_newcomers_are_sent_to_is_there():
    text = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:wdlib|tests|workflow|data)/[\w./]+\.\w+)`", text)
    assert len(named) > 8
    assert [name for name in named if not (paths.ROOT / name).is_file()] == []
    for name, file in (
        ("ARCHITECTURES", "tests/tiny.py"),
        ("MODELS", "workflow/scripts/fingerprints.py"),
    ):
        assert re.search(rf"^{name}\b", (paths.ROOT / file).read_text(), re.M)
