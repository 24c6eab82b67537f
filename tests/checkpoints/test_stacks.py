"""Several stacks of layers, layers of several kinds, and types that are none of the seven."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import tiny_zoo

from wdlib import WdlibError
from wdlib.checkpoints import files, plan, stacks
from wdlib.checkpoints.plan import inventory
from wdlib.spectra import jobs, store


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """name -> folder of a tiny model of that type, each made once."""
    made = {}

    def get(task: str, name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("built") / re.sub(r"\W+", "-", name)
            tiny_zoo.build(task, name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.mark.parametrize(
    ("stack", "kind"),
    [
        ("model.layers", "language"),
        ("thinker.model.layers", "language"),
        ("model.decoder.layers", "decoder"),
        ("dec.blk", "decoder"),
        ("bert.encoder.layer", "encoder"),
        ("model.vision_tower.encoder.layers", "vision"),
        ("v.blk", "vision"),
        ("audio_tower.layers", "audio"),
        ("mtp.layers", "prediction"),
        ("qformer.encoder.layer", "connector"),
        ("decoder.block:cross-attention", "cross-attention"),
    ],
)
def test_the_kind_of_a_stack_is_in_its_name(stack, kind):
    assert stacks.kind(stack) == kind


def test_the_decoder_is_read_and_the_encoder_where_it_is_asked_for(built):
    folder = built("seq2seq", "bart")
    for stack, start in (
        (None, "model.decoder.layers"),
        ("decoder", "model.decoder.layers"),
        ("encoder", "model.encoder.layers"),
        ("model.encoder.layers", "model.encoder.layers"),
    ):
        entries = inventory(folder, stack=stack)
        assert len(entries) == 12
        assert all(e.name.startswith(start) and "encoder_attn" not in e.name for e in entries)
    cross = inventory(folder, stack="cross-attention")
    assert [e.type for e in cross] == [*"qkvo"] * 2
    assert all("encoder_attn" in e.name for e in cross)
    message = r"no stack 'vision': its stacks are .*model\.decoder\.layers \(decoder\), .*--stack"
    with pytest.raises(WdlibError, match=message):
        inventory(folder, stack="vision")


def test_spectra_say_which_stack_they_are_of(built, house):
    folder = built("seq2seq", "bart")
    default, encoder = jobs.compute(folder, 4), jobs.compute(folder, 4, stack="encoder")
    assert default.provenance["stack"] == "model.decoder.layers, not cross-attention, encoder"
    assert encoder.provenance["stack"] == "model.encoder.layers, not decoder"
    assert "stack=encoder" in encoder.provenance["made by"]
    assert not np.array_equal(default.values["q"], encoder.values["q"])
    assert "stack" not in jobs.compute(tiny.write_llama(house / "toy"), 4).provenance
    for stack, wanted in ((None, default), ("encoder", encoder), (None, default)):
        np.testing.assert_array_equal(
            jobs.of(folder, 4, stack=stack).values["q"], wanted.values["q"]
        )
    assert len(list((house / "cache" / "spectra").glob("*.safetensors"))) == 2


def test_a_vision_tower_is_read_where_it_is_asked_for(built):
    folder = built("image-text", "llava")
    assert {e.name.split(".")[0] for e in inventory(folder)} == {"language_model"}
    tower = inventory(folder, stack="vision")
    assert all("vision_tower" in e.name for e in tower)
    assert {e.type for e in tower} == {*"qkvo", "up", "down"}


# Types of their own ---------------------------------------------------------------------------


def test_types_of_their_own_take_part_where_they_are_named(built, tmp_path):
    folder = built("causal", "deepseek_v3")
    listed = {entry.type for entry in inventory(folder)}
    assert listed == {"o", "gate", "up", "down", "q_a", "q_b", "kv_a", "kv_b"}
    assert jobs.compute(folder, 4).values.keys() == {"o", "gate", "up", "down"}
    chosen = ("down", "kv_b", "q_a")
    shards = [jobs.compute(folder, 4, types=chosen, shard=(i, 2)) for i in (1, 2)]
    found = jobs.merge(shards)
    assert list(found.values) == ["down", "kv_b", "q_a"]
    tiny.assert_same(store.load(store.save(found, tmp_path / "own.safetensors")), found)
    matrices = tiny.read(folder, types=["q_a"])
    for row, (layer, _) in enumerate(found.rows["q_a"]):
        exact = np.linalg.svd(matrices[layer, "q_a", None].astype(float), compute_uv=False)[:4]
        np.testing.assert_allclose(found.values["q_a"][row], exact, rtol=1e-5)
    with pytest.raises(WdlibError, match=r"'in_proj' .*: give some of q, .*, kv_a, kv_b, q_a, q_b"):
        jobs.compute(folder, 4, types=("in_proj",))


def test_a_model_of_none_of_the_seven_says_so(built):
    folder = built("causal", "mamba")
    with pytest.raises(WdlibError, match=r"no matrix of type q or k .* `checkpoints\.inventory`"):
        jobs.largest_rank(folder)
    assert jobs.compute(folder, 2, types=("in_proj",)).rows["in_proj"] == ((0, None), (1, None))


# Layers of several kinds ----------------------------------------------------------------------


HYBRID = "causal", "bamba"


def test_hybrids_have_fewer_rows_than_layers(built):
    entries = inventory(built(*HYBRID))
    assert {e.layer for e in entries if e.type == "q"} == {1}
    assert {e.layer for e in entries if e.type == "in_proj"} == {0}
    assert {e.layer for e in entries if e.type == "up"} == {0, 1}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (r"layers\.1\.self_attn\.q_proj", "Layer 1 of .* has no q:"),
        (r"layers\.1\.self_attn\.v_proj", "Layer 1 of .* has no v:"),
        (r"layers\.1\.self_attn\.", "Layer 1 of .* has no q:"),
        (r"layers\.0\.mamba\.out_proj", "Layer 0 of .* has no out_proj:"),
        (r"layers\.0\.mamba\.", "Layer 0 of .* has no q:"),
        (r"layers\.0\.feed_forward\.", "Layer 0 of .* has no gate:"),
        (r"layers\.1\.", "no layer 1 of 2"),
    ],
)
def test_what_a_layer_of_a_hybrid_lacks_is_named(built, lost, message, tmp_path):
    folder = shutil.copytree(built(*HYBRID), tmp_path / "hybrid")
    tiny.rewrite(folder, lambda t: {k: v for k, v in t.items() if not re.search(lost, k)})
    with pytest.raises(WdlibError, match=message):
        inventory(folder)


def test_layers_that_share_keys_and_values_are_the_configurations(built, tmp_path):
    folder = shutil.copytree(built("causal", "gemma3n_text"), tmp_path / "shared")
    assert {e.layer for e in inventory(folder) if e.type == "k"} == {0, 1}
    assert {e.layer for e in inventory(folder) if e.type == "q"} == {0, 1, 2, 3}
    config = json.loads((folder / "config.json").read_text())
    config["num_kv_shared_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WdlibError, match="Layer 2 of shared has no k"):
        inventory(folder)


def test_a_router_is_one_only_where_there_are_experts(tmp_path):
    folder = tiny.write_llama(tmp_path / "toy")
    tiny.rewrite(folder, lambda t: {k.replace("gate_proj", "gate"): v for k, v in t.items()})
    with pytest.raises(WdlibError, match=r"mlp\.gate\.weight .* no row names it"):
        inventory(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt2", "glm4_moe", "deepseek_v3", "qwen3_next", "bamba", "jamba", "falcon_h1"),
        *("granitemoehybrid", "gemma4_text, experts", "gpt_oss", "nemotron_h", "kimi_linear"),
    ],
)
def test_no_loss_of_a_tensor_goes_unnoticed(built, name, monkeypatch):
    folder = built("causal", name)
    configuration, tensors = plan.read_headers(files.resolve(folder))
    lost = {entry.name for entry in inventory(folder)}
    assert len(lost) > 6
    unnoticed = set()
    for one in lost:
        left = {name: tensor for name, tensor in tensors.items() if name != one}
        monkeypatch.setattr(plan, "read_headers", lambda _, left=left: (configuration, left))
        try:
            inventory(folder)
        except WdlibError:
            continue
        unnoticed.add(one)
    assert unnoticed == set()
