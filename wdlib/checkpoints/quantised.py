"""Quantised matrices, which several tensors store together -> float32.

In every format here an entry is (code - zero) * scale, with a zero and a scale for each block of
entries. Formats differ in how codes are packed and how blocks lie; a function below for each.
Values are those of the format's own library in float32; where that library rounds them to half
precision as a last step, they are the ones before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints import formats
from wdlib.checkpoints.formats import VALUE_BYTES, Tensor

_AT_ONCE = 2**18
"""Values that are scaled at once: their scales, one for each, are as large as they."""


@dataclass(frozen=True)
class Stored:
    """A tensor that is part of a quantised matrix, or of a stack of them.

    tensor: of shape (rows, columns), or (matrices, rows, columns). step: rows of the matrix that
    share one of its rows; 0 where its rows are not the matrix's, so that it is read whole.
    """

    tensor: Tensor
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class QuantisedTensor(Tensor):
    """A matrix, or a stack of them, that several tensors store together.

    name, shape: of the matrix unquantised. dtype: the format, in words. file, offset: of its codes.
    size: bytes of all its tensors. format: a key of `DECODERS`. stored: its tensors by their part
    in it. options: what else the decoder needs.
    """

    format: str
    stored: Mapping[str, Stored]
    options: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class UnreadableTensor(Tensor):
    """A matrix that is stored in a way that is not read; reason: why, as half a sentence."""

    reason: str


class Rows(NamedTuple):
    """The bytes of `number` rows of a quantised tensor from `first`, of all its matrices."""

    first: int
    number: int
    raw: Mapping[str, np.ndarray]


def read_rows(
    tensor: Tensor, first: int, count: int, known: Rows | None = None
) -> np.ndarray | Rows:
    """What is stored of `count` rows from row `first`, all axes but the last in one.

    Rows of a quantised tensor are of one matrix. Of tensors whose rows are the matrix's, and of
    stacks, no more is read than is needed. known: other rows of the same tensor, of which is taken
    what is read whole.
    """
    if not isinstance(tensor, QuantisedTensor):
        return formats.read_rows(tensor, first, count)
    matrix, start = divmod(first, tensor.shape[-2])
    raw = {}
    for role, part in tensor.stored.items():
        rows, is_stack = part.tensor.shape[-2], len(part.tensor.shape) == 3
        low, high = 0, rows
        if part.step:
            low, high = start // part.step, -(-(start + count) // part.step)
        elif known and (not is_stack or known.first // tensor.shape[-2] == matrix):
            raw[role] = known.raw[role]
            continue
        above = rows * matrix if is_stack else 0
        raw[role] = formats.read_rows(part.tensor, above + low, high - low)
    return Rows(first, count, raw)


def decode(tensor: Tensor, raw: np.ndarray | Rows) -> np.ndarray:
    """What `read_rows` gave -> float32 (rows, columns); float64 stays what it is.

    Raises WdlibError where the tensors of a matrix contradict each other.
    """
    if isinstance(raw, np.ndarray):
        return formats.decode(raw, tensor.dtype)
    assert isinstance(tensor, QuantisedTensor)
    parts = {role: _array(raw.raw[role], part.tensor) for role, part in tensor.stored.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused with its tensor's name
        return DECODERS[tensor.format](tensor, raw, parts)


def _array(raw: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Bytes of one tensor -> numbers: integers as they are, all others as float32 of their own."""
    if tensor.dtype[0] in "IU" and tensor.dtype in VALUE_BYTES:
        return raw.view(f"<{tensor.dtype[0].lower()}{VALUE_BYTES[tensor.dtype]}")
    values = formats.decode(raw, tensor.dtype).astype(np.float32, copy=False)
    return values.copy() if np.may_share_memory(values, raw) else values


# Codes and scales --------------------------------------------------------------------------------

