"""Fingerprints of models: standard-deviation vector, clustering vector, and who a model is.

A fingerprint (arXiv 2509.19122; docs/method.md, section 9) is one small record per model: moments
and largest singular values of every matrix, and the two vectors that follow from them. Three
distances compare records, for any numbers of layers and over the types that both models have:

`deviation_distance`, `cluster_distance`
    Between the two vectors of the paper: how alike two models are.
`spectral_difference`
    Matrix by matrix, how far the singular values of one model are from the nearest ones of another.
    It alone tells a copy (renamed, quantised, fine-tuned) from any other model: `identify`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import reduce
from itertools import permutations as _orders
from operator import add
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from wdlib import TYPES, WdlibError, __version__, models, paths, spectra, weights
from wdlib.distances import msv

RANK = 16
"""Singular values that a fingerprint holds of each matrix, as in the papers."""

K = 7
"""Clusters of the clustering vector."""

STARTS = 1000
"""Starts of K-means. Fifty, a usual number, end in another optimum for every seed here."""

NORMALISATIONS = ("l2", "sum", "max")

COPY_THRESHOLD = 0.04
"""Spectral difference up to which a model is called a copy. Measured: 0.004 or less for copies in 8
or 4 bits and with adapters, 0.03 with an update of rank 1 and a tenth of the weights' norm; 0.07 or
more for null models, 0.09 for other models (data/results/identification.csv)."""

DIGITS = 7
"""Significant digits of the stored singular values, which are proven to 1e-5 or better."""

BLOCK = 2**20
"""Values per block of the standard deviation: a float64 copy of one block is in memory."""

FINE_BINS, COARSE = 8000, 40
"""Bins of the value histograms, over +-20 standard deviations; so many make one of a density."""

EXACT_PERMUTATIONS = 8
"""Up to so many models a permutation test takes all orders; beyond, a sample of them."""


# Standard deviations --------------------------------------------------------------------------


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
    total = None
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK].astype(np.float64)
        mean = block.mean()
        block -= mean
        part = Moments(block.size, float(mean), float(block @ block))
        total = part if total is None else total + part
    return total


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


def quantiles(values: weights.ValueDistribution, probabilities: Iterable[float]) -> np.ndarray:
    """Quantiles of a value distribution, in units of its standard deviation, from its histogram.

    Linear within a bin; values beyond the histogram count as lying at its edges.

    Returns: float64, one per probability.
    """
    width = values.centres[1] - values.centres[0]
    edges = np.append(values.centres - width / 2, values.centres[-1] + width / 2)
    inside = np.concatenate([[0.0], np.cumsum(values.density) * width])
    return np.interp(list(probabilities), inside + (1 - inside[-1]) / 2, edges)


def tail_ratio(values: weights.ValueDistribution, *, tail: float = 1e-4) -> float:
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
    Raises: WdlibError as `weights.value_distributions` does.
    Source: arXiv 2509.19122, figures 1 and 2.
    """
    densities, shapes = [], []
    for kind, v in weights.value_distributions(model, bins=FINE_BINS).items():
        case = {"model": str(model), "type": kind}
        tail = {"excess kurtosis": v.excess_kurtosis, "tail ratio": tail_ratio(v)}
        shapes.append(case | {"n": v.n} | tail)
        centres = v.centres.reshape(-1, COARSE).mean(axis=1)
        density = v.density.reshape(-1, COARSE).mean(axis=1)
        for x, y in zip(centres[density > 0], density[density > 0], strict=True):
            densities.append(case | {"value": float(x), "density": float(y)})
    return densities, shapes


# Clusters -------------------------------------------------------------------------------------


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


