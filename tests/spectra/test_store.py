"""Files of spectra: they come back as they were, and what is none is refused by name."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from wdlib import WdlibError, paths
from wdlib.spectra import jobs, store


@pytest.mark.parametrize(
    "rows",
    [
        ((0, None), (1, None)),
        ((0, 0), (0, 1), (1, 0), (1, 1)),
        ((0, None), (0, 0), (3, 1)),
        ((1, None), (4, None)),
    ],
)
def test_round_trip(rows: tuple, tmp_path: Path) -> None:
    written = tiny.spectra(rows)
    path = store.save(written, tmp_path / "new" / "toy.safetensors")
    tiny.assert_same(store.load(path), written)
    tiny.assert_same(store.load(str(path)), written)
    tiny.assert_same(store.load(path, rank=2), written.truncate(2))
    tensors = load_file(path)
    assert tensors["q"].dtype == np.float64
    np.testing.assert_array_equal(tensors["down.error"], written.error["down"])
    assert ("q.rows" in tensors) == (rows != ((0, None), (1, None)))
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]


def test_files_of_earlier_versions_hold_no_shapes(tmp_path: Path) -> None:
    old = replace(tiny.spectra([(0, None), (1, None)]), shapes={})
    path = store.save(old, tmp_path / "old.safetensors")
    assert not [name for name in load_file(path) if name.endswith("shapes")]
    tiny.assert_same(store.load(path), old)
    tiny.assert_same(store.load(path, rank=2), old.truncate(2))


def test_shapes_are_of_some_types_alone_where_that_is_known(tmp_path: Path) -> None:
    part = replace(tiny.spectra([(0, 0), (0, 1)]), shapes={"down": ((7, 8), (9, 8))})
    path = store.save(part, tmp_path / "part.safetensors")
    assert load_file(path)["down.shapes"].tolist() == [[7, 8], [9, 8]]
    tiny.assert_same(store.load(path), part)


def test_truncate() -> None:
    whole = tiny.spectra(((0, None), (1, None)), rank=5)
    part = whole.truncate(2)
    assert part.rank == 2
    np.testing.assert_array_equal(part.values["q"], whole.values["q"][:, :2])
    np.testing.assert_array_equal(part.error["down"], whole.error["down"][:, :2])
    tiny.assert_same(whole.truncate(5), whole)
    for rank in (0, 6):
        remedy = "ask .* `wdlib spectra toy --rank R --out FILE`"
        with pytest.raises(WdlibError, match=f"toy hold ranks 1 to 5, not {rank}: {remedy}"):
            whole.truncate(rank)


def test_truncated_spectra_are_saved_as_they_are(tmp_path: Path) -> None:
    part = tiny.spectra(((0, None), (1, None)), rank=5).truncate(2)
    tiny.assert_same(store.load(store.save(part, tmp_path / "part.safetensors")), part)


def test_load_by_name(house: Path) -> None:
    toy = tiny.spectra(((0, None),))
    with pytest.raises(WdlibError, match=r"no stored spectra toy\.safetensors"):
        store.load("toy")
    store.save(toy, store.stored_file("toy"))
    tiny.assert_same(store.load("toy"), toy)
    with pytest.raises(WdlibError, match=r"stored: toy"):
        store.load("other")


def wdlib_file(path: Path, about: object, *left_out: str) -> None:
    tensors = {k: np.ones((2, 3)) for k in ("q", "q.error") if k not in left_out}
    save_file(tensors, path, metadata={"wdlib": json.dumps(about)})


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(1000)),
    "cut": lambda path: path.write_bytes(
        store.save(tiny.spectra(((0, None),)), path).read_bytes()[:-9]
    ),
    "foreign": lambda path: save_file({"q": np.ones((2, 3))}, path),
    "other metadata": lambda path: save_file({"q": np.ones(2)}, path, metadata={"format": "pt"}),
    "no json": lambda path: save_file({"q": np.ones(2)}, path, metadata={"wdlib": "{"}),
    "no object": lambda path: wdlib_file(path, [1]),
    "no model": lambda path: wdlib_file(path, {"source": "x"}),
    "no bounds": lambda path: wdlib_file(path, {"model": "x"}, "q.error"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    BROKEN[name](path)
    remedy = r"`wdlib spectra MODEL --rank R --out \S+bad\.safetensors`"
    with pytest.raises(WdlibError, match=rf"bad\.safetensors does not hold spectra .*{remedy}"):
        store.load(path)


def test_files_that_cannot_hold_spectra_are_refused_before_any_work(
    tmp_path: Path, computed: list[str], capsys: pytest.CaptureFixture
) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("folder.safetensors", "toy", "a.npz"):
        with pytest.raises(WdlibError, match=rf"{name} cannot hold spectra: name a file that"):
            jobs.compute_to(tmp_path / name, folder, 4)
        with pytest.raises(WdlibError, match=rf"{name} cannot hold spectra"):
            store.save(tiny.spectra(((0, None),)), tmp_path / name)
    assert not computed
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "folder.safetensors"}


def test_files_that_are_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "2.safetensors"
    with pytest.raises(WdlibError, match=r"2\.safetensors holds no spectra \(there is no such"):
        store.load(path)
    Path(f"{path}.unfinished").touch()
    with pytest.raises(WdlibError, match=r"\(its job is unfinished\): run `wdlib spectra MODEL"):
        store.load(path)


@pytest.mark.parametrize("step", ["serialise", "write", "replace"])
def test_a_failed_save_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.safetensors"
    store.save(tiny.spectra(((0, None),)), path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    def write_half(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        fail()

    if step == "serialise":
        monkeypatch.setattr(store, "serialise", fail)
    elif step == "write":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    for target in (path, tmp_path / "other.safetensors"):
        with pytest.raises(OSError, match="no space left"):
            store.save(tiny.spectra(((0, None), (1, None))), target)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.safetensors"]
    assert path.read_bytes() == before


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    code = (
        "import sys; from wdlib import spectra; "
        "spectra.save(spectra.compute(sys.argv[1], 8), sys.argv[2])"
    )
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(folder), str(path)],
            check=True,
            cwd=paths.ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert "gram-lanczos" in store.load(path).provenance["methods"]