_Parts = Mapping[str, np.ndarray]

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
"""The 16 values of an FP4 number (Open Compute Project 2023, *Microscaling formats*, table 5)."""


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes that lie one after the other from the lowest bit on: (rows, words) -> (rows, codes).

    words: of any integer type, little-endian; a code may begin in one and end in the next.
    """
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if 8 % bits == 0:
        codes = np.empty((*raw.shape, 8 // bits), np.uint8)
        for place in range(8 // bits):
            np.bitwise_and(raw >> (bits * place), 2**bits - 1, out=codes[..., place])
        return codes.reshape(len(raw), -1)
    single = np.unpackbits(raw, axis=1, bitorder="little")
    whole = single[:, : single.shape[1] // bits * bits].reshape(len(raw), -1, bits)
    return np.packbits(whole, axis=2, bitorder="little")[..., 0]


def _scale(
    values: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None = None,
    *,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """(values - zeros) * scales, in place.

    Arguments: values, float32 (n, m); scales, zeros, float32 (r, c); rows (n,), columns (m,), the
    row and the column of scales and zeros for each of values', where they are not one each.
    """
    some = max(1, _AT_ONCE // values.shape[1])
    for first in range(0, len(values), some):
        part = values[first : first + some]
        for grid, apply in ((zeros, np.subtract), (scales, np.multiply)):
            if grid is None:
                continue
            if len(grid) > 1:
                lines = slice(first, first + some)
                grid = grid[lines if rows is None else rows[lines]]
            if grid.shape[1] > 1 and columns is not None:
                grid = np.take(grid, columns, axis=1)
            apply(part, grid, out=part)
    return values


def _in_blocks(
    tensor: QuantisedTensor, given: Rows, values: np.ndarray, parts: _Parts
) -> np.ndarray:
    """Scale values by blocks of "rows" x "columns" (options of the tensor), whose scales are read.

    A part "zero" is taken off first.
    """
    rows, columns = int(tensor.options["rows"]), int(tensor.options["columns"])
    start = given.first % tensor.shape[-2]
    zeros = parts.get("zero")
    return _scale(
        values,
        parts["scale"],
        None if zeros is None else zeros.astype(np.float32),
        rows=(np.arange(given.number) + start) // rows - start // rows,
        columns=np.arange(values.shape[1]) // columns,
    )


# One function for each format --------------------------------------------------------------------


def _scaled(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """FP8, MXFP8 and 8-bit integers: each value of `weight`, in blocks, times `scale`."""
    return _in_blocks(tensor, given, parts["weight"].astype(np.float32, copy=False), parts)


def _fp4(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """MXFP4 and NVFP4: two codes a byte, the lower half first, with a scale for 32 or 16 in a row.

    NVFP4 has a second scale, of the whole matrix: modelopt multiplies by it, compressed-tensors
    divides by it.
    """
    scale = parts["scale"]
    if "factor" in parts:
        scale = scale * parts["factor"]
    if "divisor" in parts:
        scale = scale / parts["divisor"]
    values = _E2M1[_unpacked(parts["weight"], 4)]
    if not tensor.options.get("transposed"):
        return _in_blocks(tensor, given, values, {"scale": scale})
    _scale(values, scale, columns=np.arange(values.shape[1]) // int(tensor.options["columns"]))
    start = given.first % tensor.shape[-2]
    return np.ascontiguousarray(values.T[start : start + given.number])


def _packed(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """compressed-tensors' pack-quantized: codes along the rows, zeros along the columns."""
    bits, columns = int(tensor.options["bits"]), tensor.shape[-1]
    if "shape" in parts and parts["shape"].tolist() != [list(tensor.shape)]:
        raise WdlibError(
            f"{tensor.name} of {tensor.file.name} has the shape {parts['shape'].tolist()[0]}, and "
            f"{tensor.shape} by config.json: take the configuration that came with the weights."
        )
    values = _unpacked(parts["weight"], bits)[:, :columns].astype(np.float32)
    zero = None
    if "zero" in parts:
        start = given.first % tensor.shape[-2]
        zero = _unpacked(parts["zero"].T, bits).T[start : start + given.number]
    middle = np.full((given.number, 1), 2 ** (bits - 1), np.float32)
    return _scale(
        values,
        parts["scale"],
        middle if zero is None else zero.astype(np.float32),
        columns=_groups(tensor, parts),
    )


def _groups(tensor: QuantisedTensor, parts: _Parts) -> np.ndarray:
    """The group of each column, of which there are as many as columns of scales."""
    number, columns = int(tensor.options["groups"]), tensor.shape[-1]
    if "order" not in parts:
        return np.arange(columns) // (columns // number)
    groups = parts["order"].ravel()
    if groups.min() < 0 or groups.max() >= number:
        raise WdlibError(
            f"{tensor.name} of {tensor.file.name} names a group that its {number} groups of scales "
            "do not hold: the file is damaged, download it again."
        )
    return groups


