"""Every architecture: the matrices read are the weights of the modules that wrote them."""

import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import save_file

from wdlib import WdlibError
from wdlib.checkpoints.architectures import TensorRole, tensor_role
from wdlib.checkpoints.plan import inventory


def test_a_tensor_name_says_layer_types_and_expert():
    down = tensor_role("model.layers.11.mlp.down_proj.weight")
    assert down == TensorRole("model.layers", 11, "mlp", ("down",))
    joined = "layers.3.self_attn.qkv_proj.weight"
    assert tensor_role(joined) is None
    assert tensor_role(joined, ("phi3",)) == TensorRole("layers", 3, "attention", ("q", "k", "v"))
    expert = tensor_role("model.layers.2.mlp.experts.7.up_proj.weight")
    assert expert == TensorRole("model.layers", 2, "experts", ("up",), 7)
    shared = tensor_role("module.h.0.mlp.shared_expert.up_proj.weight")
    assert shared == TensorRole("module.h", 0, "shared expert", ("up",))
    fused = "transformer.h.1.attn.c_attn.weight"
    assert tensor_role(fused) is None
    joined = TensorRole("transformer.h", 1, "attention", ("q", "k", "v"), transposed=True)
    assert tensor_role(fused, ("gpt2",)) == joined
    query = "blk.5.attn_q.weight"
    assert tensor_role(query, ("llama",)) == TensorRole("blk", 5, "attention", ("q",), rope=True)
    assert tensor_role(query, ("qwen2",)) == TensorRole("blk", 5, "attention", ("q",))
    latent = tensor_role("model.layers.0.self_attn.kv_a_proj_with_mqa.weight")
    assert latent == TensorRole("model.layers", 0, "own", ("kv_a",))
    cross = tensor_role("decoder.block.0.layer.1.EncDecAttention.q.weight")
    assert cross == TensorRole("decoder.block:cross-attention", 0, "cross-attention", ("q",))
    assert tensor_role("lm_head.weight") is None


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "llm.", "thinker.model.", "model.text_model.", "language_model."],
)
def test_a_stack_may_have_any_name(llama, prefix):
    before = tiny.read(llama)
    tiny.rewrite(llama, lambda t: {f"{prefix}{name}": data for name, data in t.items()})
    after = tiny.read(llama)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_matrices_are_the_modules_own_weights(name, saved):
    folder, model = saved(name)
    found, wanted = tiny.read(folder), tiny.own_weights(name, model)
    fused = {"phi3": "qkv gate up", "gpt2": "qkv", "gpt-neox": "qkv"}.get(name, "")
    assert wanted
    for key, matrix in wanted.items():
        np.testing.assert_array_equal(found[key], matrix, err_msg=str(key), strict=True)
    for layer, kind, _ in set(found) - set(wanted):
        assert kind in fused
        assert layer in (0, 1)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt-neox", "llama"])
def test_q_k_v_of_a_fused_tensor_give_the_attentions_own_inputs(name, saved):
    """At position 0 a rotary embedding is the identity: attention gets q = W_q x and so on."""
    folder, model = saved(name)
    found, seen = tiny.read(folder), []

    def probe(module, query, key, value, *_, **__):
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("probe", probe)
    model.set_attn_implementation("probe")
    attention = {"phi3": "qkv_proj", "gpt2": "c_attn", "gpt-neox": "query_key_value"}
    inputs, biases = [], []
    for path, module in model.named_modules():
        if path.endswith(attention.get(name, "q_proj")):
            module.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
            biases.append(module.bias)
    with torch.no_grad():
        model(torch.arange(64)[:, None])
    assert len(inputs) == len(seen) == 2
    assert all(bias is None or not bias.any() for bias in biases)
    for layer, states in enumerate(seen):
        for kind, state in zip("qkv", states, strict=True):
            got = inputs[layer][:, 0].numpy() @ found[layer, kind, None].T
            np.testing.assert_allclose(got, state.flatten(1).numpy(), atol=2e-6, err_msg=kind)


