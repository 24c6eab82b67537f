"""The suspects of the benchmark of identification: three decoders, disguised, and their records.

Every second layer is taken (of Qwen every third), and the first 16384 tokens. This script runs
nothing; identification.py imports it.
"""

import contextlib
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import relatives

from wdlib import checkpoints, paths, spectra
from wdlib.fingerprints import alterations, decoder, disguises, gauge, invariants, values
from wdlib.lora import pretrained

Decoder = decoder.Decoder

FULL = checkpoints.DEFAULT
DECODERS = {FULL: 2, "gemma-3-270m": 2, "qwen2.5-coder-0.5b-instruct": 3}
"""The models that are disguised, the first with all strengths; every so many layers are taken."""

OTHERS = ("qwen2.5-coder-1.5b-instruct", "all-minilm-l6-v2", "all-mpnet-base-v2")
"""Models that the suspects are only held against."""

STRANGER = next(name for name, is_relative in relatives.MADE.items() if not is_relative)
"""A model of the shape of `FULL` that is trained apart, for tests of two checkpoints."""

TOKENS = 16384
RANK = 16
KEPT = paths.CACHE / "identification"


# The cases ----------------------------------------------------------------------------------------

SAME, CHANGED, BOTH = "function unchanged", "function changed", "both"
TRAINED, APART = "trained further", "trained apart"


@dataclass(frozen=True)
class Case:
    """A suspect that is made from a model. kind: APART where it is none of its relatives.

    makes: of a decoder; raises WdlibError where the model's layout does not allow it. is_main: made
    of every model, not of `FULL` alone.
    """

    name: str
    strength: str
    kind: str
    make: Callable[[Decoder], Decoder]
    is_main: bool = True


def _each(name: str, kind: str, make: Callable[..., Decoder], **strengths: Any) -> Iterator[Case]:
    """A case per strength, the one in the middle a main one; strengths are one keyword's values."""
    ((keyword, given),) = strengths.items()
    for i, strength in enumerate(given):
        is_main = i == len(given) // 2

        def made(d: Decoder, strength: Any = strength) -> Decoder:
            return make(d, **{keyword: strength})

        yield Case(name, f"{keyword} {strength}", kind, made, is_main)


def _one(name: str, kind: str, make: Callable[[Decoder], Decoder]) -> Case:
    return Case(name, "", kind, make)


