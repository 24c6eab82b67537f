"""Which tensors store a quantised matrix together, by format: names, shapes and options.

A function for each way to store one. It gives the matrix, to be read by the decoder of its format
in `quantised`; one that is not read, if its tensors do not fit each other; or None.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from wdlib import WdlibError
from wdlib.checkpoints.formats import Tensor, read_rows
from wdlib.checkpoints.quantised import QuantisedTensor, Stored, UnreadableTensor

AT_ONCE = 8
"""Small tensors that have to be read for a shape are read so many at a time."""

Tensors = Mapping[str, Tensor]

_Settings = Mapping[str, Any]
"""`quantization_config` of config.json."""


def matrix(name: str, tensor: Tensor, tensors: Tensors, settings: _Settings) -> Tensor | None:
    """The matrix whose codes a tensor is, of any format but bitsandbytes' of 4 bits."""
    readers = (_llm_int8, _scaled, _modelopt_fp4, _packed, _blocks, _gptq_or_awq)
    found = (reader(name, tensor, tensors, settings) for reader in readers)
    return next(filter(None, found), None)


def joined(
    name: str,
    shape: tuple[int, ...],
    format: tuple[str, str],
    stored: Mapping[str, Stored],
    options: Mapping[str, float],
) -> QuantisedTensor:
    """A quantised tensor; format: the key of its decoder, and its name in words."""
    codes = stored["weight"].tensor
    return QuantisedTensor(
        name=name,
        shape=shape,
        dtype=format[1],
        file=codes.file,
        offset=codes.offset,
        size=sum(part.tensor.size for part in stored.values()),
        format=format[0],
        stored=stored,
        options=options,
    )


def unreadable(tensor: Tensor, name: str, reason: str) -> UnreadableTensor:
    """A matrix that is not read; reason: half a sentence, to which the remedy is added."""
    return UnreadableTensor(
        name=name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        file=tensor.file,
        offset=tensor.offset,
        size=tensor.size,
        reason=f"{reason}: use the unquantised checkpoint or a GGUF file of the model",
    )


def scale_grid(scales: Tensor, stack: tuple[int, ...], rows: int) -> Tensor | None:
    """Scales as a grid (rows, columns) for a matrix of so many rows, or as a stack of such grids.

    A single number is a grid of one. A vector has a number for each row, or for each matrix of a
    stack. None for other shapes.
    """
    if math.prod(scales.shape) == 1:
        return _shaped(scales, 1, 1)
    if len(scales.shape) == len(stack) + 2 and scales.shape[: len(stack)] == stack:
        return scales
    if scales.shape == stack:
        return _shaped(scales, *stack, 1, 1)
    if scales.shape == (*stack, rows):
        return _shaped(scales, *stack, rows, 1)
    return None


def _shaped(tensor: Tensor, *shape: int, dtype: str = "") -> Tensor:
    return dataclasses.replace(tensor, shape=shape, dtype=dtype or tensor.dtype)


