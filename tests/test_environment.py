"""One set of versions: pyproject.toml, requirements.lock, environment.yml, what is installed."""

import ast
import re
import tomllib
from importlib.metadata import distribution, distributions

import nbformat
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from wdlib import __version__, paths

PYPROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
LINES = (paths.ROOT / "requirements.lock").read_text().splitlines()
LOCK = dict(line.split("==") for line in LINES if line and not line.startswith(("#", "-")))
NAMES = {canonicalize_name(name): pinned for name, pinned in LOCK.items()}
VERSIONS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
    for minor in range(11, 15)
]
"""The Pythons that the lock is for; some packages are needed by some of them alone."""

GPU = re.compile(r"(nvidia|cuda|triton)\b.*")


def direct():
    """Every requirement of the package and its extras, those on the package itself left out."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def closure():
    """(who asks, requirement) for all that the direct requirements need, transitively.

    On this system, with any of VERSIONS.
    """
    todo = [("pyproject.toml", requirement) for requirement in direct()]
    seen = set()
    while todo:
        asker, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, str(requirement)) in seen or (asker == "torch" and GPU.fullmatch(name)):
            continue
        seen.add((name, str(requirement)))
        yield asker, requirement
        extras = ["", *requirement.extras]
        for needed in map(Requirement, distribution(name).requires or []):
            marker = needed.marker
            if marker is None or any(
                marker.evaluate({"extra": extra, **version})
                for extra in extras
                for version in VERSIONS
            ):
                todo.append((name, needed))


def test_the_lock_is_exact_sorted_and_names_no_place():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in LINES[4:])
    assert list(LOCK) == sorted(LOCK, key=str.lower)
    # Set-up compiles nothing: the three that come as sources only are pure Python.
    assert LINES[2] == "--only-binary :all:"
    assert LINES[3] == "--no-binary rouge_score,sqlitedict,word2number"
    assert LOCK["torch"] == "2.13.0"


def test_the_lock_satisfies_everything_that_is_asked_for():
    for asker, requirement in closure():
        pinned = NAMES.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{asker} needs {requirement}, which is not in the lock"
        assert requirement.specifier.contains(pinned, prereleases=True), (
            f"{asker} needs {requirement}, the lock has {pinned}"
        )


def test_the_lock_holds_nothing_that_nobody_asks_for():
    asked = {canonicalize_name(requirement.name) for _, requirement in closure()}
    assert set(NAMES) - asked == set()


def test_what_is_installed_is_what_is_locked():
    installed = {d.name: Version(d.version).public for d in distributions()}
    installed = {canonicalize_name(name): number for name, number in installed.items()}
    assert {name: installed.get(name, "absent") for name in NAMES} == NAMES


def test_an_installed_copy_has_every_room():
    files = [path for path in (paths.ROOT / "wdlib").rglob("*.*") if path.suffix != ".pyc"]
    folders = {path.parent for path in files}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    rooms = {".".join(folder.relative_to(paths.ROOT).parts) for folder in folders}
    assert SETUPTOOLS["packages"] == sorted({*rooms, "wdlib.data"})
    data = SETUPTOOLS["package-data"]["wdlib"]
    others = [path for path in files if path.suffix != ".py"]
    assert {path.name for path in others} >= {"py.typed", paths.STYLE.name}
    assert [p for p in others if not any(p.match(f"wdlib/{name}") for name in data)] == []


def test_the_project_says_who_made_it_as_the_citation_does():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    assert [author["name"] for author in PROJECT["authors"]] == [
        author["name"] for author in citation["authors"]
    ]
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    papers = {paper["identifiers"][0]["value"] for paper in citation["references"]}
    assert {f"arXiv:{url.rpartition('/')[2]}" for url in PROJECT["urls"].values()} == papers


def test_the_readme_says_which_notebooks_need_more_than_their_own_extra():
    torch = {"torch", "transformers", "peft", "accelerate", "datasets", "lm_eval", "wdlib.lora"}
    need = []
    for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        named = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                named |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {node.module.split(".")[0], *inner}
        if named & torch:
            need.append(path.name[:2])
    readme = " ".join((paths.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"; {', '.join(need[:-1])} and {need[-1]} need `lora` too" in readme


def test_conda_installs_the_same_versions():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    python, *others = environment["dependencies"]
    assert Requirement(PROJECT["name"] + PROJECT["requires-python"]).specifier.contains(
        python.removeprefix("python=")
    )
    assert python == "python=3.11"
    assert others == ["pip", {"pip": ["-r requirements.lock"]}]
