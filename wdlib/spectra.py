"""Singular values: from a matrix to its r largest with proven errors, from a model to a file.

The spectra of language model weights are flat: next to the r-th singular value stand others within
a fraction of a percent. Sketching methods, which rely on decay, are wrong by percents there. What
is used instead is chosen per matrix (arXiv 2509.00046, section 2, asks for r = 16, 64, 256 and
names no algorithm):

`gram-lanczos`
    Float32 product G = W W^T, block Lanczos on G, then Rayleigh-Ritz with the exact W in float64.
`gram-float64`
    Float64 product and all its eigenvalues. For small matrices, for many values, and whenever the
    first method cannot prove its result.
`svd-float64`
    LAPACK's singular value decomposition, where squaring W would cost too many digits.
"""

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise
from scipy import linalg
from scipy.linalg import blas, lapack
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from wdlib import TYPES, WdlibError, __version__, models, paths, weights

TOLERANCE = 1e-5
"""Relative error that every reported value is proven to keep."""

DENSE_DIMENSION = 320
"""Up to this smaller dimension, all eigenvalues cost less than the r largest."""

DENSE_FRACTION = 12
"""With r above n / DENSE_FRACTION, all eigenvalues cost less than the r largest."""

BLOCK = 4
"""Vectors per Lanczos step. A value that is repeated more often than this needs a dense method."""

PROBES = 8
PROBE_FACTOR = 10.0
"""||F|| <= PROBE_FACTOR sqrt(2/pi) max_j ||F x_j|| over PROBES Gaussian x_j, except with
probability PROBE_FACTOR ** -PROBES (Halko, Martinsson, Tropp, arXiv 0909.4061, lemma 4.1)."""

CHUNK_BYTES = 2**20
"""Float64 copies of float32 matrices are made in pieces of about this size."""

PRODUCT_BYTES = 2**28
"""In the float64 product, in pieces of at most this size; smaller matrices are copied whole."""

IN_FLIGHT = 4
"""So many matrices of a stream are handed to an executor at a time, which bounds the memory."""

DEVICES = ("cpu", "cuda", "mps")
"""Where the float32 product can be made. On the CPU it is BLAS's, elsewhere torch's."""

_SUFFIX = ".safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SingularValues:
    """The r largest singular values of one matrix.

    values: (r,) float64, descending. error: (r,) float64, a bound on |values - exact|.
    method: which algorithm gave them.
    """

    values: np.ndarray
    error: np.ndarray
    method: str


@dataclass(frozen=True)
class Job:
    """What to compute of a model: all that decides the numbers, to the last bit.

    rank: values per matrix. types, layers: which matrices; None is all layers. shard: (i, n), of
    these matrices the i-th of n parts, i from 1, equal in cost (`merge` joins them). certify,
    device: as in `top_singular_values`. threads: of the linear algebra; more than one rarely pays
    for a single matrix, and costs dearly on a busy machine.
    """

    rank: int
    types: tuple[str, ...] = TYPES
    layers: tuple[int, ...] | None = None
    shard: tuple[int, int] = (1, 1)
    certify: bool = True
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Spectra:
    """The largest singular values of all projections of one model.

    values[type]: (rows, r) float64, one descending row per layer (and expert), layers ascending.
    error[type]: the same shape, a bound on the absolute error of each value.
    rows[type]: the (layer, expert) of each row; expert is None in dense models.
    provenance: where the numbers come from, as text.
    """

    model: str
    values: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    rows: dict[str, tuple[tuple[int, int | None], ...]]
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return next(iter(self.values.values())).shape[1]

    def truncate(self, rank: int) -> "Spectra":
        """The same spectra with only the `rank` largest values of each row.

        Raises WdlibError if fewer are there.
        """
        if not 1 <= rank <= self.rank:
            raise WdlibError(
                f"the spectra of {self.model} hold ranks 1 to {self.rank}, not {rank}: "
                f"ask for one of these, or compute more with `wdlib spectra {self.model} --rank R "
                "--out FILE`."
            )
        return replace(
            self,
            values={t: v[:, :rank] for t, v in self.values.items()},
            error={t: e[:, :rank] for t, e in self.error.items()},
        )


