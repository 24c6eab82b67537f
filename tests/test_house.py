"""The house: which station may import which, how large rooms and faces are, and old names.

The import graph is drawn from the source: imports in functions and under TYPE_CHECKING count too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
import pytest

from wdlib import paths

ORDER = (
    *("paths", "paper", "stats", "checkpoints", "provenance", "spectra", "distances", "fits"),
    *("characterise", "generator", "calibration", "fingerprints", "lora", "plots", "notebooks"),
    *("cli", "__main__"),
)
"""The stations along the way: each imports only those before it, and none but the command
imports plots."""

ROOM_LINES = 500
FACE_NAMES = 10
"""Functions, classes and constants that a face has beside its rooms; the style of plots apart."""

Sources = Mapping[str, str]
"""Source by module: "wdlib.fits" is a face (or a station of one file), "wdlib.fits.goodness" a
room."""


def package() -> dict[str, str]:
    found = {}
    for path in (paths.ROOT / "wdlib").rglob("*.py"):
        parts = path.relative_to(paths.ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def station(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def is_face(module: str, sources: Sources) -> bool:
    return module == "wdlib" or any(name.startswith(f"{module}.") for name in sources)


def imports(source: str, sources: Sources) -> Iterator[tuple[str, str]]:
    """The modules of the package that a source imports, each with the name taken from it, if any.

    A name that is a module itself is that module, whatever it was imported from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "wdlib")
        elif isinstance(node, ast.ImportFrom):
            of = "." * node.level + (node.module or "")
            if node.level or of.split(".")[0] == "wdlib":
                for a in node.names:
                    inner = f"{of}.{a.name}"
                    yield (inner, "") if inner in sources else (of, a.name)


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; empty if there are none."""

    def search(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module in done:
            return []
        below = (search(m, [*above, module]) for m in sorted(graph[module]))
        found = next(filter(None, below), [])
        done.add(module)
        return found

    done: set[str] = set()
    return next(filter(None, (search(module, []) for module in graph)), [])


def problems(sources: Sources) -> list[str]:
    """What is wrong with a package by the rules of the house, one line each."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    found = []
    for module, source in sources.items():
        for target, name in imports(source, sources):
            if target not in sources:
                found.append(f"{module} imports {target}, which is no module by its full name")
            elif target != "wdlib":
                graph[module].add(target)
                found += _crossing(module, target, name, sources)
        if source.count("\n") > ROOM_LINES:
            found.append(f"{module} has more than {ROOM_LINES} lines")
        if is_face(module, sources) and module != "wdlib":
            found += _face(module, sources)
    rooms = {m: {t for t in graph[m] if not is_face(t, sources)} for m in graph}
    if around := circle(rooms):
        found.append(f"a circle: {' -> '.join(around)}")
    return found


def _crossing(module: str, target: str, name: str, sources: Sources) -> Iterator[str]:
    """What is wrong with one module that imports another."""
    here, there = station(module), station(target)
    if missing := {here, there} - {"", *ORDER}:
        yield f"the station {missing.pop()} has no place in the order"
        return
    if module == "wdlib":
        yield f"wdlib itself imports {target}"
    elif here != there and ORDER.index(there) > ORDER.index(here):
        yield f"{module} imports {target}, up the way"
    if there == "plots" and here not in ("plots", "cli"):
        yield f"{module} imports plots, which is for notebooks and the command"
    if is_face(module, sources) and here != there:
        yield f"the face {module} imports {target}, which is no room of its own"
    if is_face(target, sources) and module != target:
        yield f"{module} imports {name or 'all'} from the face {target}: name the room"
    if name.startswith("_") and not name.startswith("__"):
        yield f"{module} imports the private {target}.{name}"


