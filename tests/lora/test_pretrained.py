"""Models for transformers, from GGUF files and from folders."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny_lora import GROUPS, distance, logits
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

from wdlib import WdlibError, paths
from wdlib.checkpoints import stream
from wdlib.checkpoints.catalogue import DEFAULT
from wdlib.checkpoints.files import Checkpoint
from wdlib.lora import initialisation, pretrained
from wdlib.lora.measure import step0


@pytest.fixture(scope="module")
def prompt(smollm):
    return dict(smollm.tokenizer("The capital of France is", return_tensors="pt"))


def test_the_weights_are_those_that_are_measured(smollm):
    parameters = dict(smollm.model.named_parameters())
    for projection in stream.projections(DEFAULT, layers=[0, 29], types=("q", "k", "down")):
        name = tiny.llama_name(projection.layer, projection.type)
        np.testing.assert_array_equal(projection.matrix, parameters[name].detach().numpy())


def test_the_model_knows_what_it_was_taught(smollm, prompt):
    assert smollm.tokenizer.decode(logits(smollm.model, prompt)[0, -1].argmax()) == " Paris"


def test_every_digit_is_a_token(smollm):
    pieces = {"12345": list("12345"), "a  1": ["a", "ĠĠ", "1"], " 3.14": ["Ġ", "3", ".", "1", "4"]}
    for text, expected in pieces.items():
        ids = smollm.tokenizer(text)["input_ids"]
        assert smollm.tokenizer.convert_ids_to_tokens(ids) == expected
        assert smollm.tokenizer.decode(ids) == text


def test_a_dequantised_model_can_be_saved_and_loaded(smollm, prompt, tmp_path):
    smollm.model.save_pretrained(tmp_path)
    smollm.tokenizer.save_pretrained(tmp_path)
    again = pretrained.load(tmp_path)
    assert torch.equal(logits(again.model, prompt), logits(smollm.model, prompt))
    assert again.tokenizer("a  1").input_ids == smollm.tokenizer("a  1").input_ids


def test_input_and_output_embeddings_stay_one(smollm):
    assert smollm.model.lm_head.weight is smollm.model.model.embed_tokens.weight


# A GGUF file is converted once ----------------------------------------------------------------


@pytest.fixture(params=[(True, True), (False, False)], ids=["tied, digits", "untied"])
def gguf(request, house):
    tied, digits = request.param
    return tiny.write_gguf_llama(house / "tiny.gguf", tied=tied, digits=digits)


def direct(file, dtype="float32"):
    """Model and tokenizer as transformers itself reads them from the file."""
    options = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
    return model, AutoTokenizer.from_pretrained(file.parent, **options)


def same(one, two):
    """Whether two models are one, bit for bit, and as alike as their settings."""
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    assert {name: v.dtype for name, v in a.items()} == {name: v.dtype for name, v in b.items()}
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Where it was read from, the quantisation that is undone, and the class's own name.
    own = dict.fromkeys(("_name_or_path", "quantization_config", "architectures"))
    c, d = (m.config.to_dict() | own for m in (one, two))
    assert c == d
    assert one.generation_config.to_dict() == two.generation_config.to_dict()
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (one, two)]
    assert tied[0] == tied[1]
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_file_is_what_transformers_reads(gguf, dtype):
    model, tokenizer = direct(gguf, dtype)
    for _ in range(2):  # made, and read again
        loaded = pretrained.load(gguf, dtype=dtype)
        assert same(loaded.model, model)
        assert not loaded.model.training
        assert loaded.checkpoint.files == (gguf,)
        assert loaded.checkpoint.source == "file tiny.gguf"
        told = loaded.tokenizer.special_tokens_map, loaded.tokenizer.chat_template
        assert told == (tokenizer.special_tokens_map, tokenizer.chat_template)
        texts = ("the sum, theés", " the  the\n", "<start>the<end>")
        assert [loaded.tokenizer(t).input_ids for t in texts] == [
            tokenizer(t).input_ids for t in texts
        ]
        pieces = loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("a 123").input_ids)
        split = header(gguf)["tokenizer.ggml.pre"] == "smollm"
        assert pieces[-3:] == (["1", "2", "3"] if split else ["Ġ", "12", "3"])
    (folder,) = (paths.CACHE / "converted").glob("tiny-*/")
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json", "whole"}


def header(file):
    from wdlib.checkpoints.headers import gguf_header

    return gguf_header(file)[0]


@pytest.fixture
def conversions(monkeypatch):
    """Counts them."""
    convert, seen = pretrained._convert, []

    def counted(checkpoint, folder):
        seen.append(folder.name)
        convert(checkpoint, folder)

    monkeypatch.setattr(pretrained, "_convert", counted)
    return seen


def test_it_is_converted_once_and_again_where_something_that_decides_is_another(
    house, conversions, monkeypatch
):
    file = tiny.write_gguf_llama(house / "tiny.gguf")
    (house / "moved").mkdir()
    moved = shutil.copy(file, house / "moved" / "tiny.gguf")
    for name in (file, file, moved):
        pretrained.load(name)
    assert len(conversions) == 1
    monkeypatch.setattr(pretrained.metadata, "version", lambda name: f"{name} 99")
    pretrained.load(file)
    tiny.write_gguf_llama(house / "tiny.gguf", tied=False)
    pretrained.load(file)
    assert len(set(conversions)) == 3


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json", "whole"])
def test_a_damaged_conversion_is_made_again(house, conversions, damage, caplog):
    file = tiny.write_gguf_llama(house / "tiny.gguf")
    whole = pretrained.load(file)
    (folder,) = (paths.CACHE / "converted").glob("tiny-*/")
    path = folder / damage
    if damage == "whole":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.unlink()  # the loaded model still sees the file as it was
        path.write_bytes(content)
    again = pretrained.load(file)
    assert same(whole.model, again.model)
    assert len(conversions) == 2
    assert "is damaged and is made again" in caplog.text


def test_a_conversion_that_fails_leaves_nothing(house, monkeypatch):
    file = tiny.write_gguf_llama(house / "tiny.gguf")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        with pytest.raises(WdlibError, match=r"4 bytes a parameter.*No space left.*WDLIB_CACHE"):
            pretrained.load(file)
    assert not list((paths.CACHE / "converted").glob("tiny-*/"))
    assert pretrained.load(file).tokenizer


LOAD = """
import sys
from pathlib import Path
from wdlib import paths
from wdlib.lora import pretrained
paths.CACHE = Path(sys.argv[2])
convert = pretrained._convert
def told(*arguments):
    print("converted", flush=True)
    convert(*arguments)
