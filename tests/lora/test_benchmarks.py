"""Benchmarks as lm-eval's requests: orders, seeds, the hub and local files."""

import random

import numpy as np
import pytest
from tiny_lora import ARC, GPQA, write_locked

from wdlib import WdlibError
from wdlib.lora.benchmarks import Protocol, _task, option_orders, quiet, requests
from wdlib.lora.evaluation import evaluate


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


def test_a_template_is_compiled_once_and_its_library_left_as_it_was(data, monkeypatch) -> None:
    from jinja2 import Environment
    from lm_eval.utils import env

    compiled, compile = [], Environment.compile

    def watched(self: Environment, source: str, *rest: object) -> object:
        compiled.append(source)
        return compile(self, source, *rest)

    monkeypatch.setattr(Environment, "compile", watched)
    found = requests(ARC, Protocol(), data)
    assert len(found.shown) > 3
    asked = [text for text in compiled if "choices" in text]
    assert asked
    assert max(map(asked.count, asked)) <= 3  # once here, and where lm-eval looks at the first item
    assert "from_string" not in vars(env)


# What cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tasks": ("mmlu",)}, "no benchmark 'mmlu': choose from gpqa_diamond_zeroshot"),
        ({"limit": {"arc": 3}}, "no benchmark 'arc'"),
        ({"dtype": "float16"}, "no dtype 'float16' here: give float32 or bfloat16"),
        ({"orders": 6}, "6 orders of 4 options are not balanced: give 1 or a multiple"),
        ({"orders": 28}, "28 orders"),
        ({"limit": {ARC: 0}}, "limit of 0 items leaves nothing of arc_challenge"),
    ],
)
def test_a_protocol_that_cannot_be_followed(given, says) -> None:
    with pytest.raises(WdlibError, match=says):
        Protocol(**given)


def test_data_that_cannot_be_read_is_named(items, data, tmp_path) -> None:
    protocol = Protocol(tasks=(GPQA,))
    with pytest.raises(WdlibError, match="gpqa_diamond.zip is missing: put it there, or name no"):
        evaluate(None, None, protocol=protocol, data_folder=tmp_path)
    whole = (data / "gpqa_diamond.zip").read_bytes()
    (tmp_path / "gpqa_diamond.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WdlibError, match="gpqa_diamond.zip cannot be read or is empty: fetch it"):
        evaluate(None, None, protocol=protocol, data_folder=tmp_path)
    write_locked(tmp_path / "gpqa_diamond.zip", "a.csv", b"Question,Correct Answer\nsecretword,b\n")
    with pytest.raises(WdlibError, match="no item .*Incorrect_Answer_1: Field required") as caught:
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
