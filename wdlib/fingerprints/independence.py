"""Two checkpoints: is one made from the other, or were they trained apart?

The null hypothesis is that the two were trained from initial weights drawn independently. Three
kinds of evidence stand beside each other.

Order. A training run treats the neurons of an MLP alike, and draws their initial weights alike, so
the order of its neurons is arbitrary. If each neuron of A is matched to the most similar one of B,
those that land in their own place are, for models trained apart, as many as a random permutation
has fixed points. The p-value is exact whatever the models have learnt and however their hidden
states were aligned. Who sorts or permutes neurons escapes it.

Agreement. Neurons are matched by their gate rows, by their up rows and by their down columns. Two
such matchings agree for a copy, permuted or not. If each said nothing about the other, agreements
would be those of two random injections (`log10_chance`). That is too sharp a null hypothesis:
layers of one model, or two models trained apart on one vocabulary, share neurons that do the same,
up to two in five in a last layer. The null hypothesis is therefore that each neuron agrees with a
chance of `UNIVERSAL` at most, apart from the others. A copy's neurons agree nearly all, so it costs
little. The bound is measured, not proven.

CKA of attention weights, the measure of arXiv 2510.06738: no p-value, but a value.

Source: arXiv 2502.12292 (gate against up; its statistic is given as `log10_spearman`), which
matches activations on text; here the rows of the weights are matched, which needs no run of the
models. Agreements count, instead of a correlation of the matchings' numbers, since a permutation
that is right for one neuron in ten has next to no correlation. Both are blind to lengths of rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints import vectors
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.plan import inventory
from wdlib.fingerprints import gauge, matching
from wdlib.fingerprints.matching import Alignment

TOKENS = 16384
"""Tokens whose embeddings align two models: the first of both."""

SHARED = 0.1
"""Mean cosine of aligned embeddings below which there is no shared vocabulary to align by. Other
vocabularies give 0.02 at most, the same vocabulary in models of other sizes 0.57 (method.md)."""

SCREENED = 64
"""Neurons of each layer of A that look for their nearest ones in every layer of B."""

TESTED = 512
"""Neurons of the smaller layer that are matched, so that a pair of layers costs seconds."""

UNIVERSAL = {"none": 0.2, "axes": 0.8, "rotation": 0.8}
"""Share of a layer's neurons that may agree in models trained apart, by alignment: twice the most
that was measured. Without an alignment 0.10, between layers of one model; after one that is fitted
to embeddings 0.43, in the last layers of two models of one vocabulary (docs/method.md)."""

LEVEL = -2.0
"""log10 of the p-value at which two models are called related."""

AXES = 1024
"""Axes of the hidden state over which CKA is taken, beyond which a sample of them is."""


@dataclass(frozen=True)
class Place:
    """One MLP of a model: its layer, and its expert where it is a routed one."""

    layer: int
    expert: int | None = None


@dataclass(frozen=True)
class LayerTest:
    """One layer of A against the layer of B that it resembles most.

    share: agreements of the best pair of matchings, between 0 and 1, of `neurons` matched ones.
    pair: the two matrices of that pair. in_place: share of neurons matched to that of their own
    number, NaN where the MLPs differ in size. log10_order: of so many in place, or of a rank
    correlation where sizes differ; log10_agreement: of `share` under `UNIVERSAL`; log10_chance: of
    `share` between random injections. All three times the number of tries. log10_spearman: the
    statistic of arXiv 2502.12292, of the first two matrices.
    """

    a: Place
    b: Place
    alignment: str
    neurons: int
    share: float
    pair: tuple[str, str]
    in_place: float
    log10_order: float
    log10_agreement: float
    log10_chance: float
    log10_spearman: float


@dataclass(frozen=True)
class Independence:
    """What the test of two checkpoints found. p-values are log10, at most 0.

    screen: (places of A, places of B) float64, share of sampled neurons whose nearest ones by two
    matrices are the same neuron. log10_order, log10_agreement: over all layers, times the number of
    tests (Bonferroni, since layers of one model are not independent). log10_fisher: Fisher's
    combination of `log10_spearman` over layers, as arXiv 2502.12292 has it. cka: mean of the
    unbiased CKA of W_q and W_k over matched layers, NaN where it cannot be had. alignments: name ->
    mean cosine of the embeddings. untested: what could not be tested, and why.
    """

    a: str
    b: str
    places_a: tuple[Place, ...]
    places_b: tuple[Place, ...]
    screen: np.ndarray
    layers: tuple[LayerTest, ...]
    log10_order: float
    log10_agreement: float
    log10_fisher: float
    cka: float
    alignments: dict[str, float]
    untested: tuple[str, ...]

    @property
    def log10_p(self) -> float:
        """Of both kinds of evidence together: twice the smaller. NaN where nothing was tested."""
        both = [p for p in (self.log10_order, self.log10_agreement) if np.isfinite(p)]
        return matching.log10_bonferroni(both, len(both)) if both else float("nan")

    @property
    def is_related(self) -> bool | None:
        """Whether models trained apart would hardly look so (`LEVEL`); None if untested."""
        return None if np.isnan(self.log10_p) else self.log10_p <= LEVEL

    @property
    def finding(self) -> str:
        """The result as one sentence, for a title or a report."""
        if self.is_related is None:
            return f"{self.a} and {self.b} cannot be compared neuron by neuron"
        if not self.is_related:
            return (
                f"Nothing shows that {self.a} and {self.b} are related (p = {_power(self.log10_p)})"
            )
        share = np.median([layer.share for layer in self.layers])
        least = min(self.log10_order, self.log10_agreement)
        kept = sum(min(x.log10_order, x.log10_agreement) <= LEVEL for x in self.layers)
        how = "in their places" if self.log10_order <= least + 5 else "in another order"
        return (
            f"{self.a} and {self.b} are related: {kept} of {len(self.layers)} layers, "
            f"{100 * share:.0f} % of the neurons matched, {how} (p = {_power(self.log10_p)})"
        )

    def told(self) -> list[str]:
        """The result in words, a line for each thing."""
        lines = [self.finding]
        if self.layers:
            lines.append(f"  order of the neurons (exact): p = {_power(self.log10_order)}")
            lines.append(f"  matchings agree (measured bound): p = {_power(self.log10_agreement)}")
            lines.append(f"  rank correlation (arXiv 2502.12292): p = {_power(self.log10_fisher)}")
        if np.isfinite(self.cka):
            lines.append(f"  CKA of queries and keys (arXiv 2510.06738): {self.cka:.2f}")
        return lines + [f"  not tested, {what}" for what in self.untested]


def compare(a: str | Path | Checkpoint, b: str | Path | Checkpoint) -> Independence:
    """Test whether two checkpoints were trained apart; see above for what is assumed.

    Reads the MLPs of both twice, one layer of each in memory, and keeps of A a sample of neurons of
    all layers. Neurons and tokens are sampled with a fixed seed. The token numbers have
    to mean the same in both models for anything but the alignment "none"; where they do not, the
    embeddings do not align, and that is reported.

    a, b: as `checkpoints.resolve` takes them.
    Raises: WdlibError as `checkpoints.projections` and `vectors.embedding` do.
    """
    one, two = resolve(a), resolve(b)
    fitted, untested = _fitted(one, two)
    names, lacking = _shared_matrices(one, two)
    tried = matching.chosen(fitted) if len(names) > 1 else []
    screen = _screened(one, two, names, tried) if tried else _Screen((), (), np.zeros((0, 0, 0)))
    tests = tuple(_tests(one, two, names, tried, screen))
    value, missing = _attention(one, two, fitted)
    qualities = {name: alignment.quality for name, alignment in fitted.items()}
    return _summary(
        (one.name, two.name), screen, tests, qualities, value, (*untested, *lacking, *missing)
    )


def _power(log10_p: float) -> str:
    return f"{10**log10_p:.2g}" if log10_p > -4 else f"1e{log10_p:.0f}"


def _fitted(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, Alignment], list[str]]:
    """The alignments that the embeddings support, and what keeps others from being tried."""
    x, y = _embedding(a), _embedding(b)
    tokens = min(len(x), len(y))
    found = matching.alignments(x[:tokens], y[:tokens])
    best = max(one.quality for one in found.values())
    if best >= SHARED:
        return found, []
    why = (
        f"hidden states in another basis: the embeddings do not align (mean cosine {best:.2f}), so "
        "the numbers of tokens mean something else, or an embedding is lacking or made anew"
    )
    if "none" in found:
        return {"none": found["none"]}, [why]
    return {}, [f"{why}; and the widths differ, {x.shape[1]} and {y.shape[1]}"]


def _embedding(model: Checkpoint) -> np.ndarray:
    """The first vectors of the embedding; zeros, which align with nothing, where it is lacking."""
    try:
        return vectors.embedding(model, rows=TOKENS)
    except WdlibError:
        width = next(e.shape[1] for e in inventory(model) if e.type in ("q", "gate", "up"))
        return np.zeros((TOKENS, width), np.float32)


def _shared_matrices(a: Checkpoint, b: Checkpoint) -> tuple[list[str], list[str]]:
    """The matrices of an MLP that both models have, and what is lacking for a test."""
    own: list[set[str]] = [{entry.type for entry in inventory(model)} for model in (a, b)]
    names: list[str] = [name for name in ("gate", "up", "down") if name in own[0] & own[1]]
    if len(names) > 1:
        return names, []
    return names, [f"neurons: an MLP of two matrices takes up and down, and {a.name} and {b.name} "
                   f"share {', '.join(names) or 'none'}"]  # fmt: skip


def _mlps(
    model: Checkpoint, names: list[str], layers: list[int] | None = None
) -> Iterator[tuple[Place, dict[str, np.ndarray]]]:
    """The MLPs of a model, and of each its matrices by name with a row for a neuron: (n, d)."""
    for layer in gauge.layers(model, layers=layers, types=names):
        found = {
            name: layer.matrices[name].T if name == "down" else layer.matrices[name]
            for name in names
            if name in layer.matrices
        }
        if len(found) == len(names):
            yield Place(layer.layer, layer.expert), found


def is_signed(name: str, names: list[str]) -> bool:
    """Whether the sign of a neuron's rows in a matrix is fixed: those of up and down of a gated MLP
    can both be turned round, and the function stays."""
    return name == "gate" or "gate" not in names


@dataclass(frozen=True)
class _Screen:
    """Which MLP of B each of A resembles: shares (alignments, places of A, places of B) float64."""

    places_a: tuple[Place, ...]
    places_b: tuple[Place, ...]
    shares: np.ndarray


def _screened(a: Checkpoint, b: Checkpoint, names: list[str], tried: list[Alignment]) -> _Screen:
    """A sample of the neurons of every MLP of A, held against all neurons of every one of B."""
    rng, sampled = np.random.default_rng(0), []
    for place, rows in _mlps(a, names):
        count = len(rows[names[0]])
        index = rng.choice(count, min(SCREENED, count), replace=False)
        sampled.append((place, {name: rows[name][index] for name in names}))
    borders = np.cumsum([0, *(len(rows[names[0]]) for _, rows in sampled)])[:-1]
    joined = {name: np.concatenate([rows[name] for _, rows in sampled]) for name in names}
    aligned = [{name: one.a(rows) for name, rows in joined.items()} for one in tried]
    places, columns = [], []
    for place, rows in _mlps(b, names):
        places.append(place)
        column = []
        for one, mine in zip(tried, aligned, strict=True):
            theirs = {name: one.b(rows[name]) for name in names}
            column.append(_nearest_shares(mine, theirs, borders))
        columns.append(column)
    return _Screen(
        tuple(p for p, _ in sampled), tuple(places), np.moveaxis(np.array(columns), 0, 2)
    )


def _nearest_shares(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], borders: np.ndarray
) -> np.ndarray:
    """Of each group of rows of a, which begin at the borders, the share whose nearest rows of b by
    two matrices are the same; of the pair of matrices with the largest share."""
    names = list(a)
    found = {n: matching.nearest(a[n], b[n], signed=is_signed(n, names)) for n in names}
    same = [found[one] == found[two] for one, two in combinations(names, 2)]
    sizes = np.diff([*borders, len(same[0])])
    return np.max([np.add.reduceat(hits, borders, dtype=float) / sizes for hits in same], axis=0)


def _tests(
    a: Checkpoint, b: Checkpoint, names: list[str], tried: list[Alignment], screen: _Screen
) -> Iterator[LayerTest]:
    """The test of each layer of A against that of B which it resembles most; of experts, the best
    pair."""
    rng, most_alike = np.random.default_rng(1), {}
    for layer in {place.layer for place in screen.places_a}:
        rows = [i for i, place in enumerate(screen.places_a) if place.layer == layer]
        part = screen.shares[:, rows]
        k, i, j = np.unravel_index(part.argmax(), part.shape)
        most_alike[screen.places_a[rows[i]]] = tried[k], screen.places_b[j]
    if not most_alike:
        return
    for at, whole in _mlps(a, names):
        if at in most_alike:
            one, to = most_alike[at]
            other = next(rows for p, rows in _mlps(b, names, [to.layer]) if p == to)
            mine = {name: one.a(whole[name]) for name in names}
            theirs = {name: one.b(other[name]) for name in names}
            yield layer_test(mine, theirs, places=(at, to), alignment=one.name, rng=rng)


def layer_test(
    a: dict[str, np.ndarray],
    b: dict[str, np.ndarray],
    *,
    places: tuple[Place, Place] = (Place(0), Place(0)),
    alignment: str = "none",
    rng: np.random.Generator,
) -> LayerTest:
    """The test of two MLPs whose rows are in one basis.

    a, b: name ("gate", "up", "down") -> rows, a neuron each, (n_a, d) and (n_b, d); the names the
    same, two at least. Neurons of the smaller MLP, `TESTED` of them at most, are matched to those
    of the larger. alignment: the name of how they were brought there.
    """
    names = list(a)
    sizes = len(a[names[0]]), len(b[names[0]])
    few, many = (a, b) if sizes[0] <= sizes[1] else (b, a)
    m, n = min(*sizes, TESTED), max(sizes)
    index = np.sort(rng.choice(min(sizes), m, replace=False))
    found = {
        name: matching.matching(few[name][index], many[name], signed=is_signed(name, names))
        for name in names
    }
    in_place, orders = np.nan, [matching.log10_spearman(index, found[name]) for name in names]
    if sizes[0] == sizes[1]:
        counts = [int((found[name] == index).sum()) for name in names]
        in_place, orders = max(counts) / m, [matching.log10_tail(k, m, n) for k in counts]
    agree = {(x, y): int((found[x] == found[y]).sum()) for x, y in combinations(names, 2)}
    pair = max(agree, key=lambda names: agree[names])
    bound = max(UNIVERSAL[alignment], 1 / n)
    agreement = matching.log10_binomial_tail(agree[pair], m, bound)
    chance = matching.log10_tail(agree[pair], m, n)
    return LayerTest(
        *places,
        alignment,
        m,
        agree[pair] / m,
        pair,
        in_place,
        log10_order=matching.log10_bonferroni(orders, len(orders)),
        log10_agreement=matching.log10_bonferroni([agreement], len(agree)),
        log10_chance=matching.log10_bonferroni([chance], len(agree)),
        log10_spearman=matching.log10_spearman(found[names[0]], found[names[1]]),
    )


def _attention(
    a: Checkpoint, b: Checkpoint, fitted: dict[str, Alignment]
) -> tuple[float, list[str]]:
    """AWM's measure: mean unbiased CKA of W_q and W_k over matched layers, and why there is none.

    Layers of one number are matched in order, others by linear assignment of the largest CKA.
    Source: arXiv 2510.06738. Differs from the paper: norms are multiplied into the weights; beyond
    `AXES` axes of the hidden state a random sample of them is taken.
    """
    from scipy.optimize import linear_sum_assignment

    alignment = fitted.get("axes") or fitted.get("none")
    if alignment is None:
        return np.nan, ["attention: hidden states of other widths without a shared vocabulary"]
    grams_a, grams_b = _grams(a, alignment.a), _grams(b, alignment.b)
    if not len(grams_a) or not len(grams_b):
        return np.nan, ["attention: one of the models has no q and k of its own"]
    table = grams_a @ grams_b.T / 2
    if len(grams_a) == len(grams_b):
        return float(np.trace(table) / len(table)), []
    return float(table[linear_sum_assignment(table, maximize=True)].mean()), []


def _grams(model: Checkpoint, aligned: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Of every layer the U-centred Gram matrices of W_q and W_k, as one row each: float32."""
    found = []
    for layer in gauge.layers(model, types=["q", "k"]):
        if {"q", "k"} <= set(layer.matrices):
            weights = [aligned(layer.matrices[kind]) for kind in ("q", "k")]
            width = weights[0].shape[1]
            kept = np.random.default_rng(2).permutation(width)[:AXES]
            grams = [matching.u_centred(w[:, kept].T).astype(np.float32).ravel() for w in weights]
            found.append(np.concatenate(grams))
    return np.array(found)


def _summary(
    names: tuple[str, str],
    screen: _Screen,
    tests: tuple[LayerTest, ...],
    qualities: dict[str, float],
    cka: float,
    untested: tuple[str, ...],
) -> Independence:
    order = agreement = fisher = np.nan
    if tests:
        order = matching.log10_bonferroni([t.log10_order for t in tests], len(tests))
        agreement = matching.log10_bonferroni(
            [t.log10_agreement for t in tests], screen.shares.size
        )
        fisher = matching.log10_fisher(np.array([t.log10_spearman for t in tests]))
    table = screen.shares.max(axis=0) if tests else np.zeros((0, 0))
    return Independence(
        *names, screen.places_a, screen.places_b, table, tests, order, agreement, fisher, cka,
        qualities, untested,
    )  # fmt: skip
