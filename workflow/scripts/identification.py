"""Who recognises a model after what has been done to it, at a false-alarm rate of 1 %.

This disguises three decoders in every way of `cases`, holds each suspect against all stored models
by every measure of `MEASURES`, and writes
data/results/identification.csv, a row for each, and identification_power.csv, for every measure
its threshold and the cases that it recognises. Half an hour on one core; scores of finished cases
are kept in data/cache/identification, so that an interrupted run, or one with another measure, goes
on after them. The models trained further come from relatives.py, which is run first where they are
missing: `python workflow/scripts/identification.py [folder with the data sets]`.

Of Qwen every third layer is taken, and of all three the first 16384 tokens. A false alarm is a
score above the threshold for a suspect and a model that was trained apart. Many of these pairs
differ in the disguise alone and pairs of models are few, so the rate holds for these models.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import relatives
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from wdlib import WdlibError, checkpoints, paths, provenance, spectra
from wdlib.fingerprints import (
    alterations,
    decoder,
    disguises,
    gauge,
    identity,
    independence,
    invariants,
    relation,
    values,
)
from wdlib.lora import pretrained

FULL = checkpoints.DEFAULT
DECODERS = {FULL: 1, "gemma-3-270m": 1, "qwen2.5-coder-0.5b-instruct": 3}
"""The models that are disguised, the first with all strengths; every so many layers are taken."""

OTHERS = ("qwen2.5-coder-1.5b-instruct", "all-minilm-l6-v2", "all-mpnet-base-v2")
"""Models that are only held against the others."""

Decoder = decoder.Decoder

TOKENS = 16384
RANK = 16
FALSE_ALARMS = 0.01
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
            return _cut(relatives.load(name), 1)

        def disguised(_: Decoder, name: str = name) -> Decoder:
            return disguises.everything(_cut(relatives.load(name), 1))

        yield Case(name, "", kind, plain, False)
        yield Case(f"everything, {name}", "", kind, disguised, False)


def cases() -> list[Case]:
    """All of them; what a model is itself is the first."""
    apart = _one("normal matrices", APART, _stranger)
    return [_one("as it is", SAME, lambda d: d), *unchanged(), *changed(), *together(), apart,
            *further()]  # fmt: skip


# Models and measures ------------------------------------------------------------------------------


def _cut(d: Decoder, step: int) -> Decoder:
    """Every so many layers, and the first tokens."""
    output = None if d.output is None else d.output[:TOKENS]
    config = {**d.config, "vocab_size": TOKENS}
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    small = replace(d, config=config, embedding=d.embedding[:TOKENS], output=output)
    return alterations.with_layers(small, range(0, len(d.blocks), step))


@lru_cache(1)
def original(model: str) -> Decoder:
    """One of `DECODERS`, of which suspects are made; one in memory."""
    return _cut(decoder.of(pretrained.load(model).model), DECODERS[model])


@lru_cache(None)
def stored(model: str) -> str:
    """The checkpoint that a suspect is held against: a folder with what is taken of a decoder."""
    if model not in DECODERS:
        return model
    about = f"{inspect.getsource(_cut)} {TOKENS} {DECODERS[model]}"
    folder = KEPT / "originals" / f"{model}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    if not paths.is_whole(folder):
        paths.mark_whole(decoder.write(original(model), folder))
    return str(folder)


@lru_cache(2 + len(DECODERS) + len(OTHERS))
def singular_values(model: str) -> dict[str, np.ndarray]:
    """The largest of every matrix, as a fingerprint holds them."""
    if model in OTHERS:
        return spectra.of(model, RANK).values
    return spectra.collect(checkpoints.projections(model), RANK).values


@lru_cache(2 + len(DECODERS) + len(OTHERS))
def curves(model: str) -> dict[str, np.ndarray]:
    """Standard deviation of the attention's matrices, layer by layer."""
    found: dict[str, list[float]] = {t: [] for t in "qkvo"}
    for p in checkpoints.projections(model, types=list(found)):
        found[p.type].append(values.moments(p.matrix).deviation)
    return {t: np.array(curve) for t, curve in found.items()}


