"""Initialisations of LoRA adapters: planted groups, step 0, stock peft, bad input."""

import copy
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    set_seed,
)

from wdlib import TYPES, WdlibError, generator
from wdlib.characterise import Characterisation, Group, Pair, Verdict
from wdlib.checkpoints.architectures import tensor_role
from wdlib.checkpoints.catalogue import DEFAULT
from wdlib.lora import initialisation
from wdlib.lora.adapters import LoraSettings, export, lora_layers
from wdlib.lora.measure import initial_spectra, step0
from wdlib.lora.runs import ADAPTER_INITIALISATIONS, PEFT_INITIALISATIONS

# peft 0.21 asks transformers 5 for an attribute that was renamed; `attach` keeps that to itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK, LAYERS = 8, 6
SMALL = LoraSettings(rank=RANK, alpha=12)
FIRST = "model.layers.0.self_attn.q_proj"


def planted(*groups, alpha=2.5, xmin=1e-3, alone=(), rank=RANK):
    """A characterisation with these groups; all their pairs are power laws, but those `alone`."""
    kinds = [kind for group in groups for kind in group]
    home = {kind: group for group in groups for kind in group}
    pairs = []
    for i, p in enumerate(kinds):
        for q in kinds[i:]:
            tied = home[p] is home[q] and p not in alone
            verdict = Verdict("power-law" if tied else "undecided", 0.1, 0.9, 0.0, 1e-4, 15)
            fit = (alpha, xmin) if tied else (None, None)
            pairs.append(Pair((p, q), verdict, *fit))
    return Characterisation(
        model="planted",
        rank=rank,
        groups=tuple(Group(group[0], tuple(group[1:])) for group in groups),
        pairs=tuple(pairs),
        replicates=1,
        seed=0,
        rule={},
        provenance={},
        made_by="a test",
    )


GROUPS = planted(("q", "k", "v"), ("gate", "up"), ("o",), ("down",), alone=("down",))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}


@pytest.fixture(scope="module")
def pretrained():
    """A Llama of six small layers; tests get copies."""
    set_seed(0)
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=LAYERS
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny(pretrained):
    return copy.deepcopy(pretrained)


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


def reshaped(model, init="literal", character=GROUPS, **options):
    return initialisation.attach(model, init, characterisation=character, settings=SMALL, **options)


def matrices(peft_model):
    """(A, B) in units of A's standard deviation, by type, in the order of layers."""
    found = {kind: [] for kind in TYPES}
    for name, layer in lora_layers(peft_model):
        a, b = (f["default"].weight.detach().numpy() for f in (layer.lora_A, layer.lora_B))
        unit = math.sqrt(3 * layer.in_features)
        found[tensor_role(f"{name}.weight")[1][0]].append((a * unit, b * unit))
    return found


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def snapshot(model):
    """Weights, trainability and names: what a failed call must leave alone."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [(n, p.requires_grad) for n, p in model.named_parameters()], model.training


def assert_untouched(model, before):
    state, flags, training = snapshot(model)
    assert flags == before[1]
    assert training == before[2]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[name], value) for name, value in before[0].items())


def train(peft_model, batch, steps=2):
    peft_model.train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        peft_model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
    peft_model.eval()


# --- names -----------------------------------------------------------------------------------


def test_a_tensor_name_says_layer_types_and_expert():
    assert tensor_role("model.layers.11.mlp.down_proj.weight") == (11, ("down",), None)
    assert tensor_role("layers.3.self_attn.qkv_proj.weight") == (3, ("q", "k", "v"), None)
    expert = "model.layers.2.mlp.experts.7.up_proj.weight"
    assert tensor_role(expert) == (2, ("up",), 7)
    fused = "transformer.h.1.attn.c_attn.weight"
    assert tensor_role(fused) is None
    assert tensor_role(fused, "gpt2") == (1, ("q", "k", "v"), None)
    assert tensor_role("lm_head.weight") is None


# --- templates -------------------------------------------------------------------------------


def template_of(group, found, which):
    """What most of a group's matrices agree on, entry by entry."""
    flat = [pair[which].ravel() for kind in group for pair in found[kind]]
    columns = (np.array([f[i] for f in flat if len(f) > i]) for i in range(max(map(len, flat))))
    return np.array([c[np.isclose(c[:, None], c, rtol=1e-6).sum(axis=1).argmax()] for c in columns])


