"""Checkpoint -> stream of weight matrices (layer, type, matrix), one in memory at a time.

A tensor's bytes are read only when its matrix is asked for, with plain reads (a memory map would
make the resident set grow to the file's size), or as ranges of a file on the hub. While a matrix is
in use, the bytes of the next are being read.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints.files import Checkpoint
from wdlib.checkpoints.formats import STORED
from wdlib.checkpoints.plan import Part, projection_parts
from wdlib.checkpoints.quantised import Rows, decode, read_rows


@dataclass(frozen=True)
class Projection:
    """One matrix W[layer, type] of shape (d_out, d_in), as `torch.nn.Linear` stores it.

    matrix: float32, or float64 where it is stored so: never narrower than stored.
    """

    layer: int
    type: str
    name: str
    matrix: np.ndarray
    expert: int | None = None


def projections(
    model: str | Path | Checkpoint,
    *,
    layers: Iterable[int] | None = None,
    types: Iterable[str] | None = None,
    stack: str | None = None,
) -> Iterator[Projection]:
    """Stream the weight matrices W[l, p] (arXiv 2509.00046, section 2), one in memory at a time.

    Arguments and errors as `projection_parts` has them, at once; while streaming, WdlibError for a
    matrix that holds NaN or infinity or cannot be read.
    """
    return read_all(projection_parts(model, layers=layers, types=types, stack=stack))


def read(part: Part, *, decoded: bool = True) -> Projection:
    """One matrix of a plan, from where it is stored. Raises WdlibError as `projections` does.

    decoded: False leaves a matrix of 16-bit floats in them (`formats.BFLOAT16`), unchecked.
    """
    raw = read_rows(part.tensor, *part.rows)
    if decoded or part.tensor.dtype not in STORED or not isinstance(raw, np.ndarray):
        return _projection(part, _matrix(part, raw))
    return _projection(part, _laid_out(part, raw.view(STORED[part.tensor.dtype])))


def read_all(parts: Sequence[Part]) -> Iterator[Projection]:
    """The matrices of a plan in its order; while one is in use, the bytes of the next are read.

    Holds one float32 matrix, if the caller drops it, and the next one's bytes. A tensor that has to
    be read whole for several matrices is read once, if they follow each other.

    Raises WdlibError as `projections` does.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[np.ndarray | Rows] | None = None
        for part, following in zip_longest(parts, parts[1:]):
            ahead = ahead or pool.submit(read_rows, part.tensor, *part.rows)
            raw = ahead.result()
            made = [_projection(part, _matrix(part, raw))]
            # Only now: two matrices as stored and one in float32 would be the peak otherwise.
            again = following and (following.tensor, following.rows) == (part.tensor, part.rows)
            same = following and following.tensor == part.tensor
            known = [raw] if same and isinstance(raw, Rows) else []
            del raw
            if not again:
                ahead = None
            if following and not again:
                ahead = pool.submit(read_rows, following.tensor, *following.rows, *known)
            del known
            yield made.pop()  # a variable of this function would keep it alive


def requantise(projection: Projection, kind: str) -> Projection:
    """A projection as it comes back after being stored in a GGUF type ("Q4_1", "Q8_0", ...).

    Raises WdlibError for a type that cannot be written, or whose blocks do not fit the rows.
    """
    from gguf import GGMLQuantizationType, QuantError, quants

    try:
        stored = quants.quantize(
            projection.matrix.astype(np.float32, copy=False), GGMLQuantizationType[kind]
        )
    except (KeyError, NotImplementedError, QuantError) as error:
        raise WdlibError(
            f"The tensor {projection.name} of shape {projection.matrix.shape} cannot be stored as "
            f"{kind}: choose one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, and rows of a multiple of 32."
        ) from error
    matrix = quants.dequantize(stored, GGMLQuantizationType[kind])
    return dataclasses.replace(projection, matrix=matrix)


def _projection(part: Part, matrix: np.ndarray) -> Projection:
    entry = part.entry
    return Projection(entry.layer, entry.type, entry.name, matrix, entry.expert)


def _matrix(part: Part, raw: np.ndarray | Rows) -> np.ndarray:
    """One matrix from the bytes of its rows: (d_out, d_in), C order."""
    tensor = part.tensor
    matrix = _laid_out(part, decode(tensor, raw))
    if not np.isfinite(matrix).all():
        raise WdlibError(
            f"The tensor {tensor.name} of {tensor.file.name} holds NaN or infinity: the file is "
            "damaged, or the training diverged; take another copy or checkpoint."
        )
    return matrix


def _laid_out(part: Part, matrix: np.ndarray) -> np.ndarray:
    """The matrix that a part is of its tensor's rows, whatever the type of their values."""
    entry = part.entry
    if part.transposed:
        blocks = matrix.reshape(part.transposed, -1, matrix.shape[1])
        matrix = blocks.swapaxes(1, 2).reshape(-1, entry.shape[1])
    if part.transposed or part.groups > 1:
        grouped = matrix.reshape(part.groups, -1, entry.shape[1])
        matrix = grouped[:, part.start : part.start + part.size].reshape(entry.shape)
        matrix = np.ascontiguousarray(matrix)
    if part.rope_heads:
        matrix = matrix.reshape(part.rope_heads, -1, 2, entry.shape[1])
        matrix = matrix.swapaxes(1, 2).reshape(entry.shape)
    return matrix
