import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, TrainingArguments

from wdlib import WdlibError, characterise, paths
from wdlib.lora import data, initialisation, pretrained, training
from wdlib.lora.data import (
    DATA,
    HELD_OUT,
    Example,
    Tokens,
    examples,
    pad,
    schedule,
    split,
    tokenise,
)
from wdlib.lora.runs import Hyperparameters, Run

REFERENCE = "qwen2.5-coder-0.5b-instruct"
SHORT = Hyperparameters(steps=5, warmup_steps=1, learning_rate=1e-2, dtype="float32")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small Llama and its byte tokenizer (model/), and 240 examples (data/)."""
    folder = tmp_path_factory.mktemp("training")
    pretrained.miniature(LlamaConfig(), folder / "model")
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": f"Repeat {i}.", "input": str(i) * (i % 2), "output": f"{i} " * n}
        for i, n in enumerate(rng.integers(1, 30, 240).tolist())
    ]
    (folder / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / DATA["alpaca"].file).write_text(lines)
    return folder


@pytest.fixture
def run(home):
    return Run(model=str(home / "model"), hyperparameters=SHORT)


def losses(folder):
    return [row["loss"] for row in training.result(folder)["curve"]]


# Data --------------------------------------------------------------------------------------------


def write(folder, name, rows):
    (folder / DATA[name].file).write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_questions_that_come_twice_count_once(tmp_path):
    rows = [
        {"instruction": "a", "input": "", "output": "first"},
        {"instruction": "b", "input": "", "output": "other"},
        {"instruction": "a", "input": "", "output": "second"},
    ]
    write(tmp_path, "math", rows)
    found = examples("math", folder=tmp_path)
    assert found == (Example("b", "", "other"), Example("a", "", "first"))


def test_a_multiple_choice_question_becomes_an_instruction(tmp_path):
    choices = {"text": ["stone", "air"], "label": ["1", "2"]}
    write(tmp_path, "arc", [{"question": "What is hard?", "choices": choices, "answerKey": "1"}])
    (found,) = examples("arc", folder=tmp_path)
    assert found.input == "What is hard?\nA. stone\nB. air"
    assert found.output == "A. stone"


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_data_is_read_from_its_address(tmp_path, monkeypatch, kind):
    rows = [{"instruction": "a", "input": "", "output": "b"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = replace(DATA["math"], url=path.as_uri())
    monkeypatch.setitem(DATA, "math", source)
    assert examples("math") == (Example("a", "", "b"),)


def test_data_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(WdlibError, match="no data set 'poems': choose from alpaca"):
        examples("poems")
    with pytest.raises(WdlibError, match="alpaca_en_demo.jsonl cannot be read"):
        examples("alpaca", folder=tmp_path)
    write(tmp_path, "math", [{"instruction": "a"}])
    with pytest.raises(WdlibError, match="a row of the data set 'math' lacks"):
        examples("math", folder=tmp_path)
    missing = replace(DATA["math"], url=(tmp_path / "none.json").as_uri())
    monkeypatch.setitem(DATA, "math", missing)
    with pytest.raises(WdlibError, match="none.json cannot be read .* name a local folder"):
        examples("math")


def test_the_held_out_examples_are_fixed_and_apart():
    rows = [Example(str(i), "", "") for i in range(250)]
    to_train, held_out = split(rows)
    assert (len(to_train), len(held_out)) == (150, HELD_OUT)
    assert set(to_train) | set(held_out) == set(rows)
    assert held_out == split(rows)[1]
    assert held_out != rows[-HELD_OUT:]
    with pytest.raises(WdlibError, match="199 examples are too few"):
        split(rows[:199])


def test_an_example_in_the_alpaca_format(home):
    tokenizer = pretrained.load(home / "model").tokenizer
    row = Example("Add.", "1 and 2", "3.")
    (whole,) = tokenise([row], tokenizer, max_length=999)
    text = tokenizer.decode(whole.ids)
    assert text.startswith("Below is an instruction")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3.<end>")
    assert whole.labels == [training.IGNORED, *whole.ids[1:]]
    assert not whole.cut
    (answer,) = tokenise([row], tokenizer, max_length=999, answers_only=True)
    assert answer.ids == whole.ids
    assert answer.labels == [training.IGNORED] * (len(whole.ids) - 3) + whole.ids[-3:]
    (short,) = tokenise([row], tokenizer, max_length=20)
    assert short == Tokens(whole.ids[:20], whole.labels[:20], cut=True)


def test_the_schedule_shows_every_example_before_one_comes_again():
    plan = schedule(10, 4, 6, seed=1)
    assert plan.shape == (6, 4)
    seen = plan.ravel()
    for first in (0, 10):
        assert sorted(seen[first : first + 10]) == list(range(10))
    assert (seen[:10] != seen[10:20]).any()
    np.testing.assert_array_equal(plan, schedule(10, 4, 6, seed=1))
    assert (plan != schedule(10, 4, 6, seed=2)).any()
    np.testing.assert_array_equal(plan[:3], schedule(10, 4, 3, seed=1))


def test_examples_of_similar_length_share_a_micro_batch():
    sequences = [Tokens([0] * n, [0] * n, cut=False) for n in (3, 9, 4, 9, 8, 3)]
    order = training._by_length(np.array([5, 3, 2, 1, 4]), sequences)
    assert order == [1, 3, 4, 2, 5]
    drawn = [sequences[i] for i in (5, 3, 2, 1)]
    assert training._size(drawn, batch=2)["padded"] == 36
    assert training._size([sequences[i] for i in (1, 3, 2, 5)], batch=2)["padded"] == 26


def test_the_held_out_loss_is_that_of_each_example_alone(home):
    loaded = pretrained.load(home / "model")
    rows = [Example(str(i), "", "word " * i) for i in (5, 1, 3, 0, 9)]
    sequences = tokenise(rows, loaded.tokenizer, max_length=999, answers_only=True)
    found = training.held_out_loss(loaded.model, sequences, batch=2)
    alone = []
    for s in sequences:
        ids, labels = torch.tensor([s.ids]), torch.tensor([s.labels])
        tokens = sum(label != training.IGNORED for label in s.labels)
        alone.append(loaded.model(ids, labels=labels).loss.item() * tokens)
    np.testing.assert_allclose(found["sums"], alone, rtol=1e-5)
    assert found["loss"] == pytest.approx(sum(alone) / sum(found["tokens"]), rel=1e-6)
    assert found["tokens"] == [26, 6, 16, 1, 46]


# Configuration -----------------------------------------------------------------------------------


def test_a_run_survives_json():
    run = Run(init="literal", reference=REFERENCE, hyperparameters=Hyperparameters(rank=4))
    assert Run.from_json(run.to_json()) == run
    with pytest.raises(WdlibError, match="no run"):
        Run.from_json("[1]")
    with pytest.raises(WdlibError, match="no setting 'leraning_rate'"):
        Run.from_dict({"hyperparameters": {"leraning_rate": 1.0}})


def test_keys_tell_runs_apart_and_last():
    run = Run(init="literal", reference=REFERENCE)
    others = [
        replace(run, seed=1),
        replace(run, init="preserved"),
        replace(run, b_scale=0.1),
        replace(run, hyperparameters=Hyperparameters(weight_decay=0.0)),
        replace(run, hyperparameters=Hyperparameters(learning_rate=1e-3)),
    ]
    assert len({run.key, *(other.key for other in others)}) == 6
    assert "-lr0.001-" in others[-1].key
    # Stored results are found by these names.
    assert Run().key == "smollm2-135m-instruct-default-alpaca-s3407-44136fa3"
    assert run.key == f"smollm2-135m-instruct-literal-{REFERENCE}-alpaca-s3407-77643535"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "best"}, "no initialisation 'best'"),
        ({"data": "poems"}, "no data set 'poems'"),
        ({"init": "literal"}, "'literal' needs reference"),
        ({"reference": REFERENCE}, "'default' takes no reference"),
        ({"hyperparameters": Hyperparameters(dtype="int8")}, "no dtype 'int8'"),
    ],
)
def test_a_run_that_cannot_be_is_refused(settings, message):
    with pytest.raises(WdlibError, match=message):
        Run(**settings)


# Training ----------------------------------------------------------------------------------------


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
            mask = batch["labels"] != training.IGNORED
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
    assert all(len(found["hashes"][k]) == 64 for k in ("model", "data", "characterisation"))
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


def test_an_untrained_run_measures_the_model(run, home, tmp_path):
    untrained = replace(run, init="untrained")
    found = training.result(training.train(untrained, tmp_path / "run", data_folder=home / "data"))
    assert found["curve"] == []
    assert found["held_out"]["before"] == found["held_out"]["after"]
    assert found["hashes"]["adapter"] is None
    assert not (tmp_path / "run" / "adapter").exists()


def test_frozen_weights_alone_are_cast(run, home, tmp_path):
    rounded = replace(SHORT, steps=2, dtype="bfloat16")
    other = replace(run, init="pissa", hyperparameters=rounded)
    found = training.result(training.train(other, tmp_path / "run", data_folder=home / "data"))
    assert found["dtype"] == "bfloat16"
    model, _ = initialisation.attach(pretrained.load(run.model).model, "pissa")
    training._cast_frozen(model, "bfloat16", everything=False)
    kinds = {(".lora_" in n, p.dtype) for n, p in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_eva_reads_the_training_data(run, home, tmp_path):
    short = replace(run, init="eva", hyperparameters=replace(SHORT, steps=1, rank=4, batch=4))
    assert len(losses(training.train(short, tmp_path / "run", data_folder=home / "data"))) == 1


def test_losses_of_answers_alone(run, home, tmp_path):
    alone = replace(run, hyperparameters=replace(SHORT, steps=1, answers_only=True))
    done = training.train(alone, tmp_path / "run", data_folder=home / "data")
    (row,) = training.result(done)["curve"]
    assert row["tokens"] < row["padded"] / 4


COMMAND = """
import sys
from wdlib import training
from wdlib.training import Run
run = Run.from_json(open(sys.argv[1]).read())
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
    trainer = training._trainer(model, [], run, folder=tmp_path, save_every=1)
    assert trainer.args.train_batch_size == run.hyperparameters.batch


def test_the_characterisations_of_the_grid_are_there():
    run = Run(init="literal", reference=REFERENCE)
    assert characterise.load(run.characterisation()).rank == 16
    assert run.characterisation().is_relative_to(paths.RESULTS)
    assert Run().characterisation() is None
    assert Path(run.characterisation()).is_file()
