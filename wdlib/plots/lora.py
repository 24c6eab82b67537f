"""Reshaped LoRA: starts, training, evaluation."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from wdlib.plots.style import (
    ACCENT,
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    TYPE_LOOKS,
    look,
)  # fmt: skip

_START_COLORS = {
    "untrained": GREY,
    "default": INK,
    "literal": ACCENT,
    "preserved": BLUE,
    "a_only": SKY,
    "pissa": PURPLE,
    "one_template": ORANGE,
    "independent": GREEN,
    "olora": GREEN,
    "eva": ORANGE,
    "gaussian": BLUE,
    "orthogonal": SKY,
}
START_LOOKS = {
    name: look(number) | {"color": color}
    for number, (name, color) in enumerate(_START_COLORS.items())
}
"""Colour, dashes and marker by initialisation."""


_BRIEF = {
    "qwen2.5-coder-0.5b-instruct": "← Qwen 0.5B",
    "gemma-3-270m": "← Gemma 270M",
    "smollm2-135m-instruct": "← SmolLM2",
}
"""References as figures call them."""


def label(variant: str) -> str:
    """A variant of `lora.Run` as figures and tables call it, which still begins with its start."""
    words = (re.sub(r"^lr(?=[\d.])", "at rate ", word) for word in variant.split())
    return " ".join(_BRIEF.get(word, word) for word in words)


def start_look(variant: str) -> dict[str, Any]:
    """The look of a variant, which begins with its initialisation; a pale one if unknown."""
    other = {"color": "#b8b8b8", "linestyle": "-", "marker": "d"}
    return START_LOOKS.get(variant.split()[0], other)


def _line(variant: str) -> dict[str, Any]:
    return start_look(variant) | {"marker": ""}


def _points(variant: str) -> dict[str, Any]:
    return start_look(variant) | {"linestyle": ""}


def new_entries(data: pd.DataFrame, ax: Axes) -> Axes:
    """How many entries of generated matrices were drawn again: columns type, share; log axes."""
    for kind, rows in data.groupby("type", sort=False):
        shares, left = np.sort(rows.share), np.arange(len(rows), 0, -1) / len(rows)
        line = TYPE_LOOKS[kind] | {"marker": ""}
        ax.plot(shares, left, drawstyle="steps-pre", label=kind, lw=1.2, **line)
    ax.set(xscale="log", yscale="log", xlabel="share x of the entries that is new")
    return ax


def step0_shift(data: pd.DataFrame, ax: Axes) -> Axes:
    """Change of the loss before training: columns init, b_scale, shift; a point per seed.

    The line joins the means. Linear in the shift below 0.1 nats, logarithmic above.
    """
    for position, (init, rows) in enumerate(data.groupby("init", sort=False)):
        aside = 1.12 ** (position - 1)
        ax.plot(rows.b_scale * aside, rows["shift"], ms=4, **_points(init))
        means = rows.groupby("b_scale")["shift"].mean()
        ax.plot(means.index * aside, means, ms=5, label=init, **start_look(init))
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
        ax.plot(spread, 100 * rows.norm, ms=3, **TYPE_LOOKS[kind] | {"linestyle": ""})
    ax.set_xticks(range(data.type.nunique()), data.type.unique())
    ax.set(ylabel="‖sBA‖ / ‖W‖, %", ylim=(0, None))
    return ax


def training_curves(data: pd.DataFrame, ax: Axes, value: str) -> Axes:
    """One column of a curve against the step: columns variant, seed, step, and the named one.

    A thin line per seed, and the mean over seeds.
    """
    for variant, rows in data.groupby("variant", sort=False):
        line = _line(variant)
        by_seed = rows.pivot(index="step", columns="seed", values=value)
        if by_seed.shape[1] > 1:
            ax.plot(by_seed.index, by_seed, color=line["color"], lw=0.5, alpha=0.5)
        ax.plot(by_seed.index, by_seed.mean(axis=1), lw=1.4, label=variant, **line)
    ax.set(xlabel="step", xlim=(1, data.step.max()))
    return ax


def loss_and_gap(data: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Training curves in two panels: columns as above, with loss, and gap, its difference to the
    default's; one legend below both."""
    names = {"loss": "training loss, nats per token", "gap": "nats per token, minus default"}
    for ax, (value, name) in zip(axes, names.items(), strict=True):
        training_curves(data, ax, value).set_ylabel(name)
    handles = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*handles, loc="outside lower center", ncols=4, handlelength=3)


def by_variant(data: pd.DataFrame, ax: Axes) -> Axes:
    """A point per seed, the mean as a bar across: columns variant, value; variants downwards.

    Where a few values are far beyond the others, the axis is logarithmic there, and says so.
    """
    variants = list(dict.fromkeys(data.variant))
    for y, variant in enumerate(variants):
        values = data[data.variant == variant].value
        points = _points(variant)
        ax.plot(values, np.full(len(values), y), ms=4.5, alpha=0.7, mew=0, **points)
        ax.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=points["color"], lw=1.6)
    _rows_around_zero(variants, ax)
    most = float(f"{1.2 * data.value.abs().quantile(0.8):.1g}")
    if data.value.abs().max() > 3 * most > 0:
        ax.set_xscale("symlog", linthresh=most, linscale=1.5)
        far = float(f"{data.value.loc[data.value.abs().idxmax()]:.1g}")
        # The near end of the grey part has no label: it would run into that of the far end.
        ticks = [far, 0, -np.copysign(most, far)]
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.axvspan(far * 2, np.copysign(most, far), color="0.95", lw=0, zorder=0)
        ax.set_xlim(*sorted((far * 1.4, -np.copysign(1.5 * most, far))))
        ax.minorticks_off()
        ax.text(0.02, 0.98, "grey: logarithmic", transform=ax.transAxes, va="top", fontsize=7)
    return ax


