"""Whether the matrices of a stack are all there and fit each other."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Protocol

from wdlib import TYPES, WdlibError
from wdlib.checkpoints.architectures import TensorRole, type_order
from wdlib.checkpoints.geometry import Geometry


class Matrix(Protocol):
    """What is checked of a matrix: see `plan.Entry`."""

    @property
    def layer(self) -> int: ...
    @property
    def type(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def expert(self) -> int | None: ...


_Row = tuple[Matrix, TensorRole]

_ADD = "or wdlib/checkpoints/lexicon.py lacks a row for its name (see docs/architectures.md)"


def check(
    model: str,
    geometry: Geometry,
    layers: Collection[int],
    rows: Sequence[_Row],
    *,
    crossed: Collection[int] = (),
) -> None:
    """Refuse a stack in which a layer lacks a matrix, has it twice or in a wrong shape.

    layers: those that have to be there. rows: the matrices in their order, each with what its name
    says. crossed: the layers that have cross-attention, which is a stack of its own. Layers of one
    kind, by the configuration, hold the same; those of different kinds (hybrids) need not.

    Raises WdlibError that names the layer and what is wrong with it.
    """
    _check_numbers(model, geometry, layers, rows)
    _check_kinds(model, geometry, layers, rows)
    _check_blocks(model, geometry, layers, rows, crossed)
    for (entry, _), (following, _) in pairwise(rows):
        if (entry.layer, entry.type, entry.expert) == (
            following.layer,
            following.type,
            following.expert,
        ):
            raise WdlibError(
                f"Layer {entry.layer} of {model} has {entry.type} twice: {entry.name} and "
                f"{following.name}."
            )
    _check_shapes(model, [entry for entry, _ in rows])


def _check_numbers(
    model: str, geometry: Geometry, layers: Collection[int], rows: Sequence[_Row]
) -> None:
    """Refuse gaps among layers and experts, before anything is made that is as large as they."""
    routed = {entry.expert for entry, _ in rows if entry.expert is not None}
    held = {entry.layer for entry, _ in rows}
    experts = range(max(routed, default=-1) + 1)
    for what, wanted, there in (("layer", layers, held), ("expert", experts, routed)):
        gap = next((i for i in wanted if i not in there), None)
        if gap is not None:
            raise WdlibError(
                f"{model} has no {what} {gap} of {len(wanted)}: the checkpoint is incomplete, its "
                f"configuration is another's, {_ADD}."
            )
    if routed and geometry.experts not in (None, len(routed)):
        raise WdlibError(
            f"{model} holds {len(routed)} experts, and its configuration says {geometry.experts}: "
            "it is incomplete, or the configuration is another model's."
        )
    with_routed = {entry.layer for entry, role in rows if role.is_routed}
    for entry, role in rows if geometry.experts != 0 else ():
        if role.block == "shared expert" and entry.layer not in with_routed:
            raise WdlibError(
                f"Layer {entry.layer} of {model} has a shared expert ({entry.name}) alone, and no "
                f"routed one: the checkpoint is incomplete, {_ADD}."
            )


_MLP = ("mlp", "shared expert", "experts")


def _check_kinds(
    model: str, geometry: Geometry, layers: Collection[int], rows: Sequence[_Row]
) -> None:
    """Refuse a layer that lacks what others of its kind have."""
    kinds = dict(enumerate(geometry.kinds))
    held: dict[tuple[str, int], set[tuple[str, int | None]]] = defaultdict(set)
    for entry, role in rows:
        block = role.block if role.block in _MLP else "mixer"
        held[block, entry.layer].add((entry.type, entry.expert))
    for layer in layers:
        alike = [n for n in layers if kinds.get(n) == kinds.get(layer)]
        wanted = set().union(*(held["mixer", n] for n in alike))
        lacking = wanted - held["mixer", layer]
        for block in _MLP:
            there = set().union(*(held[block, n] for n in layers))
            if held[block, layer]:
                lacking |= there - held[block, layer]
        own = {block for block in _MLP if held[block, layer]}
        for other in alike:
            theirs = {block for block in _MLP if held[block, other]}
            # A mixture of experts may have layers that are dense, and only one of the two.
            swaps = "mlp" in own ^ theirs and "experts" in own ^ theirs
            for block in () if swaps and own else theirs - own:
                lacking |= {(kind, e if own else None) for kind, e in held[block, other]}
        if lacking:
            kind, expert = min(lacking, key=lambda lack: (type_order(lack[0]), lack[1] or -1))
            raise _lacks(model, layer, kind, expert)


def _lacks(model: str, layer: int, kind: str, expert: int | None = None) -> WdlibError:
    what = kind if expert is None else f"{kind} of expert {expert}"
    return WdlibError(
        f"Layer {layer} of {model} has no {what}: the checkpoint is incomplete, {_ADD}."
    )


_OF_MLP = {"gate", "up", "down"}
_QUERIES = {"q", "q_b", "qk", "receptance"}
_KEYS = {"k", "k_b", "kv", "kv_b", "qk"}
_VALUES = {"v", "v_b", "kv", "kv_b", "v_current"}
_OUTPUTS = {"o", "o_b"}
"""Types that stand for each of the four of attention, where it is not the usual one."""


def _check_blocks(
    model: str,
    geometry: Geometry,
    layers: Collection[int],
    rows: Sequence[_Row],
    crossed: Collection[int],
) -> None:
    """Refuse a layer whose attention or MLP is not whole, whatever other layers have."""
    types: dict[int, set[str]] = defaultdict(set)
    inner: dict[tuple[int, str, int | None], set[str]] = defaultdict(set)
    for entry, role in rows:
        types[entry.layer].add(entry.type)
        if role.block in _MLP:
            inner[entry.layer, role.block, entry.expert].add(entry.type)
    for (layer, _, expert), found in sorted(inner.items(), key=str):
        for kind in ("up", "down"):
            if kind not in found:
                raise _lacks(model, layer, kind, expert)
    mixed = {layer for layer in layers if types[layer] - _OF_MLP} | {*crossed}
    both = any("down" in types[layer] for layer in mixed)
    for layer in layers:
        found = types[layer]
        if found & {"q", "k", "v", "o"}:
            wanted = {"q": _QUERIES, "k": _KEYS, "v": _VALUES, "o": _OUTPUTS}
            for kind, known in wanted.items():
                if not found & known and not (geometry.shares_kv and kind in "kv"):
                    raise _lacks(model, layer, kind)
        if both and layer not in mixed:
            raise _lacks(model, layer, "q")
        if both and "down" not in found:
            raise _lacks(model, layer, "up")
    is_cross = all(role.block == "cross-attention" for _, role in rows)
    if not both and not is_cross and all("q" in found for found in types.values()):
        raise _lacks(model, min(layers), "up")


def _check_shapes(model: str, entries: Sequence[Matrix]) -> None:
    """Refuse matrices that do not fit each other: one hidden size, and one inner size per MLP."""
    seven = [entry for entry in entries if entry.type in TYPES]
    for entry in seven:
        width = seven[0].shape[0 if seven[0].type in ("o", "down") else 1]
        if entry.shape[0 if entry.type in ("o", "down") else 1] != width:
            raise WdlibError(
                f"The tensor {entry.name} of {model} gives {entry.type} the shape {entry.shape}, "
                f"which does not fit a hidden size of {width}: the row of "
                "wdlib/checkpoints/lexicon.py for its name is not right for this architecture."
            )
    inner = {(e.layer, e.expert): e for e in seven if e.type == "down"}
    for entry in seven:
        down = inner.get((entry.layer, entry.expert)) if entry.type in ("gate", "up") else None
        if down and entry.shape[0] != down.shape[1]:
            raise WdlibError(
                f"The tensor {entry.name} of {model} gives {entry.type} {entry.shape[0]} rows, and "
                f"{down.name} has {down.shape[1]} columns: it joins gate and up in a way that "
                "needs a row of its own in wdlib/checkpoints/lexicon.py."
            )
