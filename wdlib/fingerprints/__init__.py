"""Fingerprints of models: standard-deviation vector, clustering vector, and who a model is.

A fingerprint (arXiv 2509.19122; docs/method.md, section 9) is one small record per model: moments
and largest singular values of every matrix, and the two vectors that follow from them. In: a model
(`of`). Out: a `Fingerprint`, and the known models that it is nearest to (`identify`).
"""

from wdlib.fingerprints import clusters, identity, movement, values
from wdlib.fingerprints.identity import identify
from wdlib.fingerprints.record import Fingerprint, check, compute, library, of, save, shipped

__all__ = [
    "Fingerprint", "check", "clusters", "compute", "identify", "identity", "library", "movement",
    "of", "save", "shipped", "values",
]  # fmt: skip
