"""A grid of LoRA runs: train each, evaluate it item by item, keep what came out.

A grid is one YAML file (data/experiments/grid.yaml). Its cells are done in order; what is finished
stays finished, and what was stopped goes on. Adapters and checkpoints stay in the cache; a cell's
results are small files under data/results/experiments: <key>.json, what training reports,
<key>.npz, the evaluation, and where the grid asks for it <key>.fingerprint.json, the fingerprint of
the trained model. Several processes may work on one grid: a cell is locked while one of them does
it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, as_completed
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from wdlib import TYPES, WdlibError, __version__, first_line, paths
from wdlib.checkpoints.catalogue import catalogue_model
from wdlib.fingerprints import record
from wdlib.fingerprints.record import Fingerprint
from wdlib.lora import adapters, data, devices, evaluation, pretrained, scores, training
from wdlib.lora import results as results_of
from wdlib.lora.adapters import adapted_sites
from wdlib.lora.benchmarks import TASKS, Protocol
from wdlib.lora.measure import relative_norms
from wdlib.lora.pretrained import Pretrained
from wdlib.lora.results import RESULTS, CellResult, fingerprint_file, load_result, read_report
from wdlib.lora.runs import UNTRAINED, Hyperparameters, Run
from wdlib.lora.scores import Evaluation

if TYPE_CHECKING:
    from peft import PeftModel


WORK = paths.CACHE / "experiments"
GRID = paths.DATA / "experiments" / "grid.yaml"

STATES = FINISHED, EXTENDABLE, BEGUN, TO_DO, LACKING = (
    "finished",
    "results are incomplete",
    "begun",
    "to do",
    "lacks the reference's characterisation",
)

_APART = "give the results a folder of their own (--results), or hide the GPU"

_PIECES = 2**17
"""A grid of more names, values and marks between them is refused."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run and what is to be measured of it.

    tier: the part of the grid that asks for it. fingerprint: whether that is measured too.
    """

    tier: str
    run: Run
    protocol: Protocol
    fingerprint: bool = False


def cells(path: str | Path = GRID) -> tuple[Cell, ...]:
    """The cells of a grid file in their order.

    The file has `tiers`, from a name to `seeds`, `evaluation` (fields of `Protocol`; `tasks: []`
    for none), `runs` (fields of `Run`, beside hyperparameters by their own names; a list of
    learning rates is a run for each) and, if it is wanted, `fingerprint: true`; and `defaults` for
    all runs. A tier's cells go by seed, so that the runs of one seed can be compared early. A run
    that does not depend on the seed is one cell.
    Raises: WdlibError, naming the file, for what is no such grid.
    """
    import yaml

    what, remedy = f"{path} is no grid of experiments", "correct it"
    try:
        text = Path(path).read_text(encoding="utf-8")
        # A few lines can repeat parts without end: what is cut off here is no whole JSON.
        given = yaml.safe_load(text)
        pieces = islice(json.JSONEncoder().iterencode(given), _PIECES)
        grid = paths.parse_json("".join(pieces), _Grid, what=what, remedy=remedy)
        if strange := [name for name in grid.tiers if name not in given["tiers"]]:
            raise ValueError(f"YAML reads a tier's name as {strange[0]}: put it in quotes")
        found = tuple(_expand(grid))
        _check_protocols(found)
    except OSError as error:
        raise WdlibError(
            f"{path} cannot be read ({first_line(error)}): give the YAML file of a grid, such as "
            f"{GRID}"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise WdlibError(f"{what} ({first_line(error)}): {remedy}") from error
    return found


@dataclass(frozen=True)
class _Tier:
    """A part of a grid's file."""

    seeds: tuple[int, ...]
    evaluation: Protocol
    runs: tuple[dict[str, Any], ...]
    fingerprint: bool = False


@dataclass(frozen=True)
class _Grid:
    """A grid's file."""

    tiers: dict[str, _Tier]
    defaults: dict[str, Any] = field(default_factory=dict)