def compute(
    model: str | Path | models.Checkpoint,
    rank: int,
    *,
    journal: Path | None = None,
    executor: Executor | None = None,
    progress: bool = False,
    **options: Any,
) -> Spectra:
    """The `rank` largest singular values of every projection of a model, one matrix in memory.

    journal: where finished matrices are kept; a call that finds those of an interrupted one there
    goes on after them, and gives what that one would have given, bit for bit. executor: computes
    the matrices, each read where it is computed, so that none is sent; the numbers are the same.
    progress: show a bar of the bytes done, as stored. options: fields of `Job`, `rank` apart.

    Raises WdlibError before any work if `rank` exceeds the smallest dimension of a matrix in use
    (arXiv 2509.00046, section 2, leaves that case open), for types, layers, shards or a device that
    are not there, and for unreadable weights.
    """
    job = Job(rank, **options)
    checkpoint = models.resolve(model) if not isinstance(model, models.Checkpoint) else model
    chosen = weights.plan(checkpoint, types=job.types, layers=job.layers)
    if not chosen:
        raise WdlibError(
            f"{checkpoint.name} has no matrix of type {' or '.join(job.types)}: ask for others."
        )
    _check_rank(checkpoint.name, [part.entry for part in chosen], rank)
    check_device(job.device)
    parts = _shard(chosen, job)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(models.content_hash, checkpoint)
        kept = _Journal(journal, f"{models.identity(checkpoint)} {job} wdlib {__version__}")
        found = _all(parts, job, kept, executor, tqdm(disable=not progress, **_bar(parts, kept)))
    by_type = {t: [f for p, f in found if p.entry.type == t] for t in TYPES}
    values, error = stack({t: results for t, results in by_type.items() if results})
    rows = {
        t: tuple((p.entry.layer, p.entry.expert) for p in parts if p.entry.type == t)
        for t in values
    }
    provenance = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "sha256": content.result(),
        "quantisation": ", ".join(sorted({p.entry.dtype for p in chosen})),
        "note": checkpoint.note,
        "methods": _counted(Counter(f.method for _, f in found)),
        "certified": "yes" if job.certify else "no",
        "largest relative error": _worst(values, error),
        "made by": f"wdlib {__version__} spectra.compute({_given(job)})",
        "created": kept.created,
        "shard": "" if job.shard == (1, 1) else f"{job.shard[0]} of {job.shard[1]}",
    }
    return Spectra(checkpoint.name, values, error, rows, {k: v for k, v in provenance.items() if v})


def compute_to(
    path: str | Path, model: str | Path | models.Checkpoint, rank: int, **options: Any
) -> Spectra:
    """As `compute`, saved to a file; what is finished is kept beside it until all is.

    options: of `compute`, `journal` apart. A call that was killed goes on when it is made again;
    `created` in the provenance is the day of the first of them.

    Raises WdlibError as `compute` and `check_file` do.
    """
    check_file(path)
    journal = _journal(path)
    spectra = compute(model, rank, journal=journal, **options)
    save(spectra, path)
    journal.unlink(missing_ok=True)  # another process may have finished the same
    return spectra


def _journal(path: str | Path) -> Path:
    return Path(f"{path}.unfinished")


def processes(number: int) -> ProcessPoolExecutor:
    """An executor for `compute`: so many processes, which end with this one however it ends."""
    return ProcessPoolExecutor(number, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """In a worker: end when its parent has, which a killed parent cannot see to."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def merge(shards: Sequence[Spectra]) -> Spectra:
    """The spectra of one job from those of all its shards, in any order.

    Saved, they are the same bytes as the one job's (`created` is the earliest of the shards').

    Raises WdlibError if a shard is missing or double, or is from another job or other weights.
    """
    numbers = [s.provenance.get("shard", "") for s in shards]
    of = numbers[0].rpartition(" ")[2] if shards else ""
    whole = [f"{i + 1} of {of}" for i in range(int(of or 0))]
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
    values, error, rows = {}, {}, {}
    for t in TYPES:
        of_type = [s for s in shards if t in s.values]
        if of_type:
            there = [row for s in of_type for row in s.rows[t]]
            order = sorted(range(len(there)), key=lambda i: _place(*there[i]))
            rows[t] = tuple(there[i] for i in order)
            values[t] = np.concatenate([s.values[t] for s in of_type])[order]
            error[t] = np.concatenate([s.error[t] for s in of_type])[order]
    methods = Counter()
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
    return Spectra(first.model, values, error, rows, provenance)


_OWN = ("methods", "largest relative error", "created", "shard")
"""What differs in the provenance of the shards of one job."""


def collect(
    projections: Iterable[weights.Projection],
    rank: int,
    *,
    certify: bool = True,
    threads: int = 1,
    executor: Executor | None = None,
    device: str = "cpu",
) -> dict[str, list[SingularValues]]:
    """`top_singular_values` of a stream of projections, by type in the order of `TYPES`.

    threads: as in `Job`. executor: computes the matrices, which are sent to it, IN_FLIGHT of them
    at a time (threads share them; for processes, `compute` sends none).

    Raises WdlibError as `top_singular_values` does, naming the tensor.
    """
    job = Job(rank, certify=certify, threads=threads, device=device)
    found = {t: [] for t in TYPES}
    with threadpool_limits(threads, "blas"):
        for type, result in _mapped(partial(_of_projection, job), projections, executor, job):
            found[type].append(result)
    return {t: results for t, results in found.items() if results}


def stack(
    found: dict[str, list[SingularValues]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `collect` found as arrays: (values, error), each from type to (matrices, r) float64."""
    values = {t: np.stack([f.values for f in results]) for t, results in found.items()}
    error = {t: np.stack([f.error for f in results]) for t, results in found.items()}
    return values, error