def _face(module: str, sources: Sources) -> Iterator[str]:
    taken = dict.fromkeys(exported(sources[module]), "")
    for target, name in imports(sources[module], sources):
        taken[name or target.rpartition(".")[2]] = target
    if untold := set(taken) - set(exported(sources[module])):
        yield f"the face {module} imports {sorted(untold)[0]} and does not list it"
    names = [name for name, target in taken.items() if not target.endswith(f"{module}.{name}")]
    names = [name for name in names if taken[name] != "wdlib.plots.style"]
    if len(names) > FACE_NAMES:
        yield f"the face {module} has {len(names)} names beside its rooms: at most {FACE_NAMES}"


def exported(source: str) -> tuple[str, ...]:
    """The names of a face's `__all__`; of a file without one, what it defines and does not hide."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            set_here = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            if set_here == ["__all__"]:
                return tuple(ast.literal_eval(node.value))
            names += set_here
    return tuple(name for name in names if not name.startswith("_"))


def strangers(source: str, sources: Sources, *, plots: bool) -> list[str]:
    """What a notebook or script takes of the package that no face shows it.

    plots: whether it may draw. A room that a face shows is used by that: `lora.grid.cells`.
    """
    found, known = set(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {f"import {a.name}" for a in node.names if a.name.split(".")[0] == "wdlib"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wdlib":
            for a in node.names:
                if node.module.count(".") > 1 or not _shown(node.module, a.name, sources):
                    found.add(f"from {node.module} import {a.name}")
                known[a.asname or a.name] = f"{node.module}.{a.name}"
    if not plots and "wdlib.plots" in known.values():
        found.add("plots")
    for node in ast.walk(ast.parse(source)):
        names = _chain(node) if isinstance(node, ast.Attribute) else [""]
        module = known.get(names[0], "")
        for number, name in enumerate(names[1:], start=2):
            if module in sources and not _shown(module, name, sources):
                found.add(".".join(names[:number]))
            module = f"{module}.{name}"
    return sorted(found)


def _shown(module: str, name: str, sources: Sources) -> bool:
    """Whether a station, face or room shows a name; the package shows its stations."""
    is_station = module == "wdlib" and f"wdlib.{name}" in sources
    return is_station or name in exported(sources.get(module, ""))


def _chain(node: ast.expr) -> list[str]:
    """The names of "a.b.c"; one empty name for other expressions."""
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


# The house as it stands -----------------------------------------------------------------------


def test_the_package_keeps_the_rules():
    assert problems(package()) == []


def test_every_station_has_its_place():
    assert {station(module) for module in package()} == {"", *ORDER}


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_use_the_faces(path):
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert strangers(code, package(), plots=True) == []


@pytest.mark.parametrize(
    "path", sorted((paths.ROOT / "workflow" / "scripts").glob("*.py")), ids=lambda p: p.stem
)
def test_scripts_use_the_faces(path):
    assert strangers(path.read_text(encoding="utf-8"), package(), plots=False) == []


def test_importing_it_is_cheap():
    faces = [
        m for m in package() if m.count(".") < 2 and m not in ("wdlib.plots", "wdlib.__main__")
    ]
    heavy = {"torch", "transformers", "peft", "sklearn", "matplotlib", "lm_eval", "datasets"}
    code = f"import sys, {', '.join(faces)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Houses that break one rule each --------------------------------------------------------------

GOOD = {
    "wdlib": "__version__ = '1'\nclass WdlibError(Exception): ...\n",
    "wdlib.paths": "ROOT = 1\n_HIDDEN = 2\n",
    "wdlib.stats": "def holm(p): ...\n",
    "wdlib.fits": (
        "from wdlib.fits import goodness\nfrom wdlib.fits.estimators import power_law\n"
        "__all__ = ['goodness', 'power_law']\n"
    ),
    "wdlib.fits.estimators": "from wdlib import WdlibError, paths\ndef power_law(x): ...\n",
    "wdlib.fits.goodness": (
        "from wdlib.fits.estimators import power_law\nKS: int = 1\ndef _null(x): ...\n"
    ),
    "wdlib.characterise": "from wdlib.fits.goodness import KS\n",
    "wdlib.plots": "from wdlib.plots import fits\n__all__ = ['fits']\n",
    "wdlib.plots.fits": "from wdlib.fits import goodness\n",
    "wdlib.cli": "def main():\n    from wdlib import characterise\n",
}
SPOILED = {
    "up the way": ("wdlib.paths", "from wdlib.fits.estimators import power_law"),
    "goodness, up the way": ("wdlib.stats", "def f():\n    from wdlib.fits import goodness"),
    "characterise, up the way": (
        "wdlib.fits.goodness",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from wdlib import characterise",
    ),
    "wdlib itself imports": ("wdlib", "from wdlib import paths"),
    "a circle: wdlib.fits.estimators": (
        "wdlib.fits.estimators",
        "def f():\n    from wdlib.fits.goodness import KS",
    ),
    "plots, which is for notebooks": ("wdlib.notebooks", "from wdlib.plots import fits"),
    "power_law from the face wdlib.fits": (
        "wdlib.characterise",
        "from wdlib.fits import power_law",
    ),
    "all from the face wdlib.fits": ("wdlib.characterise", "from wdlib import fits"),
    "all from the face wdlib.plots": ("wdlib.plots.fits", "import wdlib.plots"),
    "no module by its full name": ("wdlib.fits.goodness", "from .estimators import power_law"),
    "no room of its own": ("wdlib.fits", "from wdlib import stats"),
    "does not list it": ("wdlib.fits", "from wdlib.fits.goodness import KS"),
    "imports the private wdlib.paths._HIDDEN": ("wdlib.stats", "from wdlib.paths import _HIDDEN"),
    "more than 500 lines": ("wdlib.fits.goodness", "x = 1\n" * 501),
    "no place in the order": ("wdlib.fits2", "from wdlib import paths"),
    "11 names beside its rooms": (
        "wdlib.fits",
        "from wdlib.fits.estimators import a, b, c, d, e, f, g, h, i, j",
    ),
}


def test_a_good_house_has_no_problems():
    assert problems(GOOD) == []


@pytest.mark.parametrize("words", SPOILED)
def test_each_rule_finds_what_it_is_there_for(words):
    module, more = SPOILED[words]
    spoiled = {**GOOD, module: GOOD.get(module, "") + more}
    assert any(words in problem for problem in problems(spoiled)), problems(spoiled)


@pytest.mark.parametrize(
    ("source", "stranger"),
    [
        ("from wdlib import fits, paths, plots\nfits.power_law(paths.ROOT), plots.fits", ""),
        ("from wdlib.fits import power_law, goodness\ngoodness.KS", ""),
        ("from wdlib import WdlibError, stats\nfrom wdlib.stats import holm\nstats.holm", ""),
        ("from wdlib import fits\nfits.goodness.KS", ""),
        ("import wdlib", "import wdlib"),
        ("import wdlib.fits as f", "import wdlib.fits"),
        ("from wdlib.fits.estimators import power_law",) * 2,
        ("from wdlib.fits.goodness import KS",) * 2,
        ("from wdlib import rivals", "from wdlib import rivals"),
        ("from wdlib.fits import estimators", "from wdlib.fits import estimators"),
        ("from wdlib.paths import _HIDDEN", "from wdlib.paths import _HIDDEN"),
        ("from wdlib import fits\nfits.estimators.power_law(1)", "fits.estimators"),
        ("from wdlib import fits\nx = fits.fit(1)", "fits.fit"),
        ("from wdlib import fits as f\nf.goodness._null(1)", "f.goodness._null"),
        ("from wdlib import fits\nfits.goodness.power_law(1)", "fits.goodness.power_law"),
        ("from wdlib import paths\npaths._HIDDEN", "paths._HIDDEN"),
    ],
)
def test_what_no_face_shows_is_found(source, stranger):
    assert strangers(source, GOOD, plots=True) == [stranger] * bool(stranger)


def test_a_script_that_draws_is_found():
    assert strangers("from wdlib import plots", GOOD, plots=False) == ["plots"]


# Old names ------------------------------------------------------------------------------------

MOVED = {
    "models": "checkpoints", "remote": "checkpoints.hub", "weights": "checkpoints",
    "nulls": "spectra.nulls", "rivals": "fits.alternatives", "characterize": "characterise",
    "training": "lora.training", "pretrained": "lora.pretrained",
    "evaluation": "lora.evaluation", "experiments": "lora.grid", "run": "notebooks",
}  # fmt: skip
"""Modules of the flat package, and where they went."""

FOLDERS = ("spectra", "fits", "fingerprints", "lora", "plots")
"""Modules of the flat package that are folders now."""

RENAMED = {
    "fit_power_law": "fits.power_law",
    "fit_full": "fits.estimators.power_law_full",
    "fit_loglog": "fits.estimators.power_law_loglog",
    "fit_rival": "fits.alternatives.fit",
    "RivalFit": "fits.alternatives.AlternativeFit",
    "rival_tails": "plots.fits.alternative_tails",
    "certify": "nothing: all singular values are proven",
    "spectra.stack": "spectra.collect",
    "models.resolve": "checkpoints.resolve",
    "weights.projections": "checkpoints.projections",
    "are_from": "checkpoints.files.matches_source",
    "is_of": "characterise.matches_spectra",
    "characterize": "characterise",
    "generator.replace": "generator.redraw_entries",
    "paths.whole": "paths.atomic_write",
    "from_json": "from_dict",
    "experiments.Stored": "lora.results.CellResult",
    "-m wdlib.cli": "-m wdlib",
    "docs/experiments": "workflow/scripts",
}
"""Old names, and what they are now."""

TEXTS = {".py", ".md", ".ipynb", ".yaml", ".toml", ""}


def old_names(text: str) -> list[str]:
    old = [rf"wdlib[./]{name}" for name in MOVED] + [rf"wdlib/{name}\.py" for name in FOLDERS]
    old += [re.escape(name) for name in RENAMED]
    return re.findall(rf"(?<!\w)(?:{'|'.join(old)})(?!\w)", text)


def test_no_old_name_stays():
    files = [path for path in texts() if path.name != "test_house.py"]
    assert len(files) > 150
    found = {path: old_names(path.read_text(encoding="utf-8")) for path in files}
    assert {str(path): names for path, names in found.items() if names} == {}


def texts() -> Iterator[Path]:
    """The files of the repository that people read."""
    for folder in ("wdlib", "tests", "notebooks", "workflow", "docs"):
        yield from (
            p for p in (paths.ROOT / folder).rglob("*") if p.suffix in TEXTS and p.is_file()
        )
    yield from (path for path in paths.ROOT.glob("*") if path.suffix in TEXTS and path.is_file())


def test_every_file_of_the_package_that_is_named_is_there():
    named = re.compile(r"(?<![\w./])(?:wdlib|workflow|docs)/[\w./-]+\.(?:py|md|csv|yaml)\b")
    found = {
        (path.name, name)
        for path in texts()
        for name in named.findall(path.read_text(encoding="utf-8"))
        if path.name not in ("test_house.py", "test_provenance.py")
    }
    assert ("plan.py", "wdlib/checkpoints/lexicon.py") in found
    assert [name for name in sorted(found) if not (paths.ROOT / name[1]).is_file()] == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("add rows to wdlib/weights.py, says wdlib.run.", ["wdlib/weights", "wdlib.run"]),
        ("see wdlib/fits.py: `fits.fit_power_law(x)`", ["wdlib/fits.py", "fit_power_law"]),
        ("`wdlib run` fits.power_law wdlib/fits/ wdlib.runs certified refit_full", []),
    ],
)
def test_old_names_are_found(text, names):
    assert old_names(text) == names
