"""How stable the classes of pairs are, for the three decoders whose spectra are stored.

`python workflow/scripts/stability.py`, about a minute on one core, writes
data/results/characterisation/stability.csv: how often a pair has each class when the layers are
drawn again, and its class at ranks 16, 64 and the largest stored one.
"""

from wdlib import checkpoints, paths, provenance, spectra
from wdlib.characterise import LABELS, stability

MODELS = (checkpoints.DEFAULT, "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
RANKS = (16, 64)
RESAMPLES = 100


def main() -> None:
    """Write the table."""
    made = provenance.of(
        __file__,
        {"models": MODELS, "ranks": RANKS, "resamples": RESAMPLES},
        inputs=map(spectra.stored_file, MODELS),
    )
    rows = []
    for model in MODELS:
        stored = spectra.load(model)
        ranks = (*RANKS, stored.rank)
        found = stability(stored, rank=ranks[0], ranks=ranks, resamples=RESAMPLES)
        for pair, label in found.labels.items():
            counts = {name: found.counts[pair][name] for name in LABELS}
            others = {f"r{rank}": found.by_rank[rank][pair] for rank in ranks[:2]}
            others["largest"] = found.by_rank[ranks[2]][pair]
            row = {"model": model, "pair": "-".join(pair), "label": label}
            rows.append(row | {"resamples": RESAMPLES} | counts | others)
    provenance.write(rows, paths.RESULTS / "characterisation" / "stability.csv", made)


if __name__ == "__main__":
    main()
