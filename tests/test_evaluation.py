import copy
import csv
import gzip
import io
import itertools
import json
import os
import random
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wdlib import WdlibError
from wdlib.lora import evaluation, scores
from wdlib.lora.benchmarks import (
    _SOURCES,
    GPQA_PASSWORD,
    TASKS,
    Protocol,
    _task,
    option_orders,
    quiet,
    requests,
)
from wdlib.lora.evaluation import evaluate
from wdlib.lora.scores import Scores, accuracy, answers, correct, debiased, letters

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

GPQA, ARC, HELLASWAG = TASKS
TEXT = "the a river stone light sings turns under seven green 12 305 bright — über not"
WORDS = TEXT.split()


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def locked(data: bytes, password: bytes) -> bytes:
    """Traditional zip encryption, which `zipfile` reads but does not write."""

    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        return value

    table = [entry(value) for value in range(256)]
    keys = [0x12345678, 0x23456789, 0x34567890]

    def update(byte: int) -> None:
        keys[0] = (keys[0] >> 8) ^ table[(keys[0] ^ byte) & 0xFF]
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = (keys[2] >> 8) ^ table[(keys[2] ^ (keys[1] >> 24)) & 0xFF]

    for byte in password:
        update(byte)
    out = bytearray()
    for byte in bytes(11) + bytes([zlib.crc32(data) >> 24]) + data:
        key = keys[2] | 2
        out.append(byte ^ (key * (key ^ 1) >> 8 & 0xFF))
        update(byte)
    return bytes(out)


def write_locked(path: Path, name: str, data: bytes) -> None:
    """A zip file of one stored, encrypted member."""
    buffer = io.BytesIO()
    secret = locked(data, GPQA_PASSWORD)
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, secret)
    raw = bytearray(buffer.getvalue())
    central = raw.index(b"PK\x01\x02")
    for flags, crc, size in ((6, 14, 22), (central + 8, central + 16, central + 24)):
        raw[flags] |= 1
        raw[crc : crc + 4] = zlib.crc32(data).to_bytes(4, "little")
        raw[size : size + 4] = len(data).to_bytes(4, "little")
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def items() -> dict[str, list[dict]]:
    """Made-up items of each benchmark, in the columns of the real ones."""
    rng = np.random.default_rng(0)
    gpqa = [
        {
            "Record ID": str(row),
            "Question": f"secretword {words(rng, 30)}?",
            "Correct Answer": words(rng, 4),
            **{f"Incorrect Answer {i}": f" {words(rng, 3 + i)}\n" for i in (1, 2, 3)},
        }
        for row in range(16)
    ]
    arc = [
        {
            "id": str(row),
            "question": words(rng, 12) + "?",
            "choices": {
                "text": [words(rng, rng.integers(1, 6)) for _ in range(count)],
                "label": list("ABCDE"[:count]),
            },
            "answerKey": "ABCDE"[rng.integers(count)],
        }
        for row, count in enumerate((4, 4, 5, 3, 4, 4, 4, 4, 4))
    ]
    hellaswag = [
        {
            "ind": row,
            "activity_label": words(rng, 2),
            "ctx_a": words(rng, 14) + ".",
            "ctx_b": words(rng, 3),
            "ctx": "",
            "endings": [words(rng, rng.integers(3, 12)) + "." for _ in range(4)],
            "label": str(rng.integers(4)),
        }
        for row in range(9)
    ]
    return {GPQA: gpqa, ARC: arc, HELLASWAG: hellaswag}


