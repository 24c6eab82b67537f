"""A grid of runs: done once, grown, gone on with; with a stand-in for the evaluation."""

import json
import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from numpy.testing import assert_allclose
from peft import PeftModel
from tiny_lora import ARC, GPQA, HELLASWAG, REFERENCE

from wdlib import TYPES, WdlibError, cli, paths
from wdlib.fingerprints import record
from wdlib.fingerprints.clusters import cluster
from wdlib.lora import data, devices, evaluation, pretrained, scores, training
from wdlib.lora.benchmarks import TASKS, Protocol
from wdlib.lora.data import DATA, Example, examples, split, tokenise
from wdlib.lora.grid import (
    BEGUN,
    EXTENDABLE,
    FINISHED,
    LACKING,
    TO_DO,
    _joined,
    cells,
    chosen,
    finished,
    run_cell,
    run_grid,
    state,
)
from wdlib.lora.results import fingerprint_file, load_result
from wdlib.lora.runs import Hyperparameters
from wdlib.lora.scores import Evaluation
from wdlib.spectra import workers

GRID = """
defaults: {model: MODEL, steps: 2, dtype: float32}
tiers:
  first:
    seeds: [1, 2]
    evaluation: {tasks: [arc_challenge], limit: {arc_challenge: 3}}
    runs:
      - {init: untrained}
      - {init: default}
      - {init: literal, reference: REFERENCE}
  second:
    seeds: [1]
    evaluation: {tasks: [arc_challenge, hellaswag]}
    runs:
      - {init: default}
      - {init: default, learning_rate: 1.0e-3}
"""


def evaluated(protocol, value=0.0):
    made = {"seconds": 1.0, "tasks": {task: {"seconds": 1.0} for task in protocol.tasks}}
    numbers = {task: protocol.limit.get(task, 9) for task in protocol.tasks}
    found = {task: tiny.scores(np.full((n, 1, 4), value), [0] * n) for task, n in numbers.items()}
    return Evaluation(protocol, found, made)


class Asked(list):
    """Stands in for `evaluation.evaluate`: remembers what it was asked, and answers at once."""

    def __call__(self, model, tokenizer, *, protocol, data_folder):
        self.append((model, protocol))
        return evaluated(protocol, value=float(len(self)))


@pytest.fixture
def asked(monkeypatch):
    asked = Asked()
    monkeypatch.setattr(evaluation, "evaluate", asked)
    return asked


@pytest.fixture
def grid(home, tmp_path):
    """Writes a grid file, with the small model, and gives where everything goes."""
    path = tmp_path / "grid.yaml"
    path.write_text(text_of(home))
    return path


def text_of(home):
    return GRID.replace("MODEL", str(home / "model")).replace("REFERENCE", REFERENCE)


@pytest.fixture
def places(tmp_path):
    return {"results": tmp_path / "results", "work": tmp_path / "work"}


def do_grid(grid, places, home, only=None, executor=None):
    """Runs a grid; gives what it said of each cell."""
    said = []
    options = {"data_folder": home / "data", "progress": said.append, "executor": executor}
    run_grid(chosen(grid, only=only), **options, **places)
    return [line.rpartition(": ")[2] for line in said]


@pytest.fixture
def do_all(grid, places, home):
    return partial(do_grid, grid, places, home)


def states(grid, places, only=None):
    return [state(cell, **places) for cell in chosen(grid, only=only)]


@pytest.fixture(scope="module")
def grown(home, tmp_path_factory):
    """The whole grid, trained once, tier by tier; what was seen on the way, and where it lies."""
    folder, seen = tmp_path_factory.mktemp("grown"), SimpleNamespace(states=[], said=[])
    grid, seen.asked = folder / "grid.yaml", Asked()
    seen.places = {"results": folder / "results", "work": folder / "work"}
    grid.write_text(text_of(home))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", seen.asked)
        seen.states.append(states(grid, seen.places))
        for tier in ("first", "first", "second"):
            trained = {p: p.stat().st_mtime_ns for p in seen.places["work"].glob("*/result.json")}
            seen.said.append(do_grid(grid, seen.places, home, tier))
            seen.states.append(states(grid, seen.places))
            seen.kept = all(path.stat().st_mtime_ns == at for path, at in trained.items())
    return seen


