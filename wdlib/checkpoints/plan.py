"""Which piece of which tensor every matrix of a checkpoint is, from the headers alone."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import completeness, lexicon, stacks
from wdlib.checkpoints.architectures import TensorRole, is_other, place, tensor_role, type_order
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.formats import Tensor, check_readable
from wdlib.checkpoints.geometry import Configuration, Geometry
from wdlib.checkpoints.headers import read_headers

_Place = tuple[int, str, int | None]


@dataclass(frozen=True)
class Entry:
    """One matrix of a checkpoint, from the headers alone.

    `layer` counts from 0; `type` is one of `wdlib.TYPES`, or the own name of a projection that is
    none of them ("kv_a", "in_proj", ...); `name` is the tensor's name in the file; `shape` is
    (d_out, d_in); `dtype` is the stored one ("BF16", "Q4_1", ...). `expert` is None for a matrix
    that every token passes (a dense layer, or the shared experts beside routed ones) and the
    expert's number for a routed one.
    """

    layer: int
    type: str
    name: str
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None

    @property
    def place(self) -> _Place:
        """What no two matrices of a stack share: layer, type and expert."""
        return self.layer, self.type, self.expert


def place_order(layer: int, type: str, expert: int | None) -> tuple[int, tuple[int, str], int]:
    """The key by which the matrices of a model are sorted (see `inventory`)."""
    return layer, type_order(type), -1 if expert is None else expert


@dataclass(frozen=True)
class Part:
    """A matrix and the piece of a tensor that it is.

    The outputs are the tensor's rows, or its columns where it is `transposed`. They are divided
    into `groups` equal ones, of each of which the matrix is `size` outputs from `start`.
    rope_heads: by how many heads the rows are to be put into the order of transformers, or 0.

    All that `read` needs, and small: made to be sent to another process.
    """

    entry: Entry
    tensor: Tensor
    transposed: bool
    groups: int
    start: int
    size: int
    rope_heads: int = 0

    @property
    def rows(self) -> tuple[int, int]:
        """First row and number of the rows to read, all axes of the tensor but the last in one."""
        rows = self.tensor.shape[-2]
        first = rows * (self.entry.expert or 0) if len(self.tensor.shape) == 3 else 0
        if self.transposed or self.groups > 1:
            return first, rows
        return first + self.start, self.size

    @property
    def stored(self) -> int:
        """Bytes of the matrix where it is stored."""
        values = math.prod(self.entry.shape)
        return self.tensor.size * values // math.prod(self.tensor.shape)


@dataclass(frozen=True)
class Plan:
    """All matrices of one stack of a checkpoint.

    stack: its kind and name. others: the kinds of other stacks of the language, which are not read.
    parts: in the order of `inventory`.
    """

    stack: str
    others: tuple[str, ...]
    parts: tuple[Part, ...]


def inventory(model: str | Path | Checkpoint, *, stack: str | None = None) -> list[Entry]:
    """Every projection matrix of a stack of a checkpoint, from the headers of its files alone.

    Sorted by layer, then in the order of `wdlib.TYPES` (the types of other names follow), then by
    expert (None first). stack: the kind ("encoder", "decoder", "cross-attention", "vision", ...) or
    the name of a stack of layers; by default the language model's, and of encoder and decoder the
    decoder. Other stacks in the file (multi-token prediction is one) are not listed.

    Raises WdlibError when a file is corrupt, truncated or quantised in a way that cannot be read,
    when no name matches a row, when a layer holds a matrix that no row names, or lacks one that
    others have.
    """
    return [part.entry for part in plan(model, stack=stack).parts]


def projection_parts(
    model: str | Path | Checkpoint,
    *,
    layers: Iterable[int] | None = None,
    types: Iterable[str] | None = None,
    stack: str | None = None,
) -> list[Part]:
    """What there is to read of a checkpoint, from the headers of its files alone.

    `layers` (counted from 0) and `types` limit it; `types` are `wdlib.TYPES` by default, and others
    that `inventory` lists take part where they are named. One of the seven that the architecture
    does not have (gate in GPT-2) yields nothing. The order, and `stack`, are those of `inventory`.

    Raises WdlibError for what `inventory` refuses, for an unknown layer or type, and for matrices
    that are stored in a way that cannot be read.
    """
    checkpoint = resolve(model)
    parts = plan(checkpoint, stack=stack).parts
    last = parts[-1].entry.layer
    asked = set(range(last + 1) if layers is None else layers)
    kinds = set(TYPES if types is None else types)
    if strange := sorted(asked - set(range(last + 1))):
        raise WdlibError(
            f"{checkpoint.name} has no layer {strange[0]}: its layers are 0 to {last}."
        )
    known = sorted({*TYPES, *(part.entry.type for part in parts)}, key=type_order)
    if unknown := sorted(kinds - set(known)):
        raise WdlibError(
            f"There is no projection type {unknown[0]!r} in {checkpoint.name}: give some of "
            f"{', '.join(known)}."
        )
    found = [part for part in parts if part.entry.layer in asked and part.entry.type in kinds]
    for tensor in {part.tensor.dtype: part.tensor for part in found}.values():
        check_readable(tensor)
    return found


def plan(model: str | Path | Checkpoint, *, stack: str | None = None) -> Plan:
    """The pieces of tensors to read of a stack. Raises WdlibError as `inventory` does."""
    checkpoint = resolve(model)
    configuration, tensors = read_headers(checkpoint)
    around = configuration.geometry(stacks.LANGUAGE[0]).architectures
    for models, reason in lexicon.REFUSED.items():
        if refused := set(models.split()) & set(around):
            raise WdlibError(
                f"{checkpoint.name} is a {refused.pop()}, which cannot be read: {reason}."
            )
    found = {name: tensor_role(name, around) for name in tensors}
    roles = {name: role for name, role in found.items() if role}
    _refuse_packed(tensors, roles)
    if not roles:
        _refuse_names(checkpoint, configuration, tensors)
    chosen = stacks.choose(checkpoint.name, roles, configuration, stack)
    geometry = configuration.geometry(stacks.kind(chosen))
    own = {name: role for name, role in roles.items() if role.stack == chosen}
    layers = max(role.layer for role in own.values()) + 1
    if geometry.layers is not None:
        if layers > geometry.layers + geometry.predictors:
            raise WdlibError(
                f"{checkpoint.name} holds a layer {layers - 1}, and its configuration says that it "
                f"has {geometry.layers} layers: the configuration is another model's, so correct "
                "it."
            )
        layers = geometry.layers
    own = {name: role for name, role in own.items() if role.layer < layers}
    _check_all_known(checkpoint, tensors, roles, own, known=bool(configuration.fields))
    parts = [p for name, role in own.items() for p in _parts_of(tensors[name], role, geometry)]
    parts.sort(key=lambda part: place_order(*part.entry.place))
    rows = [(part.entry, own[part.entry.name]) for part in parts]
    completeness.check(checkpoint.name, geometry, layers, rows)
    return Plan(chosen, tuple(stacks.others(roles, chosen)), tuple(parts))


_QUANTISED = re.compile(r".*\.(?:qweight|weight_packed|weight\.absmax|weight_scale|SCB)")
_PACKED = re.compile(r"(.*\.weight)\.absmax|(.*)\.scales")
"""What bitsandbytes and MLX put beside a tensor whose shape is no longer the matrix's."""


