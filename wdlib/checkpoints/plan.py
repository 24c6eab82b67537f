"""Which piece of which tensor every matrix of a checkpoint is, from the headers alone."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

from wdlib import TYPES, WdlibError
from wdlib.checkpoints.architectures import OTHERS, TensorRole, tensor_role
from wdlib.checkpoints.files import Checkpoint, resolve
from wdlib.checkpoints.formats import Tensor, check_readable
from wdlib.checkpoints.geometry import Geometry
from wdlib.checkpoints.headers import read_headers
from wdlib.checkpoints.quantised import QuantisedTensor, UnreadableTensor

_Place = tuple[int, str, int | None]


@dataclass(frozen=True)
class Entry:
    """One matrix of a checkpoint, from the headers alone.

    `layer` counts from 0; `type` is one of `wdlib.TYPES`; `name` is the tensor's name in the file,
    or the one that it has unquantised; `shape` is (d_out, d_in); `dtype` is what is stored ("BF16",
    "Q4_1", "GPTQ 4-bit", ...). `expert` is None for
    a matrix that every token passes (a dense layer, or the shared experts beside routed ones) and
    the expert's number for a routed one.
    """

    layer: int
    type: str
    name: str
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None

    @property
    def place(self) -> _Place:
        """What no two matrices of a model share: layer, type and expert."""
        return self.layer, self.type, self.expert


def place_order(layer: int, type: str, expert: int | None) -> tuple[int, int, int]:
    """The key by which the matrices of a model are sorted (see `inventory`)."""
    return layer, TYPES.index(type), -1 if expert is None else expert


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
        first = rows * (self.entry.expert or 0) if len(self.tensor.shape) == 3 else 0
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
    return [part.entry for part in _all_parts(resolve(model))]


def projection_parts(
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
    checkpoint = resolve(model)
    parts = _all_parts(checkpoint)
    last = parts[-1].entry.layer
    asked = set(range(last + 1) if layers is None else layers)
    kinds = set(TYPES if types is None else types)
    if strange := sorted(asked - set(range(last + 1))):
        raise WdlibError(
            f"{checkpoint.name} has no layer {strange[0]}: its layers are 0 to {last}."
        )
    if unknown := sorted(kinds - set(TYPES)):
        raise WdlibError(f"There is no projection type {unknown[0]!r}: give some of {TYPES}.")
    parts = [part for part in parts if part.entry.layer in asked and part.entry.type in kinds]
    for tensor in {part.tensor.dtype: part.tensor for part in parts}.values():
        if not isinstance(tensor, QuantisedTensor):
            check_readable(tensor)
    return parts


def _all_parts(checkpoint: Checkpoint) -> list[Part]:
    """The pieces of tensors to read, in the order of `inventory`."""
    geometry, tensors = read_headers(checkpoint)
    roles = {name: tensor_role(name, geometry.architecture) for name in tensors}
    parts: list[Part] = []
    for name, role in roles.items():
        if role:
            parts += _parts_of(tensors[name], role, geometry)
    if geometry.layers is not None:
        beyond = max((part.entry.layer for part in parts), default=0)
        if beyond >= geometry.layers + geometry.predictors:
            raise WdlibError(
                f"{checkpoint.name} holds a layer {beyond}, and its configuration says that it has "
                f"{geometry.layers} layers: the configuration is another model's, so correct it."
            )
        parts = [part for part in parts if part.entry.layer < geometry.layers]
    if not parts:
        _refuse_names(checkpoint, geometry, tensors)
    _check_all_known(checkpoint, geometry, tensors, roles)
    parts.sort(key=lambda part: place_order(*part.entry.place))
    _check_complete(checkpoint, geometry, [part.entry for part in parts])
    return parts


def _check_all_known(
    checkpoint: Checkpoint,
    geometry: Geometry,
    tensors: Mapping[str, Tensor],
    roles: Mapping[str, TensorRole | None],
) -> None:
    """Refuse a layer with a matrix that no rule takes and that is on no list of others."""
    read = [role for role in roles.values() if role]
    if geometry.layers is not None:
        read = [role for role in read if role.layer < geometry.layers]
    stacks = {role.stack for role in read}
    for name, tensor in tensors.items():
        above = (name[: dot.start()] for dot in re.finditer(r"\.", name))
        if roles[name] or len(tensor.shape) < 2 or OTHERS.fullmatch(name):
            continue
        if any(stack in stacks for stack in above):
            raise WdlibError(
                f"The tensor {name} of {checkpoint.name}, of shape {tensor.shape}, is a matrix of "
                "a layer that is read, and no row names it: the rest of the layer alone would pass "
                "for the whole. Add a row for it to RULES in wdlib/checkpoints/architectures.py, "
                "or to OTHERS if it is no projection."
            )


def _refuse_names(checkpoint: Checkpoint, geometry: Geometry, tensors: dict[str, Tensor]) -> None:
    """Say why no tensor is a projection."""
    for tensor in tensors.values():
        if isinstance(tensor, UnreadableTensor):
            raise _unread(tensor)
    hint = "" if geometry.architecture else "put the model's config.json beside the file, or "
    raise WdlibError(
        f"No tensor of {checkpoint.name} has a name that is known as a projection (seen: "
        f"{', '.join(list(tensors)[:4]) or 'none'}): {hint}add rows for its architecture to RULES "
        "in wdlib/checkpoints/architectures.py."
    )


def _unread(tensor: UnreadableTensor) -> WdlibError:
    return WdlibError(
        f"The tensor {tensor.name} of {tensor.file.name} is not read, because {tensor.reason}."
    )


def _parts_of(tensor: Tensor, role: TensorRole, geometry: Geometry) -> Iterator[Part]:
    """The matrices that one tensor holds."""
    if isinstance(tensor, UnreadableTensor):
        raise _unread(tensor)
    if isinstance(tensor, QuantisedTensor) and role.layout == "conv1d":
        role = replace(role, layout="linear")  # those who quantise a Conv1D transpose it
    where = f"tensor {tensor.name} of {tensor.file.name}"
    dimensions = (2, 3) if role.expert is None else (2,)
    if len(tensor.shape) not in dimensions or 0 in tensor.shape:
        raise WdlibError(f"The {where} is no matrix: its shape is {tensor.shape}.")
    *stack, rows, columns = tensor.shape
    d_out, d_in = (columns, rows) if role.layout == "conv1d" else (rows, columns)
    heads, shares = 1, [1] * len(role.types)
    joined = role.types == ("q", "k", "v")
    if joined or role.layout == "rope":
        if geometry.heads is None or geometry.kv_heads is None:
            raise WdlibError(
                f"The {where} cannot be taken apart without the number of attention heads: put the "
                "model's config.json beside the file (a GGUF file has it in its metadata)."
            )
        heads = geometry.kv_heads if role.types == ("k",) else geometry.heads
        shares = [heads, geometry.kv_heads, geometry.kv_heads] if joined else shares
    granularity = heads * 2 if role.layout == "rope" else sum(shares)
    if d_out % granularity:
        raise WdlibError(
            f"The {where} has {d_out} rows, which does not fit {geometry.heads} attention heads "
            f"({geometry.kv_heads} for keys and values): the model's configuration is another's."
        )
    borders = [d_out * share // sum(shares) for share in accumulate(shares, initial=0)]
    for kind, (start, end) in zip(role.types, pairwise(borders), strict=True):
        for expert in range(stack[0]) if stack else (role.expert,):
            shape = (end - start, d_in)
            entry = Entry(role.layer, kind, tensor.name, shape, tensor.dtype, expert)
            yield Part(entry, tensor, role.layout, heads, start, end - start)


_MLP = ("gate", "up", "down")


def _expected(layers: int, there: Collection[_Place]) -> Iterator[_Place]:
    """The places that a whole checkpoint of so many layers fills, if these are some of them.

    Every layer has every type, but for gate, which some architectures lack. An expert that any
    layer has belongs to every layer with routed experts, and beside them to every type of the MLP.
    """
    types = [t for t in TYPES if t != "gate" or any(kind == t for _, kind, _ in there)]
    routed = {expert for *_, expert in there if expert is not None}
    experts: dict[int, set[int | None]] = defaultdict(set)
    for layer, kind, expert in there:
        if kind in _MLP:
            experts[layer].add(expert)
    for layer in range(layers):
        of_layer = experts[layer] or {None}
        if of_layer != {None}:
            of_layer |= set(range(max(routed) + 1))
        for kind in types:
            for expert in of_layer if kind in _MLP else {None}:
                yield layer, kind, expert


def _check_complete(checkpoint: Checkpoint, geometry: Geometry, entries: list[Entry]) -> None:
    """Refuse a checkpoint in which a layer lacks a matrix, has it twice or in a wrong shape."""
    there = Counter(entry.place for entry in entries)
    number = entries[-1].layer + 1 if geometry.layers is None else geometry.layers
    _check_numbers(checkpoint, number, there)
    _check_experts(checkpoint, geometry, entries)
    expected = sorted(_expected(number, there), key=lambda place: place_order(*place))
    for layer, kind, expert in expected:
        if (layer, kind, expert) not in there:
            what = kind if expert is None else f"{kind} of expert {expert}"
            raise WdlibError(
                f"Layer {layer} of {checkpoint.name} has no {what}: the checkpoint is incomplete, "
                "or RULES in wdlib/checkpoints/architectures.py lacks a row for its name."
            )
    for entry, following in pairwise(entries):
        if entry.place == following.place:
            raise WdlibError(
                f"Layer {entry.layer} of {checkpoint.name} has {entry.type} twice: {entry.name} "
                f"and {following.name}."
            )
    _check_shapes(checkpoint, entries)


def _check_numbers(checkpoint: Checkpoint, number: int, there: Collection[_Place]) -> None:
    """Refuse gaps among layers and experts, before anything is made that is as large as they."""
    experts = {expert for *_, expert in there if expert is not None}
    for what, count, held in (
        ("layer", number, {layer for layer, *_ in there}),
        ("expert", max(experts, default=-1) + 1, experts),
    ):
        gap = next((i for i in range(count) if i not in held), None)
        if gap is not None:
            raise WdlibError(
                f"{checkpoint.name} has no {what} {gap} of {count}: the checkpoint is incomplete, "
                "its configuration is another's, or RULES in wdlib/checkpoints/architectures.py "
                "lacks a row for a name of it."
            )


_SHARED = re.compile(r".*shared_(?:experts?|mlp)\..*|.*_shexp\..*")


def _check_experts(checkpoint: Checkpoint, geometry: Geometry, entries: list[Entry]) -> None:
    """Refuse another number of experts than the configuration's, and shared experts alone."""
    routed = {entry.expert for entry in entries} - {None}
    if routed and geometry.experts not in (None, len(routed)):
        raise WdlibError(
            f"{checkpoint.name} holds {len(routed)} experts, and its configuration says "
            f"{geometry.experts}: it is incomplete, or the configuration is another model's."
        )
    with_routed = {entry.layer for entry in entries if entry.expert is not None}
    for entry in entries:
        if entry.layer not in with_routed and _SHARED.fullmatch(entry.name):
            raise WdlibError(
                f"Layer {entry.layer} of {checkpoint.name} has a shared expert ({entry.name}) "
                "alone, and no routed one: the checkpoint is incomplete."
            )


def _check_shapes(checkpoint: Checkpoint, entries: list[Entry]) -> None:
    """Refuse matrices that do not fit each other: one hidden size, and one inner size per MLP."""
    width = entries[0].shape[1]
    for entry in entries:
        if entry.shape[0 if entry.type in ("o", "down") else 1] != width:
            raise WdlibError(
                f"The tensor {entry.name} of {checkpoint.name} gives {entry.type} the shape "
                f"{entry.shape}, which does not fit a hidden size of {width}: the rule in "
                "wdlib/checkpoints/architectures.py for its name is not right for this "
                "architecture."
            )
    inner = {(e.layer, e.expert): e for e in entries if e.type == "down"}
    for entry in entries:
        down = inner[entry.layer, entry.expert] if entry.type in ("gate", "up") else None
        if down and entry.shape[0] != down.shape[1]:
            raise WdlibError(
                f"The tensor {entry.name} of {checkpoint.name} gives {entry.type} "
                f"{entry.shape[0]} rows, and {down.name} has {down.shape[1]} columns: it joins "
                "gate and up in a way that needs a row of its own in RULES of "
                "wdlib/checkpoints/architectures.py."
            )
