"""Instruction data: examples, tokens, and the order in which a run sees them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from wdlib import WdlibError
from wdlib.lora import pretrained
from wdlib.lora.data import (
    DATA,
    HELD_OUT,
    IGNORED,
    Example,
    Tokens,
    examples,
    schedule,
    split,
    tokenise,
)


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
    assert whole.labels == [IGNORED, *whole.ids[1:]]
    assert not whole.cut
    (answer,) = tokenise([row], tokenizer, max_length=999, answers_only=True)
    assert answer.ids == whole.ids
    assert answer.labels == [IGNORED] * (len(whole.ids) - 3) + whole.ids[-3:]
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


def test_the_end_is_learnt_whoever_appends_it(tokenizer):
    """A tokenizer that appends it says that it stands at 0, where the prompt is."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    appends = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<end>",
    )
    appends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    rows = [Example("a river", "", "seven green")]
    for answers_only in (False, True):
        options = {"max_length": 999, "answers_only": answers_only}
        (found,), (expected,) = (tokenise(rows, t, **options) for t in (appends, tokenizer))
        assert found == expected
        assert found.labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(WdlibError, match="no end-of-sequence token"):
        tokenise([Example("a", "", "b")], endless, max_length=9)


def test_lines_are_those_of_the_format(tmp_path):
    """U+2028 within a text, a BOM, empty lines at the end, and an input that is null."""
    rows = [
        {"instruction": "a\u2028b", "input": None, "output": "c\u0085d"},
        {"instruction": "e", "input": "f", "output": "g"},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / DATA["alpaca"].file).write_text(f"\ufeff{lines}\n\n", encoding="utf-8")
    found = examples("alpaca", folder=tmp_path)
    assert found == (Example("a\u2028b", "", "c\u0085d"), Example("e", "f", "g"))
    (tmp_path / DATA["alpaca"].file).write_text('{"instruction": 1, "input": "", "output": ""}')
    with pytest.raises(WdlibError, match="lacks what it should have"):
        examples("alpaca", folder=tmp_path)
