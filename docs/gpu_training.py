"""What LoRA training and evaluation cost on one device: loading, a cell, its evaluation, workers.

`python docs/gpu_training.py --device cuda --data-folder F --out FOLDER` prints a table, and keeps
each part as JSON in the folder: the same command goes on after the last part that is there. Every
part runs in a process of its own. It needs no network where the model is in the cache or a path.
With `--device cpu --steps 2 --cells 2 --workers 2 --items 4` it takes minutes on a laptop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wdlib import paths

MICRO_BATCHES = (8, 2)
"""Sizes that are compared; the first is taken as the reference of the loss."""

TARGETS = {"cell": 25.0, "evaluation": 20.0, "workers": 600 / 100}
"""Seconds on an H100: of a process that does one cell, of tier 1's evaluation, and for each of 100
cells that eight workers do."""

REFERENCE = "qwen2.5-coder-0.5b-instruct"
Options = argparse.Namespace


# Parts that run in processes of their own; each returns what JSON can hold ------------------------


def load(options: Options) -> dict[str, Any]:
    """The model twice: a GGUF file is converted at the first load of a cache."""
    import torch
    import transformers  # noqa: F401  its import is not what is timed

    from wdlib.lora import pretrained

    found: dict[str, Any] = {}
    for name in ("first", "second"):
        begun = time.perf_counter()
        loaded = pretrained.load(options.model)
        found[name] = time.perf_counter() - begun
    begun = time.perf_counter()
    loaded.model.to(options.device)
    return found | {"to the device": time.perf_counter() - begun, "torch": torch.__version__}


def micro_batches(options: Options) -> dict[str, Any]:
    """Forward and backward passes of the same steps, divided in several ways, without an optimiser.

    The first step of each way warms up and is not counted.
    """
    import torch

    from wdlib import lora
    from wdlib.lora import data, devices, training

    run = _run(options, seed=0)
    loaded = lora.pretrained.load(options.model)
    to_train, _ = data.split(data.examples(run.data, folder=options.data_folder))
    sequences = data.tokenise(to_train, loaded.needed_tokenizer(), max_length=1024)
    model, _ = lora.attach(loaded.model.to(options.device), "default", seed=0)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, devices.native_dtype()))
    model.train()
    plan = data.schedule(len(sequences), max(MICRO_BATCHES), 1 + max(1, options.steps // 4), seed=0)
    found: dict[str, Any] = {}
    losses: dict[int, list[float]] = {size: [] for size in MICRO_BATCHES}
    for size in MICRO_BATCHES:
        seconds = []
        for drawn in plan:
            picked = [sequences[i] for i in training.by_length(drawn, sequences)]
            tokens = sum(s.counted for s in picked)
            begun, total = time.perf_counter(), 0.0
            for first in range(0, len(picked), size):
                batch = data.pad(picked[first : first + size])
                batch = {key: value.to(options.device) for key, value in batch.items()}
                loss = model(**batch, num_items_in_batch=tokens).loss
                loss.backward()
                total += loss.detach()
            losses[size].append(float(total))
            model.zero_grad()
            seconds.append(time.perf_counter() - begun)
        found[f"seconds a step, micro-batch {size}"] = sum(seconds[1:]) / len(seconds[1:])
    pairs = zip(*losses.values(), strict=True)
    return found | {"largest difference of a loss": max(abs(a - b) for a, b in pairs)}


def cell(options: Options) -> dict[str, Any]:
    """One run without evaluation, as the grid does it."""
    from wdlib.lora import grid

    begun = time.perf_counter()
    one = _cells(options, 1)[0]
    with tempfile.TemporaryDirectory() as folder:
        places = {"results": Path(folder) / "results", "work": Path(folder) / "work"}
        grid.run_cell(one, data_folder=options.data_folder, **places)
        report = grid.finished([one], results=places["results"])[one.run].report
    held_out = {when: row["loss"] for when, row in report["held_out"].items()}
    found = {"run_cell": time.perf_counter() - begun, **report["seconds"], "held_out": held_out}
    slowest = max(report["curve"], key=lambda row: row["seconds"])
    return found | {
        "slowest step": [slowest["step"], slowest["seconds"]],
        "machine": report["machine"],
        "versions": report["versions"],
        **_memory(options),
    }


def evaluation(options: Options) -> dict[str, Any]:
    """Tier 1's evaluation, of the untrained model; all items unless fewer are asked for."""
    from dataclasses import replace

    from wdlib import lora
    from wdlib.lora import grid

    protocol = grid.chosen(only="tier1")[0].protocol
    if options.items:
        protocol = replace(protocol, limit=dict.fromkeys(protocol.tasks, options.items))
    loaded = lora.pretrained.load(options.model)
    begun = time.perf_counter()
    found = lora.evaluate(
        loaded.model.to(options.device),
        loaded.needed_tokenizer(),
        protocol=protocol,
        data_folder=options.data_folder,
    )
    right = {name: float(lora.scores.correct(s).mean()) for name, s in found.scores.items()}
    seconds = {"evaluate": time.perf_counter() - begun, "tasks": found.made["tasks"]}
    return seconds | {"accuracy": right, **_memory(options)}


