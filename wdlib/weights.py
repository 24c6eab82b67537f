"""Checkpoint -> stream of weight matrices (layer, type, matrix), one in memory at a time.

Safetensors and GGUF files are read by their headers: a tensor's bytes are read only when its matrix
is asked for, with plain reads (a memory map would make the resident set grow to the file's size),
or as ranges of a file on the hub. While a matrix is in use, the bytes of the next are being read.
Which tensor is which projection is data: `RULES`. Adding an architecture is adding rows there.
"""

import dataclasses
import json
import math
import mmap
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import TYPES, WdlibError
from wdlib.models import Checkpoint, resolve
from wdlib.remote import RemoteFile

HEADERS_AT_ONCE = 8
"""Headers of so many files are read at the same time: on the hub, each waits for two answers."""


@dataclass(frozen=True)
class Entry:
    """One matrix of a checkpoint, from the headers alone.

    `layer` counts from 0; `type` is one of `wdlib.TYPES`; `name` is the tensor's name in the file;
    `shape` is (d_out, d_in); `dtype` is the stored one ("BF16", "Q4_1", ...). `expert` is None for
    a matrix that every token passes (a dense layer, or the shared experts beside routed ones) and
    the expert's number for a routed one.
    """

    layer: int
    type: str
    name: str
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None


@dataclass(frozen=True)
class Projection:
    """One matrix W[layer, type]: float32 of shape (d_out, d_in), as `torch.nn.Linear` stores it."""

    layer: int
    type: str
    name: str
    matrix: np.ndarray
    expert: int | None = None


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `size` bytes at `offset` of `file`, row-major, last axis fastest."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | RemoteFile
    offset: int
    size: int


@dataclass(frozen=True)
class Rule:
    """One row of the naming table.

    `pattern` must match the whole tensor name and holds the group `layer` (and `expert`, when each
    expert has its own tensor; a tensor of three dimensions holds the experts along the first).
    `types` are the projections in the order in which the tensor holds them: (gate, up) in equal
    halves, (q, k, v) by the numbers of heads. `layout` says how the tensor is stored:
    "linear" (d_out, d_in); "conv1d" (d_in, d_out); "heads" (head, q|k|v, head size) along the rows;
    "rope" (llama.cpp's order of the rows of q and k, which pairs the halves of each head).
    `architectures` limits the row to these values of `model_type` (config.json) or
    `general.architecture` (GGUF); empty means any.
    """

    pattern: str
    types: tuple[str, ...]
    layout: str = "linear"
    architectures: tuple[str, ...] = ()


_DECODER = r"(?:model\.|language_model\.)*layers\.(?P<layer>\d+)\."
_GPT2 = r"(?:transformer\.)?h\.(?P<layer>\d+)\."
_NEOX = r"(?:gpt_neox\.)?layers\.(?P<layer>\d+)\."
_BERT = r"(?:bert\.|roberta\.)?encoder\.layer\.(?P<layer>\d+)\."
_DISTILBERT = r"(?:distilbert\.)?transformer\.layer\.(?P<layer>\d+)\."
_GGUF = r"blk\.(?P<layer>\d+)\."
_EXPERT = r"(?P<expert>\d+)\."
_SHARED = r"mlp\.shared_(?:experts?|mlp)\."
_FUSED_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
_GATE_ABOVE_UP = ("phi3", "glm4", "chatglm", "plamo2", "plamo3")

