"""Speed, error and memory of `wdlib.spectra` beside its rivals, in one run: `make bench`.

Writes bench.md and bench.csv beside this file. Every part runs in a process of its own, with one
thread of linear algebra, and once more as everybody comes, with the threads and processes that each
takes by default. What is compared alternates matrix by matrix, or process by process, so that a
machine whose speed drifts slows down all of it.
"""

import argparse
import csv
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from wdlib import TYPES, paths

SMALL, MEDIUM = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"
LARGE = ("3584 x 18944", "4096 x 4096")
TITLES = {SMALL: "SmolLM2-135M", MEDIUM: "Qwen2.5-Coder-0.5B"}
STEPS = {SMALL: 1, MEDIUM: 6}
"""Of so many layers of a model one is used where single matrices are timed."""

ROUNDS = {SMALL: 2, MEDIUM: 1}
"""How often whole processes run."""

YARDSTICK, CERTIFIED = "svdvals float32, tall", "wdlib, certified"
PRODUCT, PROPACK = "the one product", "`scipy` `svds`, PROPACK"
SPEED_TARGETS = {
    **{(model, rank): 3 for model in (SMALL, MEDIUM) for rank in (16, 64, 256)},
    **{(size, rank): 5 for size in LARGE for rank in (16, 64)},
}
"""How many times as fast as the yardstick ours is to be."""

LOOP, WATCHER, COMMAND = "from_pretrained + svdvals loop", "WeightWatcher", "wdlib spectra"
COMMAND_DEFAULT, LOOP_DEFAULT = f"{COMMAND}, all cores", f"{LOOP}, all cores"
PROCESS_TARGETS = {SMALL: {LOOP: 5, WATCHER: 7}, MEDIUM: {LOOP: 10, WATCHER: 10}}
TABLES = ("matrices", "shortcuts", "defaults", "processes")
MEMORY_TARGET = 400
ERROR_TARGET = 1e-5


@dataclass(frozen=True)
class Timing:
    """One method on one matrix: CPU seconds, largest relative error of the `rank` values, bound."""

    case: str
    smaller: int
    rank: int
    method: str
    seconds: float
    error: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Process:
    """One process from start to end: wall and CPU seconds, peak of its resident set in MB."""

    wall: float
    cpu: float
    memory: float


# Parts that run in processes of their own; each returns what JSON can hold ------------------------


def prepare(model: str, folder: str) -> None:
    """Write a model of the catalogue as transformers does: bf16 safetensors with config.json.

    The projections are the model's; embeddings, norms and biases, which nobody decomposes here,
    have their true size and arbitrary values.
    """
    import torch
    import transformers

    from wdlib import checkpoints
    from wdlib.lora import pretrained

    config = pretrained.configuration(model)
    config.tie_word_embeddings = True  # in both models, though a GGUF file may hold the same twice
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linear = {module: layer for module, layer in network.named_modules() if "_proj" in module}
    for p in checkpoints.projections(model):
        part = "mlp" if p.type in ("gate", "up", "down") else "self_attn"
        linear[f"model.layers.{p.layer}.{part}.{p.type}_proj"].weight.data.copy_(
            torch.from_numpy(p.matrix)
        )
    network.save_pretrained(folder)


def kernel(case: str, step: str) -> list[dict[str, Any]]:
    """Time and error matrix by matrix: the yardstick, the product alone, ours, and PROPACK."""
    import numpy as np

    from wdlib import spectra

    timings = []
    _clock(_svdvals, np.ones((2, 2), np.float32))  # loads and starts torch, untimed
    for W in _matrices(case, int(step)):
        wide = W if W.shape[0] <= W.shape[1] else W.T
        n = min(W.shape)
        exact = _large_exact(wide) if case in LARGE else _exact(wide)
        add = functools.partial(Timing, case, n)
        values, seconds = _clock(_svdvals, W)
        ranks = [r for c, r in SPEED_TARGETS if c == case and not r > n]
        timings += [add(r, YARDSTICK, seconds, _error(values, exact, r)) for r in ranks]
        _, seconds = _clock(spectra.arrays.syrk, wide)
        timings += [add(r, PRODUCT, seconds) for r in ranks]
        for r in ranks:
            found, seconds = _clock(spectra.top_singular_values, W, r)
            bound = float(np.max(found.error / found.values))
            timings.append(add(r, CERTIFIED, seconds, _error(found.values, exact, r), bound))
            if r <= 64:
                values, seconds = _clock(_svds, W, r, "propack")
                timings.append(add(r, PROPACK, seconds, _error(values, exact, r)))
    return [asdict(t) for t in timings]


