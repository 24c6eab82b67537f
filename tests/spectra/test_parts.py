"""Parts of a job: shards, interruptions, workers; the bits are those of one job."""

import pickle
import subprocess
import sys
import time
import zlib
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tiny

from wdlib import WdlibError, paths
from wdlib.checkpoints.plan import projection_parts
from wdlib.spectra import jobs, store
from wdlib.spectra.kernel import SingularValues

# Shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [tiny.write_llama, tiny.write_mixture])
@pytest.mark.parametrize("shards", [1, 2, 3, 14])
def test_shards_merge_into_the_bytes_of_one_job(write, shards: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "toy")
    one, merged = tmp_path / "one.safetensors", tmp_path / "merged.safetensors"
    jobs.compute_to(one, folder, 8)
    parts = []
    for i in range(1, shards + 1):
        path = tmp_path / f"{i}.safetensors"
        jobs.compute_to(path, folder, 8, shard=(i, shards))
        parts.append(store.load(path))
    if shards > 1:
        assert parts[0].provenance["shard"] == f"1 of {shards}"
        parts = [jobs.merge(parts[::-1])]
    store.save(parts[0], merged)
    assert merged.read_bytes() == one.read_bytes()


def test_shards_of_earlier_versions_have_no_shapes_and_merge_still(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    one, two = (jobs.compute(folder, 4, shard=(i, 2)) for i in (1, 2))
    whole = jobs.merge([one, two])
    assert whole.shapes == jobs.compute(folder, 4).shapes
    merged = jobs.merge([one, replace(two, shapes={})])
    assert merged.shapes.keys() < whole.shapes.keys()
    tiny.assert_same(replace(merged, shapes={}), replace(whole, shapes={}))


def test_shards_are_equal_in_cost(tmp_path: Path) -> None:
    plan = projection_parts(tiny.write_llama(tmp_path / "toy", layers=14))
    shards = [jobs._shard(plan, jobs.Job(8, shard=(i, 7))) for i in range(1, 8)]
    assert sorted(plan.index(p) for shard in shards for p in shard) == list(range(len(plan)))
    seventh = sum(p.stored for p in plan) / 7
    assert [sum(p.stored for p in shard) for shard in shards] == [seventh] * 7
    assert all(shard == sorted(shard, key=plan.index) for shard in shards)


def test_shards_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy")
    one, two = (jobs.compute(folder, 4, shard=(i, 2)) for i in (1, 2))
    for parts in ([one], [one, one], [one, two, two], [jobs.compute(folder, 4)], []):
        with pytest.raises(WdlibError, match="make no whole"):
            jobs.merge(parts)
    thirds = [jobs.compute(folder, 4, shard=(i, 3)) for i in (3, 1)]
    for parts in (thirds, [*thirds, thirds[0]], [thirds[0], one]):
        with pytest.raises(WdlibError, match=r"for want of .*2 of 3: give each"):
            jobs.merge(parts)
    wanted = r"not of one job: made by .*rank=4\)' in 1 of 2 and .*rank=5\)' in 2 of 2"
    with pytest.raises(WdlibError, match=wanted):
        jobs.merge([one, jobs.compute(folder, 5, shard=(2, 2))])
    tiny.spoil(folder, tiny.llama_name(1, "v"), 9.0)
    with pytest.raises(WdlibError, match="not of one job: sha256"):
        jobs.merge([one, jobs.compute(folder, 4, shard=(2, 2))])
    for shard in ((0, 2), (3, 2), (1, 15)):
        with pytest.raises(WdlibError, match="there is no shard"):
            jobs.compute(folder, 4, shard=shard)


# Interruptions -------------------------------------------------------------------------------


def test_a_journal_cut_at_any_byte_goes_on(tmp_path: Path, computed: list[str]) -> None:
    folder, out = tiny.write_llama(tmp_path / "toy"), tmp_path / "out.safetensors"
    journal = Path(f"{out}.unfinished")
    jobs.compute(folder, 4, journal=journal)
    kept = journal.read_bytes()
    jobs.compute_to(out, folder, 4)
    assert not journal.exists() or pytest.fail("the journal of a finished job is left")
    whole, lines = out.read_bytes(), np.cumsum([len(line) for line in kept.splitlines(True)])
    assert len(lines) == 15
    for cut in [*range(0, len(kept), 97), *lines, *(lines - 1)]:
        journal.write_bytes(kept[:cut])
        computed.clear()
        jobs.compute_to(out, folder, 4)
        finished = int(np.sum(lines - 1 <= cut))  # a line is whole without its end
        assert len(computed) == 14 - max(finished - 1, 0)
        assert out.read_bytes() == whole
        assert not journal.exists()


def test_twice_interrupted(tmp_path: Path, computed: list[str]) -> None:
    folder, journal = tiny.write_llama(tmp_path / "toy"), tmp_path / "journal"
    whole = jobs.compute(folder, 4, journal=journal)
    journal.write_bytes(journal.read_bytes()[:2000])  # in the middle of a line
    jobs.compute(folder, 4, journal=journal)
    computed.clear()
    tiny.assert_same(jobs.compute(folder, 4, journal=journal), whole)
    assert computed == []


def test_the_day_is_that_of_the_beginning(tmp_path: Path) -> None:
    folder, journal = tiny.write_llama(tmp_path / "toy"), tmp_path / "journal"
    today = jobs.compute(folder, 4, journal=journal).provenance["created"]
    head, *lines = journal.read_bytes().splitlines(keepends=True)
    text = head[9:-1].replace(today.encode(), b"2001-02-03")  # after the checksum
    journal.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text) + b"".join(lines))
    assert jobs.compute(folder, 4, journal=journal).provenance["created"] == "2001-02-03"
    shards = [jobs.compute(folder, 4, shard=(i, 2)) for i in (1, 2)]
    shards[1].provenance["created"] = "2001-02-03"
    assert jobs.merge(shards).provenance["created"] == "2001-02-03"


