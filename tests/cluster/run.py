"""The workflow on a real SLURM gives what it gives on this machine, also after a job was killed.

`make test-cluster` runs it: two copies of the project on a small configuration, one worked on by
this machine, the other by a cluster. In the second a job is killed midway with SIGKILL and another
cancelled, and the workflow is run again. Then the files of both are compared byte for byte.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import slurm
from safetensors import safe_open
from safetensors.numpy import save

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10
"""A run of the workflow that takes longer has failed."""

CONFIGURATION = """\
models:
  - {name: large, source: ../models/large, ranks: [8], shards: 2, memory_mb: 1000}
  - {name: small, source: ../models/small, ranks: [8, 16]}
notebooks: ["03"]
grids: [grid.yaml]
data_folder: ../texts
"""

GRID = """\
defaults: {model: ../models/small, steps: 3, rank: 8, dtype: float32}
tiers:
  only:
    seeds: [1]
    evaluation: {tasks: [arc_challenge]}
    runs:
      - {init: default}
      - {init: literal, reference: small}
"""

ROW = '\n[{name}]\nhub_id = "example/{name}"\nfamily = "Llama"\nlicense = "none"\ngated = false\n'

STORED = "data/spectra/smollm2-135m-instruct.safetensors"
COPIED = ("wdlib", "workflow", STORED, "data/models.toml", "requirements.lock")
NOTEBOOK = "notebooks/03_dsv_power_law.ipynb"
KEPT = 3
"""Matrices that the killed job has done before it is killed."""

COMPARED = ("data/spectra", "data/results", "data/cache/executed", "figures")
TIMES = ("seconds", "finished", "created")
"""What a LoRA run's results say about when it ran; they are compared without it."""

say = logging.getLogger("cluster").info


def main() -> None:
    """Run both, kill, run again, compare. Raises RuntimeError or AssertionError at a difference."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    with tempfile.TemporaryDirectory(prefix="wdlib-cluster-") as name:
        folder = Path(name)
        write_models(folder / "models")
        write_texts(folder / "texts")
        here, there = (copy(folder / name) for name in ("here", "there"))
        say("one machine: %s", work(here, ["--cores", str(slurm.CPUS)]))
        check_out(here)
        with slurm.cluster(folder / "slurm"):
            # No accounting daemon here, so states come from squeue; and jobs of seconds.
            options = ["--profile", "workflow/profiles/slurm", "--slurm-status-command", "squeue"]
            options += ["--slurm-no-account", "--slurm-init-seconds-before-status-checks", "5"]
            options += ["--latency-wait", "5"]
            interrupt(there, options)
            before = times(there)
            say("SLURM, run again: %s", work(there, options))
            after = times(there)
            assert before.items() <= after.items(), "what was finished was made again"
            say("the %d results of the first run were left alone", len(before))
            say("SLURM, once more: %s", work(there, options))
            assert times(there) == after, "a run with nothing to do made something again"
            say("jobs of SLURM:\n%s", listed())
        compare(here, there)


def check_out(project: Path) -> None:
    """Old files without a history are not out of date, what is of spectra that changed is."""
    shutil.rmtree(project / ".snakemake")
    for path in project.glob("data/results/characterisation/*"):
        os.utime(path, (1e9, 1e9))
    assert not to_do(project), "old files were taken for out of date"
    path = project / "data" / "spectra" / "small.safetensors"
    before = path.read_bytes()
    with safe_open(path, "numpy") as file:
        about = file.metadata()
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    values["q"][0] *= np.linspace(1, 2, values["q"].shape[1])[::-1]
    path.write_bytes(save(values, metadata=about))
    found = to_do(project)
    ranks = (8, 16)
    wanted = {f"small-r{rank}.json" for rank in ranks}
    assert found == wanted | {f"03-small-r{rank}.ipynb" for rank in ranks}, found
    path.write_bytes(before)
    say("changed spectra are noticed, file times are not")


def interrupt(project: Path, options: list[str]) -> None:
    """Run the workflow, kill a shard with SIGKILL when it is midway, cancel the other, check."""
    ways = {"1/2": kill, "2/2": cancel}
    end = time.monotonic() + MINUTES * 60
    with (project / "first.log").open("w") as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        run = subprocess.Popen(command(options), cwd=project, env=environment(project), **streams)
        while run.poll() is None and time.monotonic() < end:
            for number, pid in midway(project):
                if number in ways:
                    ways.pop(number)(pid)
                    say("shard %s stopped after %d matrices", number, KEPT)
            time.sleep(0.05)
        run.kill()
    said = (project / "first.log").read_text()[-8000:]
    assert not ways, f"shards that were not caught midway: {', '.join(ways)}\n{said}"
    assert run.returncode == 1, f"the workflow took a killed job for finished\n{said}"
    left = sorted(path.name for path in project.glob("data/cache/shards/*/*"))
    assert left == ["1of2.safetensors.unfinished", "2of2.safetensors.unfinished"], left
    made = {path.name for path in project.glob("data/results/*/*")}
    assert {"small-r8.json", "small-r16.json"} <= made, made
    assert len(list(project.glob("data/results/experiments/*"))) == 4, made
    assert not list(project.glob("data/spectra/large*"))
    assert not list(project.glob("figures/*.svg"))


def midway(project: Path) -> Iterator[tuple[str, int]]:
    """Shards that have KEPT matrices and are running: which of how many, and their process."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if "--shard" not in words or (process / "cwd").resolve() != project.resolve():
                continue
            journal = Path(words[words.index("--out") + 1] + ".unfinished")
            if "python" in words[0] and journal.read_bytes().count(b"\n") >= KEPT:
                yield words[words.index("--shard") + 1], int(process.name)
        except OSError:  # it has ended, or not begun
            continue


