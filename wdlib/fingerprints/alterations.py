"""What is done to a decoder's weights that changes its function: rounding, cutting, merging.

Every function takes a `Decoder` and gives another; a seed is the only source of randomness. The
embedding, the output and the norms stay, unless a docstring says otherwise. What leaves the
function as it is, is in `disguises`; training is in workflow/scripts/relatives.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from wdlib import TYPES, WdlibError
from wdlib.checkpoints.stream import requantise
from wdlib.fingerprints.decoder import Block, Decoder

Rng = np.random.Generator


def requantised(decoder: Decoder, stored_as: str) -> Decoder:
    """The matrices as they come back from a type of GGUF: errors as `stream.requantise`."""
    found: list[dict[str, np.ndarray]] = [{} for _ in decoder.blocks]
    for p in decoder.projections():
        found[p.layer][p.type] = requantise(p, stored_as).matrix
    blocks = (b.changed(**W) for b, W in zip(decoder.blocks, found, strict=True))
    return replace(decoder, blocks=tuple(blocks))


Change = Callable[[np.ndarray, Rng], np.ndarray]


def _per_matrix(
    decoder: Decoder, change: Change, seed: int, types: Iterable[str] = TYPES
) -> Decoder:
    """The model with the matrices of some types changed, by a function of matrix and generator."""

    def of_block(b: Block, rng: Rng) -> Block:
        return b.changed(**{t: change(b.matrices[t], rng) for t in types})

    return decoder.each(of_block, seed)


def _noise(matrix: np.ndarray, rng: Rng) -> np.ndarray:
    """Normal values with the standard deviation of a matrix, in its type."""
    drawn = rng.standard_normal(matrix.shape, dtype=np.float32)
    drawn *= np.float32(matrix.std())
    return drawn.astype(matrix.dtype, copy=False)


def noisy(decoder: Decoder, *, share: float, seed: int = 0) -> Decoder:
    """Every matrix plus normal noise, `share` of the matrix's standard deviation."""
    dtype = decoder.embedding.dtype.type
    return _per_matrix(decoder, lambda W, rng: W + dtype(share) * _noise(W, rng), seed)


def random(decoder: Decoder, *, types: Iterable[str] = TYPES, seed: int = 0) -> Decoder:
    """The matrices of some types replaced by normal noise of their standard deviation.

    Of all types by default: then nothing but embedding, output and norms is the model's.
    """
    return _per_matrix(decoder, _noise, seed, types)


def updated(decoder: Decoder, *, size: float, rank: int = 16, seed: int = 0) -> Decoder:
    """Every matrix plus a random adapter of low rank, `size` of its Frobenius norm."""

    def change(W: np.ndarray, rng: Rng) -> np.ndarray:
        left, right = (rng.standard_normal(s) for s in ((len(W), rank), (rank, W.shape[1])))
        update = left @ right
        return W + (size * np.linalg.norm(W) / np.linalg.norm(update) * update).astype(W.dtype)

    return _per_matrix(decoder, change, seed)


def pruned(decoder: Decoder, *, share: float) -> Decoder:
    """The smallest values of every matrix, by magnitude, set to zero: `share` of them."""

    def change(W: np.ndarray, _: Rng) -> np.ndarray:
        size = np.abs(W)
        return np.where(size < np.quantile(size, share), W.dtype.type(0), W)

    return _per_matrix(decoder, change, 0)


def without_neurons(decoder: Decoder, *, share: float) -> Decoder:
    """The MLPs without their least neurons, `share` of them in every layer.

    A neuron counts by the product of the lengths of its row of up and column of down.
    """
    kept = len(decoder.blocks[0].matrices["up"])
    kept -= round(share * kept)

    def change(b: Block, _: Rng) -> Block:
        W = b.matrices
        sizes = np.linalg.norm(W["up"], axis=1) * np.linalg.norm(W["down"], axis=0)
        chosen = np.sort(np.argsort(sizes)[-kept:])
        return b.changed(gate=W["gate"][chosen], up=W["up"][chosen], down=W["down"][:, chosen])

    return decoder.each(change, 0)


def with_layers(decoder: Decoder, layers: Sequence[int]) -> Decoder:
    """The model of these layers, in this order: some left out, some there more than once.

    Raises: WdlibError for a layer that is not there, or for none.
    """
    there = range(len(decoder.blocks))
    if not layers or not set(layers) <= set(there):
        raise WdlibError(f"the layers are 0 to {len(there) - 1}: give some of these, not {layers}")
    return replace(decoder, blocks=tuple(decoder.blocks[i] for i in layers))


def stacked(decoder: Decoder, *, overlap: float = 0.5) -> Decoder:
    """Two copies of the layers on top of each other, the first without its last layers and the
    second without its first: depth up-scaling (arXiv 2312.15166).

    overlap: the share of the layers that are there twice.
    """
    n = len(decoder.blocks)
    cut = round((n - overlap * n) / 2)
    return with_layers(decoder, [*range(n - cut), *range(cut, n)])


def merged(decoder: Decoder, other: Decoder, *, weight: float = 0.5) -> Decoder:
    """The weighted mean of two models of one shape, embedding, output and norms included.

    weight: of the other one. Raises: WdlibError for other shapes.
    """

    def mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.shape != b.shape:
            raise WdlibError(f"arrays of shape {a.shape} and {b.shape} have no mean: other models")
        return a + a.dtype.type(weight) * (b - a)

    def means(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: mean(a[name], b[name]) for name in a}

    def block(a: Block, b: Block) -> Block:
        matrices, biases = means(a.matrices, b.matrices), means(a.biases, b.biases)
        return Block(matrices, biases, means(a.norms, b.norms), a.layer_type)

    outputs = [d.output for d in (decoder, other) if d.output is not None]
    if len(decoder.blocks) != len(other.blocks) or len(outputs) == 1:
        raise WdlibError("the models differ in layers or output, so they have no mean")
    return replace(
        decoder,
        embedding=mean(decoder.embedding, other.embedding),
        output=mean(*outputs) if outputs else None,
        norm=mean(decoder.norm, other.norm),
        blocks=tuple(map(block, decoder.blocks, other.blocks)),
    )
