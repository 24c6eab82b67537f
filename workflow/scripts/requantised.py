"""How far rounding the weights of a model moves its fingerprint.

`python workflow/scripts/requantised.py` rounds the weights of the default model to bfloat16, Q8_0
and Q4_0, and writes data/results/requantised.csv, atomically: for each, the distances of
`movement.movements` from the unrounded model and the matrices that change their cluster. A few
minutes of one core, once the model is there.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from wdlib import checkpoints, fingerprints, paths, provenance, spectra
from wdlib.checkpoints import Projection
from wdlib.fingerprints import Fingerprint, clusters, movement, values

CASES = ("bfloat16", "Q8_0", "Q4_0")


def rounded(projection: Projection, kind: str) -> Projection:
    """A projection as it comes back after being stored so."""
    if kind != "bfloat16":
        return checkpoints.requantise(projection, kind)
    matrix = torch.tensor(projection.matrix).to(torch.bfloat16).float().numpy()
    return replace(projection, matrix=matrix)


def fingerprint(base: Fingerprint, kind: str) -> Fingerprint:
    """That of the base's weights, stored so."""
    moments = {t: [] for t in base.types}

    def stream() -> Iterator[Projection]:
        for projection in checkpoints.projections(base.model):
            seen = rounded(projection, kind)
            moments[seen.type].append(values.moments(seen.matrix))
            yield seen

    found = spectra.collect(stream(), base.rank).values
    return replace(
        base,
        moments={t: tuple(m) for t, m in moments.items()},
        singular_values=found,
        clusters=clusters.cluster(found, k=base.k),
    )


def main() -> None:
    """Write one row per way of rounding."""
    base = fingerprints.of(checkpoints.DEFAULT)
    made = provenance.of(
        __file__,
        {"cases": CASES, "rank": base.rank, "clusters": base.k},
        inputs=[paths.RESULTS / "fingerprints" / f"{base.model}.json"],
        models=[base.model],
        libraries=["torch"],
    )
    rows = []
    for kind in CASES:
        found = fingerprint(base, kind)
        moved = {name: table[0, 1] for name, table in movement.movements(base, [found]).items()}
        changed = sum(np.count_nonzero(c) for c in movement.changed(base, found).values())
        distances = {name: f"{distance:.5g}" for name, distance in moved.items()}
        rows.append({"model": base.model, "stored as": kind} | distances | {"changed": changed})
    provenance.write(rows, paths.RESULTS / "requantised.csv", made)


if __name__ == "__main__":
    main()
