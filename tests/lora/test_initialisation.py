"""Initialisations of LoRA adapters: planted groups, step 0, stock peft, bad input."""

import copy
import math
import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny_lora import (
    GROUPS,
    RANK,
    SMALL,
    assert_untouched,
    distance,
    logits,
    matrices,
    reshaped,
    snapshot,
    stock,
    train,
)
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from wdlib import TYPES, WdlibError, generator
from wdlib.characterise import Group
from wdlib.lora import initialisation
from wdlib.lora.adapters import lora_layers
from wdlib.lora.measure import step0
from wdlib.lora.runs import ADAPTER_INITIALISATIONS, PEFT_INITIALISATIONS

# peft 0.21 asks transformers 5 for an attribute that was renamed; `attach` keeps that to itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FIRST = "model.layers.0.self_attn.q_proj"


# Templates -----------------------------------------------------------------------------------


def template_of(group, found, which):
    """What most of a group's matrices agree on, entry by entry."""
    flat = [pair[which].ravel() for kind in group for pair in found[kind]]
    columns = (np.array([f[i] for f in flat if len(f) > i]) for i in range(max(map(len, flat))))
    return np.array([c[np.isclose(c[:, None], c, rtol=1e-6).sum(axis=1).argmax()] for c in columns])


@pytest.mark.parametrize("group", [("q", "k", "v"), ("gate", "up"), ("o",), ("down",)])
def test_members_are_prefixes_of_one_template_but_for_the_counted_entries(llama, group):
    peft_model, report = reshaped(llama)
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


def test_groups_and_factors_have_independent_templates(llama):
    found = matrices(reshaped(llama)[0])
    flat = [
        template_of(group, found, which)[:256]
        for group in (("q", "k", "v"), ("gate", "up"), ("o",), ("down",))
        for which in (0, 1)
    ]
    for a, b in combinations(flat, 2):
        assert not np.isclose(a, b, rtol=1e-6).any()
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(256)


def test_every_row_of_the_report(llama):
    peft_model, report = reshaped(llama, b_scale=0.5)
    assert (report.init, report.reference, report.seed) == ("literal", "planted", 3407)
    assert len(report.projections) == 7 * tiny.LAYERS
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
def test_standard_deviations(llama, b_scale):
    found = matrices(reshaped(llama, "independent", b_scale=b_scale)[0])
    for which, expected in ((0, 1), (1, b_scale)):
        for kind in TYPES:
            values = np.concatenate([pair[which].ravel() for pair in found[kind]])
            assert np.std(values) == pytest.approx(expected, rel=4 / math.sqrt(2 * values.size))
            assert abs(values.mean()) < 5 * expected / math.sqrt(values.size)


def test_counts_follow_the_medians_of_a_groups_power_laws(llama, monkeypatch):
    pairs = tuple(
        replace(pair, alpha=value, xmin=value / 1e4)
        for pair, value in zip(
            tiny.characterisation(("q", "k")).pairs, (3.0, 5.0, 9.0), strict=True
        )
    )
    character = replace(GROUPS, pairs=pairs, groups=(Group("q", ("k",)), Group("v", ())))
    asked = []

    def record(alpha, xmin, shape):
        asked.append((alpha, xmin, shape))
        return generator.ParetoCounts(2.0, 0.01)

    monkeypatch.setattr(generator, "counts_for", record)
    settings = replace(SMALL, targets=("q_proj", "k_proj", "v_proj"))
    _, report = initialisation.attach(
        llama, "literal", characterisation=character, settings=settings
    )
    assert {(alpha, xmin) for alpha, xmin, _ in asked} == {(5.0, 5e-4)}
    assert {(8, 64), (64, 8), (32, 8)} <= {shape for _, _, shape in asked}
    lone = [row.count_a for row in report.projections if row.type == "v"]
    mean, deviation = (
        8 * 64 * initialisation.LONE_COUNTS.mean,
        8 * 64 * initialisation.LONE_COUNTS.deviation,
    )
    assert all(abs(count - mean) < 4 * deviation for count in lone)


def test_one_template_for_all_and_none_at_all(llama, untouched):
    shared = matrices(reshaped(llama, "one_template")[0])
    template = template_of(TYPES, shared, 0)
    for kind in TYPES:
        for a, _ in shared[kind]:
            assert np.isclose(a.ravel(), template[: a.size], rtol=1e-6).mean() > 0.5
    own = matrices(reshaped(copy.deepcopy(untouched), "independent")[0])
    flat = [pair[which].ravel()[:256] for kind in TYPES for pair in own[kind] for which in (0, 1)]
    assert not any(np.isclose(a, b, rtol=1e-6).any() for a, b in combinations(flat, 2))


