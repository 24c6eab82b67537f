"""Classes of pairs of types."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdlib import characterise
from wdlib.plots.style import ACCENT, INK

CLASS_COLORS = {"power-law": "#1b4f8a", "normal": "#e07b1a", "undecided": "#b8b8b8"}


def pair_panel(data: pd.DataFrame, pair: characterise.Pair, ax: Axes) -> Axes:
    """One cell of the 7 x 7 grid: the distances of a pair of types, coloured by their class."""
    color = CLASS_COLORS[pair.verdict.label]
    ax.plot(data.distance, data.ccdf, color=color, lw=1.2)
    ax.set(xscale="log", yscale="log")
    ax.tick_params(labelsize=6, which="both")
    if pair.alpha is not None:
        ax.text(0.06, 0.08, f"α {pair.alpha:.1f}", transform=ax.transAxes, fontsize=7, color=color)
    return ax


def grid_labels(axes: np.ndarray, kinds: list[str]) -> None:
    """Types along the top and the left of a square grid of panels, and what the axes are."""
    for kind, top, left in zip(kinds, axes[0], axes[:, 0], strict=True):
        top.set_title(kind)
        left.set_ylabel(kind, fontweight="bold")
    figure = axes[0, 0].figure
    figure.supxlabel("cosine distance x")
    figure.supylabel("share of distances ≥ x")
    class_legend(figure)


def class_legend(figure: Figure) -> None:
    """The three classes, above a figure."""
    handles = [plt.Line2D([], [], color=c, lw=4, label=label) for label, c in CLASS_COLORS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)


def class_map(character: characterise.Characterisation, ax: Axes) -> pd.DataFrame:
    """The classes of all pairs as a matrix, α in those called power-law; returns what it drew."""
    kinds = [pair.types[0] for pair in character.pairs if pair.types[0] == pair.types[1]]
    rows = []
    for i, p in enumerate(kinds):
        for j, q in enumerate(kinds):
            pair = character.pair(p, q)
            color = CLASS_COLORS[pair.verdict.label]
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fc=color, ec="white", lw=1))
            if pair.alpha is not None:
                ax.text(j, i, f"{pair.alpha:.1f}", ha="center", va="center", color="white", size=7)
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
    for chosen, color in ((beyond, ACCENT), (~beyond, INK)):
        ax.plot(data.correlation[chosen], rows[chosen], "o", color=color, ms=5)
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
            frame = plt.Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, fill=False, ec=ACCENT, lw=1.2)
            ax.add_patch(frame)
    return len(differ)
