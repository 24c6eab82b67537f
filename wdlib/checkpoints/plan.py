"""Which piece of which tensor every matrix of a checkpoint is, from the headers alone."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import completeness, lexicon, stacks
from wdlib.checkpoints.architectures import (
    CROSS,
    TensorRole,
    is_other,
    place,
    tensor_role,
    type_order,
)
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.formats import Tensor, check_readable
from wdlib.checkpoints.geometry import Configuration, Geometry
from wdlib.checkpoints.headers import read_headers
from wdlib.checkpoints.quantised import QuantisedTensor, UnreadableTensor

_Place = tuple[int, str, int | None]


@dataclass(frozen=True)
class Entry:
    """One matrix of a checkpoint, from the headers alone.

    `layer` counts from 0; `type` is one of `wdlib.TYPES`, or the own name of a projection that is
    none of them ("kv_a", "in_proj", ...); `name` is the tensor's name in the file, or the one that
    it has unquantised; `shape` is (d_out, d_in); `dtype` is what is stored ("BF16", "Q4_1", "GPTQ
    4-bit", ...). `expert` is None for a matrix that every token passes (a dense layer, or the
    shared experts beside routed ones) and the expert's number for a routed one.
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

    transposed: of how many blocks of rows each is to be transposed: 1 for the tensor as a whole, 0
    for none. Then the rows, which are outputs, are divided into `groups` equal ones, of each of
    which the matrix is `size` rows from `start`. rope_heads: by how many heads the rows are to be
    put into the order of transformers, or 0.

    All that `read` needs, and small: made to be sent to another process.
    """

    entry: Entry
    tensor: Tensor
    transposed: int
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

    model: the checkpoint's name. stack: the stack's. others: the kinds of other stacks of the
    language that the checkpoint holds. geometry: of the stack. parts: in the order of `inventory`.
    vectors: the tensors of one dimension in its layers, by name.
    """

    model: str
    stack: str
    others: tuple[str, ...]
    geometry: Geometry
    parts: tuple[Part, ...]
    vectors: Mapping[str, Tensor]

    def chosen(
        self, *, layers: Iterable[int] | None = None, types: Iterable[str] | None = None
    ) -> list[Part]:
        """Those of some layers and types. Arguments and errors as `projection_parts` has them."""
        last = self.parts[-1].entry.layer
        asked = set(range(last + 1) if layers is None else layers)
        kinds = set(TYPES if types is None else types)
        if strange := sorted(asked - set(range(last + 1))):
            raise WdlibError(f"{self.model} has no layer {strange[0]}: its layers are 0 to {last}.")
        known = sorted({*TYPES, *(part.entry.type for part in self.parts)}, key=type_order)
        if unknown := sorted(kinds - set(known)):
            raise WdlibError(
                f"There is no projection type {unknown[0]!r} in {self.model}: give some of "
                f"{', '.join(known)}."
            )
        found = [p for p in self.parts if p.entry.layer in asked and p.entry.type in kinds]
        for tensor in {part.tensor.dtype: part.tensor for part in found}.values():
            if not isinstance(tensor, QuantisedTensor):
                check_readable(tensor)
        return found


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
    return plan(model, stack=stack).chosen(layers=layers, types=types)


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
    if not roles:
        _refuse_names(checkpoint, configuration, tensors)
    chosen = stacks.choose(checkpoint.name, roles, configuration, stack)
    host = chosen.removesuffix(CROSS)
    geometry = configuration.geometry(stacks.kind(host))
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
    for name in own:
        _check_readable(tensors[name])
    parts = [p for name, role in own.items() for p in _parts_of(tensors[name], role, geometry)]
    _check_all_known(checkpoint, tensors, roles, own, geometry)
    parts.sort(key=lambda part: place_order(*part.entry.place))
    rows = [(part.entry, own[part.entry.name]) for part in parts]
    crossed = {role.layer for role in roles.values() if role.stack == f"{host}{CROSS}"}
    wanted = range(layers) if chosen == host else sorted(crossed)
    completeness.check(checkpoint.name, geometry, wanted, rows, crossed=crossed)
    others = tuple(stacks.others(roles, chosen))
    flat = {name: place(name) for name, tensor in tensors.items() if len(tensor.shape) == 1}
    vectors = {name: tensors[name] for name, at in flat.items() if at and at.stack == chosen}
    return Plan(checkpoint.name, chosen, others, geometry, tuple(parts), vectors)


def _check_readable(tensor: Tensor) -> None:
    if isinstance(tensor, UnreadableTensor):
        raise WdlibError(
            f"The tensor {tensor.name} of {tensor.file.name} is not read, because {tensor.reason}."
        )