@pytest.mark.parametrize("change", ["rank", "weights", "layers", "shard", "foreign", "list"])
def test_a_journal_of_something_else_begins_anew(
    change: str, tmp_path: Path, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, journal = tiny.write_llama(tmp_path / "toy"), tmp_path / "journal"
    options = {"layers": {"layers": (0,)}, "shard": {"shard": (1, 2)}}.get(change, {})
    jobs.compute(folder, 5 if change == "rank" else 4, journal=journal, **options)
    if change == "weights":
        tiny.spoil(folder, tiny.llama_name(0, "q"), 50.0)
    if change in ("foreign", "list"):
        journal.write_text("something\n" if change == "foreign" else "[1]\n")
    computed.clear()
    found = jobs.compute(folder, 4, journal=journal)
    assert len(computed) == 14
    tiny.assert_same(found, jobs.compute(folder, 4))
    assert "begins anew" in caplog.text


def test_killed_and_called_again(tmp_path: Path, computed: list[str]) -> None:
    """A process that gets SIGKILL while it computes; the next one does only what is missing."""
    folder = tiny.write_llama(tmp_path / "toy", layers=6, hidden=400)
    out = tmp_path / "killed.safetensors"
    code = (
        "import sys; from wdlib.spectra import jobs; jobs.compute_to(sys.argv[2], sys.argv[1], 8)"
    )
    journal = Path(f"{out}.unfinished")
    with subprocess.Popen([sys.executable, "-c", code, folder, out], cwd=paths.ROOT) as process:
        while not journal.is_file() or journal.read_bytes().count(b"\n") < 6:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not out.exists()
    finished = journal.read_bytes().count(b"\n") - 1
    jobs.compute_to(out, folder, 8)
    assert len(computed) == 42 - finished < 42
    jobs.compute_to(tmp_path / "one.safetensors", folder, 8)
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


# Workers -------------------------------------------------------------------------------------


def test_threads_give_the_same_bits(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    one = jobs.compute(folder, 8)
    with ThreadPoolExecutor(2) as pool:
        tiny.assert_same(jobs.compute(folder, 8, executor=pool), one)


def test_an_error_in_a_worker_is_raised_and_ends_the_work(
    tmp_path: Path, computed: list[str]
) -> None:
    folder = tiny.write_llama(tmp_path / "toy", layers=30)
    tiny.spoil(folder, tiny.llama_name(1, "q"), np.inf)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(WdlibError, match=r"layers\.1\.self_attn\.q_proj\.weight.* NaN or infinity"),
    ):
        jobs.compute(folder, 4, executor=pool)
    assert len(computed) < 150  # of 210; the 93 before it cost more or as much


def test_a_worker_that_dies_is_said_in_one_sentence(tmp_path: Path) -> None:
    class Dead(Executor):
        def submit(self, *args: object) -> Future:
            future = Future()
            future.set_exception(BrokenExecutor("it is gone"))
            return future

    with pytest.raises(WdlibError, match=r"a worker died \(it is gone\).*same command again"):
        jobs.compute(tiny.write_llama(tmp_path / "toy"), 4, executor=Dead())


def test_no_matrix_travels(tmp_path: Path) -> None:
    plan = projection_parts(tiny.write_llama(tmp_path / "toy", hidden=336))
    assert max(len(pickle.dumps((jobs._of_part, jobs.Job(8), p))) for p in plan) < 2000


def test_processes_give_the_same_bits(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        tiny.assert_same(jobs.compute(folder, 8, executor=pool), jobs.compute(folder, 8))


def test_workers_end_with_a_parent_that_was_killed() -> None:
    program = """
import os, time
from wdlib.spectra import workers
if __name__ == "__main__":
    with workers.processes(2) as pool:
        print(*pool.map(os.path.basename, "ab"), flush=True)
        time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"a b\n"
        parent.kill()
        # At its end when the last process that holds it, the parent or a worker, is gone.
        assert parent.communicate(timeout=30) == (b"", None)


def test_what_is_finished_first_is_kept_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, journal = tiny.write_llama(tmp_path / "toy", layers=3), tmp_path / "journal"
    costly = "tensor model.layers.0.mlp.gate_proj.weight"
    top, order, others_kept = jobs.top_singular_values, [], []

    def slow(matrix: np.ndarray, r: int, *, name: str, **options: str) -> SingularValues:
        order.append(name)
        if name == costly:
            for _ in range(1000):
                time.sleep(0.01)
                if journal.read_bytes().count(b"\n") == 21:  # the head, and all but one of 21
                    others_kept.append(True)
                    break
        return top(matrix, r, name=name, **options)

    monkeypatch.setattr(jobs, "top_singular_values", slow)
    with ThreadPoolExecutor(2) as pool:
        found = jobs.compute(folder, 4, journal=journal, executor=pool)
    assert others_kept
    kinds = [name.split(".")[4] for name in order]
    assert set(kinds[:9]) == {"gate_proj", "up_proj", "down_proj"}, "the costliest are not first"
    monkeypatch.undo()
    tiny.assert_same(found, jobs.compute(folder, 4))


def test_dask_gives_the_same_bits(tmp_path: Path) -> None:
    import distributed

    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    local = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        distributed.LocalCluster(**local, local_directory=str(tmp_path)) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as pool,
    ):
        found = jobs.compute(folder, 8, executor=pool)
    tiny.assert_same(found, jobs.compute(folder, 8))