@pytest.fixture
def copied(grown, places):
    """The finished grid in the places of the test."""
    for name, folder in grown.places.items():
        shutil.copytree(folder, places[name])


def forget(cell, places):
    """Remove the results of a cell; its adapter stays in the cache."""
    for path in places["results"].glob(f"{cell.run.key}.*"):
        path.unlink()


# Files of grids ------------------------------------------------------------------------------


def test_the_cells_go_by_tier_then_seed(grid):
    found = cells(grid)
    order = [(c.tier, c.run.init, c.run.seed) for c in found]
    first = [("first", init, seed) for seed in (1, 2) for init in ("default", "literal")]
    # The model as it is does not depend on the seed: one cell, with the seed of a run's default.
    assert order == [("first", "untrained", 3407), *first, *[("second", "default", 1)] * 2]
    assert found[0].protocol == Protocol(tasks=(ARC,), limit={ARC: 3})
    assert [c.run.hyperparameters.learning_rate for c in found[-2:]] == [2e-4, 1e-3]
    assert found[1].run == found[-2].run
    assert {c.run.hyperparameters.steps for c in found} == {2}


def test_a_list_of_rates_is_a_run_for_each(grid):
    one, several = "learning_rate: 1.0e-3", "learning_rate: [2.0e-4, 1.0e-3, 3.0e-3]"
    grid.write_text(grid.read_text().replace(one, several))
    rates = [c.run.hyperparameters.learning_rate for c in cells(grid) if c.tier == "second"]
    assert rates == [2e-4, 1e-3, 3e-3]  # 2e-4 is that of the entry without one, and once


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tiers:", "teirs:", r"no grid of experiments \(tiers: Field required"),
        ("init: untrained", "innit: untrained", "innit: Unexpected"),
        ("init: untrained", "init: untrainde", "no initialisation 'untrainde'"),
        ("tasks: [arc_challenge]", "tasks: [arc]", "no benchmark 'arc'"),
        ("limit: {arc_challenge: 3}", "orders: 5", "5 orders of 4 options are not balanced"),
        ("limit: {arc_challenge: 3}", "dtype: int8", "no dtype 'int8'"),
        ("limit: {arc_challenge: 3}", "order: 4", "order"),
        ("limit: {arc_challenge: 3}", "seed: 1", "second evaluates .* another seed or dtype"),
        (
            "learning_rate: 1.0e-3",
            "learning_rate: 2e-4",
            "learning_rate: Input should be a valid number.* 2.0e-4",
        ),
        ("steps: 2", "steps: '2'", "steps: Input should be a valid integer"),
        ("seeds: [1, 2]", "seeds: [1, 2", "no grid of experiments"),
        ("first:", "on:", "a tier's name as true: put it in quotes"),
        (
            "    seeds: [1, 2]",
            "    seeds: [1, 2]\n    fingerprnt: true",
            "first.fingerprnt: Unexpected",
        ),
    ],
)
def test_a_grid_with_a_mistake_is_refused(grid, old, new, message):
    grid.write_text(grid.read_text().replace(old, new, 1))
    with pytest.raises(WdlibError, match=message):
        cells(grid)


def test_a_part_of_a_grid_can_be_chosen(grid):
    assert {c.tier for c in chosen(grid, only="second")} == {"second"}
    key = cells(grid)[2].run.key
    assert [c.run.key for c in chosen(grid, only=key)] == [key]
    with pytest.raises(WdlibError, match="no cells 'third': its tiers are first, second"):
        chosen(grid, only="third")


def test_the_grid_of_the_project():
    found = cells()
    assert {c.run.model for c in found} == {"smollm2-135m-instruct"}
    first = [c for c in found if c.tier == "tier1"]
    assert len(first) == 16
    assert [c.run.init for c in first[:4]] == ["untrained", "default", "literal", "preserved"]
    assert {c.tier for c in found if c.fingerprint} == {"tier1", "data", "fair-data"}
    fair = [c.run.hyperparameters.learning_rate for c in found if c.tier == "fair"]
    assert len(fair) == 5 * (6 + 6 + 5)
    assert min(fair) < Hyperparameters().learning_rate < max(fair)
    by_data = [(c.run.data, c.run.seed) for c in found if c.tier == "data"]
    assert by_data == [(data, seed) for seed in (3407, 1, 2) for data in DATA]
    references = {c.run.characterisation() for c in found} - {None}
    assert all(path.is_file() for path in references)


