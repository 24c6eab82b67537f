"""Whether one model is made from another, by their invariants, layer against layer.

A layer of one model is recognised in another where its spectra, of all kinds together, are far
nearer to those of one layer there than layers of that model usually are. Layers of models that were
trained apart are nearest to some layer too, of about the same depth; `RECOGNISED` is what they do
not reach. So no model's own scale, and no list of known models, is in the measure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wdlib import WdlibError
from wdlib.fingerprints.invariants import Spectra

RECOGNISED = -2.0
"""Nearness (see `nearness`) up to which a layer is recognised."""

RELATED = 0.25
"""Share of recognised layers from which on a model is called related. Measured: see docs/method.md
and data/results/identification.csv."""

_RESOLUTION = 1e-4
"""Differences of logarithms below it say nothing: stored values have five significant digits."""

Invariants = Mapping[str, Spectra]


@dataclass(frozen=True)
class Relation:
    """A model seen from another, layer by layer.

    layers, others: the numbers of their layers, (n,) and (m,). nearness: (n, m), see the function.
    difference: (n, m), root mean square difference of the logarithms of their values, over all
    kinds.
    """

    layers: np.ndarray
    others: np.ndarray
    nearness: np.ndarray
    difference: np.ndarray

    @property
    def partners(self) -> np.ndarray:
        """The layer of the other model that is nearest to each layer: (n,)."""
        return self.others[self.nearness.argmin(axis=1)]

    @property
    def recognised(self) -> np.ndarray:
        """Which layers are recognised: (n,) of bool."""
        return self.nearness.min(axis=1) <= RECOGNISED

    @property
    def share(self) -> float:
        """The share of the layers that are recognised."""
        return float(self.recognised.mean())

    @property
    def change(self) -> float:
        """Median difference of the recognised layers from their partners; nan where none is."""
        own = self.difference[np.arange(len(self.layers)), self.nearness.argmin(axis=1)]
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
            f"models with invariants of {_listed(a)} and {_listed(b)} share none: they have no kind "
            "of projection in common"
        )
    layers, others = (_layers([x[kind] for kind in kinds]) for x in (a, b))
    rows = {kind: _Kind(a[kind], b[kind], layers, others) for kind in kinds}
    first = _nearness([kind.differences(centred=True) for kind in rows.values()])
    found = [kind.differences(partners=first.argmin(axis=1)) for kind in rows.values()]
    with np.errstate(invalid="ignore"):
        squares = np.nanmean(np.square(found), axis=0)
    return Relation(layers, others, _nearness(found), np.sqrt(squares))


def _listed(kinds: Mapping) -> str:
    return ", ".join(kinds) or "no kind"


def _layers(spectra: list[Spectra]) -> np.ndarray:
    return np.unique(np.concatenate([s.layers for s in spectra]))


def _nearness(differences: list[np.ndarray]) -> np.ndarray:
    """Mean over kinds of the logarithms of differences, each over its median; inf where none is."""
    logs = [np.log(d / np.nanmedian(d)) for d in differences]
    there = np.isfinite(logs)
    total = np.where(there, logs, 0).sum(axis=0)
    number = there.sum(axis=0)
    return np.divide(total, number, out=np.full(total.shape, np.inf), where=number > 0)


class _Kind:
    """The invariants of one kind of two models, in logarithms."""

    def __init__(self, a: Spectra, b: Spectra, layers: np.ndarray, others: np.ndarray) -> None:
        length = min(a.values.shape[1], b.values.shape[1])
        self.x, self.y = (_logarithms(s.values[:, :length]) for s in (a, b))
        self.rows = np.searchsorted(layers, a.layers), np.searchsorted(others, b.layers)
        self.shape = len(layers), len(others)

    def differences(
        self, *, centred: bool = False, partners: np.ndarray | None = None
    ) -> np.ndarray:
        """Differences of layers, (n, m); nan where a layer lacks the kind.

        centred: of the shapes alone. partners: the layer of b that each of a is compared with for
        the factor of all layers.
        """
        x, y = self.x, self.y
        if centred:
            x, y = (z - z.mean(axis=1, keepdims=True) for z in (x, y))
        if partners is not None:
            x = x - self._factor(partners)
        d = np.sqrt(np.maximum(_squares(x, y), _RESOLUTION**2))
        nearest = _grouped(np.minimum, d, self.rows[1], self.shape[1], axis=1)
        number = np.bincount(self.rows[0], minlength=self.shape[0])[:, None]
        total = _grouped(np.add, nearest, self.rows[0], self.shape[0], axis=0)
        return np.where(np.isfinite(total), total / np.maximum(number, 1), np.nan)

    def _factor(self, partners: np.ndarray) -> float:
        """The logarithm of the factor of all layers: the median over the layers of a."""
        levels = []
        for values, rows, number in zip((self.x, self.y), self.rows, self.shape, strict=True):
            count = np.bincount(rows, minlength=number)
            total = np.bincount(rows, values.mean(axis=1), minlength=number)
            levels.append(np.where(count, total / np.maximum(count, 1), np.nan))
        steps = levels[0] - levels[1][partners]
        return float(np.nanmedian(steps)) if np.isfinite(steps).any() else 0.0


def _logarithms(values: np.ndarray) -> np.ndarray:
    """Logarithms; values of zero count as a billionth of the largest one."""
    return np.log(np.maximum(values, 1e-9 * values.max(initial=0) or 1.0))


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squared differences of rows: (n, m)."""
    return np.square(x[:, None] - y[None]).mean(axis=2)


def _grouped(
    ufunc: np.ufunc, table: np.ndarray, groups: np.ndarray, number: int, *, axis: int
) -> np.ndarray:
    """Rows (axis 0) or columns (axis 1) of one group joined; inf for a group that has none."""
    shape = list(table.shape)
    shape[axis] = number
    empty = np.full(number, True)
    empty[groups] = False
    out = np.full(shape, np.inf if ufunc is np.minimum else 0.0)
    index = (groups, slice(None)) if axis == 0 else (slice(None), groups)
    ufunc.at(out, index, table)
    out[(empty, slice(None)) if axis == 0 else (slice(None), empty)] = np.inf
    return out
