"""Two checkpoints: planted relatives are found, models made apart are not."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file
from scipy import stats

from wdlib.fingerprints import independence
from wdlib.fingerprints.independence import Place, compare, layer_test

N, D, LAYERS = 96, 32, 3


def rng(seed=0):
    return np.random.default_rng(seed)


def mlp(seed, n=N, d=D):
    draw = rng([seed, 5])
    return {
        name: draw.standard_normal((n, d)).astype(np.float32) for name in ("gate", "up", "down")
    }


def judged(a, b, **options):
    return layer_test(a, b, rng=rng(), **options)


def noisy(rows, strength, seed=1):
    return {
        name: x + strength * rng([seed, i]).standard_normal(x.shape).astype(np.float32)
        for i, (name, x) in enumerate(rows.items())
    }


# One layer against another ---------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "share"), [(0, 1), (0.3, 1), (0.6, 0.9), (1.0, 0.5)])
def test_a_noisy_copy_is_found_by_order_and_by_agreement(strength, share):
    found = judged(mlp(0), noisy(mlp(0), strength))
    assert found.share >= share
    assert found.in_place >= share
    assert max(found.log10_order, found.log10_agreement) < -20
    assert found.log10_spearman < -5


def test_permuted_rescaled_and_turned_neurons_agree_and_are_not_in_place():
    order, scales = rng(1).permutation(N), rng(2).uniform(0.2, 5, (N, 1)).astype(np.float32)
    signs = rng(3).choice([-1, 1], (N, 1)).astype(np.float32)
    a = mlp(0)
    b = {"gate": a["gate"], "up": a["up"] * scales * signs, "down": a["down"] / scales * signs}
    found = judged(a, {name: rows[order] for name, rows in b.items()})
    assert found.share == 1
    assert found.log10_agreement < -60
    assert found.log10_order > -2
    assert found.log10_spearman < -50


def test_one_matrix_trained_anew_leaves_two_that_agree():
    order = rng(1).permutation(N)
    b = {name: rows[order] for name, rows in (mlp(0) | {"up": mlp(1)["up"]}).items()}
    found = judged(mlp(0), b)
    assert found.pair == ("gate", "down")
    assert found.share == 1
    assert found.log10_spearman > -3
    lost = judged(mlp(0), b | {"down": mlp(1)["down"]})
    assert lost.log10_agreement > -3


def test_unrelated_layers_are_rejected_as_often_as_the_level_says():
    found = [judged(mlp(i, n=40), mlp(1000 + i, n=40)) for i in range(300)]
    for kind in ("log10_order", "log10_chance"):
        count = sum(getattr(one, kind) <= np.log10(0.05) for one in found)
        assert count <= stats.binom.ppf(0.999, len(found), 0.05)
    assert np.mean([one.in_place for one in found]) < 3 / 40
    assert sum(one.log10_agreement <= np.log10(0.05) for one in found) == 0


@pytest.mark.parametrize("a_is_small", [True, False])
def test_a_layer_of_half_the_neurons_is_found_in_the_whole(a_is_small):
    whole = mlp(0)
    half = {name: rows[::2] for name, rows in noisy(whole, 0.2).items()}
    found = judged(half, whole) if a_is_small else judged(whole, half)
    assert (found.neurons, found.share) == (N // 2, 1)
    assert np.isnan(found.in_place)
    assert max(found.log10_agreement, found.log10_order) < -30
    order = rng(1).permutation(N // 2)
    mixed = {name: rows[order] for name, rows in half.items()}
    mixed = judged(mixed, whole) if a_is_small else judged(whole, mixed)
    assert mixed.log10_agreement < -30
    assert mixed.log10_order > -2


def test_only_a_sample_of_many_neurons_is_matched(monkeypatch):
    monkeypatch.setattr(independence, "TESTED", 20)
    found = judged(mlp(0), noisy(mlp(0), 0.1))
    assert (found.neurons, found.share, found.in_place) == (20, 1, 1)
    chance = np.log10(3) - np.log10(np.arange(N - 19, N + 1)).sum()
    assert found.log10_chance == pytest.approx(chance)


def test_neurons_that_any_two_models_share_prove_nothing():
    """A tenth may agree as they are, half after a rotation; chance alone would give neither."""
    a, other = mlp(0), mlp(1)
    for alignment, kept in (("none", 10), ("rotation", 60)):
        some = {name: np.concatenate([x[:kept], other[name][kept:]]) for name, x in a.items()}
        found = judged(a, some, alignment=alignment)
        assert found.share == pytest.approx(kept / N, abs=0.05)
        assert found.log10_chance < -5
        assert found.log10_agreement > -1
    assert judged(a, some).log10_agreement < -10
    assert judged(a, a, alignment="rotation").log10_agreement < -8


def test_without_a_gate_signs_count():
    a = {name: rows for name, rows in mlp(0).items() if name != "gate"}
    assert judged(a, a).pair == ("up", "down")
    assert judged(a, a).share == 1
    turned = {"up": -a["up"], "down": -a["down"]}
    assert judged(a, turned).share < 0.2


# Two checkpoints -------------------------------------------------------------------------------


def tensors(seed, *, layers=LAYERS, d=D, n=N, tokens=400):
    """A Llama of random weights by type and layer, its embedding under "embedding"."""
    draw, sizes = rng([seed, 3]), tiny.shapes(d, n)
    made = {
        (layer, kind): draw.standard_normal(shape).astype(np.float32)
        for layer in range(layers)
        for kind, shape in sizes.items()
    }
    return made | {"embedding": draw.standard_normal((tokens, d)).astype(np.float32)}


def written(folder, made):
    """A checkpoint of them, as transformers writes one."""
    layers = 1 + max(key[0] for key in made if key != "embedding")
    d = made["embedding"].shape[1]
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": d}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    named = {tiny.llama_name(*key): W for key, W in made.items() if key != "embedding"}
    named["model.embed_tokens.weight"] = made["embedding"]
    save_file(
        {name: np.ascontiguousarray(W) for name, W in named.items()}, folder / "model.safetensors"
    )
    return folder


def in_another_basis(made, turn):
    """The same function, its hidden states multiplied by an orthogonal matrix (d, d)."""
    ends = ("o", "down")
    return {
        key: turn.T @ W if key != "embedding" and key[1] in ends else W @ turn
        for key, W in made.items()
    }


def permuted(made, seed=4):
    """The same function, the neurons of every layer in another order."""
    found = dict(made)
    for layer in {key[0] for key in made if key != "embedding"}:
        order = rng([seed, layer]).permutation(len(made[layer, "up"]))
        for kind in ("gate", "up"):
            found[layer, kind] = made[layer, kind][order]
        found[layer, "down"] = made[layer, "down"][:, order]
    return found


def pairs(found):
    return [(one.a.layer, one.b.layer) for one in found.layers]


def test_a_copy_is_related_and_a_model_made_apart_is_not(tmp_path):
    a, b = written(tmp_path / "a", tensors(0)), written(tmp_path / "b", tensors(1))
    same = compare(a, a)
    assert (same.a, same.b, same.untested) == ("a", "a", ())
    assert pairs(same) == [(0, 0), (1, 1), (2, 2)]
    assert same.places_a == same.places_b == (Place(0), Place(1), Place(2))
    np.testing.assert_array_equal(same.screen.argmax(axis=1), [0, 1, 2])
    assert same.screen.diagonal().min() == 1 > 0.3 > same.screen[0, 1]
    assert same.cka == pytest.approx(1)
    assert same.log10_p < -100
    assert same.is_related
    assert same.log10_fisher < -100
    assert "in their places" in same.finding
    apart = compare(a, b)
    assert apart.log10_p > -2
    assert apart.is_related is False
    assert apart.finding.startswith("Nothing shows that a and b are related (p = ")
    assert abs(apart.cka) < 0.1
    assert apart.log10_fisher > -3
    assert "embeddings do not align" in apart.untested[0]


def test_a_copy_in_a_rotated_basis_with_permuted_neurons_is_found(tmp_path):
    turn = stats.ortho_group.rvs(D, random_state=rng(9)).astype(np.float32)
    a = written(tmp_path / "a", tensors(0))
    b = written(tmp_path / "b", permuted(in_another_basis(tensors(0), turn)))
    found = compare(b, a)
    assert {one.alignment for one in found.layers} == {"rotation"}
    assert found.log10_agreement < -7
    assert found.log10_order > -2
    assert found.is_related
    assert found.finding == (
        "b and a are related: 3 of 3 layers, 100 % of the neurons matched, in another order "
        "(p = 1e-7)"
    )
    assert found.alignments["rotation"] == pytest.approx(1, abs=1e-3)
    kept = compare(a, written(tmp_path / "c", in_another_basis(tensors(0), turn)))
    assert kept.log10_order < -100


def test_permuted_axes_and_neurons_are_found_and_attention_is_alike(tmp_path):
    turn = np.eye(D, dtype=np.float32)[rng(6).permutation(D)] * rng(7).choice([-1, 1], D)
    a = written(tmp_path / "a", tensors(0))
    b = written(tmp_path / "b", permuted(in_another_basis(tensors(0), turn.astype(np.float32))))
    found = compare(a, b)
    assert {one.alignment for one in found.layers} == {"axes"}
    assert found.log10_agreement < -7
    assert found.cka == pytest.approx(1)


def test_layers_left_out_are_found_by_their_own(tmp_path):
    whole = tensors(0, layers=4)
    part = {"embedding": whole["embedding"]} | {
        (i, kind): whole[layer, kind]
        for i, layer in enumerate((1, 3))
        for kind in tiny.shapes(D, N)
    }
    a, b = written(tmp_path / "a", part), written(tmp_path / "b", whole)
    found = compare(a, b)
    assert pairs(found) == [(0, 1), (1, 3)]
    assert found.cka == pytest.approx(1)
    back = compare(b, a)
    assert {(1, 0), (3, 1)} <= set(pairs(back))
    assert back.is_related


def test_half_the_width_is_found_with_the_vocabulary(tmp_path):
    whole, kept = tensors(0), rng(2).permutation(D)[: D // 2]
    narrow = {}
    for key, W in whole.items():
        ends = key != "embedding" and key[1] in ("o", "down")
        narrow[key] = W[kept] if ends else W[:, kept]
    found = compare(written(tmp_path / "a", narrow), written(tmp_path / "b", whole))
    assert {one.alignment for one in found.layers} == {"axes"}
    assert found.is_related
    assert found.cka > 0.9


def test_what_cannot_be_tested_is_said(tmp_path):
    a = written(tmp_path / "a", tensors(0))
    other = compare(a, written(tmp_path / "b", tensors(1, d=24)))
    assert other.is_related is None
    assert np.isnan([other.log10_p, other.cka, other.log10_order]).all()
    assert other.layers == ()
    assert other.finding == "a and b cannot be compared neuron by neuron"
    assert "the widths differ, 32 and 24" in other.untested[0]
    assert "attention: hidden states of other widths" in other.untested[1]


def test_without_an_embedding_models_of_one_width_are_compared_as_they_are(tmp_path):
    a = written(tmp_path / "a", tensors(0))
    tiny.rewrite(written(tmp_path / "b", tensors(0)), lambda t: {
        name: W for name, W in t.items() if "embed" not in name
    })  # fmt: skip
    found = compare(a, tmp_path / "b")
    assert found.is_related
    assert list(found.alignments) == ["none"]
    assert "an embedding is lacking" in found.untested[0]


def test_experts_are_places_of_their_own(tmp_path):
    mixture = tiny.write_mixture(tmp_path / "mixture")
    found = compare(mixture, mixture)
    assert {place.expert for place in found.places_a} == {None, 0, 1, 2}
    assert found.is_related
