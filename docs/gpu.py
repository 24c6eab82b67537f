"""Speed on one GPU, beside plain torch on the same card: `make bench-gpu`.

Makes its own matrices; needs no network where the default model and, with --data-folder, the data
sets are at hand. Each part keeps its results in --out and is skipped where they are there, so that
a run that was cut short goes on: empty the folder to measure anew. Writes gpu.md and gpu.json.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_training
import numpy as np
import torch
from safetensors.torch import save_file

from wdlib import __version__, paths
from wdlib.spectra import jobs, top_singular_values, workers

HERE = Path(__file__).parent

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336), (8192, 28672))
RANKS = (16, 64, 256)
TARGETS = {  # seconds: 1.3 times a prototype wholly on an H100
    (1024, 4096): {16: 0.017},
    (4096, 4096): {16: 0.025, 64: 0.077, 256: 0.13},
    (4096, 14336): {16: 0.029, 64: 0.085, 256: 0.18},
    (8192, 28672): {16: 0.112, 64: 0.21, 256: 0.42},
}
LLAMA = {  # a layer of Llama 3 8B, and how many there are
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYERS, SHARDS = 32, 4
OURS, YARDSTICK = "wdlib, certified", "svdvals, float32, tall"
DENSE = "float64 product, eigvalsh"
SMALL = 8
"""With --quick, every side is so many times shorter."""


def made_up(n: int, m: int, device: str) -> torch.Tensor:
    """A bfloat16 matrix as flat as real ones: 128 slowly falling values, in noise."""
    g = torch.Generator(device).manual_seed(0)
    strength = 2.5 * (m**-0.5 + n**-0.5) * torch.arange(1, 129, device=device) ** -0.3
    left = torch.randn(n, 128, generator=g, device=device) * strength
    W = torch.randn(n, m, generator=g, device=device)
    return (W + left @ torch.randn(128, m, generator=g, device=device)).bfloat16()


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def seconds(function: Callable[[], Any], device: str, times: int) -> tuple[Any, float]:
    """What a function gives, and the median of its wall times after a first call."""
    function()
    took = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        found = function()
        wait(device)
        took.append(time.perf_counter() - start)
    return found, statistics.median(took)


def off(values: Any, exact: np.ndarray) -> float:
    """The largest relative error of singular values."""
    values = np.asarray(torch.as_tensor(values).cpu(), dtype=float)
    return float(np.max(np.abs(values / exact[: len(values)] - 1)))


def kernel(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One matrix after the other: ours, svdvals, all eigenvalues, and a sketch."""
    rows, device, scale = [], options.device, SMALL if options.quick else 1
    for n, m in SHAPES:
        W = made_up(n // scale, m // scale, device)
        tall, wide = W.float().T, W.double() if device != "mps" else W.double().cpu()

        def dense(wide: torch.Tensor = wide) -> torch.Tensor:
            return torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt().sort().values.flip(0)

        exact, took = seconds(dense, device, 2)
        exact = exact.cpu().numpy()
        about = {"matrix": f"{n // scale} x {m // scale}"}
        rows.append(about | {"way": DENSE, "seconds": took})
        del wide
        if n <= 4096:  # ten seconds beyond
            found, took = seconds(lambda tall=tall: torch.linalg.svdvals(tall), device, 1)
            rows.append(about | {"way": YARDSTICK, "seconds": took})
            rows[-1]["error"] = off(found[:16], exact)
        for r in (r for r in RANKS if r * 4 <= n // scale):
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(device)
            ours, took = seconds(
                lambda W=W, r=r: top_singular_values(W, r, device=device), device, 5
            )
            row = about | {"way": OURS, "r": r, "seconds": took}
            row |= {"error": off(ours.values, exact), "method": ours.method}
            row["bound"] = float(np.max(ours.error / ours.values))
            row["target"] = None if options.quick else TARGETS[n, m].get(r)
            if device.startswith("cuda"):
                row["memory"] = torch.cuda.max_memory_allocated(device) / (8 * W.numel())
            rows.append(row)
            sketch, took = seconds(lambda tall=tall, r=r: torch.svd_lowrank(tall, r)[1], device, 2)
            rows.append(about | {"way": "svd_lowrank", "r": r, "seconds": took})
            rows[-1]["error"] = off(sketch, exact)
        logging.info(json.dumps(rows[-1]))
    return rows


def checkpoint(folder: Path, layers: int, scale: int, device: str) -> None:
    """A bfloat16 checkpoint of Llama 3 8B's shapes, in shards, in the page cache."""
    folder.mkdir(parents=True)
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {
            f"model.layers.{layer}.{module}.weight": made_up(n // scale, m // scale, device).cpu()
            for layer in range(shard * layers // SHARDS, (shard + 1) * layers // SHARDS)
            for module, (n, m) in LLAMA.items()
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": 32 // scale,
    }
    (folder / "config.json").write_text(json.dumps(config))


def model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole models, from the files to the stored result."""
    scale, work, device = SMALL if options.quick else 1, options.out / "model", options.device
    layer = 2 * sum(n * m for n, m in LLAMA.values()) // scale**2
    room = int(0.8 * shutil.disk_usage(options.out).free / layer) // SHARDS * SHARDS
    rows: list[dict[str, Any]] = []
    for layers in sorted({min(LAYERS // 4, room), min(LAYERS, room)} - {0}):
        shutil.rmtree(work, ignore_errors=True)
        checkpoint(work, layers, scale, device)
        for r in (16, 64):
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            made = jobs.compute_to(options.out / "made.safetensors", work, r, device=device)
            row = {"layers": layers, "r": r, "seconds": time.perf_counter() - start}
            row |= {key: made.provenance[key] for key in ("methods", "largest relative error")}
            if device.startswith("cuda"):
                largest = 8 * max(n * m for n, m in LLAMA.values()) // scale**2
                row["memory"] = torch.cuda.max_memory_allocated(device) / largest
            rows.append(row)
            logging.info(json.dumps(row))
        shutil.rmtree(work)
    return rows


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A cell, its evaluation, and eight workers: gpu_training.py, part by part."""
    out = options.out / "training"
    command = [sys.executable, str(HERE / "gpu_training.py"), "--out", str(out)]
    command += ["--device", options.device]
    if options.data_folder:
        command += ["--data-folder", str(options.data_folder)]
    if options.quick:
        command += ["--steps", "2", "--cells", "2", "--workers", "2", "--items", "4"]
    subprocess.run(command, check=True)
    return [{"part": p.stem} | json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]


PARTS = {function.__name__: function for function in (kernel, model, training)}


def about(device: str) -> dict[str, str]:
    """What was measured on."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {
        "Card": card,
        "Processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "Versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "wdlib": __version__,
        "Date": datetime.now(UTC).date().isoformat(),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """A line per matrix and r: plain torch's two ways, its sketch, and ours."""
    lines = []
    for row in (row for row in rows if row["way"] == OURS):
        same = {
            r["way"]: r
            for r in rows
            if r["matrix"] == row["matrix"] and r.get("r") in (None, row["r"])
        }
        plain, sketch = same.get(YARDSTICK), same["svd_lowrank"]
        target = row.get("target")
        lines.append(
            (
                row["matrix"],
                str(row["r"]),
                f"{plain['seconds']:.3f}" if plain else "",
                f"{plain['error']:.0e}" if plain else "",
                f"{same[DENSE]['seconds']:.3f}",
                f"{sketch['error']:.0%}",
                f"**{row['seconds']:.3f}**",
                f"{row['error']:.0e}",
                f"{row['bound']:.0e}",
                f"{target:g} {'met' if row['seconds'] <= target else '**not met**'}"
                if target
                else "",
            )
        )
    head = ("matrix", "r", "svdvals", "its error", "all eigenvalues", "svd_lowrank's error")
    return table((*head, "ours", "error", "bound", "target"), lines)


def model_table(kept: dict[str, Any], kernels: list[dict[str, Any]]) -> str:
    """A line per job, beside plain svdvals of the same matrices, added up from the table above."""
    plain = {row["matrix"]: row["seconds"] for row in kernels if row["way"] == YARDSTICK}
    layer = sum(plain.get(f"{min(s)} x {max(s)}", float("nan")) for s in LLAMA.values())
    lines = [
        (
            str(row["layers"]),
            str(row["r"]),
            f"{row['seconds']:.1f}",
            f"{layer * row['layers']:.0f}",
            row["methods"],
            row["largest relative error"],
            f"{row['memory']:.1f}" if "memory" in row else "",
        )
        for row in kept["rows"]
    ]
    head = ("layers", "r", "s", "svdvals, s", "methods", "largest bound", "memory")
    return table(head, lines)


def report(found: dict[str, dict[str, Any]]) -> str:
    """The text of gpu.md."""
    kernels = found["kernel"]["rows"]
    facts = "".join(f"- {name}: {fact}\n" for name, fact in found["kernel"]["about"].items())
    parts = {row["part"]: row for row in found["training"]["rows"]} if "training" in found else {}
    return TEXT.format(
        facts=facts,
        kernels=kernel_table(kernels),
        models=model_table(found["model"], kernels),
        streams=found["model"]["about"].get("streams", workers.STREAMS),
        training=gpu_training.table(parts),
    )


TEXT = """\
# Speed on a GPU

Written by `make bench-gpu`, all of it on one card; gpu.json holds the same numbers.

{facts}
## Singular values of one matrix

Seconds, medians, of bfloat16 matrices that are on the card already. They are made up, with spectra
as flat as real ones. `svdvals` is torch's in float32 of the tall orientation; "all eigenvalues" is
torch's float64 product and `eigvalsh`, against which errors are taken: relative, the largest of the
r values (of svdvals, of 16). The target is 1.3 times a prototype's time on an H100.

{kernels}
## A whole model

Llama 3 8B's shapes, 7 matrices a layer, bfloat16 safetensors in the page cache, {streams} queues on
the card; seconds from the call to the stored result, the hash of the files included. Memory is the
card's, in units of the largest matrix in float64. Plain svdvals is added up from the table above.

{models}
## LoRA: a cell, its evaluation, and cells side by side

SmolLM2-135M-Instruct, 60 steps of 8 examples.

{training}
"""


def main() -> None:
    """Run the parts that are not there yet, and write the tables of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", help="as torch names it (default: cuda)")
    add("--out", type=Path, default=paths.CACHE / "gpu", help="folder of the parts' results")
    add(
        "--data-folder",
        type=Path,
        metavar="F",
        help="of data sets and benchmarks, default: the hub",
    )
    add("--quick", action="store_true", help="small, to see that it works")
    add("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in PARTS:
        kept = options.out / f"{name}.json"
        if not kept.exists() and name in (options.parts or PARTS):
            made = {"about": about(options.device), "rows": PARTS[name](options)}
            paths.write_text(kept, json.dumps(made, indent=1) + "\n")
        if kept.exists():
            found[name] = json.loads(kept.read_text())
    if found.keys() >= {"kernel", "model"}:
        where = options.out if options.quick else HERE
        paths.write_text(where / "gpu.json", json.dumps(found, indent=1) + "\n")
        paths.write_text(where / "gpu.md", report(found))


if __name__ == "__main__":
    main()