def spectral(a: str, b: str) -> float:
    """The distance of `identity.spectral_difference`, turned round."""
    return -identity.spectral_difference(singular_values(a), singular_values(b))


def unit_length(a: str, b: str) -> float:
    """The same, each matrix divided by the length of its vector."""
    one, two = (
        {t: v / np.linalg.norm(v, axis=1, keepdims=True) for t, v in singular_values(m).items()}
        for m in (a, b)
    )
    return -identity.spectral_difference(one, two)


def intrinsic(a: str, b: str) -> float:
    """The "intrinsic fingerprint": correlation of the curves of standard deviations over layers.

    Pearson's, of each type of the attention's matrices, and their mean (arXiv 2507.03014). Differs
    from the paper, which has models of one depth: the longer curve is brought to the length of the
    shorter by linear interpolation over the relative depth.
    """
    found = []
    for one, two in zip(curves(a).values(), curves(b).values(), strict=True):
        n = min(len(one), len(two))
        x, y = (np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(c)), c) for c in (one, two))
        if n > 1 and x.std() > 0 and y.std() > 0:
            found.append(np.corrcoef(x, y)[0, 1])
    return float(np.mean(found)) if found else 0.0


@lru_cache(2 + len(DECODERS) + len(OTHERS))
def kept_spectra(model: str) -> dict[str, invariants.Spectra]:
    """What rewriting leaves, as a fingerprint holds it."""
    collector = invariants.Collector()
    for layer in gauge.layers(model):
        collector.add(layer)
    return collector.spectra()


def invariant(a: str, b: str) -> float:
    """The strength with which the layers of one model are recognised in the other."""
    return relation.relate(kept_spectra(a), kept_spectra(b)).strength


@lru_cache(1)
def tested(a: str, b: str) -> independence.Independence | None:
    """The test of two checkpoints; None where the two have nothing to test."""
    try:
        return independence.compare(a, b)
    except WdlibError:
        return None


def independent(a: str, b: str) -> float:
    """-log10 of the p-value of the test of two checkpoints."""
    found = tested(a, b)
    return -found.log10_p if found else float("nan")


def aligned(a: str, b: str) -> float:
    """The measure of arXiv 2510.06738: CKA of the attention's weights."""
    found = tested(a, b)
    return found.cka if found else float("nan")


@dataclass(frozen=True)
class Measure:
    """score: of a suspect and a stored model, as checkpoints; the larger the more alike.

    about: the rooms and functions that decide it beside. is_of_pairs: it reads both checkpoints, so
    it is taken of the main cases of `FULL` alone, each against its own model and one stranger.
    """

    score: Callable[[str, str], float]
    about: tuple[Any, ...]
    is_of_pairs: bool = False

    def models(self, model: str, case: Case) -> list[str]:
        """The stored models that a suspect which is made of a model is held against."""
        others = [m for m in (*DECODERS, *OTHERS) if m != model]
        if not self.is_of_pairs:
            return [model, *others]
        return [model, others[0]] if case.is_main and model == FULL else []


MEASURES = {
    "spectral difference": Measure(spectral, (identity.spectral_difference,)),
    "unit length": Measure(unit_length, (identity.spectral_difference,)),
    "intrinsic fingerprint": Measure(intrinsic, (values.moments,)),
    "invariants": Measure(invariant, (invariants, relation, gauge)),
    "independence": Measure(independent, (independence, gauge), True),
    "aligned CKA": Measure(aligned, (independence, gauge), True),
}


# The run ------------------------------------------------------------------------------------------