# Fingerprints ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a model.

    model, family: names; family is empty where it is not known.
    moments[type]: of each matrix, in the order of the layers (and experts).
    singular_values[type]: (matrices, rank) float64, descending rows, in the unit of the weights.
    clusters: of all singular value vectors of the model.
    provenance: of the weights (source, sha256, ...) and of this record.
    """

    model: str
    family: str
    moments: dict[str, tuple[Moments, ...]]
    singular_values: dict[str, np.ndarray]
    clusters: Clusters
    provenance: dict[str, str]

    @property
    def types(self) -> tuple[str, ...]:
        """The projection types that the model has."""
        return tuple(self.moments)

    @property
    def matrices(self) -> int:
        """How many of a type at most: the number of layers, where there are no experts."""
        return max(len(m) for m in self.moments.values())

    @property
    def rank(self) -> int:
        return next(iter(self.singular_values.values())).shape[1]

    @property
    def k(self) -> int:
        return len(self.clusters.centres)

    @property
    def deviations(self) -> dict[str, float]:
        """Standard deviation of all values of each type, in the unit of the weights."""
        return {t: pooled(parts).deviation for t, parts in self.moments.items()}

    def deviation_vector(self, *, normalise: str = "l2") -> dict[str, float]:
        """The Standard-Deviation Vector, as the function of this name."""
        return deviation_vector(self.deviations, normalise=normalise)

    def clustering_vector(self, clusters: Clusters | None = None) -> dict[str, np.ndarray]:
        """The Clustering Vector, over the model's own clusters or over given ones."""
        return clustering_vector(self.singular_values, clusters or self.clusters)

    def clustered(self, *, rank: int | None = None, k: int | None = None) -> "Fingerprint":
        """The same record with fewer singular values, or another number of clusters.

        Raises: WdlibError for a rank that is not there, and as `cluster` does.
        """
        rank, k = rank or self.rank, k or self.k
        if (rank, k) == (self.rank, self.k):
            return self
        if not 1 <= rank <= self.rank:
            raise WdlibError(
                f"the fingerprint of {self.model} holds ranks 1 to {self.rank}, not {rank}: "
                f"compute another with `wdlib fingerprint {self.model} --rank {rank}`"
            )
        values = {t: v[:, :rank] for t, v in self.singular_values.items()}
        found = cluster(values, k=k, scaled=self.clusters.scaled)
        return self._remade(values, found, f"Fingerprint.clustered(rank={rank}, k={k})")

    def _remade(self, values: dict[str, np.ndarray], clusters: Clusters, by: str) -> "Fingerprint":
        """The same model with other singular values and clusters, made by a function."""
        about = self.provenance | {"made by": f"wdlib {__version__} {by}"}
        return replace(self, singular_values=values, clusters=clusters, provenance=about)

    def halves(self, *, starts: int = STARTS) -> tuple["Fingerprint", "Fingerprint"]:
        """Two fingerprints of disjoint weights: the layers of even and of odd number.

        Each half is clustered on its own, with so many starts. Raises WdlibError as `cluster` does,
        and for mixtures of experts, whose matrices are not one per layer.
        """
        spectra.number_of_layers(self.model, self.singular_values)

        def half(start: int) -> Fingerprint:
            values = {t: v[start::2] for t, v in self.singular_values.items()}
            return replace(
                self,
                moments={t: m[start::2] for t, m in self.moments.items()},
                singular_values=values,
                clusters=cluster(values, k=self.k, scaled=self.clusters.scaled, starts=starts),
            )

        return half(0), half(1)

    def to_json(self) -> str:
        """As text, to be read back by `from_json`; for readers it also holds both vectors."""
        numbers = {t: len(parts) for t, parts in self.moments.items()}
        mixture = len(set(numbers.values())) > 1
        content = {
            "model": self.model,
            "family": self.family,
            **({"matrices": numbers} if mixture else {"layers": self.matrices}),
            "rank": self.rank,
            "k": self.k,
            "provenance": self.provenance,
            "standard deviations": self.deviations,
            "standard-deviation vector": self.deviation_vector(),
            "clustering vector": {t: v.tolist() for t, v in self.clustering_vector().items()},
            "scaled": self.clusters.scaled,
            "centres": self.clusters.centres.tolist(),
            "moments": {t: [astuple(m) for m in parts] for t, parts in self.moments.items()},
            "singular values": {t: v.tolist() for t, v in self.singular_values.items()},
        }
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Read what `to_json` wrote. Raises WdlibError for anything else."""
        try:
            content = json.loads(text)
            return cls(
                content["model"],
                content["family"],
                {t: tuple(Moments(*m) for m in rows) for t, rows in content["moments"].items()},
                {t: np.array(v, dtype=np.float64) for t, v in content["singular values"].items()},
                Clusters(np.array(content["centres"], dtype=np.float64), content["scaled"]),
                content["provenance"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WdlibError(
                f"this text is no fingerprint ({error!r}): write it anew with `wdlib fingerprint`"
            ) from error


def compute(
    model: str | Path,
    *,
    rank: int = RANK,
    k: int = K,
    family: str | None = None,
    progress: bool = False,
) -> Fingerprint:
    """The fingerprint of a model, from its weights, and its spectra where they are stored.

    family: that of the catalogue by default. progress: show a bar while spectra are computed.

    Raises: WdlibError before any work for unreadable weights or a rank that a matrix lacks.
    """
    known = models.known(model)
    checkpoint = models.resolve(model)
    found = spectra.of(model, rank, progress=progress)
    parts: dict[str, list[Moments]] = {t: [] for t in found.values}
    for p in weights.projections(checkpoint):
        parts[p.type].append(moments(p.matrix))
    digits = np.vectorize(lambda x: float(f"{x:.{DIGITS}g}"), otypes=[float])
    values = {t: digits(v) for t, v in found.values.items()}
    about = {
        "source": checkpoint.source,
        "sha256": models.content_hash(checkpoint),
        "quantisation": found.provenance.get("quantisation", ""),
        "note": checkpoint.note,
        "made by": f"wdlib {__version__} fingerprints.compute(rank={rank}, k={k})",
    }
    return Fingerprint(
        checkpoint.name,
        family if family is not None else (known.family if known else ""),
        {t: tuple(m) for t, m in parts.items()},
        values,
        cluster(values, k=k),
        {key: text for key, text in about.items() if text},
    )


def of(model: str | Path, *, rank: int = RANK, k: int = K) -> Fingerprint:
    """The fingerprint of a model: stored, if it is (shipped, or by its weights' sha256), or new.

    A larger rank than is stored is taken from the stored spectra. Nothing is written.

    Raises: WdlibError as `compute` does.
    """
    check(model, rank=rank, k=k)
    if shipped := _shipped(model):
        kept = load(shipped)
        if rank > kept.rank:
            values = spectra.of(model, rank).values
            found = cluster(values, k=k)
            return kept._remade(values, found, f"fingerprints.of(rank={rank}, k={k})")
        return kept.clustered(rank=rank, k=k)
    checkpoint = models.resolve(model)
    path = _own(checkpoint.name, models.content_hash(checkpoint))
    kept = load(path) if path.is_file() else None
    if kept and rank <= kept.rank:
        return kept.clustered(rank=rank, k=k)
    return compute(model, rank=rank, k=k, family=kept.family if kept else None)


def check(model: str | Path, *, rank: int = RANK, k: int = K) -> None:
    """Raise WdlibError unless `of` can give this fingerprint; no weight is read.

    Only matrices with the same singular values can then still be too few for k clusters.
    """
    shipped = _shipped(model)
    if shipped and 1 <= rank <= spectra.available_rank(model):
        number = sum(len(v) for v in load(shipped).singular_values.values())
    else:
        checkpoint = models.resolve(model)
        spectra.check_rank(checkpoint, rank)
        number = len(weights.inventory(checkpoint))
    if not 1 <= k <= number:
        raise WdlibError(
            f"the {number} matrices of {model} do not make {k} clusters: ask for 1 to {number} "
            "(`--clusters` of `wdlib fingerprint`)"
        )


def shipped() -> list[str]:
    """The models whose fingerprints the project ships, in the order of the names."""
    return sorted(path.stem for path in (paths.RESULTS / "fingerprints").glob("*.json"))


def library() -> list[Fingerprint]:
    """All stored fingerprints: the shipped ones, then the user's, each in the order of the names.

    Raises: WdlibError, naming the file, where one cannot be read.
    """
    folders = (paths.RESULTS / "fingerprints", paths.CACHE / "fingerprints")
    return [load(path) for folder in folders for path in sorted(folder.glob("*.json"))]


def keep(fingerprint: Fingerprint) -> Path:
    """Store a fingerprint among the user's; returns the file that holds the model's.

    Not stored is what is shipped. What is stored already keeps its larger rank, and a family that
    the new one has not. The file's name has the beginning of the weights' sha256, so that models of
    one name stay apart.

    Raises: WdlibError as `load` does.
    """
    sha256 = fingerprint.provenance["sha256"]
    shipped = paths.RESULTS / "fingerprints" / f"{fingerprint.model}.json"
    if shipped.is_file() and load(shipped).provenance["sha256"] == sha256:
        return shipped
    path = _own(fingerprint.model, sha256)
    kept = load(path) if path.is_file() else fingerprint
    family = fingerprint.family or kept.family
    best = kept if kept.rank > fingerprint.rank else fingerprint
    return save(replace(best, family=family), path)


def save(fingerprint: Fingerprint, path: str | Path) -> Path:
    """Write a fingerprint as JSON, atomically; equal ones give equal bytes."""
    path = Path(path)
    with paths.whole(path) as part:
        part.write_text(fingerprint.to_json(), encoding="utf-8")
    return path


def load(path: str | Path) -> Fingerprint:
    """Read what `save` wrote. Raises WdlibError, naming the file, where that fails."""
    path = Path(path)
    try:
        return Fingerprint.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, WdlibError) as error:
        raise WdlibError(f"{path} does not hold a fingerprint: {error}") from error


def _shipped(model: str | Path) -> Path | None:
    """The file with the fingerprint of a catalogue model, where there is one."""
    path = paths.RESULTS / "fingerprints" / f"{model}.json"
    return path if models.known(model) and path.is_file() else None


def _own(model: str, sha256: str) -> Path:
    return paths.CACHE / "fingerprints" / f"{model}-{sha256[:16]}.json"


# Distances ------------------------------------------------------------------------------------


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


# What training moves --------------------------------------------------------------------------

SDV, CV, REFITTED, SPECTRA = READINGS = (
    "standard deviations",
    "clusters of the base",
    "clusters refitted",
    "spectra themselves",
)
"""Ways to say how far two models of one shape are apart, see `movements`."""


def movements(base: Fingerprint, others: Sequence[Fingerprint]) -> dict[str, np.ndarray]:
    """Distances among a model and what was made of it by training, by each of READINGS.

    SDV: `deviation_distance`. CV: `cluster_distance`, every matrix assigned to the clusters of the
    base, so that nothing but the weights can move it. REFITTED: `matched_distance`, K-means anew
    for each model. SPECTRA: `spectral_difference`, which needs no clusters.

    Returns: for each, (1 + n, 1 + n), the base first.
    """
    every = [base, *others]
    vectors = [f.clustering_vector(base.clusters) for f in every]
    return {
        SDV: distance_table([f.deviations for f in every], deviation_distance),
        CV: distance_table(vectors, cluster_distance),
        REFITTED: distance_table(every, matched_distance),
        SPECTRA: distance_table([f.singular_values for f in every], spectral_difference),
    }


def changed(base: Fingerprint, other: Fingerprint) -> dict[str, np.ndarray]:
    """Which matrices of a model lie in another cluster of the base than the base's own: by type."""
    assign, values = base.clusters.assign, other.singular_values
    return {t: assign(values[t]) != assign(v) for t, v in base.singular_values.items()}


@dataclass(frozen=True)
class Ratio:
    """A ratio of mean distances with its jackknife interval over seeds; nan where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """What training moves, against what a seed moves (runs of the same data and another seed).

    moved: distance from before to after training, over the distance between two seeds.
    data: distance between runs of other data and other seeds, over the distance between two seeds:
    1 where the data do not matter.
    p: share of the ways to exchange the data sets within each seed whose seeds agree at least as
    well. smallest: the p that the best result could reach with these runs.
    seeds, data_sets: how many are compared, those of which there is every combination.
    """

    moved: Ratio
    data: Ratio
    p: float
    smallest: float
    seeds: int
    data_sets: int


def effect(
    distances: np.ndarray,
    data: Sequence[str],
    seeds: Sequence[int],
    *,
    level: float = 0.95,
    permutations: int = 9999,
) -> Effect:
    """Does a fingerprint move with the data? One table of distances against runs and seeds.

    The interval is Student's t on the jackknife over seeds of the logarithm, and takes three seeds.
    In simulations of 3 and 5 seeds, 3 data sets and 7 normal coordinates it holds the ratio in 95
    to 99 % of the cases. The permutation is exact within seeds, which share their start and the
    order of their examples; beyond `permutations` ways, so many are drawn.

    distances: (1 + n, 1 + n), the model before training first, as in `movements`. data, seeds: of
    the n runs; seeds that a data set lacks are left out.
    Raises: WdlibError for less than two data sets with two seeds in common.
    """
    from scipy.stats import t as student

    place = {pair: i for i, pair in enumerate(zip(data, seeds, strict=True), start=1)}
    kinds = list(dict.fromkeys(data))
    common = [s for s in dict.fromkeys(seeds) if all((kind, s) in place for kind in kinds)]
    if len(kinds) < 2 or len(common) < 2:
        raise WdlibError(
            f"{len(kinds)} data sets with {len(common)} seeds in common cannot tell data from "
            "seed: train two data sets with two equal seeds at least"
        )
    runs = np.array([[place[kind, s] for kind in kinds] for s in common])
    table = np.asarray(distances, dtype=np.float64)

    def ratios(runs: np.ndarray) -> np.ndarray:
        same, other = _across_seeds(table, runs)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.array([table[0, runs].mean(), other]) / same

    found, number = ratios(runs), len(runs)
    low, high = np.full((2, 2), np.nan)
    without = [ratios(np.delete(runs, i, axis=0)) for i in range(number)] if number > 2 else [[0]]
    if np.isfinite(without).all() and np.min(without) > 0:
        error = np.log(without).std(axis=0) * np.sqrt(number - 1)
        half = student.isf((1 - level) / 2, number - 1) * error
        low, high = found * np.exp(-half), found * np.exp(half)
    within = [_across_seeds(table, r)[0] for r in _exchanged(runs, permutations)]
    agree = np.isclose(within, within[0], rtol=1e-9, atol=0) | (np.array(within) < within[0])
    best = np.isclose(within, min(within), rtol=1e-9, atol=0)
    moved, of_data = (Ratio(*map(float, row)) for row in zip(found, low, high, strict=True))
    p, smallest = float(agree.mean()), float(best.mean())
    return Effect(moved, of_data, p, smallest, number, len(kinds))


def _across_seeds(table: np.ndarray, runs: np.ndarray) -> tuple[float, float]:
    """Mean distance between runs (seeds, data sets) of other seeds: of the same, of other data."""
    seeds, kinds = runs.shape
    block = table[runs[:, :, None, None], runs]
    other_seed = ~np.eye(seeds, dtype=bool)[:, None, :, None]
    same_data = np.eye(kinds, dtype=bool)[None, :, None, :]
    same, other = (block[other_seed & mask] for mask in (same_data, ~same_data))
    return float(same.mean()), float(other.mean())


def _exchanged(runs: np.ndarray, most: int) -> Iterable[np.ndarray]:
    """The runs with the data sets exchanged within each seed but the first, as they are first."""
    seeds, kinds = runs.shape
    orders = np.array(list(_orders(range(kinds))))
    ways = len(orders) ** (seeds - 1)
    rng = np.random.default_rng(0)
    for way in range(ways) if ways <= most else [0, *rng.integers(ways, size=most)]:
        chosen = [0, *(way // len(orders) ** i % len(orders) for i in range(seeds - 1))]
        yield np.take_along_axis(runs, orders[chosen], axis=1)


# Who is it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbour:
    """A stored model seen from another, by the three distances; `cluster` is the matched one."""

    model: str
    family: str
    spectral: float
    deviation: float
    cluster: float

    @property
    def is_copy(self) -> bool:
        return self.spectral <= COPY_THRESHOLD


def identify(fingerprint: Fingerprint, known: Iterable[Fingerprint]) -> list[Neighbour]:
    """The known models by their spectral difference from a model, the nearest first.

    One within `COPY_THRESHOLD` is the model itself in another guise: stored in other bits, merged
    with an adapter, renamed. Beyond it the order says little, and nothing is claimed. The record of
    the very same name and weights is left out; so are models that share too few types.
    """
    found = []
    for other in known:
        itself = fingerprint.provenance.get("sha256"), fingerprint.model
        if (other.provenance.get("sha256"), other.model) == itself:
            continue
        if len(set(fingerprint.types) & set(other.types)) < 2:
            continue
        rank, k = min(fingerprint.rank, other.rank), min(fingerprint.k, other.k)
        one, two = (f.clustered(rank=rank, k=k) for f in (fingerprint, other))
        found.append(
            Neighbour(
                other.model,
                other.family,
                spectral_difference(one.singular_values, two.singular_values),
                deviation_distance(one.deviations, two.deviations),
                matched_distance(one, two),
            )
        )
    return sorted(found, key=lambda n: n.spectral)


def report(fingerprint: Fingerprint, seen: Sequence[Neighbour]) -> str:
    """Both vectors as a table, and what `identify` found, as lines of text."""
    f, types = fingerprint, fingerprint.types
    rows = [("", *types)]
    rows.append(("standard deviation", *(f"{f.deviations[t]:.3g}" for t in types)))
    rows.append(("normalised", *(f"{v:.3f}" for v in f.deviation_vector().values())))
    shares = np.stack(list(f.clustering_vector().values()), axis=1)
    for number, row in enumerate(shares):
        rows.append((f"share in cluster {number}", *(f"{v:.2f}" for v in row)))
    family = f.family or "family not known"
    fewest = min(len(parts) for parts in f.moments.values())
    number = f"{fewest} to {f.matrices}" if fewest < f.matrices else f.matrices
    lines = [f"{f.model}: {family}, {number} matrices of each type, rank {f.rank}"]
    lines += ["".join([row[0].ljust(20), *(text.rjust(8) for text in row[1:])]) for row in rows]
    if not seen:
        return "\n".join([*lines, "no other fingerprint is stored to compare it with"])
    width = max(len(n.model) for n in seen) + 14
    lines.append(" " * width + "".join(word.rjust(9) for word in ("spectra", "SDV", "clusters")))
    for n in seen:
        distances = (n.spectral, n.deviation, n.cluster)
        lines.append(
            f"distance from {n.model.ljust(width - 14)}" + "".join(f"{d:9.4f}" for d in distances)
        )
    first, *rest = seen
    following = f", next {rest[0].model} {rest[0].spectral:.4f}" if rest else ""
    lines.append(f"closest: {first.model} (distance {first.spectral:.4f}{following})")
    verdict = f"no stored model is close: copies are within {COPY_THRESHOLD}"
    if first.is_copy:
        verdict = (
            f"a copy of {first.model}, or made from it: the distance is within {COPY_THRESHOLD}"
        )
    return "\n".join([*lines, verdict])


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