@pytest.fixture(scope="module")
def data(items: dict[str, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as data/README describes it."""
    folder = tmp_path_factory.mktemp("data")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(items[GPQA][0]))
    writer.writeheader()
    writer.writerows(items[GPQA])
    write_locked(folder / "gpqa_diamond.zip", "dataset/gpqa_diamond.csv", table.getvalue().encode())
    lines = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in items.items()}
    (folder / "arc_challenge_test.jsonl").write_text(lines[ARC], encoding="utf-8")
    with gzip.open(folder / "hellaswag_validation.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines[HELLASWAG])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def tiny(kind: str = "llama", **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # far from uniform, as a trained model is
        bos_token_id=0,
        eos_token_id=0,
        **{"max_position_embeddings": 512, **options},
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def measured(model, tokenizer, data):
    return evaluate(model, tokenizer, data_folder=data)


def requests(name: str, data: Path, **options) -> list:
    shown = requests(name, Protocol(**options), data).shown
    return [request for item in shown for request in itertools.chain(*item)]


def harness(model, tokenizer, given: list) -> np.ndarray:
    """What lm-eval's own model class answers."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
        return np.array(plain.loglikelihood(given, disable_tqdm=True))


def ours(model, tokenizer, given: list) -> np.ndarray:
    with quiet():
        scorer = evaluation._scorer(model, tokenizer, "float32")
        return np.array(scorer.loglikelihood(given, disable_tqdm=True))


# ---- lm-eval


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
        assert accuracy(scores, normalised=normalised) == np.mean(expected)
        assert 0 < np.mean(expected) < 1


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("batch", "tree"), [(2048, 1024), (300, 150)])
def test_trees_equal_one_request_at_a_time(
    name, batch, tree, model, tokenizer, data, monkeypatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch)
    monkeypatch.setattr(evaluation, "TREE_TOKENS", tree)
    given = requests(name, data, orders=8, limit={GPQA: 3})
    found, expected = ours(model, tokenizer, given), harness(model, tokenizer, given)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found[:, 1], expected[:, 1])


def test_text_longer_than_the_model_is_cut_as_the_harness_cuts_it(tokenizer, data) -> None:
    short = tiny(max_position_embeddings=24)
    given = requests(HELLASWAG, data)
    found, expected = ours(short, tokenizer, given), harness(short, tokenizer, given)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [8, 256])
def test_a_sliding_window_is_respected(window, tokenizer, data) -> None:
    model = tiny("mistral", sliding_window=window)
    given = requests(HELLASWAG, data)
    found, expected = ours(model, tokenizer, given), harness(model, tokenizer, given)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=0)


def test_a_shared_beginning_is_computed_once(measured) -> None:
    counted = measured.made["tasks"][GPQA]
    assert counted["tokens"] < counted["naive"] / 4


# ---- in memory


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
    expected = harness(adapted, tokenizer, requests(ARC, data))[:, 0]
    values = found.loglikelihood[~np.isnan(found.loglikelihood)]
    np.testing.assert_allclose(values, expected, atol=1e-3, rtol=0)
    plain = harness(model, tokenizer, requests(ARC, data))[:, 0]
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


# ---- items


def test_orders_are_balanced() -> None:
    every = option_orders(24)
    assert len({tuple(order) for order in every}) == 24
    np.testing.assert_array_equal(every[0], range(4))
    np.testing.assert_array_equal(option_orders(1), every[:1])
    for start in range(0, 24, 4):
        np.testing.assert_array_equal(np.sort(every[start : start + 4], axis=0)[:, 0], range(4))
        assert (every[start : start + 4].sum(axis=0) == 6).all()


def test_options_stand_where_the_orders_say(items, data) -> None:
    found = requests(GPQA, Protocol(orders=24), data)
    for row, shown, gold in zip(items[GPQA], found.shown, found.gold, strict=True):
        truth = row["Correct Answer"]
        texts = []
        for order, (request, *_) in zip(found.orders, shown, strict=True):
            lines = request.args[0].splitlines()
            options = [line[4:] for line in lines if line[:1] == "(" and line[2:4] == ") "]
            texts.append(dict(zip(order.tolist(), options, strict=True)))
            assert options[list(order).index(gold)] == truth
        assert all(text == texts[0] for text in texts)


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
    given = requests(GPQA, data, limit={GPQA: 2})
    expected = harness(model, tokenizer, given)[:, 0].reshape(2, 4, 4)
    found = measured.scores[GPQA].loglikelihood[:2]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_a_model_in_training_is_scored_at_rest(tokenizer, data, measured) -> None:
    busy = tiny(attention_dropout=0.5).train()
    protocol = Protocol(tasks=(ARC,))
    found = evaluate(busy, tokenizer, protocol=protocol, data_folder=data).scores[ARC]
    np.testing.assert_array_equal(found.loglikelihood, measured.scores[ARC].loglikelihood)
    assert all(module.training for module in busy.modules())


def test_the_order_of_options_depends_on_the_seed_alone(data) -> None:
    random.seed(5)
    state = random.getstate()
    first = requests(GPQA, Protocol(), data)
    assert random.getstate() == state
    random.seed(6)
    again = requests(GPQA, Protocol(), data)
    other = requests(GPQA, Protocol(seed=1), data)
    assert [r.args for r in first.shown[0][0]] == [r.args for r in again.shown[0][0]]
    assert first.gold == again.gold
    assert first.gold != other.gold


