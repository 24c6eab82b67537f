"""One run trained: a plain loop, stock peft, a kill and two processes come to the same."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_lora import REFERENCE
from transformers import TrainingArguments

from wdlib import WdlibError, paths
from wdlib.lora import data, initialisation, pretrained, training
from wdlib.lora.data import IGNORED, Example, Tokens, examples, pad, schedule, split, tokenise
from wdlib.lora.runs import Hyperparameters, Run

SHORT = Hyperparameters(steps=5, warmup_steps=1, learning_rate=1e-2, dtype="float32")


@pytest.fixture
def run(home):
    return Run(model=str(home / "model"), hyperparameters=SHORT)


def losses(folder):
    return [row["loss"] for row in training.result(folder)["curve"]]


def test_examples_of_similar_length_share_a_micro_batch():
    sequences = [Tokens([0] * n, [0] * n, cut=False) for n in (3, 9, 4, 9, 8, 3)]
    order = training.by_length(np.array([5, 3, 2, 1, 4]), sequences)
    assert order == [1, 3, 4, 2, 5]
    drawn = [sequences[i] for i in (5, 3, 2, 1)]
    assert training.token_counts(drawn, batch=2)["padded"] == 36
    assert training.token_counts([sequences[i] for i in (1, 3, 2, 5)], batch=2)["padded"] == 26


def test_the_held_out_loss_is_that_of_each_example_alone(home):
    loaded = pretrained.load(home / "model")
    rows = [Example(str(i), "", "word " * i) for i in (5, 1, 3, 0, 9)]
    sequences = tokenise(rows, loaded.tokenizer, max_length=999, answers_only=True)
    found = training.held_out_loss(loaded.model, sequences, batch=2)
    alone = []
    for s in sequences:
        ids, labels = torch.tensor([s.ids]), torch.tensor([s.labels])
        tokens = sum(label != IGNORED for label in s.labels)
        alone.append(loaded.model(ids, labels=labels).loss.item() * tokens)
    np.testing.assert_allclose(found["sums"], alone, rtol=1e-5)
    assert found["loss"] == pytest.approx(sum(alone) / sum(found["tokens"]), rel=1e-6)
    assert found["tokens"] == [26, 6, 16, 1, 46]


def test_the_losses_are_those_of_a_plain_loop(run, home, tmp_path):
    """Batches of two in the order of the schedule, an attention mask, and no Trainer."""
    done = training.train(run, tmp_path / "run", data_folder=home / "data")
    loaded = pretrained.load(run.model)
    to_train, held_out = split(examples("alpaca", folder=home / "data"))
    h = run.hyperparameters
    rows = tokenise(to_train, loaded.tokenizer, max_length=h.max_length)
    model, _ = initialisation.attach(loaded.model, "default", seed=run.seed)
    start = training.held_out_loss(
        model, tokenise(held_out, loaded.tokenizer, max_length=h.max_length)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, h.learning_rate, weight_decay=h.weight_decay)
    rates = [0.0, *(h.learning_rate * (h.steps - k) / (h.steps - 1) for k in range(1, h.steps))]
    expected = []
    for rate, step in zip(rates, schedule(len(rows), 8, h.steps, run.seed), strict=True):
        total, tokens = 0.0, sum(len(rows[i].ids) - 1 for i in step)
        for first in range(0, 8, h.batch):
            batch = pad([rows[i] for i in step[first : first + h.batch]])
            mask = batch["labels"] != IGNORED
            mask[:, 0] = True
            out = model(batch["input_ids"], attention_mask=mask.long())
            sums = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
            (sums / tokens).backward()
            total += float(sums.detach()) / tokens
        torch.nn.utils.clip_grad_norm_(parameters, h.max_grad_norm)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
        expected.append(total)
    np.testing.assert_allclose(losses(done), expected, atol=2e-5)
    assert expected[-1] < expected[0] - 0.1
    found = training.result(done)["held_out"]
    assert found["before"]["loss"] == pytest.approx(start["loss"], abs=1e-6)
    assert found["after"]["loss"] < start["loss"] - 0.1
    assert found["after"]["tokens"] == start["tokens"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # in stock peft
def test_the_folder_holds_a_stock_adapter_and_an_account(run, home, tmp_path):
    reshaped = replace(run, init="preserved", reference=REFERENCE)
    done = training.train(reshaped, tmp_path / "run", data_folder=home / "data")
    found = training.result(done)
    assert Run.from_dict(found["configuration"]) == reshaped
    assert found["key"] == reshaped.key
    assert found["step0"]["shift"] == pytest.approx(0, abs=1e-5)
    assert found["initialisation"]["reference"] == REFERENCE
    hashed = ("model", "data", "held-out tokens", "characterisation", "adapter")
    assert all(len(found["hashes"][k]) == 64 for k in hashed)
    assert found["machine"]["micro_batches"] == [2]
    assert found["dtype"] == "float32"
    assert found["versions"]["peft"]
    assert [row["step"] for row in found["curve"]] == [1, 2, 3, 4, 5]
    assert all(row["padded"] >= row["tokens"] + 8 for row in found["curve"])
    assert not (done / "checkpoints").exists()
    assert str(home) not in json.dumps({k: found[k] for k in found if k != "configuration"})
    loaded = pretrained.load(run.model)
    model = PeftModel.from_pretrained(loaded.model, done / "adapter")
    _, held_out = split(examples("alpaca", folder=home / "data"))
    rows = tokenise(held_out, loaded.tokenizer, max_length=1024)
    after = training.held_out_loss(model, rows)["loss"]
    assert after == pytest.approx(found["held_out"]["after"]["loss"], abs=1e-5)


def test_runs_of_one_seed_see_the_same_examples(run, home, tmp_path):
    sizes = []
    for number, other in enumerate([run, replace(run, init="gaussian"), replace(run, seed=1)]):
        done = training.train(other, tmp_path / str(number), data_folder=home / "data")
        sizes.append([(row["tokens"], row["padded"]) for row in training.result(done)["curve"]])
    assert sizes[0] == sizes[1] != sizes[2]


def test_a_finished_run_is_left_alone(run, home, tmp_path, monkeypatch):
    done = training.train(run, tmp_path / "run", data_folder=home / "data")
    monkeypatch.setattr(data, "examples", None)
    assert training.train(run, done) == done
    with pytest.raises(WdlibError, match="holds another run"):
        training.train(replace(run, seed=1), done)


def test_a_folder_with_something_else_in_the_place_of_a_run_is_refused(run, tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(WdlibError, match=r"run\.json does not hold a run .*: give \S+ a folder of"):
        training.train(run, tmp_path)


def test_an_untrained_run_measures_the_model(run, home, tmp_path):
    untrained = replace(run, init="untrained")
    found = training.result(training.train(untrained, tmp_path / "run", data_folder=home / "data"))
    assert found["curve"] == []
    assert found["held_out"]["before"] == found["held_out"]["after"]
    assert found["hashes"]["adapter"] is None
    assert not (tmp_path / "run" / "adapter").exists()


def test_frozen_weights_alone_are_cast(run, home, tmp_path, monkeypatch):
    fit, seen = training._fit, []

    def fit_and_see(model, *arguments, **options):
        seen.append({(".lora_" in n, p.dtype) for n, p in model.named_parameters()})
        return fit(model, *arguments, **options)

    monkeypatch.setattr(training, "_fit", fit_and_see)
    rounded = replace(SHORT, steps=2, dtype="bfloat16")
    other = replace(run, init="pissa", hyperparameters=rounded)
    found = training.result(training.train(other, tmp_path / "run", data_folder=home / "data"))
    assert found["dtype"] == "bfloat16"
    assert seen == [{(True, torch.float32), (False, torch.bfloat16)}]


def test_eva_reads_the_training_data(run, home, tmp_path):
    short = replace(run, init="eva", hyperparameters=replace(SHORT, steps=1, rank=4, batch=4))
    assert len(losses(training.train(short, tmp_path / "run", data_folder=home / "data"))) == 1


def test_losses_of_answers_alone(run, home, tmp_path):
    alone = replace(run, hyperparameters=replace(SHORT, steps=1, answers_only=True))
    done = training.train(alone, tmp_path / "run", data_folder=home / "data")
    (row,) = training.result(done)["curve"]
    assert row["tokens"] < row["padded"] / 4


COMMAND = """
import json, sys
from wdlib.lora import training
from wdlib.lora.runs import Run
run = Run.from_dict(json.load(open(sys.argv[1])))
training.train(run, sys.argv[2], data_folder=sys.argv[3], save_every=2)
"""


def test_a_killed_run_goes_on_to_the_same_end(run, home, tmp_path):
    """Killed while a checkpoint is being written; two adapters, and dropout to draw."""
    settings = replace(SHORT, steps=7, dropout=0.1)
    run = replace(run, init="preserved", reference=REFERENCE, hyperparameters=settings)
    whole = training.train(run, tmp_path / "whole", data_folder=home / "data", save_every=2)

    (tmp_path / "run.json").write_text(run.to_json())
    killed = tmp_path / "killed"
    arguments = [tmp_path / "run.json", killed, home / "data"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)])
    deadline = time.monotonic() + 300
    while not (killed / "checkpoints" / "checkpoint-4").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert training.result(killed) is None
    saved = [p.name for p in (killed / "checkpoints").iterdir()]
    assert "checkpoint-2" in saved

    training.train(run, killed, data_folder=home / "data", save_every=2)
    assert losses(killed) == losses(whole)
    a, b = (training.result(f) for f in (whole, killed))
    assert a["held_out"] == b["held_out"]
    assert a["hashes"] == b["hashes"]


def grown_gradients(run, home, folder, size):
    """The gradients of one step's trained matrices, in float64, divided into micro-batches."""
    from transformers import TrainerCallback

    loaded = pretrained.load(run.model)
    to_train, _ = split(examples("alpaca", folder=home / "data"))
    rows = tokenise(to_train, loaded.tokenizer, max_length=run.hyperparameters.max_length)
    model, _ = initialisation.attach(loaded.model, "gaussian", seed=run.seed)
    model.double()

    def exact(logits, labels, num_items_in_batch, **_):
        """transformers' loss, which it computes in float32."""
        counted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
        return (
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), counted, ignore_index=IGNORED, reduction="sum"
            )
            / num_items_in_batch
        )

    model.get_base_model().loss_function = exact
    found = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            for name, p in model.named_parameters():
                if p.requires_grad:
                    found[name] = p.grad.clone()

    plan = schedule(len(rows), 8, 1, run.seed)
    ordered = [rows[i] for i in training.by_length(plan[0], rows)]
    one = replace(run, hyperparameters=replace(SHORT, steps=1, max_grad_norm=0.0))
    trainer = training._trainer(
        model, ordered, one, micro_batch=size, folder=folder / str(size), save_every=9
    )
    trainer.add_callback(Look())
    trainer.train()
    return found