def _gptq(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """GPTQ: transposed, codes packed along the inputs, zeros along the outputs.

    The first version stores zeros less one, GPTQModel's word by word, so that a zero of 0 borrows
    from the next code and its reading gives that back.
    """
    bits, start = int(tensor.options["bits"]), given.first
    kept = slice(start, start + given.number)
    zeros = parts["zero"].view(np.uint32)
    if tensor.options["version"] == 1 and 32 % bits == 0:
        zeros = zeros + np.uint32(sum(1 << place for place in range(0, 32, bits)))
    codes = _unpacked(zeros, bits)
    if tensor.options["version"] == 1 and 32 % bits:
        codes = codes + 1 & 2**bits - 1
    return _scale(
        _unpacked(parts["weight"][:, kept].T, bits).astype(np.float32),
        np.ascontiguousarray(parts["scale"][:, kept].T),
        codes[:, kept].T.astype(np.float32),
        columns=_groups(tensor, parts),
    )


_AWQ_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
"""The outputs whose codes a word holds, from the lowest bits on, by the number of bits."""


def _awq(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """AWQ: transposed, codes and zeros packed along the outputs, mixed within each word."""
    bits, start = int(tensor.options["bits"]), given.first
    kept = slice(start, start + given.number)

    def codes(words: np.ndarray) -> np.ndarray:
        turned = np.ascontiguousarray(words.T).view(np.uint32)
        found = np.empty((len(turned), 32 // bits, len(words)), np.uint8)
        for place, output in enumerate(_AWQ_ORDER[bits]):
            found[:, output] = turned >> np.uint32(bits * place) & np.uint32(2**bits - 1)
        return found.reshape(-1, len(words))[kept]

    return _scale(
        codes(parts["weight"]).astype(np.float32),
        np.ascontiguousarray(parts["scale"][:, kept].T),
        codes(parts["zero"]).astype(np.float32),
        columns=_groups(tensor, parts),
    )


def _bitsandbytes_4bit(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """NF4 and FP4 of bitsandbytes: two codes a byte, the upper half first; blocks run on over rows.

    Its own table of 16 values is stored with each matrix. Double quantisation stores the scales of
    the blocks so too, as 8-bit codes less their mean.
    """
    size = int(tensor.options["block"])
    scales = parts["scale"].ravel()
    if "nested_scale" in parts:
        above = np.repeat(parts["nested_scale"].ravel(), int(tensor.options["nested_block"]))
        scales = parts["nested_table"].ravel()[scales] * above[: len(scales)]
        scales += np.float32(tensor.options["offset"])
    raw = parts["weight"].view(np.uint8)
    codes = np.empty((*raw.shape, 2), np.uint8)
    np.right_shift(raw, 4, out=codes[..., 0])
    np.bitwise_and(raw, 15, out=codes[..., 1])
    values = parts["table"].ravel()[codes].ravel()
    start = given.first * tensor.shape[-1]
    for low in range(0, len(values), _AT_ONCE):
        part = values[low : low + _AT_ONCE]
        first, last = start + low, start + low + len(part)
        factors = np.repeat(scales[first // size : -(-last // size)], size)
        part *= factors[first % size :][: len(part)]
    return values.reshape(given.number, tensor.shape[-1])


def _bitsandbytes_8bit(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """LLM.int8() of bitsandbytes: each row times its largest value, over 127."""
    if "layout" in parts and parts["layout"].any():
        raise WdlibError(
            f"{tensor.name} of {tensor.file.name} is in the order of one kind of GPU, as early "
            "versions of bitsandbytes stored it: load it with them and save it again."
        )
    values = _scale(parts["weight"].astype(np.float32), parts["scale"])
    values *= np.float32(1 / 127)
    return values


def _gguf(tensor: QuantisedTensor, given: Rows, parts: _Parts) -> np.ndarray:
    """A tensor of a GGUF file, of any type, times the scale that stands beside it."""
    return _scale(parts["weight"], parts["scale"])


DECODERS: Mapping[str, Callable[[QuantisedTensor, Rows, _Parts], np.ndarray]] = {
    "scaled": _scaled,
    "fp4": _fp4,
    "packed": _packed,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes 4-bit": _bitsandbytes_4bit,
    "bitsandbytes 8-bit": _bitsandbytes_8bit,
    "gguf": _gguf,
}
"""Format -> the function that makes float32 of its codes and scales."""