def rivals(case: str, step: str) -> list[dict[str, Any]]:
    """Time and error of everybody's shortcut at r = 16, on the layers `step`, 2 `step`, ..."""
    import torch
    from sklearn.utils.extmath import randomized_svd

    from wdlib import spectra

    methods = {
        YARDSTICK: _svdvals,
        CERTIFIED: lambda W: spectra.top_singular_values(W, 16).values,
        "`torch.svd_lowrank`": lambda W: torch.svd_lowrank(torch.from_numpy(W), 16)[1].numpy(),
        "`sklearn` `randomized_svd`": lambda W: randomized_svd(W, 16, random_state=0)[1],
        "`scipy` `svds`, ARPACK": lambda W: _svds(W, 16, "arpack"),
        "`scipy` `svds`, LOBPCG": lambda W: _svds(W, 16, "lobpcg"),
        PROPACK: lambda W: _svds(W, 16, "propack"),
    }
    timings = []
    torch.manual_seed(0)
    for W in _matrices(case, int(step), start=int(step)):
        exact = _exact(W)
        for method, solve in methods.items():
            values, seconds = _clock(solve, W)
            error = _error(values, exact, 16)
            timings.append(Timing(case, min(W.shape), 16, method, seconds, error))
    return [asdict(t) for t in timings]


def defaults(case: str, step: str) -> list[dict[str, Any]]:
    """Wall time at r = 16 of calls that take the threads they want."""
    import numpy as np

    from wdlib import spectra

    methods = {
        YARDSTICK: _svdvals,
        CERTIFIED: functools.partial(spectra.top_singular_values, r=16),
        PROPACK: lambda W: _svds(W, 16, "propack"),
    }
    timings = []
    for solve in methods.values():
        solve(np.random.default_rng(0).standard_normal((600, 600), dtype=np.float32))  # starts it
    for W in _matrices(case, int(step), start=int(step)):
        for method, solve in methods.items():
            start = time.perf_counter()
            solve(W)
            timings.append(Timing(case, min(W.shape), 16, method, time.perf_counter() - start))
    return [asdict(t) for t in timings]


def loop(folder: str, out: str) -> None:
    """What one would write without wdlib: load the model, decompose each matrix, keep 16 values."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {t: [] for t in TYPES}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1].removesuffix("_proj")
        if isinstance(module, torch.nn.Linear) and kind in TYPES:
            W = module.weight.detach().float()
            tall = W if W.shape[0] >= W.shape[1] else W.T
            found[kind].append(torch.linalg.svdvals(tall)[:16])
    save_file({kind: torch.stack(rows) for kind, rows in found.items()}, out)


def watch(folder: str, out: str) -> None:
    """WeightWatcher's `analyze` with its defaults, of the same matrices."""
    from transformers import AutoModelForCausalLM
    from weightwatcher import WeightWatcher

    model = AutoModelForCausalLM.from_pretrained(folder)
    details = WeightWatcher(model=model).analyze(layers=[f"{kind}_proj" for kind in TYPES])
    details.to_csv(out)


