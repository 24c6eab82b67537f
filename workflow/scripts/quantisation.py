"""What coarser storage does to the classes of pairs and to the groups.

`python workflow/scripts/quantisation.py` stores the weights of two models anew in coarser types,
computes their spectra, and writes data/results/quantisation.csv, atomically. Under a minute, once
the models are there.
"""

from wdlib import checkpoints, paths, provenance, spectra
from wdlib.characterise import Characterisation, characterise

RANK = 16
SEED = 0
CASES = {
    checkpoints.DEFAULT: ("Q4_0",),
    "gemma-3-270m": ("Q4_1", "Q4_0"),
    "qwen2.5-coder-0.5b-instruct": ("Q4_1", "Q4_0"),
}


def stored_as(model: str, kind: str) -> spectra.Spectra:
    """Spectra of a model whose projections have been through a GGUF type."""
    stream = (checkpoints.requantise(p, kind) for p in checkpoints.projections(model))
    return spectra.collect(stream, RANK, model=model)


def groups(character: Characterisation) -> str:
    """The groups in one line: referenced weight (members); ..."""
    return "; ".join(f"{g.referenced} ({' '.join(g.members)})" for g in character.groups)


def main() -> None:
    """Compare the characterisation before and after for every case."""
    made = provenance.of(
        __file__,
        {"rank": RANK, "seed": SEED, "cases": CASES},
        inputs=[spectra.stored_file(model) for model in CASES],
        models=CASES,
    )
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
    provenance.write(rows, paths.RESULTS / "quantisation.csv", made)


if __name__ == "__main__":
    main()