@pytest.mark.parametrize("group", [("q", "k", "v"), ("gate", "up"), ("o",), ("down",)])
def test_members_are_prefixes_of_one_template_but_for_the_counted_entries(tiny, group):
    peft_model, report = reshaped(tiny)
    found = matrices(peft_model)
    rows = {(row.type, row.layer): row for row in report.projections}
    for which, count in enumerate(("count_a", "count_b")):
        template = template_of(group, found, which)
        new = []
        for kind in group:
            for layer, pair in enumerate(found[kind]):
                flat = pair[which].ravel()
                drawn = ~np.isclose(flat, template[: flat.size], rtol=1e-6)
                assert drawn.sum() == getattr(rows[kind, layer], count)
                new += list(flat[drawn])
        assert np.std(template) == pytest.approx(1, abs=4 / math.sqrt(2 * template.size))
        assert np.std(new) == pytest.approx(1, abs=4 / math.sqrt(2 * len(new)))


def test_groups_and_factors_have_independent_templates(tiny):
    found = matrices(reshaped(tiny)[0])
    flat = [
        template_of(group, found, which)[:256]
        for group in (("q", "k", "v"), ("gate", "up"), ("o",), ("down",))
        for which in (0, 1)
    ]
    for a, b in combinations(flat, 2):
        assert not np.isclose(a, b, rtol=1e-6).any()
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(256)


