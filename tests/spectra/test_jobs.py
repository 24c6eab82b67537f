"""Whole models: every matrix as numpy has it, named where it cannot be, one in memory."""

import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from wdlib import TYPES, WdlibError, cli
from wdlib.checkpoints import catalogue, files
from wdlib.checkpoints.stream import Projection, projections
from wdlib.spectra import jobs, store
from wdlib.spectra.store import Spectra


def test_compute_equals_numpy_matrix_by_matrix(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", layers=3)
    found = jobs.compute(folder, 16)
    tensors = load_file(folder / "model.safetensors")
    assert tuple(found.values) == TYPES
    assert found.model == "toy"
    assert found.rank == 16
    for t in TYPES:
        assert found.values[t].shape == found.error[t].shape == (3, 16)
        assert found.rows[t] == ((0, None), (1, None), (2, None))
        assert found.shapes[t] == (tiny.shapes(32)[t],) * 3
        for layer in range(3):
            W = tensors[tiny.llama_name(layer, t)].astype(np.float64)
            exact = np.linalg.svd(W, compute_uv=False)[:16]
            np.testing.assert_allclose(found.values[t][layer], exact, rtol=1e-9)


def test_provenance(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    about = jobs.compute(folder, 4).provenance
    assert about["source"] == "folder toy"
    assert about["sha256"] == files.content_hash(files.resolve(folder))
    assert about["quantisation"] == "F32"
    assert about["methods"] == "gram-float64 14"
    assert about["certified"] == "yes"
    assert 0 < float(about["largest relative error"]) < 1e-5
    assert "rank=4" in about["made by"]
    assert str(tmp_path) not in str(about)


def test_compute_of_some_types(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    found = jobs.compute(folder, 32, types=("o", "q"))  # k and v would allow 16
    assert list(found.values) == list(found.rows) == ["q", "o"]
    assert "types=('o', 'q')" in found.provenance["made by"]
    with pytest.raises(WdlibError, match="no projection type 'x'"):
        jobs.compute(folder, 1, types=("q", "x"))


def test_compute_of_a_type_that_the_model_has_not(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    tensors = load_file(folder / "model.safetensors")
    rest = {k: v for k, v in tensors.items() if "gate" not in k}
    save_file(rest, folder / "model.safetensors")
    with pytest.raises(WdlibError, match="toy has no matrix of type gate"):
        jobs.compute(folder, 1, types=("gate",))


def test_compute_of_some_layers(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", layers=4)
    whole, part = jobs.compute(folder, 8), jobs.compute(folder, 8, layers=(3, 1))
    assert part.rows["q"] == ((1, None), (3, None))
    np.testing.assert_array_equal(part.values["q"], whole.values["q"][[1, 3]])
    assert "layers=(3, 1)" in part.provenance["made by"]
    with pytest.raises(WdlibError, match="no layer 4"):
        jobs.compute(folder, 8, layers=(4,))


def test_compute_of_matrices_of_rank_one(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    tensors = load_file(folder / "model.safetensors")
    for name, W in tensors.items():
        W[:] = "up" not in name
    save_file(tensors, folder / "model.safetensors")
    found = jobs.compute(folder, 4)
    np.testing.assert_allclose(found.values["q"], [[32, 0, 0, 0]] * 2, atol=1e-12)
    assert not found.values["up"].any()
    assert float(found.provenance["largest relative error"]) < 1e-5


@pytest.mark.parametrize("rank", [0, 17, -3])
def test_rank_out_of_range_names_the_matrix(rank: int, house: Path) -> None:
    folder = tiny.write_llama(house / "toy")
    for function in (jobs.compute, jobs.of):
        with pytest.raises(
            WdlibError, match=r"toy: its matrix model\.layers\.0\.self_attn\.k_proj.*from 1 to 16"
        ):
            function(folder, rank)
    assert not (house / "cache").exists()
    assert jobs.largest_rank(folder) == 16


def test_nan_names_the_tensor_and_writes_nothing(house: Path) -> None:
    folder = tiny.write_llama(house / "toy")
    tiny.spoil(folder, tiny.llama_name(1, "v"), np.nan)
    for function in (jobs.compute, jobs.of):
        with pytest.raises(
            WdlibError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight.* NaN or inf"
        ):
            function(folder, 4)
    assert not list(house.glob("cache/**/*.safetensors"))


def test_collect() -> None:
    W = tiny.gaussian(6, 9)
    given = [Projection(0, "down", "a", W), Projection(4, "q", "b", 2 * W.T, expert=1)]
    given.append(Projection(1, "down", "c", 3 * W))
    found = jobs.collect(iter(given), 2, model="toy")
    assert (found.model, found.rank, found.provenance) == ("toy", 2, {})
    assert list(found.values) == ["q", "down"]
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)[:2]
    np.testing.assert_allclose(found.values["q"], [2 * exact])
    np.testing.assert_allclose(found.values["down"], [exact, 3 * exact])
    assert found.rows == {"q": ((4, 1),), "down": ((0, None), (1, None))}
    assert found.shapes == {"q": ((9, 6),), "down": ((6, 9), (6, 9))}
    with pytest.raises(WdlibError, match="tensor c "):
        jobs.collect([replace(given[2], matrix=W * np.inf)], 2)


def test_collect_gives_the_bits_of_compute(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    made = jobs.compute(folder, 8)
    found = jobs.collect(projections(folder), 8, model="toy")
    tiny.assert_same(replace(made, provenance={}), found)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (2, 12):
        folder = tiny.write_llama(tmp_path / f"toy{layers}", layers=layers, hidden=256)
        sizes.append((folder / "model.safetensors").stat().st_size)
        jobs.compute(folder, 4)
        tracemalloc.start()
        jobs.compute(folder, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 20  # headers, and the results


def test_the_peak_is_three_of_the_largest_matrix(tmp_path: Path) -> None:
    """In the proportions of a 70B Llama, where the largest matrix is 3.5 times as wide as high."""
    n, m = 768, 2688
    shapes = tiny.shapes(n, m)
    tensors = {
        tiny.llama_name(layer, t): tiny.gaussian(*shape).astype(np.float16)
        for layer in (0, 1)
        for t, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    jobs.compute(tmp_path, 16, layers=(0,), types=("k",))
    for layers in ((0,), (0, 1)):
        tracemalloc.start()
        jobs.compute(tmp_path, 16, types=("q", "gate", "down"), layers=layers)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * 4 * n * m  # three are allowed; one matrix kept too long makes 2.75


def test_progress_says_what_is_done_and_how_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, journal = tiny.write_llama(tmp_path / "toy"), tmp_path / "journal"
    jobs.compute(folder, 4, journal=journal, progress=True)
    said = capsys.readouterr()
    assert re.search(r"61\.4k/61\.4k .*B/s, 14 of 14 matrices", said.err.replace("\r", "\n"))
    assert not said.out
    jobs.compute(folder, 4)
    assert not capsys.readouterr().err


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tiny.write_llama(tmp_path / "toy", layers=3)
    common = ["spectra", str(folder), "--rank", "4", "--layers", "0,2-2", "--types", "k,q"]
    shards = []
    for shard in ("1/2", "2/2"):
        shards.append(str(tmp_path / f"{shard[0]}.safetensors"))
        assert cli.main([*common, "--shard", shard, "--out", shards[-1]]) == 0
    merged, one = (str(tmp_path / f"{name}.safetensors") for name in ("merged", "one"))
    assert cli.main(["merge", *shards, "--out", merged]) == 0
    assert cli.main([*common, "--workers", "2", "--out", one]) == 0
    assert Path(merged).read_bytes() == Path(one).read_bytes()
    assert store.load(merged).rows == dict.fromkeys("qk", ((0, None), (2, None)))
    capsys.readouterr()
    assert cli.main([*common, "--device", "tpu", "--out", one]) == 1
    assert "no device 'tpu'" in capsys.readouterr().err
    assert cli.main([*common, "--types", "q,x", "--out", one]) == 1
    assert "no projection type 'x' in toy: give some of q, k, v" in capsys.readouterr().err
    assert cli.main([*common, "--stack", "encoder", "--out", one]) == 1
    assert "no stack 'encoder': its stacks are model.layers (language)" in capsys.readouterr().err
    for option in (
        *(["--layers", "1-"], ["--layers", "2-1"], ["--types", "q,,k"], ["--shard", "2"]),
        *(["--workers", "0"], ["--workers", "-1"]),
    ):
        with pytest.raises(SystemExit):
            cli.main([*common, *option, "--out", one])


# From the store, from the cache, computed ----------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that `compute` was called with."""
    compute, seen = jobs.compute, []

    def counted(model: files.Checkpoint, rank: int, **options: str) -> Spectra:
        seen.append(rank)
        return compute(model, rank, **options)

    monkeypatch.setattr(jobs, "compute", counted)
    return seen


def test_of_computes_once_per_content(house: Path, calls: list[int]) -> None:
    folder = tiny.write_llama(house / "toy")
    first = jobs.of(folder, 4)
    tiny.assert_same(jobs.of(folder, 4), first)
    tiny.assert_same(jobs.of(str(folder), 4), first)
    assert calls == [4]
    assert jobs.of(folder, 5).rank == 5
    assert calls == [4, 5]
    tiny.spoil(folder, tiny.llama_name(0, "q"), 50.0)
    changed = jobs.of(folder, 4)
    assert calls == [4, 5, 4]
    assert changed.values["q"][0, 0] > 49
    assert changed.provenance["sha256"] != first.provenance["sha256"]
    assert len(list((house / "cache" / "spectra").iterdir())) == 3


@pytest.mark.parametrize("as_path", [Path, lambda name: f"./{name}", os.path.abspath])
def test_of_a_folder_named_like_a_model_is_of_the_folder(
    as_path: Callable, house: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(house)
    kept = replace(tiny.spectra(((0, None),), rank=3), model=catalogue.DEFAULT)
    store.save(kept, store.stored_file(catalogue.DEFAULT))
    store.save(kept, house / f"{catalogue.DEFAULT}.safetensors")
    folder = as_path(tiny.write_llama(Path(catalogue.DEFAULT)).name)
    assert jobs.available_rank(folder) == 16
    assert jobs.of(folder, 3).rows["q"] == ((0, None), (1, None))
    assert calls == [3]


def test_of_computes_again_what_is_damaged(
    house: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.write_llama(house / "toy")
    first = jobs.of(folder, 4)
    (path,) = (house / "cache" / "spectra").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    tiny.assert_same(jobs.of(folder, 4), first)
    assert calls == [4, 4]
    assert path.read_bytes() == good
    assert "does not hold spectra" in caplog.text


def test_of_prefers_the_store_and_needs_no_weights(
    house: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(tiny.spectra(((0, None),), rank=3), model=catalogue.DEFAULT)
    store.save(kept, store.stored_file(catalogue.DEFAULT))
    toy = files.resolve(tiny.write_llama(house / "toy"))
    resolved = []

    def resolve(model: str | files.Checkpoint) -> files.Checkpoint:
        if not isinstance(model, files.Checkpoint):
            resolved.append(model)
        return toy

    monkeypatch.setattr(files, "resolve", resolve)
    tiny.assert_same(jobs.of(catalogue.DEFAULT, 2), kept.truncate(2))
    tiny.assert_same(jobs.of(catalogue.DEFAULT, 3), kept)
    assert not calls
    assert not resolved
    assert jobs.of(catalogue.DEFAULT, 4).model == "toy"  # more than the store holds
    assert resolved == [catalogue.DEFAULT]
    assert calls == [4]
