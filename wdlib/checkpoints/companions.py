"""Tensors as they are stored -> tensors as a model has them, from the headers.

A quantised matrix is stored as several tensors: its codes, and what makes numbers of them. Here
they become one, of the name and shape that the matrix has unquantised.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from wdlib.checkpoints import layouts
from wdlib.checkpoints.formats import EXACT, Tensor
from wdlib.checkpoints.layouts import Tensors, joined, unreadable
from wdlib.checkpoints.quantised import QuantisedTensor, Stored, UnreadableTensor

_TOOLS = {
    "aqlm": "AQLM", "bitnet": "BitNet", "eetq": "EETQ", "exl2": "ExLlamaV2", "exl3": "ExLlamaV3",
    "fp_quant": "FP-Quant", "higgs": "HIGGS", "hqq": "HQQ", "metal": "MLX", "quanto": "Quanto",
    "quark": "Quark", "sinq": "SINQ", "spqr": "SpQR", "torchao": "torchao", "vptq": "VPTQ",
}  # fmt: skip
"""`quant_method` of a config.json -> a tool whose formats are not read."""

_CODES = {
    "W_q": "HQQ", "codes": "AQLM", "dense_weights": "SpQR", "indices": "VPTQ",
    "q_weight": "ExLlamaV2", "trellis": "ExLlamaV3", "weight._data": "Quanto",
    "_weight_qdata": "torchao", "bitmask": "compressed-tensors with sparsity",
}  # fmt: skip
"""Name of the codes, below a module -> the tool that writes them so, which is not read."""

_CODES_END = re.compile(rf"(.*)\.({'|'.join(map(re.escape, _CODES))})")

_FACTOR = re.compile(r".*(?:scale|zero|absmax|g_idx|quant_|SCB|hadamard|perm).*")
_OF_ACTIVATIONS = re.compile(
    r"(?:.*_)?(?:input|activation|act|output|prob|kv|[qkv])_(?:global_)?(?:scale|zero_point)"
    r"(?:_inv|_[12])?|q?scale_act|.*observer.*"
)
"""Beside a matrix, what belongs to activations and to the cache of keys and values."""


def of_safetensors(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table of a checkpoint's tensors with each quantised matrix as one tensor.

    settings: the `quantization_config` of config.json, empty without one. What is stored in a way
    that is not read becomes an `UnreadableTensor`, under the name that it has unquantised.

    Raises WdlibError where a tensor that has to be read for a shape cannot be read.
    """
    found, used = layouts.bitsandbytes_4bit(tensors)
    used = used.union(*(_parts(matrix) for matrix in found.values()))
    for name, tensor in tensors.items():
        if name in used or name in found:
            continue
        matrix = _foreign(name, tensor, tensors, settings) or layouts.matrix(
            name, tensor, tensors, settings
        )
        if matrix:
            found[matrix.name] = matrix
            used |= {name, *_parts(matrix)}
    table = {n: t for n, t in tensors.items() if n not in used} | found
    for name, owner in list(_unexplained(table)):
        reason = f"{name} beside it changes its values in a way that is not known"
        table[owner] = unreadable(table[owner], owner, reason)
    for name, tensor in table.items():
        if name.endswith(".weight") and _is_packed(tensor):
            tool = settings.get("quant_method") or "a tool that its files do not name"
            reason = f"it is stored as {tensor.dtype}, quantised by {tool}"
            table[name] = unreadable(tensor, name, reason)
    return table


def _parts(matrix: Tensor) -> set[str]:
    """The names of the tensors that store a matrix."""
    stored = matrix.stored.values() if isinstance(matrix, QuantisedTensor) else ()
    return {part.tensor.name for part in stored}


def _is_packed(tensor: Tensor) -> bool:
    known = isinstance(tensor, QuantisedTensor | UnreadableTensor)
    return not known and tensor.dtype not in EXACT and len(tensor.shape) > 1


def _foreign(
    name: str, tensor: Tensor, tensors: Tensors, settings: Mapping[str, Any]
) -> UnreadableTensor | None:
    """What tools write that are not read; told by the names of its tensors or by config.json."""
    if end := _CODES_END.fullmatch(name):
        return unreadable(tensor, f"{end[1]}.weight", f"it is quantised by {_CODES[end[2]]}")
    if not name.endswith(".weight") or tensor.dtype in EXACT or len(tensor.shape) < 2:
        return None
    module = name.removesuffix(".weight")
    tool = _TOOLS.get(str(settings.get("quant_method")).lower(), "")
    if f"{module}.weight_scales" in tensors:
        tool = tool or "EETQ"
    if f"{module}.scales" in tensors:
        tool = tool or ("HIGGS" if f"{module}.tables" in tensors else "MLX")
    return unreadable(tensor, name, f"it is quantised by {tool}") if tool else None


def _unexplained(table: Tensors) -> Iterator[tuple[str, str]]:
    """Tensors that look like a factor of a matrix and are no part of it, each with the matrix."""
    for name in table:
        module, _, leaf = name.rpartition(".")
        if not _FACTOR.fullmatch(leaf) or _OF_ACTIVATIONS.fullmatch(leaf):
            continue
        cuts = (f"{module}.{leaf[:place]}" for place, letter in enumerate(leaf) if letter == "_")
        for owner in (f"{module}.weight", module, *cuts):
            matrix = table.get(owner)
            if matrix is None or isinstance(matrix, UnreadableTensor) or len(matrix.shape) < 2:
                continue
            is_scaled = isinstance(matrix, QuantisedTensor) or matrix.dtype.startswith("F8")
            if is_scaled or (matrix.dtype in EXACT and leaf.startswith("weight_")):
                yield name, owner


def of_gguf(tensors: Tensors) -> dict[str, Tensor]:
    """The table of a GGUF file's tensors, each weight with the scale beside it, if there is one.

    llama.cpp multiplies by such a scale: of NVFP4, of ternary weights; one for each expert.
    """
    table = dict(tensors)
    for name, tensor in tensors.items():
        beside = f"{name.removesuffix('weight')}scale"
        if not name.endswith(".weight") or beside not in tensors or len(tensor.shape) < 2:
            continue
        scale = table.pop(beside)
        grid = layouts.scale_grid(scale, tensor.shape[:-2], tensor.shape[-2])
        if grid:
            stored = {"weight": Stored(tensor, 1), "scale": Stored(grid)}
            table[name] = joined(name, tensor.shape, ("gguf", tensor.dtype), stored, {})
        else:
            reason = f"its scale {scale.name} has the shape {scale.shape}"
            table[name] = unreadable(tensor, name, reason)
    return table