def workers(options: Options) -> dict[str, Any]:
    """Several processes do the cells of a grid without evaluation; done ones are not repeated."""
    import torch

    from wdlib import spectra
    from wdlib.lora import grid

    todo = _cells(options, options.cells)
    places = {name: options.out / "cells" / name for name in ("results", "work")}
    left = [c for c in todo if grid.state(c, **places) != grid.FINISHED]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    begun, ended = time.perf_counter(), []

    def progress(line: str) -> None:
        ended.append(time.perf_counter() - begun)
        print(f"{ended[-1]:7.1f} s  {line}", file=sys.stderr, flush=True)

    with spectra.workers.processes(options.workers) as executor:
        grid.run_grid(
            left, executor=executor, data_folder=options.data_folder, progress=progress, **places
        )
    return {
        "cells": len(left),
        "workers": options.workers,
        "seconds": time.perf_counter() - begun,
        "ended": ended,
    }


def _run(options: Options, *, seed: int, init: str = "default") -> Any:
    from wdlib.lora import Hyperparameters, Run

    reference = None if init == "default" else REFERENCE
    settings = Hyperparameters(steps=options.steps)
    return Run(options.model, init, reference, seed=seed, hyperparameters=settings)


def _cells(options: Options, number: int) -> list[Any]:
    """Seeds of peft's start and of the reshaped one in turn."""
    from wdlib.lora import benchmarks, grid

    starts = [("default", "literal")[i % 2] for i in range(number)]
    runs = [_run(options, seed=i // 2, init=init) for i, init in enumerate(starts)]
    return [grid.Cell("bench", run, benchmarks.Protocol(tasks=())) for run in runs]


def _memory(options: Options) -> dict[str, float]:
    import torch

    if options.device != "cuda":
        return {}
    return {"device memory, GB": torch.cuda.max_memory_reserved() / 1e9}


PARTS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "load": load,
    "micro-batches": micro_batches,
    "cell": cell,
    "evaluation": evaluation,
    "workers": workers,
}


# Running the parts, and the table -----------------------------------------------------------------


def measured(name: str, options: Options) -> dict[str, Any]:
    """What a part found, from the folder or from a fresh process, with the whole process's time."""
    path = options.out / f"{name}.json"
    if not path.is_file():
        environment = dict(os.environ)
        if options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
        begun = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        kept = json.loads(path.read_text()) | {"process": time.perf_counter() - begun}
        paths.write_text(path, json.dumps(kept, indent=1) + "\n")
    return json.loads(path.read_text())


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: what was measured, seconds, and the target on an H100 where there is one."""
    rows: list[tuple[str, float, float | None]] = []
    if part := found.get("load"):
        rows += [(f"model, {name} load", part[name], None) for name in ("first", "second")]
    if part := found.get("micro-batches"):
        named = {name: value for name, value in part.items() if isinstance(value, float)}
        rows += [(name, value, None) for name, value in named.items() if name != "process"]
    if part := found.get("cell"):
        rows.append(("one cell without evaluation, its process", part["process"], TARGETS["cell"]))
        names = ("preparation", "steps", "this_call", "run_cell")
        rows += [(f"- {name}", part[name], None) for name in names]
    if part := found.get("evaluation"):
        rows.append(("tier 1's evaluation", part["evaluate"], TARGETS["evaluation"]))
        rows += [(f"- {name}", task["seconds"], None) for name, task in part["tasks"].items()]
    if (part := found.get("workers")) and part["cells"]:
        name = f"{part['cells']} cells by {part['workers']} workers, each"
        rows.append((name, part["seconds"] / part["cells"], TARGETS["workers"]))
    head = "| what | seconds | target on an H100 |\n| --- | --- | --- |\n"
    return head + "\n".join(f"| {n} | {s:.4g} | {t or ''} |" for n, s, t in rows)


def main() -> None:
    """Run what is left of the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--model", default="smollm2-135m-instruct", help="as wdlib takes one")
    add("--data-folder", type=Path, help="default: the hub")
    add("--out", type=Path, required=True)
    add("--steps", type=int, default=60)
    add("--items", type=int, help="of each benchmark; default: tier 1's")
    add("--cells", type=int, default=24)
    add("--workers", type=int, default=8)
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        content = json.dumps(PARTS[options.part](options), indent=1)
        paths.write_text(options.out / f"{options.part}.json", content + "\n")
        return
    found = {}
    for name in options.only:
        found[name] = measured(name, options)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
