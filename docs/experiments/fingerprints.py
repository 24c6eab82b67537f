"""Fingerprints and value densities of the shipped models, and how well copies are recognised.

Run once: `python docs/experiments/fingerprints.py`, about ten minutes with the models at hand.
Writes data/results/fingerprints/<model>.json, data/results/value_densities.csv,
value_shapes.csv and identification.csv beside it, each atomically.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from csv_tables import write

from wdlib import fingerprints, models, nulls, paths, spectra, weights
from wdlib.weights import Projection

MODELS = (
    models.DEFAULT,
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",
    "gemma-3-270m",
    "all-minilm-l6-v2",
)
RANK = fingerprints.RANK
ADAPTER_RANK = 16

Stream = Iterator[Projection]


def requantised(stream: Stream, kind: str) -> Stream:
    """The weights as they come back from a GGUF type."""
    return (weights.requantise(p, kind) for p in stream)


def merged(stream: Stream, size: float, *, rank: int = ADAPTER_RANK) -> Stream:
    """The weights plus a random update of low rank, `size` of their Frobenius norm."""
    for i, p in enumerate(stream):
        rng = np.random.default_rng([i, rank])
        rows, columns = p.matrix.shape
        update = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
        update *= size * np.linalg.norm(p.matrix) / np.linalg.norm(update)
        yield replace(p, matrix=p.matrix + update.astype(np.float32))


COPIES: dict[str, Callable[[Stream], Stream]] = {
    "stored as Q8_0": lambda s: requantised(s, "Q8_0"),
    "stored as Q4_0": lambda s: requantised(s, "Q4_0"),
    "adapter of 1 %": lambda s: merged(s, 0.01),
    "adapter of 10 %": lambda s: merged(s, 0.1),
    "adapter of 10 %, rank 1": lambda s: merged(s, 0.1, rank=1),
    "adapter of 1 %, then Q4_0": lambda s: requantised(merged(s, 0.01), "Q4_0"),
}
COPIED = (models.DEFAULT, "all-minilm-l6-v2")


def values_of(stream: Stream) -> dict[str, np.ndarray]:
    """Singular values of a stream of weights."""
    return spectra.stack(spectra.collect(stream, RANK))[0]


def rounded(row: dict, digits: int) -> dict:
    """A row with so many significant digits."""
    return {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Write all results."""
    folder = paths.RESULTS / "fingerprints"
    for model in MODELS:
        fingerprints.save(fingerprints.compute(model), folder / f"{model}.json")
    densities, shapes = [], []
    for model in MODELS:
        found = fingerprints.value_tables(model)
        densities += [rounded(row, 4) for row in found[0]]
        shapes += [rounded(row, 5) for row in found[1]]
    write(densities, paths.RESULTS / "value_densities.csv")
    write(shapes, paths.RESULTS / "value_shapes.csv")
    stored = {model: spectra.load(model, rank=RANK).values for model in MODELS}
    cases = [(model, "another model", stored[model]) for model in MODELS]
    for model in COPIED:
        for name, change in COPIES.items():
            cases.append((model, name, values_of(change(weights.projections(model)))))
    for model in MODELS[:2] + MODELS[3:]:
        for name in nulls.OF_WEIGHTS:
            cases.append((model, f"null model: {name}", nulls.spectra_of(model, name, RANK).values))
    rows = []
    for model, name, values in cases:
        for other in MODELS:
            if (name, other) != ("another model", model):
                distance = fingerprints.spectral_difference(values, stored[other])
                copy = name in COPIES and other == model
                case = {"model": model, "case": name, "stored": other, "copy": copy}
                rows.append(case | {"distance": f"{distance:.6g}"})
    write(rows, paths.RESULTS / "identification.csv")


if __name__ == "__main__":
    main()
