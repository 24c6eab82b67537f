"""How a file gets where it is: whole or not at all."""

import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wdlib import WdlibError, paths


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


# What a killed process leaves -----------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from wdlib import paths
with paths.atomic_write(Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_write(path: Path) -> list[str]:
    """Kill a process while it writes; gives the names that are there then."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    return sorted(file.name for file in path.parent.iterdir())


def test_the_next_write_clears_what_a_killed_one_left(tmp_path):
    other, path = tmp_path / "other.json", tmp_path / "[a] file.json"
    assert len(killed_write(other)) == 1
    assert len(killed_write(path)) == 2
    paths.write_text(path, "whole")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left[0].startswith(".other.json.")  # of other work, which may go on elsewhere
    assert left[1:] == ["[a] file.json"]
    paths.write_text(other, "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["[a] file.json", "other.json"]


def test_what_a_live_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "file.json"
    with paths.atomic_write(path) as part:
        part.write_text("slow")
        paths.write_text(path, "quick")
        assert path.read_text() == "quick"
        assert part.read_text() == "slow"
    assert path.read_text() == "slow"
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_planted_folder_is_not_cleared(tmp_path):
    secret = tmp_path / "secret"
    (secret / "inner").mkdir(parents=True)
    (secret / ".lock").write_text("mine")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / ".out.json.x.part").symlink_to(secret)
    paths.write_text(shared / "out.json", "theirs")
    assert (secret / ".lock").read_text() == "mine"
    assert (secret / "inner").is_dir()


# JSON of strict types -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a": "1"}',
        '{"a": 1.0}',
        '{"a": true}',
        "9" * 5000,
        "\ufeff{}",
        '{"a": NaN}',
    ],
)
def test_json_of_another_type_is_refused_in_a_sentence(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": 1}')
    told = {"what": "numbers", "remedy": "ask"}
    assert paths.read_json(path, dict[str, int], **told) == {"a": 1}
    path.write_text(content)
    with pytest.raises(WdlibError, match=r"file\.json does not hold numbers \(.+\): ask"):
        paths.read_json(path, dict[str, int], **told)


def test_what_is_no_file_is_not_read_as_json(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(paths, "TEXT_BYTES", 10)
    (tmp_path / "large").write_text("[" + " " * 10 + "]")
    for name in ("pipe", "large", "absent"):
        with pytest.raises(WdlibError, match=f"{name} does not hold a list"):
            paths.read_json(tmp_path / name, list[int], what="a list", remedy="ask")


def test_json_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "TEXT_BYTES", 2**20)
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('"' + "x" * 2**21 + '"\n')
    with pytest.raises(ValueError, match="more than 1048576"):
        paths.json_lines(path)
