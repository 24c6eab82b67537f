"""How the values of weight matrices are distributed: moments, densities, tails, and the vector."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from wdlib import TYPES, WdlibError
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.stream import projections

NORMALISATIONS = ("l2", "sum", "max")

BLOCK = 2**20
"""Values per block of the standard deviation: a float64 copy of one block is in memory."""

FINE_BINS, COARSE = 8000, 40
"""Bins of the value histograms, over +-20 standard deviations; so many make one of a density."""


@dataclass(frozen=True)
class Moments:
    """Number of values, their mean, and the sum of their squared distances from it."""

    n: int
    mean: float
    squares: float

    @property
    def deviation(self) -> float:
        """Standard deviation, divided by n."""
        return float(np.sqrt(self.squares / self.n))

    def __add__(self, other: "Moments") -> "Moments":
        """Both sets together, by the update of Chan, Golub and LeVeque (1979)."""
        n, delta = self.n + other.n, other.mean - self.mean
        mean = self.mean + delta * other.n / n
        return Moments(n, mean, self.squares + other.squares + delta**2 * (self.n / n) * other.n)


def moments(matrix: np.ndarray) -> Moments:
    """Moments of the values of one matrix, two passes over each block in float64.

    matrix: real, any shape, at least one value; read in blocks of `BLOCK`, never copied whole
    unless it is not contiguous.
    """
    flat = np.asarray(matrix).ravel(order="K")
    return pooled(_of_block(flat[i : i + BLOCK]) for i in range(0, flat.size, BLOCK))


def _of_block(values: np.ndarray) -> Moments:
    block = values.astype(np.float64)
    mean = block.mean()
    block -= mean
    return Moments(block.size, float(mean), float(block @ block))


def pooled(parts: Iterable[Moments]) -> Moments:
    """The moments of several sets of values together."""
    return reduce(add, parts)


def deviation_vector(deviations: Mapping[str, float], *, normalise: str = "l2") -> dict[str, float]:
    """The Standard-Deviation Vector: one number per projection type.

    deviations: standard deviation of all values of each type, all layers together.
    normalise: "l2" (Euclidean norm 1), "sum" (sum 1) or "max" (largest 1); the paper says that it
    normalises, not how.

    Raises: WdlibError for another normalisation, or where no deviation is positive.
    Source: arXiv 2509.19122 (docs/method.md, section 9).
    """
    if normalise not in NORMALISATIONS:
        raise WdlibError(
            f"there is no normalisation {normalise!r}: choose one of {', '.join(NORMALISATIONS)}"
        )
    vector = np.array(list(deviations.values()), dtype=np.float64)
    scale = {"l2": np.linalg.norm(vector), "sum": vector.sum(), "max": vector.max(initial=0)}
    if not scale[normalise] > 0:
        raise WdlibError("the standard deviations are all zero: check the weights")
    return dict(zip(deviations, (vector / scale[normalise]).tolist(), strict=True))


@dataclass(frozen=True)
class ValueDistribution:
    """How the values of all matrices of one type are distributed.

    n: number of values. mean, standard_deviation: in the unit of the weights. excess_kurtosis: 0
    for a normal distribution. centres, density: (bins,) a histogram of (value - mean) /
    standard_deviation, normalised by n, so that values outside the bins are missing from its area.
    """

    n: int
    mean: float
    standard_deviation: float
    excess_kurtosis: float
    centres: np.ndarray
    density: np.ndarray


def value_distributions(
    model: str | Path | Checkpoint, *, reach: float = 20.0, bins: int = 400
) -> dict[str, ValueDistribution]:
    """Distribution of the values of each projection type, all layers together, in two passes.

    The first pass sums powers in float64, the second counts in `bins` bins over +-`reach`
    standard deviations. One matrix is in memory at a time.

    Raises WdlibError as `projections` does, and for a type whose values are all equal.
    Source: arXiv 2509.19122, figures 1 and 2.
    """
    checkpoint = resolve(model)
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    for p in projections(checkpoint):
        x = p.matrix.astype(np.float64).ravel()
        square = x * x
        sums[p.type] += [x.size, x.sum(), square.sum(), square @ x, square @ square]
    moments = {
        kind: _standardised(sums[kind], f"type {kind} of {checkpoint.name}")
        for kind in TYPES
        if kind in sums
    }
    edges = np.linspace(-reach, reach, bins + 1)
    counts = {kind: np.zeros(bins) for kind in moments}
    for p in projections(checkpoint):
        _, mean, deviation, _ = moments[p.type]
        real = p.matrix.dtype.type
        scaled = (p.matrix.ravel() - real(mean)) / real(deviation)
        counts[p.type] += np.histogram(scaled, bins, range=(-reach, reach))[0]
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    return {
        kind: ValueDistribution(*m, centres, counts[kind] / (m[0] * width))
        for kind, m in moments.items()
    }


def _standardised(sums: np.ndarray, name: str) -> tuple[int, float, float, float]:
    """Number, mean, standard deviation and excess kurtosis from sums of powers 0 to 4."""
    n = int(sums[0])
    m1, m2, m3, m4 = sums[1:] / n
    variance = m2 - m1**2
    if not variance > 1e-12 * m2:  # no more than rounding leaves
        raise WdlibError(
            f"the values of {name} are all equal, so they have no distribution: check the weights"
        )
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return n, float(m1), float(np.sqrt(variance)), float(fourth / variance**2 - 3)


def quantiles(values: ValueDistribution, probabilities: Iterable[float]) -> np.ndarray:
    """Quantiles of a value distribution, in units of its standard deviation, from its histogram.

    Linear within a bin; values beyond the histogram count as lying at its edges.

    Returns: float64, one per probability.
    """
    width = values.centres[1] - values.centres[0]
    edges = np.append(values.centres - width / 2, values.centres[-1] + width / 2)
    inside = np.concatenate([[0.0], np.cumsum(values.density) * width])
    return np.interp(list(probabilities), inside + (1 - inside[-1]) / 2, edges)


def tail_ratio(values: ValueDistribution, *, tail: float = 1e-4) -> float:
    """Width of the tails against the width of the middle, 1 for a normal distribution.

    (q(1 - tail) - q(tail)) / (q(3/4) - q(1/4)), divided by what a normal distribution gives. Unlike
    a p-value it does not grow with the number of values.
    """
    from scipy.stats import norm

    probabilities = np.array([tail, 0.25, 0.75, 1 - tail])
    ratios = [
        (q[3] - q[0]) / (q[2] - q[1])
        for q in (quantiles(values, probabilities), norm.ppf(probabilities))
    ]
    return float(ratios[0] / ratios[1])


def value_tables(model: str | Path) -> tuple[list[dict], list[dict]]:
    """Densities of the values of a model's types, and what tells them from normal ones.

    Returns: rows with model, type, value (in standard deviations) and density; and rows with model,
    type, n, excess kurtosis and tail ratio.
    Raises: WdlibError as `value_distributions` does.
    Source: arXiv 2509.19122, figures 1 and 2.
    """
    densities, shapes = [], []
    for kind, v in value_distributions(model, bins=FINE_BINS).items():
        case = {"model": str(model), "type": kind}
        tail = {"excess kurtosis": v.excess_kurtosis, "tail ratio": tail_ratio(v)}
        shapes.append(case | {"n": v.n} | tail)
        centres = v.centres.reshape(-1, COARSE).mean(axis=1)
        density = v.density.reshape(-1, COARSE).mean(axis=1)
        for x, y in zip(centres[density > 0], density[density > 0], strict=True):
            densities.append(case | {"value": float(x), "density": float(y)})
    return densities, shapes
