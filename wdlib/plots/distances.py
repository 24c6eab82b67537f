"""Distances between singular value vectors."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from wdlib import TYPES
from wdlib.plots.style import ACCENT, BLUE, GREY, PALE

OPEN: dict[str, Any] = {"ms": 3.5, "mfc": "white", "mew": 0.8}
"""The markers of null models."""


def distance_matrix(data: pd.DataFrame, ax: Axes) -> Axes:
    """All distances between singular value vectors as a picture.

    data: square, its index the type of each row; rows of a type stand together, layers ascending.
    """
    square = data.to_numpy()
    shown = np.log10(np.where(square > 0, square, np.nan))
    image = ax.imshow(shown, cmap="viridis", interpolation="nearest", vmin=-5, vmax=-0.5)
    kinds = data.index.to_numpy()
    starts = [int(np.flatnonzero(kinds == kind)[0]) for kind in pd.unique(kinds)]
    for edge in starts[1:]:
        ax.axhline(edge - 0.5, color="white", lw=0.8)
        ax.axvline(edge - 0.5, color="white", lw=0.8)
    middle = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], len(kinds)], strict=True)]
    ax.set_xticks(middle, pd.unique(kinds))
    ax.set_yticks(middle, pd.unique(kinds))
    ax.tick_params(length=0)
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, extend="both", shrink=0.9)
    bar.set_label("cosine distance, log10")
    return ax


def histogram(distances: np.ndarray, ax: Axes, *, bins_per_decade: int = 10) -> pd.DataFrame:
    """Log-binned density of distances on log axes; returns the table that it drew."""
    distances = distances[distances > 0]
    low, high = np.log10(distances.min()), np.log10(distances.max())
    edges = np.logspace(low, high, max(2, int((high - low) * bins_per_decade) + 1))
    counts, edges = np.histogram(distances, edges)
    density = counts / (len(distances) * np.diff(edges))
    ax.stairs(density, edges, fill=True, color=PALE, ec=BLUE, lw=0.8, baseline=0)
    ax.set(xscale="log", yscale="log", xlabel="cosine distance", ylabel="density")
    return pd.DataFrame({"from": edges[:-1], "to": edges[1:], "density": density})


def before_after(data: pd.DataFrame, ax: Axes) -> Axes:
    """Distances before and after a change of the weights: columns before, after."""
    ax.plot(data.before, data.after, ".", color=BLUE, ms=2.5, alpha=0.6)
    ends = [data.to_numpy().min(), data.to_numpy().max()]
    ax.plot(ends, ends, color=ACCENT, lw=1)
    ax.set(xscale="log", yscale="log", aspect="equal")
    return ax


def medians_by_type(data: pd.DataFrame, looks: dict[str, dict], ax: Axes) -> Axes:
    """Median distances within each type: columns model, type, median, null; null open and small."""
    groups = data.groupby("model", sort=False)
    for i, (model, rows) in enumerate(groups):
        look, color = looks[model], looks[model]["color"]
        rows = rows.set_index("type").reindex(TYPES)  # so that the line breaks at an absent type
        x = np.arange(len(TYPES)) + 0.08 * (i - (groups.ngroups - 1) / 2)
        ax.plot(x, rows["median"], ms=5, lw=0.8, label=model, **look)
        ax.plot(x, rows.null, look["marker"], color=color, **OPEN)
    ax.plot([], [], "o", color=GREY, label="open: normal matrices of the same shapes", **OPEN)
    ax.set_xticks(range(len(TYPES)), TYPES)
    ax.set(yscale="log", ylabel="median distance between layers")
    return ax