RULES = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, SmolLM; Phi-3 (fused)
    Rule(_DECODER + r"self_attn\.q_proj\.weight", ("q",)),
    Rule(_DECODER + r"self_attn\.k_proj\.weight", ("k",)),
    Rule(_DECODER + r"self_attn\.v_proj\.weight", ("v",)),
    Rule(_DECODER + r"self_attn\.o_proj\.weight", ("o",)),
    Rule(_DECODER + r"self_attn\.qkv_proj\.weight", ("q", "k", "v")),
    Rule(_DECODER + r"mlp\.gate_proj\.weight", ("gate",)),
    Rule(_DECODER + r"mlp\.up_proj\.weight", ("up",)),
    Rule(_DECODER + r"mlp\.down_proj\.weight", ("down",)),
    Rule(_DECODER + r"mlp\.gate_up_proj\.weight", ("gate", "up")),
    # Qwen2-MoE, Qwen3-MoE, GLM-4.5-MoE, Hunyuan-MoE: a tensor per expert, or all experts in one
    Rule(_DECODER + r"mlp\.experts\." + _EXPERT + r"gate_proj\.weight", ("gate",)),
    Rule(_DECODER + r"mlp\.experts\." + _EXPERT + r"up_proj\.weight", ("up",)),
    Rule(_DECODER + r"mlp\.experts\." + _EXPERT + r"down_proj\.weight", ("down",)),
    Rule(_DECODER + _SHARED + r"gate_proj\.weight", ("gate",)),
    Rule(_DECODER + _SHARED + r"up_proj\.weight", ("up",)),
    Rule(_DECODER + _SHARED + r"down_proj\.weight", ("down",)),
    Rule(_DECODER + r"mlp\.experts\.gate_up_proj", ("gate", "up"), "linear", _FUSED_EXPERTS),
    Rule(_DECODER + r"mlp\.experts\.down_proj", ("down",), "linear", _FUSED_EXPERTS),
    # Mixtral
    Rule(_DECODER + r"block_sparse_moe\.experts\." + _EXPERT + r"w1\.weight", ("gate",)),
    Rule(_DECODER + r"block_sparse_moe\.experts\." + _EXPERT + r"w3\.weight", ("up",)),
    Rule(_DECODER + r"block_sparse_moe\.experts\." + _EXPERT + r"w2\.weight", ("down",)),
    # GPT-2
    Rule(_GPT2 + r"attn\.c_attn\.weight", ("q", "k", "v"), "conv1d", ("gpt2",)),
    Rule(_GPT2 + r"attn\.c_proj\.weight", ("o",), "conv1d", ("gpt2",)),
    Rule(_GPT2 + r"mlp\.c_fc\.weight", ("up",), "conv1d", ("gpt2",)),
    Rule(_GPT2 + r"mlp\.c_proj\.weight", ("down",), "conv1d", ("gpt2",)),
    # GPT-NeoX, Pythia
    Rule(_NEOX + r"attention\.query_key_value\.weight", ("q", "k", "v"), "heads"),
    Rule(_NEOX + r"attention\.dense\.weight", ("o",)),
    Rule(_NEOX + r"mlp\.dense_h_to_4h\.weight", ("up",)),
    Rule(_NEOX + r"mlp\.dense_4h_to_h\.weight", ("down",)),
    # BERT, RoBERTa
    Rule(_BERT + r"attention\.self\.query\.weight", ("q",)),
    Rule(_BERT + r"attention\.self\.key\.weight", ("k",)),
    Rule(_BERT + r"attention\.self\.value\.weight", ("v",)),
    Rule(_BERT + r"attention\.output\.dense\.weight", ("o",)),
    Rule(_BERT + r"intermediate\.dense\.weight", ("up",)),
    Rule(_BERT + r"output\.dense\.weight", ("down",)),
    # DistilBERT
    Rule(_DISTILBERT + r"attention\.q_lin\.weight", ("q",)),
    Rule(_DISTILBERT + r"attention\.k_lin\.weight", ("k",)),
    Rule(_DISTILBERT + r"attention\.v_lin\.weight", ("v",)),
    Rule(_DISTILBERT + r"attention\.out_lin\.weight", ("o",)),
    Rule(_DISTILBERT + r"ffn\.lin1\.weight", ("up",)),
    Rule(_DISTILBERT + r"ffn\.lin2\.weight", ("down",)),
    # GGUF, every architecture; "llama" there is Llama, Mistral, Mixtral and SmolLM
    Rule(_GGUF + r"attn_q\.weight", ("q",), "rope", ("llama",)),
    Rule(_GGUF + r"attn_k\.weight", ("k",), "rope", ("llama",)),
    Rule(_GGUF + r"attn_q\.weight", ("q",)),
    Rule(_GGUF + r"attn_k\.weight", ("k",)),
    Rule(_GGUF + r"attn_v\.weight", ("v",)),
    Rule(_GGUF + r"attn_qkv\.weight", ("q", "k", "v")),
    Rule(_GGUF + r"attn_output\.weight", ("o",)),
    Rule(_GGUF + r"ffn_gate\.weight", ("gate",)),
    Rule(_GGUF + r"ffn_up\.weight", ("gate", "up"), "linear", _GATE_ABOVE_UP),
    Rule(_GGUF + r"ffn_up\.weight", ("up",)),
    Rule(_GGUF + r"ffn_down\.weight", ("down",)),
    Rule(_GGUF + r"ffn_gate_(?:exps|shexp)\.weight", ("gate",)),
    Rule(_GGUF + r"ffn_up_(?:exps|shexp)\.weight", ("up",)),
    Rule(_GGUF + r"ffn_down_(?:exps|shexp)\.weight", ("down",)),
    Rule(_GGUF + r"ffn_gate_up_exps\.weight", ("gate", "up")),
    Rule(_GGUF + r"ffn_gate\." + _EXPERT + r"weight", ("gate",)),
    Rule(_GGUF + r"ffn_up\." + _EXPERT + r"weight", ("up",)),
    Rule(_GGUF + r"ffn_down\." + _EXPERT + r"weight", ("down",)),
)


