"""What finished cells of a grid say."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import WdlibError, paths, stats
from wdlib.fingerprints import record
from wdlib.fingerprints.record import Fingerprint
from wdlib.lora import devices, scores
from wdlib.lora.benchmarks import TASKS
from wdlib.lora.runs import UNTRAINED, Run
from wdlib.lora.scores import Evaluation, Scores, correct, debiased

RESULTS = paths.OWN_RESULTS / "experiments"


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


def load_result(run: Run, *, results: Path = RESULTS) -> CellResult | None:
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
    path = fingerprint_file(run, results)
    fingerprint = record.load(path) if path.is_file() else None
    if fingerprint and fingerprint.provenance.get("adapter") != adapter:
        fingerprint = None
    return CellResult(known, found, fingerprint)


def read_report(path: Path) -> dict[str, Any]:
    """What training reports of a finished cell. Raises WdlibError where the file is damaged."""
    what, remedy = "a report", "remove it to run the cell again"
    found = paths.read_json(path, dict[str, Any], what=what, remedy=remedy)
    what = f"{path} does not hold {what}"
    paths.parse_json(json.dumps(found), _Report, what=what, remedy=remedy, others="ignore")
    return found


def reports(folder: Path) -> Iterator[dict[str, Any]]:
    """What training reports of every finished cell of a folder. Raises: as `read_report`."""
    for path in folder.glob("*.json"):
        if not path.name.endswith(".fingerprint.json"):
            yield read_report(path)


def check_arithmetic(run: Run, start: Mapping[str, Any], dtype: str, folder: Path) -> None:
    """Refuse a run whose untrained model has another loss than in the results of a folder.

    Two processors can round bfloat16 differently, by as much as two starts differ.

    Arguments: start, as of `untrained_loss`; dtype, of the frozen weights.
    Raises: WdlibError, naming both losses.
    """
    here = untrained_loss(start)
    for known in reports(folder):
        configuration, there = known["configuration"], untrained_loss(known)
        known_by = (configuration["model"], configuration["data"], known["dtype"])
        if here is None or there is None or known_by != (run.model, run.data, dtype):
            continue
        if abs(here - there) > DRIFT:
            raise WdlibError(
                f"this machine computes differently from that of {known['key']} in {folder}: the "
                f"untrained model's loss is {here:.5f} here and {there:.5f} there; give the "
                "results a folder of their own (--results), or go on on a machine like that one"
            )


@dataclass(frozen=True)
class HeldOut:
    """Loss on held-out examples: the mean per token in nats, and sums and tokens per example."""

    loss: float
    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        counted = len(self.sums) == len(self.tokens) and min(self.tokens, default=-1) >= 0
        if not counted or not 0 < sum(self.tokens) < 2**53:
            raise ValueError("sums and numbers of tokens are not those of as many examples")
        if not np.isfinite([self.loss, *self.sums]).all():
            raise ValueError("a loss is NaN or infinite")


@dataclass(frozen=True)
class Start:
    """What is measured before a run trains; step0 has the fields of `measure.Step0`.

    machine: as `devices.machine` gives it; earlier versions did not say.
    """

    held_out: HeldOut
    step0: dict[str, Any] | None
    machine: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.machine is not None and not isinstance(self.machine.get("device"), str):
            raise ValueError("it was made on a machine without a device")


@dataclass(frozen=True)
class _Hashes:
    model: str
    data: str
    characterisation: str | None
    adapter: str | None


@dataclass(frozen=True)
class _Machine:
    """What is read of where a result was made, as `devices.machine` says it."""

    device: str


@dataclass(frozen=True)
class _Step0:
    """What is read of `measure.step0`."""

    base_loss: float | None = None


@dataclass(frozen=True)
class _Losses:
    before: HeldOut
    after: HeldOut


@dataclass(frozen=True)
class _Report:
    """What is read of a report by its name."""

    key: str
    dtype: str
    hashes: _Hashes
    machine: _Machine
    held_out: _Losses
    configuration: Run
    step0: _Step0 | None = None


def fingerprint_file(run: Run, results: Path) -> Path:
    """Where the fingerprint of a run's model is kept."""
    return results / f"{run.key}.fingerprint.json"


