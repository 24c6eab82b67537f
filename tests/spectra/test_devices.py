"""Singular values by torch: the promises of the CPU's, on each device that there is.

torch's own CPU device stands for the others, so that no line of theirs goes untested where there is
no GPU: as one with fast float64, with slow, and with none, as mps.
"""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_proven, gaussian, planted
from tiny_matrices import SPECTRA, STRUCTURED, M, N

from wdlib import WdlibError
from wdlib.checkpoints import stream
from wdlib.checkpoints.formats import BFLOAT16
from wdlib.checkpoints.plan import projection_parts
from wdlib.spectra import arrays, jobs, kernel
from wdlib.spectra.arrays import NUMPY, Torch
from wdlib.spectra.kernel import SingularValues, top_singular_values

STAND_INS = {  # exact, single_product, and the name it goes by
    "fast float64": (True, False, "cuda"),
    "slow float64": (True, True, "cuda"),
    "no float64": (False, True, "mps"),
}
THERE = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]


@pytest.fixture(params=[*STAND_INS, *THERE])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a device, for which torch's CPU stands in where it is not there."""
    # So that small matrices take the fast method.
    monkeypatch.setattr(Torch, "dense_dimension", NUMPY.dense_dimension)
    if request.param in THERE:
        return request.param
    stand_in = Torch("cpu")
    stand_in.exact, stand_in.single_product, name = STAND_INS[request.param]
    for room in (arrays, jobs):
        monkeypatch.setattr(room, "check_device", lambda device: None)
    monkeypatch.setattr(kernel, "Torch", lambda device: stand_in)
    monkeypatch.setattr(arrays, "own_stream", lambda device: None)
    monkeypatch.setattr("wdlib.spectra.workers.own_stream", lambda device: None)
    return name


@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name: str, device: str) -> None:
    for dtype in (np.float32, np.float64):
        W = planted(N, M, SPECTRA[name]).astype(dtype)
        exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
        for r in (1, 16):
            assert_proven(W, top_singular_values(W, r, device=device), exact)
        assert_proven(W.T, top_singular_values(W.T, 16, device=device), exact)


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_matrices(name: str, device: str) -> None:
    W = STRUCTURED[name].astype(np.float32)
    exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for r in (1, 16):
        assert_proven(W, top_singular_values(W, r, device=device), exact)


def test_flat_matrices_are_answered_by_the_fast_method(device: str) -> None:
    for n, m in ((800, 1000), (850, 850)):
        W = gaussian(n, m)
        exact = np.linalg.svd(W.astype(np.float64), compute_uv=False)
        for r in (1, 16, 20):
            result = top_singular_values(W, r, device=device)
            assert result.method == "gram-lanczos"
            assert_proven(W, result, exact)


def test_tensors_are_taken_in_their_own_type_and_where_they_are(device: str) -> None:
    place = device if device in THERE else "cpu"
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for V in (torch.from_numpy(gaussian(400, 500)), torch.from_numpy(gaussian(500, 400)).T):
            W = V.to(dtype).to(place)
            exact = np.linalg.svd(W.double().cpu().numpy(), compute_uv=False)
            for where in (None, device, "cpu"):
                assert_proven(W.float().cpu(), top_singular_values(W, 16, device=where), exact)
            layer = torch.nn.Linear(2, 2, bias=False)
            layer.weight = torch.nn.Parameter(W)
            assert_proven(W.float().cpu(), top_singular_values(layer.weight, 16), exact)
    whole = torch.arange(12).reshape(3, 4)
    assert_proven(whole, top_singular_values(whole, 2, device=device))


def test_bits_of_bfloat16_are_what_they_say(device: str) -> None:
    W = gaussian(400, 500)
    bits = (W.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
    exact = np.linalg.svd(
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).double().numpy(),
        compute_uv=False,
    )
    for V in (bits, bits.T, bits[::2]):
        known = exact if V.size == W.size else None
        plain = NUMPY.take(V)
        assert_proven(plain, top_singular_values(V, 16, device=device), known)
        assert_proven(plain, top_singular_values(V, 16), known)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_name(bad: float, device: str) -> None:
    for dtype in (np.float16, np.float32, np.float64):
        W = np.ones((400, 500), dtype)
        W[-1, 2] = bad
        with pytest.raises(WdlibError, match=r"tensor blk\.7\.w contains NaN or infinity"):
            top_singular_values(W, 2, device=device, name="tensor blk.7.w")


