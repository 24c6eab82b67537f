"""What finished cells of a grid say."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import WdlibError, paths, stats
from wdlib.fingerprints import record
from wdlib.fingerprints.record import Fingerprint
from wdlib.lora import scores
from wdlib.lora.benchmarks import TASKS
from wdlib.lora.runs import UNTRAINED, Run
from wdlib.lora.scores import Evaluation, Scores, correct, debiased

RESULTS = paths.RESULTS / "experiments"


@dataclass(frozen=True)
class CellResult:
    """A finished cell: what training reports (see `training.train`) and the evaluation.

    evaluation: without scores where no task was asked for. fingerprint: None where it is not
    stored, or is that of another adapter.
    """

    report: dict[str, Any]
    evaluation: Evaluation
    fingerprint: Fingerprint | None = None

    @property
    def update(self) -> dict[str, np.ndarray]:
        """Frobenius norm of what training added to each matrix, relative to the matrix, by type.

        Empty without a fingerprint, and where nothing was trained.
        """
        provenance = self.fingerprint.provenance if self.fingerprint else {}
        return {t: np.array(v) for t, v in json.loads(provenance.get("update", "{}")).items()}


def load(run: Run, *, results: Path = RESULTS) -> CellResult | None:
    """The stored results of a run; None where it is not finished, or its files are of two adapters.

    Raises: WdlibError for files that are damaged.
    """
    report, arrays = results / f"{run.key}.json", results / f"{run.key}.npz"
    if not (report.is_file() and arrays.is_file()):
        return None
    known = read_report(report)
    found, adapter = scores.load(arrays), known["hashes"]["adapter"]
    if found.made.get("adapter", adapter) != adapter:
        return None
    return CellResult(known, found, _load_fingerprint(run, known, results))


def read_report(path: Path) -> dict[str, Any]:
    """What training reports of a finished cell. Raises WdlibError where the file is damaged."""
    return paths.read_json(path, dict, what="a report", remedy="remove it to run the cell again")


def _load_fingerprint(run: Run, report: dict[str, Any], results: Path) -> Fingerprint | None:
    path = fingerprint_file(run, results)
    if not path.is_file():
        return None
    found = record.load(path)
    return found if found.provenance.get("adapter") == report["hashes"]["adapter"] else None


def fingerprint_file(run: Run, results: Path) -> Path:
    return results / f"{run.key}.fingerprint.json"


LOSS = "held-out loss"

_GPQA, _ARC, _HELLASWAG = TASKS

_SCORES: dict[str, tuple[str, Callable[[Scores], np.ndarray]]] = {
    "GPQA": (_GPQA, lambda s: correct(s)[:, 0]),
    "GPQA, orders": (_GPQA, lambda s: correct(s).mean(1)),
    "GPQA, debiased": (_GPQA, lambda s: correct(debiased(s)).mean(1)),
    "ARC": (_ARC, lambda s: correct(s)[:, 0]),
    "ARC, norm": (_ARC, lambda s: correct(s, normalised=True)[:, 0]),
    "HellaSwag": (_HELLASWAG, lambda s: correct(s)[:, 0]),
    "HellaSwag, norm": (_HELLASWAG, lambda s: correct(s, normalised=True)[:, 0]),
}

MEASURES = (*_SCORES, LOSS)
"""What can be compared. "GPQA" is the harness's order of the options; "orders" is the mean over all
orders that were evaluated; "debiased", the same without what a letter is worth in itself
(`evaluation.debiased`); "norm", by the harness's acc_norm."""


@dataclass(frozen=True)
class _Row:
    """Scores of one cell, (items,), the items by hashes or lengths, and how they were measured."""

    values: np.ndarray
    items: Sequence[Any]
    setting: tuple[Any, ...]


def _row(stored: CellResult, measure: str) -> _Row | None:
    """None where it was not measured."""
    if measure == LOSS:
        after = stored.report["held_out"]["after"]
        parts = stats.ratio_parts(after["sums"], after["tokens"])
        setting = (stored.report["hashes"]["data"], stored.report["dtype"], len(parts))
        return _Row(parts, after["tokens"], setting)
    task, score = _SCORES[measure]
    found, protocol = stored.evaluation.scores.get(task), stored.evaluation.protocol
    if found is None:
        return None
    orders = len(found.orders) if measure in ("GPQA, orders", "GPQA, debiased") else None
    return _Row(score(found).astype(float), found.items, (protocol.dtype, protocol.seed, orders))


def measured(found: Mapping[Run, CellResult], variant: str, measure: str) -> np.ndarray | None:
    """Scores of a variant: (seeds, items), the seeds in rising order; None where there are none.

    Arguments: found, runs of one model and data set; variant, of `Run.variant`.
    Raises: WdlibError for runs that cannot be told apart by their variant and seed, or that were
    not measured on the same items in the same way.
    """
    side = _by_seed(found, variant, measure)
    return _stacked([side[seed] for seed in sorted(side)]) if side else None


def paired(
    found: Mapping[Run, CellResult], first: str, second: str, measure: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of two variants on the items and seeds that both have, for `stats.paired_bootstrap`.

    Arguments: as for `measured`.
    Returns: two arrays (seeds, items), the seeds in rising order; the untrained model, which has no
    seed, is one row. None where there is nothing to compare.
    Raises: WdlibError as `measured` does.
    """
    sides = [_by_seed(found, variant, measure) for variant in (first, second)]
    seeds = [set(side) for side in sides if None not in side]
    common = sorted(set.intersection(*seeds)) if seeds else []
    rows = [[side[s] for s in ([None] if None in side else common)] for side in sides if side]
    if len(rows) < 2 or not all(rows):
        return None
    both = _stacked([*rows[0], *rows[1]])
    return both[: len(rows[0])], both[len(rows[0]) :]


def _stacked(rows: Sequence[_Row]) -> np.ndarray:
    """(rows, items): the first items, which all of these rows were measured on."""
    items = min(len(row.values) for row in rows)
    if len({(row.setting, tuple(row.items[:items])) for row in rows}) > 1:
        raise WdlibError(
            "these runs were not measured on the same items in the same way (data, data type, "
            "order of the options): run them again alike, or leave some out"
        )
    return np.array([row.values[:items] for row in rows])


def _by_seed(found: Mapping[Run, CellResult], variant: str, measure: str) -> dict[int | None, _Row]:
    """Seed -> scores of a variant; None stands for the seed of the untrained model."""
    measured = {}
    for run, stored in found.items():
        if run.variant != variant:
            continue
        seed = None if run.init == UNTRAINED else run.seed
        if seed in measured:
            raise WdlibError(
                f"two runs are {variant!r} with seed {seed}, {run.key} is one: they differ in what "
                "a variant does not name, so compare them apart"
            )
        measured[seed] = _row(stored, measure)
    return {seed: row for seed, row in measured.items() if row is not None}