def test_a_larger_target_has_its_references(tmp_path):
    found = cells(paths.DATA / "experiments" / "second-target.yaml")
    assert {c.run.model for c in found} == {"qwen2.5-coder-0.5b-instruct"}
    assert {state(c, results=tmp_path, work=tmp_path) for c in found} == {TO_DO}
    template = Hyperparameters().learning_rate
    rates = {c.run.at_default_rate().variant: set() for c in found}
    for c in found:
        rates[c.run.at_default_rate().variant].add(c.run.hyperparameters.learning_rate)
    assert all(template in tried and len(tried) >= 3 for tried in rates.values())


def test_the_papers_scale_passes_a_dry_run(tmp_path):
    path = paths.DATA / "experiments" / "paper-scale.yaml"
    found = cells(path)
    assert {c.run.model for c in found} == {"smollm2-135m", "llama-3.2-1b"}
    assert {c.protocol for c in found if c.protocol.limit} == set()
    assert all(c.protocol.orders == 24 and len(c.protocol.tasks) == 3 for c in found)
    places = {"results": tmp_path, "work": tmp_path}
    assert {state(c, **places) for c in found} == {TO_DO, LACKING}
    from wdlib.checkpoints.catalogue import models

    named = {c.run.model for c in found} | {c.run.reference for c in found} - {None}
    assert named <= set(models())


# Cells ---------------------------------------------------------------------------------------


def test_a_grid_is_done_once_and_grows(grid, grown):
    first = [FINISHED] * 5 + [EXTENDABLE, TO_DO]
    assert grown.states == [[TO_DO] * 7, first, first, [FINISHED] * 7]
    assert [type(model) is PeftModel or hasattr(model, "peft_config") for model, _ in grown.asked] \
        == [False] + [True] * 6  # fmt: skip
    assert grown.said[1] == ["was finished"] * 5
    # Of the cell that both tiers ask for, ARC was measured on three items only.
    assert [protocol.tasks for _, protocol in grown.asked] == [(ARC,)] * 5 + [(ARC, HELLASWAG)] * 2
    assert grown.kept, "nothing is trained twice"
    results = grown.places["results"]
    stored = load_result(cells(grid)[1].run, results=results)
    assert len(stored.evaluation.scores[ARC].gold) == 9
    assert stored.report["key"] == cells(grid)[1].run.key
    assert len(stored.report["curve"]) == 2
    assert {p.suffix for p in results.iterdir()} == {".json", ".npz"}


def test_what_is_evaluated_is_the_trained_model(grid, home, grown):
    cell, (model, _) = cells(grid)[-1], grown.asked[-1]
    loaded = pretrained.load(cell.run.model)
    _, held_out = split(examples("alpaca", folder=home / "data"))
    rows = tokenise(held_out, loaded.tokenizer, max_length=1024)
    report = load_result(cell.run, results=grown.places["results"]).report
    found = training.held_out_loss(model, rows)["loss"]
    assert found == pytest.approx(report["held_out"]["after"]["loss"], abs=1e-5)
    assert found < report["held_out"]["before"]["loss"] - 1e-3


@pytest.mark.usefixtures("copied")
def test_only_what_is_missing_is_evaluated(grid, places, do_all, asked):
    before = load_result(cells(grid)[-1].run, results=places["results"]).evaluation
    text = grid.read_text().replace(
        "tasks: [arc_challenge, hellaswag]", f"tasks: [{GPQA}, {ARC}], orders: 4"
    )
    grid.write_text(text)
    do_all("second")
    assert [protocol.tasks for _, protocol in asked] == [(GPQA,), (GPQA,)]
    stored = load_result(cells(grid)[-1].run, results=places["results"])
    assert stored.evaluation.protocol.tasks == (GPQA, ARC, HELLASWAG) == tuple(
        task for task in TASKS if task in stored.evaluation.scores
    )  # fmt: skip
    values = {task: s.loglikelihood.max() for task, s in stored.evaluation.scores.items()}
    kept = before.scores[ARC].loglikelihood.max()
    assert values == {GPQA: 2.0, ARC: kept, HELLASWAG: kept}
    grid.write_text(text.replace("orders: 4", "orders: 8"))
    assert states(grid, places, "second") == [EXTENDABLE] * 2