pretrained._convert = told
print(pretrained.load(sys.argv[1]).model.num_parameters())
"""


def test_processes_that_need_it_at_once_convert_once(house):
    file = tiny.write_gguf_llama(house / "tiny.gguf")
    command = [sys.executable, "-c", LOAD, str(file), str(paths.CACHE)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].split() for process in both]
    assert sorted(len(lines) for lines in said) == [1, 2]
    assert said[0][-1] == said[1][-1]


def test_what_is_done_to_a_model_stays_out_of_the_cache(house):
    file = tiny.write_gguf_llama(house / "tiny.gguf")
    first = pretrained.load(file)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(1)
    after = pretrained.load(file).model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_default_model_is_what_transformers_reads(smollm):
    """And the tokens of SmolLM's own text are its own, the digits apart."""
    model, tokenizer = direct(smollm.checkpoint.files[0])
    assert same(smollm.model, model)
    assert smollm.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert smollm.tokenizer.chat_template == tokenizer.chat_template
    pretrained._split_digits(tokenizer)
    backends = (t.backend_tokenizer.to_str() for t in (smollm.tokenizer, tokenizer))
    assert len(set(backends)) == 1


# Folders ----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tiny.model(layers=1, **sizes, **heads).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_without_a_tokenizer_gives_none(small):
    loaded = pretrained.load(small)
    assert loaded.tokenizer is None
    assert not loaded.model.training


