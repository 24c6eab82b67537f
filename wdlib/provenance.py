"""What made a table of data/results, kept in a record beside it, and whether that still holds.

The record of NAME.csv is NAME.provenance.json; `write` writes both. `state` compares it with the
table, the script and the inputs of now. The package's own code is not compared.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wdlib import __version__, paths
from wdlib.checkpoints import files
from wdlib.checkpoints.catalogue import catalogue_model

LIBRARIES = ("numpy", "scipy", "scikit-learn")
"""Those whose versions every record holds."""

_WEIGHTS = "weights of "

Row = Mapping[str, Any]
"""Values by column."""


@dataclass(frozen=True)
class Provenance:
    """What made a table.

    script, script_sha256: its path in the repository, and its content. parameters: what else
    decided the numbers. versions: of wdlib and libraries. inputs: a path in the repository, or
    "weights of" a model -> sha256. date, sha256: of the table. note: what else there is to know.
    """

    script: str
    script_sha256: str
    parameters: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, str]
    date: str = ""
    sha256: str = ""
    note: str = ""


@dataclass(frozen=True)
class _Kept:
    """The finished cells of a table that is not whole yet: the rows of each, by its name."""

    made: Provenance
    cells: dict[str, list[dict[str, Any]]]


def of(
    script: str,
    parameters: Mapping[str, Any],
    *,
    inputs: Iterable[Path] = (),
    models: Iterable[str] = (),
    libraries: Iterable[str] = (),
) -> Provenance:
    """The provenance of a table that is about to be made; hashes what it is made from.

    Arguments: script, its `__file__`; parameters, of what JSON can hold; inputs, files of the
    repository; models, whose weights are read; libraries, those that are used beside `LIBRARIES`.
    Raises: WdlibError as `resolve` does.
    """
    hashes = {_name(path): paths.file_sha256(path) for path in inputs}
    for model in models:
        hashes[f"{_WEIGHTS}{model}"] = files.content_hash(files.resolve(model))
    versions = {"wdlib": __version__} | {name: version(name) for name in (*LIBRARIES, *libraries)}
    given = json.loads(json.dumps(parameters))  # as it comes back from a file
    return Provenance(_name(Path(script)), paths.file_sha256(Path(script)), given, versions, hashes)


def write(rows: Iterable[Row], path: Path, made: Provenance) -> None:
    """Write a table, a column per key of its rows, and its record; each atomically."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    sha256 = hashlib.sha256(text.getvalue().encode()).hexdigest()
    save(replace(made, date=datetime.now(UTC).date().isoformat(), sha256=sha256), path)
    paths.write_text(path, text.getvalue())


def write_by_cell(
    cells: Sequence[tuple[Any, ...]],
    rows_of: Callable[..., Iterable[Row]],
    path: Path,
    made: Provenance,
) -> None:
    """Write a table of the rows that `rows_of(*cell)` gives, in the order of the cells.

    The rows of finished cells are kept in data/cache/tables. After an interruption the same call
    goes on after them; where script, parameters, versions or inputs have changed, it begins anew.
    """
    kept = paths.CACHE / "tables" / f"{path.stem}.json"
    found: dict[str, list[dict[str, Any]]] = {}
    if kept.is_file():
        remedy = "remove it; its cells are computed again"
        before = paths.read_json(kept, _Kept, what="the finished cells of a table", remedy=remedy)
        found = before.cells if before.made == made else {}
    for cell in tqdm(cells, unit="cell"):
        if (key := json.dumps(cell)) not in found:
            found[key] = [dict(row) for row in rows_of(*cell)]
            paths.write_text(kept, json.dumps({"made": asdict(made), "cells": found}))
    write([row for cell in cells for row in found[json.dumps(cell)]], path, made)
    kept.unlink(missing_ok=True)


def record_file(path: Path) -> Path:
    """Where the record of a table is."""
    return path.with_suffix(".provenance.json")


def save(made: Provenance, path: Path) -> None:
    """Write the record of the table at `path`."""
    paths.write_text(record_file(path), json.dumps(asdict(made), indent=1) + "\n")


def load(path: Path) -> Provenance:
    """The record of the table at `path`. Raises WdlibError, naming the file, where that fails."""
    remedy = "make the table anew (docs/scale.md)"
    return paths.read_json(record_file(path), Provenance, what="a record", remedy=remedy)


def tables() -> list[Path]:
    """The tables of data/results."""
    return sorted(paths.RESULTS.rglob("*.csv"))


def state(path: Path) -> str:
    """Whether a table is up to date, or the first reason why not.

    "nothing says what made it"; "changed since it was written", by hand or halfway; "out of date",
    with the inputs that changed; "the script has changed since", be it a comment. Weights are
    compared where the catalogue knows their sha256.

    Raises: WdlibError as `load` does.
    """
    if not record_file(path).is_file():
        return "nothing says what made it"
    found = load(path)
    if paths.file_sha256(path) != found.sha256:
        return "changed since it was written"
    if changed := [name for name, sha256 in found.inputs.items() if not _is_now(name, sha256)]:
        return f"out of date: {', '.join(changed)} changed"
    same = _is_now(found.script, found.script_sha256)
    return "up to date" if same else "the script has changed since"


def _is_now(name: str, sha256: str) -> bool:
    """Whether an input is there as it was."""
    if name.startswith(_WEIGHTS):
        row = catalogue_model(name.removeprefix(_WEIGHTS))
        return row is None or row.sources[0].sha256 in ("", sha256)
    path = paths.ROOT / name
    return path.is_file() and paths.file_sha256(path) == sha256


def _name(path: Path) -> str:
    return path.resolve().relative_to(paths.ROOT).as_posix()
