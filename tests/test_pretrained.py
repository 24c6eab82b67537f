"""Models for transformers, from GGUF files and from folders."""

import json

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from wdlib import WdlibError
from wdlib.checkpoints import stream
from wdlib.checkpoints.catalogue import DEFAULT
from wdlib.checkpoints.files import Checkpoint
from wdlib.lora import pretrained


@pytest.fixture(scope="module")
def smollm():
    return pretrained.load(DEFAULT)


@pytest.fixture(scope="module")
def prompt(smollm):
    return smollm.tokenizer("The capital of France is", return_tensors="pt").input_ids


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_the_weights_are_those_that_are_measured(smollm):
    parameters = dict(smollm.model.named_parameters())
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "down": "mlp.down_proj"}
    for projection in stream.projections(DEFAULT, layers=[0, 29], types=names):
        name = f"model.layers.{projection.layer}.{names[projection.type]}.weight"
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
def tiny(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_without_a_tokenizer_gives_none(tiny):
    loaded = pretrained.load(tiny)
    assert loaded.tokenizer is None
    assert not loaded.model.training


def test_the_dtype_is_the_one_asked_for(tiny):
    assert pretrained.load(tiny, dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused_before_anything_is_read():
    with pytest.raises(WdlibError, match="no dtype 'int4' here"):
        pretrained.load("no-such-model", dtype="int4")


def test_weights_without_a_configuration_are_refused(tiny):
    (tiny / "config.json").unlink()
    with pytest.raises(WdlibError, match=r"no config\.json: give the model's whole folder"):
        pretrained.load(tiny)


def test_weights_in_whose_place_others_would_be_loaded_are_refused(tiny):
    """transformers picks the file of a folder by its name."""
    whole, other = tiny / "model.safetensors", tiny / "ema.safetensors"
    other.write_bytes(whole.read_bytes())
    message = "would not read ema.safetensors alone from .*: put it as model.safetensors"
    assert pretrained.load(whole).checkpoint.files == (whole,)
    with pytest.raises(WdlibError, match=message):
        pretrained.load(other)
    with pytest.raises(WdlibError, match=message):
        pretrained.configuration(other)
    whole.unlink()
    with pytest.raises(WdlibError, match=message):
        pretrained.load(tiny)


def test_one_shard_of_several_is_refused(tiny, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "cut", max_shard_size="5KB")
    one, *others = pretrained.load(tmp_path / "cut").checkpoint.files
    assert others
    with pytest.raises(WdlibError, match=f"would not read {one.name} alone"):
        pretrained.load(one)


def test_an_adapter_beside_the_weights_is_refused(tiny):
    (tiny / "adapter_config.json").write_text("{}")
    with pytest.raises(WdlibError, match=r"adapter_config\.json.*give a folder without it"):
        pretrained.load(tiny)


def test_a_configuration_that_names_other_weights_is_refused(tiny):
    config = json.loads((tiny / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (tiny / "other.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(WdlibError, match="take transformers_weights out of it"):
        pretrained.load(tiny)


def test_an_encoder_is_refused(tiny):
    (tiny / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(WdlibError, match="cannot load tiny as a causal language model"):
        pretrained.load(tiny)


@pytest.mark.parametrize("reads", [pretrained.load, pretrained.configuration])
def test_code_that_comes_with_a_model_is_not_run_even_if_one_would_agree(reads, tiny, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tiny / "own.py").write_text("raise SystemExit('ran')\n")
    classes = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"}
    (tiny / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    with pytest.raises(WdlibError, match="code that comes with it, which is never run here"):
        reads(tiny)


def test_code_that_comes_with_a_tokenizer_is_not_run(tiny, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tiny / "own.py").write_text("raise SystemExit('ran')\n")
    (tiny / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.A", null]}}')
    with pytest.raises(WdlibError, match="code that comes with it, which is never run here"):
        pretrained.load(tiny)


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


def test_the_configuration_is_that_of_the_loaded_model(tiny):
    assert (
        pretrained.configuration(tiny).to_diff_dict()
        == pretrained.load(tiny).model.config.to_diff_dict()
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