def test_a_only_has_the_a_of_literal_and_no_b(llama, untouched):
    literal = matrices(reshaped(llama)[0])
    a_only, report = reshaped(copy.deepcopy(untouched), "a_only")
    for kind, pairs in matrices(a_only).items():
        for (a, b), (expected, _) in zip(pairs, literal[kind], strict=True):
            np.testing.assert_array_equal(a, expected)
            assert not b.any()
    assert all(row.count_b is None and row.sigma_b == 0 for row in report.projections)


def test_the_seed_alone_decides(llama, untouched):
    settings = replace(SMALL, targets=("k_proj", "up_proj"))
    state = torch.get_rng_state()
    first = reshaped(llama, seed=5)[0]
    assert torch.equal(torch.get_rng_state(), state)
    again = matrices(reshaped(copy.deepcopy(untouched), seed=5)[0])
    other = matrices(reshaped(copy.deepcopy(untouched), seed=6)[0])
    few, _ = initialisation.attach(
        copy.deepcopy(untouched), "literal", characterisation=GROUPS, settings=settings, seed=5
    )
    for kind, pairs in matrices(first).items():
        for pair, other_pair in zip(pairs, again[kind], strict=True):
            assert all(map(np.array_equal, pair, other_pair))
        assert not np.isclose(pairs[0][0], other[kind][0][0], rtol=1e-6).any()
    for kind in ("k", "up"):
        for pair, expected in zip(matrices(few)[kind], matrices(first)[kind], strict=True):
            assert all(map(np.array_equal, pair, expected))


def test_a_reference_with_nothing_to_transfer_warns(llama):
    with pytest.warns(
        initialisation.NothingToTransfer, match="planted.*one template shared by all types"
    ):
        peft_model, _ = reshaped(llama, character=tiny.characterisation(TYPES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialisation.reshape_(peft_model, tiny.characterisation(TYPES), sharing="one")
        initialisation.reshape_(peft_model, GROUPS)


# The model that it starts from ---------------------------------------------------------------


@pytest.mark.parametrize("init", ADAPTER_INITIALISATIONS)
def test_base_weights_and_function_at_step_0(llama, untouched, batch, init):
    character = GROUPS if init not in PEFT_INITIALISATIONS else None
    state = torch.get_rng_state()
    peft_model, report = initialisation.attach(
        llama,
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
    original = untouched.state_dict()
    assert base.keys() == original.keys()
    assert all(torch.equal(base[name], value) for name, value in original.items())
    trainable = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in peft_model.named_parameters() if ".default." in n}
    assert (report.init, len(report.projections)) == (init, 7 * tiny.LAYERS)
    result = step0(peft_model, batch)
    change = distance(logits(peft_model, batch), logits(untouched, batch))
    assert result.logit_change == pytest.approx(change, rel=1e-5, abs=1e-9)
    keeps = init not in ("literal", "one_template", "independent")
    assert (change <= 1e-5) == keeps
    assert (abs(result.shift) < 1e-5) == keeps


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_other_initialisations_are_pefts_own(llama, untouched, batch, init):
    ours, _ = initialisation.attach(llama, init, settings=SMALL, seed=11)
    config = LoraConfig(
        r=RANK,
        lora_alpha=12,
        target_modules=list(SMALL.targets),
        init_lora_weights=True if init == "default" else init,
    )
    torch.manual_seed(11)
    stock = get_peft_model(copy.deepcopy(untouched), config)
    expected = dict(lora_layers(stock))
    for name, layer in lora_layers(ours):
        for mine, theirs in (
            (layer.lora_A, expected[name].lora_A),
            (layer.lora_B, expected[name].lora_B),
        ):
            assert torch.equal(mine["default"].weight, theirs["default"].weight)
    assert distance(logits(ours, batch), logits(stock, batch)) < 1e-5


def test_eva_keeps_the_rank_of_every_matrix(llama, batch):
    peft_model, _ = initialisation.attach(llama, "eva", settings=SMALL, batches=[batch] * 4)
    for _, layer in lora_layers(peft_model):
        a = layer.lora_A["default"].weight.detach()
        assert a.shape[0] == RANK
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-4)


def test_reshaping_again_replaces_the_start(llama, untouched, batch):
    peft_model, _ = initialisation.attach(llama, "pissa", settings=SMALL)
    initialisation.reshape_(peft_model, GROUPS, mode="preserved", seed=1)
    assert distance(logits(peft_model, batch), logits(untouched, batch)) < 1e-5
    initialisation.reshape_(peft_model, GROUPS, mode="literal")
    assert list(peft_model.peft_config) == ["default"]
    fresh = reshaped(copy.deepcopy(untouched))[0]
    assert torch.equal(logits(peft_model, batch), logits(fresh, batch))


def test_half_precision_weights_have_float32_adapters(llama, batch):
    before = copy.deepcopy(llama).bfloat16()
    peft_model, _ = reshaped(llama.bfloat16(), "preserved")
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
        BertConfig(**tiny.SIZES, num_hidden_layers=2, num_attention_heads=4),
        add_pooling_layer=False,
    )
    settings = replace(SMALL, targets=("query", "intermediate.dense"))
    peft_model, report = initialisation.attach(
        encoder,
        "literal",
        characterisation=tiny.characterisation(("q",), ("up",)),
        settings=settings,
    )
    assert [(row.type, row.layer) for row in report.projections] == [
        ("q", 0), ("up", 0), ("q", 1), ("up", 1),
    ]  # fmt: skip
    with pytest.raises(WdlibError, match="a BertModel has no loss of its own"):
        step0(peft_model, batch)