def _refuse_packed(tensors: Mapping[str, Tensor], roles: Mapping[str, TensorRole]) -> None:
    """Refuse projections whose shape their quantisation has changed."""
    for name, tensor in tensors.items():
        if found := _PACKED.fullmatch(name):
            packed = found[1] or f"{found[2]}.weight"
            if packed in roles:
                raise _quantised(tensor)


def _quantised(tensor: Tensor) -> WdlibError:
    return WdlibError(
        f"{tensor.file.name} holds quantised weights ({tensor.name}), which cannot be read from "
        "safetensors: use the unquantised checkpoint or a GGUF file of the model."
    )


def _refuse_names(
    checkpoint: Checkpoint, configuration: Configuration, tensors: Mapping[str, Tensor]
) -> None:
    """Say why no tensor is a projection."""
    for name, tensor in tensors.items():
        if _QUANTISED.fullmatch(name):
            raise _quantised(tensor)
    hint = "" if configuration.fields else "put the model's config.json beside the file, or "
    raise WdlibError(
        f"No tensor of {checkpoint.name} has a name that is known as a projection (seen: "
        f"{', '.join(list(tensors)[:4]) or 'none'}): {hint}{_ADD}"
    )


_ADD = "add rows for its architecture to wdlib/checkpoints/lexicon.py (see docs/architectures.md)."


