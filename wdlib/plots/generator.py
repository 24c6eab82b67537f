"""The distribution generator."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from wdlib.plots.style import ACCENT, BLUE, INK, PALE, PURPLE


def replaced_share(data: pd.DataFrame, slope: float, ax: Axes) -> Axes:
    """Distance to the template against the share of new entries: columns share, low, mean, high.

    slope: of the first-order law, distance = slope * share, drawn dashed.
    """
    ax.fill_between(data.share, data.low, data.high, color=PALE, lw=0, label="90 % of arrays")
    ax.plot(data.share, data["mean"], "o-", color=BLUE, ms=3, label="mean")
    ax.plot(data.share, slope * data.share, "--", color=ACCENT, label="first order")
    ax.set(xscale="log", yscale="log", xlabel="share of entries drawn again, c / N")
    ax.set(ylabel="cosine distance to the template")
    ax.set_ylim(data.low[data.low > 0].min() / 2, data.high.max() * 4)
    ax.legend(loc="lower right")
    return ax


def exponents(data: pd.DataFrame, ax: Axes) -> Axes:
    """Exponents against the shape of the counts: columns shape, window, error, product, csn."""
    ends = np.array([data["shape"].min(), data["shape"].max()])
    ax.plot(ends, ends + 1, color=INK, lw=1, label="shape + 1")
    ax.errorbar(
        data["shape"], data.window, yerr=1.96 * data.error, fmt="o", color=BLUE, ms=4,
        label="distances, linear range",
    )  # fmt: skip
    ax.plot(data["shape"], data["product"], "_", color=PURPLE, ms=12, mew=2, label="count × χ²")
    ax.plot(data["shape"], data.csn, "x", color=ACCENT, ms=5, label="distances, csn")
    ax.set(xlabel="shape of the Pareto counts", ylabel="α, exponent of the density")
    ax.legend(loc="upper left")
    return ax


def chi_square_panel(scaled: np.ndarray, freedom: int, ax: Axes) -> pd.DataFrame:
    """Histogram of values of mean 1 with chi-square and normal law; returns what it drew."""
    edges = np.linspace(max(0, scaled.min()), scaled.max(), 41)
    density, _ = np.histogram(scaled, edges, density=True)
    middle = (edges[1:] + edges[:-1]) / 2
    table = pd.DataFrame({"scaled distance": middle, "density": density})
    table["chi-square"] = stats.chi2(freedom, scale=1 / freedom).pdf(middle)
    table["normal"] = stats.norm(1, scaled.std()).pdf(middle)
    ax.stairs(density, edges, fill=True, color=PALE)
    ax.plot(middle, table["chi-square"], color=ACCENT, label=f"χ², {freedom} degrees of freedom")
    ax.plot(middle, table["normal"], "--", color=INK, label="normal")
    ax.set(xlabel="distance / mean", ylim=(0, 1.35 * density.max()))
    ax.legend(loc="upper right", fontsize=7)
    return table


def against_first_order(ratios: np.ndarray, freedom: int, ax: Axes) -> Axes:
    """Distances over those of the first-order law, with the chi-square that they then follow.

    The axes stay: from one share of new entries to another, the histogram moves.
    """
    edges = np.linspace(0, 3, 61)
    middle = (edges[1:] + edges[:-1]) / 2
    law = stats.chi2(freedom, scale=1 / freedom).pdf(middle)
    density = np.histogram(ratios, edges)[0] / (len(ratios) * np.diff(edges))
    ax.stairs(density, edges, fill=True, color=PALE, label="distances")
    ax.plot(middle, law, color=ACCENT, label=f"first order: χ², {freedom} degrees of freedom")
    ax.axvline(ratios.mean(), color=INK, lw=0.8, ls="--", label="mean of the distances")
    ax.set(xlim=(0, 3), ylim=(0, 3), ylabel="density")
    ax.set_xlabel("distance to the template / mean of the first-order law")
    ax.legend(loc="upper right")
    return ax


def sweep(data: pd.DataFrame, axes: np.ndarray) -> None:
    """One parameter swept, a column of three panels: median distance, alpha, share power-law.

    data: columns value, median, alpha, alpha_low, alpha_high, rate, and default (bool, one row).
    """
    top, middle, bottom = axes
    for ax, column in zip(axes, ("median", "alpha", "rate"), strict=True):
        ax.plot(data.value, data[column], "o-", color=BLUE, ms=3, lw=1)
        chosen = data[data.default]
        ax.plot(chosen.value, chosen[column], "D", color=ACCENT, ms=5)
        ax.set(xscale="log")
        ax.tick_params(labelsize=7.5, which="both")
        ax.set_xticks(data.value, [f"{value:g}" for value in data.value], rotation=60)
        ax.xaxis.set_minor_locator(plt.NullLocator())
    middle.fill_between(data.value, data.alpha_low, data.alpha_high, color=PALE, lw=0)
    top.set(yscale="log")
    middle.set(yscale="log", ylim=(1.2, 30))
    middle.set_yticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    middle.yaxis.set_minor_locator(plt.NullLocator())
    bottom.set(ylim=(-0.05, 1.05), xlabel=data.parameter.iloc[0])
