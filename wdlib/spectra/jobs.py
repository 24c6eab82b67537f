"""One model -> the largest singular values of all its matrices."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from wdlib import TYPES, WdlibError, __version__
from wdlib.checkpoints import files, plan, stream
from wdlib.checkpoints.architectures import type_order
from wdlib.checkpoints.plan import Entry, Part, place_order, projection_parts
from wdlib.spectra import store
from wdlib.spectra.arrays import check_device, one_thread
from wdlib.spectra.journal import Journal
from wdlib.spectra.kernel import SingularValues, top_singular_values
from wdlib.spectra.store import Spectra, check_file, is_stored, journal_path
from wdlib.spectra.workers import cost, number_for, processes, streams


@dataclass(frozen=True)
class Job:
    """What to compute of a model: all that decides the numbers, to the last bit.

    rank: values per matrix. types, layers: which matrices; None is all layers. stack: of which
    stack of layers, as in `checkpoints.inventory`; None is the language model's. shard: (i, n), of
    these matrices the i-th of n parts, i from 1, equal in cost (`merge` joins them). device: as in
    `top_singular_values`.
    """

    rank: int
    types: tuple[str, ...] = TYPES
    layers: tuple[int, ...] | None = None
    stack: str | None = None
    shard: tuple[int, int] = (1, 1)
    device: str = "cpu"


def compute(
    model: str | Path | files.Checkpoint,
    rank: int,
    *,
    journal: Path | None = None,
    executor: Executor | None = None,
    workers: int | None = 1,
    progress: bool = False,
    **options: Any,
) -> Spectra:
    """The `rank` largest singular values of every projection of a model, one matrix in memory.

    journal: where finished matrices are kept; a call that finds those of an interrupted one there
    goes on after them, and gives what that one would have given, bit for bit. executor: computes
    the matrices, each read where it is computed, so that none is sent; the numbers are the same.
    workers: without an executor, processes of this machine; None is as many as are worth it
    (`workers.number_for`). A device has threads of its own instead (`workers.streams`). A script
    that asks for more than one process has to keep its own work under
    `if __name__ == "__main__"`.
    progress: show a bar of the bytes done, as stored. options: fields of `Job`, `rank` apart.

    Raises WdlibError before any work if `rank` exceeds the smallest dimension of a matrix in use
    (arXiv 2509.00046, section 2, leaves that case open), for types, layers, shards or a device that
    are not there, and for unreadable weights.
    """
    job = Job(rank, **options)
    checkpoint = files.resolve(model)
    whole = plan.plan(checkpoint, stack=job.stack)
    chosen = whole.chosen(types=job.types, layers=job.layers)
    if not chosen:
        raise WdlibError(
            f"{checkpoint.name} has no matrix of type {' or '.join(job.types)}: ask for others."
        )
    _check_rank(checkpoint.name, [part.entry for part in chosen], rank)
    check_device(job.device)
    parts, config = _shard(chosen, job), files.config_hash(checkpoint)
    among = nullcontext(executor) if executor else _executor(job, parts, workers)
    with ThreadPoolExecutor(1) as pool, among as executor:
        content = pool.submit(files.content_hash, checkpoint)
        kept = Journal(journal, f"{files.listing_key(checkpoint)} {job} wdlib {__version__}")
        found = _all(parts, job, kept, executor, tqdm(disable=not progress, **_bar(parts, kept)))
    made = _assembled(checkpoint.name, ((p.entry.place, p.entry.shape, f) for p, f in found))
    provenance = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "sha256": content.result(),
        "config sha256": config,
        "quantisation": ", ".join(sorted({p.entry.dtype for p in chosen})),
        "note": checkpoint.note,
        "stack": _stack(whole) if job.stack or whole.others else "",
        "methods": _counted(Counter(f.method for _, f in found)),
        "certified": "yes",
        "largest relative error": _worst(made.values, made.error),
        "made by": f"wdlib {__version__} spectra.compute({_given(job)})",
        "created": kept.created,
        "shard": "" if job.shard == (1, 1) else f"{job.shard[0]} of {job.shard[1]}",
    }
    return replace(made, provenance={key: text for key, text in provenance.items() if text})


def _executor(
    job: Job, parts: list[Part], workers: int | None
) -> AbstractContextManager[Executor | None]:
    """Who computes the matrices of a plan; None is this process, one after the other."""
    if job.device != "cpu":
        return streams(job.device)
    number = number_for(parts) if workers is None else workers
    return processes(number) if number > 1 else nullcontext()


def _stack(whole: plan.Plan) -> str:
    """The stack that was read, and which others of the language there are."""
    return f"{whole.stack}{', not ' if whole.others else ''}{', '.join(whole.others)}"


def compute_to(
    path: str | Path, model: str | Path | files.Checkpoint, rank: int, **options: Any
) -> Spectra:
    """As `compute`, saved to a file; what is finished is kept beside it until all is.

    options: of `compute`, `journal` apart. A call that was killed goes on when it is made again;
    `created` in the provenance is the day of the first of them.

    Raises WdlibError as `compute` and `check_file` do.
    """
    check_file(path)
    journal = journal_path(path)
    with _alone(journal):
        spectra = compute(model, rank, journal=journal, **options)
        store.save(spectra, path)
        journal.unlink(missing_ok=True)
    return spectra


@contextmanager
def _alone(journal: Path) -> Iterator[None]:
    """Keeps a journal for this process. Raises WdlibError where another one has it."""
    lock = Path(f"{journal}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise WdlibError(
            f"another job is writing {journal.name.removesuffix('.unfinished')}: wait for it, or "
            "name another file."
        ) from None


def merge(shards: Sequence[Spectra]) -> Spectra:
    """The spectra of one job from those of all its shards, in any order.

    Saved, they are the same bytes as the one job's (`created` is the earliest of the shards').

    Raises WdlibError if a shard is missing or double, or is from another job or other weights.
    """
    numbers = [s.provenance.get("shard", "") for s in shards]
    of = numbers[0].rpartition(" ")[2] if shards else ""
    count = int(of) if of.isdecimal() else 0
    whole = [f"{i + 1} of {of}" for i in range(min(count, 10_000))]
    if not whole or sorted(numbers) != sorted(whole):
        given = ", ".join(n or "none" for n in numbers)
        lacking = ", ".join(n for n in whole if n not in numbers)
        want = f", for want of {lacking}" if lacking else ""
        raise WdlibError(
            f"the shards given ({given}) make no whole{want}: give each of them once, from 1 of n "
            "to n of n."
        )
    first = shards[0]
    for other in shards[1:]:
        for key in ("model", *dict.fromkeys([*first.provenance, *other.provenance])):
            one, two = ({"model": s.model, **s.provenance}.get(key) for s in (first, other))
            if key not in _OWN and one != two:
                names = first.provenance["shard"], other.provenance["shard"]
                raise WdlibError(
                    f"the shards are not of one job: {key} is {one!r} in {names[0]} and {two!r} in "
                    f"{names[1]}; compute them anew with the same weights and options."
                )
    values, error, rows, shapes = {}, {}, {}, {}
    for t in sorted({t for s in shards for t in s.values}, key=type_order):
        of_type = [s for s in shards if t in s.values]
        if of_type:
            there = [(layer, t, expert) for s in of_type for layer, expert in s.rows[t]]
            order = sorted(range(len(there)), key=lambda i: place_order(*there[i]))
            rows[t] = tuple((there[i][0], there[i][2]) for i in order)
            values[t] = np.concatenate([s.values[t] for s in of_type])[order]
            error[t] = np.concatenate([s.error[t] for s in of_type])[order]
            sizes = [shape for s in of_type for shape in s.shapes.get(t, ())]
            if len(sizes) == len(there):  # files of earlier versions hold none
                shapes[t] = tuple(sizes[i] for i in order)
    methods: Counter[str] = Counter()
    for s in shards:
        for item in s.provenance["methods"].split(", "):
            method, number = item.rsplit(" ", 1)
            methods[method] += int(number)
    provenance = {
        **first.provenance,
        "methods": _counted(methods),
        "largest relative error": _worst(values, error),
        "created": min(s.provenance["created"] for s in shards),
    }
    del provenance["shard"]
    return Spectra(first.model, values, error, rows, provenance, shapes)


_OWN = ("methods", "largest relative error", "created", "shard")
"""What differs in the provenance of the shards of one job."""


_Row = tuple[tuple[int, str, int | None], tuple[int, int], SingularValues]
"""Layer, type and expert of a matrix, its shape, and what was found."""


def collect(projections: Iterable[stream.Projection], rank: int, *, model: str = "") -> Spectra:
    """`top_singular_values` of a stream of projections, one matrix in memory.

    Returns: spectra of that name, rows in the stream's order, without provenance.
    Raises WdlibError as `top_singular_values` does, naming the tensor.
    """
    return _assembled(model, map(partial(_of_projection, Job(rank)), projections))


def _assembled(model: str, found: Iterable[_Row]) -> Spectra:
    by_type: dict[str, list[_Row]] = defaultdict(list)
    for row in found:
        by_type[row[0][1]].append(row)
    there = {t: by_type[t] for t in sorted(by_type, key=type_order)}
    return Spectra(
        model,
        {t: np.stack([f.values for *_, f in of_type]) for t, of_type in there.items()},
        {t: np.stack([f.error for *_, f in of_type]) for t, of_type in there.items()},
        {t: tuple((place[0], place[2]) for place, *_ in rows) for t, rows in there.items()},
        shapes={t: tuple(shape for _, shape, _ in of_type) for t, of_type in there.items()},
    )


def _shard(parts: list[Part], job: Job) -> list[Part]:
    """The matrices of a shard in their order: sorted by cost and dealt out like cards."""
    i, n = job.shard
    if not 1 <= i <= n <= len(parts):
        raise WdlibError(
            f"there is no shard {i} of {n} of {len(parts)} matrices: ask for one from 1 of n to n "
            f"of n, with n no more than {len(parts)}."
        )
    dealt = sorted(range(len(parts)), key=lambda k: -cost(parts[k]))[i - 1 :: n]
    return [parts[k] for k in sorted(dealt)]


def _all(
    parts: list[Part], job: Job, kept: "Journal", executor: Executor | None, bar: tqdm
) -> list[tuple[Part, SingularValues]]:
    """Every part with its singular values: those in the journal as they are, the rest computed."""
    missing = [p for p in parts if p.entry.place not in kept.found]
    results = _as_finished(missing, job, executor) if executor else _in_order(missing, job)
    with one_thread(), bar:
        for part, result in results:
            kept.add(part, result)
            bar.set_postfix_str(f"{len(kept.found)} of {len(parts)} matrices", refresh=False)
            bar.update(part.stored)
    return [(p, kept.found[p.entry.place]) for p in parts]


def _in_order(parts: list[Part], job: Job) -> Iterator[tuple[Part, SingularValues]]:
    """A stream: the next matrix is read while one is computed."""
    results = map(partial(_of_projection, job), stream.read_all(parts))
    yield from zip(parts, (result for *_, result in results), strict=True)


def _as_finished(
    parts: list[Part], job: Job, executor: Executor
) -> Iterator[tuple[Part, SingularValues]]:
    """Yields results as they complete. Submits the costliest first, cancels what is left."""
    waiting: dict[Future[SingularValues], Part] = {}
    try:
        for part in sorted(parts, key=cost, reverse=True):
            waiting[executor.submit(_of_part, job, part)] = part
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenExecutor as error:
        raise WdlibError(
            f"a worker died ({error}), perhaps for want of memory: each needs three times the "
            "largest matrix in float32; use fewer (--workers), and run the same command again."
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def _of_projection(job: Job, p: stream.Projection) -> _Row:
    """A function of its own, so that the matrix is let go of with it."""
    found = top_singular_values(p.matrix, job.rank, device=job.device, name=f"tensor {p.name}")
    return (p.layer, p.type, p.expert), (p.matrix.shape[0], p.matrix.shape[1]), found


def _of_part(job: Job, part: Part) -> SingularValues:
    """The singular values of one matrix, read and computed in a worker."""
    return _of_projection(job, stream.read(part, decoded=job.device == "cpu"))[2]


def _bar(parts: list[Part], kept: "Journal") -> dict[str, Any]:
    """What a progress bar has to know: all bytes, and those that an earlier run has done."""
    done = sum(p.stored for p in parts if p.entry.place in kept.found)
    total = sum(p.stored for p in parts)
    return {"total": total, "initial": done, "unit": "B", "unit_scale": True}


def _given(job: Job) -> str:
    """The options of a job that are not the usual ones, but for those in the provenance anyway."""
    names = [f.name for f in fields(job) if f.name not in ("rank", "shard")]
    given = [n for n in names if getattr(job, n) != getattr(Job, n)]
    return ", ".join(f"{n}={getattr(job, n)}" for n in ("rank", *given))


def _counted(methods: Counter) -> str:
    return ", ".join(f"{method} {number}" for method, number in sorted(methods.items()))


def _worst(values: dict[str, np.ndarray], error: dict[str, np.ndarray]) -> str:
    """The largest relative error; of values that are zero within theirs, it says nothing."""
    ratios = (error[t] / np.where(v > error[t], v, np.inf) for t, v in values.items())
    return f"{max(float(np.max(r)) for r in ratios):.1e}"


def largest_rank(model: str | Path | files.Checkpoint) -> int:
    """The smallest dimension of any projection of a model: no more singular values can be asked."""
    return min(min(entry.shape) for entry in _entries(files.resolve(model)))


def _entries(checkpoint: files.Checkpoint, stack: str | None = None) -> list[Entry]:
    """The matrices of the seven types. Raises WdlibError where there are none."""
    if found := projection_parts(checkpoint, stack=stack):
        return [part.entry for part in found]
    raise WdlibError(
        f"{checkpoint.name} has no matrix of type {' or '.join(TYPES)}: ask `spectra.compute` "
        "(`wdlib spectra --types`) for the types that `checkpoints.inventory` lists."
    )


def available_rank(model: str | Path) -> int:
    """The largest rank that `of` gives for a model: what is stored, or else `largest_rank`."""
    return store.load(model).rank if is_stored(model) else largest_rank(model)


def check_rank(
    model: str | Path | files.Checkpoint, rank: int, *, stack: str | None = None
) -> None:
    """Raise WdlibError unless every matrix of a model has `rank` singular values."""
    checkpoint = files.resolve(model)
    _check_rank(checkpoint.name, _entries(checkpoint, stack), rank)


def _check_rank(model: str, entries: list[Entry], rank: int) -> None:
    smallest = min(entries, key=lambda e: min(e.shape))
    if not 1 <= rank <= min(smallest.shape):
        raise WdlibError(
            f"rank {rank} is out of range for {model}: its matrix {smallest.name} has shape "
            f"{smallest.shape}, so ask for a rank from 1 to {min(smallest.shape)}."
        )


def of(
    model: str | Path, rank: int, *, stack: str | None = None, progress: bool = False
) -> Spectra:
    """Spectra of a model at a rank: from the store if they are there, computed otherwise.

    The store is data/spectra for models of the catalogue, whose weights need not be at hand then,
    and after it the cache, where computed ones are kept by what decides them (`reading_key`).
    stack: as in `Job`; of another than the language model's nothing is in data/spectra.
    """
    if stack is None and is_stored(model) and rank <= (kept := store.load(model)).rank:
        return kept.truncate(rank)
    checkpoint = files.resolve(model)
    check_rank(checkpoint, rank, stack=stack)
    known = replace(checkpoint, sha256=files.content_hash(checkpoint))
    key = files.joined_key(files.reading_key(known), stack or "")
    path = store.cache_file(checkpoint.name, key, rank)
    options = {"stack": stack, "progress": progress}
    return store.load_or_make(path, lambda p: compute_to(p, known, rank, **options))