LOSS = "held-out loss"

DRIFT = 2e-4
"""Nats per token by which the untrained model's loss may differ between runs that are compared. Two
kinds of processor that both compute in bfloat16 moved it by twenty times as much."""

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
(`scores.debiased`); "norm", by the harness's acc_norm."""


@dataclass(frozen=True)
class _Row:
    """Scores of one cell, (items,), the items by hashes or lengths, and how they were measured.

    tokens: hash of the held-out tokens; None of runs that were stored before it was. untrained: of
    `untrained_loss`.
    """

    values: np.ndarray
    items: Sequence[Any] | np.ndarray
    setting: tuple[Any, ...]
    tokens: str | None
    untrained: float | None


def untrained_loss(start: Mapping[str, Any]) -> float | None:
    """The loss of the model without its adapter, which bears witness to a machine's arithmetic.

    It is computed alike by all runs with an adapter on one model and data set (`measure.step0`).
    Arguments: start, a report or what is measured before training; None where it was not.
    """
    step0 = start.get("step0") or {}
    return step0.get("base_loss")


def _row(stored: CellResult, measure: str) -> _Row | None:
    """None where it was not measured."""
    hashes, device = stored.report["hashes"], devices.kind(stored.report["machine"])
    told = hashes.get("held-out tokens"), untrained_loss(stored.report)
    if measure == LOSS:
        after = stored.report["held_out"]["after"]
        parts = stats.ratio_parts(after["sums"], after["tokens"])
        made = (device, hashes["data"], stored.report["dtype"], len(parts))
        return _Row(parts, after["tokens"], made, *told)
    task, score = _SCORES[measure]
    found, protocol = stored.evaluation.scores.get(task), stored.evaluation.protocol
    if found is None:
        return None
    orders = len(found.orders) if measure in ("GPQA, orders", "GPQA, debiased") else None
    # Evaluations that were stored before they named their device are of a CPU.
    evaluated = _device_of(stored.evaluation.made.get("tasks"), task) or "cpu"
    setting = (device, evaluated, protocol.dtype, protocol.seed, orders)
    return _Row(score(found).astype(float), found.items, setting, *told)


def _device_of(tasks: Any, task: str) -> str | None:
    """The device that an evaluation names for a task."""
    told = tasks.get(task) if isinstance(tasks, dict) else None
    device = told.get("device") if isinstance(told, dict) else None
    return device if isinstance(device, str) else None


def measured(found: Mapping[Run, CellResult], variant: str, measure: str) -> np.ndarray | None:
    """Scores of a variant: (seeds, items), the seeds in rising order; None where there are none.

    Arguments: found, runs of one model and data set; variant, of `Run.variant`.
    Raises: WdlibError for runs that cannot be told apart by their variant and seed, or that were
    not measured on the same items in the same way.
    """
    rows = list(_by_seed(found, variant, measure).values())
    return _stacked(rows) if rows else None