@dataclass(frozen=True)
class _Geometry:
    """What the names and shapes of the tensors do not say; None where the checkpoint does not."""

    architecture: str | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


@dataclass(frozen=True)
class Part:
    """A matrix and the piece of a tensor that it is: rows or columns `start` .. `start + size`.

    All that `read` needs, and small: made to be sent to another process.
    """

    entry: Entry
    tensor: Tensor
    layout: str
    heads: int
    start: int
    size: int

    @property
    def rows(self) -> tuple[int, int]:
        """First row and number of the rows to read, all axes of the tensor but the last in one."""
        rows = self.tensor.shape[-2]
        first = rows * self.entry.expert if len(self.tensor.shape) == 3 else 0
        return (first + self.start, self.size) if self.layout == "linear" else (first, rows)

    @property
    def stored(self) -> int:
        """Bytes of the matrix where it is stored."""
        values = math.prod(self.entry.shape)
        return self.tensor.size * values // math.prod(self.tensor.shape)


def inventory(model: str | Path | Checkpoint) -> list[Entry]:
    """Every projection matrix of a checkpoint, from the headers of its files alone.

    Sorted by layer, then in the order of `wdlib.TYPES`, then by expert (None first). Layers of
    other stacks in the file (a vision tower, multi-token prediction) are not listed.

    Raises WdlibError when a file is corrupt, truncated or quantised in a way that cannot be read,
    when no name matches a rule, or when a layer lacks a projection that others have.
    """
    return [part.entry for part in _plan(_checkpoint(model))]


def projections(
    model: str | Path | Checkpoint,
    *,
    layers: Iterable[int] | None = None,
    types: Iterable[str] | None = None,
) -> Iterator[Projection]:
    """Stream the weight matrices W[l, p] (arXiv 2509.00046, section 2), one in memory at a time.

    Arguments and errors as `plan` has them, at once; while streaming, WdlibError for a matrix that
    holds NaN or infinity or cannot be read.
    """
    return stream(plan(model, layers=layers, types=types))


def plan(
    model: str | Path | Checkpoint,
    *,
    layers: Iterable[int] | None = None,
    types: Iterable[str] | None = None,
) -> list[Part]:
    """What there is to read of a checkpoint, from the headers of its files alone.

    `layers` (counted from 0) and `types` (of `wdlib.TYPES`) limit it; a type that the architecture
    does not have (gate in GPT-2) yields nothing. The order is that of `inventory`.

    Raises WdlibError for what `inventory` refuses, for an unknown layer or type, and for matrices
    that are stored in a way that cannot be read.
    """
    checkpoint = _checkpoint(model)
    parts = _plan(checkpoint)
    last = parts[-1].entry.layer
    layers = range(last + 1) if layers is None else set(layers)
    types = TYPES if types is None else set(types)
    for unknown in sorted(set(layers) - set(range(last + 1))):
        raise WdlibError(f"{checkpoint.name} has no layer {unknown}: its layers are 0 to {last}.")
    for unknown in sorted(set(types) - set(TYPES)):
        raise WdlibError(f"There is no projection type {unknown!r}: give some of {TYPES}.")
    parts = [part for part in parts if part.entry.layer in layers and part.entry.type in types]
    for tensor in {part.tensor.dtype: part.tensor for part in parts}.values():
        _check_readable(tensor)
    return parts


