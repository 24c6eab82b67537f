"""Attacks on what LoRA runs read: grids, runs, results, checkpoints, data sets and benchmarks."""

import gzip
import io
import json
import shutil
import struct
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tiny
import tiny_lora
import yaml
from fuzz.engine import Kind
from fuzz.mutations import as_json, flipped, json_lines, odd_array
from fuzz.schemas import check, conform

from wdlib import paths
from wdlib.lora import benchmarks, data, devices, grid, results, scores, training
from wdlib.lora.benchmarks import Protocol
from wdlib.lora.runs import UNTRAINED, Hyperparameters, Run
from wdlib.lora.scores import Evaluation, Scores

RUN = Run(seed=7)
HYPERPARAMETERS = {
    f.name: [str] if f.name == "targets" else f.type for f in fields(Hyperparameters)
}
SETTINGS = {
    "model": str,
    "init": str,
    "reference": (None, str),
    "data": str,
    "seed": int,
    "b_scale": float,
}


def whole_run(given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run from those that a file gives, each of its type."""
    if given.keys() - {*SETTINGS, "hyperparameters"}:
        raise ValueError("no setting of a run")
    usual = asdict(Run())
    inner = usual.pop("hyperparameters") | check(given.get("hyperparameters", {}), {}, more=True)
    inner["targets"] = list(inner["targets"])
    whole = check(usual | {k: v for k, v in given.items() if k != "hyperparameters"}, SETTINGS)
    inner = check(inner, HYPERPARAMETERS)
    # What cannot be is no run: see the docstrings of `Run` and `Hyperparameters`.
    numbers = [whole["b_scale"], *(v for v in inner.values() if type(v) is float)]
    if not np.isfinite(numbers).all():
        raise ValueError("no number")
    return {**whole, "hyperparameters": inner}


def told(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run.to_json())
    content["b_scale"] = float(content["b_scale"])
    inner = content["hyperparameters"]
    content["hyperparameters"] = {
        name: float(value) if HYPERPARAMETERS[name] is float else value
        for name, value in inner.items()
    }
    return content


# Grids and runs ---------------------------------------------------------------------------------

GRID = {
    "defaults": {"model": "smollm2-135m-instruct", "data": "alpaca"},
    "tiers": {
        "one": {
            "seeds": [1, 2], "fingerprint": True,
            "evaluation": {"tasks": ["arc_challenge"], "limit": {"arc_challenge": 3}, "orders": 4},
            "runs": [{"init": "untrained"}, {"init": "default", "learning_rate": 6.0e-4}],
        },
        "two": {
            "seeds": [3], "evaluation": {"tasks": []},
            "runs": [{"init": "literal", "reference": "gemma-3-270m"}],
        },
    },
}  # fmt: skip


def make_grid(folder: Path) -> Path:
    """As JSON, which is YAML too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.yaml").write_text(json.dumps(GRID))
    return folder / "grid.yaml"


def mutate_grid(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.6:
        return as_json(rng, content)
    text = yaml.safe_dump(json.loads(content), sort_keys=False)
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            return flipped(rng, text.encode())
        case 1:
            lines[at] = lines[at].replace("  ", " ", 1)
        case 2:
            odd = (
                "2e-4",
                "!!python/object/apply:os.system [ls]",
                "2026-01-01",
                "*x",
                "0x10",
                "1_0",
                "~",
                ".nan",
                "yes",
                "&a [*a]",
            )
            lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(odd)}"
        case _:
            bomb = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
            bomb += [
                f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]"
                for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
            ]
            lines = [*bomb, *lines] if rng.random() < 0.5 else [*lines, *bomb]
    return "\n".join(lines).encode()


def read_grid(path: Path) -> Any:
    return [
        (cell.tier, told(cell.run), json.loads(json.dumps(asdict(cell.protocol))), cell.fingerprint)
        for cell in grid.cells(path)
    ]


