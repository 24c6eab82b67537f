"""Whether one model is made from another, by their invariants, layer against layer.

A layer of one model is recognised in another where its spectra, of all kinds together, are far
nearer to those of one layer there than layers of that model usually are. Layers of models that were
trained apart are nearest to some layer too, of about the same depth; `RECOGNISED` is what they do
not reach. So no model's own scale, and no list of known models, is in the measure.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wdlib import WdlibError
from wdlib.fingerprints.invariants import Spectra

RECOGNISED = -2.25
"""Nearness (see `relate`) up to which a layer is recognised on its own."""

RUN, RECOGNISED_IN_A_RUN = 2, -1.65
"""Layers to both sides in a row, and their median nearness up to which a layer is recognised."""

RELATED = 0.1
"""Share of recognised layers from which on a model is called related."""

RESOLUTION = 1e-4
"""Differences of logarithms below it say nothing: stored values have five significant digits."""

Invariants = Mapping[str, Spectra]


@dataclass(frozen=True)
class Relation:
    """A model seen from another, layer by layer.

    layers, others: the numbers of their layers, (n,) and (m,). nearness: (n, m), see the function;
    runs: its medians along the diagonals. difference: (n, m), root mean square difference of the
    logarithms of their values, over all kinds.
    """

    layers: np.ndarray
    others: np.ndarray
    nearness: np.ndarray
    runs: np.ndarray
    difference: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """How surely each layer is recognised, from 1 on it is: (n,)."""
        alone = self.nearness.min(axis=1) / RECOGNISED
        return np.maximum(alone, self.runs.min(axis=1) / RECOGNISED_IN_A_RUN)

    @property
    def recognised(self) -> np.ndarray:
        """Which layers are recognised: (n,) of bool."""
        return self.score >= 1

    @property
    def places(self) -> np.ndarray:
        """The place among `others` of the layer that each layer is from, if any: (n,)."""
        alone = self.nearness.min(axis=1) <= RECOGNISED
        return np.where(alone, self.nearness.argmin(axis=1), self.runs.argmin(axis=1))

    @property
    def partners(self) -> np.ndarray:
        """The number of that layer: (n,)."""
        return self.others[self.places]

    @property
    def share(self) -> float:
        """The share of the layers that are recognised."""
        return float(self.recognised.mean())

    @property
    def strength(self) -> float:
        """The score that a share of `RELATED` of the layers reaches, and two of them at least."""
        number = max(2, math.ceil(RELATED * len(self.layers)))
        return float(np.sort(self.score)[-min(number, len(self.layers))])

    @property
    def is_related(self) -> bool:
        """Whether one model is made from the other, or both from a third: a strength of 1."""
        return self.strength >= 1

    @property
    def change(self) -> float:
        """Median difference of the recognised layers from their partners; nan where none is."""
        own = self.difference[np.arange(len(self.layers)), self.places]
        return float(np.median(own[self.recognised])) if self.recognised.any() else float("nan")


def relate(a: Invariants, b: Invariants) -> Relation:
    """How model `a` is seen from model `b`.

    For a layer l of a, a layer m of b and each kind of invariant that both have, the difference
    d(l, m) is the root mean square difference of the logarithms of the values (of each group of
    heads or expert of l from the nearest one of m). One factor of all layers is taken out of each
    kind. Nearness is the mean over the kinds of log(d(l, m) / median of d): 0 is the usual
    difference of a layer of a from one of b, -2 a seventh of it.

    Raises: WdlibError where the models share no kind.
    Differs from arXiv 2512.03620 (SELF), which learns a similarity of such spectra: here nothing is
    learned.
    """
    kinds = [kind for kind in a if kind in b]
    if not kinds:
        raise WdlibError(
            f"models with invariants of {_listed(a)} and {_listed(b)} share none: compare models "
            "that have a kind of projection in common, with records of this version"
        )
    layers, others = (_layers([x[kind] for kind in kinds]) for x in (a, b))
    rows = {kind: _Kind(a[kind], b[kind], layers, others) for kind in kinds}
    first = _nearness([kind.differences(centred=True) for kind in rows.values()])
    found = [kind.differences(partners=first.argmin(axis=1)) for kind in rows.values()]
    nearness, there = _nearness(found), np.isfinite(found)
    squares = np.where(there, np.square(found), 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return Relation(layers, others, nearness, _runs(nearness), np.sqrt(squares))


def _listed(kinds: Mapping) -> str:
    return ", ".join(kinds) or "no kind"


def _layers(spectra: list[Spectra]) -> np.ndarray:
    return np.unique(np.concatenate([s.layers for s in spectra]))


def _nearness(differences: list[np.ndarray]) -> np.ndarray:
    """Mean over kinds of the logarithms of differences, each over its median; inf where none is."""
    logs = [np.log(d / np.nanmedian(d)) for d in differences]
    there = np.isfinite(logs)
    total, number = np.where(there, logs, 0).sum(axis=0), there.sum(axis=0)
    return np.divide(total, number, out=np.full(total.shape, np.inf), where=number > 0)


def _runs(nearness: np.ndarray) -> np.ndarray:
    """Median nearness along the diagonals, over `RUN` layers to both sides; fewer at the ends.

    inf where fewer than half of the layers are there. A median, so that the layers beyond the end
    of a run do not count to it.
    """
    n, m = nearness.shape
    padded = np.pad(nearness, RUN, constant_values=np.nan)
    near = np.array([padded[k : k + n, k : k + m] for k in range(2 * RUN + 1)])
    enough = np.isfinite(near).sum(axis=0) > RUN
    return np.where(enough, np.nanmedian(np.where(enough, near, 0.0), axis=0), np.inf)


class _Kind:
    """The invariants of one kind of two models, in logarithms."""

    def __init__(self, a: Spectra, b: Spectra, layers: np.ndarray, others: np.ndarray) -> None:
        length = min(a.values.shape[1], b.values.shape[1])
        self.x, self.y = (_logarithms(s.values[:, :length]) for s in (a, b))
        self.groups = _Groups(a.layers, layers), _Groups(b.layers, others)

    def differences(
        self, *, centred: bool = False, partners: np.ndarray | None = None
    ) -> np.ndarray:
        """Differences of layers, (n, m); nan where a layer lacks the kind.

        centred: of the shapes alone. partners: the place of the layer of b that each of a is
        compared with for the factor of all layers.
        """
        x, y = self.x, self.y
        if centred:
            x, y = (z - z.mean(axis=1, keepdims=True) for z in (x, y))
        if partners is not None:
            x = x - self._factor(partners)
        d = np.sqrt(np.maximum(np.square(x[:, None] - y).mean(axis=2), RESOLUTION**2))
        one, two = self.groups
        nearest = np.minimum.reduceat(d, two.starts, axis=1)
        found = np.full((one.number, two.number), np.nan)
        found[np.ix_(one.places, two.places)] = one.mean(nearest)
        return found

    def _factor(self, partners: np.ndarray) -> float:
        """The logarithm of the factor of all layers: the median over the layers of a."""
        levels = []
        for values, groups in zip((self.x, self.y), self.groups, strict=True):
            level = np.full(groups.number, np.nan)
            level[groups.places] = groups.mean(values.mean(axis=1))
            levels.append(level)
        steps = levels[0] - levels[1][partners]
        return float(np.nanmedian(steps)) if np.isfinite(steps).any() else 0.0


class _Groups:
    """Rows that belong to layers: the places of those among all layers, and where rows start."""

    def __init__(self, of: np.ndarray, layers: np.ndarray) -> None:
        own, self.starts, self.counts = np.unique(of, return_index=True, return_counts=True)
        self.places, self.number = np.searchsorted(layers, own), len(layers)

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """The mean of the rows of each layer."""
        counts = self.counts.reshape(-1, *[1] * (rows.ndim - 1))
        return np.add.reduceat(rows, self.starts, axis=0) / counts


def _logarithms(values: np.ndarray) -> np.ndarray:
    """Logarithms; values of zero count as a billionth of the largest one."""
    return np.log(np.maximum(values, 1e-9 * values.max(initial=0) or 1.0))