def read(part: Part) -> Projection:
    """One matrix of a plan, from where it is stored. Raises WdlibError as `projections` does."""
    return _projection(part, _read(part.tensor, *part.rows))


def stream(parts: Sequence[Part]) -> Iterator[Projection]:
    """The matrices of a plan in its order; while one is in use, the bytes of the next are read.

    In memory are one matrix, if whoever takes it lets go of it before asking for the next, and the
    next one as it is stored. A tensor that has to be read whole for several matrices is read once,
    if they follow each other.

    Raises WdlibError as `projections` does.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for part, following in zip_longest(parts, parts[1:]):
            ahead = ahead or pool.submit(_read, part.tensor, *part.rows)
            made = [_projection(part, ahead.result())]
            # Only now: two matrices as stored and one in float32 would be the peak otherwise.
            if following is None or (following.tensor, following.rows) != (part.tensor, part.rows):
                ahead = following and pool.submit(_read, following.tensor, *following.rows)
            yield made.pop()  # a variable of this function would keep it alive


def named(
    tensor: str, architecture: str | None = None
) -> tuple[int, tuple[str, ...], int | None] | None:
    """Layer, types and expert of the projections that a tensor's name stands for.

    Arguments: tensor, as checkpoints write it ("model.layers.0.self_attn.q_proj.weight");
    architecture, the `model_type` of the model.
    Returns: None for a name that no row of `RULES` fits; several types for a tensor that joins
    them; expert None outside of routed experts.
    """
    found = _match(tensor, architecture)
    if found is None:
        return None
    rule, groups = found
    expert = groups.get("expert")
    return int(groups["layer"]), rule.types, None if expert is None else int(expert)


def requantise(projection: Projection, kind: str) -> Projection:
    """A projection as it comes back after being stored in a GGUF type ("Q4_1", "Q8_0", ...).

    Raises WdlibError for a type that cannot be written, or whose blocks do not fit the rows.
    """
    from gguf import GGMLQuantizationType, QuantError, quants

    try:
        stored = quants.quantize(projection.matrix, GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError, QuantError) as error:
        raise WdlibError(
            f"The tensor {projection.name} of shape {projection.matrix.shape} cannot be stored as "
            f"{kind}: choose one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, and rows of a multiple of 32."
        ) from error
    matrix = quants.dequantize(stored, GGMLQuantizationType[kind])
    return dataclasses.replace(projection, matrix=matrix)


@dataclass(frozen=True)
class ValueDistribution:
    """How the values of all matrices of one type are distributed.

    n: number of values. mean, standard_deviation: in the unit of the weights. excess_kurtosis: 0
    for a normal distribution. centres, density: (bins,) a histogram of (value - mean) /
    standard_deviation, normalised by n, so that values outside the bins are missing from its area.
    """

    n: int
    mean: float
    standard_deviation: float
    excess_kurtosis: float
    centres: np.ndarray
    density: np.ndarray


def value_distributions(
    model: str | Path | Checkpoint, *, reach: float = 20.0, bins: int = 400
) -> dict[str, ValueDistribution]:
    """Distribution of the values of each projection type, all layers together, in two passes.

    The first pass sums powers in float64, the second counts in `bins` bins over +-`reach`
    standard deviations. One matrix is in memory at a time.

    Raises WdlibError as `projections` does, and for a type whose values are all equal.
    Source: arXiv 2509.19122, figures 1 and 2.
    """
    checkpoint = _checkpoint(model)
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    for p in projections(checkpoint):
        x = p.matrix.astype(np.float64).ravel()
        square = x * x
        sums[p.type] += [x.size, x.sum(), square.sum(), square @ x, square @ square]
    moments = {
        kind: _moments(sums[kind], f"type {kind} of {checkpoint.name}")
        for kind in TYPES
        if kind in sums
    }
    edges = np.linspace(-reach, reach, bins + 1)
    counts = {kind: np.zeros(bins) for kind in moments}
    for p in projections(checkpoint):
        _, mean, deviation, _ = moments[p.type]
        scaled = (p.matrix.ravel() - np.float32(mean)) / np.float32(deviation)
        counts[p.type] += np.histogram(scaled, bins, range=(-reach, reach))[0]
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    return {
        kind: ValueDistribution(*m, centres, counts[kind] / (m[0] * width))
        for kind, m in moments.items()
    }


def _moments(sums: np.ndarray, name: str) -> tuple[int, float, float, float]:
    """Number, mean, standard deviation and excess kurtosis from sums of powers 0 to 4."""
    n = int(sums[0])
    m1, m2, m3, m4 = sums[1:] / n
    variance = m2 - m1**2
    if not variance > 1e-12 * m2:  # no more than rounding leaves
        raise WdlibError(
            f"the values of {name} are all equal, so they have no distribution: check the weights"
        )
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return n, float(m1), float(np.sqrt(variance)), float(fourth / variance**2 - 3)


def _checkpoint(model: str | Path | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else resolve(model)


def _plan(checkpoint: Checkpoint) -> list[Part]:
    """The pieces of tensors to read, in the order of `inventory`."""
    geometry, tensors = _headers(checkpoint)
    _refuse_packed(tensors, geometry.architecture)
    parts = []
    for tensor in tensors.values():
        if found := _match(tensor.name, geometry.architecture):
            parts += _parts(tensor, *found, geometry)
    if geometry.layers is not None:
        parts = [part for part in parts if part.entry.layer < geometry.layers]
    if not parts:
        _refuse_names(checkpoint, geometry, tensors)
    parts.sort(
        key=lambda p: (
            p.entry.layer,
            TYPES.index(p.entry.type),
            -1 if p.entry.expert is None else p.entry.expert,
        )
    )
    _check_complete(checkpoint, geometry, [part.entry for part in parts])
    return parts


_COMPILED = tuple((rule, re.compile(rule.pattern)) for rule in RULES)


def _match(name: str, architecture: str | None) -> tuple[Rule, dict[str, str | None]] | None:
    """The first row of the naming table that a tensor's name fits, and what its groups hold."""
    for rule, pattern in _COMPILED:
        if rule.architectures and architecture not in rule.architectures:
            continue
        if match := pattern.fullmatch(name):
            return rule, match.groupdict()
    return None


