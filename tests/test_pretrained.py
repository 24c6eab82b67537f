"""Models for transformers, from GGUF files and from folders."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wdlib import WdlibError, pretrained, weights
from wdlib.models import DEFAULT, Checkpoint


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
    for projection in weights.projections(DEFAULT, layers=[0, 29], types=names):
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


def test_an_encoder_is_refused(tiny):
    (tiny / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(WdlibError, match="cannot load tiny as a causal language model"):
        pretrained.load(tiny)


def test_weights_that_stay_on_the_hub_are_refused():
    away = Checkpoint("tiny", (object(),), "hub organisation/tiny")
    with pytest.raises(WdlibError, match="without hf://"):
        pretrained.load(away)
