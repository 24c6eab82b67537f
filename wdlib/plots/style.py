"""Colours, the matplotlib style, and the one place that writes figures."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
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

INK, GREY, PALE = "#222222", "#8a8a8a", "#cfe6f5"
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
ACCENT, ORANGE, PURPLE = "#d55e00", "#e69f00", "#cc79a7"
"""Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell
apart. Their black is our ink; their yellow is too pale for lines."""

COLORS = {
    "q": BLUE,
    "k": SKY,
    "v": GREEN,
    "o": INK,
    "gate": ACCENT,
    "up": ORANGE,
    "down": PURPLE,
}
"""Attention in cold colours, MLP in warm ones."""

NULL_COLORS = (ACCENT, GREEN, PURPLE)

_COLORS = (BLUE, ACCENT, GREEN, PURPLE, ORANGE, INK, SKY)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of series `number`, as keywords for `Axes.plot`.

    The three repeat with different periods, so that no two of the first 280 series are alike.
    """
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A look for each name, in the order of their first appearance."""
    return {name: look(number) for number, name in enumerate(dict.fromkeys(names))}


TYPE_LOOKS = {
    kind: look(number) | {"color": color} for number, (kind, color) in enumerate(COLORS.items())
}
"""By type of projection: a colour, and dashes and a marker for those who do not see it."""


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


def headline(figure: Figure, finding: str, model: str, rank: int | None = None) -> None:
    """Title of a whole figure: what it shows, and below of which model, at which rank.

    model: a path is shortened to its last part. Lines are broken to the figure's width.
    """
    about = Path(model).name if rank is None else f"{Path(model).name}, r = {rank}"
    lines = wrap(finding, int(12.5 * figure.get_figwidth()))
    text = "\n".join([*lines, about])
    figure.suptitle(text, x=0.01, ha="left", fontsize=9, fontweight="bold")


def shades(n: int) -> list:
    """n colours for an ordered quantity, dark to bright."""
    return sns.color_palette("viridis", n)


def label_lowest(axes: np.ndarray) -> None:
    """Label the x ticks of the lowest panel that is drawn in each column of a grid.

    With shared axes matplotlib labels the last row alone, even where its panel is switched off.
    """
    for column in axes.T:
        [ax for ax in column if ax.axison][-1].tick_params(labelbottom=True)


class TextTable(HTML):
    """A table of sentences, which reads as plain text where no HTML is shown."""

    def __init__(self, html: str, text: str):
        super().__init__(html)
        self._text = text

    def __repr__(self) -> str:
        return self._text


def text_table(table: pd.DataFrame) -> TextTable:
    """A table of sentences for a notebook: aligned to the left, without row numbers.

    Cells and headings are text; what looks like markup in them is shown as it is.
    """
    style = table.style.hide(axis="index").set_properties(**{"text-align": "left"})
    style = style.format(escape="html").format_index(escape="html", axis="columns")
    header = [{"selector": "th", "props": "text-align: left"}]
    lines = [table.columns, *table.itertuples(index=False)]
    return TextTable(
        style.set_table_styles(header).to_html(table_uuid="text"),
        "\n".join(" | ".join(map(str, line)) for line in lines),
    )
