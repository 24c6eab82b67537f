"""A tensor's name -> which projections of which layer of which stack it holds, by `lexicon`."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from wdlib import TYPES
from wdlib.checkpoints import lexicon


@dataclass(frozen=True)
class TensorRole:
    """What a tensor's name says of it.

    stack: the beginning of the name, before a layer's number. block: "attention", "mlp", "experts",
    "shared expert", "cross-attention", or "own" for what is none of the seven types. types: the
    projections that the tensor holds, in their order. expert: None outside of routed experts,
    and for a tensor that holds all of them, which has three dimensions.

    transposed: whether it is stored as (d_in, d_out). groups: into how many equal groups its
    outputs are divided, each of which holds all types: a number, or "heads", "kv heads" or
    "columns" (as many as there are outputs of a type). rope: whether the rows of each head of q and
    k are in the order of llama.cpp, which pairs the halves of a head. axes: what three dimensions
    are, but for experts: "flat", of a matrix whose columns are divided into heads, or "stacked", a
    matrix of each head.
    """

    stack: str
    layer: int
    block: str
    types: tuple[str, ...]
    expert: int | None = None
    transposed: bool = False
    groups: int | str = 1
    rope: bool = False
    axes: str = ""

    @property
    def is_routed(self) -> bool:
        """Whether each expert has its own: by the tensor's name, or along its first dimension."""
        return self.block == "experts"


@dataclass(frozen=True)
class Place:
    """Where the name of a tensor puts it: see `lexicon`."""

    stack: str
    layer: int
    inner: str
    expert: int | None


_CONTAINERS = "|".join(lexicon.CONTAINERS.split())
_NAME = re.compile(rf"((?:.*?\.)?(?:{_CONTAINERS}))\.(\d+)\.(.+?)(?:\.weight)?")
_SAME_STACK = re.compile(lexicon.SAME_STACK)
_IGNORED = re.compile(lexicon.IGNORED)
_EXPERT = re.compile(rf"(?<![^.]){lexicon.EXPERTS}\.(?:expert_)?(\d+)\.")
_GGUF_EXPERT = re.compile(r"(ffn_(?:gate|up|down))\.(\d+)")
_OTHERS = re.compile("|".join(lexicon.OTHERS))
_ROUTERS = re.compile(lexicon.ROUTERS)


def place(name: str) -> Place | None:
    """Stack, layer and inner name of a tensor; None for what is in no layer."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    stack, layer, inner = found[1], int(found[2]), _IGNORED.sub("", found[3])
    if _SAME_STACK.search(stack):
        stack = _SAME_STACK.sub("", stack)
    if number := _EXPERT.search(inner):
        inner = f"{inner[: number.start()]}{lexicon.EXPERTS}.{inner[number.end() :]}"
        return Place(stack, layer, inner, int(number[1]))
    if number := _GGUF_EXPERT.fullmatch(inner):
        return Place(stack, layer, f"{number[1]}_exps", int(number[2]))
    return Place(stack, layer, inner, None)


def tensor_role(name: str, architectures: Collection[str] = ()) -> TensorRole | None:
    """What a tensor's name says of it; None where no row of `lexicon` fits.

    Arguments: name, as checkpoints write it ("model.layers.0.self_attn.q_proj.weight");
    architectures, the `model_type` of the model and of its parts.
    """
    where = place(name)
    if where is None:
        return None
    known = _meaning(where.stack, where.inner, tuple(architectures))
    if known is None:
        return None
    block, types, layout = known
    if where.expert is not None and block != "experts":
        return None
    stack = f"{where.stack}{CROSS}" if block == "cross-attention" else where.stack
    return TensorRole(
        stack,
        where.layer,
        block,
        types,
        where.expert,
        transposed="transposed" in layout,
        groups=_groups(layout),
        rope="rope" in layout,
        axes=next((word for word in ("flat", "stacked") if word in layout), ""),
    )


CROSS = ":cross-attention"
"""The end of the name of the stack that the cross-attention of a stack's layers makes."""