def library_grid(path: Path) -> Any:
    """Expanded by hand, as the docstring of `grid.cells` says."""
    content = yaml.safe_load(path.read_bytes().decode())
    check(content, {"tiers": {str: dict}}, more=True)
    if content.keys() - {"tiers", "defaults"}:
        raise ValueError("another name")
    tier = {"seeds": [int], "evaluation": dict, "runs": [dict]}
    usual = json.loads(json.dumps(asdict(Protocol())))
    measured = {"tasks": [str], "limit": {str: int}, "orders": int, "seed": int, "dtype": str}
    found = []
    for name, asked in content["tiers"].items():
        check({"fingerprint": False, **asked}, tier | {"fingerprint": bool})
        protocol = check({**usual, **asked["evaluation"]}, measured)
        seen: list[Any] = []
        for seed in asked["seeds"]:
            for given in asked["runs"]:
                merged = {**check(content.get("defaults", {}), {}, more=True), **given}
                outer = {k: v for k, v in merged.items() if k not in HYPERPARAMETERS}
                outer["hyperparameters"] = {k: v for k, v in merged.items() if k in HYPERPARAMETERS}
                if outer.get("init") != UNTRAINED:
                    outer["seed"] = seed
                if (run := whole_run(outer)) not in seen:
                    seen.append(run)
                    found.append((name, run, protocol, asked.get("fingerprint", False)))
    return found


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    training._claim(RUN, folder)
    return folder / "run.json"


def library_run(path: Path) -> None:
    if whole_run(conform(path, {}, more=True)) != told(RUN):
        raise ValueError("another run")


# Results ----------------------------------------------------------------------------------------

HELD_OUT = {"loss": float, "sums": [float], "tokens": [int]}


def make_result(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).uniform(-3, -1, (5, 1, 4))
    values[0, 0, 3] = np.nan
    arc = tiny.scores(values, np.array([0, 1, 2, 3, 0], np.int8))
    arc = Scores(
        arc.loglikelihood, arc.orders, arc.gold, arc.characters.astype(np.int32), arc.items
    )
    protocol = Protocol(("arc_challenge",), limit={"arc_challenge": 5}, dtype="bfloat16")
    made = {"seconds": 1.0, "tasks": {}, "adapter": "00"}
    scores.save(Evaluation(protocol, {"arc_challenge": arc}, made), folder / f"{RUN.key}.npz")
    losses = {"loss": 1.5, "sums": [3.0, 6.0], "tokens": [2, 4]}
    report = {
        "key": RUN.key, "configuration": asdict(RUN), "dtype": "float32",
        "held_out": {"before": losses, "after": losses}, "step0": None,
        "curve": [{"step": 1, "loss": 2.0}],
        "hashes": {"model": "22", "data": "11", "characterisation": None, "adapter": "00"},
        "machine": {"device": "cpu", "threads": 1},
    }  # fmt: skip
    (folder / f"{RUN.key}.json").write_text(json.dumps(report))
    return folder / f"{RUN.key}.json"


def make_scores(folder: Path) -> Path:
    return make_result(folder).with_suffix(".npz")


def mutate_scores(rng: Random, content: bytes) -> bytes:
    """Other arrays, other claims of size, other bytes."""
    if rng.random() < 0.25:
        return flipped(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([*members, "about.npy", "about.npy"])
    array = np.load(io.BytesIO(members[name]))
    match rng.randrange(7):
        case 0:
            del members[name]
        case 1 | 2 | 3 if name != "about.npy":
            members[name] = _npy(odd_array(rng, array))
        case 4:
            size = rng.choice((10**12, 10**9, -1, 2**63))
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size},), }}\n".encode()
            members[name] = (
                b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
            )
        case 5:
            members[name] = flipped(rng, members[name])
        case _:
            about = as_json(rng, str(np.load(io.BytesIO(members["about.npy"]))).encode())
            members["about.npy"] = _npy(np.array(about.decode("utf-8", "replace")))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, raw in members.items():
            archive.writestr(member, raw)
    return out.getvalue()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def read_result(path: Path) -> Any:
    """A finished cell, and what is measured of it; None where it is not finished."""
    found = results.load_result(RUN, results=path.parent)
    if found is None:
        return None
    report = found.report
    told_ = {name: report[name] for name in ("dtype", "hashes", "held_out")}
    measured = [results.measured({RUN: found}, RUN.variant, m) for m in results.MEASURES]
    return json.loads(json.dumps(told_)), _evaluation(found.evaluation), len(measured)


def _evaluation(found: Evaluation) -> Any:
    return json.loads(json.dumps(asdict(found.protocol))), found.scores, found.made


def judge(part: dict[str, Any]) -> None:
    """Raise ValueError for losses that cannot be."""
    sums, tokens = part["sums"], part["tokens"]
    if len(sums) != len(tokens) or min(tokens, default=-1) < 0 or not 0 < sum(tokens) < 2**53:
        raise ValueError("tokens")
    if not np.isfinite([part["loss"], *sums]).all():
        raise ValueError("losses")


