"""A grid of LoRA runs: train each, evaluate it item by item, keep what came out.

A grid is one YAML file (data/experiments/grid.yaml). Its cells are done in order; what is finished
stays finished, and what was stopped goes on. Adapters and checkpoints stay in the cache; a cell's
results are small files under data/results/experiments: <key>.json, what training reports,
<key>.npz, the evaluation, and where the grid asks for it <key>.fingerprint.json, the fingerprint of
the trained model. Several processes may work on one grid: a cell is locked while one of them does
it.
"""

import gc
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import (
    TYPES,
    WdlibError,
    __version__,
    evaluation,
    fingerprints,
    lora,
    models,
    paths,
    pretrained,
    stats,
    training,
    weights,
)
from wdlib.evaluation import Evaluation, Protocol, Scores
from wdlib.fingerprints import Fingerprint
from wdlib.pretrained import Pretrained
from wdlib.training import UNTRAINED, Run

if TYPE_CHECKING:
    from peft import PeftModel

RESULTS = paths.RESULTS / "experiments"
WORK = paths.CACHE / "experiments"
GRID = paths.DATA / "experiments" / "grid.yaml"

STATES = FINISHED, EXTENDABLE, BEGUN, TO_DO, LACKING = (
    "finished",
    "results are incomplete",
    "begun",
    "to do",
    "lacks the reference's characterisation",
)

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


@dataclass(frozen=True)
class Stored:
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


def cells(path: str | Path = GRID) -> tuple[Cell, ...]:
    """The cells of a grid file in their order.

    The file has `tiers`, from a name to `seeds`, `evaluation` (fields of `Protocol`; `tasks: []`
    for none), `runs` (fields of `Run`, beside hyperparameters by their own names) and, if it is
    wanted, `fingerprint: true`; and `defaults` for all runs. A tier's cells go by seed, so that the
    runs of one seed can be compared early. A run that does not depend on the seed is one cell.
    Raises: WdlibError, naming the file, for what is no such grid.
    """
    import yaml

    path = Path(path)
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = tuple(_expand(grid))
        _check_protocols(found)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, WdlibError) as error:
        raise WdlibError(f"{path} is no grid of experiments: {error}") from error
    return found


def _expand(grid: dict[str, Any]) -> Iterator[Cell]:
    for name, tier in grid["tiers"].items():
        unknown = set(tier) - {"seeds", "evaluation", "runs", "fingerprint"}
        if unknown:
            raise WdlibError(f"{name} has {sorted(unknown)[0]!r}, which no tier has")
        protocol, fingerprint = _protocol(tier["evaluation"]), tier.get("fingerprint", False)
        seen = set()
        for seed in tier["seeds"]:
            for given in tier["runs"]:
                run = _run({**grid.get("defaults", {}), **given}, seed)
                if run.key not in seen:
                    seen.add(run.key)
                    yield Cell(name, run, protocol, fingerprint)


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
        unseen = cell.fingerprint and stored.fingerprint is None
        return EXTENDABLE if unseen or _missing(stored.evaluation, cell.protocol) else FINISHED
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
    None for the hub; progress, told in one line what is done. Results differ in the last digits
    with the number of torch's threads, which is left as it is set.
    Raises: WdlibError as `chosen` does, for processes of one launcher, and at the end where cells
    failed.
    """
    _check_alone()
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

    Raises: WdlibError as `training.train` and `evaluation.evaluate` do, for processes of one
    launcher, and for data other than that of the results which are there.
    """
    from filelock import FileLock, Timeout

    _check_alone()
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / f"{cell.run.key}.lock", timeout=0)
    try:
        with lock:
            return _do(cell, data_folder, results, work)
    except Timeout:
        return "another process is doing it"


def _check_alone() -> None:
    """The processes of one launcher would lock different cells and train them as one."""
    processes = training.process_state().num_processes
    if processes > 1:
        raise WdlibError(
            f"{processes} processes of one launcher cannot share a grid: start `wdlib experiments` "
            "without it, as often as you like, or train one run with `training.train`"
        )


