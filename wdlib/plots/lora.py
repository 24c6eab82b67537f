"""Reshaped LoRA: starts, training, evaluation."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from wdlib.plots.style import ACCENT, COLORS, INK, NULL_COLORS

START_COLORS = {
    "untrained": "#8a8a8a",
    "default": INK,
    "literal": ACCENT,
    "preserved": "#1b4f8a",
    "a_only": "#3f86c4",
    "pissa": "#7b5ea7",
    "one_template": "#e07b1a",
    "independent": "#2e7d4f",
}
"""By initialisation; the others are grey."""


def start_color(variant: str) -> str:
    """The colour of a variant, which begins with its initialisation."""
    return START_COLORS.get(variant.split()[0], "#b8b8b8")


def new_entries(data: pd.DataFrame, ax: Axes) -> Axes:
    """How many entries of generated matrices were drawn again: columns type, share; log axes."""
    for kind, rows in data.groupby("type", sort=False):
        shares, left = np.sort(rows.share), np.arange(len(rows), 0, -1) / len(rows)
        ax.plot(shares, left, drawstyle="steps-pre", color=COLORS[kind], label=kind, lw=1.2)
    ax.set(xscale="log", yscale="log", xlabel="share x of the entries that is new")
    return ax


def step0_shift(data: pd.DataFrame, ax: Axes) -> Axes:
    """Change of the loss before training: columns init, b_scale, shift; a point per seed.

    The line joins the means. Linear in the shift below 0.1 nats, logarithmic above.
    """
    for position, (init, rows) in enumerate(data.groupby("init", sort=False)):
        color, aside = start_color(init), 1.12 ** (position - 1)
        ax.plot(rows.b_scale * aside, rows["shift"], "o", color=color, ms=4)
        means = rows.groupby("b_scale")["shift"].mean()
        ax.plot(means.index * aside, means, color=color, label=init)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set(xscale="log", xlabel="b_scale", ylabel="change of the loss, nats")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.margins(y=0.08)
    ax.set_xticks(data.b_scale.unique())
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    return ax


def relative_norms(data: pd.DataFrame, ax: Axes) -> Axes:
    """The adapter's part relative to the weights, a point per layer: columns type, norm."""
    for position, (kind, rows) in enumerate(data.groupby("type", sort=False)):
        spread = position + np.linspace(-0.25, 0.25, len(rows))
        ax.plot(spread, 100 * rows.norm, "o", color=COLORS[kind], ms=3)
    ax.set_xticks(range(data.type.nunique()), data.type.unique())
    ax.set(ylabel="‖sBA‖ / ‖W‖, %", ylim=(0, None))
    return ax


def training_curves(data: pd.DataFrame, ax: Axes, value: str) -> Axes:
    """One column of a curve against the step: columns variant, seed, step, and the named one.

    A thin line per seed, and the mean over seeds.
    """
    for variant, rows in data.groupby("variant", sort=False):
        color = start_color(variant)
        by_seed = rows.pivot(index="step", columns="seed", values=value)
        if by_seed.shape[1] > 1:
            ax.plot(by_seed.index, by_seed, color=color, lw=0.5, alpha=0.5)
        ax.plot(by_seed.index, by_seed.mean(axis=1), color=color, lw=1.4, label=variant)
    ax.set(xlabel="step", xlim=(1, data.step.max()))
    return ax


def loss_and_gap(data: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Training curves in two panels: columns as above, with loss, and gap, its difference to the
    default's; one legend above both."""
    names = {"loss": "training loss, nats per token", "gap": "nats per token, minus default"}
    for ax, (value, name) in zip(axes, names.items(), strict=True):
        training_curves(data, ax, value).set_ylabel(name)
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


def by_variant(data: pd.DataFrame, ax: Axes) -> Axes:
    """A point per seed, the mean as a bar across: columns variant, value; variants downwards."""
    variants = list(dict.fromkeys(data.variant))
    for y, variant in enumerate(variants):
        values = data[data.variant == variant].value
        color = start_color(variant)
        ax.plot(values, np.full(len(values), y), "o", color=color, ms=4, alpha=0.7, mew=0)
        ax.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=color, lw=1.6)
    return _rows_around_zero(variants, ax)


def forest(data: pd.DataFrame, ax: Axes) -> Axes:
    """Differences with their intervals: columns variant, estimate, low, high, holm.

    A filled point is one that stands after Holm's correction at 5 %.
    """
    for y, row in enumerate(data.itertuples()):
        color = start_color(row.variant)
        ax.plot([row.low, row.high], [y, y], color=color, lw=1.4, solid_capstyle="butt")
        ax.plot(row.estimate, y, "o", color=color, mfc=color if row.holm < 0.05 else "white", ms=5)
    return _rows_around_zero(data.variant, ax)


def _rows_around_zero(labels: Sequence[str], ax: Axes) -> Axes:
    """Name the rows of an axes, the first at the top, and mark zero."""
    ax.axvline(0, color=INK, lw=0.6)
    ax.xaxis.set_major_locator(plt.MaxNLocator(3))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    return ax


def sensitivity(data: pd.DataFrame, ax: Axes) -> Axes:
    """A loss against one setting on a log axis: columns start, seed, value, loss.

    A point per seed, and a line through the means of each start.
    """
    for start, rows in data.groupby("start", sort=False):
        color = start_color(start)
        ax.plot(rows.value, rows.loss, "o", color=color, ms=3.5, alpha=0.6, mew=0)
        ax.plot(rows.groupby("value").loss.mean(), color=color, lw=1.4, label=start)
    ax.axhline(0, color=INK, lw=0.6)
    values = sorted(set(data.value))
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    return ax


def letter_shares(data: pd.DataFrame, ax: Axes) -> Axes:
    """Shares of the letters A to D, one bar for each row of the table: label, A, B, C, D."""
    left = np.zeros(len(data))
    for letter, color in zip("ABCD", ("#1b4f8a", "#8db9dd", "#f2b366", "#a34a00"), strict=True):
        ax.barh(data.label, data[letter], left=left, color=color, label=letter, height=0.7)
        left += data[letter]
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of the questions")
    return ax


def letters_alone(data: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy against what the letters give by themselves: columns variant, expected, observed."""
    for variant, rows in data.groupby("variant", sort=False):
        color = start_color(variant)
        ax.plot(
            rows.expected, rows.observed, "o", color=color, ms=4, mew=0, alpha=0.8, label=variant
        )
    ends = [data.expected.min(), data.expected.max()]
    ax.plot(ends, ends, color=INK, lw=0.8, zorder=0)
    ax.set(xlabel="expected from the letters alone", ylabel="accuracy in one order")
    return ax


def chance_of_gap(data: pd.DataFrame, gap: int, ax: Axes) -> Axes:
    """Chance that two equally good runs differ by so many answers: columns items, chance, label."""
    for (label, rows), color in zip(data.groupby("label", sort=False), NULL_COLORS, strict=False):
        ax.plot(rows["items"], rows.chance, "o-", color=color, ms=3, lw=1, label=label)
    ax.axvline(gap, color=ACCENT, lw=1, ls="--")
    ax.set(yscale="log", xlabel="questions of difference, at least", ylabel="chance")
    return ax
