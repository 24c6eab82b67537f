"""The adapter in training and as a file: stock peft sees what we do."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny_zoo
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_lora import GROUPS, RANK, SMALL, distance, logits, reshaped, stock, train

from wdlib import WdlibError
from wdlib.lora import initialisation
from wdlib.lora.adapters import LoraSettings, export, load, lora_layers, target_sites

# peft 0.21 asks transformers 5 for an attribute that was renamed; `attach` keeps that to itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_training_changes_the_adapter_alone(llama, batch):
    peft_model, _ = reshaped(llama, "preserved")
    with peft_model.disable_adapter():
        pass
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    train(peft_model, batch)
    after = peft_model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".default." in name}


def test_the_frozen_start_is_not_dropped_out(llama, batch):
    settings = replace(SMALL, dropout=0.5)
    peft_model, _ = initialisation.attach(
        llama, "preserved", characterisation=GROUPS, settings=settings
    )
    for _, layer in lora_layers(peft_model):
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    expected = logits(peft_model, batch)
    peft_model.train()
    with torch.no_grad():
        assert torch.equal(peft_model(**batch).logits, expected)


def test_training_the_preserved_start_is_training_on_an_edited_base(llama, untouched, batch):
    """peft's own way, for PiSSA, is to subtract the start from the base weights."""
    ours, _ = initialisation.attach(llama, "pissa", settings=SMALL)
    config = LoraConfig(
        r=RANK, lora_alpha=12, target_modules=list(SMALL.targets), init_lora_weights="pissa"
    )
    stock = get_peft_model(copy.deepcopy(untouched), config)
    for model in (ours, stock):
        train(model, batch, steps=3)
    assert distance(logits(ours, batch), logits(stock, batch)) < 1e-3


# Export --------------------------------------------------------------------------------------


STOCK = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.from_numpy(np.load(folder + "/ids.npy"))
for name in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder + "/" + name).eval()
    with torch.no_grad():
        np.save(folder + "/" + name + ".npy", model(ids).logits.numpy())
"""


def test_stock_peft_loads_the_export_in_a_fresh_process(untouched, batch, tmp_path):
    untouched.save_pretrained(tmp_path / "base")
    np.save(tmp_path / "ids.npy", batch["input_ids"].numpy())
    expected = {}
    for init in ("literal", "preserved", "pissa"):
        character = None if init == "pissa" else GROUPS
        peft_model, _ = reshaped(copy.deepcopy(untouched), init, character)
        train(peft_model, batch)
        expected[init] = logits(peft_model, batch)
        assert export(peft_model, tmp_path / init) == tmp_path / init
        assert torch.equal(logits(peft_model, batch), expected[init])
        assert sorted(p.name for p in (tmp_path / init).iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        config = json.loads((tmp_path / init / "adapter_config.json").read_text())
        assert config["r"] == (RANK if init == "literal" else 2 * RANK)
        assert (config["peft_type"], config["init_lora_weights"]) == ("LORA", True)
    command = [sys.executable, "-c", STOCK, str(tmp_path), *expected]
    subprocess.run(command, check=True, capture_output=True)
    for init, here in expected.items():
        there = torch.from_numpy(np.load(tmp_path / f"{init}.npy"))
        assert distance(there, here) < 1e-6
        assert distance(there, logits(untouched, batch)) > 1e-2


def test_an_export_replaces_the_one_before(llama, untouched, batch, tmp_path):
    export(reshaped(llama, "preserved")[0], tmp_path)
    peft_model, _ = initialisation.attach(copy.deepcopy(untouched), "default", settings=SMALL)
    train(peft_model, batch)
    export(peft_model, tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    assert torch.equal(logits(again, batch), logits(peft_model, batch))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_refused(name, untouched, tmp_path):
    export(reshaped(copy.deepcopy(untouched), "preserved")[0], tmp_path)
    assert lora_layers(load(copy.deepcopy(untouched), tmp_path))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(WdlibError, match="peft cannot load the adapter"):
        load(copy.deepcopy(untouched), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WdlibError, match=f"lacks {name}"):
        load(untouched, tmp_path)


def test_an_adapter_that_lacks_matrices_is_refused(untouched, tmp_path):
    export(reshaped(copy.deepcopy(untouched), "preserved")[0], tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(iter(tensors))]
    save_file(tensors, path)
    with pytest.raises(WdlibError, match="missing adapter keys"):
        load(copy.deepcopy(untouched), tmp_path)


def test_export_refuses(llama, tmp_path):
    with pytest.raises(WdlibError, match="is no PeftModel"):
        export(llama, tmp_path / "new")
    with pytest.raises(WdlibError, match="use_dora"):
        export(stock(llama, use_dora=True), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("task", "name", "target", "message"),
    [
        ("causal", "deepseek_v3", "q_a_proj", r"q_a_proj is not known as a projection \(q, k"),
        ("image-text", "llava", "q_proj", r"are both q of layer 0, in two stacks of layers"),
    ],
)
def test_targets_are_of_the_seven_types_and_of_one_stack(task, name, target, message):
    model = tiny_zoo.build(task, name)
    with pytest.raises(WdlibError, match=message):
        target_sites(model, LoraSettings(rank=2, targets=(target,)))


def test_targets_of_a_language_model_in_another_have_its_types():
    """The row for a fused tensor is bound to the `model_type` of the language model in it."""
    model = tiny_zoo.build("image-text", "glm4v")
    sites = target_sites(model, LoraSettings(rank=2, targets=("o_proj",)))
    assert [(site.type, site.layer) for site in sites] == [("o", 0), ("o", 1)]
    with pytest.raises(WdlibError, match="joins gate, up in one matrix"):
        target_sites(model, LoraSettings(rank=2, targets=("gate_up_proj",)))
