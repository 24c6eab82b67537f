"""A project folder of its own for runs of notebooks, and a tiny model for the stored ones."""

from pathlib import Path

import pytest

from wdlib import paths


@pytest.fixture
def house(house, monkeypatch) -> Path:
    """The same with its folders, and an empty catalogue."""
    for name in ("notebooks", "figures", "cache", "spectra"):
        (house / name).mkdir()
    monkeypatch.setattr(paths, "CATALOGUE", house / "models.toml")
    paths.CATALOGUE.write_text("")
    return house