def _key(model: str, case: Case, name: str) -> str:
    """Of a suspect and a measure, by all that decides the scores but constants of this script."""
    made_by = {SAME: (unchanged,), CHANGED: (changed, *PARTS), BOTH: (together, *PARTS)}
    about = (*made_by.get(case.kind, (_stranger,)), decoder, disguises, alterations, _cut)
    parts = [inspect.getsource(o) for o in (*about, MEASURES[name].score, *MEASURES[name].about)]
    parts += [relatives.folder(n).name for n in relatives.MADE if case.name.endswith(n)]
    parts += [model, str(DECODERS[model]), str(TOKENS), case.name, case.strength]
    parts += [checkpoints.content_hash(checkpoints.resolve(m)) for m in (*DECODERS, *OTHERS)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def scores(model: str, case: Case) -> dict[str, dict[str, float]]:
    """By measure and stored model, {} where the model's layout does not allow the case.

    The suspect is made only where a measure has not been taken of it.
    """
    asked = {name: measure.models(model, case) for name, measure in MEASURES.items()}
    made = {name: KEPT / f"{_key(model, case, name)}.json" for name in MEASURES if asked[name]}
    lacking = [name for name, file in made.items() if not file.is_file()]
    if lacking:
        try:
            suspect = decoder.write(case.make(original(model)), made[lacking[0]].with_suffix(""))
        except WdlibError:
            return {}
        found: dict[str, dict[str, float]] = {name: {} for name in lacking}
        for other in (*DECODERS, *OTHERS):  # measures of a pair that share work follow each other
            for name in lacking:
                if other in asked[name]:
                    found[name][other] = MEASURES[name].score(str(suspect), stored(other))
        for name in lacking:
            paths.write_text(made[name], json.dumps(found[name]))
        shutil.rmtree(suspect)
    what, remedy = "the scores of a case", "remove it"
    return {
        name: paths.read_json(file, dict[str, float], what=what, remedy=remedy)
        for name, file in made.items()
    }


def rows(model: str, case: Case) -> Iterator[dict[str, Any]]:
    """A row for each measure and stored model."""
    for name, found in scores(model, case).items():
        for other, score in found.items():
            yield {
                "model": model,
                "case": case.name,
                "strength": case.strength,
                "kind": case.kind,
                "stored": other,
                "related": other == model and case.kind != APART,
                "measure": name,
                "score": float(f"{score:.6g}"),
            }


SUSPECT = ("measure", "model", "case", "strength", "kind")
"""The columns that say what was held against the stored models, and by which measure."""


def power(table: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each measure and case of relatives: whether its score is above the threshold.

    The threshold is the smallest score that at most `FALSE_ALARMS` of the strangers exceed. best:
    whether the model itself has a higher score than every other one that was asked about.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in table:
        groups.setdefault(tuple(row[key] for key in SUSPECT), []).append(row)
    strangers = {
        name: [r["score"] for r in table if r["measure"] == name and not r["related"]]
        for name in MEASURES
    }
    for key, found in groups.items():
        case = dict(zip(SUSPECT, key, strict=True))
        known = [score for score in strangers[case["measure"]] if np.isfinite(score)]
        threshold = np.quantile(known, 1 - FALSE_ALARMS, method="higher")
        for row in (row for row in found if row["related"]):
            others = [r["score"] for r in found if not r["related"]]
            yield case | {
                "score": row["score"],
                "threshold": float(threshold),
                "strangers": len(known),
                "recognised": bool(row["score"] > threshold),
                "best": bool(row["score"] > max(others)),
            }


def main() -> None:
    """Write both tables."""
    relatives.main()
    made = provenance.of(
        __file__,
        {"rank": RANK, "tokens": TOKENS, "layers": DECODERS, "false alarms": FALSE_ALARMS},
        inputs=[spectra.stored_file(m) for m in OTHERS if spectra.is_stored(m)],
        models=[*DECODERS, *OTHERS],
        libraries=["torch", "transformers", "peft"],
    )
    todo = [(m, c) for m in DECODERS for c in cases() if c.is_main or m == FULL]
    with threadpool_limits(1):
        for model in DECODERS:
            stored(model)
        table = [row for cell in tqdm(todo, unit="case") for row in rows(*cell)]
        provenance.write(table, paths.RESULTS / "identification.csv", made)
        provenance.write(power(table), paths.RESULTS / "identification_power.csv", made)


if __name__ == "__main__":
    main()