def _block(length: int, scales: int, declared: Iterable[int]) -> int:
    """How many entries share a scale: as the configuration says, if it fits, or in equal parts.

    0 where they do not come in equal parts.
    """
    for size in declared:
        if size > 0 and -(-length // size) == scales:
            return size
    return length // scales if scales and length % scales == 0 else 0


def _weights(settings: _Settings) -> Iterator[Mapping[str, Any]]:
    """How weights are quantised, by each of the groups of a configuration of compressed-tensors."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _declared(settings: _Settings) -> tuple[list[int], list[int]]:
    """Rows and columns of the blocks that share a scale, as a configuration names them."""
    shapes = [settings.get("weight_block_size")]
    shapes += [weights.get("block_structure") for weights in _weights(settings)]
    pairs = [s for s in shapes if isinstance(s, list) and [type(n) for n in s] == [int, int]]
    return [rows for rows, _ in pairs], [columns for _, columns in pairs]


# A value for each entry: FP8 and 8-bit integers --------------------------------------------------

_SCALES = ("{0}_scale_inv", "{0}_scale", "{1}.scale", "{1}.qscale_weight")
"""Names of the scales of a tensor {0}, in the module {1}; all of them multiply.

Those of DeepSeek-V3 and transformers; of compressed-tensors, fbgemm and modelopt; of DeepSeek-V4;
of Mistral.
"""


def _scaled(name: str, tensor: Tensor, tensors: Tensors, settings: _Settings) -> Tensor | None:
    """FP8 and 8-bit integers: scales for blocks of any size, and zeros of the same blocks."""
    if tensor.dtype not in ("F8_E4M3", "F8_E5M2", "I8") or len(tensor.shape) not in (2, 3):
        return None
    names = (pattern.format(name, name.rpartition(".")[0]) for pattern in _SCALES)
    scale = next((tensors[n] for n in names if n in tensors and n != name), None)
    if scale is None:
        return None
    if tensor.dtype == "I8" and scale.dtype == "F8_E8M0":  # of DeepSeek-V4: two codes a byte
        return _fp4(name, tensor, scale, {})
    exponents = scale.dtype in ("U8", "F8_E8M0")
    scale = _shaped(scale, *scale.shape, dtype="F8_E8M0" if exponents else "")
    *stack, rows, columns = tensor.shape
    grid = scale_grid(scale, tuple(stack), rows)
    of_rows, of_columns = _declared(settings)
    height = _block(rows, grid.shape[-2], of_rows) if grid else 0
    width = _block(columns, grid.shape[-1], of_columns) if grid else 0
    if not grid or not height or not width:
        return _unfitting(name, tensor, scale)
    stored = {"weight": Stored(tensor, 1), "scale": Stored(grid, height)}
    if zero := tensors.get(f"{name}_zero_point"):
        if math.prod(zero.shape) != math.prod(grid.shape):
            return _unfitting(name, tensor, zero)
        stored["zero"] = Stored(_shaped(zero, *grid.shape), height)
    words = {"F8_E4M3": "FP8 E4M3", "F8_E5M2": "FP8 E5M2", "I8": "INT8"}[tensor.dtype]
    words = f"{'MX' * exponents}{words} {height}x{width}"
    options = {"rows": height, "columns": width}
    return joined(name, tensor.shape, ("scaled", words), stored, options)


def _unfitting(name: str, codes: Tensor, *others: Tensor) -> UnreadableTensor:
    shapes = " and ".join(f"{t.name} of shape {t.shape}" for t in others)
    return unreadable(codes, name, f"{shapes} does not fit its codes of shape {codes.shape}")


def _llm_int8(name: str, tensor: Tensor, tensors: Tensors, settings: _Settings) -> Tensor | None:
    """LLM.int8() of bitsandbytes: weight, SCB (one number a row), weight_format."""
    module = name.removesuffix(".weight")
    scale = tensors.get(f"{module}.SCB")
    if tensor.dtype != "I8" or not scale or len(tensor.shape) != 2:
        return None
    if scale.shape != tensor.shape[:1]:
        return _unfitting(name, tensor, scale)
    stored = {"weight": Stored(tensor, 1), "scale": Stored(_shaped(scale, *scale.shape, 1), 1)}
    if layout := tensors.get(f"{module}.weight_format"):
        stored["layout"] = Stored(_shaped(layout, 1, 1))
    return joined(name, tensor.shape, ("bitsandbytes 8-bit", "LLM.int8()"), stored, {})


# FP4 ---------------------------------------------------------------------------------------------


def _fp4(name: str, codes: Tensor, scale: Tensor, more: Tensors) -> Tensor:
    """MXFP4 or NVFP4 with codes (..., rows, columns / 2), in blocks of one row.

    more: the second scale, a single number or one for each matrix, as "factor" or "divisor".
    """
    *stack, rows, half = codes.shape
    powers = scale.dtype in ("U8", "F8_E8M0")
    words, width = ("MXFP4", 32) if powers else ("NVFP4", 16)
    grids = {role: scale_grid(tensor, tuple(stack), rows) for role, tensor in more.items()}
    single = all(grid and grid.shape[-2:] == (1, 1) for grid in grids.values())
    if scale.shape[:-1] != codes.shape[:-1] or scale.shape[-1] * width != 2 * half or not single:
        return _unfitting(name, codes, scale, *more.values())
    stored = {
        "weight": Stored(_shaped(codes, *codes.shape, dtype="U8"), 1),
        "scale": Stored(_shaped(scale, *scale.shape, dtype="F8_E8M0" if powers else ""), 1),
    }
    stored |= {role: Stored(grid) for role, grid in grids.items() if grid}
    options = {"rows": 1, "columns": width}
    return joined(name, (*stack, rows, 2 * half), ("fp4", words), stored, options)


def _modelopt_fp4(
    name: str, tensor: Tensor, tensors: Tensors, settings: _Settings
) -> Tensor | None:
    """NVFP4 as modelopt names it: weight, weight_scale, weight_scale_2."""
    scale, factor = tensors.get(f"{name}_scale"), tensors.get(f"{name}_scale_2")
    if tensor.dtype != "U8" or not scale or not factor or scale.dtype != "F8_E4M3":
        return None
    return _fp4(name, tensor, scale, {"factor": factor})


def _blocks(name: str, tensor: Tensor, tensors: Tensors, settings: _Settings) -> Tensor | None:
    """MXFP4 of gpt-oss: blocks (experts, outputs, groups, 16), scales (experts, outputs, groups).

    The matrix is (experts, inputs, outputs), as transformers has it unquantised.
    """
    base = name.removesuffix("_blocks")
    scale = tensors.get(f"{base}_scales")
    if name == base or not scale or tensor.shape != (*scale.shape, 16) or len(tensor.shape) != 4:
        return None
    experts, rows, groups, half = tensor.shape
    stored = {
        "weight": Stored(_shaped(tensor, experts, rows, groups * half, dtype="U8")),
        "scale": Stored(_shaped(scale, *scale.shape, dtype="F8_E8M0")),
    }
    options = {"columns": 2 * half, "transposed": 1}
    return joined(base, (experts, 2 * groups * half, rows), ("fp4", "MXFP4"), stored, options)


# Integers in words of 32 bits --------------------------------------------------------------------


def _packed(name: str, tensor: Tensor, tensors: Tensors, settings: _Settings) -> Tensor | None:
    """compressed-tensors' weight_packed: FP4 codes, or integers in words of 32 bits."""
    if not name.endswith(".weight_packed"):
        return None
    base = name.removesuffix("_packed")
    parts = ("scale", "global_scale", "shape", "zero_point", "g_idx")
    scale, divisor, shape, zero, order = (tensors.get(f"{base}_{part}") for part in parts)
    if tensor.dtype == "U8" and scale and len(tensor.shape) in (2, 3):
        return _fp4(base, tensor, scale, {"divisor": divisor} if divisor else {})
    if tensor.dtype != "I32" or len(tensor.shape) != 2 or not scale or not shape:
        return unreadable(tensor, base, f"{name} is packed in a way that is not known")
    rows = tensor.shape[0]
    columns, bits = _width(tensor.shape[1], shape, settings)
    grid = scale_grid(scale, (), rows)
    if not bits or not grid or grid.shape[0] not in (1, rows) or columns % grid.shape[1]:
        return _unfitting(base, tensor, scale, shape)
    stored = {
        "weight": Stored(tensor, 1),
        "scale": Stored(grid, int(grid.shape[0] == rows)),
        "shape": Stored(_shaped(shape, 1, 2)),
    }
    if zero:
        stored["zero"] = Stored(zero)
    if order:
        stored["order"] = Stored(_shaped(order, 1, *order.shape))
    options = {"bits": bits, "groups": grid.shape[1]}
    return joined(base, (rows, columns), ("packed", f"INT{bits} packed"), stored, options)


def _width(words: int, shape: Tensor, settings: _Settings) -> tuple[int, int]:
    """Columns of a packed matrix and bits of its codes; bits 0 where nothing fits.

    By config.json where it names one number of bits, or else by the shape that is stored, which
    takes a read.
    """
    named = {weights.get("num_bits") for weights in _weights(settings)}
    fitting = [bits for bits in range(1, 9) if named == {bits} and 32 * words % bits == 0]
    if fitting:
        return 32 * words // fitting[0], fitting[0]
    columns = int(read_rows(_shaped(shape, 1, 2), 0, 1).view("<i8")[0, 1])
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == words]
    return columns, fitting[0] if len(fitting) == 1 else 0


