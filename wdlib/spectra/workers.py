"""Who computes matrices side by side: processes on a CPU, threads on a device."""

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread

from wdlib.spectra.arrays import own_stream

STREAMS = 3
"""Matrices at a time on a device: one is read, one copied and one computed."""


def processes(number: int) -> ProcessPoolExecutor:
    """An executor for `compute`: so many processes, which end with this one however it ends.

    They import nothing from the current folder, which may be that of somebody's model.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # for children of this process: they start at first use
    return ProcessPoolExecutor(number, get_context("spawn"), initializer=_end_with_parent)


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