def test_how_a_step_is_divided_changes_its_rounding_alone(run, home, tmp_path):
    """The micro-batches differ in their tokens, so that a mean of means would show."""
    whole, *others = (grown_gradients(run, home, tmp_path, size) for size in (8, 1, 2))
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for other in others:
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-12)


class Small:
    """A device whose memory holds so many examples at a time, from a given step on."""

    def __init__(self, monkeypatch, holds, first=1):
        from transformers import Trainer

        self.seen, step = [], Trainer.training_step

        def limited(trainer, model, inputs, *rest):
            size = len(inputs["input_ids"])
            self.seen.append((trainer.state.global_step + 1, size))
            if size > holds and trainer.state.global_step + 1 >= first:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate it.")
            return step(trainer, model, inputs, *rest)

        monkeypatch.setattr(Trainer, "training_step", limited)


@pytest.mark.parametrize("save_every", [10, 2])
def test_a_step_that_does_not_fit_is_halved_and_nothing_is_lost(
    run, home, tmp_path, monkeypatch, caplog, save_every
):
    """Out of memory at the fourth step, with and without a checkpoint to go on from."""
    batch = replace(run, hyperparameters=replace(SHORT, batch=8, accumulation=1))
    whole = training.train(batch, tmp_path / "whole", data_folder=home / "data")
    small = Small(monkeypatch, holds=2, first=4)
    done = training.train(batch, tmp_path / "s", data_folder=home / "data", save_every=save_every)
    again = [2, 2, 2, 2]
    repeated = [1, 2, 3, 4, 5] if save_every == 10 else [3, 4, 5]
    steps = [step for step, size in small.seen if size == 2]
    assert steps == [step for step in repeated for _ in again]
    a, b = (training.result(f) for f in (whole, done))
    np.testing.assert_allclose(losses(done), losses(whole), atol=1e-5)
    assert b["held_out"]["after"]["loss"] == pytest.approx(a["held_out"]["after"]["loss"], abs=1e-5)
    assert a["machine"]["micro_batches"] == [8]
    assert b["machine"]["micro_batches"] == ([2] if save_every == 10 else [8, 2])
    assert b["curve"][4]["padded"] < a["curve"][4]["padded"]
    assert [r.getMessage() for r in caplog.records if "do not fit" in r.getMessage()] == [
        "8 examples of a step do not fit the device: going on with 4",
        "4 examples of a step do not fit the device: going on with 2",
    ]


