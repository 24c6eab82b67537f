"""Whether the matrices of a stack are all there and fit each other."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Protocol

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import lexicon
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
    held = _held(rows)
    _check_kinds(model, geometry, layers, held)
    _check_blocks(model, geometry, layers, held, crossed)
    is_whole = any(block in _MLP for block, _ in held) or rows[0][1].block == "cross-attention"
    if not is_whole and all(("q", None) in held["mixer", layer] for layer in layers):
        raise _lacks(model, min(layers), "up")
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
_Held = dict[tuple[str, int], set[tuple[str, int | None]]]
"""By block and layer: the types that it holds, and of which expert."""


def _held(rows: Sequence[_Row]) -> _Held:
    beside = lexicon.BESIDE.split()
    found: _Held = defaultdict(set)
    for entry, role in rows:
        of_mixer = role.block not in _MLP and entry.type not in beside
        block = "mixer" if of_mixer else role.block
        found[block, entry.layer].add((entry.type, entry.expert))
    return found


def _check_kinds(model: str, geometry: Geometry, layers: Collection[int], held: _Held) -> None:
    """Refuse a layer that lacks what others of its kind have."""
    mixers, mlps = dict(enumerate(geometry.mixers)), dict(enumerate(geometry.mlps))
    every = {block: set().union(*(held[block, n] for n in layers)) for block in (*_MLP, "own")}
    for layer in layers:
        alike = [n for n in layers if mixers.get(n) == mixers.get(layer)]
        lacking = set().union(*(held["mixer", n] for n in alike)) - held["mixer", layer]
        lacking -= {(kind, None) for kind in "kv" if geometry.may_lack(kind, layer)}
        own = {block for block in _MLP if held[block, layer]}
        for block in own:
            lacking |= every[block] - held[block, layer]
        lacking |= every["own"] - held["own", layer] if held["own", layer] else set()
        for other in (n for n in layers if mlps.get(n) == mlps.get(layer)):
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


def _check_blocks(
    model: str,
    geometry: Geometry,
    layers: Collection[int],
    held: _Held,
    crossed: Collection[int],
) -> None:
    """Refuse a layer whose attention or MLP is not whole, whatever other layers have."""
    gated = any(("gate", e) in found for found in held.values() for _, e in found)
    for (block, layer), found in sorted(held.items(), key=lambda item: item[0][::-1]):
        if block in _MLP:
            for expert in {e for _, e in found}:
                for kind in ("gate", "up", "down") if gated else ("up", "down"):
                    if (kind, expert) not in found:
                        raise _lacks(model, layer, kind, expert)
            continue
        types = {kind for kind, _ in found}
        for kind, needed in lexicon.NEEDS:
            if kind in types and types.isdisjoint(needed.split()):
                raise _lacks(model, layer, needed.split()[0])
        known = {kind: set(names.split()) for kind, names in lexicon.STANDS_FOR.items()}
        if types & set().union(*known.values()):
            for kind, names in known.items():
                if not types & names and not geometry.may_lack(kind, layer):
                    raise _lacks(model, layer, kind)
    mlps = {layer for block, layer in held if block in _MLP and held[block, layer]}
    mixed = {layer for layer in layers if held["mixer", layer]}
    if set(crossed) != set(layers):  # else it stands for nothing
        mixed |= set(crossed)
    for layer in layers if mixed & mlps else ():
        if layer not in mixed:
            raise _lacks(model, layer, "q")
        if layer not in mlps:
            raise _lacks(model, layer, "up")


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