def library_result(path: Path) -> Any:
    """By `json` and `numpy`, judged by the docstrings of `training.train` and `Scores`."""
    path = path.with_suffix(".json")
    hashes = {"model": str, "data": str, "characterisation": (None, str), "adapter": (None, str)}
    schema = {"dtype": str, "hashes": hashes, "held_out": {"before": HELD_OUT, "after": HELD_OUT}}
    report = conform(path, schema, more=True)
    report = {name: report[name] for name in schema}
    for part in report["held_out"].values():
        judge(part)
    protocol, measured, made = library_scores(path.with_suffix(".npz"))
    if made.get("adapter", report["hashes"]["adapter"]) != report["hashes"]["adapter"]:
        return None
    raw = json.loads(path.read_bytes())
    return {name: raw[name] for name in schema}, (protocol, measured, made), len(results.MEASURES)


def library_scores(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        found = {name: arrays[name] for name in arrays.files if name != "about"}
    schema = {"tasks": [str], "limit": {str: int}, "orders": int, "seed": int, "dtype": str}
    check(about, {"protocol": dict, "made": dict})
    usual = json.loads(json.dumps(asdict(Protocol())))
    protocol = check({**usual, "tasks": about["protocol"]["tasks"], **about["protocol"]}, schema)
    measured = {}
    for task in protocol["tasks"]:
        if task not in benchmarks.TASKS:
            raise ValueError("task")
        s = measured[task] = Scores(**{f.name: found[f"{task}/{f.name}"] for f in fields(Scores)})
        n, o, k = s.loglikelihood.shape
        shapes = [(o, k), (n,), (n, k), (n,)]
        kinds = ["float32", "int8", "int8", "int32", "uint32"]
        arrays_ = [s.loglikelihood, s.orders, s.gold, s.characters, s.items]
        if [a.dtype.name for a in arrays_] != kinds or [a.shape for a in arrays_[1:]] != shapes:
            raise ValueError("shapes")
        bad = (s.orders < 0) | (s.orders >= k)
        if (
            bad.any()
            or (s.gold < 0).any()
            or (s.gold >= k).any()
            or (s.characters < 0).any()
            or not n * o * k
        ):
            raise ValueError("options")
        if np.isposinf(s.loglikelihood).any():
            raise ValueError("likelihoods")
    return protocol, measured, about["made"]


# Checkpoints of a run ---------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> Path:
    """Two, of which the later one's mark is attacked; the earlier one is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in (10, 20):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"state" * step)
        (checkpoint / "trainer_state.json").write_text("{}")
        paths.mark_whole(checkpoint)
    return folder / "checkpoint-20" / "whole"


def read_checkpoint(path: Path) -> Any:
    """From where a run goes on: with a damaged mark, from the checkpoint before."""
    mark = path.read_bytes()
    last = training._last_whole(path.parent.parent)
    make_checkpoint(path.parent.parent)
    name = Path(last or "").name
    return "checkpoint-20" if name == "checkpoint-10" and not _says(path, mark) else name


def _says(path: Path, mark: bytes) -> bool:
    """Whether a mark says of all files of the checkpoint, and of no others, what they hold."""
    there = {p.name: tiny.sha256(p.read_bytes()) for p in path.parent.iterdir() if p != path}
    try:
        return bool(json.loads(mark.decode()) == there)
    except (ValueError, RecursionError):
        return False


def make_start(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    losses = {"loss": 1.5, "sums": [3.0, 6.0], "tokens": [2, 4]}
    training._measured_once(folder / "start.json", lambda: {"held_out": losses, "step0": None})
    return folder / "start.json"


def library_start(path: Path) -> Any:
    found = json.loads(path.read_bytes().decode())
    machine = found.pop("machine", None) if isinstance(found, dict) else None
    found = check(found, {"held_out": HELD_OUT, "step0": (None, dict)})
    if machine is not None:
        device = check(machine, {"device": str}, more=True)["device"]
        if device.partition(":")[0] != devices.kind(devices.machine()):
            raise ValueError(f"begun on {device}")
    judge(found["held_out"])
    return found


# Data sets and benchmarks -----------------------------------------------------------------------


def make_examples(folder: Path) -> Path:
    rows = [
        {"instruction": f"do {n}", "input": "x" if n else None, "output": f"done {n}"}
        for n in range(6)
    ]
    return _lines(folder / data.DATA["alpaca"].file, rows)


def make_questions(folder: Path) -> Path:
    rows = [
        {
            "question": f"{n}?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for n in range(6)
    ]
    return _lines(folder / data.DATA["arc"].file, rows)


def _lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _rows(path: Path) -> list[Any]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = raw.decode("utf-8-sig").replace("\r", "\n").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def library_examples(path: Path) -> Any:
    found: dict[tuple[str, str], data.Example] = {}
    for row in _rows(path):
        if "choices" in check(row, {}, more=True):
            check(
                row,
                {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str},
                more=True,
            )
            texts, labels = row["choices"]["text"], row["choices"]["label"]
            if len(texts) != len(labels) or len(texts) > 26:
                raise ValueError("options")
            options = [f"{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[i]}. {text}" for i, text in enumerate(texts)]
            example = data.Example(
                data.CHOICE_INSTRUCTION,
                "\n".join([row["question"], *options]),
                options[labels.index(row["answerKey"])],
            )
        else:
            row = {"input": None, **row} if "input" in row else row
            check(row, {"instruction": str, "input": (None, str), "output": str}, more=True)
            example = data.Example(row["instruction"], row["input"] or "", row["output"])
        question = (example.instruction, example.input)
        found[question] = found.pop(question, example)
    return tuple(found.values())


ARC, HELLASWAG, GPQA = "arc_challenge", "hellaswag", "gpqa_diamond_zeroshot"


def make_arc(folder: Path) -> Path:
    items = tiny_lora.benchmark_items()
    return _lines(folder / benchmarks._SOURCES[ARC].file, items[ARC])


def make_hellaswag(folder: Path) -> Path:
    items = tiny_lora.benchmark_items()
    return _lines(folder / benchmarks._SOURCES[HELLASWAG].file, items[HELLASWAG])


def mutate_zipped(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return flipped(rng, content)
    return gzip.compress(json_lines(rng, gzip.decompress(content)), 1, mtime=0)


def make_gpqa(folder: Path) -> Path:
    import csv

    items, text = tiny_lora.benchmark_items()[GPQA], io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    writer = csv.DictWriter(text, list(items[0]))
    writer.writeheader()
    writer.writerows(items)
    path = folder / benchmarks._SOURCES[GPQA].file
    tiny_lora.write_locked(path, "gpqa.csv", text.getvalue().encode())
    return path


def read_benchmark(name: str) -> Any:
    return lambda path: benchmarks._rows(path, benchmarks._SOURCES[name])


def library_benchmark(name: str) -> Any:
    choices = {"text": [str], "label": [str]}
    schema = {
        ARC: {"question": str, "choices": choices, "answerKey": str},
        HELLASWAG: {
            "activity_label": str,
            "ctx_a": str,
            "ctx_b": str,
            "endings": [str],
            "label": str,
        },
    }[name]

    def read(path: Path) -> Any:
        rows = [check(row, schema, more=True) for row in _rows(path)]
        for row in rows:
            if name == ARC and not (
                len(row["choices"]["text"]) == len(row["choices"]["label"])
                and row["answerKey"] in row["choices"]["label"]
            ):
                raise ValueError("answer")
            if name == HELLASWAG and row["endings"][int(row["label"])] is None:
                raise ValueError("label")
            if name == HELLASWAG and int(row["label"]) < 0:
                raise ValueError("label")
        if not rows:
            raise ValueError("empty")
        return rows

    return read


def library_gpqa(path: Path) -> Any:
    """The truth: a lock keeps all but names in the archive from being changed unnoticed."""
    return benchmarks._locked_table(path)


KINDS = (
    Kind("grid of runs", make_grid, mutate_grid, read_grid, library_grid, 100),
    Kind("run", make_run, as_json, lambda p: training._claim(RUN, p.parent), library_run, 100),
    Kind("report of a run", make_result, as_json, read_result, library_result, 200),
    Kind("scores", make_scores, mutate_scores, read_result, library_result, 200),
    Kind("mark of a checkpoint", make_checkpoint, as_json, read_checkpoint, lambda p: None, 100),
    Kind(
        "start of a run",
        make_start,
        as_json,
        lambda p: training._measured_once(p, dict),
        library_start,
        100,
    ),
    Kind(
        "examples",
        make_examples,
        json_lines,
        lambda p: data.examples("alpaca", folder=p.parent),
        library_examples,
        200,
    ),
    Kind(
        "questions",
        make_questions,
        json_lines,
        lambda p: data.examples("arc", folder=p.parent),
        library_examples,
        200,
    ),
    Kind("ARC", make_arc, json_lines, read_benchmark(ARC), library_benchmark(ARC), 100),
    Kind(
        "HellaSwag",
        make_hellaswag,
        mutate_zipped,
        read_benchmark(HELLASWAG),
        library_benchmark(HELLASWAG),
        100,
    ),
    Kind("GPQA", make_gpqa, flipped, read_benchmark(GPQA), library_gpqa, 100),
)