def test_gate_and_up_of_phi3_give_the_activations_own_inputs(saved):
    folder, model = saved("phi3")
    found = tiny.read(folder)
    for layer, block in enumerate(model.model.layers):
        x, seen = torch.randn(40, 32), {}
        hooks = [
            block.mlp.activation_fn.register_forward_hook(
                lambda _, args, out, seen=seen: seen.update(gate=args[0], act=out)
            ),
            block.mlp.down_proj.register_forward_hook(
                lambda _, args, __, seen=seen: seen.update(product=args[0])
            ),
        ]
        with torch.no_grad():
            block.mlp(x)
        for hook in hooks:
            hook.remove()
        gate, up = (x.numpy() @ found[layer, kind, None].T for kind in ("gate", "up"))
        np.testing.assert_allclose(gate, seen["gate"].numpy(), atol=2e-6)
        np.testing.assert_allclose(up * seen["act"].numpy(), seen["product"].numpy(), atol=2e-6)


def test_files_of_meta_and_mistral_pair_the_halves_of_a_head(llama):
    """Their names; the rows of q and k as the conversion to transformers finds them."""
    before = tiny.read(llama)
    leaves = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk"}
    leaves |= {"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo"}
    leaves |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3"}
    leaves |= {"mlp.down_proj": "feed_forward.w2"}

    def consolidate(tensors):
        found = {}
        for name, data in tensors.items():
            _, _, rest = name.partition("model.")
            for theirs, own in leaves.items():
                rest = rest.replace(theirs, own)
            if heads := {"wq": 4, "wk": 2}.get(rest.split(".")[-2] if "." in rest else ""):
                paired = data.reshape(heads, 2, len(data) // heads // 2, -1)
                data = np.ascontiguousarray(paired.swapaxes(1, 2).reshape(data.shape))
            found[rest or name] = data
        return found

    tiny.rewrite(llama, consolidate)
    after = tiny.read(llama)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=str(key))


# Mixtures of experts, as other programs store them -------------------------------------------


def test_experts_in_one_tensor(saved, tmp_path):
    """The layout that transformers has in memory: (expert, gate above up, hidden)."""
    folder, model = saved("qwen3-moe")
    shutil.copy(folder / "config.json", tmp_path)
    save_file(
        {key: value.detach().numpy() for key, value in model.named_parameters()},
        tmp_path / "model.safetensors",
    )
    apart, together = tiny.read(folder), tiny.read(tmp_path)
    assert apart.keys() == together.keys()
    for key in apart:
        np.testing.assert_array_equal(apart[key], together[key])


@pytest.mark.parametrize("name", ["qwen2-moe", "glm4-moe"])
def test_the_shared_expert_counts_as_the_dense_matrix(saved, name):
    entries = inventory(saved(name)[0])
    assert [e.expert for e in entries if e.layer == 0 and e.type == "up"] == [None]
    assert [e.expert for e in entries if e.layer == 1 and e.type == "up"] == [None, 0, 1, 2]


# GGUF ----------------------------------------------------------------------------------------


def test_gguf_equals_what_transformers_loads(tmp_path):
    """llama.cpp reorders the rows of q and k of Llama; both readers must undo it."""
    tensors = tiny.gguf_tensors(0) | tiny.gguf_surroundings(0)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "llama", tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    found = tiny.read(path)
    assert len(found) == 14
    for layer, block in enumerate(model.model.layers):
        for kind, module in tiny.LLAMA_NAMES.items():
            np.testing.assert_array_equal(
                found[layer, kind, None], tiny.as_linear(block.get_submodule(module)), err_msg=kind
            )


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_fused_gguf_equals_what_transformers_loads(architecture, tmp_path):
    """Save what transformers made of the GGUF; the matrices read from both are the same."""
    rng = np.random.default_rng(9)
    shapes = {"attn_qkv": (96, 32), "attn_output": (32, 32), "ffn_up": (128, 32)}
    shapes |= {"ffn_down": (32, 128)}
    settings = {"attention.head_count_kv": 4, "feed_forward_length": 128}
    if architecture == "phi3":
        shapes |= {"attn_qkv": (64, 32), "ffn_up": (256, 32)}
        settings["attention.head_count_kv"] = 2
    tensors = tiny.gguf_surroundings(9) | {
        f"blk.{layer}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for layer in (0, 1)
        for name, shape in shapes.items()
    }
    path = tiny.write_gguf(tmp_path / "tiny.gguf", architecture, tensors, settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "saved")
    ours, theirs = tiny.read(path), tiny.read(tmp_path / "saved")
    assert ours.keys() == theirs.keys()
    assert len(ours) == {"gpt2": 12, "phi3": 14}[architecture]
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=str(key))