def _check_data(run: Run, data_folder: str | Path | None, results: Path) -> None:
    """Runs are compared on the same held-out examples: refuse others before anything is trained."""
    digest = training.data_hash(training.examples(run.data, folder=data_folder))
    for path in results.glob("*.json"):
        if path.name.endswith(".fingerprint.json"):
            continue
        known = _report(path)
        if known["configuration"]["data"] == run.data and known["hashes"]["data"] != digest:
            raise WdlibError(
                f"the data set {run.data!r} is not the one that {known['key']} was trained on, so "
                "the two cannot be compared: name the folder that holds that one, or move the "
                f"results of {run.data!r} out of {results}"
            )


def _do(cell: Cell, data_folder: str | Path | None, results: Path, work: Path) -> str:
    if state(cell, results=results, work=work) == FINISHED:
        return "was finished"
    begun = time.perf_counter()
    _check_data(cell.run, data_folder, results)
    folder = training.train(cell.run, work / cell.run.key, data_folder=data_folder)
    report = training.result(folder)
    stored = load(cell.run, results=results)
    if stored and stored.report["hashes"]["adapter"] != report["hashes"]["adapter"]:
        stored = None
    wanted = _missing(stored.evaluation, cell.protocol) if stored else cell.protocol
    if wanted:
        measured = _evaluate(cell.run, folder, wanted, data_folder)
        measured = _joined(stored.evaluation, measured) if stored else measured
        of = {"adapter": report["hashes"]["adapter"]}
        measured = replace(measured, made={**measured.made, **of})
        evaluation.save(measured, results / f"{cell.run.key}.npz")
        # What each matrix began as is long, and follows from the configuration.
        kept = {key: value for key, value in report.items() if key != "initialisation"}
        with paths.whole(results / f"{cell.run.key}.json") as part:
            part.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    if cell.fingerprint and not (stored and stored.fingerprint):
        fingerprints.save(fingerprint(cell.run, folder), _fingerprint_path(cell.run, results))
    seconds = time.perf_counter() - begun
    return f"held-out loss {report['held_out']['after']['loss']:.4f}, {seconds:.0f} s"


def _evaluate(
    run: Run, folder: Path, protocol: Protocol, data_folder: str | Path | None
) -> Evaluation:
    if not protocol.tasks:
        return Evaluation(protocol, {}, {"seconds": 0.0, "tasks": {}})
    trained = _trained(run, folder)
    return evaluation.evaluate(
        trained.model.to(training.process_state().device),
        trained.tokenizer,
        protocol=protocol,
        data_folder=None if data_folder is None else Path(data_folder),
    )


def fingerprint(run: Run, folder: str | Path) -> Fingerprint:
    """The fingerprint of what a finished run made of its model, with all matrices in float32.

    The adapter is merged into the dequantised base weights as peft does it; of an untrained run it
    is the base model's, by the same way. The model goes by the run's key; the provenance names the
    base's weights and the adapter by their sha256, and has the size of `Stored.update`.

    Arguments: folder, of `training.train`, which for a while holds the merged weights too.
    Raises: WdlibError as `fingerprints.compute` does.
    """
    from safetensors.torch import save_model

    trained = _trained(run, Path(folder))
    model, base, update = trained.model, trained.checkpoint, ""
    if run.init != UNTRAINED:
        update = json.dumps(_update(model))
        model = model.merge_and_unload()
    known = models.known(run.model)
    with TemporaryDirectory(dir=folder) as scratch:
        merged = Path(scratch) / "merged"
        model.config.save_pretrained(merged)
        save_model(model, merged / "model.safetensors")
        found = fingerprints.compute(merged, family=known.family if known else "")
    hashes = training.result(folder)["hashes"]
    provenance = {
        "source": base.source,
        "sha256": hashes["model"],
        "adapter": hashes["adapter"],
        "update": update,
        "quantisation": base.quantisation,
        "note": base.note,
        "made by": f"wdlib {__version__} experiments.fingerprint",
    }
    provenance = {key: text for key, text in provenance.items() if text}
    return replace(found, model=run.key, provenance=provenance)


def _update(model: "PeftModel") -> dict[str, list[float]]:
    """||s B A|| / ||W|| of every matrix that an adapter changes, by type, in the model's order."""
    found = {}
    for name, size in lora.relative_norms(model).items():
        _, (kind,), _ = weights.named(f"{name}.weight", model.config.model_type)
        found.setdefault(kind, []).append(float(f"{size:.5g}"))
    return {t: found[t] for t in TYPES if t in found}


