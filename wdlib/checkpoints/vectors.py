"""What stands around the projections of a checkpoint: its norms, and the embedding."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints import lexicon, quantised
from wdlib.checkpoints.architectures import place
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.formats import Tensor
from wdlib.checkpoints.headers import read_headers
from wdlib.checkpoints.plan import Plan

_BLOCKS = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
"""The block that a projection begins; o and down end one and read no norm."""

_AMBIGUOUS = "post_attention_layernorm"


@dataclass(frozen=True)
class Norms:
    """The norms of a layer.

    before: what the norm before a block multiplies by, float32 of the hidden state's size, by block
    ("attention" or "mlp"); a block without such a norm, or with one whose name `lexicon` lacks, is
    absent. after: the types of projections whose output is normalised.
    """

    before: Mapping[str, np.ndarray]
    after: frozenset[str]

    def read_by(self, type: str) -> np.ndarray | None:
        """What the norm that a projection reads multiplies by: W acts as W diag(g)."""
        return self.before.get(_BLOCKS.get(type, ""))


def norms(plan: Plan, layers: Iterable[int]) -> dict[int, Norms]:
    """The norms of some layers of a stack. A layer of one norm has it before both blocks.

    Raises: WdlibError for a file that ends too early.
    """
    names: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    for name, tensor in plan.vectors.items():
        where = place(name)
        if where and where.layer in names:
            names[where.layer][where.inner] = tensor
    kinds = set(plan.geometry.architectures) & set(lexicon.ZERO_CENTRED.split())
    return {layer: _norms(own, centred=bool(kinds)) for layer, own in names.items()}


def _norms(vectors: Mapping[str, Tensor], *, centred: bool) -> Norms:
    """The norms among the vectors of a layer, by their names. centred: see `ZERO_CENTRED`."""
    after = {t for t, known in lexicon.NORMS_AFTER.items() if vectors.keys() & set(known.split())}
    own = dict(vectors)
    if "down" in after and _AMBIGUOUS in own:
        after.add("o")
        del own[_AMBIGUOUS]
    before: dict[str, np.ndarray] = {}
    for block, known in lexicon.NORMS_BEFORE.items():
        tensor = next((own[name] for name in known.split() if name in own), None)
        if tensor is not None:
            lacking = centred and tensor.file.suffix != ".gguf"
            before[block] = _rows(tensor, 1).ravel() + np.float32(lacking)
    if "attention" in before:
        before.setdefault("mlp", before["attention"])
    return Norms(before, frozenset(after))


def embedding(model: str | Path | Checkpoint, *, rows: int | None = None) -> np.ndarray:
    """The vectors of the first `rows` tokens, or of all: (rows, width) float32.

    Raises: WdlibError as `inventory` does, and where no tensor has the name of an embedding.
    """
    checkpoint = resolve(model)
    known = lexicon.EMBEDDINGS.split()
    for name, tensor in read_headers(checkpoint)[1].items():
        words = name.removesuffix(".weight").split(".")
        if place(name) is None and words[-1] in known and len(tensor.shape) == 2:
            return _rows(tensor, tensor.shape[0] if rows is None else min(rows, tensor.shape[0]))
    raise WdlibError(
        f"{checkpoint.name} has no tensor with the name of an embedding: add it to EMBEDDINGS of "
        "wdlib/checkpoints/lexicon.py."
    )


def _rows(tensor: Tensor, count: int) -> np.ndarray:
    """The first rows of a tensor, (count, columns) float32."""
    rows = quantised.decode(tensor, quantised.read_rows(tensor, 0, count))
    return rows.astype(np.float32, copy=False)
