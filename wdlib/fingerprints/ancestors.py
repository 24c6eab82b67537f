"""Which of the known models a model is made from, and what was done to its weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from wdlib.fingerprints.identity import deviation_distance, matched_distance, spectral_difference
from wdlib.fingerprints.record import Fingerprint
from wdlib.fingerprints.relation import RESOLUTION, Relation, relate

SAME, LIGHTLY_CHANGED = 2e-4, 0.02
"""Change (see `Relation.change`) up to which weights are the same, and up to which they are changed
as by storing in 4 bits, an adapter, pruning of a fifth, or some hundred steps of training."""

REWRITTEN = 0.02, 4.0
"""Singular values of a type differ by so much at least, and by so many times more than the
invariants, where its matrices were rewritten without changing the function."""


@dataclass(frozen=True)
class Neighbour:
    """A known model seen from another.

    relation: layer against layer; None where one of the records holds no invariants. spectral,
    deviation, cluster: the three distances of their vectors (`cluster` is the matched one).
    rewritten: the types whose matrices were rewritten without changing the function.
    """

    model: str
    family: str
    relation: Relation | None
    spectral: float
    deviation: float
    cluster: float
    rewritten: tuple[str, ...] = ()

    @property
    def is_related(self) -> bool:
        return self.relation is not None and self.relation.is_related


def identify(fingerprint: Fingerprint, known: Iterable[Fingerprint]) -> list[Neighbour]:
    """The known models, those first of which most layers are recognised in the model.

    From a tenth of the layers on (`Relation.is_related`), the model is made from the known one, or
    both from a third. Below it the order, then that of the spectral difference, says little, and
    nothing is claimed. The record of the very same name and weights is left out; so are models that
    share too few types.
    """
    found = []
    for other in known:
        itself = fingerprint.provenance.get("sha256"), fingerprint.model
        if (other.provenance.get("sha256"), other.model) == itself:
            continue
        if len(set(fingerprint.types) & set(other.types)) >= 2:
            found.append(neighbour(fingerprint, other))
    return sorted(found, key=lambda n: (-n.relation.share if n.relation else 0, n.spectral))


def neighbour(fingerprint: Fingerprint, other: Fingerprint) -> Neighbour:
    """One known model seen from another, at the smaller of their ranks and numbers of clusters."""
    rank, k = min(fingerprint.rank, other.rank), min(fingerprint.k, other.k)
    one, two = (f.clustered(rank=rank, k=k) for f in (fingerprint, other))
    relation = None
    if set(one.invariants) & set(two.invariants):
        relation = relate(one.invariants, two.invariants)
    return Neighbour(
        other.model,
        other.family,
        relation,
        spectral_difference(one.singular_values, two.singular_values),
        deviation_distance(one.deviations, two.deviations),
        matched_distance(one, two),
        rewritten(one, two, relation) if relation and relation.is_related else (),
    )


def rewritten(one: Fingerprint, two: Fingerprint, relation: Relation) -> tuple[str, ...]:
    """The types whose singular values changed far more than the invariants of their layers.

    Of models with one matrix of a type in each layer; of others nothing is said.
    """
    recognised, found = relation.recognised, []
    for t in one.types:
        if t not in two.types:
            continue
        x, y = one.singular_values[t], two.singular_values[t]
        if (len(x), len(y)) != (len(relation.layers), len(relation.others)):
            continue
        a, b = x[recognised], y[relation.places[recognised]]
        larger = np.maximum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        moved = float(np.median(np.linalg.norm(a - b, axis=1) / larger))
        if moved > max(REWRITTEN[0], REWRITTEN[1] * relation.change):
            found.append(t)
    return tuple(found)


# In words ----------------------------------------------------------------------------------------


def report(fingerprint: Fingerprint, seen: Sequence[Neighbour]) -> str:
    """Both vectors as a table, and what `identify` found, as lines of text."""
    lines = _vectors(fingerprint)
    if not seen:
        return "\n".join([*lines, "no other fingerprint is stored to compare it with"])
    width = max(len(n.model) for n in seen) + 6
    heads = ("layers", "change", "spectra", "SDV", "clusters")
    lines.append(" " * width + "".join(word.rjust(10) for word in heads))
    for n in seen:
        cells = ["-", "-"]
        if n.relation is not None:
            cells = [f"{n.relation.recognised.sum()} of {len(n.relation.layers)}", "-"]
        if n.relation is not None and n.relation.recognised.any():
            cells[1] = f"{n.relation.change:.2%}"
        cells += [f"{d:.4f}" for d in (n.spectral, n.deviation, n.cluster)]
        lines.append(f"from  {n.model}".ljust(width) + "".join(cell.rjust(10) for cell in cells))
    return "\n".join([*lines, *verdict(seen)])


def _vectors(fingerprint: Fingerprint) -> list[str]:
    f, types = fingerprint, fingerprint.types
    rows = [("", *types)]
    rows.append(("standard deviation", *(f"{f.deviations[t]:.3g}" for t in types)))
    rows.append(("normalised", *(f"{v:.3f}" for v in f.deviation_vector().values())))
    shares = np.stack(list(f.clustering_vector().values()), axis=1)
    for i, row in enumerate(shares):
        rows.append((f"share in cluster {i}", *(f"{v:.2f}" for v in row)))
    family = f.family or "family not known"
    fewest = min(len(parts) for parts in f.moments.values())
    number = f"{fewest} to {f.matrices}" if fewest < f.matrices else f"{fewest}"
    lines = [f"{f.model}: {family}, {number} matrices of each type, rank {f.rank}"]
    return lines + ["".join([row[0].ljust(20), *(t.rjust(8) for t in row[1:])]) for row in rows]


def verdict(seen: Sequence[Neighbour], *, among: str = "stored models") -> list[str]:
    """What the neighbours say of a model's ancestors, a line for each. among: what they are."""
    related = [n for n in seen if n.is_related]
    if related:
        return [line for n in related for line in _told(n)]
    lines = [f"no relative among {among}"]
    lines.append(f"what could hide a relative: {HIDES}")
    if lacking := [n.model for n in seen if n.relation is None]:
        lines.append(
            f"not compared with {', '.join(lacking)}: compute their records anew "
            "(`wdlib fingerprint`)"
        )
    return lines


