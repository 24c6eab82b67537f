"""How many matrices at a time, and with how many threads each."""

from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import tiny
from threadpoolctl import threadpool_info, threadpool_limits

from wdlib.checkpoints.plan import projection_parts
from wdlib.spectra import arrays, workers
from wdlib.spectra.kernel import top_singular_values


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_one_process_per_core_as_far_as_work_and_memory_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = projection_parts(tiny.write_llama(tmp_path / "toy", hidden=336))  # 14 matrices
    largest = 336 * max(max(part.entry.shape) for part in parts)
    each = workers.WORKER_BYTES + 12 * largest
    work = sum(workers.cost(part) for part in parts)
    cores, memory = 64, 10**15
    monkeypatch.setattr(workers, "cores", lambda: cores)
    monkeypatch.setattr(workers, "free_memory", lambda: memory)
    assert workers.number_for(parts) == 1, "a small job pays for a start"
    monkeypatch.setattr(workers, "WORKER_COST", work // 5)
    assert workers.number_for(parts) == 5
    monkeypatch.setattr(workers, "WORKER_COST", 1)
    assert workers.number_for(parts) == len(parts)
    cores = 6
    assert workers.number_for(parts) == 6
    memory = 3 * each
    assert workers.number_for(parts) == 3
    memory = 0
    assert workers.number_for(parts) == 1


def test_free_memory_is_what_machine_and_control_group_leave(tmp_path: Path) -> None:
    system, group = tmp_path / "meminfo", tmp_path / "group"
    system.write_text(
        "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total: 0\n"
    )
    assert workers.free_memory(system, group) == 8_000_000 * 1024
    group.mkdir()
    (group / "memory.current").write_text("1000000\n")
    for limit, free in (("max", 8_000_000 * 1024), ("3000000", 2_000_000), ("900000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert workers.free_memory(system, group) == free
    assert 0 < workers.free_memory() < 2**50
    assert workers.free_memory(tmp_path / "none", tmp_path / "none") > 10**8


def test_a_call_holds_blas_at_one_thread_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    syrk, seen = arrays.syrk, []

    def watched(W: np.ndarray) -> np.ndarray:
        seen.append(blas_threads())
        return syrk(W)

    monkeypatch.setattr(arrays, "syrk", watched)
    with threadpool_limits(2, "blas"):
        before = blas_threads()
        top_singular_values(tiny.gaussian(400, 500), 16)
        assert blas_threads() == before
    assert before == {2}
    assert seen == [{1}]


def test_calls_side_by_side_leave_the_threads_as_they_were() -> None:
    """The one that ends last must not put back what it found: the other's single thread."""
    entered, leave = Event(), Event()

    def first() -> None:
        with arrays.one_thread():
            entered.set()
            leave.wait()

    with threadpool_limits(2, "blas"):
        thread = Thread(target=first)
        thread.start()
        entered.wait()
        with arrays.one_thread():
            leave.set()
            thread.join()
        assert blas_threads() == {2}
