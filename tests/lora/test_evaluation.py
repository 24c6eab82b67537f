"""Scores of models: the harness's own, to the last item."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lora import ARC, GPQA, HELLASWAG, answering, harness

from wdlib.lora import evaluation, scores
from wdlib.lora.benchmarks import _SOURCES, TASKS, Protocol, quiet, requests
from wdlib.lora.evaluation import evaluate
from wdlib.lora.scores import correct


@pytest.fixture(scope="module")
def model():
    return answering()


@pytest.fixture(scope="module")
def measured(model, tokenizer, data):
    return evaluate(model, tokenizer, data_folder=data)


def asked(name: str, data: Path, **options) -> list:
    shown = requests(name, Protocol(**options), data).shown
    return [request for item in shown for request in itertools.chain(*item)]


def ours(model, tokenizer, given: list) -> np.ndarray:
    with quiet():
        scorer = evaluation.tree_scorer(model, tokenizer, "float32")
        return np.array(scorer.loglikelihood(given, disable_tqdm=True))


@pytest.fixture(scope="module")
def command_line(model, tokenizer, items, tmp_path_factory) -> dict[str, list[dict]]:
    """Samples of `python -m lm_eval` on the same model and items: task -> one dict per item."""
    import lm_eval

    folder = tmp_path_factory.mktemp("command_line")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name, rows in items.items():
        source = _SOURCES[name]
        split = {GPQA: "train", ARC: "test", HELLASWAG: "validation"}[name]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            f"include: {tasks / source.folder / name}.yaml\n"
            f"task: local_{name}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"training_split: null\nvalidation_split: null\ntest_split: {split}\n"
            f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}\n",
            encoding="utf-8",
        )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder / 'model'},dtype=float32"]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out")]
    command += ["--log_samples", "--tasks", *(f"local_{name}" for name in items)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    samples = {}
    for name in items:
        (file,) = (folder / "out").rglob(f"samples_local_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return samples


@pytest.mark.parametrize("name", TASKS)
def test_equals_the_harness_command_line_to_the_last_item(name, measured, command_line) -> None:
    scores, samples = measured.scores[name], command_line[name]
    assert len(samples) == len(scores.gold)
    for row, sample in enumerate(samples):
        expected = [float(value) for ((value, _),) in sample["resps"]]
        np.testing.assert_allclose(
            scores.loglikelihood[row, 0, : len(expected)], expected, atol=1e-4, rtol=0
        )
        assert np.isnan(scores.loglikelihood[row, 0, len(expected) :]).all()
    for normalised, metric in ((False, "acc"), (True, "acc_norm")):
        expected = [sample[metric] for sample in samples]
        found = correct(scores, normalised=normalised)[:, 0]
        np.testing.assert_array_equal(found, expected)
        assert found.mean() == np.mean(expected)
        assert 0 < np.mean(expected) < 1


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("batch", "tree"), [(2048, 1024), (300, 150)])
def test_trees_equal_one_request_at_a_time(
    name, batch, tree, model, tokenizer, data, monkeypatch
) -> None:
    monkeypatch.setitem(evaluation.BATCH_TOKENS, "cpu", batch)
    monkeypatch.setattr(evaluation, "TREE_TOKENS", tree)
    given = asked(name, data, orders=8, limit={GPQA: 3})
    found, expected = ours(model, tokenizer, given), harness(model, tokenizer, given)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found[:, 1], expected[:, 1])


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_scored_twice(
    model, tokenizer, data, monkeypatch, caplog
) -> None:
    given = asked(ARC, data)
    whole = ours(model, tokenizer, given)
    forward, sizes = evaluation._logits, []

    def limited(*arguments, input_ids, **inputs):
        if input_ids.numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate it.")
        sizes.append(input_ids.numel())
        return forward(*arguments, input_ids=input_ids, **inputs)

    monkeypatch.setattr(evaluation, "_logits", limited)
    monkeypatch.setattr(evaluation, "TREE_TOKENS", 150)
    halved = ours(model, tokenizer, given)
    np.testing.assert_allclose(halved[:, 0], whole[:, 0], atol=1e-4, rtol=0)
    assert max(sizes) > 150  # as much as fits, not one tree at a time
    said = [r.getMessage() for r in caplog.records]
    assert said[0] == "2048 tokens do not fit the device: going on with 1024"
    monkeypatch.setattr(evaluation, "TREE_TOKENS", 1024)
    with pytest.raises(torch.OutOfMemoryError):
        ours(model, tokenizer, given)


def test_an_evaluation_names_its_device(measured) -> None:
    assert {task["device"] for task in measured.made["tasks"].values()} == {"cpu"}


def test_text_longer_than_the_model_is_cut_as_the_harness_cuts_it(tokenizer, data) -> None:
    short = answering(max_position_embeddings=24)
    given = asked(HELLASWAG, data)
    found, expected = ours(short, tokenizer, given), harness(short, tokenizer, given)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [8, 256])
def test_a_sliding_window_is_respected(window, tokenizer, data) -> None:
    model = answering("mistral", sliding_window=window)
    given = asked(HELLASWAG, data)
    found, expected = ours(model, tokenizer, given), harness(model, tokenizer, given)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)


def test_a_shared_beginning_is_computed_once(measured) -> None:
    counted = measured.made["tasks"][GPQA]
    assert counted["tokens"] < counted["naive"] / 4


# In memory -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # in stock peft
def test_an_adapter_is_scored_as_it_stands_and_nothing_changes(model, tokenizer, data) -> None:
    from peft import LoraConfig, get_peft_model

    def config() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)

    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), config())
    adapted.add_adapter("second", config())
    adapted.base_model.set_adapter(["default", "second"])
    adapted.train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    protocol = Protocol(tasks=(ARC,))
    found = evaluate(adapted, tokenizer, protocol=protocol, data_folder=data).scores[ARC]
    assert adapted.training
    assert adapted.active_adapters == ["default", "second"]
    assert tokenizer.pad_token is None
    assert before.keys() == adapted.state_dict().keys()
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, before[name])
    expected = harness(adapted, tokenizer, asked(ARC, data))[:, 0]
    values = found.loglikelihood[~np.isnan(found.loglikelihood)]
    np.testing.assert_allclose(values, expected, atol=1e-3, rtol=0)
    plain = harness(model, tokenizer, asked(ARC, data))[:, 0]
    assert np.abs(values - plain).max() > 1


def test_a_bfloat16_model_is_scored_with_float32_arithmetic(model, tokenizer, data) -> None:
    protocol = Protocol(tasks=(ARC,))
    rough = copy.deepcopy(model).to(torch.bfloat16)
    found = evaluate(rough, tokenizer, protocol=protocol, data_folder=data).scores[ARC]
    exact = evaluate(rough.float(), tokenizer, protocol=protocol, data_folder=data).scores[ARC]
    np.testing.assert_array_equal(found.loglikelihood, exact.loglikelihood)


def test_bfloat16_is_near_and_makes_no_ties(model, tokenizer, data, measured) -> None:
    protocol = Protocol(tasks=(GPQA,), dtype="bfloat16")
    found = evaluate(model, tokenizer, protocol=protocol, data_folder=data).scores[GPQA]
    exact = measured.scores[GPQA].loglikelihood
    assert not np.array_equal(found.loglikelihood, exact)
    assert np.sqrt(np.mean((found.loglikelihood - exact) ** 2)) < 0.5
    assert len(np.unique(found.loglikelihood)) == found.loglikelihood.size


def test_limit_takes_the_first_items(model, tokenizer, data, measured) -> None:
    protocol = Protocol(limit={GPQA: 3, ARC: 2}, tasks=(GPQA, ARC))
    found = evaluate(model, tokenizer, protocol=protocol, data_folder=data)
    for name, count in ((GPQA, 3), (ARC, 2)):
        whole = measured.scores[name]
        np.testing.assert_array_equal(found.scores[name].items, whole.items[:count])
        np.testing.assert_array_equal(found.scores[name].gold, whole.gold[:count])
        np.testing.assert_allclose(
            found.scores[name].loglikelihood,
            whole.loglikelihood[:count, :, :4],  # no item of five options is among the first
            atol=1e-4,
            rtol=0,
        )


def test_scores_lie_by_item_order_and_position(model, tokenizer, data, measured) -> None:
    given = asked(GPQA, data, limit={GPQA: 2})
    expected = harness(model, tokenizer, given)[:, 0].reshape(2, 4, 4)
    found = measured.scores[GPQA].loglikelihood[:2]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_a_model_in_training_is_scored_at_rest(tokenizer, data, measured) -> None:
    busy = answering(attention_dropout=0.5).train()
    protocol = Protocol(tasks=(ARC,))
    found = evaluate(busy, tokenizer, protocol=protocol, data_folder=data).scores[ARC]
    np.testing.assert_array_equal(found.loglikelihood, measured.scores[ARC].loglikelihood)
    assert all(module.training for module in busy.modules())


def test_no_question_is_written_or_said(model, tokenizer, data, tmp_path, capfd, caplog) -> None:
    protocol = Protocol(tasks=(GPQA,), limit={GPQA: 2})
    caplog.set_level(0)
    scores.save(evaluate(model, tokenizer, protocol=protocol, data_folder=data), tmp_path / "e.npz")
    out, err = capfd.readouterr()
    assert "secretword" not in out + err + caplog.text
    with np.load(tmp_path / "e.npz") as arrays:
        assert not any("secretword" in str(arrays[name]) for name in arrays)