@pytest.mark.usefixtures("copied")
def test_another_adapter_makes_the_old_evaluation_void(grid, places, do_all, asked):
    cell, other = cells(grid)[-1], "0" * 64  # of a training elsewhere, say
    before = load_result(cell.run, results=places["results"])
    path = places["results"] / f"{cell.run.key}.json"
    hashes = {**before.report["hashes"], "adapter": other}
    path.write_text(json.dumps({**before.report, "hashes": hashes}))
    known = replace(before.evaluation, made={**before.evaluation.made, "adapter": other})
    scores.save(known, path.with_suffix(".npz"))
    assert load_result(cell.run, results=places["results"]).report["hashes"]["adapter"] == other
    grid.write_text(grid.read_text().replace(f"[{ARC}, {HELLASWAG}]", f"[{GPQA}, {ARC}]"))
    do_all(cell.run.key)
    assert asked[-1][1].tasks == (GPQA, ARC)
    stored = load_result(cell.run, results=places["results"])
    assert set(stored.evaluation.scores) == {GPQA, ARC}


@pytest.mark.usefixtures("asked", "copied")
def test_a_cell_that_fails_does_not_stop_the_others(grid, places, do_all, monkeypatch):
    for cell in cells(grid):
        forget(cell, places)
        if cell.run.init == "literal":
            shutil.rmtree(places["work"] / cell.run.key)
    train = training.train

    def fails(run, *arguments, **options):
        if run.init == "literal":
            raise WdlibError("no luck")
        return train(run, *arguments, **options)

    monkeypatch.setattr(training, "train", fails)
    logging.getLogger("wdlib.lora.grid").setLevel(logging.CRITICAL)
    with pytest.raises(WdlibError, match="2 of 5 cells failed, the first was .*literal"):
        do_all("first")
    logging.getLogger("wdlib.lora.grid").setLevel(logging.NOTSET)
    assert states(grid, places, "first") == [FINISHED, FINISHED, TO_DO, FINISHED, TO_DO]


def test_a_cell_that_another_process_does_is_left_to_it(grid, places, do_all, asked):
    from filelock import FileLock

    cell = cells(grid)[-1]
    places["work"].mkdir()
    with FileLock(places["work"] / f"{cell.run.key}.lock"):
        assert do_all(cell.run.key) == ["another process is doing it"]
    assert not asked
    (places["work"] / cell.run.key).mkdir()
    assert state(cell, **places) == BEGUN


def test_the_processes_of_one_launcher_are_refused(grid, places, do_all, monkeypatch):
    two = SimpleNamespace(num_processes=2, device="cpu")
    monkeypatch.setattr(devices, "process_state", lambda: two)
    with pytest.raises(WdlibError, match="2 processes of one launcher"):
        do_all()
    with pytest.raises(WdlibError, match="2 processes of one launcher"):
        run_cell(cells(grid)[0], **places)
    assert not places["work"].exists()


def test_workers_share_a_grid(grid, places, home):
    """Each in a process of its own, which no monkeypatch reaches: so without an evaluation."""
    grid.write_text(grid.read_text().replace("{tasks: [arc_challenge, hellaswag]}", "{tasks: []}"))
    torch.set_num_threads(1)
    with workers.processes(2) as executor:
        said = do_grid(grid, places, home, "second", executor)
    assert states(grid, places, "second") == [FINISHED] * 2
    assert [line.startswith("held-out loss") for line in said] == [True, True]
    for cell in chosen(grid, only="second"):
        report = load_result(cell.run, results=places["results"]).report
        assert report["machine"]["threads"] == 1
        alone = training.train(cell.run, places["work"] / "alone", data_folder=home / "data")
        assert training.result(alone)["hashes"] == report["hashes"]
        shutil.rmtree(alone)


