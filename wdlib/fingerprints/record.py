"""What is kept of a model, and where."""

import json
import logging
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import WdlibError, __version__, paths
from wdlib.checkpoints import catalogue, files
from wdlib.checkpoints.plan import projection_parts
from wdlib.checkpoints.stream import Projection
from wdlib.fingerprints import gauge
from wdlib.fingerprints.clusters import STARTS, Clusters, K, cluster, clustering_vector
from wdlib.fingerprints.invariants import GROUPS, Collector, Spectra, of_layers
from wdlib.fingerprints.values import Moments, deviation_vector, moments, pooled
from wdlib.spectra import jobs, store

RANK = 16
"""Singular values that a fingerprint holds of each matrix, as in the papers."""

_log = logging.getLogger(__name__)

_LARGEST = 1e150
"""Larger means and sums of squares overflow where they are pooled."""

DIGITS = 7
"""Significant digits of the stored singular values, which are proven to 1e-5 or better."""

INVARIANT_DIGITS = 5
"""Significant digits of the stored invariants."""


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a model.

    model, family: names; family is empty where it is not known.
    moments[type]: of each matrix, in the order of the layers (and experts).
    singular_values[type]: (matrices, rank) float64, descending rows, in the unit of the weights.
    clusters: of all singular value vectors of the model.
    provenance: of the weights (source, sha256, ...) and of this record.
    invariants[kind]: what rewriting leaves, see the room; none in records of earlier versions.
    """

    model: str
    family: str
    moments: dict[str, tuple[Moments, ...]]
    singular_values: dict[str, np.ndarray]
    clusters: Clusters
    provenance: dict[str, str]
    invariants: dict[str, Spectra] = field(default_factory=dict)

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
        store.number_of_layers(self.model, self.singular_values)

        def half(start: int) -> Fingerprint:
            values = {t: v[start::2] for t, v in self.singular_values.items()}
            return replace(
                self,
                moments={t: m[start::2] for t, m in self.moments.items()},
                singular_values=values,
                clusters=cluster(values, k=self.k, scaled=self.clusters.scaled, starts=starts),
                invariants=of_layers(self.invariants, range(start, self.matrices, 2)),
            )

        return half(0), half(1)

    def to_json(self) -> str:
        """As text, to be read back by `load`; for readers it also holds both vectors."""
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
            "invariants": {
                kind: {"layers": found.layers.tolist(), "values": found.values.tolist()}
                for kind, found in self.invariants.items()
            },
        }
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"


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
    known = catalogue.catalogue_model(model)
    checkpoint = files.resolve(model)
    found = jobs.of(model, rank, progress=progress)
    parts: dict[str, list[Moments]] = {t: [] for t in found.values}
    unchanged = Collector()

    def on_matrix(projection: Projection) -> None:
        parts[projection.type].append(moments(projection.matrix))

    for layer in gauge.layers(checkpoint, on_matrix=on_matrix):
        unchanged.add(layer)
    values = {t: _rounded(v, DIGITS) for t, v in found.values.items()}
    about = {
        "source": checkpoint.source,
        "sha256": files.content_hash(checkpoint),
        "config sha256": files.config_hash(checkpoint),
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
        {
            kind: replace(spectra, values=_rounded(spectra.values, INVARIANT_DIGITS))
            for kind, spectra in unchanged.spectra().items()
        },
    )


def _rounded(values: np.ndarray, digits: int) -> np.ndarray:
    """To so many significant digits, as a file holds them."""
    return np.vectorize(lambda x: float(f"{x:.{digits}g}"), otypes=[float])(values)


def of(model: str | Path, *, rank: int = RANK, k: int = K) -> Fingerprint:
    """The fingerprint of a model: stored, if it is (shipped, or by `files.reading_key`), or new.

    A larger rank than is stored is taken from the stored spectra. Nothing is written.

    Raises: WdlibError as `compute` does.
    """
    check(model, rank=rank, k=k)
    if file := _shipped(model):
        known = load(file)
        if rank <= known.rank:
            return known.clustered(rank=rank, k=k)
        values = jobs.of(model, rank).values
        found = cluster(values, k=k)
        return known._remade(values, found, f"fingerprints.of(rank={rank}, k={k})")
    checkpoint = files.resolve(model)
    path = _own(checkpoint.name, files.reading_key(checkpoint))
    kept = load(path) if path.is_file() else None
    if kept and kept.invariants and rank <= kept.rank:
        return kept.clustered(rank=rank, k=k)
    return compute(model, rank=rank, k=k, family=kept.family if kept else None)


def check(model: str | Path, *, rank: int = RANK, k: int = K) -> None:
    """Raise WdlibError unless `of` can give this fingerprint; no weight is read.

    Only matrices with the same singular values can then still be too few for k clusters.
    """
    shipped = _shipped(model)
    if shipped and 1 <= rank <= jobs.available_rank(model):
        number = sum(len(v) for v in load(shipped).singular_values.values())
    else:
        checkpoint = files.resolve(model)
        jobs.check_rank(checkpoint, rank)
        number = len(projection_parts(checkpoint))
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

    One of the user's that cannot be read is named in a warning and left out.
    Raises: WdlibError, naming the file, where a shipped one cannot be read.
    """
    found = [load(path) for path in sorted((paths.RESULTS / "fingerprints").glob("*.json"))]
    for path in sorted((paths.CACHE / "fingerprints").glob("*.json")):
        try:
            found.append(load(path))
        except WdlibError as error:
            _log.warning("left out: %s", error)
    return found


