"""What can be done to a decoder's weights that leaves its function as it is.

Every function takes a `Decoder` and gives another, with the same output for every text: exactly
so with real numbers, to rounding in floating point. Each docstring names the group of
transformations. A seed is the only source of randomness. docs/method.md says what they leave
invariant.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from wdlib import WdlibError
from wdlib.fingerprints.decoder import Block, Decoder

Rng = np.random.Generator

READS = {"attention": "qkv", "mlp": ("gate", "up")}
"""The types of matrices that read the norm of a part of the layer."""

WRITES = ("o", "down")
"""The types of matrices whose outputs are added to the hidden state."""


def _rows(matrix: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """diag(factor) W, in the matrix's own type."""
    return matrix * factor.astype(matrix.dtype)[:, None]


def _columns(matrix: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """W diag(factor), in the matrix's own type."""
    return matrix * factor.astype(matrix.dtype)


# Order of neurons, heads, tokens ------------------------------------------------------------------


def permute_neurons(decoder: Decoder, *, seed: int = 0) -> Decoder:
    """The neurons of each MLP in another order: permutations of the rows of gate and up together,
    and of the columns of down."""

    def change(b: Block, rng: Rng) -> Block:
        W, order = b.matrices, rng.permutation(len(b.matrices["up"]))
        return b.changed(gate=W["gate"][order], up=W["up"][order], down=W["down"][:, order])

    return decoder.each(change, seed)


def _reordered(block: Block, queries: np.ndarray, keys: np.ndarray) -> Block:
    """The rows of q, and of k and v, in another order, and the columns of o in that of q."""
    rows = {"q": queries, "k": keys, "v": keys}
    found = {t: block.matrices[t][order] for t, order in rows.items()}
    found["o"] = block.matrices["o"][:, queries]
    biases = {t: bias[rows[t]] for t, bias in block.biases.items()}
    return replace(block.changed(**found), biases=biases)


def permute_heads(decoder: Decoder, *, seed: int = 0) -> Decoder:
    """The heads that share a key in another order: permutations of query heads within groups."""
    groups, size = decoder.kv_heads, decoder.head_size
    rows = np.arange(decoder.heads * size).reshape(groups, -1, size)

    def change(b: Block, rng: Rng) -> Block:
        order = np.concatenate([rng.permutation(group).ravel() for group in rows])
        return _reordered(b, order, np.arange(groups * size))

    return decoder.each(change, seed)


def permute_groups(decoder: Decoder, *, seed: int = 0) -> Decoder:
    """The groups of heads that share a key in another order: permutations of the keys' heads.

    A model with one head of keys stays as it is.
    """
    groups, size = decoder.kv_heads, decoder.head_size
    queries = np.arange(decoder.heads * size).reshape(groups, -1)
    keys = np.arange(groups * size).reshape(groups, -1)

    def change(b: Block, rng: Rng) -> Block:
        order = rng.permutation(groups)
        return _reordered(b, queries[order].ravel(), keys[order].ravel())

    return decoder.each(change, seed)


def permute_tokens(decoder: Decoder, *, seed: int = 0) -> Decoder:
    """The tokens under other numbers: permutations of the rows of embedding and output.

    The function is the same for a tokenizer that numbers its tokens in the new order.
    """
    order = np.random.default_rng(seed).permutation(len(decoder.embedding))
    output = None if decoder.output is None else decoder.output[order]
    return replace(decoder, embedding=decoder.embedding[order], output=output)


# Scales -------------------------------------------------------------------------------------------


def rescale_matrices(decoder: Decoder, *, factor: float = 1.5) -> Decoder:
    """Up, v and q times a factor, and down, o and k divided by it: a positive number per pair.

    Where queries and keys are normalised, the factor goes into the weights of these norms, and q
    and k stay.
    """

    def change(b: Block, rng: Rng) -> Block:
        up = {t: b.matrices[t] * b.matrices[t].dtype.type(factor) for t in ("up", "v")}
        down = {t: b.matrices[t] / b.matrices[t].dtype.type(factor) for t in ("down", "o")}
        found, biases = b.changed(**up, **down), dict(b.biases)
        if "v" in biases:
            biases["v"] = biases["v"] * biases["v"].dtype.type(factor)
        c, unturned = np.array([[factor]]), np.zeros((1, 1))
        return _between(replace(found, biases=biases), c, unturned, decoder.head_size)

    return decoder.each(change, 0)


def rescale_neurons(decoder: Decoder, *, spread: float = 0.5, seed: int = 0) -> Decoder:
    """Every neuron's row of up times a number, its column of down divided by it.

    spread: standard deviation of the numbers' logarithm; half of them are negative.
    """

    def change(b: Block, rng: Rng) -> Block:
        W = b.matrices
        c = np.exp(spread * rng.standard_normal(len(W["up"]))) * rng.choice([-1, 1], len(W["up"]))
        return b.changed(up=_rows(W["up"], c), down=_columns(W["down"], 1 / c))

    return decoder.each(change, seed)


def rescale_hidden(decoder: Decoder, *, factor: float = 3.0) -> Decoder:
    """The hidden state times a positive number: embedding, o and down times it, eps its square.

    Raises: WdlibError for a model whose other norms share the eps (`Decoder.has_norms_after`).
    """
    if decoder.has_norms_after:
        raise WdlibError(
            f"the hidden state of a {decoder.config['model_type']} cannot be rescaled: norms on "
            "queries, keys and outputs have the same eps; take a model without them"
        )
    output = decoder.embedding if decoder.output is None else decoder.output
    c = decoder.embedding.dtype.type(factor)
    config = {**decoder.config, "rms_norm_eps": decoder.config["rms_norm_eps"] * factor**2}

    def change(b: Block, rng: Rng) -> Block:
        return b.changed(**{t: b.matrices[t] * c for t in WRITES})

    scaled = replace(decoder, config=config, embedding=decoder.embedding * c, output=output)
    return scaled.each(change, 0)


def fold_norms(decoder: Decoder) -> Decoder:
    """The weights of the norms multiplied into the matrices that read them: diagonal matrices.

    The final norm's go into the output, which is then another matrix than the embedding. Norms on
    queries and keys, and those after attention and MLP, have no matrix after them and stay.
    """
    output = decoder.output
    if not np.all(decoder.norm == 1):
        output = _columns(decoder.embedding if output is None else output, decoder.norm)

    def change(b: Block, rng: Rng) -> Block:
        W, ones = b.matrices, {part: np.ones_like(b.norms[part]) for part in READS}
        found = {t: _columns(W[t], b.norms[part]) for part in READS for t in READS[part]}
        return replace(b.changed(**found), norms=b.norms | ones)

    folded = decoder.each(change, 0)
    return replace(folded, output=output, norm=np.ones_like(decoder.norm))


def move_norms(decoder: Decoder, *, spread: float = 0.5, seed: int = 0) -> Decoder:
    """The weights of each norm times random ones, the columns of its readers divided by them.

    Positive diagonal matrices. The final norm, and those that `fold_norms` leaves, stay.
    spread: standard deviation of the random weights' logarithm.
    """

    def change(b: Block, rng: Rng) -> Block:
        c = {part: np.exp(spread * rng.standard_normal(decoder.width)) for part in READS}
        W, norms = b.matrices, {part: b.norms[part] * c[part] for part in READS}
        found = {t: _columns(W[t], 1 / c[part]) for part in READS for t in READS[part]}
        return replace(b.changed(**found), norms=b.norms | norms)

    return decoder.each(change, seed)


# Between the two matrices of a product ----------------------------------------------------------


def mix_values(decoder: Decoder, *, condition: float = 4.0, seed: int = 0) -> Decoder:
    """v times an invertible matrix in each group, o times its inverse: the general linear group.

    condition: of the random matrices, whose determinants are 1 or -1. 1 gives rotations.
    """
    groups, size = decoder.kv_heads, decoder.head_size
    values = np.geomspace(condition**0.5, condition**-0.5, size)

    def change(b: Block, rng: Rng) -> Block:
        v, o = b.matrices["v"], b.matrices["o"]
        left, right = (_rotations(rng, groups, size) for _ in range(2))
        mix = (left * values) @ right
        inverse = (right.mT / values) @ left.mT
        heads = o.reshape(len(o), groups, -1, size).transpose(1, 0, 2, 3)
        mixed = np.einsum("gwhi,gij->gwhj", heads, inverse.astype(o.dtype), optimize=True)
        biases = dict(b.biases)
        for t in {"v"} & biases.keys():
            bias = biases[t].reshape(groups, size, 1)
            biases[t] = (mix @ bias).reshape(-1).astype(bias.dtype)
        rows = mix.astype(v.dtype) @ v.reshape(groups, size, -1)
        found = b.changed(v=rows.reshape(v.shape), o=mixed.transpose(1, 0, 2, 3).reshape(o.shape))
        return replace(found, biases=biases)

    return decoder.each(change, seed)


def _rotations(rng: Rng, number: int, size: int) -> np.ndarray:
    """Random orthogonal matrices, of Haar measure: (number, size, size) float64."""
    q, r = np.linalg.qr(rng.standard_normal((number, size, size)))
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]