@pytest.mark.parametrize(
    ("cores", "words", "threads"),
    [
        (16, [], 2),
        (1, [], 1),
        (16, ["--workers", "8"], 2),
        (8, ["--workers", "8"], 1),
        (2, ["--workers", "4"], 1),
        (2, ["--threads", "5"], 5),
    ],
)
def test_the_command_divides_the_cores(grid, home, tmp_path, monkeypatch, cores, words, threads):
    seen = []

    def run_grid(todo, *, executor, **places):
        seen.append((todo, executor is not None, torch.get_num_threads(), places))

    monkeypatch.setattr("wdlib.lora.grid.run_grid", run_grid)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    before = torch.get_num_threads()
    try:
        told = ["--only", "second", "--results", str(tmp_path / "mine"), *words]
        assert cli.main(["experiments", str(grid), *told]) == 0
    finally:
        torch.set_num_threads(before)
    ((todo, shared, used, places),) = seen
    assert todo == chosen(grid, only="second")
    assert shared == ("--workers" in words)
    assert used == threads
    assert places["results"] == tmp_path / "mine"
    assert places["work"].is_relative_to(tmp_path / "mine")  # adapters of this device, apart


def test_a_failure_in_a_worker_is_told(grid, places, home):
    chosen_cells = chosen(grid, only="second")
    (places["work"] / chosen_cells[0].run.key).mkdir(parents=True)
    (places["work"] / chosen_cells[0].run.key / "run.json").write_text("[1]")
    grid.write_text(grid.read_text().replace("{tasks: [arc_challenge, hellaswag]}", "{tasks: []}"))
    with workers.processes(2) as executor, pytest.raises(WdlibError, match="1 of 2 cells failed"):
        do_grid(grid, places, home, "second", executor)
    assert states(grid, places, "second") == [BEGUN, FINISHED]


def test_a_lost_worker_is_told(grid, places, home):
    with workers.processes(1) as executor:
        executor.submit(os._exit, 1)
        with pytest.raises(WdlibError, match="a process that did a cell was lost"):
            do_grid(grid, places, home, "second", executor)


@pytest.mark.usefixtures("copied")
def test_a_model_is_evaluated_where_it_was_trained(grid, places, do_all, asked, grown, monkeypatch):
    for cell in chosen(grid, only="second"):
        forget(cell, places)
    gpu = SimpleNamespace(num_processes=1, device=torch.device("meta"))
    monkeypatch.setattr(devices, "process_state", lambda: gpu)
    monkeypatch.setattr(devices, "check_kind", lambda *_, **__: None)
    do_all("second")
    assert [model.device.type for model, _ in grown.asked] == ["cpu"] * 7
    assert [model.device.type for model, _ in asked] == ["meta"] * 2


@pytest.mark.usefixtures("asked", "copied")
def test_results_of_another_kind_of_device_are_left_alone(grid, places, home, monkeypatch):
    cell = cells(grid)[-1]
    forget(cell, places)
    there = {path: path.read_bytes() for path in places["results"].iterdir()}
    gpu = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(devices, "process_state", lambda: gpu)
    apart = {**places, "results": places["results"].parent / "apart"}
    for where in (places, apart):  # apart, the trained adapter in the cache is the CPU's still
        with pytest.raises(WdlibError, match="is of the device 'cpu' .*own .--results"):
            run_cell(cell, data_folder=home / "data", **where)
    assert {path: path.read_bytes() for path in places["results"].iterdir()} == there
    assert not apart["results"].exists()


@pytest.mark.usefixtures("asked", "copied")
def test_other_data_than_that_of_the_results_is_refused(grid, places, monkeypatch):
    cell = cells(grid)[-1]
    forget(cell, places)
    shutil.rmtree(places["work"] / cell.run.key)
    monkeypatch.setattr(data, "examples", lambda *_, **__: (Example(*"abc"),))
    with pytest.raises(WdlibError, match="'alpaca' is not the one that .* was trained on"):
        run_cell(cell, **places)
    assert state(cell, **places) == TO_DO


