"""Who computes matrices side by side: processes on a CPU, threads on a device."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path
from threading import Thread

from wdlib.checkpoints.plan import Part
from wdlib.spectra.arrays import own_stream

STREAMS = 2
"""Matrices at a time on a device: one is read and copied while the other is computed. A third makes
a job a fifth faster and takes half as much memory again."""

WORKER_BYTES = 150 * 10**6
"""What a process takes before its first matrix: the interpreter, numpy and scipy."""

WORKER_COST = 10**10
"""Multiplications from which on a process is worth its start: they take about a second."""


def processes(number: int) -> ProcessPoolExecutor:
    """An executor for `compute`: so many processes, which end with this one however it ends.

    They import nothing from the current folder, which may be that of somebody's model. Where the
    system can, one process imports what all need and the others are copies of it.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # for children of this process: they start at first use
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    context.set_forkserver_preload(["wdlib.spectra.jobs", "gguf"])
    return ProcessPoolExecutor(number, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """In a worker: end when its parent has, which a killed parent cannot see to."""

    def watch() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def streams(device: str, number: int = STREAMS) -> ThreadPoolExecutor:
    """An executor for `compute` on a device: so many threads, each with its own queue there."""
    return ThreadPoolExecutor(number, "wdlib", own_stream, (device,))


def cost(part: Part) -> int:
    """Multiplications of the product W W^T."""
    return min(part.entry.shape) * math.prod(part.entry.shape)


def number_for(parts: Sequence[Part]) -> int:
    """Processes that are worth having for a plan: one per core, as far as work and memory go.

    Each takes WORKER_BYTES and three times the largest matrix in float32, and has WORKER_COST to
    do.
    """
    each = WORKER_BYTES + 3 * 4 * max(math.prod(part.entry.shape) for part in parts)
    work = sum(cost(part) for part in parts) // WORKER_COST
    return max(1, min(cores(), len(parts), work, free_memory() // each))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(system: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that programs may still take: of the machine, and of the control group on Linux.

    Where the system does not say what is free, half of all; where not even that, 4 GB.
    """
    if system.is_file():
        lines = dict(line.split(":") for line in system.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    elif hasattr(os, "sysconf"):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    else:
        free = 4 * 10**9
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)