def _check_all_known(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    roles: Mapping[str, TensorRole],
    own: Mapping[str, TensorRole],
    *,
    known: bool,
) -> None:
    """Refuse a layer with a matrix that no row takes and that is on no list of others.

    known: whether there is a configuration, without which no joined tensor has a row.
    """
    layers = {(role.stack.split(":")[0], role.layer) for role in own.values()}
    named = {role.stack.split(":")[0] for role in roles.values()}
    for name, tensor in tensors.items():
        where = place(name)
        if name in roles or where is None or len(tensor.shape) < 2 or is_other(name):
            continue
        unknown = where.stack not in named and stacks.kind(where.stack) in stacks.LANGUAGE
        if not unknown and (where.stack, where.layer) not in layers:
            continue
        hint = "" if known else "put the model's config.json beside the file, or "
        raise WdlibError(
            f"The tensor {name} of {checkpoint.name}, of shape {tensor.shape}, is a matrix of a "
            "layer that is read, and no row names it, so that the rest would pass for the whole "
            f"layer: {hint}{_ADD}"
        )


def _shaped(tensor: Tensor, role: TensorRole, geometry: Geometry) -> Tensor:
    """The tensor as (rows, columns) or (expert, rows, columns), if it is stored otherwise."""
    match tensor.shape:
        case (rows, heads, size) if role.flat:
            shape: tuple[int, ...] = (rows, heads * size)
        case (rows, columns) if role.is_routed and role.expert is None and geometry.experts:
            shape = (geometry.experts, rows // geometry.experts, columns)
        case (1, rows, columns) if role.block == "shared expert":
            shape = (rows, columns)
        case _:
            return tensor
    return dataclasses.replace(tensor, shape=shape)


def _parts_of(tensor: Tensor, role: TensorRole, geometry: Geometry) -> Iterator[Part]:
    """The matrices that one tensor holds."""
    where = f"tensor {tensor.name} of {tensor.file.name}"
    tensor = _shaped(tensor, role, geometry)
    dimensions = (3,) if role.is_routed and role.expert is None else (2,)
    if len(tensor.shape) not in dimensions or 0 in tensor.shape:
        raise WdlibError(f"The {where} is no matrix: its shape is {tensor.shape}.")
    *stack, rows, columns = tensor.shape
    transposed = role.transposed
    if stack and geometry.width and rows != columns and geometry.width in (rows, columns):
        # Where the shape decides, it does: the same model is found stored both ways.
        transposed = (rows if role.types == ("down",) else columns) != geometry.width
    d_out, d_in = (columns, rows) if transposed else (rows, columns)
    heads, kv_heads = geometry.heads_of(role.layer)
    shares = [1] * len(role.types)
    joined = set(role.types) == {"q", "k", "v"}
    if (joined or role.rope or role.groups in ("heads", "kv heads")) and not (heads and kv_heads):
        raise WdlibError(
            f"The {where} cannot be taken apart without the number of attention heads: put the "
            "model's config.json beside the file (a GGUF file has it in its metadata)."
        )
    heads, kv_heads = heads or 1, kv_heads or 1
    groups = role.groups
    if groups == "columns":
        groups = d_out // len(role.types)
    elif groups == "heads":
        groups = heads
    elif groups == "kv heads":
        groups, shares = kv_heads, [heads // kv_heads, 1, 1]
    elif joined and groups == 1:
        shares = [heads if kind == "q" else kv_heads for kind in role.types]
    rope_heads = (heads if role.types == ("q",) else kv_heads) if role.rope else 0
    if d_out % (int(groups) * sum(shares)) or d_out % max(rope_heads * 2, 1):
        raise WdlibError(
            f"The {where} has {d_out} rows, which does not fit {heads} attention heads "
            f"({kv_heads} for keys and values): the model's configuration is another's."
        )
    groups = int(groups)
    unit = d_out // groups // sum(shares)
    borders = [unit * share for share in accumulate(shares, initial=0)]
    for kind, (start, end) in zip(role.types, pairwise(borders), strict=True):
        for expert in range(stack[0]) if stack else (role.expert,):
            shape = ((end - start) * groups, d_in)
            entry = Entry(role.layer, kind, tensor.name, shape, tensor.dtype, expert)
            yield Part(entry, tensor, transposed, groups, start, end - start, rope_heads)
