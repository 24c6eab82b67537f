"""Classes of pairs of types."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdlib import characterise
from wdlib.plots.style import ACCENT, BLUE, GREY, INK, ORANGE, SKY

STEEP = 5.0
"""An exponent above which a tail is hardly what is meant by a power law, whatever the rule says."""

CLASS_COLORS = {"power-law": BLUE, "normal": ORANGE, "undecided": "#c4c4c4"}
_STEEP_COLOR = SKY


def pair_color(pair: characterise.Pair) -> str:
    """The colour of a pair's class; steep power laws have one of their own."""
    steep = pair.alpha is not None and pair.alpha > STEEP
    return _STEEP_COLOR if steep else CLASS_COLORS[pair.verdict.label]


def pair_panel(data: pd.DataFrame, pair: characterise.Pair, ax: Axes) -> Axes:
    """One cell of the grid of pairs: the distances of two types, coloured by their class.

    A class is told by its dashes as well: solid, dashed, dotted.
    """
    dashes = dict(zip(CLASS_COLORS, ("-", "--", ":"), strict=True))[pair.verdict.label]
    color = GREY if pair.verdict.label == characterise.UNDECIDED else pair_color(pair)
    ax.plot(data.distance, data.ccdf, dashes, color=color, lw=1.4)
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(plt.LogLocator(numticks=4))
        axis.set_minor_locator(plt.NullLocator())
    ax.label_outer()
    if pair.alpha is not None:
        ax.text(0.06, 0.08, f"α {pair.alpha:.1f}", transform=ax.transAxes, fontsize=8, color=INK)
    return ax


def grid_labels(axes: np.ndarray, kinds: list[str]) -> None:
    """Types along the diagonal and the left of a triangle of panels, and what the axes are.

    The panels above the diagonal, which would repeat those below, are switched off.
    """
    for i, kind in enumerate(kinds):
        axes[i, i].set_title(kind)
        axes[i, 0].set_ylabel(kind, fontweight="bold")
        for ax in axes[i, i + 1 :]:
            ax.set_axis_off()
    figure = axes[0, 0].figure
    figure.supxlabel("cosine distance x")
    figure.supylabel("share of distances ≥ x")
    class_legend(figure, inside=True)


def class_legend(figure: Figure, *, inside: bool = False) -> None:
    """The classes, below a figure, or inside where the upper right is free."""
    shown = {"power-law": BLUE, f"power-law, α > {STEEP:g}": _STEEP_COLOR} | CLASS_COLORS
    handles = [plt.Line2D([], [], color=c, lw=4, label=label) for label, c in shown.items()]
    if inside:
        figure.legend(handles=handles, loc="upper right")
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def class_map(character: characterise.Characterisation, ax: Axes) -> pd.DataFrame:
    """The classes of all pairs as a matrix, α in those called power-law; returns what it drew.

    An exponent above `STEEP` is no number worth reading: the cell says that it is above.
    """
    kinds = [pair.types[0] for pair in character.pairs if pair.types[0] == pair.types[1]]
    rows = []
    for i, p in enumerate(kinds):
        for j, q in enumerate(kinds):
            pair = character.pair(p, q)
            color = pair_color(pair)
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fc=color, ec="white", lw=1))
            if pair.alpha is not None:
                steep = color == _STEEP_COLOR
                text, ink = (f">{STEEP:g}", INK) if steep else (f"{pair.alpha:.1f}", "white")
                ax.text(j, i, text, ha="center", va="center", color=ink, size=7)
            rows.append((p, q, pair.verdict.label, pair.alpha))
    ends = (-0.5, len(kinds) - 0.5)
    ax.set(xlim=ends, ylim=ends[::-1], aspect="equal")
    ax.set_xticks(range(len(kinds)), kinds, fontsize=7)
    ax.set_yticks(range(len(kinds)), kinds, fontsize=7)
    ax.tick_params(length=0)
    ax.grid(False)
    return pd.DataFrame(rows, columns=["p", "q", "class", "alpha"])


def agreement(data: pd.DataFrame, ax: Axes) -> Axes:
    """Correlations of pairs of models, a row each: columns pair, correlation, low, high.

    low, high: where the correlation lies when one model's types are renamed at random; grey. A
    pair without a correlation (a model with one class for everything) is left empty.
    """
    rows = np.arange(len(data))
    ax.barh(rows, data.high - data.low, left=data.low, height=0.6, color="0.85")
    beyond = data.correlation > data.high
    for chosen, color, marker in ((beyond, ACCENT, "D"), (~beyond, INK, "o")):
        ax.plot(data.correlation[chosen], rows[chosen], marker, color=color, ms=5)
    ax.axvline(0, color=INK, lw=0.6)
    ax.set_yticks(rows, data.pair, fontsize=7)
    ax.set(xlim=(-1.05, 1.05), ylim=(len(data) - 0.5, -0.5))
    return ax


def disagreements(
    character: characterise.Characterisation, reference: characterise.Characterisation, ax: Axes
) -> int:
    """Frame the cells of a `class_map` whose class is not the reference's; how many pairs."""
    kinds = [pair.types[0] for pair in character.pairs if pair.types[0] == pair.types[1]]
    labels = reference.labels()
    differ = [pair for pair in character.pairs if labels[pair.types] != pair.verdict.label]
    for pair in differ:
        i, j = map(kinds.index, pair.types)
        for x, y in {(i, j), (j, i)}:
            frame = plt.Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, fill=False, ec=INK, lw=1.2)
            ax.add_patch(frame)
    return len(differ)
