"""The matrices that are read are those that a network multiplies by, or the test says so."""

from dataclasses import replace

import numpy as np
import pytest
import transformers
from numpy.testing import assert_allclose

from wdlib import WdlibError
from wdlib.checkpoints import attention
from wdlib.checkpoints.stream import projections

SIZE = {"vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2}
SHORT = SIZE | {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64}
LONG = SIZE | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
LONG |= {"num_attention_heads": 4, "pad_token_id": 0}
GROUPED = LONG | {"num_key_value_heads": 2}
NETWORKS = {
    "one tensor each": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED)),
    "fused": (transformers.Phi3ForCausalLM, transformers.Phi3Config(**GROUPED)),
    "fused and transposed": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**SHORT)),
    "by head": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**LONG)),
    "encoder": (transformers.BertForMaskedLM, transformers.BertConfig(**LONG)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    kind, config = NETWORKS[request.param]
    transformers.set_seed(0)
    return kind(config).eval()


@pytest.fixture
def read(network, tmp_path):
    network.save_pretrained(tmp_path)
    return list(projections(tmp_path))


def test_what_is_read_is_what_the_network_computes(network, read):
    assert_allclose(attention.differences(network, read), [0, 0], atol=1e-5)


def test_another_order_is_found_in_every_layer(network, read):
    for order in ("qvk", "kqv"):
        assert (attention.differences(network, read, order=order) > 0.1).all()


def test_one_wrong_matrix_is_found_in_its_layer(network, read):
    spoilt = [
        replace(p, matrix=p.matrix[::-1]) if (p.layer, p.type) == (1, "k") else p for p in read
    ]
    first, second = attention.differences(network, spoilt)
    assert first < 1e-5
    assert second > 0.1


def test_the_network_is_left_as_it_was(network, read):
    before = network.config._attn_implementation
    attention.differences(network, read)
    assert network.config._attn_implementation == before
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_a_layer_that_was_not_read_is_an_error(network, read):
    with pytest.raises(WdlibError, match="1 layers were read and attention was seen in 2"):
        attention.differences(network, [p for p in read if p.layer == 0])
    with pytest.raises(WdlibError, match="0 layers were read"):
        attention.differences(network, [])


def test_matrices_of_another_shape_are_infinitely_far(network, read):
    halves = [replace(p, matrix=p.matrix[: len(p.matrix) // 2]) for p in read]
    assert np.isinf(attention.differences(network, halves)).all()
