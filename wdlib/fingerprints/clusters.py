"""Groups of singular value vectors, and the Clustering Vector over them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from wdlib import TYPES, WdlibError
from wdlib.distances import msv

K = 7
"""Clusters of the clustering vector."""

STARTS = 1000
"""Starts of K-means. Fifty, a usual number, end in another optimum for every seed here."""


@dataclass(frozen=True)
class Clusters:
    """Groups of singular value vectors in canonical order, the flattest spectra first.

    centres: (k, r) float64, ordered by the share of the first entry in the centre's length (with
    unscaled vectors by the centre's norm). scaled: whether vectors are scaled to unit length.
    """

    centres: np.ndarray
    scaled: bool = True

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """The number, 0 to k - 1, of the cluster whose centre is nearest to each row of (n, r)."""
        return self._squares(vectors).argmin(axis=1)

    def margins(self, vectors: np.ndarray) -> np.ndarray:
        """How far each row of (n, r) is, as it is clustered, from the border of its cluster: (n,).

        A vector that moves by less stays in its cluster. In the unit of the clustered vectors.
        """
        squares = self._squares(vectors)
        own = squares.argmin(axis=1)
        apart = np.linalg.norm(self.centres[own][:, None] - self.centres, axis=2)
        gaps = squares - squares.min(axis=1, keepdims=True)
        return np.divide(gaps, 2 * apart, out=np.full_like(gaps, np.inf), where=apart > 0).min(1)

    def _squares(self, vectors: np.ndarray) -> np.ndarray:
        """Squared distances of (n, r) vectors, as they are clustered, to the centres: (n, k)."""
        rows = _scaled(vectors) if self.scaled else np.asarray(vectors, dtype=np.float64)
        return np.square(rows[:, None, :] - self.centres).sum(axis=2)


def cluster(
    values: Mapping[str, np.ndarray],
    *,
    k: int = K,
    scaled: bool = True,
    starts: int = STARTS,
    seed: int = 0,
) -> Clusters:
    """K-means over the singular value vectors of all matrices of one model, or of several.

    values: as in `Spectra.values`; the keys do not matter, so vectors of several models can be
    pooled under keys of any kind. starts: of K-means (k-means++), the best of which counts.

    Raises: WdlibError for fewer distinct vectors than clusters.
    Source: arXiv 2509.19122 (docs/method.md, section 9).
    Differs from the paper: it gives no order of the clusters; docs/method.md orders by the norm of
    the centre. For vectors of unit length that norm only says how tight a cluster is (it is above
    0.99 for every cluster of the models here), so the order is by shape: flat spectra first.
    """
    from sklearn.cluster import KMeans

    rows = np.concatenate([np.asarray(v, dtype=np.float64) for v in values.values()])
    rows = _scaled(rows) if scaled else rows
    distinct = len(np.unique(rows, axis=0))
    if not 1 <= k <= distinct:
        raise WdlibError(
            f"{distinct} distinct singular value vectors do not make {k} clusters: ask for a k "
            f"from 1 to {distinct}"
        )
    with threadpool_limits(1):
        found = KMeans(k, n_init=starts, random_state=seed).fit(rows)
    centres = np.stack([rows[found.labels_ == j].mean(axis=0) for j in range(k)])
    norms = np.linalg.norm(centres, axis=1)
    order = np.argsort(centres[:, 0] / norms if scaled else norms, kind="stable")
    return Clusters(centres[order], scaled)


def clustering_vector(
    values: Mapping[str, np.ndarray], clusters: Clusters
) -> dict[str, np.ndarray]:
    """The Clustering Vector: for each type, the share of its matrices in each cluster.

    Returns: a dictionary in the order of `TYPES` from type to float64 (k,), which sums to 1; seven
    types give the 7k numbers of the vector. A type that the model lacks is absent.
    Source: arXiv 2509.19122 (docs/method.md, section 9).
    """
    k = len(clusters.centres)
    return {
        t: np.bincount(clusters.assign(msv(values, t)), minlength=k) / len(values[t])
        for t in TYPES
        if t in values
    }


@dataclass(frozen=True)
class Choice:
    """One number of clusters, judged: mean silhouette (-1 to 1), and stability (adjusted Rand index
    of the clusters of random parts with those of all, mean and standard deviation; 1 is the same).
    """

    k: int
    silhouette: float
    stability: float
    spread: float


def choices(
    values: Mapping[str, np.ndarray],
    ks: Iterable[int],
    *,
    resamples: int = 15,
    part: float = 0.8,
    starts: int = 20,
    seed: int = 0,
) -> list[Choice]:
    """How many clusters? For each k, how well separated and how stable they are.

    For stability, K-means sees a random `part` of the vectors, and all vectors are then given to
    the centres found. Vectors are scaled to unit length.

    Raises: WdlibError as `cluster` does.
    """
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    rows = _scaled(np.concatenate(list(values.values())))
    rng, found = np.random.default_rng(seed), []
    for k in ks:
        labels = cluster({"all": rows}, k=k, starts=10 * starts, seed=seed).assign(rows)
        scores = []
        for _ in range(resamples):
            drawn = rng.choice(len(rows), int(part * len(rows)), replace=False)
            again = cluster({"part": rows[drawn]}, k=k, starts=starts, seed=seed)
            scores.append(adjusted_rand_score(labels, again.assign(rows)))
        apart = float(silhouette_score(rows, labels))
        found.append(Choice(k, apart, float(np.mean(scores)), float(np.std(scores))))
    return found


def matched(clusters: Clusters, to: Clusters) -> Clusters:
    """The same clusters, renumbered so that each is as near as possible to that number in `to`.

    An alternative to the canonical order for comparing two models; both need the same k and r.
    """
    from scipy.optimize import linear_sum_assignment

    distance = np.square(to.centres[:, None] - clusters.centres).sum(axis=2)
    return replace(clusters, centres=clusters.centres[linear_sum_assignment(distance)[1]])


def _scaled(vectors: np.ndarray) -> np.ndarray:
    rows = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise WdlibError(
            "a singular value vector is zero or not finite and has no direction: check the weights "
            "that it was computed from"
        )
    return rows / lengths
