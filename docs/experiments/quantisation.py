"""What coarser storage does to the classes of pairs and to the groups.

`python docs/experiments/quantisation.py` stores the weights of two models anew in coarser types,
computes their spectra, and writes data/results/quantisation.csv, atomically. Under a minute, once
the models are there.
"""

from collections.abc import Iterator
from dataclasses import replace

from csv_tables import write

from wdlib import models, paths, spectra, weights
from wdlib.characterize import Characterisation, characterise

RANK = 16
SEED = 0
CASES = {
    models.DEFAULT: ("Q4_0",),
    "gemma-3-270m": ("Q4_1", "Q4_0"),
    "qwen2.5-coder-0.5b-instruct": ("Q4_1", "Q4_0"),
}


def stored_as(model: str, kind: str) -> spectra.Spectra:
    """Spectra of a model whose projections have been through a GGUF type."""
    stream: Iterator[weights.Projection] = (
        weights.requantise(p, kind) for p in weights.projections(model)
    )
    values, _ = spectra.stack(spectra.collect(stream, RANK))
    return replace(spectra.load(model, rank=RANK), values=values)


def groups(character: Characterisation) -> str:
    """The groups in one line: referenced weight (members); ..."""
    return "; ".join(f"{g.referenced} ({' '.join(g.members)})" for g in character.groups)


def main() -> None:
    """Compare the characterisation before and after for every case."""
    rows = []
    for model, kinds in CASES.items():
        as_is = spectra.load(model, rank=RANK)
        before = characterise(as_is, seed=SEED)
        for kind in kinds:
            after = characterise(stored_as(model, kind), seed=SEED)
            labels, others = before.labels(), after.labels()
            rows.append(
                {
                    "model": model,
                    "stored as": as_is.provenance["quantisation"],
                    "stored anew as": kind,
                    "pairs": len(labels),
                    "classes changed": sum(labels[pair] != others[pair] for pair in labels),
                    "groups before": groups(before),
                    "groups after": groups(after),
                }
            )
    path = paths.RESULTS / "quantisation.csv"
    write(rows, path)


if __name__ == "__main__":
    main()