_QUANTISED = re.compile(r".*\.(?:qweight|weight_packed|weight\.absmax|weight_scale|SCB)")
_PACKED = re.compile(r"(.*\.weight)\.absmax|(.*)\.scales")
"""What bitsandbytes and MLX put beside a tensor whose shape is no longer the matrix's."""


def _refuse_packed(tensors: dict[str, Tensor], architecture: str | None) -> None:
    """Refuse projections whose shape their quantisation has changed."""
    for name, tensor in tensors.items():
        if found := _PACKED.fullmatch(name):
            packed = found[1] or f"{found[2]}.weight"
            if packed in tensors and _match(packed, architecture):
                raise _quantised(tensor)


def _quantised(tensor: Tensor) -> WdlibError:
    return WdlibError(
        f"{tensor.file.name} holds quantised weights ({tensor.name}), which cannot be read from "
        "safetensors: use the unquantised checkpoint or a GGUF file of the model."
    )


def _refuse_names(checkpoint: Checkpoint, geometry: _Geometry, tensors: dict[str, Tensor]) -> None:
    """Say why no tensor is a projection."""
    for name, tensor in tensors.items():
        if _QUANTISED.fullmatch(name):
            raise _quantised(tensor)
    hint = "" if geometry.architecture else "put the model's config.json beside the file, or "
    raise WdlibError(
        f"No tensor of {checkpoint.name} has a name that is known as a projection (seen: "
        f"{', '.join(list(tensors)[:4]) or 'none'}): {hint}add rows for its architecture to RULES "
        "in wdlib/weights.py."
    )


