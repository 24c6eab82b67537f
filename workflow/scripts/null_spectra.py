"""The null models of the default model: their spectra, and what the pipeline makes of them.

Under a minute: `python workflow/scripts/null_spectra.py`. The spectra of the null models of weights
go to data/spectra/nulls (those of the same weights are kept), and a row for the model and each of
its four null models to data/results/nulls.csv.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from wdlib import checkpoints, fits, paths, provenance, spectra
from wdlib.characterise import LABELS, characterise
from wdlib.distances import dsv_all
from wdlib.spectra import Spectra, nulls

RANK = 64
COMPARED_RANK = 16
SEED = 0
DRAWS = 20
"""Of the null models of spectra, so many draws are made; their rows hold medians."""


def stored_null(name: str) -> Path:
    """The spectra of a null model of weights, computed unless they are stored already."""
    path = paths.SPECTRA / "nulls" / f"{checkpoints.DEFAULT}-{name}.safetensors"
    weights = checkpoints.models()[checkpoints.DEFAULT].sources[0].sha256
    if path.is_file() and spectra.load(path).provenance["sha256 of the model"] == weights:
        return path
    return spectra.save(nulls.compute(checkpoints.DEFAULT, name, RANK, seed=SEED), path)


def compared() -> Iterator[tuple[str, list[Spectra]]]:
    """The model and its null models at the compared rank: name, and one or more draws."""
    real = spectra.load(checkpoints.DEFAULT, rank=COMPARED_RANK)
    yield checkpoints.DEFAULT, [real]
    for name in nulls.OF_WEIGHTS:
        yield name, [spectra.load(stored_null(name), rank=COMPARED_RANK)]
    for null in (nulls.types_shuffled, nulls.trend_plus_noise):
        generators = [np.random.default_rng([SEED, i]) for i in range(DRAWS)]
        yield null.__name__, [replace(real, values=null(real.values, rng)) for rng in generators]


def summary(draw: Spectra) -> dict[str, float]:
    """The fit to all distances of a model, and how many pairs of types have which class."""
    distances = dsv_all(draw.values)
    fit = fits.power_law(distances)
    labels = Counter(characterise(draw, seed=SEED).labels().values())
    return {
        "alpha": fit.alpha,
        "xmin": fit.xmin,
        "tail share": fit.n_tail / fit.n,
        "ks": fit.ks,
        "median": float(np.median(distances)),
        "largest": float(distances.max()),
        **{label: labels[label] for label in LABELS},
    }


def main() -> None:
    """Compute and store what is missing, and write the table, atomically."""
    made = provenance.of(
        __file__,
        {"rank": COMPARED_RANK, "seed": SEED, "draws": DRAWS},
        inputs=[spectra.stored_file(checkpoints.DEFAULT), *map(stored_null, nulls.OF_WEIGHTS)],
    )
    rows = []
    for name, draws in compared():
        found = [summary(draw) for draw in draws]
        medians = {key: f"{np.median([f[key] for f in found]):.4g}" for key in found[0]}
        rows.append({"weights": name, "rank": COMPARED_RANK, "draws": len(draws), **medians})
    provenance.write(rows, paths.RESULTS / "nulls.csv", made)


if __name__ == "__main__":
    main()
