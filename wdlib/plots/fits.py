"""Tails, power-law fits and their tests."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import binomtest

from wdlib.fits import alternatives, estimators
from wdlib.plots.style import ACCENT, BLUE, GREY, INK, PALE, look

ESTIMATOR_LOOKS = {name: look(number) for number, name in enumerate(estimators.ESTIMATORS, 1)}
"""By estimator; the first has the accent's colour."""


def ccdf_table(distances: np.ndarray, points: int = 400) -> pd.DataFrame:
    """The complementary distribution at up to `points` values evenly spread in log x, and all of
    the 100 largest, where single distances are visible."""
    x, p = estimators.ccdf(distances)
    x, p = x[x > 0], p[x > 0]
    kept = np.unique(np.searchsorted(x, np.geomspace(x[0], x[-1], points)))
    kept = np.union1d(np.minimum(kept, len(x) - 1), np.arange(max(0, len(x) - 100), len(x)))
    return pd.DataFrame({"distance": x[kept], "ccdf": p[kept]})


def ccdf(data: pd.DataFrame, ax: Axes, *, label: str | None = None, **line: Any) -> Axes:
    """A complementary distribution on log axes: columns distance, ccdf.

    line: colour and dashes of the line, as `Axes.plot` takes them.
    """
    line = {"color": INK} | line
    ax.plot(data.distance, data.ccdf, drawstyle="steps-post", label=label, **line)
    ax.set(xscale="log", yscale="log", xlabel="cosine distance x", ylabel="share of distances ≥ x")
    return ax


def fitted(fit: estimators.PowerLawFit, ax: Axes, high: float, *, label: str, **line: Any) -> Axes:
    """The complementary distribution of a fitted law from its xmin up to `high`.

    line: colour and dashes of the line; dashes in the accent's colour where none are given.
    """
    x = np.geomspace(fit.xmin, min(high, fit.xmax), 200)
    y = estimators.power_law_ccdf(fit, x)
    line = {"color": ACCENT, "linestyle": "--"} | line
    ax.plot(x[y > 0], y[y > 0], label=label, **line)
    return ax


def tail_of(
    distances: np.ndarray, fit: estimators.PowerLawFit, ax: Axes, *, whole: np.ndarray
) -> Axes:
    """Distances with a law that was fitted to them, before all of which they are a part.

    The axes are those of the whole: nothing but the curves moves from one part to another.
    """
    ccdf(ccdf_table(whole), ax, color=GREY, lw=0.8, label=f"all {len(whole):,} distances")
    limits = ax.get_xlim(), ax.get_ylim()
    if len(distances) < len(whole):
        ccdf(ccdf_table(distances), ax, label=f"{len(distances):,} of them")
    fitted(fit, ax, distances.max(), label=f"power law, α = {fit.alpha:.2f}")
    ax.axvline(fit.xmin, color=ACCENT, lw=0.8, ls=":")
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.legend(loc="lower left")
    return ax


def intervals(draws: pd.DataFrame, estimates: dict[str, float], ax: Axes) -> Axes:
    """Resampled exponents, a column of `draws` per estimator, with 95 % bar and the estimate."""
    for row, (name, estimate) in enumerate(estimates.items()):
        spread = row + np.linspace(-0.25, 0.25, len(draws))
        ax.plot(draws[name], spread, ".", color=ESTIMATOR_LOOKS[name]["color"], ms=2, alpha=0.5)
        ax.plot(draws[name].quantile([0.025, 0.975]), [row, row], color=INK, lw=2)
        ax.plot(estimate, row, "X", color="white", mec=INK, ms=7)
    ax.set_yticks(range(len(estimates)), list(estimates))
    ax.set(xscale="log", xlabel="α, exponent of the density")
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if draws.min().min() / 2 < t]
    ax.set_xticks([t for t in ticks if t < 2 * draws.max().max()])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.invert_yaxis()
    return ax


def alpha_by_xmin(table: estimators.AlphaByXmin, chosen: estimators.PowerLawFit, ax: Axes) -> Axes:
    """The exponent against the start of the tail; band: 95 % for independent draws."""
    ax.fill_between(
        table.xmin,
        table.alpha - 1.96 * table.sigma,
        table.alpha + 1.96 * table.sigma,
        color=PALE,
        lw=0,
    )
    ax.plot(table.xmin, table.alpha, color=BLUE)
    ax.plot(chosen.xmin, chosen.alpha, "X", color="white", mec=INK, ms=8)
    ax.set(xscale="log", yscale="log", xlabel="xmin", ylabel="α of the distances ≥ xmin")
    ax.yaxis.set_major_formatter("{x:g}")
    return ax


def alternative_tails(
    distances: np.ndarray, laws: dict[str, alternatives.AlternativeFit], ax: Axes
) -> pd.DataFrame:
    """The tail of the data from the laws' xmin on, with the laws; returns what it drew.

    The normal law is a broad band below the others: where its fit runs off to an exponential law,
    as it does on heavy tails, both stay visible.
    """
    xmin = next(iter(laws.values())).xmin
    data = ccdf_table(distances[distances >= xmin]).assign(law="data")
    ccdf(data, ax, label="distances")
    x = np.geomspace(xmin, distances.max(), 200)
    tables = [data]
    for number, (name, law) in enumerate(laws.items()):
        tables.append(pd.DataFrame({"distance": x, "ccdf": alternatives.ccdf(law, x), "law": name}))
        line = look(number) | {"markevery": (5 * number, 35), "ms": 3.5, "lw": 1.1, "zorder": 2.5}
        if line["color"] == INK:  # the data's
            line["color"] = GREY
        if name == "normal":
            line |= {"lw": 5, "alpha": 0.35, "marker": "", "linestyle": "-", "zorder": 1.5}
        ax.plot(x, tables[-1].ccdf, label=name.replace("_", " "), **line)
    ax.set(ylim=(0.5 / data.shape[0], 1.5), ylabel="share of the tail ≥ x")
    return pd.concat(tables)


def rates(data: pd.DataFrame, ax: Axes, *, nominal: float) -> Axes:
    """Rejection rates with 95 % intervals, a row per case: columns case, test, rate, low, high."""
    cases = list(data.case.unique())
    looks = (("s", ACCENT, -0.15), ("o", BLUE, 0.15))
    for (marker, color, shift), (test, rows) in zip(
        looks, data.groupby("test", sort=False), strict=True
    ):
        y = [cases.index(case) + shift for case in rows.case]
        ax.hlines(y, rows.low, rows.high, color=color, lw=1)
        ax.plot(rows.rate, y, marker, color=color, ms=4, label=test)
    ax.axvline(nominal, color=INK, lw=0.8)
    ax.set_yticks(range(len(cases)), cases)
    ax.invert_yaxis()
    ax.set(xlim=(-0.02, 1.02), xlabel="share of planted power laws rejected at 5 %")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def size_table(sizes: pd.DataFrame) -> pd.DataFrame:
    """Rejection rates of both goodness-of-fit tests with Wilson intervals, for `rates`."""
    rows = []
    for test, column in {"independent draws": "iid", "shared vectors": "vectors"}.items():
        for case in sizes.itertuples():
            rate, n = getattr(case, f"rejected_{column}"), case.repetitions
            low, high = binomtest(round(rate * n), n).proportion_ci(method="wilson")
            rows.append((f"{case.dependence}, {case.vectors} vectors", test, rate, low, high))
    return pd.DataFrame(rows, columns=["case", "test", "rate", "low", "high"])
