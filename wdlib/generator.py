"""Weight arrays with a chosen distribution of distances between their singular values.

A template of Gaussian entries is copied, and in every copy some entries are drawn again. How many
is drawn from a Pareto or a Gaussian law, and that law decides what the distances look like
(arXiv 2509.00046; docs/method.md, section 6).

To first order in the share c / N of new entries, singular value i of T + E moves by u_i^T E v_i, so
an array of r rows is c / N^2 times a chi-square of r - 1 degrees of freedom away from its template,
and two copies are that apart with the number of entries new in either for c. Three things limit it.
Where fewer than about a hundred entries are new, single ones matter, and the law is more skewed.
From a share of about 0.01 on, neighbouring singular values hold each other back. At c = N arrays
are independent, and their distance, about 1 / N, is not exceeded.

`calibrate` looks for the parameters whose sets of distances are like a reference's; `counts_for` is
the closed form, without a search.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from wdlib import WdlibError
from wdlib.distances import cosine_distances

SHAPES = (0.5, 0.75)
"""Shapes of ParetoCounts that `counts_for` gives. Of sets between two types of 24 to 30 layers the
rule of `characterise` calls nine in ten a power law with these, within one type six in ten; fewer
with larger shapes. With smaller ones the counts reach N too often."""

LARGEST_SCALE = 3e-4
"""Scale that `counts_for` gives at most: above, the tail of the counts reaches N too early."""


@dataclass(frozen=True)
class ParetoCounts:
    """Counts scale * N * (1 + Lomax(shape)): P(count > x) = (scale * N / x)^shape above scale * N.

    shape: tail index of the counts, no unit, positive.
    scale: smallest share of the N entries that is drawn again, positive.
    Source: docs/method.md, section 6.
    """

    shape: float
    scale: float

    def draw(self, arrays: int, entries: int, rng: np.random.Generator) -> np.ndarray:
        """(arrays,) integers from 1 to `entries`."""
        return _clipped(self.scale * entries * (1 + rng.pareto(self.shape, arrays)), entries)


@dataclass(frozen=True)
class GaussianCounts:
    """Counts Normal(mean * N, deviation * N): both are shares of the N entries.

    Source: docs/method.md, section 6.
    """

    mean: float
    deviation: float

    def draw(self, arrays: int, entries: int, rng: np.random.Generator) -> np.ndarray:
        """(arrays,) integers from 1 to `entries`."""
        return _clipped(rng.normal(self.mean * entries, self.deviation * entries, arrays), entries)


def _clipped(counts: np.ndarray, entries: int) -> np.ndarray:
    return np.clip(np.rint(counts), 1, entries).astype(np.int64)


def template(entries: int, *, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """(entries,) float32 draws from Normal(0, sigma^2)."""
    return rng.standard_normal(entries, dtype=np.float32) * np.float32(sigma)


def redraw_entries(
    template: np.ndarray,
    shape: tuple[int, ...],
    counts: np.ndarray,
    *,
    sigma: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Copies of a template, each with its own number of entries drawn again.

    Copy k is the first prod(shape) entries of the template, row by row, in which counts[k]
    positions, chosen without replacement, hold new draws from Normal(0, sigma^2).

    Arguments: template (N,) float32, N at least prod(shape); counts (n,) integers from 0 to
    prod(shape).
    Returns: (n, *shape) float32.
    Raises: WdlibError for a template that is too short and for counts out of range.
    Source: docs/method.md, section 6.
    """
    entries = prod(shape)
    if len(template) < entries:
        raise WdlibError(
            f"a template of {len(template)} entries is too short for arrays of shape {shape}: draw "
            f"{entries}"
        )
    counts = np.asarray(counts)
    if counts.size and not 0 <= counts.min() <= counts.max() <= entries:
        raise WdlibError(
            f"counts from {counts.min()} to {counts.max()} do not fit arrays of {entries} entries: "
            "clip them"
        )
    arrays = np.tile(template[:entries], (len(counts), 1))
    for array, count in zip(arrays, counts, strict=True):
        chosen = rng.choice(entries, count, replace=False, shuffle=False)
        array[chosen] = rng.standard_normal(count, dtype=np.float32) * np.float32(sigma)
    return arrays.reshape(len(counts), *shape)


def generate(
    arrays: int,
    shape: tuple[int, ...],
    counts: ParetoCounts | GaussianCounts,
    *,
    sigma: float = 1.0,
    ratio: float = 1.0,
    rng: np.random.Generator,
) -> np.ndarray:
    """`arrays` weight arrays around one new template: (arrays, *shape) float32.

    sigma: standard deviation of the template's entries, any unit; ratio: that of new entries in
    units of sigma.
    Source: arXiv 2509.00046 (docs/method.md, section 6).
    Differs from the paper: ratio, which is 1 there. With larger ones single new entries stand out
    of the array, and their values decide the distances, no longer their number.
    """
    if not (sigma > 0 and ratio > 0):
        raise WdlibError(f"sigma = {sigma} and ratio = {ratio}: both are to be positive")
    entries = prod(shape)
    drawn = template(entries, sigma=sigma, rng=rng)
    number = counts.draw(arrays, entries, rng)
    return redraw_entries(drawn, shape, number, sigma=ratio * sigma, rng=rng)


