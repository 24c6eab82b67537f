"""The CSV tables of the scripts beside this one, which write data/results."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wdlib import paths


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows, whose keys are the columns, to a table: whole or not at all."""
    with paths.atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