def is_other(inner: str, *, routed: bool) -> bool:
    """Whether a tensor of a layer is known to be no projection: a norm, a router, ...

    inner: its name in the layer, as `place` gives it. routed: whether the layer has experts.
    """
    return bool(_OTHERS.fullmatch(inner) or (routed and _ROUTERS.fullmatch(inner)))


def type_order(type: str) -> tuple[int, str]:
    """The key that sorts types: the seven in their order, then the others by name."""
    return (TYPES.index(type), "") if type in TYPES else (len(TYPES), type)


_Known = tuple[str, tuple[str, ...], str]
"""Block, types and layout."""


@lru_cache(4096)
def _meaning(stack: str, inner: str, architectures: tuple[str, ...]) -> _Known | None:
    """What the rows say of a name in a layer: first those bound to a model or to a stack."""
    bound = _bound_rows()
    for models, types, layout in (*bound.get(f"{stack}: {inner}", ()), *bound.get(inner, ())):
        if models == ("*",) or not set(models).isdisjoint(architectures):
            return _block(inner, layout), types, layout
    return _names().get(inner)


@cache
def _bound_rows() -> dict[str, list[tuple[tuple[str, ...], tuple[str, ...], str]]]:
    found: dict[str, list[tuple[tuple[str, ...], tuple[str, ...], str]]] = {}
    for models, inner, types, layout in lexicon.BOUND:
        row = tuple(models.split()), tuple(types.split()), layout
        for name in [inner] if ": " in inner else inner.split():
            found.setdefault(name, []).append(row)
    return found


def _block(inner: str, layout: str) -> str:
    """The kind of block that a name of `lexicon.BOUND` is in."""
    if layout in ("experts", "mlp"):
        return layout
    parts = set(re.split(r"[._]", inner))
    if lexicon.EXPERTS in inner.split(".") or "exps" in parts:
        return "experts"
    if any(word in inner.split(".") for word in lexicon.SHARED_EXPERTS.split()):
        return "shared expert"
    if inner.startswith(_CROSS_STARTS):
        return "cross-attention"
    return "mlp" if inner.startswith(_MLP_STARTS) else "attention"


_CROSS_STARTS = tuple(f"{block}." for block in lexicon.CROSS_ATTENTION.split())
_MLP_STARTS = ("ffn_", *(f"{block}." for block in lexicon.MLP.split() if block != "mixer"))


@cache
def _names() -> dict[str, _Known]:
    """Every name of the lexicon that means the same in every model."""
    found: dict[str, _Known] = {}
    for type, names in lexicon.OWN.items():
        found |= dict.fromkeys(names.split(), ("own", (type,), ""))
    for block, of_type in lexicon.WHOLE.items():
        for type, names in of_type.items():
            found |= dict.fromkeys(names.split(), (block, (type,), ""))
    for block, names in (
        ("attention", lexicon.ATTENTION),
        ("cross-attention", lexicon.CROSS_ATTENTION),
    ):
        found |= {
            f"{path}.{leaf}": (block, (type,), "")
            for path, type, leaf in _products(names, lexicon.ATTENTION_LEAVES)
            if f"{path}.{leaf}" not in found
        }
    for path, type, leaf in _products(lexicon.MLP, lexicon.MLP_LEAVES):
        found.setdefault(f"{path}.{leaf}", ("mlp", (type,), ""))
    for path, type, leaf in _products(f"{lexicon.MLP} ", lexicon.MLP_LEAVES):
        start = f"{path}." if path else ""
        found[f"{start}{lexicon.EXPERTS}.{leaf}"] = ("experts", (type,), "")
        for shared in lexicon.SHARED_EXPERTS.split():
            found[f"{start}{shared}.{leaf}"] = ("shared expert", (type,), "")
    return found


def _products(blocks: str, leaves: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Block, type and leaf of every name that is made of a block and a leaf."""
    for block in blocks.split(" "):
        for type, names in leaves.items():
            for leaf in names.split():
                yield block, type, leaf


@cache
def _groups(layout: str) -> int | str:
    if number := re.search(r"by (\d+)", layout):
        return int(number[1])
    words = {"by head": "heads", "by group": "kv heads", "by column": "columns"}
    return next((groups for word, groups in words.items() if word in layout), 1)
