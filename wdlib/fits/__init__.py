"""Distances -> power laws fitted to their tail, how well they fit, and what else may fit.

In: distances along one axis, or a table of them between vectors. Out: `PowerLawFit` and tests.
`alternatives` holds the other families, all on the same support.
"""

from wdlib.fits import alternatives, goodness
from wdlib.fits.estimators import ESTIMATORS, PowerLawFit, alpha_by_xmin, power_law
from wdlib.fits.goodness import goodness_of_fit, goodness_of_fit_vectors
from wdlib.fits.resampling import table_distances, vector_bootstrap

__all__ = [
    "ESTIMATORS", "PowerLawFit", "alpha_by_xmin", "alternatives", "goodness", "goodness_of_fit",
    "goodness_of_fit_vectors", "power_law", "table_distances", "vector_bootstrap",
]  # fmt: skip