def keep(fingerprint: Fingerprint) -> Path:
    """Store a fingerprint among the user's; returns the file that holds the model's.

    A shipped fingerprint is not stored again. A stored one keeps the larger rank, and a family that
    the new one lacks. The file's name has the beginning of `files.reading_key`, so that models of
    one name stay apart.

    Raises: WdlibError as `load` does.
    """
    sha256 = fingerprint.provenance["sha256"]
    shipped = paths.RESULTS / "fingerprints" / f"{fingerprint.model}.json"
    if shipped.is_file() and load(shipped).provenance["sha256"] == sha256:
        return shipped
    key = files.joined_key(sha256, fingerprint.provenance.get("config sha256", ""))
    path = _own(fingerprint.model, key)
    kept = load(path) if path.is_file() else fingerprint
    family = fingerprint.family or kept.family
    best = kept if kept.rank > fingerprint.rank else fingerprint
    unchanged = fingerprint.invariants or kept.invariants
    return save(replace(best, family=family, invariants=unchanged), path)


def save(fingerprint: Fingerprint, path: str | Path) -> Path:
    """Write a fingerprint as JSON, atomically; equal ones give equal bytes."""
    return paths.write_text(path, fingerprint.to_json())


def load(path: str | Path) -> Fingerprint:
    """Read what `save` wrote. Raises WdlibError, naming the file, where that fails."""
    what, remedy = "a fingerprint", "write it anew with `wdlib fingerprint`"
    content = paths.read_json(path, dict[str, Any], what=what, remedy=remedy)
    text = json.dumps({key.replace(" ", "_"): value for key, value in content.items()})
    what = f"{path} does not hold {what}"
    stored = paths.parse_json(text, _Stored, what=what, remedy=remedy, others="ignore")
    try:
        return stored.fingerprint()
    except ValueError as error:
        raise WdlibError(f"{what} ({error}): {remedy}") from error


@dataclass(frozen=True)
class _Rows:
    """Invariants of one kind in a file."""

    layers: list[int]
    values: list[list[float]]

    def spectra(self) -> Spectra:
        """Raises ValueError for what is not made of numbers of layers and spectra."""
        layers, values = np.array(self.layers), np.array(self.values, dtype=np.float64)
        store.check_values({"invariants": values})
        if len(layers) != len(values) or layers.min() < 0 or (np.diff(layers) < 0).any():
            raise ValueError("the layers of the invariants are not theirs")
        return Spectra(layers, values)


@dataclass(frozen=True)
class _Stored:
    """What is read of `Fingerprint.to_json`; moments have the fields of `Moments`."""

    model: str
    family: str
    moments: dict[str, tuple[tuple[int, float, float], ...]]
    singular_values: dict[str, list[list[float]]]
    centres: list[list[float]]
    scaled: bool
    provenance: dict[str, str]
    invariants: dict[str, _Rows] = field(default_factory=dict)

    def fingerprint(self) -> Fingerprint:
        """Raises ValueError where the parts do not fit each other."""
        moments = {t: tuple(Moments(*m) for m in rows) for t, rows in self.moments.items()}
        values = {t: np.array(v, dtype=np.float64) for t, v in self.singular_values.items()}
        centres = np.array(self.centres, dtype=np.float64)
        store.check_values(values)
        if not self.invariants.keys() <= GROUPS.keys():
            raise ValueError("the invariants are of kinds that are not known")
        if {t: len(m) for t, m in moments.items()} != {t: len(v) for t, v in values.items()}:
            raise ValueError("moments and singular values are not of the same matrices")
        every = [m for of_type in moments.values() for m in of_type]
        if any(not (1 <= m.n < 2**63 and m.squares >= 0 and abs(m.mean) < _LARGEST) for m in every):
            raise ValueError("the moments are those of no values")
        if not all(m.squares < _LARGEST for m in every):
            raise ValueError("the values are larger than any weights")
        rank = next(iter(values.values())).shape[1]
        if centres.shape[1:] != (rank,) or not np.isfinite(centres).all():
            raise ValueError("the centres of the clusters are none of its vectors")
        return Fingerprint(
            self.model,
            self.family,
            moments,
            values,
            Clusters(centres, self.scaled),
            self.provenance,
            {kind: rows.spectra() for kind, rows in self.invariants.items()},
        )


def _shipped(model: str | Path) -> Path | None:
    """The file with the fingerprint of a catalogue model, where there is one."""
    path = paths.RESULTS / "fingerprints" / f"{model}.json"
    return path if catalogue.catalogue_model(model) and path.is_file() else None


def _own(model: str, key: str) -> Path:
    return paths.CACHE / "fingerprints" / f"{model}-{key[:16]}.json"
