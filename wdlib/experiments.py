"""A grid of LoRA runs: train each, evaluate it item by item, keep what came out.

A grid is one YAML file (data/experiments/grid.yaml). Its cells are done in order; what is finished
stays finished, and what was stopped goes on. Adapters and checkpoints stay in the cache; a cell's
results are two small files under data/results/experiments: <key>.json, what training reports, and
<key>.npz, the evaluation. Several processes may work on one grid: a cell is locked while one of
them does it.
"""

import gc
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wdlib import WdlibError, evaluation, paths, pretrained, training
from wdlib.evaluation import Evaluation, Protocol
from wdlib.training import UNTRAINED, Run

RESULTS = paths.RESULTS / "experiments"
WORK = paths.CACHE / "experiments"
GRID = paths.DATA / "experiments" / "grid.yaml"

THREADS = 2
"""Threads of torch on a processor; results differ in the last digits with another number."""

STATES = FINISHED, EXTENDABLE, BEGUN, TO_DO, LACKING = (
    "finished",
    "evaluation lacks items",
    "begun",
    "to do",
    "lacks the reference's characterisation",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run and what is to be measured of it; tier: the part of the grid that asks for it."""

    tier: str
    run: Run
    protocol: Protocol


@dataclass(frozen=True)
class Stored:
    """A finished cell: what training reports (see `training.train`) and the evaluation."""

    report: dict[str, Any]
    evaluation: Evaluation


def cells(path: str | Path = GRID) -> tuple[Cell, ...]:
    """The cells of a grid file in their order.

    The file has `tiers`, from a name to `seeds`, `evaluation` (fields of `Protocol`) and `runs`
    (fields of `Run`, beside hyperparameters by their own names), and `defaults` for all runs. A
    tier's cells go by seed, so that the runs of one seed can be compared early. A run that does
    not depend on the seed is one cell.
    Raises: WdlibError, naming the file, for what is no such grid.
    """
    import yaml

    path = Path(path)
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = tuple(_expand(grid))
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, WdlibError) as error:
        raise WdlibError(f"{path} is no grid of experiments: {error}") from error
    return found


def _expand(grid: dict[str, Any]) -> Iterator[Cell]:
    for name, tier in grid["tiers"].items():
        protocol = _protocol(tier["evaluation"])
        seen = set()
        for seed in tier["seeds"]:
            for given in tier["runs"]:
                run = _run({**grid.get("defaults", {}), **given}, seed)
                if run.key not in seen:
                    seen.add(run.key)
                    yield Cell(name, run, protocol)


def _run(given: dict[str, Any], seed: int) -> Run:
    names = training.Hyperparameters.__dataclass_fields__
    run = {key: value for key, value in given.items() if key not in names}
    run["hyperparameters"] = {key: value for key, value in given.items() if key in names}
    if run.get("init") != UNTRAINED:
        run["seed"] = seed
    return Run.from_dict(run)


def _protocol(given: dict[str, Any]) -> Protocol:
    protocol = Protocol(**{**given, "tasks": tuple(given["tasks"])})
    for task in (*protocol.tasks, *protocol.limit):
        if task not in evaluation.TASKS:
            raise WdlibError(
                f"there is no task {task!r}: choose from {', '.join(evaluation.TASKS)}"
            )
    if protocol.dtype not in evaluation.DTYPES:
        raise WdlibError(f"there is no dtype {protocol.dtype!r} of evaluations")
    evaluation.option_orders(protocol.orders)
    return protocol


def chosen(path: str | Path = GRID, *, only: str | None = None) -> tuple[Cell, ...]:
    """The cells of one tier, or whose key begins with `only`; all of them by default.

    Raises: WdlibError as `cells` does, and where nothing is left.
    """
    every = cells(path)
    left = tuple(c for c in every if only in (None, c.tier) or c.run.key.startswith(only))
    if not left:
        tiers = ", ".join(dict.fromkeys(c.tier for c in every))
        raise WdlibError(f"{path} has no cells {only!r}: its tiers are {tiers}")
    return left


def state(cell: Cell, *, results: Path = RESULTS, work: Path = WORK) -> str:
    """How far a cell is: one of STATES."""
    stored = load(cell.run, results=results)
    if stored is not None:
        return EXTENDABLE if _missing(stored.evaluation, cell.protocol) else FINISHED
    reference = cell.run.characterisation()
    if reference is not None and not reference.is_file():
        return LACKING
    return BEGUN if (work / cell.run.key).is_dir() else TO_DO


def run(
    path: str | Path = GRID,
    *,
    only: str | None = None,
    data_folder: str | Path | None = None,
    results: Path = RESULTS,
    work: Path = WORK,
    progress: Callable[[str], None] = _log.info,
) -> None:
    """Do the cells of a grid in their order; a cell that fails is logged and the rest goes on.

    Arguments: only, as for `chosen`; data_folder, with the files of the data sets and benchmarks,
    None for the hub; progress, told in one line what is done. The number of torch's threads is
    what it was set to (`THREADS` from the command line).
    Raises: WdlibError as `chosen` does, and at the end where cells failed.
    """
    todo = chosen(path, only=only)
    failed = []
    for number, cell in enumerate(todo, start=1):
        place = f"{number}/{len(todo)} {cell.tier} {cell.run.key}"
        try:
            done = do(cell, data_folder=data_folder, results=results, work=work)
        except Exception as error:
            _log.exception("cell %s failed", cell.run.key)
            failed.append(cell.run.key)
            done = f"failed: {error}"
        progress(f"{place}: {done}")
        gc.collect()
    if failed:
        raise WdlibError(
            f"{len(failed)} of {len(todo)} cells failed, the first was {failed[0]}: see above, and "
            "run the same command again"
        )


def do(
    cell: Cell,
    *,
    data_folder: str | Path | None = None,
    results: Path = RESULTS,
    work: Path = WORK,
) -> str:
    """Bring one cell to its end from wherever it is; returns what was done, in words.

    Raises: WdlibError as `training.train` and `evaluation.evaluate` do.
    """
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / f"{cell.run.key}.lock", timeout=0)
    try:
        with lock:
            return _do(cell, data_folder, results, work)
    except Timeout:
        return "another process is doing it"


def _do(cell: Cell, data_folder: str | Path | None, results: Path, work: Path) -> str:
    if state(cell, results=results, work=work) == FINISHED:
        return "was finished"
    folder = training.train(cell.run, work / cell.run.key, data_folder=data_folder)
    report = training.result(folder)
    stored = load(cell.run, results=results)
    known = None
    if stored and stored.report["hashes"]["adapter"] == report["hashes"]["adapter"]:
        known = stored.evaluation
    wanted = _missing(known, cell.protocol) if known else cell.protocol
    measured = _evaluate(cell.run, folder, wanted, data_folder)
    measured = _joined(known, measured) if known else measured
    evaluation.save(measured, results / f"{cell.run.key}.npz")
    # What each matrix began as is long, and follows from the configuration.
    report = {key: value for key, value in report.items() if key != "initialisation"}
    with paths.whole(results / f"{cell.run.key}.json") as part:
        part.write_text(json.dumps(report) + "\n", encoding="utf-8")
    seconds = report["seconds"]["this_call"] + measured.made["seconds"]
    return f"held-out loss {report['held_out']['after']['loss']:.4f}, {seconds:.0f} s"


def _evaluate(
    run: Run, folder: Path, protocol: Protocol, data_folder: str | Path | None
) -> Evaluation:
    from peft import PeftModel

    loaded = pretrained.load(run.model)
    model = loaded.model
    if run.init != UNTRAINED:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for an attribute that was renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = PeftModel.from_pretrained(model, folder / "adapter")
    return evaluation.evaluate(
        model,
        loaded.tokenizer,
        protocol=protocol,
        data_folder=None if data_folder is None else Path(data_folder),
    )


def load(run: Run, *, results: Path = RESULTS) -> Stored | None:
    """The stored results of a run; None where it is not finished.

    Raises: WdlibError for files that are damaged.
    """
    report, arrays = results / f"{run.key}.json", results / f"{run.key}.npz"
    if not (report.is_file() and arrays.is_file()):
        return None
    try:
        return Stored(json.loads(report.read_text(encoding="utf-8")), evaluation.load(arrays))
    except ValueError as error:
        raise WdlibError(f"{report} is damaged ({error}): remove it to run it again") from error


def _missing(known: Evaluation, wanted: Protocol) -> Protocol | None:
    """What of a protocol is not yet measured; None if nothing."""
    have = known.protocol
    if (have.seed, have.dtype) != (wanted.seed, wanted.dtype):
        return wanted
    tasks = tuple(task for task in wanted.tasks if not _covers(have, wanted, task))
    return replace(wanted, tasks=tasks) if tasks else None


def _covers(have: Protocol, wanted: Protocol, task: str) -> bool:
    everything = float("inf")
    return (
        task in have.tasks
        and have.limit.get(task, everything) >= wanted.limit.get(task, everything)
        and (task != "gpqa_diamond_zeroshot" or have.orders >= wanted.orders)
    )


def _joined(known: Evaluation, new: Evaluation) -> Evaluation:
    """Both evaluations as one; where they measured the same task, the newer."""
    if (known.protocol.seed, known.protocol.dtype) != (new.protocol.seed, new.protocol.dtype):
        return new
    scores = {**known.scores, **new.scores}
    limit = {t: n for t, n in known.protocol.limit.items() if t not in new.protocol.tasks}
    limit |= {t: n for t, n in new.protocol.limit.items() if t in new.protocol.tasks}
    orders = new if "gpqa_diamond_zeroshot" in new.scores else known
    protocol = replace(
        new.protocol,
        tasks=tuple(task for task in evaluation.TASKS if task in scores),
        limit=limit,
        orders=orders.protocol.orders,
    )
    made = {
        **new.made,
        "seconds": known.made["seconds"] + new.made["seconds"],
        "tasks": {**known.made["tasks"], **new.made["tasks"]},
    }
    return Evaluation(protocol, scores, made)
