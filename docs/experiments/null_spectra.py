"""The null models of the default model: their spectra, and what the pipeline makes of them.

Run once, under a minute: `python docs/experiments/null_spectra.py`. The spectra of the null models
of weights go to data/spectra/nulls (those that are there are kept), and a row for the model and
each of its four null models to data/results/nulls.csv.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from csv_tables import write

from wdlib import models, nulls, paths, spectra
from wdlib.characterize import LABELS, characterise
from wdlib.distances import dsv_all
from wdlib.fits import fit_power_law
from wdlib.spectra import Spectra

RANK = 64
COMPARED_RANK = 16
SEED = 0
DRAWS = 20
"""Of the null models of spectra, so many draws are made; their rows hold medians."""


def stored_null(name: str) -> Spectra:
    """Spectra of a null model of weights: read where they are stored, or computed and stored."""
    path = paths.SPECTRA / "nulls" / f"{models.DEFAULT}-{name}.safetensors"
    if path.is_file():
        return spectra.load(path)
    result = nulls.compute(models.DEFAULT, name, RANK, seed=SEED)
    spectra.save(result, path)
    return result


def compared() -> Iterator[tuple[str, list[Spectra]]]:
    """The model and its null models at the compared rank: name, and one or more draws."""
    real = spectra.load(models.DEFAULT, rank=COMPARED_RANK)
    yield models.DEFAULT, [real]
    for name in nulls.OF_WEIGHTS:
        yield name, [stored_null(name).truncate(COMPARED_RANK)]
    for null in (nulls.types_shuffled, nulls.trend_plus_noise):
        generators = [np.random.default_rng([SEED, i]) for i in range(DRAWS)]
        yield null.__name__, [replace(real, values=null(real.values, rng)) for rng in generators]


def summary(draw: Spectra) -> dict[str, float]:
    """The fit to all distances of a model, and how many pairs of types have which class."""
    distances = dsv_all(draw.values)
    fit = fit_power_law(distances)
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
    path: Path = paths.RESULTS / "nulls.csv"
    rows = []
    for name, draws in compared():
        found = [summary(draw) for draw in draws]
        medians = {key: f"{np.median([f[key] for f in found]):.4g}" for key in found[0]}
        rows.append({"weights": name, "rank": COMPARED_RANK, "draws": len(draws), **medians})
    write(rows, path)


if __name__ == "__main__":
    main()