def _expand(grid: _Grid) -> Iterator[Cell]:
    for name, tier in grid.tiers.items():
        seen = set()
        for seed in tier.seeds:
            for given in (one for runs in tier.runs for one in _at_each_rate(runs)):
                run = _run({**grid.defaults, **given}, seed)
                if run.key not in seen:
                    seen.add(run.key)
                    yield Cell(name, run, tier.evaluation, tier.fingerprint)


def _at_each_rate(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs that one entry of a file stands for."""
    rates = given.get("learning_rate")
    if not isinstance(rates, list):
        yield given
        return
    yield from ({**given, "learning_rate": rate} for rate in rates)


def _check_protocols(every: Sequence[Cell]) -> None:
    """What several tiers measure of one run must join."""
    known: dict[str, Protocol] = {}
    for cell in every:
        if cell.protocol.tasks:
            first = known.setdefault(cell.run.key, cell.protocol)
            if (first.seed, first.dtype) != (cell.protocol.seed, cell.protocol.dtype):
                raise WdlibError(
                    f"{cell.tier} evaluates {cell.run.key} with another seed or dtype than a tier "
                    "before it: give both the same"
                )


def _run(given: dict[str, Any], seed: int) -> Run:
    names = Hyperparameters.__dataclass_fields__
    run = {key: value for key, value in given.items() if key not in names}
    run["hyperparameters"] = {key: value for key, value in given.items() if key in names}
    if run.get("init") != UNTRAINED:
        run["seed"] = seed
    return Run.from_dict(run)


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
    return _state(cell, load_result(cell.run, results=results), work)


def _state(cell: Cell, found: CellResult | None, work: Path) -> str:
    if found is not None:
        return FINISHED if is_finished(cell, found) else EXTENDABLE
    reference = cell.run.characterisation()
    if reference is not None and not reference.is_file():
        return LACKING
    return BEGUN if (work / cell.run.key).is_dir() else TO_DO


def is_finished(cell: Cell, found: CellResult | None) -> bool:
    """Whether a result holds all that its cell asks for."""
    if found is None or (cell.fingerprint and found.fingerprint is None):
        return False
    return _missing(found.evaluation, cell.protocol) is None


def run_grid(
    todo: Sequence[Cell],
    *,
    executor: Executor | None = None,
    data_folder: str | Path | None = None,
    results: Path = RESULTS,
    work: Path = WORK,
    progress: Callable[[str], None] = _log.info,
) -> None:
    """Do some cells of a grid in their order; a cell that fails is logged and the rest goes on.

    Arguments: executor, whose processes do a cell each at a time, with as many threads as torch has
    here (see `workers.processes`), None for this process; data_folder, with the files of the data
    sets and benchmarks, None for the hub; progress, told in one line what is done. Results differ
    in the last digits with the number of torch's threads, which is left as it is set.
    Raises: WdlibError for processes of one launcher, where a process of the executor was lost, and
    at the end where cells failed.
    """
    _check_alone()
    options = {"data_folder": data_folder, "results": results, "work": work}
    failed = []
    for number, cell, (done, whole) in _done(todo, executor, options):
        if not whole:
            failed.append(cell.run.key)
        progress(f"{number}/{len(todo)} {cell.tier} {cell.run.key}: {done}")
    if failed:
        raise WdlibError(
            f"{len(failed)} of {len(todo)} cells failed, the first was {failed[0]}: see above, and "
            "run the same command again"
        )


def _done(
    todo: Sequence[Cell], executor: Executor | None, options: dict[str, Any]
) -> Iterator[tuple[int, Cell, tuple[str, bool]]]:
    """Number, cell, and what `_attempt` says of it, as they are done."""
    if executor is None:
        yield from ((n, cell, _attempt(cell, options)) for n, cell in enumerate(todo, start=1))
        return
    import torch

    threads = torch.get_num_threads()
    begun = {
        executor.submit(_attempt, cell, options, threads): (n, cell)
        for n, cell in enumerate(todo, start=1)
    }
    try:
        for future in as_completed(begun):
            yield (*begun[future], future.result())
    except BrokenExecutor as error:
        raise WdlibError(
            "a process that did a cell was lost, which a lack of memory does: run the same command "
            "again, with fewer workers if need be"
        ) from error
    finally:
        for future in begun:
            future.cancel()


def _attempt(cell: Cell, options: dict[str, Any], threads: int | None = None) -> tuple[str, bool]:
    """What was done of a cell, in words, and whether it did not fail; threads, of torch and BLAS.

    What fails is logged here, where its traceback is.
    """
    import torch
    from threadpoolctl import threadpool_limits

    try:
        if threads:
            torch.set_num_threads(threads)
        with threadpool_limits(threads):
            return run_cell(cell, **options), True
    except Exception as error:
        _log.exception("cell %s failed", cell.run.key)
        return f"failed: {error}", False
    finally:
        devices.release()


def run_cell(
    cell: Cell,
    *,
    data_folder: str | Path | None = None,
    results: Path = RESULTS,
    work: Path = WORK,
) -> str:
    """Bring one cell to its end from wherever it is; returns what was done, in words.

    Raises: WdlibError as `train` and `evaluate` do, for processes of one launcher, and for other
    data or another kind of device than those of the results which are there.
    """
    _check_alone()
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / f"{cell.run.key}.lock", timeout=0)
    try:
        with lock:
            return _run_locked(cell, data_folder, results, work)
    except Timeout:
        return "another process is doing it"


def _check_alone() -> None:
    """The processes of one launcher would lock different cells and train them as one."""
    processes = devices.process_state().num_processes
    if processes > 1:
        raise WdlibError(
            f"{processes} processes of one launcher cannot share a grid: start `wdlib experiments` "
            "without it, as often as you like, or train one run with `training.train`"
        )


def _check_comparable(run: Run, data_folder: str | Path | None, results: Path) -> None:
    """Runs are compared on the same held-out examples and one kind of device: refuse others.

    Before anything is trained; the data for runs on the same data, the device for all of a model.
    """
    digest = data.data_hash(data.examples(run.data, folder=data_folder))
    for known in results_of.reports(results):
        configuration = known["configuration"]
        if configuration["data"] == run.data and known["hashes"]["data"] != digest:
            raise WdlibError(
                f"the data set {run.data!r} is not the one that {known['key']} was trained on, so "
                "the two cannot be compared: name the folder that holds that one, or move the "
                f"results of {run.data!r} out of {results}"
            )
        if configuration["model"] == run.model:
            devices.check_kind(
                devices.kind(known["machine"]), what=f"{known['key']} in {results}", remedy=_APART
            )


def _run_locked(cell: Cell, data_folder: str | Path | None, results: Path, work: Path) -> str:
    stored = load_result(cell.run, results=results)
    if _state(cell, stored, work) == FINISHED:
        return "was finished"
    begun = time.perf_counter()
    _check_comparable(cell.run, data_folder, results)

    def check(start: dict[str, Any]) -> None:
        results_of.check_arithmetic(cell.run, start, training.dtype(cell.run), results)

    place = work / cell.run.key
    folder = training.train(cell.run, place, data_folder=data_folder, check=check)
    report = read_report(folder / "result.json")
    check(report)
    devices.check_kind(devices.kind(report["machine"]), what=f"the run in {folder}", remedy=_APART)
    adapter = report["hashes"]["adapter"]
    if stored and stored.report["hashes"]["adapter"] != adapter:
        stored = None
    wanted = _missing(stored.evaluation, cell.protocol) if stored else cell.protocol
    unseen = cell.fingerprint and not (stored and stored.fingerprint)
    trained = _trained(cell.run, folder) if unseen or (wanted and wanted.tasks) else None
    if wanted:
        measured = Evaluation(wanted, {}, {"seconds": 0.0, "tasks": {}})
        if trained and wanted.tasks:
            measured = _evaluate(trained, wanted, data_folder)
        measured = _joined(stored.evaluation, measured) if stored else measured
        measured = replace(measured, made={**measured.made, "adapter": adapter})
        scores.save(measured, results / f"{cell.run.key}.npz")
        # What each matrix began as is long, and follows from the configuration.
        kept = {key: value for key, value in report.items() if key != "initialisation"}
        paths.write_text(results / f"{cell.run.key}.json", json.dumps(kept) + "\n")
    if trained and unseen:
        seen = _fingerprint(cell.run, trained, report, folder)
        record.save(seen, fingerprint_file(cell.run, results))
    seconds = time.perf_counter() - begun
    return f"held-out loss {report['held_out']['after']['loss']:.4f}, {seconds:.0f} s"


def _evaluate(
    trained: Pretrained, protocol: Protocol, data_folder: str | Path | None
) -> Evaluation:
    return evaluation.evaluate(
        trained.model.to(devices.process_state().device),
        trained.needed_tokenizer(),
        protocol=protocol,
        data_folder=None if data_folder is None else Path(data_folder),
    )


def fingerprint(run: Run, folder: str | Path) -> Fingerprint:
    """The fingerprint of what a finished run made of its model, with all matrices in float32.

    The adapter is merged into the dequantised base weights as peft does it; of an untrained run it
    is the base model's, by the same way. The model goes by the run's key; the provenance names the
    base's weights and the adapter by their sha256, and has the size of `CellResult.update`.

    Arguments: folder, of `training.train`, which for a while holds the merged weights too.
    Raises: WdlibError as `fingerprints.record.compute` does.
    """
    folder = Path(folder)
    return _fingerprint(run, _trained(run, folder), read_report(folder / "result.json"), folder)


def _fingerprint(
    run: Run, trained: Pretrained, report: dict[str, Any], folder: Path
) -> Fingerprint:
    """As above, of a model at hand, which is merged with its adapter."""
    from safetensors.torch import save_model

    model, base, update = trained.model.to("cpu"), trained.checkpoint, ""
    if run.init != UNTRAINED:
        update = json.dumps(_update(model))
        model = model.merge_and_unload()
    known = catalogue_model(run.model)
    with paths.scratch(folder, "merged") as scratch:
        merged = scratch / "merged"
        model.config.save_pretrained(merged)
        save_model(model, str(merged / "model.safetensors"))
        found = record.compute(merged, family=known.family if known else "")
    provenance = {
        "source": base.source,
        "sha256": report["hashes"]["model"],
        "adapter": report["hashes"]["adapter"],
        "update": update,
        "quantisation": base.quantisation,
        "note": base.note,
        "made by": f"wdlib {__version__} lora.grid.fingerprint",
    }
    about = {key: text for key, text in provenance.items() if text}
    return replace(found, model=run.key, provenance=about)


def _update(model: "PeftModel") -> dict[str, list[float]]:
    """||s B A|| / ||W|| of every matrix that an adapter changes, by type, in the model's order."""
    norms = relative_norms(model)
    found: dict[str, list[float]] = {}
    for site, _ in adapted_sites(model):
        found.setdefault(site.type, []).append(float(f"{norms[site.name]:.5g}"))
    return {t: found[t] for t in TYPES if t in found}


def _trained(run: Run, folder: Path) -> Pretrained:
    """The run's model in float32, with its adapter if it has one."""
    loaded = pretrained.load(run.model)
    if run.init == UNTRAINED:
        return loaded
    return replace(loaded, model=adapters.load(loaded.model, folder / "adapter"))


def _missing(known: Evaluation, wanted: Protocol) -> Protocol | None:
    """What of a protocol is not yet measured; None if nothing."""
    have = known.protocol
    if not wanted.tasks:
        return None
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
        tasks=tuple(task for task in TASKS if task in scores),
        limit=limit,
        orders=orders.protocol.orders,
    )
    made = {
        **new.made,
        "seconds": known.made["seconds"] + new.made["seconds"],
        "tasks": {**known.made["tasks"], **new.made["tasks"]},
    }
    return Evaluation(protocol, scores, made)


def finished(some: Iterable[Cell], *, results: Path = RESULTS) -> dict[Run, CellResult]:
    """The cells of which there are results, by their run, in the order given."""
    found = {cell.run: load_result(cell.run, results=results) for cell in some}
    return {run: stored for run, stored in found.items() if stored is not None}