def test_the_hub_gives_what_a_local_file_gives(items, data, tmp_path, monkeypatch) -> None:
    import datasets

    stored = datasets.Dataset.from_list(items[GPQA])
    stored.save_to_disk(tmp_path / "hub")
    hub = datasets.load_from_disk(tmp_path / "hub")
    asked = []

    def load_dataset(path: str, name: str, **_):
        asked.append((path, name))
        return {"train": hub}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    random.seed(9)
    with quiet():
        _earlier = _task(GPQA, None, None)  # stores its own shuffle beside the data
    assert list((tmp_path / "hub").glob("cache-*"))
    found = requests(GPQA, Protocol(), None)
    expected = requests(GPQA, Protocol(), data)
    assert found.gold == expected.gold
    assert [r.args for r in found.shown[3][2]] == [r.args for r in expected.shown[3][2]]
    assert set(asked) == {("Idavidrein/gpqa", "gpqa_diamond")}
    assert datasets.is_caching_enabled()


def test_no_question_is_written_or_said(model, tokenizer, data, tmp_path, capfd, caplog) -> None:
    protocol = Protocol(tasks=(GPQA,), limit={GPQA: 2})
    caplog.set_level(0)
    scores.save(evaluate(model, tokenizer, protocol=protocol, data_folder=data), tmp_path / "e.npz")
    out, err = capfd.readouterr()
    assert "secretword" not in out + err + caplog.text
    with np.load(tmp_path / "e.npz") as arrays:
        assert not any("secretword" in str(arrays[name]) for name in arrays)


# ---- errors


@pytest.mark.parametrize(
    ("protocol", "says"),
    [
        (Protocol(tasks=("mmlu",)), "no benchmark 'mmlu': choose from gpqa_diamond_zeroshot"),
        (Protocol(limit={"arc": 3}), "no benchmark 'arc'"),
        (Protocol(dtype="float16"), "no dtype 'float16' here: give float32 or bfloat16"),
        (Protocol(orders=6), "6 orders of 4 options are not balanced: give 1 or a multiple"),
        (Protocol(orders=28), "28 orders"),
        (Protocol(limit={ARC: 0}), "limit of 0 items leaves nothing of arc_challenge"),
    ],
)
def test_a_protocol_that_cannot_be_followed(protocol, says, data) -> None:
    with pytest.raises(WdlibError, match=says):
        evaluate(None, None, protocol=protocol, data_folder=data)


