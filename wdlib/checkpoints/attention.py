"""Whether the matrices read from a file are those that a model multiplies by.

A fused tensor can be cut in the wrong place without any shape being wrong. What tells is the
computation: one token goes through the model, and what reaches its attention function must be the
matrices times what entered the attention block.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import WdlibError
from wdlib.checkpoints.stream import Projection

if TYPE_CHECKING:
    import torch

_NAME = "wdlib_observed"


def differences(
    network: "torch.nn.Module",
    read: Iterable[Projection],
    *,
    order: str = "qkv",
    token: int = 5,
) -> np.ndarray:
    """How far queries, keys and values lie from the products of matrices that were read, by layer.

    The token stands at position 0, where rotary embeddings change nothing. No bias may be added and
    nothing normalised on the way to the attention function.

    Arguments: network, of transformers, in evaluation mode; read, its matrices, others ignored;
    order, the types taken for queries, keys and values: with another order than "qkv" the test has
    to fail; token, an id that the network knows.
    Returns: (layers,) float64, the largest difference relative to the largest entry; inf where the
    shapes are not the same.
    Raises: WdlibError where no attention is observed in a layer whose matrices were read.
    """
    import torch

    ours = {(p.layer, p.type): p.matrix for p in read if p.type in order}
    layers = 1 + max((layer for layer, _ in ours), default=-1)
    with _observed(network) as seen, torch.no_grad():
        network(torch.tensor([[token]]))
    calls = [states for states in seen.values() if len(states) == 4]
    if len(calls) != layers or not layers:
        raise WdlibError(
            f"{layers} layers were read and attention was seen in {len(calls)}: give a decoder or "
            "encoder of transformers, and all of its matrices"
        )
    found = np.zeros(layers)
    for layer, (entered, *states) in enumerate(calls):
        for kind, theirs in zip(order, states, strict=True):
            product = ours[layer, kind] @ entered
            apart = np.abs(product - theirs).max() if product.shape == theirs.shape else np.inf
            found[layer] = max(found[layer], apart / np.abs(theirs).max())
    return found


@contextmanager
def _observed(network: Any) -> Iterator[dict[Any, list[np.ndarray]]]:
    """By attention block, in the order of use: what enters it, then queries, keys and values."""
    import transformers

    seen: dict[Any, list[np.ndarray]] = {}

    def enters(module: Any, args: tuple, kwargs: dict) -> None:
        seen[module] = [(args[0] if args else kwargs["hidden_states"])[0, 0].numpy()]

    def attends(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple:
        seen[module] += [states[0, :, 0].flatten().numpy() for states in (query, key, value)]
        shared = query.shape[1] // key.shape[1]
        return value.repeat_interleave(shared, 1).transpose(1, 2), None

    before = network.config._attn_implementation
    transformers.AttentionInterface.register(_NAME, attends)
    blocks = [m for m in network.modules() if type(m).__name__.endswith("Attention")]
    hooks = [m.register_forward_pre_hook(enters, with_kwargs=True) for m in blocks]
    try:
        network.set_attn_implementation(_NAME)
        yield seen
    finally:
        network.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