@pytest.mark.usefixtures("asked", "copied")
def test_a_machine_that_computes_differently_is_refused_before_it_trains(
    grid, places, home, monkeypatch
):
    """Its trace is the untrained model's loss; what was trained elsewhere is not taken either."""
    cell = cells(grid)[-1]
    kept = places["results"] / f"{cell.run.key}.json"
    report = json.loads(kept.read_text())
    forget(cell, places)
    for path in places["results"].glob("*.json"):
        other = json.loads(path.read_text())
        if other["step0"]:
            other["step0"]["base_loss"] += 0.001
            path.write_text(json.dumps(other))
    there = {path: path.read_bytes() for path in places["results"].iterdir()}
    here = f"{report['step0']['base_loss']:.5f} here"
    with pytest.raises(WdlibError, match=f"computes differently .* {here}"):
        run_cell(cell, data_folder=home / "data", **places)  # it is trained in the cache
    shutil.rmtree(places["work"] / cell.run.key)
    monkeypatch.setattr(training, "_fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(WdlibError, match="computes differently"):
        run_cell(cell, data_folder=home / "data", **places)
    assert {path: path.read_bytes() for path in places["results"].iterdir()} == there


@pytest.mark.usefixtures("asked", "copied")
def test_files_of_two_adapters_are_no_result(grid, places, do_all):
    cell = cells(grid)[-1]
    path = places["results"] / f"{cell.run.key}.json"
    report = json.loads(path.read_text())
    report["hashes"]["adapter"] = "0" * 64  # of an earlier training, by a process that was stopped
    path.write_text(json.dumps(report))
    assert load_result(cell.run, results=places["results"]) is None
    do_all(cell.run.key)
    assert state(cell, **places) == FINISHED


@pytest.mark.usefixtures("copied")
def test_damaged_results_are_named(grid, places):
    cell = cells(grid)[-1]
    path = places["results"] / f"{cell.run.key}.json"
    path.write_text("{")
    with pytest.raises(
        WdlibError, match=rf"{cell.run.key}\.json does not hold a report .*: remove"
    ):
        load_result(cell.run, results=places["results"])


def test_evaluations_join_task_by_task():
    known = evaluated(Protocol(tasks=(GPQA, ARC), limit={ARC: 5}, orders=4), 1.0)
    new = evaluated(Protocol(tasks=(ARC, HELLASWAG), limit={HELLASWAG: 7}, orders=8), 2.0)
    joined = _joined(known, new)
    assert joined.protocol == Protocol((GPQA, ARC, HELLASWAG), {HELLASWAG: 7}, orders=4)
    assert {t: len(s.gold) for t, s in joined.scores.items()} == {GPQA: 9, ARC: 9, HELLASWAG: 7}
    assert joined.made["seconds"] == 2.0
    assert set(joined.made["tasks"]) == {GPQA, ARC, HELLASWAG}
    other = replace(new, protocol=replace(new.protocol, seed=1))
    assert _joined(known, other) is other


def test_finished_cells_are_found_by_their_run(grid, places, grown):
    every, one = cells(grid), cells(grid)[1].run
    assert finished(every, results=places["results"]) == {}
    places["results"].mkdir()
    for path in grown.places["results"].glob(f"{one.key}.*"):
        shutil.copy(path, places["results"])
    found = finished(every, results=places["results"])
    assert list(found) == [one]
    assert found[one].report["key"] == one.key


# Fingerprints --------------------------------------------------------------------------------


@pytest.fixture
def fingerprinted(grid, tmp_path, monkeypatch):
    """The grid with fingerprints in its second tier, and no task there; and quick clusters."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(cluster.__kwdefaults__, "starts", 5)
    text = grid.read_text().replace("{tasks: [arc_challenge, hellaswag]}", "{tasks: []}")
    text = text.replace("  second:\n", "  second:\n    fingerprint: true\n")
    grid.write_text(text.replace("      - {init: default}\n", "      - {init: untrained}\n"))


@pytest.fixture
def adapters(grown, places):
    """What the finished grid has trained, without results."""
    shutil.copytree(grown.places["work"], places["work"])


def weights_of(model):
    return {name: p.detach().numpy() for name, p in model.named_parameters() if "_proj" in name}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft 0.21
@pytest.mark.usefixtures("fingerprinted", "adapters")
def test_a_fingerprint_is_that_of_the_merged_model(grid, places, do_all, asked):
    untrained, trained = chosen(grid, only="second")
    do_all("second")
    assert not asked, "there was no task"
    assert states(grid, places, "second") == [FINISHED] * 2
    before, after = (load_result(c.run, results=places["results"]) for c in (untrained, trained))
    assert after.evaluation.scores == {}
    assert len(after.report["curve"]) == 2
    adapter = places["work"] / trained.run.key / "adapter"
    base = weights_of(pretrained.load(trained.run.model).model)
    merged = PeftModel.from_pretrained(pretrained.load(trained.run.model).model, adapter)
    merged = weights_of(merged.merge_and_unload())
    assert max(np.abs(merged[name] - base[name]).max() for name in base) > 1e-4
    for stored, expected in ((before, base), (after, merged)):
        found = stored.fingerprint
        assert found.model == stored.report["key"]
        for layer, name in enumerate(n for n in expected if "up_proj" in n):
            if stored is after:
                added = np.linalg.norm(expected[name] - base[name]) / np.linalg.norm(base[name])
                assert_allclose(after.update["up"][layer], added, rtol=1e-3)
            exact = np.linalg.svd(expected[name].astype(np.float64), compute_uv=False)[:16]
            assert_allclose(found.singular_values["up"][layer], exact, rtol=5e-7)
            deviation = expected[name].astype(np.float64).std()
            assert_allclose(found.moments["up"][layer].deviation, deviation, rtol=1e-12)
    assert after.fingerprint.provenance["adapter"] == after.report["hashes"]["adapter"]
    assert after.fingerprint.provenance["sha256"] == after.report["hashes"]["model"]
    assert "adapter" not in before.fingerprint.provenance
    assert before.update == {}
    assert tuple(after.update) == TYPES
    assert not list(places["work"].glob("*/tmp*")), "the merged weights are gone"


@pytest.mark.usefixtures("fingerprinted", "adapters")
def test_only_a_missing_fingerprint_is_measured(grid, places, do_all, asked, monkeypatch):
    do_all("second")
    files = [fingerprint_file(c.run, places["results"]) for c in chosen(grid, only="second")]
    first = [path.read_bytes() for path in files]
    others = [p for p in places["results"].iterdir() if not p.name.endswith(".fingerprint.json")]
    assert len(others) == 4
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in others}
    # With the adapter in the cache nothing is trained; without it, the same adapter is made again.
    for in_cache in (True, False):
        for path in files:
            path.unlink()
        assert states(grid, places, "second") == [EXTENDABLE] * 2
        with monkeypatch.context() as patch:
            if in_cache:
                patch.setattr(training, "_fit", None)
            else:
                shutil.rmtree(places["work"])
            do_all("second")
        assert states(grid, places, "second") == [FINISHED] * 2
        assert [path.read_bytes() for path in files] == first
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in others} == before
    assert not asked


@pytest.mark.usefixtures("fingerprinted", "adapters")
def test_the_fingerprint_of_another_adapter_is_void(grid, places, do_all, asked):
    cell = chosen(grid, only="second")[1]
    do_all(cell.run.key)
    path = fingerprint_file(cell.run, places["results"])
    right = path.read_bytes()
    found = record.load(path)
    wrong = replace(found, provenance={**found.provenance, "adapter": "0" * 64})
    record.save(wrong, path)
    assert load_result(cell.run, results=places["results"]).fingerprint is None
    assert state(cell, **places) == EXTENDABLE
    do_all(cell.run.key)
    assert path.read_bytes() == right
    path.write_text("{")
    with pytest.raises(WdlibError, match=r"fingerprint.json does not hold a fingerprint"):
        state(cell, **places)


@pytest.mark.usefixtures("fingerprinted", "adapters")
def test_a_tier_without_tasks_leaves_evaluations_alone(grid, places, do_all, asked):
    in_bfloat16 = grid.read_text().replace("limit: {arc", "dtype: bfloat16, limit: {arc")
    grid.write_text(in_bfloat16)
    untrained = cells(grid)[0]
    do_all(untrained.run.key)
    stored = load_result(untrained.run, results=places["results"])
    assert stored.fingerprint is not None
    assert stored.evaluation.protocol == untrained.protocol
    assert len(asked) == 1
    assert do_all(untrained.run.key) == ["was finished"] * 2