def test_what_no_memory_holds_fails_as_it_did(run, home, tmp_path, monkeypatch):
    small = Small(monkeypatch, holds=0)
    with pytest.raises(torch.OutOfMemoryError):
        training.train(run, tmp_path / "run", data_folder=home / "data")
    assert small.seen == [(1, 2), (1, 1)]


def test_a_held_out_loss_that_does_not_fit_is_halved(home, monkeypatch):
    loaded = pretrained.load(home / "model")
    rows = tokenise(examples("alpaca", folder=home / "data")[:9], loaded.tokenizer, max_length=99)
    whole = training.held_out_loss(loaded.model, rows)
    forward, sizes = loaded.model.forward, []

    def limited(*, input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate it.")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(loaded.model, "forward", limited)
    halved = training.held_out_loss(loaded.model, rows)
    assert sizes == [8, 4, 4, 1]
    np.testing.assert_allclose(halved["sums"], whole["sums"], rtol=1e-6)


def test_a_run_that_was_begun_on_another_device_is_refused(run, home, tmp_path):
    done = training.train(run, tmp_path / "run", data_folder=home / "data")
    start = json.loads((done / "start.json").read_text())
    assert start["machine"]["device"] == "cpu"
    (done / "result.json").unlink()
    start["machine"]["device"] = "cuda:0"
    (done / "start.json").write_text(json.dumps(start))
    with pytest.raises(WdlibError, match="run is of the device 'cuda' .* go on there, or remove"):
        training.train(run, done, data_folder=home / "data")
    del start["machine"]  # as runs were begun that could only be on a CPU
    (done / "start.json").write_text(json.dumps(start))
    assert training.result(training.train(run, done, data_folder=home / "data"))


def test_a_checkpoint_without_its_mark_is_not_used(tmp_path):
    for step, mark in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if mark:
            (tmp_path / f"checkpoint-{step}" / "whole").touch()
    assert training._last_whole(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists()
    assert training._last_whole(tmp_path / "nothing") is None


def test_two_processes_give_the_losses_of_one(run, home, tmp_path):
    one = training.train(run, tmp_path / "one", data_folder=home / "data")
    (tmp_path / "run.json").write_text(run.to_json())
    (tmp_path / "train.py").write_text(COMMAND)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "train.py", tmp_path / "run.json", tmp_path / "two", home / "data"]
    command = [sys.executable, *launch, *map(str, arguments)]
    processor = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=processor)
    assert done.returncode == 0, done.stderr[-2000:]
    assert training.result(tmp_path / "two")["machine"]["processes"] == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), atol=1e-4)


