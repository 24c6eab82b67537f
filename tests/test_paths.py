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


def test_a_planted_link_is_not_written_through(tmp_path):
    """In a shared folder somebody may put links where files will be written for a moment."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    shared = tmp_path / "shared"
    shared.mkdir()
    import os

    (shared / f".out.json.{os.getpid()}.part").symlink_to(secret)
    (shared / "out.json").symlink_to(secret)
    paths.write_text(shared / "out.json", "theirs")
    assert secret.read_text() == "mine"
    assert (shared / "out.json").read_text() == "theirs"


def test_a_full_disk_is_reported_with_the_files_name(tmp_path):
    import errno

    with (
        pytest.raises(OSError, match=r"No space left on device.*out\.json"),
        paths.atomic_write(tmp_path / "out.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
