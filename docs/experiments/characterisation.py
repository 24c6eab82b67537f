"""Characterisations of the three decoders whose spectra are stored, and how stable they are.

Run once, about a minute: `python docs/experiments/characterisation.py`. Writes
data/results/characterisation/<model>-r<rank>.json at ranks 16, 64 and the largest stored one, and
stability.csv beside them.
"""

from csv_tables import write

from wdlib import models, paths, spectra
from wdlib.characterize import LABELS, characterise, save, stability

MODELS = (models.DEFAULT, "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
RANKS = (16, 64)
RESAMPLES = 100
FOLDER = paths.RESULTS / "characterisation"


def main() -> None:
    """Write all results, each atomically."""
    rows = []
    for model in MODELS:
        stored = spectra.load(model)
        ranks = (*RANKS, stored.rank)
        for rank in ranks:
            save(characterise(stored, rank=rank), FOLDER / f"{model}-r{rank}.json")
        found = stability(stored, rank=ranks[0], ranks=ranks, resamples=RESAMPLES)
        for pair, label in found.labels.items():
            counts = {name: found.counts[pair][name] for name in LABELS}
            others = {f"r{rank}": found.by_rank[rank][pair] for rank in ranks[:2]}
            others["largest"] = found.by_rank[ranks[2]][pair]
            row = {"model": model, "pair": "-".join(pair), "label": label}
            rows.append(row | {"resamples": RESAMPLES} | counts | others)
    path = FOLDER / "stability.csv"
    write(rows, path)


if __name__ == "__main__":
    main()
