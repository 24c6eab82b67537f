"""Colours, the matplotlib style, and the one place that writes figures."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure

from wdlib import paper, paths
from wdlib.checkpoints import catalogue

COLORS = {
    "q": "#1b4f8a",
    "k": "#3f86c4",
    "v": "#8db9dd",
    "o": "#5f5f8f",
    "gate": "#a34a00",
    "up": "#e07b1a",
    "down": "#f2b366",
}
"""Attention in blues, MLP in oranges."""

INK, ACCENT = "#222222", "#c0392b"

NULL_COLORS = ("#e07b1a", "#2e7d4f", "#7b5ea7")


def set_style() -> None:
    """Use the project's matplotlib style in this session."""
    plt.style.use(paths.STYLE)


def folder(model: str, rank: int, changed: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Where a notebook's figures go: figures/ for the default run, a folder of their own else.

    changed: what `notebooks.check_parameters` returned. A folder's name begins with that of the
    model, of a path its last two parts, and the rank. The digits at its end are made of the whole
    name or path and all that is changed: no two runs share a folder.
    """
    if (model, rank) == (catalogue.DEFAULT, paper.RANKS[0]) and not changed:
        return paths.FIGURES
    at = Path(model).expanduser()
    is_path = catalogue.catalogue_model(model) is None and at.exists()
    whole = at.resolve().as_posix() if is_path else model
    shown = "-".join(whole.split("/")[-2:]) if is_path else whole
    slug = re.sub(r"[^a-z0-9.]+", "-", shown.lower()).strip("-.")
    made = json.dumps({**changed, "model": whole, "rank": rank}, sort_keys=True)
    digits = hashlib.sha256(made.encode()).hexdigest()[:8]
    return paths.FIGURES / "other" / f"{slug[:60]}-r{rank}-{digits}"


def save(figure: Figure, name: str, data: pd.DataFrame, folder: Path) -> None:
    """Write figure `name` as svg and png, and the table that it draws as csv.

    The same figure gives the same bytes: no dates, no versions, six significant digits in the csv.
    """
    writers = {
        "svg": lambda path: figure.savefig(path, format="svg", metadata={"Date": None}),
        "png": lambda path: figure.savefig(path, format="png", metadata={"Software": None}),
        "csv": lambda path: data.to_csv(
            path, index=False, float_format="%.6g", lineterminator="\n"
        ),
    }
    for suffix, write in writers.items():
        with paths.atomic_write(folder / f"{name}.{suffix}") as part:
            write(part)


def shades(n: int) -> list:
    """n colours for an ordered quantity, dark to bright."""
    return sns.color_palette("viridis", n)


def label_lowest(axes: np.ndarray) -> None:
    """Label the x ticks of the lowest panel that is drawn in each column of a grid.

    With shared axes matplotlib labels the last row alone, even where its panel is switched off.
    """
    for column in axes.T:
        [ax for ax in column if ax.axison][-1].tick_params(labelbottom=True)


def text_table(table: pd.DataFrame) -> HTML:
    """A table of sentences for a notebook: aligned to the left, without row numbers."""
    style = table.style.hide(axis="index").set_properties(**{"text-align": "left"})
    header = [{"selector": "th", "props": "text-align: left"}]
    return HTML(style.set_table_styles(header).to_html(table_uuid="text"))
