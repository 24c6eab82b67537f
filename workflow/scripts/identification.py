"""Who recognises a model after what has been done to it, at a false-alarm rate of 1 %.

`python workflow/scripts/identification.py [folder with the data sets]` disguises three decoders in
every way of `suspects.cases`, holds each suspect against all stored models by every measure of
`MEASURES`, and writes data/results/identification.csv, a row for each, and
identification_power.csv, for every measure its threshold and the cases that it recognises. Half an
hour on one core. Records of finished suspects are kept in data/cache/identification, so that an
interrupted run, or one with another measure, goes on after them. Models that are trained further
come from relatives.py, which is run first where they are missing.

A false alarm is a score above the threshold for a suspect and a model that was trained apart. Many
of these pairs differ in the disguise alone and pairs of models are few, so the rate holds for these
models.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import relatives
import suspects
from suspects import Case, Record
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from wdlib import WdlibError, paths, provenance, spectra
from wdlib.fingerprints import gauge, identity, independence, relation

FALSE_ALARMS = 0.01


# Measures -----------------------------------------------------------------------------------------


def spectral(a: Record, b: Record) -> float:
    """The distance of `identity.spectral_difference`, turned round."""
    return -identity.spectral_difference(a.singular_values, b.singular_values)


def unit_length(a: Record, b: Record) -> float:
    """The same, each vector of singular values divided by its length; one of zeros stays."""

    def unit(vectors: np.ndarray) -> np.ndarray:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)

    one, two = ({t: unit(v) for t, v in x.singular_values.items()} for x in (a, b))
    return -identity.spectral_difference(one, two)


def intrinsic(a: Record, b: Record) -> float:
    """The "intrinsic fingerprint": correlation of the curves of standard deviations over layers.

    Pearson's, of each type of the attention's matrices, and their mean (arXiv 2507.03014). Differs
    from the paper, which has models of one depth: the longer curve is brought to the length of the
    shorter by linear interpolation over the relative depth.
    """
    found = []
    for t in a.deviations.keys() & b.deviations.keys():
        one, two = a.deviations[t], b.deviations[t]
        n = min(len(one), len(two))
        x, y = (np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(c)), c) for c in (one, two))
        if n > 1 and x.std() > 0 and y.std() > 0:
            found.append(np.corrcoef(x, y)[0, 1])
    return float(np.mean(found)) if found else 0.0


def invariant(a: Record, b: Record) -> float:
    """The strength with which layers of one model are recognised in the other."""
    return relation.relate(a.invariants, b.invariants).strength


MEASURES: dict[str, Callable[[Record, Record], float]] = {
    "spectral difference": spectral,
    "unit length": unit_length,
    "intrinsic fingerprint": intrinsic,
    "invariants": invariant,
}
"""Of a suspect's and a stored model's records: the larger, the more alike."""


def _test(a: str, b: str) -> dict[str, float]:
    """The numbers of `independence.compare` that can be had; none where nothing can be tested."""
    try:
        found = independence.compare(a, b)
    except WdlibError:
        return {}
    numbers = {"log10_p": found.log10_p, "cka": found.cka}
    return {name: float(number) for name, number in numbers.items() if np.isfinite(number)}


PAIR_MEASURES: dict[str, Callable[[dict[str, float]], float]] = {
    "independence": lambda found: -found.get("log10_p", np.nan),
    "aligned CKA": lambda found: found.get("cka", np.nan),
}
"""Of both checkpoints, from the numbers of `_test`: -log10 of its p-value, and the measure of arXiv
2510.06738. They take some seconds a pair, and the main cases of one model alone. Few strangers
measure no rate of 1 %: then the threshold is the largest score of a stranger."""


def _tested(model: str, case: Case) -> list[str]:
    """The models that a suspect is tested against: its own, and a stranger of the same shape.

    With models of another shape and vocabulary a test has nothing to match.
    """
    return [model, suspects.STRANGER] if case.is_main and model == suspects.FULL else []


# The run ------------------------------------------------------------------------------------------


def scores(model: str, case: Case) -> dict[str, dict[str, float]]:
    """By measure and stored model; {} where the model's layout does not allow the case.

    The suspect is made only where a number that is to be kept of it is lacking.
    """
    key = suspects.key(model, case)
    file, tests = suspects.record_file(key), {}
    for other in _tested(model, case):
        about = suspects.digest(key, other, _test, independence, gauge)
        tests[other] = suspects.KEPT / f"{about}.json"
    if not all(path.is_file() for path in (file, *tests.values())):
        try:
            with suspects.made(model, case) as folder:
                if not file.is_file():
                    suspects.compute(folder).save(file)
                for other, path in tests.items():
                    if not path.is_file():
                        found = _test(folder, suspects.stored(other))
                        paths.write_text(path, json.dumps(found))
        except WdlibError:
            return {}
    record, what = suspects.load(file), "the numbers of a test"
    every = {m: suspects.stored_record(m) for m in (*suspects.DECODERS, *suspects.OTHERS)}
    numbers = {
        other: paths.read_json(path, dict[str, float], what=what, remedy="remove it")
        for other, path in tests.items()
    }
    taken = {name: {m: f(record, r) for m, r in every.items()} for name, f in MEASURES.items()}
    for name, of_pair in PAIR_MEASURES.items():
        taken[name] = {other: of_pair(found) for other, found in numbers.items()}
    return taken


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
                "related": other == model and case.kind != suspects.APART,
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
    strangers: dict[str, list[float]] = {}
    for row in table:
        if not row["related"] and np.isfinite(row["score"]):
            strangers.setdefault(row["measure"], []).append(row["score"])
    for key, found in groups.items():
        case = dict(zip(SUSPECT, key, strict=True))
        known = strangers.get(case["measure"], [-np.inf])
        threshold = np.sort(known)[-1 - int(FALSE_ALARMS * len(known))]
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
        {
            "rank": suspects.RANK,
            "tokens": suspects.TOKENS,
            "layers": suspects.DECODERS,
            "false alarms": FALSE_ALARMS,
            "cases": suspects.digest(suspects),
            "trained": [relatives.folder(name).name for name in relatives.MADE],
        },
        inputs=[spectra.stored_file(m) for m in suspects.OTHERS if spectra.is_stored(m)],
        models=[*suspects.DECODERS, *suspects.OTHERS],
        libraries=["torch", "transformers", "peft"],
    )
    todo = [(m, c) for m in suspects.DECODERS for c in suspects.of(m)]
    with threadpool_limits(1):
        for model in (*suspects.DECODERS, *suspects.OTHERS):
            suspects.stored_record(model)
        table = [row for cell in tqdm(todo, unit="case") for row in rows(*cell)]
    provenance.write(table, paths.RESULTS / "identification.csv", made)
    provenance.write(power(table), paths.RESULTS / "identification_power.csv", made)


if __name__ == "__main__":
    main()
