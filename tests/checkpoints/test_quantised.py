"""Quantised safetensors: the values of the libraries that write them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wdlib.checkpoints import files, formats, quantised
from wdlib.checkpoints.headers import read_headers

WRITTEN = sorted((Path(__file__).parent / "quantised").glob("*.safetensors"))
"""What the libraries wrote, by write_quantised.py beside this file."""

Stored = Mapping[str, torch.Tensor]


def write(folder: Path, stored: Stored, settings: dict | None = None) -> Path:
    """A checkpoint of these tensors and, if there are settings, a quantization_config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: t.contiguous() for key, t in stored.items()}, folder / "model.safetensors")
    config = {"model_type": "llama"} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def table(folder: Path) -> dict[str, formats.Tensor]:
    return read_headers(files.resolve(folder))[1]


def values(tensor: formats.Tensor) -> np.ndarray:
    """All matrices of a tensor; also read in pieces, which have to agree."""
    *stack, rows, _ = tensor.shape
    matrices = []
    for first in range(0, rows * int(np.prod(stack)), rows):
        whole = quantised.decode(tensor, quantised.read_rows(tensor, first, rows))
        assert whole.dtype == np.float32
        assert whole.flags.c_contiguous
        for start, count in ((0, 1), (rows // 3, rows // 2), (rows - 3, 3)):
            part = quantised.decode(tensor, quantised.read_rows(tensor, first + start, count))
            np.testing.assert_array_equal(part, whole[start : start + count])
        matrices.append(whole)
    return np.concatenate(matrices).reshape(tensor.shape)


def read(folder: Path, stored: Stored, settings: dict | None = None) -> np.ndarray:
    """The matrix "x.weight", which has to be all that there is."""
    found = table(write(folder, stored, settings))
    assert [n for n, t in found.items() if len(t.shape) > 1] == ["x.weight"]
    return values(found["x.weight"])


# Libraries that wrote the files beside this one -----------------------------------------------


def about(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_values_are_those_of_the_library_that_wrote_them(path, tmp_path):
    stored = load_file(path)
    expected = stored.pop("expected")
    found = read(tmp_path, stored, json.loads(about(path)["quantization_config"]))
    rounded = torch.from_numpy(found).to(expected.dtype)
    np.testing.assert_array_equal(rounded.float().numpy(), expected.float().numpy())
    assert np.count_nonzero(found) > found.size / 4


def test_every_library_is_there():
    libraries = {about(path)["library"].split()[0] for path in WRITTEN}
    names = {"bitsandbytes", "compressed-tensors", "nvidia-modelopt", "auto-gptq", "autoawq"}
    assert libraries == names
    assert len(WRITTEN) == 46


def test_packed_integers_need_no_configuration(tmp_path):
    for path in WRITTEN:
        if "-pack-quantized" in path.stem:
            stored = load_file(path)
            expected = stored.pop("expected").float().numpy()
            found = read(tmp_path, stored)
            if "nvfp4" not in path.stem:
                np.testing.assert_array_equal(found, expected)


def test_packed_integers_may_name_the_group_of_each_column(tmp_path):
    """As compressed-tensors wrote it once: here, the groups of scales are turned around."""
    stored, expected, settings = written("compressed-tensors-pack-quantized-4-group")
    stored["x.weight_scale"] = stored["x.weight_scale"].flip(1)
    stored["x.weight_g_idx"] = 2 - torch.arange(96, dtype=torch.int32) // 32
    np.testing.assert_array_equal(read(tmp_path, stored, settings), expected)


# transformers ---------------------------------------------------------------------------------

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", FP8["e4m3"]), ("F8_E5M2", FP8["e5m2"])])
def test_fp8_keeps_every_value(name, dtype):
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    expected = torch.from_numpy(codes).view(dtype).float().numpy()
    np.testing.assert_array_equal(formats.decode(codes, name), expected)
    assert np.signbit(formats.decode(codes, name)[0, 128])


@pytest.mark.parametrize("scales", [(3, 4), (1, 1), (), (1,), (96,), (96, 1), (1, 128)], ids=str)
@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_fp8_is_scaled_as_transformers_does(name, kind, scales, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(1)
    codes, scale = torch.randn(96, 128).to(FP8[kind]), torch.rand(scales) + 0.1
    found = read(tmp_path, {"x.weight": codes, f"x.{name}": scale})
    as_grid = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(scales[0], -1)
    expected = Fp8Dequantize(None)._dequantize_one(codes, as_grid, torch.float32)
    np.testing.assert_array_equal(found, expected.numpy())


def test_experts_in_one_tensor_have_their_own_scales(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = torch.randn(2, 96, 128).to(FP8["e4m3"]), torch.rand(2, 3, 4)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32).numpy()
    name = "x.experts.gate_up_proj"
    found = table(write(tmp_path, {name: codes, f"{name}_scale_inv": scale}))
    np.testing.assert_array_equal(values(found[name]), expected)


def test_blocks_at_the_edge_are_as_large_as_the_configuration_says(tmp_path):
    """DeepSeek-V3 has 576 rows in blocks of 128: five rows of scales."""
    torch.manual_seed(2)
    codes, scale = torch.randn(150, 200).to(FP8["e4m3"]), torch.rand(2, 2)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = read(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scale}, settings)
    wide = scale.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :200]
    np.testing.assert_array_equal(found, (codes.float() * wide).numpy())
    (tmp_path / "config.json").unlink()  # equal blocks of 75 x 100 would fit as well
    assert table(tmp_path)["x.weight"].dtype == "FP8 E4M3 75x100"


def test_fp8_without_scales_is_what_it_is(tmp_path):
    codes = torch.randn(8, 16).to(FP8["e5m2"])
    found = table(write(tmp_path, {"x.weight": codes}))["x.weight"]
    assert found.dtype == "F8_E5M2"
    np.testing.assert_array_equal(values(found), codes.float().numpy())


def test_mxfp4_of_gpt_oss_is_as_transformers_unpacks_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(3)
    blocks = torch.randint(0, 256, (2, 40, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 40, 3), dtype=torch.uint8)
    folder = write(tmp_path, {"x.down_proj_blocks": blocks, "x.down_proj_scales": scales})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    found = table(folder)
    assert list(found) == ["x.down_proj"]
    np.testing.assert_array_equal(values(found["x.down_proj"]), expected)


def test_fp4_and_mxfp8_are_scaled_as_transformers_does(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(4)
    powers = torch.randint(100, 140, (96, 4), dtype=torch.uint8)
    fp4 = torch.randint(-128, 128, (96, 64), dtype=torch.int8)
    fp8 = torch.randn(96, 128).to(FP8["e4m3"])
    for codes, name, scale in (
        (fp4, "scale", powers.view(torch.float8_e8m0fnu)),
        (fp8, "weight_scale_inv", powers),
    ):
        found = read(tmp_path, {"x.weight": codes, f"x.{name}": scale})
        expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
        np.testing.assert_array_equal(found, expected.numpy())


# Versions of GPTQ and AWQ ---------------------------------------------------------------------


def written(name: str) -> tuple[dict[str, torch.Tensor], np.ndarray, dict]:
    path = Path(__file__).parent / "quantised" / f"{name}.safetensors"
    stored = load_file(path)
    settings = json.loads(about(path)["quantization_config"])
    return stored, stored.pop("expected").float().numpy(), settings


ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""What GPTQModel adds to a word of zeros to make the second version of the first."""


@pytest.mark.parametrize("bits", ONES)
@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        {"quant_method": "auto-round", "packing_format": "auto_round"},
        {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"},
    ],
    ids=str,
)
def test_the_second_version_of_gptq_stores_zeros_as_they_are(bits, settings, tmp_path):
    stored, expected, _ = written(f"auto-gptq-gptq-{bits}")
    stored["x.qzeros"] += ONES[bits]
    np.testing.assert_array_equal(read(tmp_path, stored, settings), expected)


def test_a_zero_of_nothing_borrows_in_the_first_version(tmp_path):
    """As GPTQModel subtracts from whole words, and adds to them again."""
    stored, _, settings = written("auto-gptq-gptq-4")
    second = {**settings, "checkpoint_format": "gptq_v2"}
    stored["x.qzeros"] = torch.full_like(stored["x.qzeros"], 0x70503010)
    expected = read(tmp_path / "second", stored, second)
    stored["x.qzeros"] -= ONES[4]
    np.testing.assert_array_equal(read(tmp_path / "first", stored, settings), expected)


def test_awq_of_8_bits_mixes_the_columns_as_its_readers_undo_it(tmp_path):
    """Order of the four codes of a word: 0, 2, 1, 3 (GPTQModel 7.7 and vLLM, for Marlin)."""
    rng = np.random.default_rng(5)
    codes, zeros = rng.integers(0, 256, (64, 32)), rng.integers(0, 256, (2, 32))
    scales = rng.random((2, 32)).astype(np.float16)

    def pack(numbers: np.ndarray) -> torch.Tensor:
        mixed = numbers.reshape(len(numbers), -1, 4)[:, :, [0, 2, 1, 3]].astype(np.uint8)
        return torch.from_numpy(mixed.reshape(len(numbers), -1).copy()).view(torch.int32)

    stored = {"x.qweight": pack(codes), "x.qzeros": pack(zeros), "x.scales": torch.tensor(scales)}
    found = read(tmp_path, stored, {"quant_method": "awq", "bits": 8})
    wide = np.repeat(scales.astype(np.float32), 32, axis=0)
    expected = (codes - np.repeat(zeros, 32, axis=0)).astype(np.float32) * wide
    np.testing.assert_array_equal(found, expected.T)