def paired(
    found: Mapping[Run, CellResult], first: str, second: str, measure: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of two variants on the items and seeds that both have, for `stats.paired_bootstrap`.

    Arguments: as for `measured`.
    Returns: two arrays (seeds, items), the seeds in rising order; the untrained model, which has no
    seed, is one row. None where there is nothing to compare.
    Raises: WdlibError as `measured` does.
    """
    one, two = (_by_seed(found, variant, measure) for variant in (first, second))
    if None not in one and None not in two:
        one, two = ({s: row for s, row in a.items() if s in b} for a, b in ((one, two), (two, one)))
    if not (one and two):
        return None
    both = _stacked([*one.values(), *two.values()])
    return both[: len(one)], both[len(one) :]


@dataclass(frozen=True)
class Sweep:
    """Losses of one start over learning rates, as `by_rate` finds them.

    rates: rising. seeds: rising, those of all starts that were found together. losses: (rates,
    seeds, items) float64, nan where a rate was not run with a seed.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    losses: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """(seeds,) bool: whether every rate was run with the seed."""
        return ~np.isnan(self.losses).any((0, 2))

    @property
    def common(self) -> np.ndarray:
        """(rates, items): means over the seeds that are `whole`."""
        return self.losses[:, self.whole].mean(1)


def by_rate(found: Mapping[Run, CellResult], *, least: int = 3) -> dict[str, Sweep]:
    """Held-out losses of the starts that were run at several learning rates, by their variant.

    Arguments: found, runs of one model and data set, of which those count that are as by default
    but for start, seed and rate; least, rates that a start has been run at, with one seed.
    Raises: WdlibError for runs that were not measured on the same items in the same way.
    """
    rows: dict[str, dict[tuple[int, float], _Row]] = {}
    for run, stored in found.items():
        row = _row(stored, LOSS)
        if run.init != UNTRAINED and row is not None and (usual := run.at_default_rate()).is_plain:
            at = run.seed, run.hyperparameters.learning_rate
            rows.setdefault(usual.variant, {})[at] = row
    swept = {v: part for v, part in rows.items() if _most_common(s for s, _ in part) >= least}
    seeds = tuple(sorted({seed for part in swept.values() for seed, _ in part}))
    every = [row for part in swept.values() for row in part.values()]
    losses = iter(_stacked(every) if every else ())
    return {v: _sweep({at: next(losses) for at in part}, seeds) for v, part in swept.items()}


def _most_common(values: Iterable[int]) -> int:
    """How often the most frequent value is there."""
    return max(Counter(values).values(), default=0)


def _sweep(losses: Mapping[tuple[int, float], np.ndarray], seeds: tuple[int, ...]) -> Sweep:
    """From the losses at a seed and rate, (items,) each."""
    rates = tuple(sorted({rate for _, rate in losses}))
    absent = np.full_like(next(iter(losses.values())), np.nan)
    rows = [[losses.get((seed, rate), absent) for seed in seeds] for rate in rates]
    return Sweep(rates, seeds, np.array(rows))


def _stacked(rows: Sequence[_Row]) -> np.ndarray:
    """(rows, items): the first items, which all of these rows were measured on."""
    items = min(len(row.values) for row in rows)
    alike = {(row.setting, tuple(row.items[:items])) for row in rows}
    if len(alike) > 1 or len({row.tokens for row in rows} - {None}) > 1:
        raise WdlibError(
            "these runs were not measured on the same items in the same way (data, tokens, device, "
            "data type, order of the options): run them again alike, or leave some out"
        )
    untrained = [row.untrained for row in rows if row.untrained is not None]
    if untrained and max(untrained) - min(untrained) > DRIFT:
        raise WdlibError(
            "these runs were made on machines that compute differently: the untrained model's loss "
            f"is {min(untrained):.5f} on one and {max(untrained):.5f} on another; run them again "
            "on one machine, or leave some out"
        )
    return np.array([row.values[:items] for row in rows])


def _by_seed(found: Mapping[Run, CellResult], variant: str, measure: str) -> dict[int | None, _Row]:
    """Seed -> scores of a variant, rising; None stands for the seed of the untrained model."""
    measured: dict[int | None, _Row | None] = {}
    for run in sorted((run for run in found if run.variant == variant), key=lambda run: run.seed):
        seed = None if run.init == UNTRAINED else run.seed
        if seed in measured:
            raise WdlibError(
                f"two runs are {variant!r} with seed {seed}, {run.key} is one: they differ in what "
                "a variant does not name, so compare them apart"
            )
        measured[seed] = _row(found[run], measure)
    return {seed: row for seed, row in measured.items() if row is not None}
