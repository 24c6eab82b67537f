"""Fingerprints of models: standard-deviation vector, clustering vector, and whose model it is.

A fingerprint (arXiv 2509.19122; docs/method.md, section 9) is one small record per model: moments
and largest singular values of every matrix, the two vectors that follow from them, and spectra that
stay when weights are rewritten. In: a model (`of`). Out: a `Fingerprint`, and the known models that
it is made from (`identify`).
"""

from wdlib.fingerprints import (
    alterations,
    ancestors,
    clusters,
    decoder,
    disguises,
    gauge,
    identity,
    independence,
    invariants,
    movement,
    relation,
    values,
)
from wdlib.fingerprints.ancestors import identify
from wdlib.fingerprints.record import Fingerprint, check, compute, library, of, save, shipped

__all__ = [
    "Fingerprint", "alterations", "ancestors", "check", "clusters", "compute", "decoder",
    "disguises", "gauge", "identify", "identity", "independence", "invariants", "library",
    "movement", "of", "relation", "save", "shipped", "values",
]  # fmt: skip