def _parts(
    tensor: Tensor, rule: Rule, groups: dict[str, str | None], geometry: _Geometry
) -> Iterator[Part]:
    """The matrices that one tensor holds."""
    where = f"tensor {tensor.name} of {tensor.file.name}"
    dimensions = (2, 3) if groups.get("expert") is None else (2,)
    if len(tensor.shape) not in dimensions or 0 in tensor.shape:
        raise WdlibError(f"The {where} is no matrix: its shape is {tensor.shape}.")
    rows, columns = tensor.shape[-2:]
    d_out, d_in = (columns, rows) if rule.layout == "conv1d" else (rows, columns)
    joined = rule.types == ("q", "k", "v")
    if (joined or rule.layout == "rope") and None in (geometry.heads, geometry.kv_heads):
        raise WdlibError(
            f"The {where} cannot be taken apart without the number of attention heads: put the "
            "model's config.json beside the file (a GGUF file has it in its metadata)."
        )
    heads = geometry.kv_heads if rule.types == ("k",) else geometry.heads
    shares = [1] * len(rule.types)
    if joined:
        shares = [geometry.heads, geometry.kv_heads, geometry.kv_heads]
    granularity = heads * 2 if rule.layout == "rope" else sum(shares)
    if d_out % granularity:
        raise WdlibError(
            f"The {where} has {d_out} rows, which does not fit {geometry.heads} attention heads "
            f"({geometry.kv_heads} for keys and values): the model's configuration is another's."
        )
    experts = range(tensor.shape[0]) if len(tensor.shape) == 3 else (None,)
    if groups.get("expert") is not None:
        experts = (int(groups["expert"]),)
    for position, kind in enumerate(rule.types):
        size = d_out * shares[position] // sum(shares)
        start = d_out * sum(shares[:position]) // sum(shares)
        for expert in experts:
            entry = Entry(
                int(groups["layer"]), kind, tensor.name, (size, d_in), tensor.dtype, expert
            )
            yield Part(entry, tensor, rule.layout, heads or 1, start, size)


_MLP = ("gate", "up", "down")


def _check_complete(checkpoint: Checkpoint, geometry: _Geometry, entries: list[Entry]) -> None:
    """Refuse a checkpoint in which a layer lacks a matrix, has it twice or in a wrong shape."""
    found = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        found[entry.layer][entry.type].append(entry)
    types = [kind for kind in TYPES if kind != "gate" or any(kind in f for f in found.values())]
    experts = {entry.expert for entry in entries} - {None}
    number = max(found) + 1 if geometry.layers is None else geometry.layers
    for layer in range(number):
        mlp = {entry.expert for kind in _MLP for entry in found[layer][kind]} or {None}
        if mlp - {None}:
            mlp |= set(range(max(experts) + 1))
        for kind in types:
            there = found[layer][kind]
            if {entry.expert for entry in there} != (mlp if kind in _MLP else {None}):
                what = f"{kind} of some expert" if there else kind
                raise WdlibError(
                    f"Layer {layer} of {checkpoint.name} has no {what}: the checkpoint is "
                    "incomplete, or RULES in wdlib/weights.py lacks a row for its name."
                )
            if len({entry.expert for entry in there}) < len(there):
                raise WdlibError(
                    f"Layer {layer} of {checkpoint.name} has {kind} twice: {there[0].name} and "
                    f"{there[-1].name}."
                )
    width = entries[0].shape[1]
    for entry in entries:
        if entry.shape[0 if entry.type in ("o", "down") else 1] != width:
            raise WdlibError(
                f"The tensor {entry.name} of {checkpoint.name} gives {entry.type} the shape "
                f"{entry.shape}, which does not fit a hidden size of {width}: the rule in "
                "wdlib/weights.py for its name is not right for this architecture."
            )
    inner = {(e.layer, e.expert): e for e in entries if e.type == "down"}
    for entry in entries:
        down = inner[entry.layer, entry.expert] if entry.type in ("gate", "up") else None
        if down and entry.shape[0] != down.shape[1]:
            raise WdlibError(
                f"The tensor {entry.name} of {checkpoint.name} gives {entry.type} "
                f"{entry.shape[0]} rows, and {down.name} has {down.shape[1]} columns: it joins "
                "gate and up in a way that needs a row of its own in RULES of wdlib/weights.py."
            )


# Reading matrices --------------------------------------------------------------------------------


def _projection(part: Part, raw: np.ndarray) -> Projection:
    entry = part.entry
    return Projection(entry.layer, entry.type, entry.name, _matrix(part, raw), entry.expert)


