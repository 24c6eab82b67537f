"""How much faster two workers of `wdlib spectra` are than one, and two processors than one at all.

`python workflow/scripts/scaling.py` writes a synthetic bfloat16 checkpoint of four layers of a
Llama 3.2 1B (0.5 GB, in the folder for temporary files, removed at the end) and times, alternating,
one thread of BLAS in each process: `wdlib spectra` with one worker, with two, and, as the control,
two independent runs with one worker at the same time. What the processors share (memory, caches, a
clock) slows the control down as well: its ratio is the most that two workers can have. A row of
data/results/scaling.csv is one repeat. Two minutes on two processors that do nothing else.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import memory
from memory import shapes, write_checkpoint

from wdlib import paths, provenance

LAYERS = 4
SHAPES = shapes(hidden=2048, intermediate=8192, keys=512)
RANK = 16
REPEATS = 3


def seconds(folder: Path, workers: list[int]) -> float:
    """Wall time until all of some runs, begun together, are through; workers: of each."""
    command = [sys.executable, "-m", "wdlib", "spectra", str(folder), "--rank", str(RANK)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        runs = [
            subprocess.Popen(
                [*command, "--workers", str(n), "--out", f"{out}/{i}.safetensors"],
                env=environment,
                stderr=subprocess.DEVNULL,
            )
            for i, n in enumerate(workers)
        ]
        failed = [run.wait() for run in runs]
        if any(failed):
            sys.exit("a run of `wdlib spectra` failed")
        return time.perf_counter() - begun


def main() -> None:
    """Write the checkpoint, time, and write the table."""
    made = provenance.of(
        __file__,
        {"layers": LAYERS, "shapes": SHAPES, "rank": RANK, "repeats": REPEATS},
        inputs=[Path(memory.__file__)],
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "synthetic"
        write_checkpoint(folder, LAYERS, SHAPES)
        for repeat in range(1, REPEATS + 1):
            one, two, both = (seconds(folder, workers) for workers in ([1], [2], [1, 1]))
            rows.append(
                {
                    "repeat": repeat,
                    "one worker s": f"{one:.2f}",
                    "two workers s": f"{two:.2f}",
                    "two runs at once s": f"{both:.2f}",
                    "two workers against one": f"{one / two:.2f}",
                    "two processors against one": f"{2 * one / both:.2f}",
                }
            )
    provenance.write(rows, paths.RESULTS / "scaling.csv", made)


if __name__ == "__main__":
    main()
