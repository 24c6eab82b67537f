"""What the tests of spectra share."""

import numpy as np
import pytest

from wdlib.spectra import jobs
from wdlib.spectra.kernel import SingularValues


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the matrices that `top_singular_values` was called with."""
    top, seen = jobs.top_singular_values, []

    def counted(matrix: np.ndarray, r: int, *, name: str, **options: str) -> SingularValues:
        seen.append(name)
        return top(matrix, r, name=name, **options)

    monkeypatch.setattr(jobs, "top_singular_values", counted)
    return seen
