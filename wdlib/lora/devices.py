"""The device that a process computes on: what it is, and how much fits its memory at a time."""

import gc
import logging
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

from wdlib import WdlibError, __version__

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def process_state() -> Any:
    """accelerate's view of the processes that train together, one without a launcher."""
    import torch
    from accelerate import PartialState

    # Without a GPU, accelerate joins processes only if it is told so.
    return PartialState(cpu=not torch.accelerator.is_available())


def native_dtype() -> str:
    """ "bfloat16" where this machine's GPU, or its processor without one, computes with it."""
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def machine() -> dict[str, Any]:
    """What a result says of where it was made, without the machine's own name."""
    import torch

    state = process_state()
    if state.device.type == "cuda":
        name = torch.cuda.get_device_name(state.device)
    else:
        tiles = " with AMX" * torch.cpu._is_amx_tile_supported()
        name = torch.backends.cpu.get_cpu_capability() + tiles
    return {
        "platform": f"{sys.platform} {platform.machine()}",
        "device": str(state.device),
        "device name": name,
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of Python and of every package that has a say in a run."""
    packages = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        "wdlib": __version__,
        **{name: metadata.version(name) for name in packages},
    }


def kind(machine: Mapping[str, Any]) -> str:
    """The kind of device that a result's `machine` names: "cpu", "cuda", "mps"."""
    return machine["device"].partition(":")[0]


def check_kind(begun: str, *, what: str, remedy: str) -> None:
    """Raise WdlibError where something was begun on another kind of device than is used here.

    Two kinds round differently, so that what they give does not compare.
    """
    here = process_state().device.type
    if begun != here:
        raise WdlibError(
            f"{what} is of the device {begun!r} and this process computes on {here!r}, which "
            f"rounds differently: {remedy}"
        )


def release() -> None:
    """Give back the memory of what is no longer used, to other processes on the device too."""
    from accelerate.utils.memory import clear_device_cache

    gc.collect()
    clear_device_cache()


def halving(attempt: Callable[[int], _T], size: int, *, smallest: int = 1, what: str) -> _T:
    """attempt(size), and again with half the size while the device's memory does not hold it.

    Arguments: attempt, which has to leave nothing behind when it fails, or go on from there;
    smallest, the size at which it fails for good; what, of which there are `size`, in words.
    Raises: what attempt raises.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    while True:
        try:
            return attempt(size)
        except RuntimeError as error:
            if size // 2 < smallest or not should_reduce_batch_size(error):
                raise
        # Here, where the error and with it the tensors of its frames are gone.
        release()
        _log.warning("%d %s do not fit the device: going on with %d", size, what, size // 2)
        size //= 2
