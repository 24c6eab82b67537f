"""Bytes as they are stored -> float32."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints.hub import RemoteFile

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""Numpy has no bfloat16: its bits, under that name."""

STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}
"""Types of the values that are stored as they are, for the data types that are read exactly."""

_PIECE = 2**16
"""Values that gguf decodes at a time: what it makes on the way then stays in the cache."""


def _fp8_e4m3() -> np.ndarray:
    """The 256 values of an FP8 number with 4 bits of exponent, without infinities.

    Source: Micikevicius et al. 2022, *FP8 formats for deep learning*, arXiv 2209.05433, table 1.
    """
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent, np.ldexp(8 + fraction, exponent - 10), np.ldexp(fraction, -9))
    size[codes & 127 == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


_TABLES = {
    "F8_E4M3": _fp8_e4m3(),
    # The upper half of a float16.
    "F8_E5M2": (np.arange(256, dtype="<u2") << 8).view("<f2").astype(np.float32),
    # Powers of two, as scales of the MX formats (Open Compute Project 2023, section 5.4.1).
    "F8_E8M0": np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)),
}
"""The value of each byte, by data type."""

EXACT = (*STORED, "F8_E4M3", "F8_E5M2")
"""Data types of numbers that stand for themselves."""

VALUE_BYTES = {t: kind.itemsize for t, kind in STORED.items()} | dict.fromkeys(_TABLES, 1)
VALUE_BYTES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)} | {"BOOL": 1}
"""Bytes of a value, by data type of safetensors."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `size` bytes at `offset` of `file`, row-major, last axis fastest."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | RemoteFile
    offset: int
    size: int


def read_rows(tensor: Tensor, first: int, count: int) -> np.ndarray:
    """The bytes (rows, bytes per row) of `count` rows from row `first`, all axes but the last."""
    row = tensor.size // math.prod(tensor.shape[:-1])
    raw = np.empty((count, row), np.uint8)
    buffer, offset = raw.data.cast("B"), tensor.offset + first * row
    if isinstance(tensor.file, RemoteFile):
        tensor.file.read_into(offset, buffer)
        return raw
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(buffer):
            got = file.readinto(buffer[done:])
            if not got:
                raise WdlibError(
                    f"{tensor.file} ends inside the tensor {tensor.name}: download it again."
                )
            done += got
    return raw


def widen(values: np.ndarray) -> np.ndarray:
    """BFLOAT16 -> float32, of the same shape; other types stay what they are."""
    if values.dtype != BFLOAT16:
        return values
    wide = values.view("<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes (rows, bytes per row) -> float32 (rows, columns); float64 stays what it is."""
    if dtype in _TABLES:
        return _TABLES[dtype][raw]
    if dtype in STORED:
        values = widen(raw.view(STORED[dtype]))
        return values if dtype == "F64" else values.astype(np.float32, copy=False)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType[dtype]
    block, size = GGML_QUANT_SIZES[kind]
    matrix = np.empty((len(raw), raw.shape[1] // size * block), np.float32)
    step = max(1, _PIECE // matrix.shape[1])
    for i in range(0, len(raw), step):  # as one row: gguf would take 16 at a time, however short
        piece = quants.dequantize(raw[i : i + step].reshape(1, -1), kind)
        matrix[i : i + step] = piece.reshape(-1, matrix.shape[1])
    return matrix


def check_readable(tensor: Tensor) -> None:
    if tensor.dtype in STORED:
        return
    remedy = "use the unquantised checkpoint or a GGUF file of the model"
    if tensor.file.suffix == ".gguf":
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType[tensor.dtype]
            decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), tensor.dtype)
            return
        except (KeyError, NotImplementedError):
            remedy = "use a file of the model with another quantisation, or a newer gguf package"
    raise WdlibError(
        f"The tensor {tensor.name} of {tensor.file.name} is stored as {tensor.dtype}, which cannot "
        f"be turned into float32 here: {remedy}."
    )
