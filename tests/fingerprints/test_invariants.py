"""What stays when weights are rewritten, and what does not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file
from scipy.stats import ortho_group

from wdlib import WdlibError
from wdlib.checkpoints import vectors
from wdlib.fingerprints import gauge, invariants
from wdlib.fingerprints.gauge import Layer

HEADS, GROUPS, SIZE, WIDTH, NEURONS = 6, 2, 5, 24, 40


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def layer(rng):
    shapes = {"q": (HEADS * SIZE, WIDTH), "k": (GROUPS * SIZE, WIDTH), "v": (GROUPS * SIZE, WIDTH)}
    shapes |= {"o": (WIDTH, HEADS * SIZE), "gate": (NEURONS, WIDTH), "up": (NEURONS, WIDTH)}
    shapes |= {"down": (WIDTH, NEURONS)}
    matrices = {t: rng.standard_normal(shape).astype(np.float32) for t, shape in shapes.items()}
    return Layer(0, None, matrices, HEADS, GROUPS)


def heads(matrix):
    """Rows by head."""
    return matrix.reshape(-1, SIZE, matrix.shape[1])


def test_the_values_are_those_of_the_matrices_and_products(layer):
    found, W = invariants.of_layer(layer, rank=4), layer.matrices
    assert list(found) == list(invariants.GROUPS)
    for g in range(GROUPS):
        own = slice(g * HEADS // GROUPS, (g + 1) * HEADS // GROUPS)
        queries, outputs = heads(W["q"])[own], heads(W["o"].T)[own]
        for kind, ends, middle in (("qk", queries, W["k"]), ("ov", outputs, W["v"])):
            product = np.concatenate([end.T @ heads(middle)[g] for end in ends])
            exact = np.linalg.svd(product.astype(np.float64), compute_uv=False)[:4]
            assert_allclose(found[kind][g], exact, rtol=1e-5)
    lengths = np.linalg.norm(W["up"], axis=1), np.linalg.norm(W["down"], axis=0)
    shared = np.sqrt(lengths[0] * lengths[1])
    assert_allclose(found["neurons"][0], np.sort(shared)[::-1][:4], rtol=1e-5)
    balanced = W["up"] * (shared / lengths[0])[:, None]
    assert_allclose(found["up"][0], np.linalg.svd(balanced, compute_uv=False)[:4], rtol=1e-5)
    assert_allclose(found["gate"][0], np.linalg.svd(W["gate"], compute_uv=False)[:4], rtol=1e-5)


def neurons_permuted(W, rng):
    order = rng.permutation(NEURONS)
    return {"gate": W["gate"][order], "up": W["up"][order], "down": W["down"][:, order]}


def neurons_scaled(W, rng):
    scale = rng.uniform(0.1, 10, NEURONS)
    return {"up": W["up"] * scale[:, None], "down": W["down"] / scale}


def values_and_output_mixed(W, rng):
    v, o = heads(W["v"]).copy(), heads(W["o"].T).copy()
    for g in range(GROUPS):
        M = rng.standard_normal((SIZE, SIZE))
        v[g] = M @ v[g]
        for h in range(g * 3, g * 3 + 3):
            o[h] = np.linalg.inv(M).T @ o[h]
    return {"v": v.reshape(W["v"].shape), "o": o.reshape(W["o"].T.shape).T}


def queries_and_keys_mixed(W, rng):
    q, k = heads(W["q"]).copy(), heads(W["k"]).copy()
    for g in range(GROUPS):
        M = rng.standard_normal((SIZE, SIZE))
        k[g] = M @ k[g]
        for h in range(g * 3, g * 3 + 3):
            q[h] = np.linalg.inv(M).T @ q[h]
    return {"q": q.reshape(W["q"].shape), "k": k.reshape(W["k"].shape)}


def heads_permuted(W, rng):
    order = np.concatenate([g * 3 + rng.permutation(3) for g in range(GROUPS)])
    q, o = heads(W["q"])[order], heads(W["o"].T)[order]
    return {"q": q.reshape(W["q"].shape), "o": o.reshape(W["o"].T.shape).T}


def basis_rotated(W, rng):
    R = ortho_group.rvs(WIDTH, random_state=rng)
    ends = ("o", "down")
    return {t: R @ M if t in ends else M @ R.T for t, M in W.items()}


REWRITTEN = (
    neurons_permuted, neurons_scaled, values_and_output_mixed, queries_and_keys_mixed,
    heads_permuted, basis_rotated,
)  # fmt: skip


@pytest.mark.parametrize("change", REWRITTEN)
def test_rewriting_leaves_them(layer, rng, change):
    before = invariants.of_layer(layer, rank=5)
    changed = {t: M.astype(np.float32) for t, M in change(layer.matrices, rng).items()}
    after = invariants.of_layer(replace(layer, matrices=layer.matrices | changed), rank=5)
    for kind in invariants.GROUPS:
        assert_allclose(after[kind], before[kind], rtol=1e-3)
    for t in changed:
        plain = [np.linalg.svd(M[t], compute_uv=False) for M in (layer.matrices, changed)]
        moved = not np.allclose(*plain, rtol=1e-3)
        assert moved == (
            change in (neurons_scaled, values_and_output_mixed, queries_and_keys_mixed)
        )


def test_what_changes_the_function_moves_them(layer):
    before = invariants.of_layer(layer)
    for t, moved in {"gate": ["gate"], "q": ["qk"], "v": ["ov"]}.items():
        scaled = replace(layer, matrices=layer.matrices | {t: 1.1 * layer.matrices[t]})
        after = invariants.of_layer(scaled)
        kinds = [kind for kind in before if not np.allclose(before[kind], after[kind], rtol=1e-3)]
        assert kinds == moved


def test_what_is_normalised_afterwards_has_no_length(layer, rng):
    normed = replace(layer, normed=frozenset("qk") | {"o", "down"})
    W = layer.matrices
    factors = np.repeat(rng.uniform(0.5, 2, HEADS), SIZE)[:, None]
    changed = {"q": W["q"] * factors, "k": 3 * W["k"], "o": 0.1 * W["o"], "down": 7 * W["down"]}
    after = invariants.of_layer(replace(normed, matrices=W | changed))
    for kind, values in invariants.of_layer(normed).items():
        assert_allclose(after[kind], values, rtol=1e-5)


def test_a_layer_without_heads_or_gate_has_fewer_kinds(layer):
    W = {t: M for t, M in layer.matrices.items() if t != "gate"}
    assert list(invariants.of_layer(Layer(0, None, W))) == ["up", "down", "neurons"]
    assert list(invariants.of_layer(Layer(0, None, {"q": W["q"], "k": W["k"]}, 6, 2))) == ["qk"]


def test_neurons_that_are_zero_stay_zero(layer):
    W = layer.matrices | {"up": np.zeros_like(layer.matrices["up"])}
    assert invariants.of_layer(replace(layer, matrices=W))["up"].max() == 0


def test_experts_count_in_any_order_and_the_largest_are_kept(layer, rng):
    def collected(order):
        collector = invariants.Collector()
        collector.add(layer)
        for number, size in enumerate(order):
            gate = {"gate": layer.matrices["gate"] * np.float32(size)}
            collector.add(Layer(0, number, gate))
        return collector.spectra()["gate"]

    one, two = collected(range(1, 12)), collected(rng.permutation(range(1, 12)))
    assert len(one.layers) == 1 + invariants.EXPERTS
    assert_allclose(one.values, two.values)
    assert_allclose(one.values[1] / one.values[0], 11, rtol=1e-5)


# From files ------------------------------------------------------------------------------------


def norms(count, names, rng):
    return {
        f"model.layers.{layer}.{name}.weight": rng.uniform(0.5, 2, 32).astype(np.float32)
        for layer in range(count)
        for name in names
    }


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_weights_that_move_between_a_norm_and_its_matrices_change_nothing(tmp_path, rng, kind):
    names = {"llama": ("input_layernorm", "post_attention_layernorm")}
    names["gemma3_text"] = ("input_layernorm", "pre_feedforward_layernorm")
    before, mlp = names[kind]
    folder = tiny.write_llama(tmp_path / "one")
    (path,) = folder.glob("*.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    around = norms(2, {*names[kind], "post_attention_layernorm", "post_feedforward_layernorm"}, rng)
    if kind == "llama":
        around = {n: v for n, v in around.items() if "feedforward" not in n}
    centre = np.float32(kind != "llama")
    weights = load_file(path) | around
    moved = dict(weights)
    for name, M in weights.items():
        block = before if "self_attn" in name and "o_proj" not in name else mlp
        if M.ndim == 2 and "o_proj" not in name and "down_proj" not in name and "layers" in name:
            norm = f"{name.split('.self_attn')[0].split('.mlp')[0]}.{block}.weight"
            moved[name] = M * (weights[norm] + centre)
    for name in around:
        if name.split(".")[3] in (before, mlp):
            moved[name] = np.full(32, 1, np.float32) - centre
    found = []
    for place, tensors in {"one": weights, "two": moved}.items():
        (tmp_path / place).mkdir(exist_ok=True)
        save_file(tensors, tmp_path / place / path.name)
        (tmp_path / place / "config.json").write_text(json.dumps(config))
        found.append(list(gauge.layers(tmp_path / place)))
    for one, two in zip(*found, strict=True):
        assert (one.layer, one.heads, one.kv_heads) == (two.layer, two.heads, two.kv_heads)
        assert one.kv_heads
        for t, M in one.matrices.items():
            assert_allclose(two.matrices[t], M, rtol=1e-5)
    assert found[0][0].normed == (frozenset({"o", "down"}) if centre else frozenset())


def test_the_matrices_are_shown_as_they_are_stored(tmp_path, rng):
    folder = tiny.write_llama(tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path) | norms(2, ["input_layernorm"], rng)
    save_file(weights, path)
    seen = {}

    def on_matrix(projection):
        seen[projection.name] = projection.matrix.copy()

    layers = list(gauge.layers(folder, on_matrix=on_matrix))
    for name, matrix in seen.items():
        assert_allclose(matrix, weights[name])
    scale = weights["model.layers.1.input_layernorm.weight"]
    name = "model.layers.1.{}.weight"
    for t, inner in (("q", "self_attn.q_proj"), ("up", "mlp.up_proj")):  # one norm is before both
        assert_allclose(layers[1].matrices[t], weights[name.format(inner)] * scale)
    assert_allclose(layers[1].matrices["o"], weights[name.format("self_attn.o_proj")])


def test_a_scale_of_no_dimension_beside_a_matrix_is_no_norm(tmp_path):
    folder = tiny.write_llama(tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    before = [layer.matrices["q"] for layer in gauge.layers(folder)]
    scale = {"model.layers.0.self_attn.q_proj.input_scale": np.array(7, np.float32)}
    save_file(load_file(path) | scale, path)
    for one, two in zip(before, gauge.layers(folder), strict=True):
        assert_allclose(two.matrices["q"], one)


def test_the_embedding_is_found_and_missed_by_name(tmp_path):
    folder = tiny.write_llama(tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    save_file(load_file(path) | {"model.embed_tokens.weight": table}, path)
    assert_allclose(vectors.embedding(folder), table)
    assert_allclose(vectors.embedding(folder, rows=3), table[:3])
    weights = {n: M for n, M in load_file(path).items() if "embed" not in n}
    save_file(weights, path)
    with pytest.raises(WdlibError, match="no tensor with the name of an embedding"):
        vectors.embedding(folder)