def test_every_row_of_the_report(tiny):
    peft_model, report = reshaped(tiny, b_scale=0.5)
    assert (report.init, report.reference, report.seed) == ("literal", "planted", 3407)
    assert len(report.projections) == 7 * LAYERS
    home = {"q": "q", "k": "q", "v": "q", "gate": "gate", "up": "gate", "o": "o", "down": "down"}
    for row in report.projections:
        assert row.group == home[row.type]
        assert row.role == ("referenced" if row.type in ("q", "gate", "o", "down") else "member")
        assert row.name == f"model.layers.{row.layer}.{row.name.split('.', 3)[3]}"
        layer = peft_model.get_submodule(f"base_model.model.{row.name}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert row.shape == (len(b), a.shape[1]) == tuple(layer.base_layer.weight.shape)
        assert row.sigma_a == pytest.approx(float(a.detach().std(correction=0)), rel=1e-5)
        assert row.sigma_b == pytest.approx(float(b.detach().std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("b_scale", [0.25, 4.0])
def test_standard_deviations(tiny, b_scale):
    found = matrices(reshaped(tiny, "independent", b_scale=b_scale)[0])
    for which, expected in ((0, 1), (1, b_scale)):
        for kind in TYPES:
            values = np.concatenate([pair[which].ravel() for pair in found[kind]])
            assert np.std(values) == pytest.approx(expected, rel=4 / math.sqrt(2 * values.size))
            assert abs(values.mean()) < 5 * expected / math.sqrt(values.size)


def test_counts_follow_the_medians_of_a_groups_power_laws(tiny, monkeypatch):
    pairs = tuple(
        replace(pair, alpha=value, xmin=value / 1e4)
        for pair, value in zip(planted(("q", "k")).pairs, (3.0, 5.0, 9.0), strict=True)
    )
    character = replace(GROUPS, pairs=pairs, groups=(Group("q", ("k",)), Group("v", ())))
    asked = []

    def record(alpha, xmin, shape):
        asked.append((alpha, xmin, shape))
        return generator.ParetoCounts(2.0, 0.01)

    monkeypatch.setattr(generator, "counts_for", record)
    settings = replace(SMALL, targets=("q_proj", "k_proj", "v_proj"))
    _, report = initialisation.attach(
        tiny, "literal", characterisation=character, settings=settings
    )
    assert {(alpha, xmin) for alpha, xmin, _ in asked} == {(5.0, 5e-4)}
    assert {(8, 64), (64, 8), (32, 8)} <= {shape for _, _, shape in asked}
    lone = [row.count_a for row in report.projections if row.type == "v"]
    mean, deviation = (
        8 * 64 * initialisation.LONE_COUNTS.mean,
        8 * 64 * initialisation.LONE_COUNTS.deviation,
    )
    assert all(abs(count - mean) < 4 * deviation for count in lone)


def test_one_template_for_all_and_none_at_all(tiny, pretrained):
    shared = matrices(reshaped(tiny, "one_template")[0])
    template = template_of(TYPES, shared, 0)
    for kind in TYPES:
        for a, _ in shared[kind]:
            assert np.isclose(a.ravel(), template[: a.size], rtol=1e-6).mean() > 0.5
    own = matrices(reshaped(copy.deepcopy(pretrained), "independent")[0])
    flat = [pair[which].ravel()[:256] for kind in TYPES for pair in own[kind] for which in (0, 1)]
    assert not any(np.isclose(a, b, rtol=1e-6).any() for a, b in combinations(flat, 2))


def test_a_only_has_the_a_of_literal_and_no_b(tiny, pretrained):
    literal = matrices(reshaped(tiny)[0])
    a_only, report = reshaped(copy.deepcopy(pretrained), "a_only")
    for kind, pairs in matrices(a_only).items():
        for (a, b), (expected, _) in zip(pairs, literal[kind], strict=True):
            np.testing.assert_array_equal(a, expected)
            assert not b.any()
    assert all(row.count_b is None and row.sigma_b == 0 for row in report.projections)


def test_the_seed_alone_decides(tiny, pretrained):
    settings = replace(SMALL, targets=("k_proj", "up_proj"))
    state = torch.get_rng_state()
    first = reshaped(tiny, seed=5)[0]
    assert torch.equal(torch.get_rng_state(), state)
    again = matrices(reshaped(copy.deepcopy(pretrained), seed=5)[0])
    other = matrices(reshaped(copy.deepcopy(pretrained), seed=6)[0])
    few, _ = initialisation.attach(
        copy.deepcopy(pretrained), "literal", characterisation=GROUPS, settings=settings, seed=5
    )
    for kind, pairs in matrices(first).items():
        for pair, other_pair in zip(pairs, again[kind], strict=True):
            assert all(map(np.array_equal, pair, other_pair))
        assert not np.isclose(pairs[0][0], other[kind][0][0], rtol=1e-6).any()
    for kind in ("k", "up"):
        for pair, expected in zip(matrices(few)[kind], matrices(first)[kind], strict=True):
            assert all(map(np.array_equal, pair, expected))


def test_a_reference_with_nothing_to_transfer_warns(tiny):
    with pytest.warns(
        initialisation.NothingToTransfer, match="planted.*one template shared by all types"
    ):
        peft_model, _ = reshaped(tiny, character=planted(TYPES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialisation.reshape_(peft_model, planted(TYPES), sharing="one")
        initialisation.reshape_(peft_model, GROUPS)


def test_the_spectra_of_what_was_set(tiny):
    peft_model, _ = reshaped(tiny)
    spectra = initial_spectra(peft_model)
    assert list(spectra) == ["A", "B"]
    for which, key in enumerate("AB"):
        assert list(spectra[key].values) == list(TYPES)
        for kind, pairs in matrices(peft_model).items():
            found = spectra[key].values[kind] * math.sqrt(3 * (96 if kind == "down" else 64))
            expected = [np.linalg.svd(pair[which], compute_uv=False) for pair in pairs]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
            assert spectra[key].rows[kind] == tuple((layer, None) for layer in range(LAYERS))
    initialisation.reshape_(peft_model, GROUPS, variant="a_only")
    assert list(initial_spectra(peft_model)) == ["A"]


def test_the_spectra_of_an_adapter_in_bfloat16(tiny):
    peft_model, _ = reshaped(tiny)
    exact = initial_spectra(peft_model)["A"].values["q"]
    found = initial_spectra(peft_model.to(torch.bfloat16))["A"].values["q"]
    np.testing.assert_allclose(found, exact, rtol=0.01)


# --- step 0 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ADAPTER_INITIALISATIONS)
def test_base_weights_and_function_at_step_0(tiny, pretrained, batch, init):
    character = GROUPS if init not in PEFT_INITIALISATIONS else None
    state = torch.get_rng_state()
    peft_model, report = initialisation.attach(
        tiny,
        init,
        characterisation=character,
        settings=replace(SMALL, dropout=0.1),
        batches=[batch] * 4 if init == "eva" else None,
    )
    assert torch.equal(torch.get_rng_state(), state)
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in peft_model.state_dict().items()
        if "lora_" not in name
    }
    original = pretrained.state_dict()
    assert base.keys() == original.keys()
    assert all(torch.equal(base[name], value) for name, value in original.items())
    trainable = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in peft_model.named_parameters() if ".default." in n}
    assert (report.init, len(report.projections)) == (init, 7 * LAYERS)
    result = step0(peft_model, batch)
    change = distance(logits(peft_model, batch), logits(pretrained, batch))
    assert result.logit_change == pytest.approx(change, rel=1e-5, abs=1e-9)
    keeps = init not in ("literal", "one_template", "independent")
    assert (change <= 1e-5) == keeps
    assert (abs(result.shift) < 1e-5) == keeps


def test_step_0_reports_what_a_merged_model_does(tiny, pretrained, batch):
    peft_model, _ = reshaped(tiny, b_scale=0.3)
    batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    peft_model.train()
    result = step0(peft_model, batch)
    assert peft_model.training
    merged = copy.deepcopy(pretrained)
    for name, layer in lora_layers(peft_model):
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        added = 12 / RANK * b @ a
        weight = merged.get_submodule(name).weight.detach()
        assert result.norms[name] == pytest.approx(float(added.norm() / weight.norm()), rel=1e-4)
        weight += added
    with torch.no_grad():
        before, after = (m(**batch, labels=batch["input_ids"]).loss for m in (pretrained, merged))
    assert result.base_loss == pytest.approx(float(before), rel=1e-6)
    assert result.loss == pytest.approx(float(after), rel=1e-5)
    assert result.shift == result.loss - result.base_loss


def test_step_0_counts_the_labels_it_is_given(tiny, batch):
    peft_model, _ = reshaped(tiny)
    labels = batch["input_ids"].clone()
    labels[:, 5:] = -100
    assert step0(peft_model, {**batch, "labels": labels}).loss != pytest.approx(
        step0(peft_model, batch).loss
    )


def test_step_0_takes_no_account_of_padding(tiny, pretrained, batch):
    peft_model, _ = reshaped(tiny)
    short = {name: value[:, :5] for name, value in batch.items()}
    padded = {**batch, "labels": batch["input_ids"].clone()}
    padded["labels"][:, 5:] = -100
    alone, beside = step0(peft_model, short), step0(peft_model, padded)
    assert beside.logit_change == pytest.approx(alone.logit_change, rel=1e-4)
    assert step0(peft_model, batch).logit_change != pytest.approx(beside.logit_change)


@pytest.fixture(scope="module")
def smollm():
    from wdlib.lora import pretrained

    loaded = pretrained.load(DEFAULT)
    text = "A river rises in the hills, crosses the plain and reaches the sea."
    return loaded.model, dict(loaded.tokenizer(text, return_tensors="pt"))


def test_step_0_of_a_real_model(smollm):
    model, batch = smollm
    character = replace(GROUPS, rank=16)
    before = logits(model, batch)
    peft_model, _ = initialisation.attach(model, "preserved", characterisation=character)
    for variant in initialisation.MODES:
        initialisation.reshape_(peft_model, character, variant=variant)
        result = step0(peft_model, batch)
        change = distance(logits(peft_model, batch), before)
        assert result.logit_change == pytest.approx(change, rel=1e-3, abs=1e-7)
        assert (change <= 1e-5) == (variant != "literal")


# --- peft ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_other_initialisations_are_pefts_own(tiny, pretrained, batch, init):
    ours, _ = initialisation.attach(tiny, init, settings=SMALL, seed=11)
    config = LoraConfig(
        r=RANK,
        lora_alpha=12,
        target_modules=list(SMALL.targets),
        init_lora_weights=True if init == "default" else init,
    )
    torch.manual_seed(11)
    stock = get_peft_model(copy.deepcopy(pretrained), config)
    expected = dict(lora_layers(stock))
    for name, layer in lora_layers(ours):
        for mine, theirs in (
            (layer.lora_A, expected[name].lora_A),
            (layer.lora_B, expected[name].lora_B),
        ):
            assert torch.equal(mine["default"].weight, theirs["default"].weight)
    assert distance(logits(ours, batch), logits(stock, batch)) < 1e-5


def test_eva_keeps_the_rank_of_every_matrix(tiny, batch):
    peft_model, _ = initialisation.attach(tiny, "eva", settings=SMALL, batches=[batch] * 4)
    for _, layer in lora_layers(peft_model):
        a = layer.lora_A["default"].weight.detach()
        assert a.shape[0] == RANK
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-4)


def test_training_changes_the_adapter_alone(tiny, batch):
    peft_model, _ = reshaped(tiny, "preserved")
    with peft_model.disable_adapter():
        pass
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    train(peft_model, batch)
    after = peft_model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".default." in name}


def test_the_frozen_start_is_not_dropped_out(tiny, batch):
    settings = replace(SMALL, dropout=0.5)
    peft_model, _ = initialisation.attach(
        tiny, "preserved", characterisation=GROUPS, settings=settings
    )
    for _, layer in lora_layers(peft_model):
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    expected = logits(peft_model, batch)
    peft_model.train()
    with torch.no_grad():
        assert torch.equal(peft_model(**batch).logits, expected)


def test_training_the_preserved_start_is_training_on_an_edited_base(tiny, pretrained, batch):
    """peft's own way, for PiSSA, is to subtract the start from the base weights."""
    ours, _ = initialisation.attach(tiny, "pissa", settings=SMALL)
    config = LoraConfig(
        r=RANK, lora_alpha=12, target_modules=list(SMALL.targets), init_lora_weights="pissa"
    )
    stock = get_peft_model(copy.deepcopy(pretrained), config)
    for model in (ours, stock):
        train(model, batch, steps=3)
    assert distance(logits(ours, batch), logits(stock, batch)) < 1e-3


def test_reshaping_again_replaces_the_start(tiny, pretrained, batch):
    peft_model, _ = initialisation.attach(tiny, "pissa", settings=SMALL)
    initialisation.reshape_(peft_model, GROUPS, variant="preserved", seed=1)
    assert distance(logits(peft_model, batch), logits(pretrained, batch)) < 1e-5
    initialisation.reshape_(peft_model, GROUPS, variant="literal")
    assert list(peft_model.peft_config) == ["default"]
    fresh = reshaped(copy.deepcopy(pretrained))[0]
    assert torch.equal(logits(peft_model, batch), logits(fresh, batch))


def test_half_precision_weights_have_float32_adapters(tiny, batch):
    before = copy.deepcopy(tiny).bfloat16()
    peft_model, _ = reshaped(tiny.bfloat16(), "preserved")
    adapters = {n: p for n, p in peft_model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert torch.equal(logits(peft_model, batch), logits(before, batch))
    train(peft_model, batch, steps=1)
    assert not torch.equal(logits(peft_model, batch), logits(before, batch))


def test_other_architectures(batch):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0)).eval()
    before = logits(gpt2, batch)
    settings = replace(SMALL, targets=("attn.c_proj", "c_fc", "mlp.c_proj"))
    peft_model, report = initialisation.attach(
        gpt2, "preserved", characterisation=GROUPS, settings=settings
    )
    assert [row.type for row in report.projections] == ["o", "up", "down"] * 2
    assert distance(logits(peft_model, batch), before) < 1e-5
    encoder = BertModel(
        BertConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4), add_pooling_layer=False
    )
    settings = replace(SMALL, targets=("query", "intermediate.dense"))
    peft_model, report = initialisation.attach(
        encoder, "literal", characterisation=planted(("q",), ("up",)), settings=settings
    )
    assert [(row.type, row.layer) for row in report.projections] == [
        ("q", 0), ("up", 0), ("q", 1), ("up", 1),
    ]  # fmt: skip
    with pytest.raises(WdlibError, match="a BertModel has no loss of its own"):
        step0(peft_model, batch)


