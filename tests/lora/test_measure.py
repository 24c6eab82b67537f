"""What an adapter is and does: step 0, norms, spectra."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from tiny_lora import GROUPS, RANK, matrices, reshaped

from wdlib import TYPES
from wdlib.lora import initialisation
from wdlib.lora.adapters import lora_layers
from wdlib.lora.measure import initial_spectra, step0

# peft 0.21 asks transformers 5 for an attribute that was renamed; `attach` keeps that to itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_step_0_reports_what_a_merged_model_does(llama, untouched, batch):
    peft_model, _ = reshaped(llama, b_scale=0.3)
    batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    peft_model.train()
    result = step0(peft_model, batch)
    assert peft_model.training
    merged = copy.deepcopy(untouched)
    for name, layer in lora_layers(peft_model):
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        added = 12 / RANK * b @ a
        weight = merged.get_submodule(name).weight.detach()
        assert result.norms[name] == pytest.approx(float(added.norm() / weight.norm()), rel=1e-4)
        weight += added
    with torch.no_grad():
        before, after = (m(**batch, labels=batch["input_ids"]).loss for m in (untouched, merged))
    assert result.base_loss == pytest.approx(float(before), rel=1e-6)
    assert result.loss == pytest.approx(float(after), rel=1e-5)
    assert result.shift == result.loss - result.base_loss


def test_step_0_counts_the_labels_it_is_given(llama, batch):
    peft_model, _ = reshaped(llama)
    labels = batch["input_ids"].clone()
    labels[:, 5:] = -100
    assert step0(peft_model, {**batch, "labels": labels}).loss != pytest.approx(
        step0(peft_model, batch).loss
    )


def test_step_0_takes_no_account_of_padding(llama, untouched, batch):
    peft_model, _ = reshaped(llama)
    short = {name: value[:, :5] for name, value in batch.items()}
    padded = {**batch, "labels": batch["input_ids"].clone()}
    padded["labels"][:, 5:] = -100
    alone, beside = step0(peft_model, short), step0(peft_model, padded)
    assert beside.logit_change == pytest.approx(alone.logit_change, rel=1e-4)
    assert step0(peft_model, batch).logit_change != pytest.approx(beside.logit_change)


def test_the_spectra_of_what_was_set(llama):
    peft_model, _ = reshaped(llama)
    spectra = initial_spectra(peft_model)
    assert list(spectra) == ["A", "B"]
    for which, key in enumerate("AB"):
        assert list(spectra[key].values) == list(TYPES)
        for kind, pairs in matrices(peft_model).items():
            found = spectra[key].values[kind] * math.sqrt(3 * (96 if kind == "down" else 64))
            expected = [np.linalg.svd(pair[which], compute_uv=False) for pair in pairs]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
            assert spectra[key].rows[kind] == tuple((layer, None) for layer in range(tiny.LAYERS))
    initialisation.reshape_(peft_model, GROUPS, mode="a_only")
    assert list(initial_spectra(peft_model)) == ["A"]


def test_the_spectra_of_an_adapter_in_bfloat16(llama):
    peft_model, _ = reshaped(llama)
    exact = initial_spectra(peft_model)["A"].values["q"]
    found = initial_spectra(peft_model.to(torch.bfloat16))["A"].values["q"]
    np.testing.assert_allclose(found, exact, rtol=0.01)