def test_several_gpus_without_a_launcher_do_not_enlarge_a_batch(run, home, tmp_path, monkeypatch):
    devices = TrainingArguments.__dict__["_setup_devices"].func

    def two_gpus(arguments):
        device = devices(arguments)
        arguments._n_gpu = 2
        return device

    once = cached_property(two_gpus)
    once.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", once)
    model = pretrained.load(run.model).model
    trainer = training._trainer(model, [], run, micro_batch=2, folder=tmp_path, save_every=1)
    assert trainer.args.train_batch_size == run.hyperparameters.batch


def test_examples_of_which_nothing_counts_are_left_out(home, tmp_path):
    """A step without a counted token would make the losses of all later steps NaN."""
    short = replace(SHORT, answers_only=True, max_length=218)
    found = training.train(
        Run(model=str(home / "model"), hyperparameters=short),
        tmp_path / "run",
        data_folder=home / "data",
    )
    result = training.result(found)
    assert 0 < result["data"]["uncounted"] < result["data"]["train"] + result["data"]["uncounted"]
    assert all(np.isfinite(row["loss"]) and row["tokens"] > 0 for row in result["curve"])


def test_nothing_to_count_is_refused_before_training(home, tmp_path):
    none = replace(SHORT, answers_only=True, max_length=5)
    run = Run(model=str(home / "model"), hyperparameters=none)
    with pytest.raises(WdlibError, match="no token of the answers is left to count"):
        training.train(run, tmp_path / "run", data_folder=home / "data")


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, tmp_path):
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes(100))
        paths.mark_whole(folder)
    state = tmp_path / "checkpoint-20" / "optimizer.pt"
    if damage == "flipped":
        state.write_bytes(bytes(50) + b"\1" + bytes(49))
    else:
        state.unlink()
    assert training._last_whole(tmp_path) == str(tmp_path / "checkpoint-10")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
