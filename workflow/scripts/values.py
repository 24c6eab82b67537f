"""How the weight values of the models with a stored fingerprint are distributed.

`python workflow/scripts/values.py`, some minutes on one core with the models at hand, writes
data/results/value_densities.csv and value_shapes.csv.
"""

from typing import Any

from wdlib import checkpoints, paths, provenance
from wdlib.fingerprints import values

MODELS = (
    checkpoints.DEFAULT,
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",
    "gemma-3-270m",
    "all-minilm-l6-v2",
)


def rounded(row: dict[str, Any], digits: int) -> dict[str, Any]:
    """A row with so many significant digits."""
    return {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Write both tables."""
    made = provenance.of(__file__, {"models": MODELS}, models=MODELS)
    densities, shapes = [], []
    for model in MODELS:
        found = values.value_tables(model)
        densities += [rounded(row, 4) for row in found[0]]
        shapes += [rounded(row, 5) for row in found[1]]
    provenance.write(densities, paths.RESULTS / "value_densities.csv", made)
    provenance.write(shapes, paths.RESULTS / "value_shapes.csv", made)


if __name__ == "__main__":
    main()
