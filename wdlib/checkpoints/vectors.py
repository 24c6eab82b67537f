"""What stands around the projections of a checkpoint: the weights of norms, and the embedding."""

import math
from pathlib import Path

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints import lexicon, quantised, stacks
from wdlib.checkpoints.architectures import place
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.formats import Tensor
from wdlib.checkpoints.headers import read_headers

READS = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
"""The block that a projection begins; o and down end one and read no norm."""


def norms(model: str | Path | Checkpoint, *, stack: str) -> dict[tuple[int, str], np.ndarray]:
    """What the norm before a block multiplies by, by layer and block ("attention" or "mlp").

    A projection W that reads a norm's output acts as W diag(g); a layer of one norm has it before
    both blocks. Blocks without a norm before them, and norms with names that `lexicon` lacks, are
    absent. stack: as `plan` names it.

    Returns: float32 vectors as long as the hidden state.
    Raises: WdlibError as `inventory` does.
    """
    checkpoint = resolve(model)
    configuration, tensors = read_headers(checkpoint)
    kinds = configuration.geometry(stacks.kind(stack)).architectures
    centred = not configuration.is_gguf and set(kinds) & set(lexicon.ZERO_CENTRED.split())
    names: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        where = place(name)
        if where and where.stack == stack and math.prod(tensor.shape) == max(tensor.shape):
            names.setdefault(where.layer, {})[where.inner] = tensor
    found = {}
    for layer, inner in names.items():
        before = {block: _before(block, inner) for block in lexicon.NORMS_BEFORE}
        before["mlp"] = before["mlp"] or before["attention"]
        for block, tensor in before.items():
            if tensor is not None:
                found[layer, block] = _vector(tensor) + np.float32(bool(centred))
    return found


def _before(block: str, inner: dict[str, Tensor]) -> Tensor | None:
    """The norm before a block, of the vectors of a layer by their names."""
    is_after = any(name in inner for name in lexicon.NORMS_AFTER.split())
    for name in lexicon.NORMS_BEFORE[block].split():
        if name in inner and not (is_after and name == "post_attention_layernorm"):
            return inner[name]
    return None


def _vector(tensor: Tensor) -> np.ndarray:
    return _rows(tensor, 1).ravel().astype(np.float32)


def _rows(tensor: Tensor, count: int) -> np.ndarray:
    return quantised.decode(tensor, quantised.read_rows(tensor, 0, count))


def embedding(model: str | Path | Checkpoint, *, rows: int | None = None) -> np.ndarray:
    """The vectors of the first `rows` tokens, or of all: (rows, width) float32.

    Raises: WdlibError as `inventory` does, and where no tensor has the name of an embedding.
    """
    checkpoint = resolve(model)
    known = lexicon.EMBEDDINGS.split()
    for name, tensor in read_headers(checkpoint)[1].items():
        words = name.removesuffix(".weight").split(".")
        if place(name) is None and words[-1] in known and len(tensor.shape) == 2:
            count = tensor.shape[0] if rows is None else min(rows, tensor.shape[0])
            return _rows(tensor, count).astype(np.float32, copy=False)
    raise WdlibError(
        f"{checkpoint.name} has no tensor with the name of an embedding: add it to EMBEDDINGS of "
        "wdlib/checkpoints/lexicon.py."
    )