def facts() -> dict[str, str]:
    """What the numbers depend on: processor, BLAS, versions."""
    import scipy.linalg
    import torch
    from threadpoolctl import threadpool_info

    torch.ones(2) @ torch.ones(2)
    scipy.linalg.norm([1.0])
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    blas = {
        f"{lib['internal_api']} {lib['version']} ({lib.get('architecture', 'unknown')})"
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    }
    packages = ("numpy", "scipy", "torch", "transformers", "scikit-learn", "safetensors")
    return {
        "Processor": f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores",
        "BLAS of numpy and scipy": ", ".join(sorted(blas)),
        "LAPACK of torch": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "Versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def _svdvals(W):
    import torch

    torch.set_num_threads(1)
    tall = torch.from_numpy(W) if W.shape[0] >= W.shape[1] else torch.from_numpy(W).T
    return torch.linalg.svdvals(tall).numpy()


def _svds(W, rank: int, solver: str):
    from scipy.sparse.linalg import svds

    return svds(W, rank, solver=solver, return_singular_vectors=False, rng=0)


def _matrices(case: str, step: int, start: int = 0) -> Iterator:
    """Matrices of every `step`-th layer of a model, or one made up of a given size."""
    from wdlib import checkpoints

    if case in LARGE:
        yield _made_up(*(int(n) for n in case.split(" x ")))
        return
    number = 1 + max(e.layer for e in checkpoints.inventory(case))
    for p in checkpoints.projections(case, layers=range(start, number, step)):
        yield p.matrix


def _made_up(n: int, m: int):
    """A bf16 matrix whose spectrum is as flat as real ones: 128 slowly falling values, in noise."""
    import numpy as np

    rng = np.random.default_rng(0)
    W = rng.standard_normal((n, m), dtype=np.float32)
    strength = 2.5 * (1 / math.sqrt(m) + 1 / math.sqrt(n)) * np.arange(1, 129) ** -0.3
    left = rng.standard_normal((n, 128), dtype=np.float32) * strength.astype(np.float32)
    W += left @ rng.standard_normal((128, m), dtype=np.float32)
    return (W.view(np.uint32) & 0xFFFF0000).view(np.float32)


def _exact(W):
    """All singular values by LAPACK in float64."""
    from scipy import linalg

    return linalg.svd((W if W.shape[0] >= W.shape[1] else W.T).astype(float), compute_uv=False)


def _large_exact(wide):
    """The 64 largest singular values by LAPACK's eigenvalues of the float64 product."""
    import numpy as np
    from scipy import linalg

    n = len(wide)
    G = wide.astype(float)
    G = G @ G.T
    squares = linalg.eigh(G, eigvals_only=True, subset_by_index=[n - 64, n - 1], overwrite_a=True)
    return np.sqrt(squares[::-1])


def _clock(function: Callable, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """Result and CPU seconds: other work on the machine does not lengthen these as it does wall."""
    start = time.process_time()
    result = function(*arguments, **options)
    return result, time.process_time() - start


def _error(values, exact, rank: int) -> float:
    """Largest relative error of the `rank` largest values."""
    import numpy as np

    values = np.sort(np.asarray(values, float))[::-1][:rank]
    return float(np.max(np.abs(values - exact[:rank]) / exact[:rank]))


# Running the parts, and the table -----------------------------------------------------------------


def run(command: list[str], *, one_thread: bool = True) -> Process:
    """Run a command with one thread of linear algebra, or its own number; see what it took."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    disturbing = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", *threads)
    environment = {k: v for k, v in os.environ.items() if k not in disturbing}
    environment |= dict.fromkeys(threads if one_thread else (), "1") | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(paths.ROOT)  # WeightWatcher's environment has no wdlib
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{said.read().decode(errors='replace')}")
    return Process(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def part(name: str, *arguments: str, one_thread: bool = True) -> Any:
    """Run one part in a fresh process and read back what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, "--part", name, *arguments, "--json", str(out)]
        run(command, one_thread=one_thread)
        return json.loads(out.read_text())


def processes(model: str, rounds: int, watcher: Path) -> tuple[dict[str, list[Process]], float]:
    """Every way from a folder of safetensors to its result, and ours against the loop's values.

    The others run once a round, ours before each of them and at the end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        names = ("model", "ours.safetensors", "theirs.safetensors")
        folder, ours, theirs = (str(Path(temporary) / name) for name in names)
        part("prepare", model, folder)
        command = [sys.executable, "-m", "wdlib", "spectra", folder, "--rank", "16"]
        commands = {
            LOOP: [sys.executable, __file__, "--part", "loop", folder, theirs],
            WATCHER: [str(watcher), __file__, "--part", "watch", folder, theirs + ".csv"],
        }
        found = {COMMAND: [], LOOP: [], WATCHER: [], COMMAND_DEFAULT: [], LOOP_DEFAULT: []}
        one = [*command, "--workers", "1", "--out", ours]
        for way in [*commands] * rounds:
            found[COMMAND].append(run(one))
            found[way].append(run(commands[way]))
        found[COMMAND].append(run(one))
        for _ in range(rounds):
            own = {COMMAND_DEFAULT: [*command, "--out", ours], LOOP_DEFAULT: commands[LOOP]}
            for way, started in own.items():
                found[way].append(run(started, one_thread=False))
        return found, part("difference", ours, theirs)


def difference(ours: str, theirs: str) -> float:
    """Largest relative difference between the values of two files of spectra."""
    import numpy as np
    from safetensors.numpy import load_file

    a, b = load_file(ours), load_file(theirs)
    return max(float(np.max(np.abs(a[t] - b[t]) / a[t])) for t in b)


def kernel_rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """Totals over the matrices of a case, rank by rank, as ratios to the yardstick's."""
    groups: dict[tuple, list[Timing]] = {}
    for t in timings:
        groups.setdefault((t.case, t.rank, t.method), []).append(t)
    total = {key: sum(t.seconds for t in group) for key, group in groups.items()}
    rows = []
    for (case, rank, method), group in sorted(groups.items(), key=lambda item: item[0][1]):
        product = total.get((case, rank, PRODUCT))
        rows.append(
            {
                "case": TITLES.get(case, case),
                "rank": rank,
                "matrices": len(group),
                "method": method,
                "times as fast": total[case, rank, YARDSTICK] / total[case, rank, method],
                "target": SPEED_TARGETS[case, rank] if method == CERTIFIED else None,
                "products": total[case, rank, method] / product if product else None,
                "largest error": max((t.error for t in group if t.error is not None), default=None),
                "largest bound": max((t.bound for t in group if t.bound is not None), default=None),
            }
        )
    return rows


def process_rows(model: str, found: dict[str, list[Process]]) -> list[dict[str, Any]]:
    """Medians of the runs, as ratios of the others' to ours."""

    def median(way: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in found[way])

    return [
        {
            "case": TITLES[model],
            "method": way,
            "runs": len(found[way]),
            "wall ratio": median(way, "wall") / median(COMMAND, "wall"),
            "CPU ratio": median(way, "cpu") / median(COMMAND, "cpu"),
            "target": PROCESS_TARGETS[model].get(way),
            "peak MB": max(run.memory for run in found[way]),
        }
        for way in found
    ]


def verdict(row: dict[str, Any], field: str) -> str:
    """The target of a row and whether it was met."""
    if row["target"] is None:
        return ""
    return f"{row['target']:g} {'met' if row[field] >= row['target'] else '**not met**'}"


def table(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict], str]]) -> str:
    """A markdown table: a title and a text for each column."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(text(row) for text in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def number(field: str, form: str) -> Callable[[dict], str]:
    """The text of a field, empty where it is not known."""
    return lambda row: "" if row.get(field) is None else format(row[field], form)


def report(
    about: dict[str, str],
    kernels: list[dict[str, Any]],
    rival: list[dict[str, Any]],
    own: list[dict[str, Any]],
    ends: list[dict[str, Any]],
    differences: dict[str, float],
    steps: dict[str, int],
) -> str:
    """The text of bench.md."""
    speed = {
        "matrices of": number("case", ""),
        "r": number("rank", ""),
        "method": number("method", ""),
        "times as fast": number("times as fast", ".2f"),
        "target": lambda row: verdict(row, "times as fast"),
        "time in products": number("products", ".1f"),
        "largest error": number("largest error", ".1e"),
        "largest bound": number("largest bound", ".1e"),
    }
    shortcuts = {
        key: speed[key] for key in ("matrices of", "method", "times as fast", "largest error")
    }
    end = {
        "model": number("case", ""),
        "way": number("method", ""),
        "runs": number("runs", ""),
        "wall time / ours": number("wall ratio", ".1f"),
        "target": lambda row: verdict(row, "wall ratio"),
        "CPU time / ours": number("CPU ratio", ".1f"),
        "peak memory, MB": number("peak MB", ".0f"),
    }
    ours = [row for row in kernels if row["method"] == CERTIFIED]
    error, bound = (max(row[field] for row in ours) for field in ("largest error", "largest bound"))
    broken = [row for row in ours if row["largest error"] > row["largest bound"]]
    memory = max(row["peak MB"] for row in ends if row["method"] == COMMAND)
    apart = ", ".join(f"{TITLES[model]} {value:.1e}" for model, value in differences.items())
    return TEXT.format(
        facts="".join(f"- {name}: {fact}\n" for name, fact in about.items()),
        kernels=table(kernels, speed),
        rivals=table(rival, shortcuts),
        defaults=table(
            own, {key: speed[key] for key in ("matrices of", "method", "times as fast")}
        ),
        ends=table(ends, end),
        steps=", ".join(f"one in {step} of {TITLES[model]}" for model, step in steps.items()),
        error=f"{error:.1e} ({'met' if error <= ERROR_TARGET else '**not met**'})",
        bound=f"{bound:.1e} ({'met' if bound <= ERROR_TARGET else '**not met**'})",
        broken=len(broken),
        memory=f"{memory:.0f} MB ({'met' if memory < MEMORY_TARGET else '**not met**'})",
        apart=apart,
    )


TEXT = """\
# Speed, error and memory beside the alternatives