def forest(data: pd.DataFrame, ax: Axes) -> Axes:
    """Differences with their intervals: columns variant, estimate, low, high, holm.

    A filled point is one that stands after Holm's correction at 5 %.
    """
    for y, row in enumerate(data.itertuples()):
        points = _points(row.variant)
        color = points["color"]
        ax.plot([row.low, row.high], [y, y], color=color, lw=1.4, solid_capstyle="butt")
        ax.plot(row.estimate, y, mfc=color if row.holm < 0.05 else "white", ms=5, **points)
    return _rows_around_zero(data.variant, ax)


def difference_table(data: pd.DataFrame) -> pd.DataFrame:
    """Differences as text, with the index of the table: columns as of `stats.Difference`, holm."""
    interval = [f"[{low:+.4f}, {high:+.4f}]" for low, high in zip(data.low, data.high, strict=True)]
    text = pd.DataFrame({"difference": data.estimate.map("{:+.4f}".format), "95 %": interval})
    text["p, Holm"] = ["< 0.01" if p < 0.01 else f"{p:.2f}" for p in data.holm]
    text["seen"], text["seeds"] = data.detectable.map("{:.3f}".format), data.seeds
    return text.set_index(data.index)


def _rows_around_zero(labels: Sequence[str], ax: Axes) -> Axes:
    """Name the rows of an axes, the first at the top, and mark zero."""
    ax.axvline(0, color=INK, lw=0.6)
    ax.xaxis.set_major_locator(plt.MaxNLocator(3))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    return ax


def loss_by_rate(data: pd.DataFrame, ax: Axes, template: float) -> Axes:
    """Held-out loss against the learning rate: columns start, seed, rate, loss, whole.

    A point per seed, and a line through the means of each start over the seeds that are `whole`,
    which were run at all of its rates; a vertical line at the papers' rate, `template`.
    """
    ax.axvline(template, color=GREY, lw=1, ls="--", zorder=0)
    for start, rows in data.groupby("start", sort=False):
        ax.plot(rows.rate, rows.loss, ms=4, alpha=0.6, mew=0, **_points(start))
        ax.plot(rows[rows.whole].groupby("rate").loss.mean(), lw=1.3, label=start, **_line(start))
    rates = sorted(set(data.rate))
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:.1e}".replace("e-0", "e-") for rate in rates], rotation=45)
    ax.minorticks_off()
    ax.set(xlabel="learning rate", ylabel="held-out loss, nats per token")
    return ax


def expected_rates(data: pd.DataFrame, ax: Axes, *, ends: tuple[float, float]) -> Axes:
    """Best rates that were found against those expected: columns start, expected, rate, low, high.

    On the line a best rate is the expected one. ends: of both axes; intervals are cut there.
    """
    for row in data.itertuples():
        points = _points(row.start)
        interval = np.clip([row.low, row.high], *ends)
        ax.plot([row.expected] * 2, interval, color=points["color"], lw=1.2)
        ax.plot(row.expected, row.rate, ms=6, label=row.start, **points)
    ax.plot(ends, ends, color=INK, lw=0.8, zorder=0)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set(xlabel="expected from the curvature", ylabel="best rate found")
    return ax


def letter_shares(data: pd.DataFrame, ax: Axes) -> Axes:
    """Shares of the letters A to D, one bar for each row of the table: label, A, B, C, D."""
    left = np.zeros(len(data))
    for letter, color in zip("ABCD", (BLUE, SKY, ORANGE, ACCENT), strict=True):
        ax.barh(data.label, data[letter], left=left, color=color, label=letter, height=0.7)
        for y, share in enumerate(data[letter]):
            if share > 0.04:
                ink = "white" if color in (BLUE, ACCENT) else INK
                ax.text(left[y] + share / 2, y, letter, ha="center", va="center", size=7, color=ink)
        left += data[letter]
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="share of the questions")
    return ax


def letters_alone(data: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy against what the letters give by themselves: columns variant, expected, observed."""
    for variant, rows in data.groupby("variant", sort=False):
        points = _points(variant)
        ax.plot(rows.expected, rows.observed, ms=5, mew=0.3, mec="white", label=variant, **points)
    ends = [data.expected.min(), data.expected.max()]
    ax.plot(ends, ends, color=INK, lw=0.8, zorder=0)
    ax.set(xlabel="expected from the letters alone", ylabel="accuracy in one order")
    return ax


def chance_of_gap(data: pd.DataFrame, gap: int, ax: Axes) -> Axes:
    """Chance that two equally good runs differ by so many answers: columns items, chance, label."""
    for number, (label, rows) in enumerate(data.groupby("label", sort=False)):
        ax.plot(rows["items"], rows.chance, ms=3.5, lw=1, label=label, **look(number))
    ax.axvline(gap, color=INK, lw=1, ls="--")
    ax.set(yscale="log", xlabel="questions of difference, at least", ylabel="chance")
    return ax