HIDES = (
    "noise as large as the weights, an update of a third of their norm, cut widths, distillation; "
    "an ancestor that is not stored"
)
"""What was measured to hide a relative (docs/method.md)."""


def _told(n: Neighbour) -> list[str]:
    relation = n.relation
    assert relation is not None
    number, every = int(relation.recognised.sum()), len(relation.layers)
    change = f"{max(relation.change, RESOLUTION):.2%}"
    kind = "a copy of" if relation.change <= SAME else "made from"
    lines = [f"{kind} {n.model}, or both from one model: {number} of {every} layers are recognised"]
    lines.append(f"  layers: {_mapping(relation)}")
    if relation.change <= SAME:
        lines.append(f"  change: {change} at most, the same weights")
    elif relation.change <= LIGHTLY_CHANGED:
        lines.append(f"  change: {change}, as after fewer bits, an adapter, or light training")
    else:
        lines.append(f"  change: {change}, as after long training, noise, or pruning of half")
    if n.rewritten:
        lines.append(f"  rewritten without changing the function: {', '.join(n.rewritten)}")
    return lines


def _mapping(relation: Relation) -> str:
    """Which layers are from which: "0-14 from 0-14, 15-29 from 5-19, 30 not recognised"."""
    rows = zip(relation.layers, relation.recognised, relation.partners, strict=True)
    found = [(int(layer), int(partner) if is_from else None) for layer, is_from, partner in rows]
    places = range(len(found))

    def run(i: int) -> tuple[int, int | None]:
        layer, partner = found[i]
        return (i - layer, None) if partner is None else (i - layer, i - partner)

    texts = []
    for _, group in groupby(places, key=run):
        rows_of = [found[i] for i in group]
        first, last = rows_of[0], rows_of[-1]
        origin = "not recognised"
        if first[1] is not None and last[1] is not None:
            origin = f"from {_span(first[1], last[1])}"
        texts.append(f"{_span(first[0], last[0])} {origin}")
    return ", ".join(texts)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