# --- round trip ------------------------------------------------------------------------------

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


def test_stock_peft_loads_the_export_in_a_fresh_process(pretrained, batch, tmp_path):
    pretrained.save_pretrained(tmp_path / "base")
    np.save(tmp_path / "ids.npy", batch["input_ids"].numpy())
    expected = {}
    for init in ("literal", "preserved", "pissa"):
        character = None if init == "pissa" else GROUPS
        peft_model, _ = reshaped(copy.deepcopy(pretrained), init, character)
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
        assert distance(there, logits(pretrained, batch)) > 1e-2


def test_an_export_replaces_the_one_before(tiny, pretrained, batch, tmp_path):
    export(reshaped(tiny, "preserved")[0], tmp_path)
    peft_model, _ = initialisation.attach(copy.deepcopy(pretrained), "default", settings=SMALL)
    train(peft_model, batch)
    export(peft_model, tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(pretrained), tmp_path)
    assert torch.equal(logits(again, batch), logits(peft_model, batch))


# --- bad input -------------------------------------------------------------------------------


def quantised(model):
    """As GPTQ keeps it: a linear layer without a weight."""

    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))

    model.model.layers[3].mlp.up_proj = Packed()


def eight_bit(model):
    """As bitsandbytes keeps it: a weight of integers."""
    packed = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.weight = packed


