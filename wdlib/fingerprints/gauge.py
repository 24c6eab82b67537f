"""A model layer by layer, as its blocks act on the hidden state.

Many sets of weights are one function: scales move between a norm and the matrices that read it,
between neurons of up and down, between values and outputs. The first of these freedoms is taken out
here, the norms' weights being multiplied into the matrices; the others are taken out by whoever
compares (`invariants`, `independence`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from wdlib.checkpoints import stream, vectors
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.plan import Part, plan
from wdlib.checkpoints.vectors import READS


@dataclass(frozen=True)
class Layer:
    """The matrices of one layer, or of one routed expert of it.

    matrices[type]: (d_out, d_in) float32, those that read a norm multiplied by its weights.
    heads, kv_heads: of queries, and of keys and values; 0 where the checkpoint does not say.
    """

    layer: int
    expert: int | None
    matrices: dict[str, np.ndarray]
    heads: int
    kv_heads: int


def layers(
    model: str | Path | Checkpoint,
    *,
    layers: Iterable[int] | None = None,
    types: Iterable[str] | None = None,
) -> Iterator[Layer]:
    """Every layer of a model, and after it its routed experts; one of them in memory at a time.

    Arguments and errors as `checkpoints.projections` has them.
    """
    checkpoint = resolve(model)
    whole = plan(checkpoint)
    norms = vectors.norms(checkpoint, stack=whole.stack)
    parts = sorted(whole.chosen(layers=layers, types=types), key=_place)
    matrices = stream.read_all(parts)
    for (layer, _), group in groupby(parts, key=_place):
        found = {}
        for part in group:
            scale = norms.get((layer, READS.get(part.entry.type, "")))
            found[part.entry.type] = _scaled(next(matrices).matrix, scale)
        heads, kv_heads = whole.geometry.heads_of(layer)
        yield Layer(layer, part.entry.expert, found, heads or 0, kv_heads or 0)


def _place(part: Part) -> tuple[int, int]:
    """Layer and expert: the dense part of a layer before its experts."""
    return part.entry.layer, -1 if part.entry.expert is None else part.entry.expert


def _scaled(matrix: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """W diag(g), where W reads a norm of that width; the width differs in a layer of a bottleneck."""
    if scale is None or len(scale) != matrix.shape[1]:
        return matrix
    return matrix * scale
