"""Places and weights for fingerprints."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from wdlib.fingerprints.clusters import cluster


@pytest.fixture
def saved(house, monkeypatch) -> Callable:
    """A function that writes weights as NAME.safetensors and gives the path; clusters are quick."""
    monkeypatch.setitem(cluster.__kwdefaults__, "starts", 20)

    def write(name: str, tensors: dict) -> Path:
        path = house / f"{name}.safetensors"
        save_file(tensors, path)
        return path

    return write