def kill(pid: int) -> None:
    """End a process without a word to anyone."""
    threads = variable(pid, "OMP_NUM_THREADS")
    assert threads == "1", f"a job has {threads} threads of BLAS"
    os.kill(pid, signal.SIGKILL)


def cancel(pid: int) -> None:
    """Take the job of a process off the cluster."""
    subprocess.run(["scancel", variable(pid, "SLURM_JOB_ID")], check=True)


def write_models(folder: Path) -> None:
    """A Llama whose spectra take some seconds, and one that is small and has a tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    shapes = {"small": (64, 96, 6, 4, 2), "large": (768, 2048, 12, 12, 12)}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads",)
    torch.manual_seed(0)
    for name, shape in shapes.items():
        config = LlamaConfig(vocab_size=len(alphabet), **dict(zip(names, shape, strict=True)))
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


def write_texts(folder: Path) -> None:
    """A made-up data set to train on and a made-up benchmark."""
    folder.mkdir()
    rows = [
        {"instruction": f"Repeat {i}.", "input": "", "output": f"{i} " * (1 + i % 9)}
        for i in range(240)
    ]
    items = [
        {
            "id": str(i),
            "question": f"Which is {i}?",
            "choices": {"text": [str(i + k) for k in range(4)], "label": list("ABCD")},
            "answerKey": "A",
        }
        for i in range(9)
    ]
    from wdlib.lora import data

    write = {data.DATA["alpaca"].file: rows, "arc_challenge_test.jsonl": items}
    for name, content in write.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))


def copy(project: Path) -> Path:
    """What the workflow needs of this project, with the small configuration and one notebook."""
    for name in COPIED:
        take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        take(ROOT / name, project / name)
    (project / "notebooks").mkdir()
    shutil.copy(ROOT / NOTEBOOK, project / NOTEBOOK)
    with (project / "data" / "models.toml").open("a") as file:
        file.writelines(ROW.format(name=name) for name in ("large", "small"))
    (project / "config.yaml").write_text(CONFIGURATION)
    (project / "grid.yaml").write_text(GRID)
    return project


def work(project: Path, options: list[str] | None = None) -> str:
    """Run the workflow to its end; says how many jobs it had and how long it took."""
    start = time.monotonic()
    done = subprocess.run(
        command(options),
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        timeout=MINUTES * 60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the workflow failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    steps = done.stderr.count("Finished jobid")
    return f"{steps} jobs, {time.monotonic() - start:.0f} s"


def to_do(project: Path) -> set[str]:
    """The files that the workflow would make, but for figures."""
    listed = subprocess.run(
        command(["--dry-run", "results"]),
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.strip() for line in (listed.stdout + listed.stderr).splitlines())
    return {Path(line).name for line in lines if line.startswith("output: ")}


def command(options: list[str]) -> list[str]:
    # One thread: two that wait for one another are slow on processors with other work.
    common = ["--configfile", "config.yaml", "--set-threads", "experiment=1"]
    return ["snakemake", *common, *options]


def environment(project: Path) -> dict[str, str]:
    """Variables under which `wdlib` is the copy's, and writes there."""
    moved = {"WDLIB_CACHE", "WDLIB_FIGURES"}
    kept = {name: value for name, value in os.environ.items() if name not in moved}
    return {**kept, "PYTHONPATH": str(project)}


def variable(pid: int, name: str) -> str | None:
    """A variable of a running process."""
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs).get(name)


def times(project: Path) -> dict[str, int]:
    """When each result was written."""
    places = ("data/results/*/*", "data/spectra/*.safetensors", "data/cache/executed/*.ipynb")
    paths = [path for place in places for path in project.glob(place)]
    return {str(path): path.stat().st_mtime_ns for path in paths if path != project / STORED}


def listed() -> str:
    """The cluster's list of the jobs that there were: number, state, time, rules."""
    columns = ["squeue", "--states=all", "--sort=i", "--noheader", "--format=%i %T %M %k"]
    return slurm.said(columns)


def compare(here: Path, there: Path) -> None:
    """Every file of results is the same in both projects."""
    ours, theirs = (contents(project) for project in (here, there))
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    different = sorted(name for name in ours if ours[name] != theirs[name])
    assert not different, f"not the same on the cluster: {', '.join(different)}"
    runs = sum("experiments/" in name for name in ours)
    say("%d files are the same, byte for byte", len(ours) - runs)
    say("%d files of LoRA runs are the same but for times", runs)


def contents(project: Path) -> dict[str, object]:
    """What the files of results hold."""
    paths = [path for place in COMPARED for path in (project / place).rglob("*") if path.is_file()]
    found = {path.relative_to(project).as_posix(): content(path) for path in paths}
    del found[STORED]  # was copied, not made
    return found


def content(path: Path) -> object:
    """A file's bytes; of a LoRA run's, all that does not tell the time."""
    if path.parent.name != "experiments":
        return path.read_bytes()
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    with np.load(path) as arrays:
        held = {name: arrays[name].tobytes() for name in arrays.files if name != "about"}
        return held, timeless(json.loads(str(arrays["about"])))


def timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
