"""Peak memory of `wdlib spectra` against the number of layers, at the shapes of a 70B Llama.

`python workflow/scripts/memory.py` writes a synthetic bfloat16 checkpoint of three layers in
shards (5.1 GB, in the folder for temporary files, removed at the end), runs `wdlib spectra` on it
in a process of its own, one thread, and follows that process's largest resident set (VmHWM of
Linux) and its journal. Each row of data/results/memory.csv holds what the process had used at most
when so many layers were done. The types are the smallest and two of the largest, one after the
other in the order of reading, which is where the peak is. Five minutes on one free core.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from wdlib import paths, provenance

LAYERS = 3
HIDDEN, INTERMEDIATE, KEYS = 8192, 28672, 1024
RANK = 16
TYPES = ("k", "gate", "down")
LARGEST = 4 * HIDDEN * INTERMEDIATE
ALLOWED = 3 * LARGEST + 400 * 10**6


def shapes(hidden: int, intermediate: int, keys: int) -> dict[str, tuple[int, int]]:
    """The matrices of a layer of a Llama."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def write_shard(path: Path, tensors: dict[str, tuple[int, int]], rng: np.random.Generator) -> None:
    """A safetensors file of normal values in bfloat16, some rows in memory at a time."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows, columns in tensors.values():
            for first in range(0, rows, 512):
                values = rng.standard_normal((min(512, rows - first), columns), dtype=np.float32)
                values *= np.float32(0.02)
                file.write((values.view("<u4") >> 16).astype("<u2").tobytes())


def write_checkpoint(folder: Path, layers: int, shapes: dict[str, tuple[int, int]]) -> None:
    """A checkpoint of a Llama: a shard per layer, an index and a configuration."""
    folder.mkdir()
    rng, weight_map = np.random.default_rng(0), {}
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{module}.weight": s for module, s in shapes.items()}
        shard = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        write_shard(folder / shard, tensors, rng)
        weight_map |= dict.fromkeys(tensors, shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    config = {"model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": 64}
    (folder / "config.json").write_text(json.dumps(config))


def peak(process: subprocess.Popen) -> int:
    """The largest resident set of a running process so far, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def row(layers: int, used: int) -> dict[str, str]:
    """A row of the table."""
    read = 2 * sum(KEYS * HIDDEN if t == "k" else HIDDEN * INTERMEDIATE for t in TYPES)
    return {
        "layers": str(layers),
        "GB read": f"{layers * read / 1e9:.2f}",
        "peak GB": f"{used / 1e9:.2f}",
        "of the largest matrix": f"{used / LARGEST:.2f}",
        "allowed GB": f"{ALLOWED / 1e9:.2f}",
    }


def main() -> None:
    """Write the checkpoint, run, watch, and write the table."""
    made = provenance.of(
        __file__,
        {
            "layers": LAYERS,
            "hidden": HIDDEN,
            "intermediate": INTERMEDIATE,
            "keys": KEYS,
            "types": TYPES,
            "rank": RANK,
        },
    )
    rows, used = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "synthetic", Path(temporary) / "out.safetensors"
        write_checkpoint(folder, LAYERS, shapes(HIDDEN, INTERMEDIATE, KEYS))
        journal = Path(f"{out}.unfinished")
        command = [sys.executable, "-m", "wdlib", "spectra", str(folder), "--workers", "1"]
        command += ["--types", ",".join(TYPES), "--rank", str(RANK), "--out", str(out)]
        with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None:
                used = peak(process) or used
                done = journal.read_bytes().count(b"\n") - 1 if journal.is_file() else 0
                if len(TYPES) * (len(rows) + 1) <= done < len(TYPES) * LAYERS:
                    rows.append(row(len(rows) + 1, used))
                time.sleep(0.05)
    rows.append(row(LAYERS, used))  # the journal goes when all is done
    if process.returncode or used > ALLOWED or len(rows) != LAYERS:
        sys.exit(f"status {process.returncode}, peak {used}, allowed {ALLOWED}, {rows}")
    provenance.write(rows, paths.RESULTS / "memory.csv", made)


if __name__ == "__main__":
    main()
