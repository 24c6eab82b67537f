"""How well copies of a model are recognised by its fingerprint.

`python workflow/scripts/identification.py`, some minutes on one core with the models at hand,
writes data/results/identification.csv: distances from the stored models to copies of two of them,
requantised or with an adapter merged, to null models, and to each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from wdlib import checkpoints, paths, provenance, spectra
from wdlib.checkpoints import Projection
from wdlib.fingerprints import identity
from wdlib.spectra import nulls

MODELS = (
    checkpoints.DEFAULT,
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",
    "gemma-3-270m",
    "all-minilm-l6-v2",
)
RANK = 16
ADAPTER_RANK = 16

Stream = Iterator[Projection]


def requantised(stream: Stream, kind: str) -> Stream:
    """The weights as they come back from a GGUF type."""
    return (checkpoints.requantise(p, kind) for p in stream)


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
COPIED = (checkpoints.DEFAULT, "all-minilm-l6-v2")
NULLS_OF = tuple(m for m in MODELS if m != "qwen2.5-coder-1.5b-instruct")


def main() -> None:
    """Write the table."""
    kept = sorted((paths.SPECTRA / "nulls").glob("*.safetensors"))
    made = provenance.of(
        __file__,
        {"rank": RANK, "adapter rank": ADAPTER_RANK, "copied": COPIED, "copies": [*COPIES]},
        inputs=[*map(spectra.stored_file, MODELS), *kept],
        models=NULLS_OF,
    )
    stored = {model: spectra.load(model, rank=RANK).values for model in MODELS}
    cases = [(model, "another model", stored[model]) for model in MODELS]
    for model in COPIED:
        for name, change in COPIES.items():
            copy = spectra.collect(change(checkpoints.projections(model)), RANK)
            cases.append((model, name, copy.values))
    for model in NULLS_OF:
        for name in nulls.OF_WEIGHTS:
            cases.append((model, f"null model: {name}", nulls.of(model, name, RANK).values))
    rows = []
    for model, name, found in cases:
        for other in MODELS:
            if (name, other) != ("another model", model):
                distance = identity.spectral_difference(found, stored[other])
                copy = name in COPIES and other == model
                case = {"model": model, "case": name, "stored": other, "copy": copy}
                rows.append(case | {"distance": f"{distance:.6g}"})
    provenance.write(rows, paths.RESULTS / "identification.csv", made)


if __name__ == "__main__":
    main()
