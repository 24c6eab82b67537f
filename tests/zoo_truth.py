"""What a live model of transformers says of its own weights, and whether we read the same."""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_zoo
import torch
from torch.overrides import TorchFunctionMode

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import plan, stream
from wdlib.checkpoints.architectures import place, tensor_role

Matrices = dict[tuple[int, str, int | None], np.ndarray]


@dataclass(frozen=True)
class Finding:
    """What was found of a type: either why it is refused, or what is read of it.

    stack: that is read by default. others: the kinds of further stacks of the language. own: types
    that are none of the seven. unread: what else its layers hold of two or more dimensions. joined:
    tensors that hold several matrices, which the modules' forward pass was asked about.
    """

    refused: str = ""
    stack: str = ""
    others: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of the table in docs/architectures.md, after the type's name."""
        if self.refused:
            return (self.refused, "", "", "", "")
        lists = (self.others, self.own, self.joined, self.unread)
        return (f"`{self.stack}`", *(" ".join(found) for found in lists))


def examine(task: str, name: str, folder: Path) -> Finding:
    """Build a type, save it under both ways of naming, read both, and compare with the modules.

    Raises AssertionError where a matrix is not the module's own, or a large one is passed over.
    """
    model = tiny_zoo.build(task, name)
    saved = [folder / f"{original}" / name for original in (True, False)]
    for path in saved:
        model.save_pretrained(path, save_original_format=path == saved[0])
    try:
        plans = [plan.plan(path) for path in saved]
    except WdlibError as error:
        return Finding(refused=str(error))
    left = unread(model, plans[1])
    large = {name for name, shape in left.items() if min(shape[-2:]) >= LARGE}
    strange = sorted(name for name in large if not SEEN.fullmatch(name))
    assert not strange, f"nobody has looked at {strange}"
    joined, own = check(model, *plans), {part.entry.type for part in plans[1].parts} - {*TYPES}
    for kind in {*plans[0].others} & {*plans[1].others}:  # encoders, and attention to them
        try:
            both = [plan.plan(path, stack=kind) for path in saved]
        except WdlibError:  # an encoder of sound
            continue
        joined |= check(model, *both)
    lists = (plans[1].others, sorted(own), sorted(left), sorted(joined))
    return Finding("", plans[1].stack, *map(tuple, lists))


LARGE = 16
"""Both sides of a tiny model's projections are no smaller; those of its routers and gates are."""

SEEN = re.compile(
    r"\w+norm\.(?:mlp\.)?\w+"  # norms with a small MLP: A.X-K2, Voxtral
    r"|.*weight_integer"  # I-BERT's copies
    r"|.*_hyper_connection\.\w+|\w+_hc\.fn"  # how streams are mixed
    r"|mlp\.gate\.\w+(?:\.\w+)?"  # Zaya's router is an MLP
    r"|output\.adapter_modules\.\w+\.dense[12]"  # X-MOD's adapters
    r"|attention\.self\.conv_kernel_layer|self_attn\.diagonal_decay"
    r"|self_attn\.rel_logits_proj\.proj|self_attn\.relative_pos_embeddings"
)
"""What is large and no projection: a person has looked at each."""


def read(parts: Sequence[plan.Part]) -> Matrices:
    return {(p.layer, p.type, p.expert): p.matrix for p in stream.read_all(parts)}


def unread(model: torch.nn.Module, made: plan.Plan) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the layers of a stack, of two or more dimensions, that are not read."""
    names, found = {part.entry.name for part in made.parts}, {}
    for name, parameter in model.named_parameters():
        where, role = place(name), tensor_role(name, (model.config.model_type,))
        crosses = role is not None and role.block == "cross-attention"
        is_beside = name not in names and parameter.dim() > 1 and not crosses
        if is_beside and where and where.stack == made.stack:
            found[where.inner] = tuple(parameter.shape)
    return found


def check(model: torch.nn.Module, original: plan.Plan, own: plan.Plan) -> set[str]:
    """Compare every matrix with the live weights; returns the names of joined tensors.

    original, own: the plans under the names that the model had, and that its modules have.
    """
    found, before = read(own.parts), read(original.parts)
    assert found.keys() == before.keys()
    for key, matrix in found.items():
        np.testing.assert_array_equal(before[key], matrix, err_msg=str(key))
    state, by_name = model.state_dict(), defaultdict(list)
    for part in own.parts:
        by_name[part.entry.name].append(part.entry)
    joined = set()
    for name, of_tensor in by_name.items():
        weight, pieces = state[name].numpy(), [found[entry.place] for entry in of_tensor]
        if len(of_tensor) == 1 and weight.ndim == 2:
            owner = model.get_submodule(name.rpartition(".")[0])
            is_turned = type(owner).__name__ == "Conv1D"
            wanted = weight.T if is_turned else weight
            np.testing.assert_array_equal(pieces[0], wanted, err_msg=name)
            continue
        together = np.sort(np.concatenate([piece.ravel() for piece in pieces]))
        np.testing.assert_array_equal(together, np.sort(weight.ravel()), err_msg=name)
        joined.add(name)
    mlp = {n for n in joined if {e.type for e in by_name[n]} <= {"gate", "up", "down"}}
    attention = {n for n in joined - mlp if "q" in {e.type for e in by_name[n]} or "rel_attn" in n}
    if attention:
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
        if (
            len(parameters) == 1 and len(given) == 1
        ):  # Llama 4: the states of all experts, one after the other
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