def test_sizes_beyond_float32(device: str) -> None:
    W = gaussian(400, 500).astype(np.float64)
    for scale in (1e-60, 1e-12, 1e12, 1e200):
        assert_proven(W * scale, top_singular_values(W * scale, 16, device=device))


def spoilt(product: Callable, spoil: Callable) -> Callable:
    return lambda self, *given: spoil(product(self, *given))


SABOTAGE = {
    "too large": lambda G: G * 1.001,
    "too small": lambda G: G * 0.999,
    "zero": lambda G: G * 0,
    "NaN": lambda G: G * torch.nan,
    "negative": lambda G: -G,
    "a row lost": lambda G: G * (torch.arange(len(G), device=G.device) != 7),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_device_cannot_break_the_bound(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Torch, "gram", spoilt(Torch.gram, SABOTAGE[name]))
    for W in (gaussian(N, M), planted(N, M, 1.0 / np.arange(1, N + 1)).astype(np.float32)):
        for r in (1, 16):
            assert_proven(W, top_singular_values(W, r, device=device))


FAILURES = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "memory of mps": RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    "workspace": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling create"),
    "eigenvalues": torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge"),
    "operation": NotImplementedError("'aten::x' is not currently implemented for the MPS device"),
}


@pytest.mark.parametrize("why", FAILURES)
def test_what_a_device_cannot_do_is_done_by_the_cpu(
    why: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise FAILURES[why]

    monkeypatch.setattr(Torch, "largest", fails)
    W = gaussian(N, M)
    with pytest.warns(RuntimeWarning, match=r"cannot compute some matrices \(.*\): the CPU"):
        found = top_singular_values(W, 16, device=device, name="tensor a")
    same(found, top_singular_values(W, 16))
    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        job = jobs.compute(folder, 16, device=device)
    assert len(said) == 1
    known = jobs.compute(folder, 16)
    for t in known.values:
        np.testing.assert_allclose(job.values[t], known.values[t], rtol=2e-5)


def test_a_fault_of_a_device_is_raised(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Torch, "largest", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        top_singular_values(gaussian(N, M), 16, device=device)


def same(one: SingularValues, two: SingularValues) -> None:
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.error, two.error)
    assert one.method == two.method


DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_job_on_a_device(dtype: str, device: str, tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "toy", hidden=336)
    file = folder / "model.safetensors"
    save_file({name: x.to(DTYPES[dtype]) for name, x in load_file(file).items()}, file)
    known, found = jobs.compute(folder, 16), jobs.compute(folder, 16, device=device)
    assert found.rows == known.rows
    for t in known.values:
        off = np.abs(found.values[t] - known.values[t])
        assert np.all(off <= known.error[t] + found.error[t])
    assert f"device={device}" in found.provenance["made by"]
    part = projection_parts(folder)[0]
    stored = stream.read(part, decoded=False).matrix
    assert stored.itemsize == DTYPES[dtype].itemsize
    np.testing.assert_array_equal(NUMPY.take(stored), stream.read(part).matrix)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    folder = tiny.write_llama(tmp_path / "toy")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device, message in [
        ("cuda", "no cuda device on this machine: choose cpu"),
        ("mps", "no mps device"),
        ("gpu", "no device 'gpu': choose one of cpu, cuda, mps"),
    ]:
        with pytest.raises(WdlibError, match=message):
            top_singular_values(gaussian(5, 6), 2, device=device)
        with pytest.raises(WdlibError, match=message):
            jobs.compute(folder, 2, device=device)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WdlibError, match=r"cuda needs torch.* wdlib\[lora\]"):
        arrays.check_device("cuda")


@pytest.mark.skipif(not THERE, reason="needs a device beside the CPU")
def test_threads_may_be_the_first_to_use_a_device() -> None:
    """torch loads its linear algebra for CUDA at first use, and fails where two threads do."""
    program = f"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import numpy as np
from wdlib.spectra import top_singular_values
matrices = np.random.default_rng(0).standard_normal((8, 1100, 1200))
with ThreadPoolExecutor(8) as pool:
    print(len(list(pool.map(partial(top_singular_values, r=16, device={THERE[0]!r}), matrices))))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).stdout == b"8\n"