def test_gguf_of_other_architectures_keeps_the_order_of_rows(tmp_path):
    tensors = tiny.gguf_tensors(1)
    found = tiny.read(tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2", tensors))
    for layer in (0, 1):
        for kind, name in tiny.GGUF_NAMES.items():
            wanted = tensors[f"blk.{layer}.{name}.weight"]
            np.testing.assert_array_equal(found[layer, kind, None], wanted)


@pytest.mark.parametrize("architecture", ["phi3", "glm4", "chatglm", "plamo2", "plamo3"])
def test_fused_gguf(architecture, tmp_path):
    tensors = tiny.gguf_tensors(2)
    fused = {}
    for n in (0, 1):
        old = {kind: tensors[f"blk.{n}.{name}.weight"] for kind, name in tiny.GGUF_NAMES.items()}
        fused[f"blk.{n}.attn_qkv.weight"] = np.concatenate([old[kind] for kind in "qkv"])
        fused[f"blk.{n}.attn_output.weight"] = old["o"]
        fused[f"blk.{n}.ffn_up.weight"] = np.concatenate([old["gate"], old["up"]])
        fused[f"blk.{n}.ffn_down.weight"] = old["down"]
    found = tiny.read(tiny.write_gguf(tmp_path / "tiny.gguf", architecture, fused))
    for layer in (0, 1):
        for kind, name in tiny.GGUF_NAMES.items():
            wanted = tensors[f"blk.{layer}.{name}.weight"]
            np.testing.assert_array_equal(found[layer, kind, None], wanted)


def test_gate_and_up_joined_where_no_rule_says_so_are_refused(tmp_path):
    tensors = tiny.gguf_tensors(2)
    for n in (0, 1):
        gate, up = tensors.pop(f"blk.{n}.ffn_gate.weight"), f"blk.{n}.ffn_up.weight"
        tensors[up] = np.concatenate([tensors[up], gate])
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "neo-bert", tensors)
    with pytest.raises(WdlibError, match=r"ffn_up\.weight .* 96 rows.* 48 columns: it joins gate"):
        inventory(path)


@pytest.mark.parametrize("form", ["one tensor", "gate and up joined", "a tensor each"])
def test_experts_in_gguf(tmp_path, form):
    rng = np.random.default_rng(3)
    tensors = {k: v for k, v in tiny.gguf_tensors(3).items() if "attn" in k}
    gate, up = rng.standard_normal((2, 3, 24, 32)).astype(np.float32)
    down = rng.standard_normal((3, 32, 24)).astype(np.float32)
    experts = {"gate": gate, "up": up, "down": down}
    for layer in (0, 1):
        block = f"blk.{layer}.ffn_"
        if form == "one tensor":
            tensors |= {f"{block}{kind}_exps.weight": data for kind, data in experts.items()}
            shared = ((kind, data[0]) for kind, data in experts.items())
            tensors |= {f"{block}{kind}_shexp.weight": data for kind, data in shared}
        elif form == "gate and up joined":
            tensors[f"{block}gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
            tensors[f"{block}down_exps.weight"] = down
        else:
            for kind, data in experts.items():
                tensors |= {f"{block}{kind}.{e}.weight": data[e] for e in range(3)}
    found = tiny.read(tiny.write_gguf(tmp_path / "tiny.gguf", "qwen2moe", tensors))
    for kind, data in experts.items():
        for expert in range(3):
            np.testing.assert_array_equal(found[1, kind, expert], data[expert])
        assert ((1, kind, None) in found) == (form == "one tensor")