Written by `make bench`, all in one run; bench.csv holds the same numbers. Other work shares the
machine, so that only ratios are given, never times.

{facts}
## Singular values of one matrix

One process, one thread of BLAS, CPU time. The yardstick is `torch.linalg.svdvals` in float32 of the
tall orientation, the faster one; it alternates with the others matrix by matrix. Layers:
{steps}; with r = 256 only matrices of 256 rows and
columns or more. The large matrices are made up, with spectra as flat as real ones, and are timed
once. Errors are relative, the largest of all values, against LAPACK in float64 (the large ones:
eigenvalues of the float64 product). Ours cannot be faster than the product W W^T in float32, which
it begins with: "time in products" counts in it. PROPACK does not form it, and proves nothing.

{kernels}
Errors of ours 1e-5 or less: {error}. Bounds 1e-5 or less: {bound}.
Rows in which an error exceeds the largest bound: {broken}.

## Shortcuts at r = 16

With their default settings, on the matrices of one or two layers of each model. None of the others
says how wrong it is. ARPACK, LOBPCG and PROPACK do not form the product.

{rivals}
## As everybody comes

The same calls at r = 16 with the threads that each takes by default, wall time, on the matrices of
one or two layers of each model and on the large ones. Ours takes one thread: for all cores there is
the command, below.