def _refuse_names(
    checkpoint: Checkpoint, configuration: Configuration, tensors: Mapping[str, Tensor]
) -> None:
    """Say why no tensor is a projection."""
    for tensor in tensors.values():
        _check_readable(tensor)
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
    geometry: Geometry,
) -> None:
    """Refuse a layer with a matrix that no row takes and that is on no list of others."""
    layers = {(role.stack.split(":")[0], role.layer) for role in own.values()}
    named = {role.stack.split(":")[0] for role in roles.values()}
    experts = {(role.stack, role.layer) for role in own.values() if role.is_routed}
    for name, tensor in tensors.items():
        where = None if name in roles or len(tensor.shape) < 2 else place(name)
        if where is None:
            continue
        routed = (where.stack, where.layer) in experts or tensor.shape[0] == geometry.experts
        if is_other(where.inner, routed=routed):
            continue
        unknown = where.stack not in named and stacks.kind(where.stack) in stacks.LANGUAGE
        if not unknown and (where.stack, where.layer) not in layers:
            continue
        # Without a configuration no joined tensor has a row.
        hint = "" if geometry.architectures else "put the model's config.json beside the file, or "
        raise WdlibError(
            f"The tensor {name} of {checkpoint.name}, of shape {tensor.shape}, is a matrix of a "
            "layer that is read, and no row names it, so that the rest would pass for the whole "
            f"layer: {hint}{_ADD}"
        )


def _shaped(tensor: Tensor, role: TensorRole, geometry: Geometry) -> Tensor:
    """The tensor as (rows, columns) or (expert, rows, columns), if it is stored otherwise."""
    match tensor.shape:
        case (rows, heads, size) if role.axes == "flat":
            shape: tuple[int, ...] = (rows, heads * size)
        case (heads, rows, columns) if role.axes == "stacked":
            shape = (heads * rows, columns)
        case (rows, columns) if role.is_routed and role.expert is None and geometry.experts:
            shape = (geometry.experts, rows // geometry.experts, columns)
        case (1, rows, columns) if role.block == "shared expert":
            shape = (rows, columns)
        case _:
            return tensor
    return dataclasses.replace(tensor, shape=shape)


def _parts_of(tensor: Tensor, role: TensorRole, geometry: Geometry) -> Iterator[Part]:
    """The matrices that one tensor holds."""
    if isinstance(tensor, QuantisedTensor) and len(tensor.shape) == 2:
        role = dataclasses.replace(role, transposed=False)  # who quantises a Conv1D transposes it
    where = f"tensor {tensor.name} of {tensor.file.name}"
    blocks = tensor.shape[0] if role.axes == "stacked" else 1
    shaped = _shaped(tensor, role, geometry)
    if isinstance(tensor, QuantisedTensor) and shaped.shape != tensor.shape:
        raise WdlibError(
            f"The {where} is quantised ({tensor.dtype}) in a shape that is not taken apart, "
            f"{tensor.shape}: use the unquantised checkpoint."
        )
    tensor = shaped
    dimensions = 3 if role.is_routed and role.expert is None else 2
    if len(tensor.shape) != dimensions or 0 in tensor.shape:
        raise WdlibError(f"The {where} is no matrix: its shape is {tensor.shape}.")
    *stack, rows, columns = tensor.shape
    transposed = role.transposed
    if stack and geometry.width and rows != columns and geometry.width in (rows, columns):
        # Where the shape decides, it does: the same model is found stored both ways.
        transposed = (rows if role.types == ("down",) else columns) != geometry.width
    d_out, d_in = (columns * blocks, rows // blocks) if transposed else (rows, columns)
    groups, shares = _division(role, geometry, d_out, where)
    unit = d_out // groups // sum(shares)
    borders = [unit * share for share in accumulate(shares, initial=0)]
    heads, kv_heads = geometry.heads_of(role.layer)
    for kind, (start, end) in zip(role.types, pairwise(borders), strict=True):
        rope = {"q": heads, "k": kv_heads}.get(kind) if role.rope else 0
        for expert in range(stack[0]) if stack else (role.expert,):
            shape = ((end - start) * groups, d_in)
            entry = Entry(role.layer, kind, tensor.name, shape, tensor.dtype, expert)
            turned = blocks if transposed else 0
            yield Part(entry, tensor, turned, groups, start, end - start, rope or 0)


def _division(
    role: TensorRole, geometry: Geometry, d_out: int, where: str
) -> tuple[int, list[int]]:
    """Into how many groups a tensor's outputs are divided, and the shares of its types in each."""
    heads, kv_heads = geometry.heads_of(role.layer)
    joined = set(role.types) == {"q", "k", "v"}
    if (joined or role.rope or role.groups in ("heads", "kv heads")) and not (heads and kv_heads):
        raise WdlibError(
            f"The {where} cannot be taken apart without the number of attention heads: put the "
            "model's config.json beside the file (a GGUF file has it in its metadata)."
        )
    heads, kv_heads, shares = heads or 1, kv_heads or 1, [1] * len(role.types)
    if role.groups == "kv heads":
        shares = [heads // kv_heads, 1, 1]
    elif joined and role.groups == 1:
        shares = [heads if kind == "q" else kv_heads for kind in role.types]
    known = {"heads": heads, "kv heads": kv_heads, "columns": d_out // len(role.types)}
    groups = role.groups if isinstance(role.groups, int) else known[role.groups]
    rope_rows = {"q": heads * 2, "k": kv_heads * 2}.get(role.types[0], 1) if role.rope else 1
    if d_out % (groups * sum(shares) * (2 if role.rope and joined else 1)) or d_out % rope_rows:
        raise WdlibError(
            f"The {where} has {d_out} rows, which does not fit {heads} attention heads "
            f"({kv_heads} for keys and values): the model's configuration is another's."
        )
    return groups, shares
