"""Weight values and singular values."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from wdlib import TYPES
from wdlib.plots.style import ACCENT, BLUE, GREY, INK, TYPE_LOOKS, shades


def value_density(data: pd.DataFrame, ax: Axes) -> Axes:
    """Densities of weight values: columns type, value, density; a Gaussian of equal width grey.

    The values of each type are in units of that type's standard deviation.
    """
    for kind, rows in data.groupby("type", sort=False):
        shown = rows[rows.density > 0]
        line = TYPE_LOOKS[kind] | {"marker": ""}
        ax.plot(shown.value, shown.density, label=kind, **line)
    grid = np.linspace(-5, 5, 201)
    ax.plot(
        grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color=GREY, lw=2.5, alpha=0.6,
        label="normal", zorder=1,
    )  # fmt: skip
    ax.set(yscale="log", xlabel="value / standard deviation", ylim=(1e-7, 3))
    ax.set_ylabel("density per standard deviation")
    ax.legend(ncols=2, loc="upper right", handlelength=2.4)
    return ax


def singular_values(data: pd.DataFrame, ax: Axes) -> Axes:
    """Spectra of one type, one line per layer: columns layer, index (from 1), relative."""
    layers = data.groupby("layer")
    for shade, (_, rows) in zip(shades(layers.ngroups), layers, strict=True):
        ax.plot(rows["index"], rows.relative, color=shade, lw=0.8)
    ax.set_ylim(0, 1.03)
    return ax


def profiles(values: Mapping[str, np.ndarray], ax: Axes, *, most: int) -> Axes:
    """The median spectrum of each type, relative to the largest value; the axis goes to `most`.

    values: of each type (layers, r), as in `Spectra.values`.
    """
    for kind, rows in values.items():
        middle = np.median(rows / rows[:, :1], axis=0)
        line = TYPE_LOOKS[kind] | {"marker": ""}
        ax.plot(range(1, len(middle) + 1), middle, label=kind, **line)
    ax.set(xscale="log", xlim=(1, most), ylim=(0, 1.03), xlabel="index i")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("singular value / largest")
    ax.legend(ncols=2, loc="lower left", handlelength=2.4)
    return ax


def errors(data: pd.DataFrame, ax: Axes) -> Axes:
    """Relative errors by method, a point per matrix: columns method, error, matrices."""
    methods, kinds = list(data.method.unique()), list(data.matrices.unique())
    looks = (("o", BLUE, -0.2), ("^", ACCENT, 0.2))
    for kind, (marker, color, side) in zip(kinds, looks, strict=True):
        for row, method in enumerate(methods):
            shown = data.error[(data.method == method) & (data.matrices == kind)]
            spread = row + side + np.linspace(-0.13, 0.13, len(shown))
            label = kind if row == 0 else None
            ax.plot(shown, spread, marker, color=color, alpha=0.7, mew=0, label=label)
    ax.set_yticks(range(len(methods)), methods)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="largest relative error of the values")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def relative_change(data: pd.DataFrame, ax: Axes) -> Axes:
    """Relative change of singular values by index: columns type, index, relative change."""
    for kind, rows in data.groupby("type", sort=False):
        shift = (list(TYPES).index(kind) - 3) * 0.1
        ax.plot(
            rows["index"] + shift, 100 * rows["relative change"], ms=2.5, label=kind, mew=0,
            **TYPE_LOOKS[kind] | {"linestyle": ""},
        )  # fmt: skip
    ax.axhline(0, color=INK, lw=0.8)
    low, high = ax.get_ylim()
    ax.set(xlabel="index i", ylabel="relative change, %", ylim=(low, high + 0.25 * (high - low)))
    ax.legend(ncols=4, loc="upper left", markerscale=2, handletextpad=0.1, columnspacing=0.8)
    return ax


def layer_legend(ax: Axes, layers: int) -> Axes:
    """An Axes given over to the colour scale of `singular_values`."""
    ax.set_axis_off()
    scale = plt.cm.ScalarMappable(plt.Normalize(0, max(layers - 1, 1)), "viridis")
    bar = ax.figure.colorbar(scale, cax=ax.inset_axes((0.1, 0.05, 0.12, 0.9)))
    bar.set_label("layer")
    return ax