{defaults}
## From a folder of bf16 safetensors to a stored result

A new process for each run, one thread of BLAS, files in the page cache, r = 16, medians.
`wdlib spectra` computes certified values and hashes the files, in a second thread: the CPU time
counts both. "All cores" is with everybody's default threads, and ours with its default processes,
whose memory and CPU time this table does not see. The loop takes float32 svdvals (tall) of the
seven projections and keeps 16 values. WeightWatcher's `analyze` runs with its defaults on the same
matrices; it does more than the others, since it also fits a power law to every spectrum. Peak
memory is of the resident set.

{ends}
Peak memory of `wdlib spectra` under 400 MB: {memory}. Largest relative difference between its
values and the loop's float32 ones: {apart}.
"""


def bench(out: Path, quick: bool, watcher: Path) -> None:
    """Run all parts and write bench.md and bench.csv into a folder."""
    cases = [SMALL] if quick else [SMALL, MEDIUM]
    steps = {SMALL: 15} if quick else STEPS
    singles = [*cases, *(() if quick else LARGE)]
    pins = (paths.ROOT / "requirements-bench.lock").read_text().splitlines()
    about = part("facts") | {
        "Beside them": ", ".join(pin.replace("==", " ") for pin in pins if "==" in pin),
        "Threads of linear algebra": "1, but where the default is said",
        "Date": datetime.now(UTC).date().isoformat(),
    }
    lists = (part("kernel", case, str(steps.get(case, 1))) for case in singles)
    kernels = [row for found in lists for row in kernel_rows([Timing(**t) for t in found])]
    lists = (part("rivals", case, "13") for case in cases)
    rival = [row for found in lists for row in kernel_rows([Timing(**t) for t in found])]
    lists = (part("defaults", case, "13", one_thread=False) for case in singles)
    own = [row for found in lists for row in kernel_rows([Timing(**t) for t in found])]
    ends, differences = [], {}
    for model in cases:
        found, differences[model] = processes(model, ROUNDS[model], watcher)
        ends += process_rows(model, found)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text(report(about, kernels, rival, own, ends, differences, steps))
    with (out / "bench.csv").open("w", newline="") as file:
        rows = [
            {"table": name, **row}
            for name, rows in zip(TABLES, (kernels, rival, own, ends), strict=True)
            for row in rows
        ]
        writer = csv.DictWriter(file, list(dict.fromkeys(chain.from_iterable(rows))))
        writer.writeheader()
        writer.writerows(rows)


PARTS = {f.__name__: f for f in (prepare, kernel, rivals, defaults, loop, watch, facts, difference)}


def main() -> None:
    """Run the benchmark, or, as the benchmark itself calls it, one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few matrices, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: docs)")
    parser.add_argument("--watcher", type=Path, help="a Python that has WeightWatcher")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, *arguments = options.part
        result = PARTS[name](*arguments)
        if options.json:
            options.json.write_text(json.dumps(result))
        return
    out = options.out or (paths.CACHE / "bench" if options.quick else Path(__file__).parent)
    bench(out, options.quick, options.watcher or paths.ROOT / ".venv-bench/bin/python")


if __name__ == "__main__":
    main()
