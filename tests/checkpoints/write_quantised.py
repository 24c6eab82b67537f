"""Matrices as quantisers store them, with the values that their own libraries give: fixtures.

Run once, in an environment of its own, which the tests do not need:

    pip install torch transformers bitsandbytes==0.50.2 compressed-tensors==0.20.0 loguru
    pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.7.post3
    pip install nvidia-modelopt==0.47.0
    python tests/checkpoints/write_quantised.py tests/checkpoints/quantised

Each file holds the tensors of one matrix "x.weight" as stored, "expected" beside them, and in its
metadata what wrote it and the quantization_config. Values that a library gives in half precision
are expected in it: the reader's are rounded to it before they are compared.
"""

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS, GROUP = 32, 96, 32
Case = tuple[str, str, dict[str, torch.Tensor], dict, torch.Tensor]
"""Name, library, tensors as stored, quantization_config, expected values."""


def weight(columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(ROWS, columns) * 0.02


def bitsandbytes() -> Iterator[Case]:
    """With 100 columns, so that blocks of 64 go on in the next row.

    Not with 96: where rows are a multiple of 16 and not of the block, version 0.50.2's kernel for
    processors takes the scale of another block, as its own portable function shows.
    """
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                codes, state = functional.quantize_4bit(
                    weight(100).to(dtype), quant_type=kind, compress_statistics=nested
                )
                stored = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
                name = f"{kind}{'-nested' * nested}-{str(dtype).removeprefix('torch.')}"
                values = functional.dequantize_4bit(codes, state)
                yield name, "bitsandbytes", {"weight": codes, **stored}, {}, values
    codes, state = functional.quantize_4bit(torch.randn(128, 192), compress_statistics=True)
    stored = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    values = functional.dequantize_4bit(codes, state)  # with more than one block of scales
    yield "fp4-nested-large", "bitsandbytes", {"weight": codes, **stored}, {}, values
    codes, scales, _ = functional.int8_vectorwise_quant(weight().half())
    stored = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    yield "int8", "bitsandbytes", stored, {}, functional.int8_vectorwise_dequant(codes, scales)


def scales_of(dtype: str, **how) -> dict[str, torch.Tensor]:
    """Made-up scales and zeros for a way to quantise, as compressed-tensors shapes them."""
    shape = {
        "tensor": (1,),
        "channel": (ROWS, 1),
        "group": (ROWS, COLUMNS // how.get("group_size", 1)),
        "tensor_group": (ROWS, COLUMNS // 16),
        "block": tuple(
            -(-n // b)
            for n, b in zip((ROWS, COLUMNS), how.get("block_structure", (1, 1)), strict=True)
        ),
    }[how["strategy"]]
    bits = how["num_bits"]
    scales = {"weight_scale": (torch.rand(shape) + 0.5) * 0.1 / 2**bits}
    if dtype == "powers":
        scales["weight_scale"] = 2.0 ** torch.randint(-12, -6, shape)
    if dtype == "fp8":
        scales["weight_scale"] = (torch.rand(shape) * 50 + 10).to(torch.float8_e4m3fn).float()
        scales["weight_global_scale"] = torch.tensor([3000.0])
    if not how.get("symmetric", True):
        half = 2 ** (bits - 1)
        scales["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    return scales


def compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group, block = {"strategy": "group", "group_size": GROUP}, {"strategy": "block"}
    channel, per_tensor = {"strategy": "channel"}, {"strategy": "tensor"}
    ways = [
        ("pack-quantized", "", {"num_bits": bits, "type": "int", "symmetric": even, **how})
        for bits in (2, 3, 4, 8)
        for even, how in ((True, group), (False, group), (True, channel))
    ]
    blocks = [{**block, "block_structure": size} for size in ([16, 16], [24, 40])]
    ways += [
        ("float-quantized", "", {"num_bits": 8, "type": "float", **how})
        for how in (per_tensor, channel, *blocks)
    ]
    ways += [
        ("int-quantized", "", {"num_bits": 8, "type": "int", "symmetric": even, **how})
        for even, how in ((True, per_tensor), (True, channel), (False, channel))
    ]
    four, eight = {"num_bits": 4, "type": "float"}, {"num_bits": 8, "type": "float"}
    ways += [
        ("nvfp4-pack-quantized", "fp8", {**four, "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", "powers", {**four, **group}),
        ("mxfp8-quantized", "powers", {**eight, **group, "scale_dtype": "torch.uint8"}),
    ]
    for format, dtype, how in ways:
        compressor = BaseCompressor.get_value_from_registry(format)
        arguments = QuantizationArgs(**how)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        stored = compressor.compress({"weight": weight(), **scales_of(dtype, **how)}, scheme)
        stored = {key: value for key, value in stored.items() if value is not None}
        values = compressor.decompress(dict(stored), scheme)["weight"]
        groups = {"group_0": {"weights": json.loads(arguments.model_dump_json())}}
        settings = {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}
        parts = [how["strategy"], *(str(n) for n in how.get("block_structure", ()))]
        zeros = "" if how.get("symmetric", True) else "-zeros"
        name = f"{format}-{how['num_bits']}-{'-'.join(parts)}{zeros}"
        yield name, "compressed-tensors", stored, settings, values


def modelopt() -> Iterator[Case]:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    made, scale, factor = NVFP4QTensor.quantize(weight(), 16)
    values = made.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
    stored = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": factor}
    stored["input_scale"] = torch.tensor(0.5)
    yield "nvfp4", "nvidia-modelopt", stored, {"quant_method": "modelopt"}, values


def grid(values: torch.Tensor, bits: int, groups: torch.Tensor, *, even: bool) -> tuple:
    """Scales and zeros (outputs, groups) for round-to-nearest codes of so many bits."""
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = values[:, groups == group]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        if even:
            high = torch.maximum(high, -low)
            low = -high
        scales.append((high - low) / (2**bits - 1))
        zeros.append(torch.full_like(low, 2 ** (bits - 1)) if even else -low / scales[-1])
    return torch.stack(scales, 1), torch.stack(zeros, 1).round()


def auto_gptq() -> Iterator[Case]:
    # The package itself cannot be imported beside a recent transformers; this file of it can.
    folder = Path(importlib.util.find_spec("auto_gptq").submodule_search_locations[0])
    file = folder / "nn_modules" / "qlinear" / "qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for bits in (2, 3, 4, 8):
        for even, ordered in ((True, False), (False, False), (False, True)):
            groups = torch.arange(COLUMNS) // GROUP
            if ordered:
                groups = groups[torch.randperm(COLUMNS)]
            linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            linear.weight.data = weight().half()
            scales, zeros = grid(linear.weight.data.float(), bits, groups, even=even)
            layer = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False)
            layer.pack(linear, scales.half(), zeros.half(), groups.int())
            stored = {key: value.clone() for key, value in layer.state_dict().items()}
            layer.autogptq_cuda_available = False
            layer.scales = layer.scales.float()
            values = layer(torch.eye(COLUMNS)).T  # what a layer without a bias makes of 1
            settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
            settings |= {"sym": even, "desc_act": ordered}
            name = f"gptq-{bits}{'-sym' * even}{'-act-order' * ordered}"
            yield name, "auto-gptq", stored, settings, values


def auto_awq() -> Iterator[Case]:
    from awq.modules.linear import gemm
    from awq.utils.packing_utils import dequantize_gemm

    gemm.get_best_device = lambda: "cpu"
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight().half()
    groups = torch.arange(COLUMNS) // GROUP
    scales, zeros = grid(linear.weight.data.float(), 4, groups, even=False)
    layer = gemm.WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.half().T.contiguous(), zeros=zeros.half().T.contiguous()
    )
    stored = dict(layer.state_dict())
    values = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    yield "awq-4", "autoawq", stored, settings, values


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    for source in (bitsandbytes, compressed_tensors, modelopt, auto_gptq, auto_awq):
        for name, library, stored, settings, values in source():
            tensors = {f"x.{key}": value.contiguous() for key, value in stored.items()}
            tensors["expected"] = values.detach().contiguous()
            about = {
                "library": f"{library} {importlib.metadata.version(library)}",
                "quantization_config": json.dumps(settings),
            }
            save_file(tensors, folder / f"{library}-{name}.safetensors", about)