def _trained(run: Run, folder: Path) -> Pretrained:
    """The run's model in float32, with its adapter if it has one."""
    from peft import PeftModel

    loaded = pretrained.load(run.model)
    if run.init == UNTRAINED:
        return loaded
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute that was renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return replace(loaded, model=PeftModel.from_pretrained(loaded.model, folder / "adapter"))


def load(run: Run, *, results: Path = RESULTS) -> Stored | None:
    """The stored results of a run; None where it is not finished, or its files are of two adapters.

    Raises: WdlibError for files that are damaged.
    """
    report, arrays = results / f"{run.key}.json", results / f"{run.key}.npz"
    if not (report.is_file() and arrays.is_file()):
        return None
    known = _report(report)
    found, adapter = evaluation.load(arrays), known["hashes"]["adapter"]
    if found.made.get("adapter", adapter) != adapter:
        return None
    return Stored(known, found, _load_fingerprint(run, known, results))


def _report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WdlibError(f"{path} is damaged ({error}): remove it to run it again") from error


def _load_fingerprint(run: Run, report: dict[str, Any], results: Path) -> Fingerprint | None:
    path = _fingerprint_path(run, results)
    if not path.is_file():
        return None
    found = fingerprints.load(path)
    return found if found.provenance.get("adapter") == report["hashes"]["adapter"] else None


def _fingerprint_path(run: Run, results: Path) -> Path:
    return results / f"{run.key}.fingerprint.json"


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


# What finished cells say -------------------------------------------------------------------------

LOSS = "held-out loss"

_GPQA, _ARC, _HELLASWAG = evaluation.TASKS

_SCORES: dict[str, tuple[str, Callable[[Scores], np.ndarray]]] = {
    "GPQA": (_GPQA, lambda s: evaluation.correct(s)[:, 0]),
    "GPQA, orders": (_GPQA, lambda s: evaluation.correct(s).mean(1)),
    "GPQA, debiased": (_GPQA, lambda s: evaluation.correct(evaluation.debiased(s)).mean(1)),
    "ARC": (_ARC, lambda s: evaluation.correct(s)[:, 0]),
    "ARC, norm": (_ARC, lambda s: evaluation.correct(s, normalised=True)[:, 0]),
    "HellaSwag": (_HELLASWAG, lambda s: evaluation.correct(s)[:, 0]),
    "HellaSwag, norm": (_HELLASWAG, lambda s: evaluation.correct(s, normalised=True)[:, 0]),
}

MEASURES = (*_SCORES, LOSS)
"""What can be compared. "GPQA" is the harness's order of the options; "orders" is the mean over all
orders that were evaluated; "debiased", the same without what a letter is worth in itself
(`evaluation.debiased`); "norm", by the harness's acc_norm."""


def finished(some: Iterable[Cell], *, results: Path = RESULTS) -> dict[Run, Stored]:
    """The cells of which there are results, by their run, in the order given."""
    found = {cell.run: load(cell.run, results=results) for cell in some}
    return {run: stored for run, stored in found.items() if stored is not None}


def scores(stored: Stored, measure: str) -> np.ndarray | None:
    """What a cell scores on each item: (items,) float64; None where it was not measured.

    The mean is the measure: the share of right answers, or for LOSS the mean loss per token in
    nats, a ratio, of which an example's score is its part (`stats.ratio_parts`).

    Arguments: measure, one of MEASURES.
    """
    row = _row(stored, measure)
    return None if row is None else row.values


@dataclass(frozen=True)
class _Row:
    """Scores of one cell, (items,), the items by hashes or lengths, and how they were measured."""

    values: np.ndarray
    items: Sequence[Any]
    setting: tuple[Any, ...]


def _row(stored: Stored, measure: str) -> _Row | None:
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


def measured(found: Mapping[Run, Stored], variant: str, measure: str) -> np.ndarray | None:
    """Scores of a variant: (seeds, items), the seeds in rising order; None where there are none.

    Arguments: found, runs of one model and data set; variant, of `Run.variant`.
    Raises: WdlibError for runs that cannot be told apart by their variant and seed, or that were
    not measured on the same items in the same way.
    """
    side = _by_seed(found, variant, measure)
    return _stacked([side[seed] for seed in sorted(side)]) if side else None


def paired(
    found: Mapping[Run, Stored], first: str, second: str, measure: str
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


def _by_seed(found: Mapping[Run, Stored], variant: str, measure: str) -> dict[int | None, _Row]:
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