def _shard(parts: list[weights.Part], job: Job) -> list[weights.Part]:
    """The matrices of a shard in their order: sorted by cost and dealt out like cards."""
    i, n = job.shard
    if not 1 <= i <= n <= len(parts):
        raise WdlibError(
            f"there is no shard {i} of {n} of {len(parts)} matrices: ask for one from 1 of n to n "
            f"of n, with n no more than {len(parts)}."
        )
    dealt = sorted(range(len(parts)), key=lambda k: -_cost(parts[k]))[i - 1 :: n]
    return [parts[k] for k in sorted(dealt)]


def _cost(part: weights.Part) -> float:
    """Of a matrix, by its product; for comparison."""
    return min(part.entry.shape) * np.prod(part.entry.shape, dtype=float)


def _all(
    parts: list[weights.Part], job: Job, kept: "_Journal", executor: Executor | None, bar: tqdm
) -> list[tuple[weights.Part, SingularValues]]:
    """Every part with its singular values: those in the journal as they are, the rest computed."""
    missing = [p for p in parts if _key(p) not in kept.found]
    if executor is None:
        # A stream reads the next matrix while one is computed.
        results = map(partial(_of_projection, job), weights.stream(missing))
        results = zip(missing, (result for _, result in results), strict=True)
    else:
        results = _as_finished(missing, job, executor)
    with threadpool_limits(job.threads, "blas"), bar:
        for part, result in results:
            kept.add(part, result)
            bar.set_postfix_str(f"{len(kept.found)} of {len(parts)} matrices", refresh=False)
            bar.update(part.stored)
    return [(p, kept.found[_key(p)]) for p in parts]


