"""Distances between the vectors of fingerprints, and how well they find a model's family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations as _orders

import numpy as np

from wdlib import WdlibError
from wdlib.fingerprints.clusters import cluster, matched
from wdlib.fingerprints.record import Fingerprint
from wdlib.fingerprints.values import deviation_vector

EXACT_PERMUTATIONS = 8
"""Up to so many models a permutation test takes all orders; beyond, a sample of them."""


def deviation_distance(
    a: Mapping[str, float], b: Mapping[str, float], *, normalise: str = "l2"
) -> float:
    """Euclidean distance of two standard-deviation vectors over their shared types.

    a, b: standard deviations by type, in any unit: both are cut to the shared types and normalised
    again. normalise: as in `deviation_vector`.

    Raises: WdlibError for fewer than two shared types, where any two vectors are the same.
    """
    shared = _shared(a, b, least=2)
    x, y = (deviation_vector({t: v[t] for t in shared}, normalise=normalise) for v in (a, b))
    return float(np.linalg.norm(np.subtract(list(x.values()), list(y.values()))))


def cluster_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Total variation distance of two clustering vectors, averaged over their shared types.

    The share of matrices that would have to change their cluster: from 0 to 1.

    Raises: WdlibError where no type is shared, or for other numbers of clusters.
    """
    shared = _shared(a, b, least=1)
    if len(a[shared[0]]) != len(b[shared[0]]):
        raise WdlibError(
            f"clustering vectors over {len(a[shared[0]])} and {len(b[shared[0]])} clusters cannot "
            "be compared: compute both with one k"
        )
    return float(np.mean([np.abs(np.subtract(a[t], b[t])).sum() / 2 for t in shared]))


def matched_distance(a: Fingerprint, b: Fingerprint) -> float:
    """`cluster_distance`, the clusters of b renumbered to match those of a (`matched`).

    The clusters of two models are not the same clusters: that both are the third flattest of seven
    does not make them alike. Where the vectors of two halves of one model have to find each other,
    the canonical order does worse (notebook 10).
    """
    other = b.clustering_vector(matched(b.clusters, a.clusters))
    return cluster_distance(a.clustering_vector(), other)


def pooled_vectors(fingerprints: Sequence[Fingerprint]) -> list[dict[str, np.ndarray]]:
    """The clustering vectors of several models over one set of clusters, that of all their vectors.

    Comparable without any order; but they change with the models that are in.

    Raises: WdlibError as `cluster` does.
    """
    everything = {
        f"{i} {t}": v for i, f in enumerate(fingerprints) for t, v in f.singular_values.items()
    }
    clusters = cluster(everything, k=fingerprints[0].k)
    return [f.clustering_vector(clusters) for f in fingerprints]


def spectral_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """How far the singular values of model `a` are from those of model `b`: 0 for a copy, up to 1.

    For each matrix of a, |s - s'| / max(|s|, |s'|) with the nearest vector s' of the same type in
    b; the median over all matrices of shared types. So layers may be missing, repeated or in
    another order. A copy whose matrices were rescaled (factors moved into norms) is not recognised.

    a, b: as `Spectra.values`, at any ranks: the smaller counts.
    Raises: WdlibError where no type is shared.
    """
    nearest = []
    for t in _shared(a, b, least=1):
        rank = min(a[t].shape[1], b[t].shape[1])
        x, y = a[t][:, None, :rank], b[t][None, :, :rank]
        largest = np.maximum(np.linalg.norm(x, axis=2), np.linalg.norm(y, axis=2))
        nearest.append((np.linalg.norm(x - y, axis=2) / largest).min(axis=1))
    return float(np.median(np.concatenate(nearest)))


def _shared(a: Mapping, b: Mapping, *, least: int) -> list[str]:
    shared = [t for t in a if t in b]
    if len(shared) < least:
        raise WdlibError(
            f"models with the types {', '.join(a)} and {', '.join(b)} share {len(shared)} types, "
            f"and comparing them takes {least}"
        )
    return shared


def distance_table(items: Sequence, distance: Callable) -> np.ndarray:
    """All distances between items, from the row to the column: (n, n) float64."""
    return np.array([[distance(a, b) for b in items] for a in items])


def comparisons(fingerprints: Sequence[Fingerprint]) -> dict[str, np.ndarray]:
    """Distances between clustering vectors, (n, n), by the three ways to number the clusters.

    "canonical", from flat to steep; "matched", pair by pair; "pooled", one set for all models.
    """
    vectors, pooled = [f.clustering_vector() for f in fingerprints], pooled_vectors(fingerprints)
    return {
        "canonical": distance_table(vectors, cluster_distance),
        "matched": distance_table(fingerprints, matched_distance),
        "pooled": distance_table(pooled, cluster_distance),
    }


@dataclass(frozen=True)
class Recovery:
    """Leave-one-out nearest neighbours against families, with a permutation test.

    hits: models whose nearest neighbour is of their family, out of `tried`, those that have one.
    expected: hits that chance gives. p: share of the permutations of the families over the models
    with at least as many hits. smallest: the p that the best result could reach with these models.
    """

    hits: int
    tried: int
    expected: float
    p: float
    smallest: float


def recovery(
    distances: np.ndarray, families: Sequence[str], *, permutations: int = 9999, seed: int = 0
) -> Recovery:
    """How often the nearest neighbour of a model is of its own family.

    All orders of the families are taken for up to `EXACT_PERMUTATIONS` models; for more,
    `permutations` random ones, and the given one counts among them.

    distances: (n, n), row to column, the diagonal ignored. families: n names.
    Raises: WdlibError where no family has two members: then nothing can be recovered.
    """
    names = np.array(families)
    if len(set(families)) == len(families):
        raise WdlibError(
            f"the {len(families)} models are of as many families: recovery needs a family of two"
        )
    table = np.array(distances, dtype=np.float64)
    np.fill_diagonal(table, np.inf)
    nearest = table.argmin(axis=1)
    hits = int((names[nearest] == names).sum())
    if len(names) <= EXACT_PERMUTATIONS:
        orders = np.array(list(_orders(range(len(names)))))
    else:
        rng = np.random.default_rng(seed)
        drawn = rng.permuted(np.tile(np.arange(len(names)), (permutations, 1)), axis=1)
        orders = np.concatenate([np.arange(len(names))[None], drawn])
    by_chance = (names[orders][:, nearest] == names[orders]).sum(axis=1)
    counts = [np.count_nonzero(names == name) for name in names]
    return Recovery(
        hits,
        int(sum(n > 1 for n in counts)),
        float(by_chance.mean()),
        float(np.mean(by_chance >= hits)),
        float(np.mean(by_chance == by_chance.max())),
    )