def spectra_of(arrays: np.ndarray, rank: int | None = None) -> np.ndarray:
    """The largest singular values of many arrays at once, from the eigenvalues of A A^T.

    Squaring costs digits in the smallest values of nearly singular arrays: the error is at most
    about 1e-8 of the largest value, and 1e-15 for values of its size.

    Arguments: arrays (n, rows, columns), any unit; rank, all by default.
    Returns: float64 (n, rank), descending along each row.
    Raises: WdlibError for a rank that the arrays do not have.
    """
    arrays = np.asarray(arrays, dtype=np.float64)
    if arrays.shape[-2] > arrays.shape[-1]:
        arrays = arrays.swapaxes(-1, -2)
    rank = arrays.shape[-2] if rank is None else rank
    if not 1 <= rank <= arrays.shape[-2]:
        raise WdlibError(
            f"arrays of shape {arrays.shape[-2:]} have no {rank} singular values: ask for a rank "
            f"from 1 to {arrays.shape[-2]}"
        )
    squares = np.linalg.eigvalsh(arrays @ arrays.swapaxes(-1, -2))
    return np.sqrt(np.maximum(squares[:, : -rank - 1 : -1], 0))


def distances_to_template(
    arrays: int,
    shape: tuple[int, int],
    counts: ParetoCounts | GaussianCounts,
    *,
    templates: int = 1,
    rng: np.random.Generator,
) -> np.ndarray:
    """Cosine distances of the spectra of `arrays` copies to that of their template.

    Given the template they are independent, unlike the distances between copies.

    Returns: float64 (templates, arrays), no unit, a row for every new template.
    """
    rows = []
    for _ in range(templates):
        base = template(prod(shape), sigma=1.0, rng=rng)
        made = redraw_entries(
            base, shape, counts.draw(arrays, prod(shape), rng), sigma=1.0, rng=rng
        )
        rows.append(cosine_distances(spectra_of(base.reshape(1, *shape)), spectra_of(made))[0])
    return np.array(rows)


def first_order(share: float | np.ndarray, shape: tuple[int, int]) -> float | np.ndarray:
    """Mean distance of an array to its template to first order in the share of new entries.

    Source: docs/method.md, section 6: share / N times a chi-square of r - 1 degrees of freedom.
    """
    return share * (min(shape) - 1) / prod(shape)


def first_order_distances(
    counts: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Distances to the template by the first-order law, without any array: as `counts`, float64.

    counts: of new entries. `distances_to_template` gives those of arrays.
    """
    return counts / prod(shape) ** 2 * rng.chisquare(min(shape) - 1, np.shape(counts))


def tail_exponent(x: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Exponent of the density of `x` between two bounds, by maximum likelihood.

    Values of at least `high` count, but where they lie does not: there, distances saturate.

    Returns: alpha, and its standard error for independent draws.
    Raises: WdlibError where no value lies between the bounds.
    """
    tail = x[x >= low]
    inside = np.count_nonzero(tail < high)
    if not inside:
        raise WdlibError(f"no value lies between {low:g} and {high:g}: move the bounds apart")
    shape = inside / np.log(np.minimum(tail, high) / low).sum()
    return 1 + float(shape), float(shape / np.sqrt(inside))


def counts_for(
    alpha: float, xmin: float, shape: tuple[int, int], *, rank: int | None = None
) -> ParetoCounts:
    """Counts whose distances have, as far as it can be had, a given exponent and a given start.

    The shape is alpha - 1, kept within SHAPES. Between two copies with the fewest entries replaced
    the distance is 2 scale / N times a chi-square of rank - 1 degrees of freedom; scale makes its
    mean xmin, and is kept at or below LARGEST_SCALE. At the sizes of real models that bound is what
    decides: the distances of large Gaussian arrays are far smaller than those of trained weights.

    Arguments: alpha, exponent of the density, above 1; xmin, positive, no unit; shape of the
    arrays; rank, singular values in use, all by default.
    Raises: WdlibError for arguments out of range.
    Source: docs/method.md, section 6.
    """
    rank = min(shape) if rank is None else rank
    if not (alpha > 1 and xmin > 0 and 2 <= rank <= min(shape)):
        raise WdlibError(
            f"no counts for alpha = {alpha}, xmin = {xmin} and {rank} singular values of arrays of "
            f"shape {shape}: alpha is above 1, xmin positive, rank from 2 to {min(shape)}"
        )
    tail = float(np.clip(alpha - 1, *SHAPES))
    return ParetoCounts(tail, min(xmin * prod(shape) / (2 * (rank - 1)), LARGEST_SCALE))
