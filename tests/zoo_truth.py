"""What a live model of transformers says of its own weights, and whether we read the same."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_zoo
import torch
from torch.overrides import TorchFunctionMode

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import plan, stream
from wdlib.checkpoints.architectures import place

Matrices = dict[tuple[int, str, int | None], np.ndarray]


@dataclass
class Finding:
    """What was found of a type: either refused, or read, and then what and what not."""

    refused: str = ""
    stack: str = ""
    others: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    forward: set[str] = field(default_factory=set)


def examine(task: str, kind: str, folder: Path) -> Finding:
    """Build a type, save it under both ways of naming, read both, and compare with the modules.

    Raises AssertionError where a matrix is not the module's own.
    """
    model = tiny_zoo.build(task, kind)
    found: list[Matrices] = []
    for original in (True, False):
        path = folder / f"{original}"
        model.save_pretrained(path, save_original_format=original)
        try:
            made = plan.plan(path)
            found.append(read(made.parts))
        except WdlibError as error:
            return Finding(refused=str(error).replace(f"{original}", kind))
    assert found[0].keys() == found[1].keys()
    for key, matrix in found[0].items():
        np.testing.assert_array_equal(matrix, found[1][key], err_msg=str(key))
    forward = check(model, [part.entry for part in made.parts], found[1])
    return Finding(
        stack=made.stack,
        others=made.others,
        own=tuple(sorted({type for _, type, _ in found[1]} - {*TYPES})),
        unread=tuple(unread(model, made)),
        forward=forward,
    )


def read(parts: Sequence[plan.Part]) -> Matrices:
    return {(p.layer, p.type, p.expert): p.matrix for p in stream.read_all(parts)}


def unread(model: torch.nn.Module, made: plan.Plan) -> list[str]:
    """Names in the layers of a stack that hold two or more dimensions and are not read."""
    names, stack = {part.entry.name for part in made.parts}, made.stack.split(":")[0]
    found = set()
    for name, parameter in model.named_parameters():
        where = place(name)
        if where and where.stack == stack and parameter.dim() > 1 and name not in names:
            found.add(where.inner)
    return sorted(found)


def check(model: torch.nn.Module, entries: Sequence[plan.Entry], found: Matrices) -> set[str]:
    """Compare every matrix with the live weights; returns what the forward pass was asked for."""
    state, by_name = model.state_dict(), defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry)
    joined = set()
    for name, of_tensor in by_name.items():
        weight, pieces = state[name].numpy(), [found[entry.place] for entry in of_tensor]
        if len(of_tensor) == 1 and weight.ndim == 2:
            owner = model.get_submodule(name.rpartition(".")[0])
            own = weight.T if type(owner).__name__ == "Conv1D" else weight
            np.testing.assert_array_equal(pieces[0], own, err_msg=name)
            continue
        together = np.sort(np.concatenate([piece.ravel() for piece in pieces]))
        np.testing.assert_array_equal(together, np.sort(weight.ravel()), err_msg=name)
        joined.add(name)
    mlp = {n for n in joined if {e.type for e in by_name[n]} <= {"gate", "up", "down"}}
    if attention := joined - mlp:
        check_attention(model, {name: by_name[name] for name in attention}, found)
    for name in mlp:
        check_mlp(model, name, by_name[name], found)
    return {place(name).inner for name in joined}


# MLP ------------------------------------------------------------------------------------------


def check_mlp(model: Any, name: str, entries: Sequence[plan.Entry], found: Matrices) -> None:
    """The module that owns a joined gate and up computes what ours do, expert for expert."""
    owner, is_linear = name.rpartition(".")[0], name.endswith(".weight")
    module = model.get_submodule(owner.rpartition(".")[0] if is_linear else owner)
    if "expert_w2" in inspect.signature(module.forward).parameters:  # DBRX: of one expert
        module = model.get_submodule(owner.rpartition(".")[0])
    for child, _ in list(module.named_children()):
        if "norm" in child:
            setattr(module, child, torch.nn.Identity())
    layer, hidden = entries[0].layer, torch.randn(6, entries[0].shape[1])
    if entries[0].type == "down":
        hidden = torch.randn(6, entries[0].shape[0])
    for expert in sorted({e.expert for e in entries}, key=str):
        ours = {t: found.get((layer, t, expert)) for t in ("gate", "up", "down")}
        theirs = output(module, hidden, expert, len({e.expert for e in entries})).detach().numpy()
        for form in FORMS:
            try:
                made = mlp(module, model.config, ours, hidden, form)
            except TypeError:  # an activation of one or of two arguments
                continue
            if np.allclose(made, theirs, rtol=1e-3, atol=1e-4):
                break
        else:
            raise AssertionError(f"{name}: gate, up and down give something else")


def output(module: Any, hidden: torch.Tensor, expert: int | None, count: int) -> torch.Tensor:
    """What an MLP, or one of its experts alone, makes of hidden states."""
    given = inspect.signature(module.forward).parameters.values()
    parameters = [p for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with torch.no_grad():
        if expert is None and len(parameters) < 2:
            made = module(hidden[None])
            return (made[0] if isinstance(made, tuple) else made)[0]
        if len(parameters) == 2:  # Inkling: shared experts, with a weight for each
            return module(hidden, torch.ones(len(hidden), 1))
        if len(parameters) == 1:  # Llama 4: the states of all experts, one after the other
            made = module(hidden.repeat(count, 1)).view(count, *hidden.shape)
            return made[expert]
        chosen = torch.full((len(hidden), 1), expert)
        return module(hidden, chosen, torch.ones(len(hidden), 1)).view(hidden.shape)


def mlp(
    module: Any,
    config: Any,
    ours: dict[str, np.ndarray | None],
    hidden: torch.Tensor,
    form: Callable[..., torch.Tensor],
) -> np.ndarray:
    from transformers.activations import ACT2FN

    text = config.get_text_config()
    children = (getattr(module, n, None) for n in ("act_fn", "act", "activation_fn", "activation"))
    act = next((c for c in children if callable(c)), None)
    act = act or ACT2FN[getattr(text, "hidden_act", None) or "silu"]
    gate, up, down = (None if m is None else torch.from_numpy(m) for m in ours.values())
    with torch.no_grad():
        x = None if gate is None else hidden @ gate.T
        return (form(act, x, hidden @ up.T) @ down.T).numpy()


def usual(act: Any, gate: Any, up: Any) -> torch.Tensor:
    return act(up) if gate is None else act(gate) * up


def gpt_oss(act: Any, gate: Any, up: Any) -> torch.Tensor:
    if gate is None:
        return act(up)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def act_of_both(act: Any, gate: Any, up: Any) -> torch.Tensor:
    return act(gate, up)


FORMS = (usual, gpt_oss, act_of_both)


# Attention ------------------------------------------------------------------------------------


class Products(TorchFunctionMode):
    """Records what is multiplied in batches: queries with keys, and weights with values."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if name == "scaled_dot_product_attention":
            named = [(kwargs or {}).get(n) for n in ("query", "key", "value")]
            self.events.append(("attention", tensors[:3] or named))
        elif name in ("matmul", "bmm", "baddbmm", "__matmul__"):
            tensors += [t for key, t in (kwargs or {}).items() if "batch" in key]
            if tensors[-1].dim() > 2:
                self.events.append(("product", tensors[-2:]))
        elif name == "einsum" and "bnij" in args[0] and len(tensors) == 2:
            self.events.append(("product", tensors))
        return func(*args, **(kwargs or {}))