def _first_third(d: Decoder) -> Decoder:
    return alterations.with_layers(d, range(-(-len(d.blocks) // 3)))


def _half(d: Decoder, *, start: int) -> Decoder:
    return alterations.with_layers(d, range(start, len(d.blocks), 2))


def _stranger(d: Decoder) -> Decoder:
    """A model of the same shape that shares nothing with it."""
    return disguises.permute_tokens(alterations.random(d, seed=99), seed=99)


def _mlp(d: Decoder) -> Decoder:
    return alterations.random(d, types=("gate", "up", "down"))


def _attention(d: Decoder) -> Decoder:
    return alterations.random(d, types="qkvo")


PARTS = (_first_third, _half, _stranger, _mlp, _attention)


def unchanged() -> Iterator[Case]:
    """What leaves the function as it is."""
    plain = {
        "neurons permuted": disguises.permute_neurons,
        "heads permuted": disguises.permute_heads,
        "groups permuted": disguises.permute_groups,
        "tokens permuted": disguises.permute_tokens,
        "hidden state permuted": disguises.permute_hidden,
        "hidden state rotated": disguises.rotate_hidden,
        "hidden state rescaled": disguises.rescale_hidden,
        "norms folded": disguises.fold_norms,
        "layers added": disguises.add_layers,
    }
    for name, make in plain.items():
        yield _one(name, SAME, make)
    yield from _each("matrices rescaled", SAME, disguises.rescale_matrices, factor=[1.1, 1.5, 4])
    yield from _each("neurons rescaled", SAME, disguises.rescale_neurons, spread=[0.2, 0.5, 1.0])
    yield from _each("norms moved", SAME, disguises.move_norms, spread=[0.2, 0.5, 1.0])
    yield from _each("values mixed", SAME, disguises.mix_values, condition=[1, 4, 16])
    yield from _each("pairs turned", SAME, disguises.turn_pairs, spread=[0.0, 0.5, 1.0])
    yield from _each("neurons split", SAME, disguises.split_neurons, share=[0.1, 0.5])
    yield from _each("everything", SAME, disguises.everything, strength=[0.5, 1, 2])


def changed() -> Iterator[Case]:
    """What changes the function, without training."""
    yield from _each("requantised", CHANGED, alterations.requantised, stored_as=["Q8_0", "Q4_0"])
    yield from _each("noise", CHANGED, alterations.noisy, share=[0.1, 0.3, 0.6, 1.0])
    yield from _each("values pruned", CHANGED, alterations.pruned, share=[0.2, 0.5, 0.8])
    yield from _each("neurons removed", CHANGED, alterations.without_neurons, share=[0.1, 0.3, 0.5])
    yield from _each("adapter", CHANGED, alterations.updated, size=[0.01, 0.1, 0.3])
    plain = {
        "first third of the layers": _first_third,
        "layers of even number": lambda d: _half(d, start=0),
        "layers of odd number": lambda d: _half(d, start=1),
        "stacked": alterations.stacked,
        "MLP replaced": _mlp,
        "attention replaced": _attention,
        "merged with a relative": lambda d: alterations.merged(d, alterations.noisy(d, share=0.6)),
        "merged with a stranger": lambda d: alterations.merged(d, _stranger(d)),
    }
    for name, make in plain.items():
        yield _one(name, CHANGED, make)


def together() -> Iterator[Case]:
    """Everything that leaves the function as it is, and one thing that does not."""
    plain = {
        "requantised Q4_0": lambda d: alterations.requantised(d, "Q4_0"),
        "noise 0.3": lambda d: alterations.noisy(d, share=0.3),
        "half of the values pruned": lambda d: alterations.pruned(d, share=0.5),
        "neurons removed": lambda d: alterations.without_neurons(d, share=0.3),
        "first third of the layers": _first_third,
        "MLP replaced": _mlp,
    }
    for name, make in plain.items():

        def made(d: Decoder, make: Callable[[Decoder], Decoder] = make) -> Decoder:
            return make(disguises.everything(d))

        yield _one(f"everything, {name}", BOTH, made)


def further() -> Iterator[Case]:
    """What relatives.py trains, of `FULL` alone."""
    for name, is_relative in relatives.MADE.items():
        kind = TRAINED if is_relative else APART

        def plain(_: Decoder, name: str = name) -> Decoder:
            return _trained(name)

        def disguised(_: Decoder, name: str = name) -> Decoder:
            return disguises.everything(_trained(name))

        yield Case(name, "", kind, plain, False)
        yield Case(f"everything, {name}", "", kind, disguised, False)


def cases() -> list[Case]:
    """All of them; what a model is itself is the first."""
    apart = _one("normal matrices", APART, _stranger)
    return [_one("as it is", SAME, lambda d: d), *unchanged(), *changed(), *together(), apart,
            *further()]  # fmt: skip


def of(model: str) -> list[Case]:
    """The cases of a model: all of `FULL`, the main ones of the others."""
    return [case for case in cases() if case.is_main or model == FULL]


# The models ---------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """Of texts, and of the sources of functions and rooms."""
    texts = [part if isinstance(part, str) else inspect.getsource(part) for part in parts]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _cut(d: Decoder, step: int) -> Decoder:
    """Every so many layers, and the first tokens."""
    embedding, output = d.embedding[:TOKENS], None if d.output is None else d.output[:TOKENS]
    config = {**d.config, "vocab_size": len(embedding)}
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    small = replace(d, config=config, embedding=embedding, output=output)
    return alterations.with_layers(small, range(0, len(d.blocks), step))


def _about(model: str) -> str:
    """Of what is taken of a model."""
    weights = checkpoints.content_hash(checkpoints.resolve(model))
    return digest(_cut, weights, f"{TOKENS} {DECODERS.get(model)}")


@lru_cache(1)
def original(model: str) -> Decoder:
    """One of `DECODERS`, of which suspects are made; one in memory."""
    return _cut(decoder.of(pretrained.load(model).model), DECODERS[model])


@lru_cache(None)
def stored(model: str) -> str:
    """The checkpoint that suspects are held against: a folder with what is taken of a decoder."""
    if model in DECODERS:
        about, made = _about(model), original
    elif model == STRANGER:
        about, made = digest(_cut, relatives.folder(model).name, f"{DECODERS[FULL]}"), _trained
    else:
        return model
    folder = KEPT / "originals" / f"{Path(model).name.replace(' ', '-')}-{about}"
    if not paths.is_whole(folder):
        paths.mark_whole(decoder.write(made(model), folder))
    return str(folder)


def _trained(name: str) -> Decoder:
    return _cut(relatives.load(name), DECODERS[FULL])


def key(model: str, case: Case) -> str:
    """Of a suspect, by all that decides its weights."""
    made_by = {SAME: (unchanged,), CHANGED: (changed, *PARTS), BOTH: (together, *PARTS)}
    about = (*made_by.get(case.kind, (_stranger,)), decoder, disguises, alterations)
    trained = [relatives.folder(n).name for n in relatives.MADE if case.name.endswith(n)]
    return digest(*about, _about(model), case.name, case.strength, *trained)


@contextlib.contextmanager
def made(model: str, case: Case) -> Iterator[str]:
    """A suspect as a checkpoint, as long as the block lasts.

    Raises: WdlibError where the model's layout does not allow the case.
    """
    folder = decoder.write(case.make(original(model)), KEPT / f"suspect-{key(model, case)}")
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# What is kept of them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What measures of records take of a model.

    singular_values[type]: (layers, RANK), as a fingerprint holds them. deviations[type]: standard
    deviation of the attention's matrices, layer by layer. invariants: as a fingerprint holds them.
    """

    singular_values: dict[str, np.ndarray]
    deviations: dict[str, np.ndarray]
    invariants: dict[str, invariants.Spectra]

    def save(self, file: Path) -> None:
        arrays = {f"values {t}": v for t, v in self.singular_values.items()}
        arrays |= {f"deviations {t}": v for t, v in self.deviations.items()}
        for kind, found in self.invariants.items():
            arrays |= {f"layers {kind}": found.layers, f"invariants {kind}": found.values}
        with paths.atomic_write(file) as part, part.open("wb") as out:
            np.savez(out, **arrays)


def load(file: Path) -> Record:
    """What `Record.save` wrote."""
    with np.load(file) as arrays:
        found: dict[str, dict[str, np.ndarray]] = {}
        for name in arrays:
            part, kind = name.split(" ")
            found.setdefault(part, {})[kind] = arrays[name]
    kinds = found.get("invariants", {})
    spectra_of = {k: invariants.Spectra(found["layers"][k], v) for k, v in kinds.items()}
    return Record(found["values"], found["deviations"], spectra_of)


def compute(model: str) -> Record:
    """The record of a checkpoint."""
    if model in OTHERS:
        singular_values = spectra.of(model, RANK).values
    else:
        singular_values = spectra.collect(checkpoints.projections(model), RANK).values
    deviations: dict[str, list[float]] = {t: [] for t in "qkvo"}
    for p in checkpoints.projections(model, types=list(deviations)):
        deviations[p.type].append(values.moments(p.matrix).deviation)
    collector = invariants.Collector()
    for layer in gauge.layers(model):
        collector.add(layer)
    curves = {t: np.array(curve) for t, curve in deviations.items()}
    return Record(singular_values, curves, collector.spectra())


KEEPS = (invariants.of_layer, invariants.Collector, gauge.layers)
"""What decides a record, beside `compute`."""


def record_file(about: str) -> Path:
    """Where a record is kept, by what it is of and what computes it."""
    return KEPT / f"{digest(about, compute, *KEEPS, str(RANK))}.npz"


@lru_cache(None)
def stored_record(model: str) -> Record:
    """That of a model which suspects are held against."""
    file = record_file(_about(model))
    if not file.is_file():
        compute(stored(model)).save(file)
    return load(file)