def _matrix(part: Part, raw: np.ndarray) -> np.ndarray:
    """One matrix from the bytes of its rows: float32, (d_out, d_in), C order."""
    entry, tensor = part.entry, part.tensor
    matrix = _decode(raw, tensor.dtype)
    if part.layout == "conv1d":
        matrix = np.ascontiguousarray(matrix[:, part.start : part.start + part.size].T)
    elif part.layout == "heads":
        matrix = matrix.reshape(part.heads, 3, -1, entry.shape[1])
        matrix = matrix[:, ("q", "k", "v").index(entry.type)].reshape(entry.shape)
    elif part.layout == "rope":
        matrix = matrix.reshape(part.heads, -1, 2, entry.shape[1])
        matrix = matrix.swapaxes(1, 2).reshape(entry.shape)
    if not np.isfinite(matrix).all():
        raise WdlibError(
            f"The tensor {tensor.name} of {tensor.file.name} holds NaN or infinity: the file is "
            "damaged, or the training diverged; take another copy or checkpoint."
        )
    return matrix


def _read(tensor: Tensor, first: int, count: int) -> np.ndarray:
    """The bytes (rows, bytes per row) of `count` rows from row `first`, all axes but the last."""
    row = tensor.size // math.prod(tensor.shape[:-1])
    raw = np.empty((count, row), np.uint8)
    buffer, offset = memoryview(raw).cast("B"), tensor.offset + first * row
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


