"""From distances to classes, and from classes to referenced weights and their members.

The class of a set of distances (docs/method.md, section 4; arXiv 2509.00046 judges it by eye) is
given by one rule, `classify`, for every model, rank and pair of types:

1. The support is every distance from the SUPPORT_QUANTILE of the set on. On it two laws are fitted
   by maximum likelihood: the Pareto law that starts there, and the normal law of the whole set,
   truncated to the support. The exponential law that starts there marks the border between tails.
2. Whole vectors are drawn again with replacement, as in `fits.vector_bootstrap`, and all of it
   repeated. `power-law`: the Pareto law is more likely than the normal law in at least
   POWER_LAW_CONFIDENCE of the resamples. `normal`: the normal law is more likely than both others
   in at least NORMAL_CONFIDENCE of them. Otherwise `undecided`.

The three constants were chosen on planted sets, not on models: distances between generated
vectors, 10 x 10 to 32 x 32 of them. The aim was that at most 5 % of normal and of exponential sets
are called power-law, and at most 5 % of power laws with exponents from 1.8 to 3.5 are called
normal. workflow/scripts/confusion.py measures it on other seeds.

What the labels do not mean: `power-law` is a statement against the normal law, about the bulk of
the distances. It does not say that no other heavy-tailed law fits better: a wide lognormal law is
called power-law too (`fits.alternatives` compares them). `undecided` says that the vectors are too
few, or that the class hangs on one or two of them, or that the law is neither.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from scipy.special import log_ndtr

from wdlib import TYPES, WdlibError, __version__, paths
from wdlib.distances import cosine_distances, msv
from wdlib.fits.estimators import power_law
from wdlib.fits.resampling import table_distances, vector_bootstrap
from wdlib.spectra.store import Spectra, number_of_layers

SUPPORT_QUANTILE = 0.1
"""The support begins here: a power law has no left flank, but noise may give its sets one."""

POWER_LAW_CONFIDENCE = 0.8
"""Share of resamples in which the Pareto law must beat the normal law."""

NORMAL_CONFIDENCE = 0.98
"""Share of resamples in which the normal law must beat the Pareto and the exponential law."""

REPLICATES = 200
"""Resamples of a class."""

POWER_LAW, NORMAL, UNDECIDED = LABELS = ("power-law", "normal", "undecided")


@dataclass(frozen=True)
class Verdict:
    """The class of a set of distances, and what it rests on.

    label: power-law, normal or undecided.
    evidence: mean log-likelihood of a distance in the support under the Pareto law, minus that
        under the normal law; in nats, positive for a power law. Of the set itself.
    power_law_share: resamples in which the Pareto law beats the normal law, from 0 to 1.
    normal_share: resamples in which the normal law beats the Pareto and the exponential law.
    start: where the support begins, no unit.
    n: positive distances.
    """

    label: str
    evidence: float
    power_law_share: float
    normal_share: float
    start: float
    n: int


def classify(
    table: np.ndarray,
    *,
    symmetric: bool,
    replicates: int = REPLICATES,
    seed: int | list[int] = 0,
) -> Verdict:
    """The class of the distances between vectors, by the rule at the top of this module.

    Distances of exactly 0 (identical vectors) are left out: no power law has them.

    Arguments: table, no unit: (n, n) within one set of vectors, of which the part above the
    diagonal counts, or with symmetric=False (n, m) between two sets.
    Raises: WdlibError for fewer than four distinct positive distances.
    """
    table = np.asarray(table, dtype=np.float64)
    distances = _positive(table, symmetric)
    if np.unique(distances).size < 4:
        raise WdlibError(
            f"a table of shape {table.shape} has {np.unique(distances).size} distinct positive "
            "distances: a class needs 4, so compare more vectors"
        )
    evidence, start, n = _seen(distances)
    favoured = vector_bootstrap(
        table,
        _favoured,
        replicates=replicates,
        rng=np.random.default_rng(seed),
        symmetric=symmetric,
    )
    power_law_share = float(np.mean(favoured == 1))
    normal_share = float(np.mean(favoured == -1))
    label = UNDECIDED
    if power_law_share >= POWER_LAW_CONFIDENCE:
        label = POWER_LAW
    elif normal_share >= NORMAL_CONFIDENCE:
        label = NORMAL
    return Verdict(label, evidence, power_law_share, normal_share, start, n)


def _positive(table: np.ndarray, symmetric: bool) -> np.ndarray:
    """The distances of a table that are not 0, each once."""
    distances = table_distances(table, symmetric)
    return distances[distances > 0]


def _seen(distances: np.ndarray) -> tuple[float, float, int]:
    """The part of a verdict that needs no resampling: evidence, start, n."""
    start, pareto, normal, _ = _likelihoods(distances)
    return float(pareto - normal), float(start), distances.size


def _favoured(distances: np.ndarray) -> int:
    """1 if Pareto beats normal, -1 if normal beats Pareto and exponential, 0 otherwise."""
    _, pareto, normal, exponential = _likelihoods(distances[distances > 0])
    if pareto > normal:
        return 1
    return -1 if normal > max(pareto, exponential) else 0


def _likelihoods(x: np.ndarray) -> tuple[float, float, float, float]:
    """Start of the support, and the mean log-likelihoods on it of Pareto, normal and exponential.

    All three likelihoods are 0 where the distances, or those in the support, are all the same.
    """
    if x.size == 0:
        return 0.0, 0.0, 0.0, 0.0
    first = int(SUPPORT_QUANTILE * x.size)
    start = np.partition(x, first)[first]
    tail = x[x >= start]
    inverse_shape = np.log(tail / start).mean()
    scale = tail.mean() - start
    mean, deviation = x.mean(), x.std()
    if min(inverse_shape, scale, deviation) <= 0:
        return start, 0.0, 0.0, 0.0
    pareto = -np.log(inverse_shape * start) - 1 - inverse_shape
    exponential = -np.log(scale) - 1
    normal = (
        -np.log(deviation)
        - np.log(2 * np.pi) / 2
        - np.square((tail - mean) / deviation).mean() / 2
        - log_ndtr((mean - start) / deviation)
    )
    return start, pareto, normal, exponential


@dataclass(frozen=True)
class Pair:
    """Two projection types (or one with itself), the class of the distances between them, the fit.

    alpha, xmin: of `fits.power_law` (csn), where the label is power-law and that fit finds a start
    of the tail (`PowerLawFit.on_bound`); None elsewhere.
    """

    types: tuple[str, str]
    verdict: Verdict
    alpha: float | None
    xmin: float | None


@dataclass(frozen=True)
class Group:
    """A referenced weight and its members, in the order of `TYPES`; a lone one has none."""

    referenced: str
    members: tuple[str, ...]

    @property
    def types(self) -> tuple[str, ...]:
        """All of them, the referenced one first."""
        return (self.referenced, *self.members)


@dataclass(frozen=True)
class Characterisation:
    """The classes of all pairs of types of a model, and the groups that follow from them.

    pairs: every unordered pair, a type with itself included, in the order of `TYPES`.
    groups: in the order in which they were formed.
    rule: the constants of `classify`; provenance: of the weights, as in `Spectra`.
    """

    model: str
    rank: int
    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    replicates: int
    seed: int
    rule: dict[str, float]
    provenance: dict[str, str]
    made_by: str

    def pair(self, p: str, q: str) -> Pair:
        """The pair of two types, in either order. Raises WdlibError where there is none."""
        for pair in self.pairs:
            if pair.types in ((p, q), (q, p)):
                return pair
        raise WdlibError(f"the characterisation of {self.model} has no pair {p}-{q}")

    def labels(self) -> dict[tuple[str, str], str]:
        """The class of every pair."""
        return {pair.types: pair.verdict.label for pair in self.pairs}

    def to_json(self) -> str:
        """As text, to be read back by `load`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def characterise(
    spectra: Spectra, *, rank: int | None = None, replicates: int = REPLICATES, seed: int = 0
) -> Characterisation:
    """Classify the distances between all types of a model, and group the types.

    rank: singular values to use, all that are there by default. A pair's class depends on the seed
    and on its own vectors, not on the other pairs.

    Raises: WdlibError as `Spectra.truncate`, `cosine_distances` and `classify` do.
    Source: arXiv 2509.00046 (docs/method.md, section 5).
    """
    spectra = spectra if rank is None else spectra.truncate(rank)
    pairs = tuple(
        _pair(spectra.values, types, replicates, seed) for types in _pairs(spectra.values)
    )
    ties = {p.types: p.verdict.evidence for p in pairs if p.verdict.label == POWER_LAW}
    return Characterisation(
        model=spectra.model,
        rank=spectra.rank,
        groups=group([t for t in TYPES if t in spectra.values], ties),
        pairs=pairs,
        replicates=replicates,
        seed=seed,
        rule=_rule(),
        provenance=dict(spectra.provenance),
        made_by=f"wdlib {__version__} characterise.characterise, numpy {np.__version__}",
    )


