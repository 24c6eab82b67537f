"""No file makes a reader hang, run out of memory, raise another error, or give a wrong value.

A short run of fixed cases; `make fuzz` does twenty times as many others.
"""

import pytest
from fuzz import engine
from fuzz.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_changed_file_is_refused_or_read_rightly(kind, tmp_path):
    found = engine.run(kind, tmp_path / "files", range(kind.cases))
    assert found.failures == {}
    assert found.counts[engine.RIGHT]