ATTACH = {
    "unknown init": ("literel", {}, "no initialisation 'literel' .did you mean 'literal'"),
    "no characterisation": ("literal", {"characterisation": None}, "needs the characterisation"),
    "not one": ("literal", {"characterisation": {"q": 1}}, "a dict is no characterisation"),
    "missing target": (
        "default",
        {"settings": replace(SMALL, targets=("q_proj", "qproj"))},
        "no module 'qproj' .did you mean 'q_proj'",
    ),
    "no target": ("default", {"settings": replace(SMALL, targets=())}, "nothing to adapt"),
    "no projection": (
        "pissa",
        {"settings": replace(SMALL, targets=("q_proj", "lm_head"))},
        "lm_head is not known as a projection",
    ),
    "a block": ("olora", {"settings": replace(SMALL, targets=("mlp",))}, "mlp is not known"),
    "rank and reference": (
        "preserved",
        {"characterisation": replace(GROUPS, rank=16)},
        "rank 8 and the characterisation of planted was made at rank 16",
    ),
    "rank too large": (
        "default",
        {"settings": replace(SMALL, rank=40)},
        "rank 40 exceeds the smaller dimension of model.layers.0.self_attn.k_proj: 32",
    ),
    "rank 0": ("default", {"settings": replace(SMALL, rank=0)}, "rank 0"),
    "encoder": (
        "literal",
        {"characterisation": planted(("q", "k", "v", "o", "up"), ("down",))},
        "planted has no gate",
    ),
    "b_scale": ("literal", {"b_scale": math.nan}, "b_scale is a number from 0 up, not nan"),
    "no counts": (
        "literal",
        {"settings": replace(SMALL, rank=1), "characterisation": replace(GROUPS, rank=1)},
        "no counts for",
    ),
    "seed": ("literal", {"seed": -1}, "a seed is a number from 0 up, not -1"),
    "eva": ("eva", {}, "give it batches"),
    "odd rank": ("orthogonal", {"settings": replace(SMALL, rank=7)}, "even rank, not 7"),
}


