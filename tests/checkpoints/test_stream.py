"""Checkpoint -> stream of matrices: only what is asked for, one in memory at a time."""

import tracemalloc

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Quant

from wdlib import WdlibError
from wdlib.checkpoints import stream
from wdlib.checkpoints.plan import inventory


def test_only_what_is_asked_for_is_read(saved, monkeypatch):
    folder, _ = saved("llama")
    reads, real = [], stream.read_rows
    monkeypatch.setattr(stream, "read_rows", lambda *args: reads.append(args) or real(*args))
    got = [(p.layer, p.type) for p in stream.projections(folder, layers=[1], types=("down", "q"))]
    assert got == [(1, "q"), (1, "down")]
    assert len(reads) == 2
    assert list(stream.projections(saved("gpt2")[0], types=["gate"])) == []
    with pytest.raises(WdlibError, match="no layer 2: its layers are 0 to 1"):
        stream.projections(folder, layers=[1, 2])
    with pytest.raises(WdlibError, match="no projection type 'query'"):
        stream.projections(folder, types=["query"])


def test_fused_tensors_are_read_by_their_rows(saved, monkeypatch):
    rows, real = [], stream.read_rows
    monkeypatch.setattr(
        stream, "read_rows", lambda t, first, n: rows.append((first, n)) or real(t, first, n)
    )
    list(stream.projections(saved("phi3")[0], layers=[0]))
    assert rows == [(0, 32), (32, 16), (48, 16), (0, 32), (0, 48), (48, 48), (0, 32)]


def test_one_matrix_in_memory_at_a_time(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
    tiny.model(layers=2, **sizes).to(torch.bfloat16).save_pretrained(tmp_path)
    largest = 4 * 256 * 512
    total = sum(4 * e.shape[0] * e.shape[1] for e in inventory(tmp_path))
    tracemalloc.start()
    for projection in stream.projections(tmp_path):
        del projection
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest < total / 2


def test_truncated_after_the_header_was_read(llama):
    matrices = stream.projections(llama, types=["down"])
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(WdlibError, match=r"ends inside the tensor model\.layers\.0\.mlp\.down"):
        list(matrices)


# Requantised ---------------------------------------------------------------------------------


def test_requantising_is_what_gguf_does_and_keeps_the_rest():
    matrix = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    before = stream.Projection(3, "up", "some.weight", matrix)
    after = stream.requantise(before, "Q4_1")
    kind = Quant.Q4_1
    expected = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
    np.testing.assert_array_equal(after.matrix, expected)
    assert (after.layer, after.type, after.name) == (3, "up", "some.weight")
    again = stream.requantise(after, "Q4_1").matrix
    step = np.ptp(matrix.reshape(-1, 32), axis=1).max() / 15
    assert 0 < np.abs(after.matrix - matrix).max() < 0.52 * step
    assert np.abs(again - after.matrix).max() < 0.01 * step


@pytest.mark.parametrize(("columns", "kind"), [(33, "Q4_1"), (64, "Q4_K"), (64, "nonsense")])
def test_requantising_refuses_what_cannot_be_stored(columns, kind):
    p = stream.Projection(0, "q", "some.weight", np.zeros((2, columns), np.float32))
    with pytest.raises(WdlibError, match=f"some.weight.*{kind}"):
        stream.requantise(p, kind)