def _as_finished(
    parts: list[weights.Part], job: Job, executor: Executor
) -> Iterator[tuple[weights.Part, SingularValues]]:
    """Parts with their singular values, the first finished first; the costliest is begun first."""
    waiting = {}
    with _cancelling(waiting):
        for part in sorted(parts, key=_cost, reverse=True):
            waiting[executor.submit(_limited, partial(_of_part, job), job.threads, part)] = part
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _mapped(function: Callable, items: Iterable, executor: Executor | None, job: Job) -> Iterator:
    """`map`, done by an executor if there is one: in order, IN_FLIGHT items handed out at most."""
    if executor is None:
        yield from map(function, items)
        return
    waiting = deque()
    with _cancelling(waiting):
        for item in items:
            waiting.append(executor.submit(_limited, function, job.threads, item))
            if len(waiting) == IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _cancelling(waiting: Iterable[Future]) -> Iterator[None]:
    """Cancels what is left at the end. Raises WdlibError where an executor is broken."""
    try:
        yield
    except BrokenExecutor as error:
        raise WdlibError(
            f"a worker died ({error}), perhaps for want of memory: each needs three times the "
            "largest matrix in float32; use fewer, and run the same command again."
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def _limited(function: Callable, threads: int, item: object) -> Any:
    with threadpool_limits(threads, "blas"):
        return function(item)


def _of_projection(job: Job, p: weights.Projection) -> tuple[str, SingularValues]:
    """Type and singular values. A function of its own, so that the matrix is let go of with it."""
    found = top_singular_values(
        p.matrix, job.rank, certify=job.certify, device=job.device, name=f"tensor {p.name}"
    )
    return p.type, found


def _of_part(job: Job, part: weights.Part) -> SingularValues:
    return _of_projection(job, weights.read(part))[1]


def _bar(parts: list[weights.Part], kept: "_Journal") -> dict[str, Any]:
    """What a progress bar has to know: all bytes, and those that an earlier run has done."""
    done = sum(p.stored for p in parts if _key(p) in kept.found)
    total = sum(p.stored for p in parts)
    return {"total": total, "initial": done, "unit": "B", "unit_scale": True}


def _given(job: Job) -> str:
    """The options of a job that are not the usual ones, but for those in the provenance anyway."""
    names = [f.name for f in fields(job) if f.name not in ("rank", "certify", "shard")]
    given = [n for n in names if getattr(job, n) != getattr(Job, n)]
    return ", ".join(f"{n}={getattr(job, n)}" for n in ("rank", *given))


def _counted(methods: Counter) -> str:
    return ", ".join(f"{method} {number}" for method, number in sorted(methods.items()))


def _worst(values: dict[str, np.ndarray], error: dict[str, np.ndarray]) -> str:
    """The largest relative error; of values that are zero within theirs, it says nothing."""
    ratios = (error[t] / np.where(v > error[t], v, np.inf) for t, v in values.items())
    return f"{max(float(np.max(r)) for r in ratios):.1e}"


def _key(part: weights.Part) -> tuple[int, str, int | None]:
    return part.entry.layer, part.entry.type, part.entry.expert


def _place(layer: int, expert: int | None) -> tuple[int, int]:
    return layer, -1 if expert is None else expert


class _Journal:
    """Finished matrices of a job: lines of JSON, appended one by one, after one that says whose.

    found: (layer, type, expert) -> singular values. created: the day on which the job began.
    A line that a killed process left torn is passed over; a file of another job begins anew.
    """

    def __init__(self, path: Path | None, job: str) -> None:
        self.path, self.found, self.created = path, {}, datetime.now(UTC).date().isoformat()
        if path is None:
            return
        lines = path.read_bytes().splitlines() if path.is_file() else []
        head, *records = [_parsed(line) for line in lines] or [{}]
        if head.get("job") != job:
            if lines:
                _log.warning("%s is of other weights or another job, and begins anew", path)
            with paths.whole(path) as part:
                part.write_bytes(_line({"job": job, "created": self.created}))
            return
        self.created = head["created"]
        for r in filter(None, records):
            found = SingularValues(np.array(r["values"]), np.array(r["error"]), r["method"])
            self.found[r["layer"], r["type"], r["expert"]] = found
        self._append(b"\n")  # ends a torn line

    def add(self, part: weights.Part, result: SingularValues) -> None:
        layer, type, expert = key = _key(part)
        self.found[key] = result
        record = {"layer": layer, "type": type, "expert": expert, "method": result.method}
        record |= {"values": result.values.tolist(), "error": result.error.tolist()}
        self._append(_line(record))

    def _append(self, line: bytes) -> None:
        if self.path is not None:
            with self.path.open("ab", buffering=0) as file:
                file.write(line)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def largest_rank(model: str | Path | models.Checkpoint) -> int:
    """The smallest dimension of any projection of a model: no more singular values can be asked."""
    return min(min(e.shape) for e in weights.inventory(model))


def available_rank(model: str | Path) -> int:
    """The largest rank that `of` gives for a model: what is stored, or else `largest_rank`."""
    return load(model).rank if is_stored(model) else largest_rank(model)


def check_rank(model: str | Path | models.Checkpoint, rank: int) -> None:
    """Raise WdlibError unless every matrix of a model has `rank` singular values."""
    checkpoint = models.resolve(model) if not isinstance(model, models.Checkpoint) else model
    _check_rank(checkpoint.name, weights.inventory(checkpoint), rank)


def _check_rank(model: str, entries: list[weights.Entry], rank: int) -> None:
    smallest = min(entries, key=lambda e: min(e.shape))
    if not 1 <= rank <= min(smallest.shape):
        raise WdlibError(
            f"rank {rank} is out of range for {model}: its matrix {smallest.name} has shape "
            f"{smallest.shape}, so ask for a rank from 1 to {min(smallest.shape)}."
        )


def save(spectra: Spectra, path: str | Path) -> Path:
    """Write spectra to a safetensors file, atomically; equal spectra give equal bytes.

    One float64 tensor per type, `q` to `down`, of shape (layers, r), and its error bounds under
    `q.error` to `down.error`; in mixture-of-experts models also `q.rows` ..., int64 (rows, 2): the
    layer and expert (-1 for none) of each row. The metadata hold model and provenance as JSON.

    Raises WdlibError as `check_file` does.
    """
    path = check_file(path)
    tensors = {}
    for t, v in spectra.values.items():
        tensors[t] = np.ascontiguousarray(v)
        tensors[f"{t}.error"] = np.ascontiguousarray(spectra.error[t])
        if spectra.rows[t] != _one_row_a_layer(len(v)):
            rows = [(layer, -1 if expert is None else expert) for layer, expert in spectra.rows[t]]
            tensors[f"{t}.rows"] = np.array(rows, dtype=np.int64)
    about = json.dumps({"model": spectra.model, **spectra.provenance})
    with paths.whole(path) as part:
        part.write_bytes(serialise(tensors, metadata={"wdlib": about}))
    return path


def check_file(path: str | Path) -> Path:
    """The path, for a file that spectra are to be written to.

    Raises WdlibError for a folder, and for another suffix than the one that `load` knows.
    """
    path = Path(path)
    if path.suffix != _SUFFIX or path.is_dir():
        raise WdlibError(f"{path} cannot hold spectra: name a file that ends in {_SUFFIX}.")
    return path


def load(model: str | Path, *, rank: int | None = None) -> Spectra:
    """Read spectra back, by the name of a model in data/spectra or by path; truncated to `rank`.

    Raises WdlibError if there is no such file, it is damaged, or it holds fewer values.
    """
    path = Path(model) if Path(model).suffix == _SUFFIX else stored(str(model))
    if not path.is_file() and path == Path(model):
        reason = "its job is unfinished" if _journal(path).is_file() else "there is no such file"
        raise WdlibError(
            f"{path} holds no spectra ({reason}): run `wdlib spectra MODEL --out {path}`."
        )
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in paths.SPECTRA.glob("*.safetensors")))
        raise WdlibError(
            f"there are no stored spectra {path.name} (stored: {known}): compute them with "
            f"`wdlib spectra {model} --rank 16 --out FILE`."
        )
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["wdlib"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
        types = [t for t in TYPES if t in tensors]
        rows = {}
        for t in types:
            rows[t] = _one_row_a_layer(len(tensors[t]))
            if f"{t}.rows" in tensors:
                pairs = tensors[f"{t}.rows"].tolist()
                rows[t] = tuple((layer, None if e < 0 else e) for layer, e in pairs)
        spectra = Spectra(
            about.pop("model"),
            {t: tensors[t] for t in types},
            {t: tensors[f"{t}.error"] for t in types},
            rows,
            about,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WdlibError(
            f"{path} does not hold spectra ({error}): write it anew with `wdlib spectra MODEL "
            f"--rank R --out {path}`."
        ) from error
    return spectra if rank is None else spectra.truncate(rank)


def of(model: str | Path, rank: int, *, progress: bool = False) -> Spectra:
    """Spectra of a model at a rank: from the store if they are there, computed otherwise.

    The store is data/spectra for models of the catalogue, whose weights need not be at hand then,
    and after it the cache, where computed ones are kept under the sha256 of the weights.
    """
    if is_stored(model) and rank <= (kept := load(model)).rank:
        return kept.truncate(rank)
    checkpoint = models.resolve(model)
    check_rank(checkpoint, rank)
    content = models.content_hash(checkpoint)
    path = paths.CACHE / "spectra" / f"{checkpoint.name}-{content[:16]}-r{rank}.safetensors"
    if path.is_file():
        try:
            return load(path)
        except WdlibError as error:
            _log.warning("computing again: %s", error)
    return compute_to(path, replace(checkpoint, sha256=content), rank, progress=progress)


def stored(model: str) -> Path:
    """Where the spectra of a catalogue model are stored."""
    return paths.SPECTRA / f"{model}.safetensors"


def number_of_layers(model: str, values: Mapping[str, Sequence]) -> int:
    """How many layers a model has, where each has one matrix of every type.

    Raises WdlibError where types differ in number: rows are then of layers and experts.
    """
    numbers = {len(v) for v in values.values()}
    if len(numbers) != 1:
        raise WdlibError(
            f"the types of {model} have {sorted(numbers)} vectors: layers can be drawn or divided "
            "only where each has one vector of every type"
        )
    return numbers.pop()


def is_stored(model: str | Path) -> bool:
    """Whether the store has spectra of this model: never of a path, whatever its name."""
    return models.known(model) is not None and stored(model).is_file()


def _one_row_a_layer(layers: int) -> tuple[tuple[int, None], ...]:
    return tuple((layer, None) for layer in range(layers))


def check_device(device: str) -> None:
    """Raise WdlibError unless `device` is one of DEVICES and this machine has it."""
    if device not in DEVICES:
        raise WdlibError(f"there is no device {device!r}: choose one of {', '.join(DEVICES)}.")
    if device == "cpu":
        return
    try:
        import torch
    except ImportError as error:
        raise WdlibError(
            f"the device {device} needs torch, which is not installed: install wdlib[lora]."
        ) from error
    backend = torch.cuda if device == "cuda" else torch.backends.mps
    if not backend.is_available():
        raise WdlibError(f"torch finds no {device} device on this machine: choose cpu.")


def top_singular_values(
    matrix: np.ndarray,
    r: int,
    *,
    certify: bool = True,
    device: str = "cpu",
    name: str = "the matrix",
) -> SingularValues:
    """The r largest singular values of a matrix, with a bound on the error of each.

    matrix: (rows, columns) real, any memory order. r: 1 <= r <= min(rows, columns).
    certify=True proves the bounds: it also counts the values above the cut, so that none can be
    missed. Where the proof fails, a slower method answers. certify=False trusts the Krylov space to
    have found the largest values, as any iterative solver does; its bounds hold under that premise.
    device: of DEVICES, where the float32 product is made, most of the work on a large matrix. It
    need not be trusted: what rounding did to it is in the proof. All else stays on the CPU.

    Raises WdlibError for NaN, infinity, an r out of range (`name` is named in the message), or a
    device that is not there.
    Source: arXiv 2509.00046, section 2 (the paper names no algorithm).
    """
    check_device(device)
    W = np.asarray(matrix)
    if W.ndim != 2 or not 1 <= r <= min(W.shape):
        raise WdlibError(
            f"{name} of shape {W.shape} has no {r} singular values: "
            f"ask for a rank from 1 to {min(W.shape) if W.ndim == 2 else 0}."
        )
    if W.dtype not in (np.float32, np.float64):
        W = W.astype(np.float64)
    if W.shape[0] > W.shape[1]:
        W = W.T
    largest = max(abs(float(W.max())), abs(float(W.min())))
    if not np.isfinite(largest):
        raise WdlibError(f"{name} contains NaN or infinity: its singular values do not exist.")
    scale = 1.0
    if largest and not 1e-4 < largest < 1e4:  # its fourth power must fit into float32
        scale = 2.0 ** np.floor(np.log2(largest))
        W = W.astype(np.float64) / scale
    result = None
    if W.shape[0] > DENSE_DIMENSION and r * DENSE_FRACTION <= W.shape[0]:
        result = _gram_lanczos(W, r, certify, device)
    if result is None:
        result = _gram_float64(W, r)
    if result is None:
        result = _svd_float64(W, r)
    return SingularValues(result.values * scale, result.error * scale, result.method)


def _gram_float64(W: np.ndarray, r: int) -> SingularValues | None:
    """All eigenvalues of W W^T in float64; None where squaring costs too many digits."""
    n, m = W.shape
    # All of a matrix up to PRODUCT_BYTES in one piece, so that it takes one product.
    step = max(1, m if 8 * W.size <= PRODUCT_BYTES else PRODUCT_BYTES // (8 * n))
    G = _syrk(W[:, :step].astype(np.float64, copy=False))
    for j in range(step, m, step):
        piece = W[:, j : j + step].astype(np.float64, order="F")
        G = blas.dsyrk(1.0, piece, beta=1.0, c=G, lower=1, overwrite_c=1)
    eigenvalues = linalg.eigh(
        G, lower=True, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd"
    )
    eps = np.finfo(float).eps
    # Rounding of the product (columnwise worst case) and backward error of the eigenvalue solver.
    shift = m * eps * np.linalg.norm(W.ravel(order="K")) ** 2 + n * eps * eigenvalues[-1]
    return _accept(np.maximum(eigenvalues[::-1][:r], 0.0), shift, W.shape, "gram-float64")


def _svd_float64(W: np.ndarray, r: int) -> SingularValues:
    """LAPACK's singular values of the tall orientation, in float64."""
    values = linalg.svd(W.T.astype(np.float64), compute_uv=False, overwrite_a=True)
    error = max(W.shape) * np.finfo(float).eps * values[0]
    return SingularValues(values[:r], np.full(r, error), "svd-float64")


def _accept(
    squares: np.ndarray, shift: float | np.ndarray, shape: tuple[int, int], method: str
) -> SingularValues | None:
    """Values and errors from squared values known to +-shift; None if TOLERANCE is not kept."""
    values = np.sqrt(squares)
    # |sqrt(a) - sqrt(b)| <= |a - b| / sqrt(max(a, b)), and <= sqrt(|a - b|) when a is about zero.
    shift = np.broadcast_to(shift, squares.shape)
    error = np.minimum(
        np.divide(shift, values, where=values > 0, out=np.sqrt(shift)), np.sqrt(shift)
    )
    floor = max(shape) * np.finfo(float).eps * values[0]
    if np.all(error <= np.maximum(TOLERANCE * values, floor)):
        return SingularValues(values, error, method)
    return None


def _syrk(W: np.ndarray) -> np.ndarray:
    """Lower triangle of W W^T in W's own precision, in column-major order."""
    syrk = blas.ssyrk if W.dtype == np.float32 else blas.dsyrk
    if W.flags.c_contiguous:
        return syrk(1.0, W.T, trans=1, lower=1)
    return syrk(1.0, W, lower=1)


def _gram_lanczos(
    W: np.ndarray, r: int, certify: bool, device: str = "cpu"
) -> SingularValues | None:
    """Block Lanczos on the float32 product, corrected by the exact W; None where unproven."""
    n = W.shape[0]
    W32 = W.astype(np.float32, copy=False)
    G = _mirror(_syrk(W32) if device == "cpu" else _product_on(device, W32))
    del W32
    krylov = _block_lanczos(G, r)
    if krylov is None:
        return None
    V, ritz_next = krylov
    c = V.shape[1]
    probes = np.random.default_rng(1).standard_normal((n, PROBES if certify else 0))
    Z, AX = _gram_apply(W, np.hstack([V, probes]))
    theta, Y = linalg.eigh(Z[:, :c].T @ Z[:, :c], V.T @ V, check_finite=False)
    theta, Y = np.maximum(theta[::-1], 0.0), Y[:, ::-1]
    V, AV = V @ Y, AX[:, :c] @ Y
    residual = float(np.linalg.norm(AV - V * theta))
    rest = ritz_next + residual
    if certify:
        rest = _proven_rest(G, V, theta, (theta[-1] + ritz_next) / 2, (probes, AX[:, c:]))
    gap = theta[:r] - rest
    if not gap[-1] > 0:
        return None
    # Ritz values of a subspace whose complement lies below `rest`: Li and Li 2005, theorem 2.
    shift = 2 * residual**2 / (gap + np.sqrt(gap**2 + 4 * residual**2))
    rounding = max(W.shape) * np.finfo(float).eps * theta[0]
    return _accept(theta[:r], shift + rounding, W.shape, "gram-lanczos")


def _product_on(device: str, W: np.ndarray) -> np.ndarray:
    """As `_syrk` for float32, made by torch on another device."""
    import torch

    X = torch.from_numpy(np.require(W, requirements="W")).to(device)
    return np.triu((X @ X.T).cpu().numpy()).T


def _mirror(G: np.ndarray, block: int = 256) -> np.ndarray:
    """The full symmetric matrix from its lower triangle (column-major), in row-major order."""
    n = len(G)
    G = G.T
    for i in range(0, n, block):
        j = min(i + block, n)
        G[j:, i:j] = G[i:j, j:].T
        G[i:j, i:j] += np.triu(G[i:j, i:j], 1).T
    return G


def _orthonormal_rows(X: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """X = C Q with orthonormal rows of Q and lower triangular C (Cholesky QR); None if singular."""
    C, info = lapack.spotrf(X @ X.T, lower=1, clean=1)
    if info:
        return None
    return blas.strsm(1.0, C, X.T, side=1, lower=1, trans_a=1).T, C


def _block_lanczos(G: np.ndarray, r: int) -> tuple[np.ndarray, float] | None:
    """Approximate leading eigenvectors (n, c) of G, r <= c < r + 8, and the Ritz value after them.

    G: (n, n) float32. c is chosen where the Ritz values leave the best gap. Every new block is
    orthogonalised twice against all before it: once leaves errors of tens of percent. None when the
    Krylov space breaks down or outgrows n / 2: a dense method is then cheaper, or needed.
    """
    n, b = len(G), BLOCK
    limit = n // 2 // b * b
    Q = np.empty((limit, n), np.float32)
    T = np.zeros((limit, limit))
    X = np.random.default_rng(0).standard_normal((b, n), dtype=np.float32)
    k, check, checked = 0, 5 * r + b, (0, np.log(1e4))
    while k < limit:
        block = _orthonormal_rows(X)
        if block is not None:
            X, C1 = block
            X -= (X @ Q[:k].T) @ Q[:k]
            block = _orthonormal_rows(X)
        if block is None:
            return None
        X, C2 = block
        if k:
            C = C1 @ C2  # the off-diagonal block: G's action leaves the space so far by C X
            if k >= check:
                theta, S = np.linalg.eigh(T[:k, :k])
                theta, S = theta[::-1], S[:, ::-1]
                if not theta[r - 1] > 0:
                    return None
                residual = np.linalg.norm(C.T @ S[k - b :, : r + 7], axis=0)
                gap = (theta[r - 1 : r + 7] - theta[r : r + 8]) / 2
                error = np.cumsum(residual**2)[r - 1 :] / np.maximum(gap, 1e-30 * theta[0])
                c = r + int(np.argmin(error))
                excess = np.log(error[c - r] / (TOLERANCE / 2 * theta[r - 1]))
                if excess <= 0:
                    return Q[:k].T @ S[:, :c], float(theta[c])
                slope = max((checked[1] - excess) / (k - checked[0]), 0.05)
                checked, check = (k, excess), k + min(max(excess / slope, b), k / 2)
            T[k : k + b, k - b : k], T[k - b : k, k : k + b] = C.T, C
        Q[k : k + b] = X
        k += b
        X = X @ G
        H = X @ Q[:k].T
        T[k - b : k, k - b : k] = (H[:, k - b :] + H[:, k - b :].T) / 2
        X -= H @ Q[:k]
    return None


def _gram_apply(W: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W^T X and W W^T X in float64; W is converted once, some columns at a time."""
    n, m = W.shape
    Z, Y = np.empty((m, X.shape[1])), np.zeros((n, X.shape[1]))
    step = max(1, CHUNK_BYTES // (8 * n))
    for j in range(0, m, step):
        piece = W[:, j : j + step].astype(np.float64)
        Z[j : j + step] = piece.T @ X
        Y += piece @ Z[j : j + step]
    return Z, Y


def _proven_rest(
    G: np.ndarray,
    V: np.ndarray,
    theta: np.ndarray,
    tau: float,
    probes: tuple[np.ndarray, np.ndarray],
) -> float:
    """A proven upper bound on the eigenvalues of A = W W^T in the complement of V; NaN if unproven.

    L L^T = tau I - G + V diag(theta) V^T exists only if the complement of V lies below tau. What
    rounding changed, in G, in the deflation and in L, is measured on probes = (X, A X) with the
    exact A and added to tau. V: (n, c) float64 orthonormal; theta: (c,) its Ritz values. G is
    overwritten: for the largest matrices, a copy would be much of the memory.
    """
    S = np.asfortranarray(V * np.sqrt(theta), dtype=np.float32)
    M = blas.ssyrk(1.0, S, beta=-1.0, c=G.T, lower=1, overwrite_c=1)
    M[np.diag_indices(len(G))] += np.float32(tau)
    L, info = lapack.spotrf(M, lower=1, clean=1, overwrite_a=1)
    if info:
        return np.nan
    X, AX = probes
    defect = tau * X - AX + V @ (theta[:, None] * (V.T @ X)) - _gram_apply(L, X)[1]
    return float(tau + PROBE_FACTOR * np.sqrt(2 / np.pi) * np.linalg.norm(defect, axis=0).max())