def test_the_dtype_is_the_one_asked_for(small):
    assert pretrained.load(small, dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused_before_anything_is_read():
    with pytest.raises(WdlibError, match="no dtype 'int4' here"):
        pretrained.load("no-such-model", dtype="int4")


def test_weights_without_a_configuration_are_refused(small):
    (small / "config.json").unlink()
    with pytest.raises(WdlibError, match=r"no config\.json: give the model's whole folder"):
        pretrained.load(small)


def test_weights_in_whose_place_others_would_be_loaded_are_refused(small):
    """transformers picks the file of a folder by its name."""
    whole, other = small / "model.safetensors", small / "ema.safetensors"
    other.write_bytes(whole.read_bytes())
    message = "would not read ema.safetensors alone from .*: put it as model.safetensors"
    assert pretrained.load(whole).checkpoint.files == (whole,)
    with pytest.raises(WdlibError, match=message):
        pretrained.load(other)
    with pytest.raises(WdlibError, match=message):
        pretrained.configuration(other)
    whole.unlink()
    with pytest.raises(WdlibError, match=message):
        pretrained.load(small)


def test_one_shard_of_several_stands_for_all(small, tmp_path):
    LlamaForCausalLM.from_pretrained(small).save_pretrained(tmp_path / "cut", max_shard_size="5KB")
    one, *others = pretrained.load(tmp_path / "cut").checkpoint.files
    assert others
    assert pretrained.load(one).checkpoint.files == (one, *others)


def test_an_adapter_beside_the_weights_is_refused(small):
    (small / "adapter_config.json").write_text("{}")
    with pytest.raises(WdlibError, match=r"adapter_config\.json.*give a folder without it"):
        pretrained.load(small)


def test_a_configuration_that_names_other_weights_is_refused(small):
    config = json.loads((small / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (small / "other.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(WdlibError, match="take transformers_weights out of it"):
        pretrained.load(small)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_hidden_layers": 2}, r"no model\.layers\.1\S+ of the shape"),
        ({"num_hidden_layers": 0}, r"a layer 0 beyond those"),
        ({"intermediate_size": 100}, r"cannot load tiny"),
        ({"num_hidden_layers": "1"}, r"cannot load tiny"),
    ],
)
def test_weights_of_another_configuration_are_refused(given, message, small):
    """transformers fills what is missing with random numbers, and drops layers too many."""
    path = small / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    with pytest.raises(WdlibError, match=message):
        pretrained.load(small)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_in_a_sentence(name, small):
    (small / name).write_bytes((small / name).read_bytes()[:100])
    with pytest.raises(WdlibError):
        pretrained.load(small)


def test_an_encoder_is_refused(small):
    (small / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(WdlibError, match="cannot load tiny as a causal language model"):
        pretrained.load(small)


@pytest.mark.parametrize("reads", [pretrained.load, pretrained.configuration])
def test_code_that_comes_with_a_model_is_not_run_even_if_one_would_agree(reads, small, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (small / "own.py").write_text("raise SystemExit('ran')\n")
    classes = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"}
    (small / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    with pytest.raises(WdlibError, match="code that comes with it, which is never run here"):
        reads(small)


def test_code_that_comes_with_a_tokenizer_is_not_run(small, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (small / "own.py").write_text("raise SystemExit('ran')\n")
    (small / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.A", null]}}')
    with pytest.raises(WdlibError, match="code that comes with it, which is never run here"):
        pretrained.load(small)


def test_weights_that_stay_on_the_hub_are_refused():
    away = Checkpoint("tiny", (object(),), "hub organisation/tiny")
    with pytest.raises(WdlibError, match="without hf://"):
        pretrained.load(away)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Gemma3TextConfig, GPT2Config])
def test_a_miniature_is_small_and_of_the_same_kind(kind, tmp_path):
    state = torch.random.get_rng_state()
    small = pretrained.load(pretrained.miniature(kind(), tmp_path / "small"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(small.model.config) is kind
    assert small.model.num_parameters() < 200_000
    ids = small.tokenizer("Zwölf 12").input_ids
    assert len(ids) == len("Zwölf 12".encode())
    assert small.tokenizer.decode(ids) == "Zwölf 12"
    assert small.model(torch.tensor([ids])).logits.shape[-1] >= len(small.tokenizer)


def test_a_miniature_follows_its_seed(tmp_path):
    folders = [pretrained.miniature(LlamaConfig(), tmp_path / f"{i}", seed=i) for i in (0, 1)]
    again = pretrained.miniature(LlamaConfig(), tmp_path / "again", seed=1)
    first, second, third = (pretrained.load(f).model.lm_head.weight for f in (*folders, again))
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


def test_the_configuration_is_that_of_the_loaded_model(small):
    assert (
        pretrained.configuration(small).to_diff_dict()
        == pretrained.load(small).model.config.to_diff_dict()
    )


def test_quiet_holds_notices_back_until_it_ends_however_it_ends():
    from transformers.utils import logging

    def fail():
        with pretrained.quiet():
            assert not logger.isEnabledFor(logging.WARNING)
            assert logger.isEnabledFor(logging.ERROR)
            raise ZeroDivisionError

    logger, level = logging.get_logger("transformers.tiny"), logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)


def test_step_0_of_the_real_model(smollm):
    """Here, where it is loaded. The model is adapted, and left without an adapter as it was."""
    text = "A river rises in the hills, crosses the plain and reaches the sea."
    batch = dict(smollm.tokenizer(text, return_tensors="pt"))
    character = replace(GROUPS, rank=16)
    before = logits(smollm.model, batch)
    peft_model, _ = initialisation.attach(smollm.model, "preserved", characterisation=character)
    for mode in initialisation.MODES:
        initialisation.reshape_(peft_model, character, mode=mode)
        result = step0(peft_model, batch)
        change = distance(logits(peft_model, batch), before)
        assert result.logit_change == pytest.approx(change, rel=1e-3, abs=1e-7)
        assert (change <= 1e-5) == (mode != "literal")
    assert torch.equal(logits(peft_model.unload(), batch), before)


def test_no_bar_of_transformers_is_shown(tmp_path, monkeypatch):
    """In a notebook it would be a widget, which is dead in what is stored."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    def bar(*_, **__):
        raise AssertionError("a bar")

    monkeypatch.setattr(logging.tqdm_lib, "tqdm", bar)
    monkeypatch.setattr(gguf_reader, "tqdm", bar)
    assert logging.is_progress_bar_enabled()
    with pretrained.quiet():
        assert list(gguf_reader.tqdm([1, 2], desc="")) == [1, 2]
        assert list(logging.tqdm([3, 4], desc="")) == [3, 4]
    assert logging.is_progress_bar_enabled()
    assert gguf_reader.tqdm is bar
