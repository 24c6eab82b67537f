"""The spectra of a model, and the files that hold them."""

import json
import logging
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from wdlib import WdlibError, paths
from wdlib.checkpoints.architectures import type_order
from wdlib.checkpoints.catalogue import catalogue_model
from wdlib.checkpoints.plan import place_order

_SUFFIX = ".safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spectra:
    """The largest singular values of all projections of one model.

    values[type]: (rows, r) float64, one descending row per layer (and expert), layers ascending.
    error[type]: the same shape, a bound on the absolute error of each value.
    rows[type]: the (layer, expert) of each row; expert is None in dense models.
    provenance: where the numbers come from, as text.
    shapes[type]: the (d_out, d_in) of the matrix of each row; a type is absent where the file, of
    an earlier version, does not say.
    """

    model: str
    values: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    rows: dict[str, tuple[tuple[int, int | None], ...]]
    provenance: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

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


def journal_path(path: str | Path) -> Path:
    """Where the finished matrices of a job are that writes to `path`."""
    return Path(f"{path}.unfinished")


def save(spectra: Spectra, path: str | Path) -> Path:
    """Write spectra to a safetensors file, atomically; equal spectra give equal bytes.

    One float64 tensor per type, `q` to `down`, of shape (layers, r), and its error bounds under
    `q.error` to `down.error`; `q.shapes` ..., int64 (rows, 2), of the matrices; in mixtures of
    experts also `q.rows` ..., int64 (rows, 2): the layer and expert (-1 for none) of each row. The
    metadata hold model and provenance as JSON.

    Raises WdlibError as `check_file` does.
    """
    path = check_file(path)
    tensors = {}
    for t, v in spectra.values.items():
        tensors[t] = np.ascontiguousarray(v)
        tensors[f"{t}.error"] = np.ascontiguousarray(spectra.error[t])
        if t in spectra.shapes:
            tensors[f"{t}.shapes"] = np.array(spectra.shapes[t], dtype=np.int64)
        if spectra.rows[t] != _one_row_a_layer(len(v)):
            rows = [(layer, -1 if expert is None else expert) for layer, expert in spectra.rows[t]]
            tensors[f"{t}.rows"] = np.array(rows, dtype=np.int64)
    about = json.dumps({"model": spectra.model, **spectra.provenance})
    with paths.atomic_write(path) as part:
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
    by_path = Path(model).suffix == _SUFFIX
    path = Path(model) if by_path else stored_file(str(model))
    if not path.is_file() and by_path:
        begun = journal_path(path).is_file()
        reason = "its job is unfinished" if begun else "there is no such file"
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
            text = (file.metadata() or {})["wdlib"]
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no iterator)
        about = paths.of_type(json.loads(text), dict[str, str])
        types = sorted((name for name in tensors if "." not in name), key=type_order)
        rows: dict[str, tuple[tuple[int, int | None], ...]] = {}
        for t in types:
            rows[t] = _one_row_a_layer(len(tensors[t]))
            if f"{t}.rows" in tensors:
                pairs = _pairs(tensors[f"{t}.rows"])
                rows[t] = tuple((layer, None if e < 0 else e) for layer, e in pairs)
        spectra = Spectra(
            about.pop("model"),
            {t: tensors[t] for t in types},
            {t: tensors[f"{t}.error"] for t in types},
            rows,
            about,
            {t: _pairs(tensors[f"{t}.shapes"]) for t in types if f"{t}.shapes" in tensors},
        )
        _check(spectra)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WdlibError(
            f"{path} does not hold spectra ({error}): write it anew with `wdlib spectra MODEL "
            f"--rank R --out {path}`."
        ) from error
    return spectra if rank is None else spectra.truncate(rank)


def _check(spectra: Spectra) -> None:
    """Raise ValueError for what no spectra are: see `Spectra`."""
    check_values(spectra.values)
    for t, values in spectra.values.items():
        error, rows, sizes = spectra.error[t], spectra.rows[t], spectra.shapes.get(t)
        if values.shape != error.shape or error.dtype != np.float64:
            raise ValueError(f"the errors of {t} are of another shape or type than its values")
        if not (np.isfinite(error).all() and (error >= 0).all()):
            raise ValueError(f"the errors of {t} hold negative numbers, NaN or infinity")
        order = [place_order(layer, t, expert) for layer, expert in rows]
        ascend = all(one < two for one, two in pairwise(order))
        if len(rows) != len(values) or not ascend or order[0][0] < 0:
            raise ValueError(f"the rows of {t} are not those of as many matrices in their order")
        if sizes is not None and (len(sizes) != len(rows) or min(map(min, sizes)) < spectra.rank):
            raise ValueError(f"the shapes of {t} are not those of its matrices")


def check_values(values: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless these are (rows, r) float64, descending singular values, by type."""
    if len({v.shape[1:] for v in values.values()}) != 1:
        raise ValueError("these are no types of projections with one rank")
    for t, v in values.items():
        if v.ndim != 2 or not v.size or v.dtype != np.float64:
            raise ValueError(f"{t} is no table of float64 values")
        if not np.isfinite(v).all() or (v < 0).any() or (np.diff(v, axis=1) > 0).any():
            raise ValueError(f"{t} holds NaN, infinity, negative numbers or rows that rise")


def cache_file(model: str, key: str, rank: int) -> Path:
    """Where computed spectra are kept: by the model's name and its `files.reading_key`."""
    return paths.CACHE / "spectra" / f"{model}-{key[:16]}-r{rank}{_SUFFIX}"


def load_or_make(path: Path, make: Callable[[Path], object]) -> Spectra:
    """Spectra of the cache: read, or written there by `make`; a damaged file is made anew.

    Raises WdlibError as `make` does.
    """
    if path.is_file():
        try:
            return load(path)
        except WdlibError as error:
            _log.warning("computing again: %s", error)
    make(path)
    return load(path)


def stored_file(model: str | Path) -> Path:
    """Where the spectra of a catalogue model are stored."""
    return paths.SPECTRA / f"{model}.safetensors"


def number_of_layers(model: str, values: Mapping[str, Sized]) -> int:
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
    return catalogue_model(model) is not None and stored_file(model).is_file()


def _pairs(table: np.ndarray) -> tuple[tuple[int, int], ...]:
    if table.dtype != np.int64 or (table < -1).any():
        raise ValueError("rows or shapes are no numbers of layers, experts and dimensions")
    return tuple((int(a), int(b)) for a, b in table)


def _one_row_a_layer(layers: int) -> tuple[tuple[int, None], ...]:
    return tuple((layer, None) for layer in range(layers))
