"""Which piece of which tensor every matrix is; what is incomplete is refused by name."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import DOWN

from wdlib import TYPES, WdlibError
from wdlib.checkpoints import stream
from wdlib.checkpoints.plan import inventory


def test_inventory_lists_what_is_streamed_in_order(saved):
    for name in tiny.ARCHITECTURES:
        folder, _ = saved(name)
        entries, streamed = inventory(folder), list(stream.projections(folder))
        keys = [
            (e.layer, TYPES.index(e.type), -1 if e.expert is None else e.expert) for e in entries
        ]
        assert keys == sorted(set(keys))
        assert [(e.layer, e.type, e.name, e.shape, e.expert) for e in entries] == [
            (p.layer, p.type, p.name, p.matrix.shape, p.expert) for p in streamed
        ]
        for p in streamed:
            assert p.matrix.dtype == np.float32
            assert p.matrix.flags.c_contiguous
            assert p.matrix.flags.writeable
    assert Counter(e.type for e in inventory(saved("bert")[0])) == dict.fromkeys(
        ("q", "k", "v", "o", "up", "down"), 2
    )


# What is incomplete, or no matrix ------------------------------------------------------------


NAMED_NOWHERE = r"\(seen: .*add rows .* wdlib/checkpoints/lexicon\.py"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != DOWN}, "Layer 1 of llama has no down"),
        (
            lambda t: {k: v for k, v in t.items() if "layers.1." not in k},
            "llama has no layer 1 of 2",
        ),
        (lambda t: {k.replace("q_proj", "qry"): v for k, v in t.items()}, "no row names it"),
        (
            lambda t: {k: v for k, v in t.items() if "0.self_attn.q_" not in k},
            "Layer 0 .* has no q",
        ),
        (lambda t: {k.replace("layers", "part"): v for k, v in t.items()}, NAMED_NOWHERE),
        (lambda t: {k.replace("weight", "qweight"): v for k, v in t.items()}, "how its words are"),
        (lambda t: t | {DOWN: t[DOWN].T.copy()}, f"{re.escape(DOWN)} .* does not fit a hidden"),
        (lambda t: t | {DOWN: t[DOWN].ravel()}, f"{re.escape(DOWN)} .* is no matrix"),
        (lambda t: t | {DOWN.replace("down_proj", "fc2"): t[DOWN]}, "has down twice"),
        (lambda t: t | {f"two.{k}": v for k, v in t.items()}, "several stacks .* by its name"),
    ],
)
def test_names_that_do_not_fit(llama, change, message):
    tiny.rewrite(llama, change)
    with pytest.raises(WdlibError, match=message):
        inventory(llama)


PACKED = {
    "bitsandbytes": lambda q: {"weight": np.zeros((512, 1), np.uint8), "weight.absmax": q[0]},
    "bitsandbytes, stored as float": lambda q: {"weight": q.reshape(-1, 1), "weight.absmax": q[0]},
    "MLX": lambda q: {"weight": q[:, :4].astype(np.uint32), "scales": q[:, :1], "biases": q[:, :1]},
}


@pytest.mark.parametrize("by", PACKED)
def test_quantised_weights_of_another_shape_are_called_so(llama, by):
    def pack(tensors):
        found = {k: v for k, v in tensors.items() if "_proj" not in k}
        for name in tensors.keys() - found.keys():
            packed = PACKED[by](tensors[name])
            found |= {name.replace("weight", end): data for end, data in packed.items()}
        return found

    tiny.rewrite(llama, pack)
    with pytest.raises(WdlibError, match="is not read, because .*: use the unquantised check"):
        inventory(llama)


@pytest.mark.parametrize(
    ("name", "lost", "what"),
    [
        ("mixtral", r"layers\.1\..*experts\.2\.w2", "Layer 1 of moe has no down of expert 2:"),
        ("mixtral", r"layers\.1\..*experts\.2\.", "Layer 1 of moe has no gate of expert 2:"),
        ("mixtral", r".*experts\.1\.", "moe has no expert 1 of 3:"),
        ("mixtral", r"layers\.0\..*experts\.", "Layer 0 of moe has no gate:"),
        ("glm4-moe", r"layers\.1\..*shared_experts\.down", "Layer 1 of moe has no down:"),
        ("glm4-moe", r"layers\.1\..*\.experts\.", "Layer 1 of moe has a shared expert .* alone"),
        ("glm4-moe", r"layers\..*\.experts\.2", "moe holds 2 experts, .* says 3:"),
        ("glm4-moe", r"layers\.0\.mlp\.down", "Layer 0 of moe has no down:"),
    ],
)
def test_what_an_expert_lacks_is_named(saved, tmp_path, name, lost, what):
    folder = Path(shutil.copytree(saved(name)[0], tmp_path / "moe"))
    left_out = re.compile(rf"model\.{lost}.*")
    tiny.rewrite(folder, lambda t: {k: v for k, v in t.items() if not left_out.fullmatch(k)})
    with pytest.raises(WdlibError, match=what):
        inventory(folder)


def test_a_shard_lacks_a_layer(saved, tmp_path):
    saved("llama")[1].save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    kept = {k: v for k, v in table.items() if v != table[DOWN]}
    index.write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(WdlibError, match=r"Layer 1 of .* has no"):
        inventory(tmp_path)


def test_stacks_beyond_the_decoder_are_left_out(llama):
    """Multi-token prediction stores further layers behind the last one."""
    config = json.loads((llama / "config.json").read_text())
    fewer = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    (llama / "config.json").write_text(json.dumps(config | fewer))
    tiny.rewrite(llama, lambda t: t | {"mtp.layers.0.self_attn.q_proj.weight": t[DOWN]})
    assert {e.layer for e in inventory(llama)} == {0}
    (llama / "config.json").write_text(json.dumps({"text_config": fewer}))
    assert {e.layer for e in inventory(llama)} == {0}
    (llama / "config.json").write_text(json.dumps(config | {"text_config": None}))
    assert {e.layer for e in inventory(llama)} == {0, 1}
    tensors, more = tiny.gguf_tensors(10), {"nextn_predict_layers": 1}
    path = tiny.write_gguf(llama / "tiny.gguf", "glm4moe", tensors, more)
    assert {e.layer for e in inventory(path)} == {0}


def test_experts_under_a_name_that_no_row_knows_are_not_passed_over(saved, tmp_path):
    """The shared expert alone would pass for the MLP."""
    saved("glm4-moe")[1].save_pretrained(tmp_path, save_original_format=False)

    tiny.rewrite(tmp_path, lambda t: {k.replace(".experts.", ".several."): t[k] for k in t})
    with pytest.raises(WdlibError, match=r"layers\.1\.mlp\.several\..* no row names it"):
        inventory(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", {"a": 1}),
        ("num_hidden_layers", -2),
        ("num_attention_heads", True),
        ("num_key_value_heads", [2, 2]),
        ("model_type", 3),
    ],
)
def test_a_field_of_another_type_is_refused(llama, field, value):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(WdlibError, match=f"config.json says that {field} is .*has to be"):
        inventory(llama)