_PACKINGS = {
    "gptq": 1, "auto_round:auto_gptq": 1, "gptq_v2": 2, "auto_round": 2, "auto_round:gptqmodel": 2,
    "gemm": 0, "auto_round:auto_awq": 0,
}  # fmt: skip
"""Ways to pack a qweight, by the name in config.json -> version of GPTQ, or 0 for AWQ."""


def _packing(settings: _Settings) -> str:
    """The name of the way in which words of a qweight are packed, in small letters."""
    keys = {
        "gptq": ("checkpoint_format", "format"),
        "awq": ("checkpoint_format", "format", "version"),
        "auto-round": ("packing_format",),
        "intel/auto-round": ("packing_format",),
    }
    usual = {"gptq": "gptq", "awq": "gemm"}
    method = str(settings.get("quant_method")).lower()
    named = (settings.get(key) for key in keys.get(method, ()))
    return str(next(filter(None, named), usual.get(method, method))).lower()


def _gptq_or_awq(name: str, tensor: Tensor, tensors: Tensors, settings: _Settings) -> Tensor | None:
    """GPTQ: qweight (inputs, outputs), of which inputs are packed; AWQ: outputs are.

    With qzeros, of which outputs are packed, and scales (groups, outputs). GPTQ may have g_idx, the
    group of each input.
    """
    if not name.endswith(".qweight"):
        return None
    module, packing = name.removesuffix(".qweight"), _packing(settings)
    zero, scale, order = (tensors.get(f"{module}.{n}") for n in ("qzeros", "scales", "g_idx"))
    target = f"{module}.weight"
    if not settings:
        reason = "config.json beside the file, which says how its words are packed, is not there"
        return unreadable(tensor, target, reason)
    if packing not in _PACKINGS or not zero or not scale:
        return unreadable(tensor, target, f"its words are packed as {packing}")
    if not len(tensor.shape) == len(zero.shape) == len(scale.shape) == 2:
        return _unfitting(target, tensor, zero, scale)
    (lines, across), (groups, rows), version = tensor.shape, scale.shape, _PACKINGS[packing]
    bits = 32 * zero.shape[1] // max(rows, 1)
    if version:
        fits = across == rows and bits in (2, 3, 4, 8) and lines * 32 % bits == 0
        columns, tool = lines * 32 // bits if fits else 0, "GPTQ"
    else:
        fits = across * 32 == rows * bits and bits in (4, 8) and not order
        columns, tool = lines, "AWQ"
    fits = fits and zero.shape[0] == groups and zero.shape[1] * 32 == rows * bits
    if not fits or columns % groups or (order and order.shape != (columns,)):
        return _unfitting(target, tensor, zero, scale)
    stored = {"weight": Stored(tensor), "zero": Stored(zero), "scale": Stored(scale)}
    if order:
        stored["order"] = Stored(_shaped(order, 1, *order.shape))
    options = {"bits": bits, "groups": groups, "version": version}
    return joined(target, (rows, columns), (tool.lower(), f"{tool} {bits}-bit"), stored, options)