def test_data_that_cannot_be_read_is_named(items, data, tmp_path) -> None:
    protocol = Protocol(tasks=(GPQA,))
    with pytest.raises(WdlibError, match="gpqa_diamond.zip is missing: put it there, or name no"):
        evaluate(None, None, protocol=protocol, data_folder=tmp_path)
    whole = (data / "gpqa_diamond.zip").read_bytes()
    (tmp_path / "gpqa_diamond.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WdlibError, match="gpqa_diamond.zip cannot be read or is empty: fetch it"):
        evaluate(None, None, protocol=protocol, data_folder=tmp_path)
    write_locked(tmp_path / "gpqa_diamond.zip", "a.csv", b"Question,Correct Answer\nsecretword,b\n")
    with pytest.raises(WdlibError, match="rows without 'Incorrect Answer 1'") as caught:
        evaluate(None, None, protocol=protocol, data_folder=tmp_path)
    assert "secretword" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(monkeypatch) -> None:
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("secretword")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(WdlibError, match=r"hub \(ConnectionError\): log in or go online") as caught:
        evaluate(None, None, protocol=Protocol(tasks=(GPQA,)))
    assert "secretword" not in str(caught.value)
    assert caught.value.__suppress_context__


# ---- storage


def test_an_evaluation_comes_back_as_it_was_saved(measured, tmp_path) -> None:
    path = tmp_path / "new" / "run.npz"
    scores.save(measured, path)
    again = scores.load(path)
    assert again.protocol == measured.protocol
    assert again.made == measured.made
    assert again.scores.keys() == measured.scores.keys()
    for name, scores in measured.scores.items():
        for part, value in vars(scores).items():
            np.testing.assert_array_equal(getattr(again.scores[name], part), value)
            assert getattr(again.scores[name], part).dtype == value.dtype
    assert [file.name for file in path.parent.iterdir()] == ["run.npz"]


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive"])
def test_what_is_no_evaluation_is_refused(content, tmp_path) -> None:
    path = tmp_path / "run.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WdlibError, match="run.npz is not a stored evaluation: evaluate again"):
        scores.load(path)


# ---- what follows from scores


def scores(loglikelihood: np.ndarray, gold: list[int], characters=None) -> Scores:
    items, orders, width = loglikelihood.shape
    shown = np.arange(width)[None] if orders == 1 else option_orders(orders)
    lengths = np.full((items, width), 3) if characters is None else np.array(characters)
    names = np.arange(items, dtype=np.uint32)
    return Scores(loglikelihood.astype(np.float32), shown, np.array(gold), lengths, names)


def test_accuracy_by_hand() -> None:
    nan = np.nan
    by_hand = np.array([[[-1, -2, -3]], [[-2, -2, nan]], [[-4, -5, -9]], [[-5, -4, -3]]])
    found = scores(by_hand, [0, 0, 0, 2], [[1, 2, 3], [1, 1, 0], [1, 5, 1], [9, 4, 2]])
    np.testing.assert_array_equal(answers(found)[:, 0], [0, 0, 0, 2])
    assert accuracy(found) == 1
    np.testing.assert_array_equal(answers(found, normalised=True)[:, 0], [0, 0, 1, 0])
    assert accuracy(found, normalised=True) == 0.5


@pytest.mark.parametrize("orders", [4, 8, 24])
def test_always_the_same_letter_is_chance_over_orders(orders) -> None:
    lazy = np.tile([0.0, -1.0, -2.0, -3.0], (50, orders, 1))
    found = scores(lazy, np.random.default_rng(0).integers(0, 4, 50))
    assert (correct(found).mean(axis=1) == 0.25).all()
    np.testing.assert_array_equal(letters(found), [[50, 0, 0, 0]] * orders)


def test_one_cycle_of_orders_stands_for_all_and_its_spread_covers_the_choice_of_it() -> None:
    rng = np.random.default_rng(3)
    cycle, every = [], []
    for _ in range(1000):  # other items each time, in an order of their own
        gold = rng.integers(0, 4, 60)
        worth = rng.normal(size=(60, 4)) + np.eye(4)[gold]
        shown = worth[:, option_orders(24)] + np.array([1.5, 0.0, 0.0, 1.0])
        cycle.append(correct(scores(shown[:, :4], gold)).mean(axis=1))
        every.append(correct(scores(shown, gold)).mean(axis=1))
    means, errors = [], []
    for shares in map(np.array, (cycle, every)):
        means.append(shares.mean())
        errors.append(np.mean(shares.var(axis=1, ddof=1) / 60))
        np.testing.assert_allclose(errors[-1], shares.mean(axis=1).var(), rtol=0.15)
    np.testing.assert_allclose(*means, atol=0.002)
    assert errors[0] > 1.03 * errors[1]


def test_debiasing_takes_a_planted_liking_for_letters_away() -> None:
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 4, 80)
    worth = rng.normal(size=(80, 4)) + 4 * np.eye(4)[gold]  # of each option
    shown = worth[:, option_orders(4)]
    clean, biased = scores(shown, gold), scores(shown + np.array([9.0, 3.0, 0.0, -5.0]), gold)
    assert correct(biased).mean() < 0.4
    found = debiased(biased)
    np.testing.assert_array_equal(correct(found), correct(clean))
    shifted = debiased(replace(clean, loglikelihood=clean.loglikelihood - 7))
    np.testing.assert_allclose(shifted.loglikelihood, found.loglikelihood, atol=1e-4)


def test_a_letter_is_worth_its_mean_over_orders() -> None:
    worth, liking = np.array([-3.0, -1.0, -2.0, -6.0]), np.array([2.0, 0.0, -1.0, 4.0])
    shown = worth[option_orders(4)][None]
    found = debiased(scores(shown + liking, [1]))
    np.testing.assert_allclose(found.loglikelihood, shown - worth.mean(), atol=1e-6)


def test_importing_it_is_cheap() -> None:
    code = "import sys, wdlib.evaluation; print({'torch', 'lm_eval', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