@pytest.mark.parametrize("case", ATTACH)
def test_attach_refuses(tiny, case):
    init, options, message = ATTACH[case]
    before = snapshot(tiny)
    with pytest.raises(WdlibError, match=message):
        initialisation.attach(
            tiny, init, **{"characterisation": GROUPS, "settings": SMALL, **options}
        )
    assert_untouched(tiny, before)


@pytest.mark.parametrize(
    ("pack", "message"),
    [(quantised, "up_proj holds no weight"), (eight_bit, "q_proj holds weights of torch.int8")],
)
def test_attach_refuses_quantised_layers(tiny, pack, message):
    pack(tiny)
    before = snapshot(tiny)
    with pytest.raises(WdlibError, match=f"{message} and is quantised"):
        initialisation.attach(tiny, "default", settings=SMALL)
    assert_untouched(tiny, before)


def test_attach_refuses_joined_projections():
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 1, "pad_token_id": 0}
    phi = Phi3ForCausalLM(Phi3Config(**SIZES, **sizes))
    with pytest.raises(WdlibError, match="qkv_proj joins q, k, v"):
        initialisation.attach(phi, "default", settings=replace(SMALL, targets=("qkv_proj",)))


def test_attach_refuses_a_model_with_an_adapter(tiny):
    peft_model, _ = initialisation.attach(tiny, "default", settings=SMALL)
    for model in (peft_model, tiny):
        with pytest.raises(WdlibError, match="already has an adapter"):
            initialisation.attach(model, "default", settings=SMALL)