def check_attention(model: Any, tensors: dict[str, list[plan.Entry]], found: Matrices) -> None:
    """At position 0 a rotary embedding is the identity: attention gets q = W_q x and so on."""
    with Products() as seen, torch.no_grad():
        for name in tensors:
            module = model.get_submodule(name.rpartition(".")[0])
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.events.append((name, args[0].detach()))
            )
        plain(model)
        model(input_ids=torch.arange(4, 10)[:, None], **more_inputs(model))
    for name, entries in tensors.items():
        start = next(i for i, (what, _) in enumerate(seen.events) if what == name)
        after = seen.events[start + 1 :]
        layers = [tensors[what][0].layer if what in tensors else None for what, _ in after]
        stop = next((i for i, n in enumerate(layers) if n not in (None, entries[0].layer)), None)
        states = dict(zip("qkv", operands(after[:stop]), strict=True))
        x = seen.events[start][1]
        for entry in entries:
            if entry.type in states:
                ours = x.numpy() @ found[entry.place].T
                assert alike(ours, states[entry.type]), (name, entry.type)


def plain(model: Any) -> None:
    """Nothing between the projections and the products: no norm, no activation."""
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "q_ln", "k_ln"):
                setattr(module, name, torch.nn.Identity())
            if name == "act_fn" and "ttention" in type(module).__name__:
                setattr(module, name, torch.nn.Identity())


def more_inputs(model: Any) -> dict[str, Any]:
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if has_cache else {}


def operands(events: Sequence[tuple[str, Any]]) -> Iterator[np.ndarray]:
    """Queries, keys and values of one attention."""
    attention = [tensors for what, tensors in events if what == "attention"]
    products = [tensors for what, tensors in events if what == "product"]
    chosen = attention[0] if attention else (*products[0], products[-1][1])
    return (tensor.detach().numpy() for tensor in chosen)


def alike(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two arrays hold the same values, one of them scaled, in any order or repeated."""
    one, two = np.sort(ours.ravel()), np.sort(theirs.ravel())
    if len(two) % len(one):
        return False
    two = two[:: len(two) // len(one)]
    one, two = one / np.linalg.norm(one), two / np.linalg.norm(two)
    return np.allclose(one, two, atol=1e-5)
