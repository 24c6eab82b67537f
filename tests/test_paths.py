"""How a file gets where it is: whole or not at all."""

import pytest

from wdlib import paths


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with paths.atomic_write(path) as part:
        part.write_text("old")

    def fail():
        with paths.atomic_write(path) as part:
            part.write_text("new, but only ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
