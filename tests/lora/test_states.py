"""A PeftModel is scored in the state that it is in, and every option with all of its tokens."""

import copy

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_lora import ARC, answering, harness
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from wdlib import WdlibError
from wdlib.lora import benchmarks
from wdlib.lora.adapters import expected_peft_warnings
from wdlib.lora.benchmarks import Protocol
from wdlib.lora.evaluation import evaluate


def adapted(*configs: LoraConfig, **options):
    """A tiny model with adapters, each of which changes the answers."""
    with expected_peft_warnings():
        model = get_peft_model(answering(**options), configs[0])
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(f"adapter{number}", config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def scored(model, tokenizer, data) -> np.ndarray:
    """Log-likelihoods of the options of ARC: (items, options)."""
    found = evaluate(model, tokenizer, protocol=Protocol(tasks=(ARC,)), data_folder=data)
    return found.scores[ARC].loglikelihood[:, 0]


def expected(model, tokenizer, data) -> np.ndarray:
    """The same from lm-eval's HFLM, which runs the model as it is."""
    items = benchmarks.requests(ARC, Protocol(tasks=(ARC,)), data)
    values = np.full((len(items.shown), max(map(len, items.options))), np.nan)
    for row, (shown,) in enumerate(items.shown):
        # transformers cannot tie what peft has wrapped: HFLM asks it to.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "tie_weights", lambda *_: None, raising=False)
            values[row, : len(shown)] = harness(model, tokenizer, list(shown))[:, 0]
    return values


Q = LoraConfig(r=4, target_modules=["q_proj"])


@pytest.mark.parametrize("how", ["context", "switch"])
def test_an_adapter_that_is_off_is_not_scored(how, tokenizer, data):
    model = adapted(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    base, on = scored(answering(), tokenizer, data), scored(model, tokenizer, data)
    assert np.nanmax(np.abs(on - base)) > 1
    if how == "context":
        with model.disable_adapter():
            off = scored(model, tokenizer, data)
    else:
        model.base_model.disable_adapter_layers()
        off = scored(model, tokenizer, data)
        model.base_model.enable_adapter_layers()
    np.testing.assert_array_equal(off, base)
    np.testing.assert_array_equal(scored(model, tokenizer, data), on)


STATES = {
    "plain": lambda: adapted(Q),
    "bias": lambda: adapted(
        LoraConfig(r=4, target_modules=["q_proj"], bias="all"), attention_bias=True
    ),
    "saved module": lambda: adapted(
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "lora_bias": lambda: adapted(LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)),
    "tied head": lambda: adapted(
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), tie_word_embeddings=True
    ),
    "tied embedding": lambda: adapted(
        LoraConfig(r=4, target_modules=["embed_tokens"]), tie_word_embeddings=True
    ),
    "first of two": lambda: adapted(Q, LoraConfig(r=4, target_modules=["up_proj"])),
    "second of two": lambda: second(adapted(Q, LoraConfig(r=4, target_modules=["up_proj"]))),
}


def second(model):
    model.set_adapter("adapter1")
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's on tied weights and biases
@pytest.mark.parametrize("state", STATES)
def test_what_is_scored_is_the_model_in_its_state(state, tokenizer, data):
    model = STATES[state]()
    before = copy.deepcopy(model.state_dict())
    found = scored(model, tokenizer, data)
    np.testing.assert_allclose(found, expected(model, tokenizer, data), atol=1e-4)
    assert np.nanmax(np.abs(found - scored(answering(), tokenizer, data))) > 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_tokens_of_an_adapters_own_are_refused(kind, tokenizer, data):
    with expected_peft_warnings():
        model = get_peft_model(answering(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(WdlibError, match="tokens of its own before every prompt"):
        scored(model, tokenizer, data)


def changed(tokenizer, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), **options
    )


def test_a_tokenizer_that_appends_its_end_costs_no_option_a_token(tokenizer, data):
    appends = changed(tokenizer, eos_token="<end>")
    appends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    assert appends("stone")["input_ids"][-1] == tokenizer.eos_token_id
    model = answering()
    np.testing.assert_array_equal(scored(model, appends, data), scored(model, tokenizer, data))


def test_a_tokenizer_without_beginning_and_end_scores_as_well(tokenizer, data):
    model = answering()
    np.testing.assert_array_equal(
        scored(model, changed(tokenizer), data), scored(model, tokenizer, data)
    )
