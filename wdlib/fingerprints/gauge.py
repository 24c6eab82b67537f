"""A model layer by layer, as its blocks act on the hidden state.

Many sets of weights are one function: factors move between a norm and the matrices that read it,
between neurons of up and down, between values and outputs. The first of these freedoms is taken out
here: the norms' weights are multiplied into the matrices. Whoever compares models takes out the
others (`invariants`, `independence`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from wdlib.checkpoints import stream, vectors
from wdlib.checkpoints.files import Checkpoint
from wdlib.checkpoints.plan import Part, plan
from wdlib.checkpoints.stream import Projection


@dataclass(frozen=True)
class Layer:
    """The matrices of one layer, or of one routed expert of it.

    matrices[type]: (d_out, d_in) float32 or float64, those that read a norm multiplied by its
    weights. heads, kv_heads: of queries, and of keys and values; 0 where the checkpoint does not
    say. normed: the types whose output is normalised, so that their length changes nothing.
    """

    layer: int
    expert: int | None
    matrices: dict[str, np.ndarray]
    heads: int = 0
    kv_heads: int = 0
    normed: frozenset[str] = frozenset()


def layers(
    model: str | Path | Checkpoint,
    *,
    layers: Iterable[int] | None = None,
    types: Iterable[str] | None = None,
    on_matrix: Callable[[Projection], None] = lambda projection: None,
) -> Iterator[Layer]:
    """Every layer of a model, its routed experts after it, one of them in memory at a time.

    on_matrix: is shown each matrix as it is stored, before its norm is multiplied into it.
    Other arguments and errors as `checkpoints.projections` has them.
    """
    whole = plan(model)
    parts = sorted(whole.chosen(layers=layers, types=types), key=_place)
    norms = vectors.norms(whole, {part.entry.layer for part in parts})
    matrices = stream.read_all(parts)
    for (layer, _), group in groupby(parts, key=_place):
        around, found = norms[layer], {}
        for part in group:
            projection = next(matrices)
            on_matrix(projection)
            found[part.entry.type] = _scaled(projection.matrix, around.read_by(part.entry.type))
        heads, kv_heads = whole.geometry.heads_of(layer)
        yield Layer(layer, projection.expert, found, heads or 0, kv_heads or 0, around.after)


def _place(part: Part) -> tuple[int, int]:
    """Layer and expert: the dense part of a layer before its experts."""
    return part.entry.layer, -1 if part.entry.expert is None else part.entry.expert


def _scaled(matrix: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """W diag(g), in place of W, which is nobody else's; W itself where no norm of its width is."""
    if scale is not None and len(scale) == matrix.shape[1]:
        matrix *= scale
    return matrix