def stock(model, adapter="default", **options):
    settings = {"r": RANK, "target_modules": ["q_proj", "up_proj"], **options}
    return get_peft_model(model, LoraConfig(**settings), adapter_name=adapter)


def with_packed_base(model):
    peft_model = stock(model)
    eight_bit_layer = dict(lora_layers(peft_model))[FIRST].base_layer
    packed = torch.zeros(64, 64, dtype=torch.int8)
    eight_bit_layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return peft_model


def merged(model):
    peft_model = stock(model)
    peft_model.merge_adapter()
    return peft_model


RESHAPE = {
    "plain model": (lambda m: m, {}, "a LlamaForCausalLM is no PeftModel"),
    "variant": (stock, {"variant": "preserve"}, "no variant 'preserve' .did you mean 'preserved'"),
    "sharing": (stock, {"sharing": "all"}, "no sharing 'all': choose one of groups, one, none"),
    "rank": (lambda m: stock(m, r=4), {}, "rank 4 and the characterisation"),
    "dora": (lambda m: stock(m, use_dora=True), {}, "the adapter uses use_dora"),
    "ranks": (lambda m: stock(m, rank_pattern={"q_proj": 4}), {}, "rank_pattern"),
    "bias": (lambda m: stock(m, bias="lora_only"), {}, "the adapter uses bias"),
    "name": (lambda m: stock(m, "mine"), {}, "no LoRA adapter of peft's default name"),
    "edited": (lambda m: stock(m, init_lora_weights="pissa"), {}, "'pissa' has edited the base"),
    "embedding": (
        lambda m: stock(m, target_modules=["q_proj", "embed_tokens"]),
        {},
        "embed_tokens is not known as a projection",
    ),
    "quantised": (with_packed_base, {}, f"{FIRST} holds weights of torch.int8"),
    "merged": (merged, {}, "is merged"),
    "b_scale": (stock, {"b_scale": -1.0}, "b_scale"),
}


@pytest.mark.parametrize("case", RESHAPE)
def test_reshape_refuses(tiny, case):
    make, options, message = RESHAPE[case]
    model = make(tiny)
    before = snapshot(model)
    with pytest.raises(WdlibError, match=message):
        initialisation.reshape_(model, GROUPS, **options)
    assert_untouched(model, before)


def test_a_failure_while_drawing_leaves_the_start(tiny, monkeypatch):
    peft_model, _ = reshaped(tiny, "preserved")
    before = snapshot(peft_model)

    def fail(*arguments, **options):
        raise WdlibError("no template")

    monkeypatch.setattr(generator, "template", fail)
    with pytest.raises(WdlibError, match="no template"):
        initialisation.reshape_(peft_model, GROUPS)
    assert_untouched(peft_model, before)


def test_export_refuses(tiny, tmp_path):
    with pytest.raises(WdlibError, match="is no PeftModel"):
        export(tiny, tmp_path / "new")
    with pytest.raises(WdlibError, match="use_dora"):
        export(stock(tiny, use_dora=True), tmp_path / "new")
    assert not (tmp_path / "new").exists()