def turn_pairs(decoder: Decoder, *, spread: float = 0.5, seed: int = 0) -> Decoder:
    """Pairs of rows of q and k turned by one angle, those of q times a number, those of k divided.

    Rotary embedding turns the pairs (j, j + half a head), so it commutes with rotations and factors
    of these: a complex number for each group and pair. Where queries and keys are normalised, the
    angles are 0 and 180 degrees, and the factors go into the weights of these norms.
    spread: standard deviation of the numbers' logarithm.
    """
    groups, half = decoder.kv_heads, decoder.head_size // 2

    def change(b: Block, rng: Rng) -> Block:
        shared = 1 if "q" in b.norms else groups
        factors = np.exp(spread * rng.standard_normal((shared, half)))
        angles = rng.uniform(0, 2 * np.pi, (shared, half))
        if "q" in b.norms:
            angles = np.where(angles < np.pi, 0.0, np.pi)
        return _between(b, factors, angles, decoder.head_size)

    return decoder.each(change, seed)


def _between(block: Block, factors: np.ndarray, angles: np.ndarray, size: int) -> Block:
    """q times a complex number per group and pair of rows, k turned as far and divided by it.

    factors, angles: (groups, pairs), or 1 in place of either for all. size: of a head. Factors go
    into the weights of the norms of queries and keys, where there are such.
    """
    found, biases, norms = {}, dict(block.biases), dict(block.norms)
    for t, c in (("q", factors), ("k", 1 / factors)):
        if t in norms:
            norms[t] = norms[t] * np.tile(np.broadcast_to(c[0], size // 2), 2)
            c = np.ones_like(c)
        number = c * np.exp(1j * angles)
        found[t] = _turned(block.matrices[t], number, size)
        if t in biases:
            biases[t] = _turned(biases[t][:, None], number, size)[:, 0]
    return replace(block.changed(**found), biases=biases, norms=norms)


def _turned(rows: np.ndarray, numbers: np.ndarray, size: int) -> np.ndarray:
    """Pairs of rows, half a head apart, as complex numbers times given ones: (groups, pairs)."""
    pairs = rows.reshape(len(numbers), -1, 2, size // 2, rows.shape[1])
    c = numbers[:, None, :, None]
    real, imaginary = c.real.astype(rows.dtype), c.imag.astype(rows.dtype)
    x, y = pairs[:, :, 0], pairs[:, :, 1]
    turned = np.stack([real * x - imaginary * y, imaginary * x + real * y], axis=2)
    return turned.reshape(rows.shape)


# The basis of the hidden state -------------------------------------------------------------------


def permute_hidden(decoder: Decoder, *, seed: int = 0) -> Decoder:
    """The coordinates of the hidden state in another order and with other signs: the signed
    permutations, under which a norm with weights is what it was."""
    rng = np.random.default_rng(seed)
    order, signs = rng.permutation(decoder.width), rng.choice([-1, 1], decoder.width)

    def reads(matrix: np.ndarray) -> np.ndarray:
        return _columns(matrix[:, order], signs)

    def writes(matrix: np.ndarray) -> np.ndarray:
        return _rows(matrix[order], signs)

    found = _based(decoder, reads, writes)
    wide = ("attention", "mlp", "after attention", "after mlp")

    def change(b: Block, rng: Rng) -> Block:
        norms = {n: g[order] if n in wide else g for n, g in b.norms.items()}
        return replace(b, norms=norms)

    return replace(found.each(change, seed), norm=decoder.norm[order])


def rotate_hidden(decoder: Decoder, *, seed: int = 0) -> Decoder:
    """The hidden state in another orthonormal basis, norms folded in first: the orthogonal group.

    As SliceGPT (arXiv 2401.15024) and QuaRot (arXiv 2404.00456) do. A norm without weights does not
    depend on the basis.
    Raises: WdlibError for a model with norms after attention and MLP, whose weights cannot be
    folded.
    """
    if decoder.has_norms_after:
        raise WdlibError(
            f"the hidden state of a {decoder.config['model_type']} cannot be rotated: it has norms "
            "with weights after attention and MLP; use permute_hidden"
        )
    Q = _rotations(np.random.default_rng(seed), 1, decoder.width)[0].astype(decoder.embedding.dtype)
    return _based(fold_norms(decoder), lambda W: W @ Q.T, lambda W: Q @ W)


def _based(
    decoder: Decoder,
    reads: Callable[[np.ndarray], np.ndarray],
    writes: Callable[[np.ndarray], np.ndarray],
) -> Decoder:
    """The matrices in another basis of the hidden state, by what becomes of columns and of rows."""

    def change(b: Block, rng: Rng) -> Block:
        inward = {t: reads(b.matrices[t]) for types in READS.values() for t in types}
        return b.changed(**inward, **{t: writes(b.matrices[t]) for t in WRITES})

    output = None if decoder.output is None else reads(decoder.output)
    based = replace(decoder, embedding=reads(decoder.embedding), output=output)
    return based.each(change, 0)


# More neurons and layers -------------------------------------------------------------------------


def split_neurons(decoder: Decoder, *, share: float = 0.1, seed: int = 0) -> Decoder:
    """So many of the neurons twice, their columns of down divided among the two at random.

    The widening of Net2Net (arXiv 1511.05641), which no group undoes: the shapes change.
    """
    count = round(share * len(decoder.blocks[0].matrices["up"]))

    def change(b: Block, rng: Rng) -> Block:
        W = b.matrices
        chosen = rng.choice(len(W["up"]), count, replace=False)
        part = np.ones(len(W["up"]))
        part[chosen] = rng.uniform(0.2, 0.8, count)
        rest = _columns(W["down"][:, chosen], 1 - part[chosen])
        down = np.concatenate([_columns(W["down"], part), rest], axis=1)
        wide = {t: np.concatenate([W[t], W[t][chosen]]) for t in READS["mlp"]}
        return b.changed(**wide, down=down)

    return decoder.each(change, seed)


def add_layers(decoder: Decoder, *, every: int = 4) -> Decoder:
    """After every so many layers a copy of the last one that adds nothing: its o and down are zero.

    The expansion of LLaMA Pro (arXiv 2401.02415), before its training.
    """
    blocks: list[Block] = []
    for i, b in enumerate(decoder.blocks):
        blocks.append(b)
        if i % every == every - 1:
            blocks.append(b.changed(**{t: np.zeros_like(b.matrices[t]) for t in WRITES}))
    return replace(decoder, blocks=tuple(blocks))


# All together ------------------------------------------------------------------------------------


def everything(decoder: Decoder, *, strength: float = 1.0, seed: int = 0) -> Decoder:
    """All of the above that keep the shapes, the tokens' order aside, one after the other.

    strength: times half of it is the spread of all scales, four to its power the condition of
    `mix_values`. The hidden state is rotated where that can be, and permuted where not.
    """
    spread = 0.5 * strength
    found = permute_groups(permute_heads(permute_neurons(decoder, seed=seed), seed=seed), seed=seed)
    found = rescale_neurons(rescale_matrices(found, factor=1.5**strength), spread=spread, seed=seed)
    found = turn_pairs(
        mix_values(found, condition=4**strength, seed=seed), spread=spread, seed=seed
    )
    if decoder.has_norms_after:
        found = permute_hidden(fold_norms(found), seed=seed)
    else:
        found = rescale_hidden(rotate_hidden(found, seed=seed), factor=3.0**strength)
    return move_norms(found, spread=spread, seed=seed)


DISGUISES: dict[str, Callable[..., Decoder]] = {
    f.__name__: f
    for f in (
        permute_neurons, permute_heads, permute_groups, permute_tokens, rescale_matrices,
        rescale_neurons, rescale_hidden, fold_norms, move_norms, mix_values, turn_pairs,
        permute_hidden, rotate_hidden, split_neurons, add_layers, everything,
    )
}  # fmt: skip
"""All of them by name."""