# Bad input -----------------------------------------------------------------------------------


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
        {"characterisation": tiny.characterisation(("q", "k", "v", "o", "up"), ("down",))},
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
def test_attach_refuses(llama, case):
    init, options, message = ATTACH[case]
    before = snapshot(llama)
    with pytest.raises(WdlibError, match=message):
        initialisation.attach(
            llama, init, **{"characterisation": GROUPS, "settings": SMALL, **options}
        )
    assert_untouched(llama, before)


@pytest.mark.parametrize(
    ("pack", "message"),
    [(quantised, "up_proj holds no weight"), (eight_bit, "q_proj holds weights of torch.int8")],
)
def test_attach_refuses_quantised_layers(llama, pack, message):
    pack(llama)
    before = snapshot(llama)
    with pytest.raises(WdlibError, match=f"{message} and is quantised"):
        initialisation.attach(llama, "default", settings=SMALL)
    assert_untouched(llama, before)


def test_attach_refuses_joined_projections():
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 1, "pad_token_id": 0}
    phi = Phi3ForCausalLM(Phi3Config(**tiny.SIZES, **sizes))
    with pytest.raises(WdlibError, match="qkv_proj joins q, k, v"):
        initialisation.attach(phi, "default", settings=replace(SMALL, targets=("qkv_proj",)))


def test_attach_refuses_a_model_with_an_adapter(llama):
    peft_model, _ = initialisation.attach(llama, "default", settings=SMALL)
    for model in (peft_model, llama):
        with pytest.raises(WdlibError, match="already has an adapter"):
            initialisation.attach(model, "default", settings=SMALL)


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
    "mode": (stock, {"mode": "preserve"}, "no mode 'preserve' .did you mean 'preserved'"),
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
    "merged": (merged, {}, "has rank 8 and is merged: give a model"),
    "b_scale": (stock, {"b_scale": -1.0}, "b_scale"),
}


@pytest.mark.parametrize("case", RESHAPE)
def test_reshape_refuses(llama, case):
    make, options, message = RESHAPE[case]
    model = make(llama)
    before = snapshot(model)
    with pytest.raises(WdlibError, match=message):
        initialisation.reshape_(model, GROUPS, **options)
    assert_untouched(model, before)


def test_a_failure_while_drawing_leaves_the_start(llama, monkeypatch):
    peft_model, _ = reshaped(llama, "preserved")
    before = snapshot(peft_model)

    def fail(*arguments, **options):
        raise WdlibError("no template")

    monkeypatch.setattr(generator, "template", fail)
    with pytest.raises(WdlibError, match="no template"):
        initialisation.reshape_(peft_model, GROUPS)
    assert_untouched(peft_model, before)


def test_olora_on_conv1d_is_refused():
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "bos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0)).eval()
    settings = replace(SMALL, targets=("attn.c_proj",))
    with pytest.raises(WdlibError, match="takes the transpose of Conv1D layers"):
        initialisation.attach(gpt2, "olora", settings=settings)


@pytest.mark.parametrize("init", ["default", "preserved", "eva"])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_keeps_its_mode(init, training, llama, batch):
    given = {"preserved": {"characterisation": GROUPS}, "eva": {"batches": [batch]}}.get(init, {})
    settings = replace(SMALL, dropout=0.5)
    peft_model, _ = initialisation.attach(llama.train(training), init, settings=settings, **given)
    assert {module.training for module in peft_model.modules()} == {training}