def _decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes (rows, bytes per row) -> float32 (rows, columns)."""
    if dtype == "BF16":
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype in _FLOATS:
        with np.errstate(over="ignore"):
            return raw.view(_FLOATS[dtype]).astype(np.float32, copy=False)
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(raw, GGMLQuantizationType[dtype])


_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def _check_readable(tensor: Tensor) -> None:
    if tensor.dtype in (*_FLOATS, "BF16"):
        return
    remedy = "use the unquantised checkpoint or a GGUF file of the model"
    if tensor.file.suffix == ".gguf":
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType[tensor.dtype]
        try:
            _decode(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), tensor.dtype)
            return
        except NotImplementedError:
            remedy = "use a file of the model with another quantisation"
    raise WdlibError(
        f"The tensor {tensor.name} of {tensor.file.name} is stored as {tensor.dtype}, which cannot "
        f"be turned into float32 here: {remedy}."
    )


# Headers -----------------------------------------------------------------------------------------


def _headers(checkpoint: Checkpoint) -> tuple[_Geometry, dict[str, Tensor]]:
    """Geometry and table of tensors of all files of a checkpoint."""
    first = checkpoint.files[0]
    if first.suffix == ".gguf":
        metadata, tensors = gguf_header(first)
        return _geometry_of_gguf(metadata), tensors
    config = checkpoint.config
    if isinstance(first, Path) and (first.parent / "config.json").is_file():
        config = first.parent / "config.json"
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        tables = list(pool.map(safetensors_header, checkpoint.files))
    return _geometry_of_config(config), {k: t for table in tables for k, t in table.items()}


def _geometry_of_config(file: Path | RemoteFile | None) -> _Geometry:
    if file is None:
        return _Geometry()
    content = file.read(0, file.size) if isinstance(file, RemoteFile) else file.read_bytes()
    try:
        config = json.loads(content)
        config = config.get("text_config") or config
    except (ValueError, AttributeError) as error:
        raise WdlibError(f"{file} is not a model's configuration ({error}).") from error

    def first(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    heads = first("num_attention_heads", "n_head", "n_heads")
    return _Geometry(
        architecture=first("model_type"),
        layers=first("num_hidden_layers", "n_layer", "n_layers"),
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
    )


def _geometry_of_gguf(metadata: dict[str, Any]) -> _Geometry:
    architecture = metadata.get("general.architecture")

    def field(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    layers, heads = field("block_count"), field("attention.head_count")
    if layers is not None:
        # The last blocks of some models predict further tokens and are no part of the decoder.
        layers -= field("nextn_predict_layers") or 0
    return _Geometry(
        architecture, layers, heads, metadata.get(f"{architecture}.attention.head_count_kv", heads)
    )


def safetensors_header(path: Path | RemoteFile) -> dict[str, Tensor]:
    """Table of the tensors of a safetensors file, by name."""
    size = path.size if isinstance(path, RemoteFile) else path.stat().st_size
    start = _beginning(path, 0, min(8, size))
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise WdlibError(f"{path} is truncated or no safetensors file: download it again.")
    text = _beginning(path, 8, length)
    table = {}
    try:
        for name, item in json.loads(text).items():
            if name == "__metadata__":
                continue
            begin, end = item["data_offsets"]
            shape = tuple(int(n) for n in item["shape"])
            if min(begin, end - begin, *shape, 0) < 0:
                raise ValueError(f"a negative number for {name}")
            table[name] = Tensor(name, shape, item["dtype"], path, 8 + length + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WdlibError(
            f"The header of {path} is corrupt ({error!r}): download it again."
        ) from error
    for tensor in table.values():
        bits = re.search(r"\d+", tensor.dtype)
        wanted = math.prod(tensor.shape) * int(bits[0]) // 8 if tensor.dtype in _EXACT else None
        _check_extent(tensor, size, wanted)
    return table


def _beginning(path: Path | RemoteFile, offset: int, size: int) -> bytes:
    if isinstance(path, RemoteFile):
        return bytes(path.read(offset, size))
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


_EXACT = (*_FLOATS, "BF16")


def _check_extent(tensor: Tensor, file_size: int, wanted: int | None) -> None:
    if wanted not in (None, tensor.size):
        raise WdlibError(
            f"The header of {tensor.file} is corrupt: the tensor {tensor.name} of shape "
            f"{tensor.shape} has {tensor.size} bytes; download the file again."
        )
    if tensor.offset + tensor.size > file_size:
        raise WdlibError(
            f"{tensor.file} is truncated: the tensor {tensor.name} ends at byte "
            f"{tensor.offset + tensor.size} of {file_size}; download the file again."
        )


def gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scalar metadata and table of the tensors of a GGUF file; arrays (the tokenizer) are skipped.

    Shapes are in row-major order, the reverse of the file's.
    """
    size = path.stat().st_size
    if size < 24:
        raise WdlibError(f"{path} is truncated or no GGUF file: download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        if buffer[:4] != b"GGUF":
            raise WdlibError(f"{path} is no GGUF file: it does not begin with GGUF.")
        cursor = _Cursor(buffer, 4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise WdlibError(
                f"{path} has version {version} of the GGUF format, and only the little-endian "
                "versions 2 and 3 are read: convert the model again with llama.cpp."
            )
        try:
            tensors, fields = cursor.scalar("Q"), cursor.scalar("Q")
            metadata = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(fields)}
            table = [_gguf_tensor(cursor, path) for _ in range(tensors)]
        except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
            raise WdlibError(
                f"The header of {path} is truncated or corrupt ({error}): download it again."
            ) from error
    if metadata.get("split.count", 1) > 1:
        raise WdlibError(
            f"{path} is one part of a split model: join the parts with `llama-gguf-split --merge`."
        )
    alignment = metadata.get("general.alignment") or 32
    data = -(-cursor.position // alignment) * alignment
    placed = {t.name: dataclasses.replace(t, offset=data + t.offset) for t in table}
    for tensor in placed.values():
        _check_extent(tensor, size, None)
    return metadata, placed


def _gguf_tensor(cursor: "_Cursor", path: Path) -> Tensor:
    """One row of a GGUF file's table of tensors; its offset still counts from the data's start."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
    kind = GGMLQuantizationType(cursor.scalar("I"))
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise ValueError(f"the rows of {name} are no multiple of {block}")
    size = math.prod(shape) // block * block_bytes
    return Tensor(name, shape, kind.name, path, cursor.scalar("Q"), size)


_GGUF_TYPES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_U64 = struct.Struct("<Q")


class _Cursor:
    """Walks through the header of a GGUF file."""

    def __init__(self, buffer: mmap.mmap, position: int) -> None:
        self.buffer, self.position = buffer, position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.buffer, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        if length > len(self.buffer) - self.position:
            raise ValueError(f"a text of {length} bytes at byte {self.position}")
        self.position += length
        return self.buffer[self.position - length : self.position].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A number, a truth value or a text; None for an array, which is passed over."""
        if kind == _GGUF_STRING:
            return self.text()
        if kind != _GGUF_ARRAY:
            return self.scalar(_GGUF_TYPES[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _GGUF_STRING:
            # Vocabularies have up to 262k entries: this loop is most of the time of a header.
            buffer, position, length = self.buffer, self.position, _U64.unpack_from
            for _ in range(count):
                position += 8 + length(buffer, position)[0]
            self.position = position
        elif kind == _GGUF_ARRAY:
            for _ in range(count):
                self.value(kind)
        else:
            self.position += count * struct.calcsize(f"<{_GGUF_TYPES[kind]}")
        return None
