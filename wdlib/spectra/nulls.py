"""Null models: what the same pipeline gives where nothing was trained (docs/method.md, section 4).

Two kinds. Of weights, as a stream that `spectra.collect` takes: `gaussian` keeps shapes and scales
of the matrices, `shuffled` their values as well; both destroy what training put into the order of
the entries. Of spectra, as the dictionary that `wdlib.distances` takes: `types_shuffled` keeps the
vectors of every layer and forgets their types, `trend_plus_noise` keeps the types and a smooth
course over the layers and forgets everything else. `gaussian_values` draws the singular values of
a normal matrix from its shape alone, without the matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from wdlib import TYPES, WdlibError, __version__, paths
from wdlib.checkpoints import files
from wdlib.checkpoints.catalogue import catalogue_model
from wdlib.checkpoints.stream import Projection, projections
from wdlib.spectra import jobs, store

TREND_DEGREE = 3
"""Degree of the polynomial over the layers that `trend_plus_noise` takes for the trend."""


def gaussian(stream: Iterable[Projection], *, seed: int) -> Iterator[Projection]:
    """Independent normal matrices of the same shapes and standard deviations, mean zero.

    Yields: one projection for each given, float32 (d_out, d_in); it depends on `seed`, layer, type
    and expert, not on what else is in the stream.
    """
    for p in stream:
        noise = _generator(seed, p).standard_normal(p.matrix.shape, dtype=np.float32)
        noise *= np.float32(p.matrix.std(dtype=np.float64))
        yield replace(p, matrix=noise)


def shuffled(stream: Iterable[Projection], *, seed: int) -> Iterator[Projection]:
    """Every matrix with its own entries permuted: the same values, and no structure.

    Yields: as `gaussian` does.
    """
    for p in stream:
        entries = _generator(seed, p).permutation(p.matrix.ravel())
        yield replace(p, matrix=entries.reshape(p.matrix.shape))


OF_WEIGHTS: dict[str, Callable[..., Iterator[Projection]]] = {
    "gaussian": gaussian,
    "shuffled": shuffled,
}
"""The null models of weights by name."""


def compute(
    model: str | Path | files.Checkpoint, name: str, rank: int, *, seed: int = 0
) -> store.Spectra:
    """Singular values of a null model of weights: `name` of `OF_WEIGHTS`, `rank` per matrix.

    Raises: WdlibError as `spectra.compute` does.
    """
    checkpoint = files.resolve(model)
    jobs.check_rank(checkpoint, rank)
    noise = OF_WEIGHTS[name](projections(checkpoint), seed=seed)
    found = jobs.collect(noise, rank, model=f"{checkpoint.name}-{name}")
    provenance = {
        "source": f"null model {name!r} of {checkpoint.name}, seed {seed}",
        "sha256 of the model": files.content_hash(checkpoint),
        "made by": f"wdlib {__version__} nulls.compute({name!r}, rank={rank}, seed={seed})",
        "numpy": np.__version__,
        "created": datetime.now(UTC).date().isoformat(),
    }
    return replace(found, provenance=provenance)


def of(model: str | Path, name: str, rank: int) -> store.Spectra:
    """Singular values of a null model of weights, seed 0: as stored, or computed and then cached.

    Raises: WdlibError as `compute` does.
    """
    kept = paths.SPECTRA / "nulls" / f"{model}-{name}.safetensors"
    is_stored = catalogue_model(model) and kept.is_file()
    if is_stored and rank <= (stored := store.load(kept)).rank:
        return stored.truncate(rank)
    checkpoint = files.resolve(model)
    known = replace(checkpoint, sha256=files.content_hash(checkpoint))
    path = store.cache_file(f"{checkpoint.name}-{name}", files.reading_key(known), rank)
    return store.load_or_make(path, lambda p: store.save(compute(known, name, rank), p))


def gaussian_values(shape: tuple[int, int], rank: int, rng: np.random.Generator) -> np.ndarray:
    """The largest singular values of a matrix of independent standard normal entries.

    The matrix is not made: its values are those of a bidiagonal one with chi-distributed entries.

    Arguments: shape, of the matrix, either way round; rank, how many values.
    Returns: float64 (rank,), descending.
    Raises: WdlibError for a rank above the smaller dimension.
    Source: Dumitriu and Edelman, Journal of Mathematical Physics 43 (2002), 5830 (beta = 1).
    """
    n, m = sorted(shape)
    if rank > n:
        raise WdlibError(f"a {n} x {m} matrix has {n} singular values: {rank} are too many")
    a, b = rng.chisquare(m - np.arange(n)), rng.chisquare(n - 1 - np.arange(n - 1))
    squares = eigvalsh_tridiagonal(a + np.r_[0, b], np.sqrt(a[:-1] * b), "i", (n - rank, n - 1))
    return np.sqrt(squares[::-1])


def types_shuffled(
    values: Mapping[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """In every layer, its vectors dealt out to the types at random.

    Vectors stay whole and in their layer, so the distances over everything are the same multiset;
    what a type is, is gone: each now holds a random choice of one vector per layer.

    Arguments: values, dictionary from type to (L, r), the same shape for all types.
    Returns: a dictionary with the same keys and shapes.
    Raises: WdlibError where the types differ in shape (mixtures of experts).
    """
    shapes = {v.shape for v in values.values()}
    if len(shapes) != 1:
        raise WdlibError(
            f"the types have spectra of different shapes ({sorted(shapes)}): types can be shuffled "
            "only where every layer has one vector of each"
        )
    stacked = np.stack(list(values.values()))
    types, layers, _ = stacked.shape
    dealt = rng.permuted(np.tile(np.arange(types), (layers, 1)), axis=1)  # (L, types)
    return {t: stacked[dealt[:, i], np.arange(layers)] for i, t in enumerate(values)}


def trend_plus_noise(
    values: Mapping[str, np.ndarray], rng: np.random.Generator, *, degree: int = TREND_DEGREE
) -> dict[str, np.ndarray]:
    """Spectra drawn from a smooth trend over the layers plus noise, type by type.

    The logarithm of each singular value follows a polynomial in the layer, fitted by least squares;
    the noise of a layer is the whole residual of one drawn with replacement, widened for the
    degrees of freedom that the fit took. Rows are sorted again, since noise can swap neighbours.

    Arguments: values, dictionary from type to (L, r), positive, L > degree + 1.
    Returns: a dictionary with the same keys and shapes.
    Raises: WdlibError for values that are not positive, and for too few layers.
    """
    drawn = {}
    for type, rows in values.items():
        layers = len(rows)
        if layers < degree + 2 or not (rows > 0).all():
            raise WdlibError(
                f"the {layers} spectra of type {type} have no trend of degree {degree}: that needs "
                f"{degree + 2} layers and positive singular values"
            )
        basis = np.polynomial.chebyshev.chebvander(np.linspace(-1, 1, layers), degree)
        logs = np.log(rows)
        trend = basis @ np.linalg.lstsq(basis, logs, rcond=None)[0]
        noise = (logs - trend)[rng.integers(layers, size=layers)]
        noise *= np.sqrt(layers / (layers - degree - 1))
        drawn[type] = -np.sort(-np.exp(trend + noise), axis=1)
    return drawn


def _generator(seed: int, p: Projection) -> np.random.Generator:
    expert = 0 if p.expert is None else p.expert + 1
    return np.random.default_rng([seed, p.layer, TYPES.index(p.type), expert])
