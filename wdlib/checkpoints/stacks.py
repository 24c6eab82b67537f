"""Which stack of layers of a checkpoint is read, where it holds several."""

import re
from collections import Counter
from collections.abc import Mapping

from wdlib import WdlibError
from wdlib.checkpoints.architectures import CROSS, TensorRole
from wdlib.checkpoints.geometry import Configuration

LANGUAGE = ("language", "decoder", "encoder")
"""The kinds of stacks that are read without being named; the first that is there is taken."""

_WORDS = {
    "vision": "vision visual vqmodel vit image images video sam img v",
    "audio": "audio speech conformer asr a perception",
    "connector": "qformer resampler connector projector merger patcher",
    "action": "dit gemma_expert",
    "prediction": "mtp nextn ctc",
    "decoder": "decoder dec",
    "encoder": "encoder enc",
}
"""A kind of stack, and the words of a stack's name that say so; the first that fits counts."""


def kind(stack: str) -> str:
    """The kind of a stack, by the words of its name: "language" where none says another."""
    if stack.endswith(CROSS):
        return CROSS.removeprefix(":")
    words = {*stack.split("."), *re.split(r"[._]", stack)}
    return next((k for k, known in _WORDS.items() if words & set(known.split())), LANGUAGE[0])


def choose(
    name: str,
    roles: Mapping[str, TensorRole],
    configuration: Configuration,
    asked: str | None,
) -> str:
    """The stack to read: the one that is asked for, by its kind or its name, or the language's.

    name: of the checkpoint. roles: of its tensors, by their names. asked: None for the default.

    Raises WdlibError where there is no such stack, or there are several of them.
    """
    sizes = Counter({role.stack: 0 for role in roles.values()})
    for role in roles.values():
        sizes[role.stack] = max(sizes[role.stack], role.layer + 1)
    there = ", ".join(f"{stack or '(no name)'} ({kind(stack)})" for stack in sorted(sizes))
    if asked is None:
        kinds = [k for k in LANGUAGE if any(kind(stack) == k for stack in sizes)]
        found = [stack for stack in sizes if kinds and kind(stack) == kinds[0]]
    elif asked in sizes:
        found = [asked]
    else:
        found = [stack for stack in sizes if kind(stack) == asked]
    if not found:
        what = f"no stack {asked!r}" if asked else "no stack of a language model"
        raise WdlibError(
            f"{name} has {what}: its stacks are {there}; choose one with `stack` (`--stack`)."
        )
    if len(found) > 1:
        layers = configuration.geometry(kind(found[0])).layers
        found = [stack for stack in found if sizes[stack] == layers] or found
    if len(found) > 1:
        raise WdlibError(
            f"{name} has several stacks of layers ({there}): choose one by its name with `stack` "
            "(`--stack`)."
        )
    return found[0]


def others(roles: Mapping[str, TensorRole], chosen: str) -> list[str]:
    """The kinds of the language's stacks beside the chosen one, and its cross-attention, sorted."""
    stacks = {role.stack for role in roles.values()} - {chosen}
    found = {kind(stack) for stack in stacks if kind(stack) in LANGUAGE} - {kind(chosen)}
    return sorted(found | {kind(stack) for stack in stacks if stack == f"{chosen}{CROSS}"})
