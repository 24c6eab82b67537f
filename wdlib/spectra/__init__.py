"""Weight matrices -> their largest singular values, with proven errors.

In: a model, or a stream of projections. Out: `Spectra`, stored (`load`), or computed (`compute`);
`of` takes what is there. `kernel` has the algorithm, `jobs` what a whole model needs, `nulls` what
untrained weights would give.
"""

from wdlib.spectra import jobs, kernel, nulls
from wdlib.spectra.jobs import available_rank, collect, compute, of
from wdlib.spectra.kernel import top_singular_values
from wdlib.spectra.store import Spectra, is_stored, load, save, stored_file

__all__ = [
    "Spectra", "available_rank", "collect", "compute", "is_stored", "jobs", "kernel", "load",
    "nulls", "of", "save", "stored_file", "top_singular_values",
]  # fmt: skip
