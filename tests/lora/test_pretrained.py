"""Models for transformers, from GGUF files and from folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny_lora import GROUPS, distance, logits
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from wdlib import WdlibError
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


def test_one_shard_of_several_is_refused(small, tmp_path):
    LlamaForCausalLM.from_pretrained(small).save_pretrained(tmp_path / "cut", max_shard_size="5KB")
    one, *others = pretrained.load(tmp_path / "cut").checkpoint.files
    assert others
    with pytest.raises(WdlibError, match=f"would not read {one.name} alone"):
        pretrained.load(one)


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
