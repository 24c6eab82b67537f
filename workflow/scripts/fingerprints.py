"""The fingerprints of the models whose spectra are stored.

`python workflow/scripts/fingerprints.py`, some minutes on one core with the models at hand, writes
data/results/fingerprints/<model>.json, each atomically; they say themselves what they are made of.
"""

from wdlib import checkpoints, fingerprints, paths

MODELS = (
    checkpoints.DEFAULT,
    "qwen2.5-coder-0.5b-instruct",
    "qwen2.5-coder-1.5b-instruct",
    "gemma-3-270m",
    "all-minilm-l6-v2",
    "all-mpnet-base-v2",
)


def main() -> None:
    """Write all of them."""
    for model in MODELS:
        path = paths.RESULTS / "fingerprints" / f"{model}.json"
        fingerprints.save(fingerprints.compute(model), path)


if __name__ == "__main__":
    main()
