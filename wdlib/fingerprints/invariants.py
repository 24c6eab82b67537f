"""What of a model's weights stays when they are rewritten without changing the function.

A layer gives spectra of six kinds. Each ignores a group of transformations that leave the model's
function as it is, in `GROUPS`. All of them ignore an orthogonal change of the basis of the hidden
state, a factor that moves between the embedding and the outputs of all layers (`relation` takes it
out), and weights that move between a norm and the matrices that read it (`gauge`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy import linalg

from wdlib.fingerprints.gauge import Layer
from wdlib.spectra.kernel import top_singular_values

RANK = 16
"""Values that are kept of each spectrum, as far as there are so many."""

GROUPS = {
    "qk": (
        "an invertible matrix between the queries and keys of a group, of which rotary embedding "
        "allows a rotation and a factor for each pair of rows; the order of the group's heads"
    ),
    "ov": "an invertible matrix between a group's values and output; the order of its heads",
    "gate": "the order of neurons",
    "up": "the order of neurons, and a factor between up and down for each",
    "down": "the order of neurons, and a factor between up and down for each",
    "neurons": "the order of neurons, and a factor between up and down for each",
}
"""Kinds of invariants, and what each ignores beside norms and the basis of the hidden state."""


def of_layer(layer: Layer, *, rank: int = RANK) -> dict[str, np.ndarray]:
    """The invariants of a layer by kind, those that its matrices allow.

    "qk": singular values of W_q^T W_k, of all queries that share a key, (kv heads, values); "ov" of
    W_o W_v, in the same way. "gate": of the gate. "up", "down": of both after each neuron's row of
    up and column of down have been given one length, the geometric mean of theirs. "neurons": the
    largest of these lengths. Matrices whose output is normalised are first divided by their norm,
    queries head by head. All descending, float64, (number, values), `rank` values at most.

    Raises: WdlibError for a matrix that holds NaN or infinity.
    """
    W, found = layer.matrices, {}
    if layer.kv_heads and {"q", "k"} <= W.keys():
        heads = layer.heads, layer.kv_heads
        q, k = (_unit(W[t], n, t in layer.normed) for t, n in zip("qk", heads, strict=True))
        found["qk"] = _products(q, k, layer.kv_heads, rank)
    if layer.kv_heads and {"o", "v"} <= W.keys():
        o = _unit(W["o"], 1, "o" in layer.normed)
        found["ov"] = _products(o.T, W["v"], layer.kv_heads, rank)
    if "gate" in W:
        found["gate"] = _values(W["gate"], rank)
    if {"up", "down"} <= W.keys():
        down = _unit(W["down"], 1, "down" in layer.normed)
        lengths = np.linalg.norm(W["up"], axis=1), np.linalg.norm(down, axis=0)
        shared = np.sqrt(lengths[0].astype(np.float64) * lengths[1])
        found["up"] = _values(W["up"] * _ratio(shared, lengths[0])[:, None], rank)
        found["down"] = _values(down * _ratio(shared, lengths[1]), rank)
        found["neurons"] = np.sort(shared)[::-1][None, :rank]
    return {kind: found[kind] for kind in GROUPS if kind in found}


def _unit(matrix: np.ndarray, blocks: int, normed: bool) -> np.ndarray:
    """The matrix with each of its blocks of rows divided by its norm, if that changes nothing."""
    if not normed:
        return matrix
    parts = matrix.reshape(blocks, -1)
    norms = np.linalg.norm(parts, axis=1, keepdims=True)
    return np.divide(parts, norms, out=np.zeros_like(parts), where=norms > 0).reshape(matrix.shape)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0).astype(np.float32)


def _values(matrix: np.ndarray, rank: int) -> np.ndarray:
    return top_singular_values(matrix, min(rank, *matrix.shape)).values[None]


def _products(a: np.ndarray, b: np.ndarray, groups: int, rank: int) -> np.ndarray:
    """Singular values of A_g^T B_g for each group: (groups, values).

    a: (groups * heads * size, width), the heads of a group together; b: (groups * size, width).
    A_g is the (size, heads * width) matrix of the group's heads side by side. With M = A A^T and
    N = B B^T, (size, size) each, the values are the roots of the eigenvalues of M N. So nothing of
    the size of the width squared is formed.
    """
    B = b.astype(np.float64).reshape(groups, -1, b.shape[1])
    A = a.astype(np.float64).reshape(groups, -1, B.shape[1], a.shape[1])
    found = []
    for heads, single in zip(A, B, strict=True):
        M = sum(head @ head.T for head in heads)
        values, vectors = linalg.eigh(single @ single.T)
        half = vectors * np.sqrt(np.maximum(values, 0))
        squares = linalg.eigvalsh(half.T @ M @ half)[::-1]
        found.append(np.sqrt(np.maximum(squares[:rank], 0)))
    return np.array(found)


@dataclass(frozen=True)
class Spectra:
    """The invariants of one kind of a model.

    layers: (n,) the layer of each, ascending; several of a layer are its groups of heads or its
    experts. values: (n, r) float64, descending rows.
    """

    layers: np.ndarray
    values: np.ndarray


def of_layers(found: Mapping[str, Spectra], layers: Sequence[int]) -> dict[str, Spectra]:
    """The invariants of a model that is made of some layers of another, numbered anew from 0.

    Kinds that none of these layers has are absent.
    """

    def chosen(spectra: Spectra) -> Spectra:
        rows = [np.flatnonzero(spectra.layers == layer) for layer in layers]
        numbers = np.repeat(np.arange(len(layers)), [len(row) for row in rows])
        return Spectra(numbers, spectra.values[np.concatenate(rows)])

    there = {kind: s for kind, s in found.items() if np.isin(s.layers, layers).any()}
    return {kind: chosen(spectra) for kind, spectra in there.items()}


class Collector:
    """Gathers the invariants of layers; of the routed experts of a layer it keeps `EXPERTS`."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[int, int | None, np.ndarray]]] = {}

    def add(self, layer: Layer) -> None:
        for kind, rows in of_layer(layer).items():
            self._found.setdefault(kind, []).append((layer.layer, layer.expert, rows))

    def spectra(self) -> dict[str, Spectra]:
        """All that was gathered, by kind, cut to the shortest spectrum of the kind."""
        return {kind: _joined(self._found[kind]) for kind in GROUPS if kind in self._found}


EXPERTS = 8
"""Routed experts that are kept of a layer and kind: those of the largest first values, so that
their order does not matter."""


def _joined(found: list[tuple[int, int | None, np.ndarray]]) -> Spectra:
    layers, rows = [], []
    for layer, group in groupby(found, key=lambda row: row[0]):
        of_layer = list(group)
        routed = [values for _, expert, values in of_layer if expert is not None]
        routed.sort(key=lambda values: -values[0, 0])
        kept = [v for _, expert, v in of_layer if expert is None] + routed[:EXPERTS]
        rows += kept
        layers += [layer] * sum(map(len, kept))
    length = min(v.shape[1] for v in rows)
    return Spectra(np.array(layers), np.concatenate([v[:, :length] for v in rows]))