def _rule() -> dict[str, float]:
    return {
        "support_quantile": SUPPORT_QUANTILE,
        "power_law_confidence": POWER_LAW_CONFIDENCE,
        "normal_confidence": NORMAL_CONFIDENCE,
    }


def matches_spectra(found: Characterisation, spectra: Spectra) -> bool:
    """Whether a characterisation is of these spectra, told without resampling.

    Compared are the model, the provenance of its weights, the rule and, to six digits, all of the
    verdicts that follows from the distances alone.
    """
    about = (found.model, found.provenance, found.rule)
    if about != (spectra.model, spectra.provenance, _rule()) or found.rank > spectra.rank:
        return False
    values = spectra.truncate(found.rank).values
    seen = {(p, q): _seen(_positive(_table(values, (p, q)), p == q)) for p, q in _pairs(values)}
    kept = {p.types: (p.verdict.evidence, p.verdict.start, p.verdict.n) for p in found.pairs}
    return seen.keys() == kept.keys() and all(
        np.allclose(seen[types], kept[types], rtol=1e-6, atol=0) for types in kept
    )


def _pairs(values: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    return list(combinations_with_replacement([t for t in TYPES if t in values], 2))


def _table(values: Mapping[str, np.ndarray], types: tuple[str, str]) -> np.ndarray:
    return cosine_distances(msv(values, types[0]), msv(values, types[1]))


def _seed(seed: int, types: tuple[str, str]) -> list[int]:
    return [seed, *(TYPES.index(t) for t in types)]


def _pair(
    values: Mapping[str, np.ndarray], types: tuple[str, str], replicates: int, seed: int
) -> Pair:
    table = _table(values, types)
    same = types[0] == types[1]
    verdict = classify(table, symmetric=same, replicates=replicates, seed=_seed(seed, types))
    fit = power_law(table_distances(table, same)) if verdict.label == POWER_LAW else None
    if fit is None or fit.on_bound:
        return Pair(types, verdict, None, None)
    return Pair(types, verdict, fit.alpha, fit.xmin)


def group(types: Iterable[str], ties: Mapping[tuple[str, str], float]) -> tuple[Group, ...]:
    """Referenced weights and members: who is tied to the most others first, then the rest.

    Among equals, the larger median evidence of its ties decides, then the order of `types`.

    Arguments: types, in order; ties, from a pair of types to its evidence, a pair given once in
    either order. A tie of a type with itself says nothing here.
    Source: docs/method.md, section 5.
    """
    left, groups = list(types), []
    while left:
        tied = {
            t: {
                u: ties.get((t, u), ties.get((u, t)))
                for u in left
                if u != t and ((t, u) in ties or (u, t) in ties)
            }
            for t in left
        }
        chosen = max(left, key=lambda t: (len(tied[t]), np.median(list(tied[t].values()) or [0.0])))
        members = tuple(tied[chosen])
        groups.append(Group(chosen, members))
        left = [t for t in left if t != chosen and t not in members]
    return tuple(groups)


@dataclass(frozen=True)
class Stability:
    """How the class of each pair answers to other layers and other ranks.

    labels: of the spectra themselves at the rank of `rank`.
    counts: how often each class came out when the layers were drawn again, out of `resamples`.
    by_rank: the classes at other ranks, of the spectra themselves.
    """

    rank: int
    resamples: int
    labels: dict[tuple[str, str], str]
    counts: dict[tuple[str, str], dict[str, int]]
    by_rank: dict[int, dict[tuple[str, str], str]]

    def changed(self, pair: tuple[str, str]) -> float:
        """Share of resamples in which the class of a pair is another one."""
        return 1 - self.counts[pair][self.labels[pair]] / self.resamples

    def differing(self, rank: int) -> float:
        """Share of pairs whose class at another rank is another one."""
        there = self.by_rank[rank]
        return sum(there[pair] != label for pair, label in self.labels.items()) / len(self.labels)


def stability(
    spectra: Spectra,
    *,
    rank: int = 16,
    ranks: tuple[int, ...] = (),
    resamples: int = 50,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Stability:
    """Classify all pairs again with resampled layers, and at other ranks.

    The layers are drawn with replacement, the same ones for all types; a layer drawn twice gives
    distances of 0, which `classify` leaves out. Within a resample, `classify` resamples once more:
    it then knows two thirds of the layers, so `undecided` is more frequent than in a new model. A
    resample with too few distinct layers to classify counts as undecided.

    Arguments: ranks, other ranks to classify at; those that the spectra do not hold are an error.
    Raises: WdlibError as `characterise` does, and for types that differ in number of vectors.
    """
    values = spectra.truncate(rank).values
    layers = number_of_layers(spectra.model, values)
    settings = {"replicates": replicates, "seed": seed}
    rng = np.random.default_rng(seed)
    counts: dict[tuple[str, str], Counter[str]] = {types: Counter() for types in _pairs(values)}
    for _ in range(resamples):
        drawn = rng.integers(layers, size=layers)
        resampled = {t: v[drawn] for t, v in values.items()}
        for types, count in counts.items():
            try:
                label = _label(resampled, types, **settings)
            except WdlibError:  # too few distinct layers are left to say anything
                label = UNDECIDED
            count[label] += 1
    return Stability(
        rank=rank,
        resamples=resamples,
        labels={types: _label(values, types, **settings) for types in counts},
        counts={
            types: {label: count[label] for label in LABELS} for types, count in counts.items()
        },
        by_rank={
            r: {t: _label(spectra.truncate(r).values, t, **settings) for t in counts} for r in ranks
        },
    )


def _label(
    values: Mapping[str, np.ndarray], types: tuple[str, str], *, replicates: int, seed: int
) -> str:
    table, same = _table(values, types), types[0] == types[1]
    return classify(table, symmetric=same, replicates=replicates, seed=_seed(seed, types)).label


def stored_file(model: str, rank: int) -> Path:
    """Where the characterisation of a model is kept: the project's if it has one, or one's own."""
    name = Path("characterisation") / f"{model}-r{rank}.json"
    shipped = paths.RESULTS / name
    return shipped if shipped.is_file() else paths.OWN_RESULTS / name


def save(characterisation: Characterisation, path: str | Path) -> Path:
    """Write a characterisation as JSON, atomically; equal ones give equal bytes."""
    return paths.write_text(path, characterisation.to_json())


def load(path: str | Path) -> Characterisation:
    """Read what `save` wrote. Raises WdlibError, naming the file, where that fails."""
    remedy = "write it anew with `wdlib characterise`"
    return paths.read_json(path, Characterisation, what="a characterisation", remedy=remedy)