# bitsandbytes' of 4 bits -------------------------------------------------------------------------

_STATE = ".quant_state.bitsandbytes__"
_STATE_PARTS = {
    "scale": "absmax", "table": "quant_map", "nested_scale": "nested_absmax",
    "nested_table": "nested_quant_map",
}  # fmt: skip


def bitsandbytes_4bit(tensors: Tensors) -> tuple[dict[str, Tensor], set[str]]:
    """NF4 and FP4 of bitsandbytes: weight, and below it absmax, quant_map and quant_state.

    quant_state is a JSON text, which has the shape: those of all matrices are read here.

    Returns: the matrices by name; the names of the texts.

    Raises WdlibError where one cannot be read.
    """
    owners = {n.removesuffix(".absmax") for n in tensors if n.endswith(".absmax")} & tensors.keys()
    if not owners:
        return {}, set()
    states = {n.partition(_STATE)[0]: tensor for n, tensor in tensors.items() if _STATE in n}
    reason = "it is quantised by bitsandbytes, and the quant_state with its shape is not there"
    found: dict[str, Tensor] = {
        name: unreadable(tensors[name], name, reason) for name in owners - states.keys()
    }
    states = {name: states[name] for name in sorted(owners & states.keys())}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        contents = pool.map(_state, states.values())
        for state, content in zip(states.values(), contents, strict=True):
            matrix = _of_state(tensors, state, content)
            found[matrix.name] = matrix
    return found, {state.name for state in states.values()}


def _state(tensor: Tensor) -> dict[str, Any]:
    text = read_rows(_shaped(tensor, 1, tensor.size), 0, 1).tobytes()
    try:
        state = json.loads(text)
        numbers = {
            key: int(state[key]) for key in ("blocksize", "nested_blocksize") if key in state
        }
        offset = float(state.get("nested_offset", 0))
        return {"shape": tuple(int(n) for n in state["shape"]), "nested_offset": offset, **numbers}
    except (ValueError, KeyError, TypeError) as error:
        raise WdlibError(
            f"The tensor {tensor.name} of {tensor.file.name} is no state of bitsandbytes "
            f"({error!r}): download the file again."
        ) from error


def _of_state(tensors: Tensors, state: Tensor, content: Mapping[str, Any]) -> Tensor:
    name, _, kind = state.name.partition(_STATE)
    tensor, shape, block = tensors[name], content["shape"], content.get("blocksize", 0)
    parts = {role: tensors.get(f"{name}.{part}") for role, part in _STATE_PARTS.items()}
    scale, table = parts["scale"], parts["table"]
    blocks = -(-math.prod(shape) // block) if block > 0 else 0
    if (
        not scale
        or not table
        or len(shape) < 2
        or shape[-1] % 2
        or 2 * tensor.size != math.prod(shape)
    ):
        reason = f"its {tensor.size} bytes do not hold 4 bits for each entry of shape {shape}"
        return unreadable(tensor, name, reason)
    if math.prod(scale.shape) != blocks:
        return _unfitting(name, tensor, scale)
    codes = _shaped(tensor, *shape[:-1], shape[-1] // 2, dtype="U8")
    stored = {"weight": Stored(codes, 1)}
    stored |= {role: Stored(_shaped(t, 1, math.prod(t.shape))) for role, t in parts.items() if t}
    options = {"block": block, "offset": content["nested_offset"]}
    options["nested_block"] = content.get("nested_blocksize", 0)
    words = f"{kind.upper()} (bitsandbytes)"
    return joined(name, shape, ("bitsandbytes 4-bit", words), stored, options)
