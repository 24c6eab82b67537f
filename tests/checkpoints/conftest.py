"""Tiny checkpoints of every architecture."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable:
    """name -> (folder, model), each made once."""
    made = {}

    def get(name: str) -> tuple:
        if name not in made:
            model, folder = tiny.architecture(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return get


@pytest.fixture
def llama(saved, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(saved("llama")[0], tmp_path / "llama"))
