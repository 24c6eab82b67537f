"""Fingerprints of models, and what training moves in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from wdlib import TYPES, WdlibError, paths
from wdlib.fingerprints.ancestors import Neighbour
from wdlib.fingerprints.independence import Independence
from wdlib.fingerprints.relation import Relation
from wdlib.plots.style import ACCENT, BLUE, GREY, INK, TYPE_LOOKS, headline, look


def densities_of_models(data: pd.DataFrame, looks: dict[str, dict], ax: Axes) -> Axes:
    """Densities of one type's values in several models: columns model, value, density.

    Values in standard deviations of that model and type; grey, the normal distribution.
    """
    for model, rows in data.groupby("model", sort=False):
        line = looks[model] | {"marker": ""}
        ax.plot(rows.value, rows.density, lw=1, label=model, **line)
    grid = np.linspace(-5, 5, 201)
    ax.plot(grid, stats.norm.pdf(grid), color=GREY, lw=2.5, alpha=0.6, label="normal", zorder=1)
    ax.set(yscale="log", xlim=(-14, 14), ylim=(1e-7, 3))
    return ax


def parallel_coordinates(data: pd.DataFrame, looks: dict[str, dict], ax: Axes) -> Axes:
    """A line per model over the types: columns model, type, value; a gap where a type is absent."""
    for model, rows in data.groupby("model", sort=False):
        values = rows.set_index("type").value.reindex(TYPES)
        known = values.dropna()
        ax.plot(
            [TYPES.index(t) for t in known.index], known, ":", color=looks[model]["color"], lw=0.8
        )
        ax.plot(range(len(TYPES)), values, ms=5, label=model, **looks[model])
    ax.set_xticks(range(len(TYPES)), TYPES)
    ax.set(ylabel="component of the vector", ylim=(0, None))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=3)
    return ax


def matrix_of_models(
    table: np.ndarray, names: list[str], ax: Axes, *, rows: bool = True, columns: bool = True
) -> Axes:
    """Distances between models with their numbers; rows, columns: whether they are named."""
    shown = np.where(np.eye(len(names), dtype=bool), np.nan, table)
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=np.nanmax(shown))
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.55, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    for (i, j), value in np.ndenumerate(shown):
        if i != j:
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            color = INK if light else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, size=8)
    ax.set_xticks(range(len(names)), names if columns else [], rotation=35, ha="right", fontsize=8)
    ax.set_yticks(range(len(names)), names if rows else [], fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    return ax


def dendrogram(table: np.ndarray, names: list[str], ax: Axes) -> list[int]:
    """Models joined by average linkage of symmetric distances; returns the order of the leaves."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    joined = hierarchy.linkage(squareform(table, checks=False), "average")
    drawn = hierarchy.dendrogram(
        joined, orientation="left", labels=names, ax=ax, color_threshold=0,
        above_threshold_color=INK,
    )  # fmt: skip
    ax.set(xlabel="distance at which they join")
    ax.tick_params(axis="y", labelsize=7)
    ax.grid(False)
    return drawn["leaves"][::-1]


def choice_of_k(data: pd.DataFrame, axes: np.ndarray) -> np.ndarray:
    """Silhouette and stability over k, a line per rank: columns rank, k, silhouette, stability,
    spread."""
    for number, (rank, rows) in enumerate(data.groupby("rank")):
        line, color = look(number), look(number)["color"]
        axes[0].plot(rows.k, rows.silhouette, ms=4, label=f"r = {rank}", **line)
        low, high = rows.stability - rows.spread, rows.stability + rows.spread
        axes[1].fill_between(rows.k, low, high, color=color, alpha=0.15, lw=0)
        axes[1].plot(rows.k, rows.stability, ms=4, **line)
    axes[0].set(xlabel="clusters K", ylabel="mean silhouette", ylim=(0, 1))
    axes[1].set(xlabel="clusters K", ylabel="adjusted Rand index", ylim=(0, 1.02))
    axes[0].legend()
    return axes


def cluster_map(data: pd.DataFrame, k: int, ax: Axes) -> Axes:
    """Clusters of all matrices, layers down and types across: columns type, layer, cluster."""
    table = data.pivot(index="layer", columns="type", values="cluster").reindex(columns=TYPES)
    ax.imshow(table, cmap=plt.get_cmap("viridis", k), vmin=-0.5, vmax=k - 0.5, aspect="auto")
    ax.set_xticks(range(len(TYPES)), TYPES, rotation=90, fontsize=8)
    ax.tick_params(length=0)
    ax.grid(False)
    return ax


def cluster_bar(k: int, axes: Sequence[Axes]) -> None:
    """The colours of k clusters as a bar below the axes of `cluster_map`s."""
    scale = plt.cm.ScalarMappable(plt.Normalize(-0.5, k - 0.5), plt.get_cmap("viridis", k))
    bar = axes[0].figure.colorbar(
        scale, ax=list(axes), ticks=range(k), location="bottom", aspect=30, shrink=0.9
    )
    bar.set_label("cluster, from flat spectra to steep ones")


def cluster_centres(data: pd.DataFrame, k: int, ax: Axes) -> Axes:
    """Centres of clusters: columns cluster, index (from 1), value; colours as in `cluster_map`."""
    colors = plt.get_cmap("viridis", k)
    for number, rows in data.groupby("cluster"):
        line = look(number) | {"color": colors(number), "markevery": (number % 3, 3)}
        ax.plot(rows["index"], rows.value, ms=3.5, label=f"{number}", **line)
    ax.set(xlabel="index i", ylabel="singular value / length of the vector", ylim=(0, None))
    ax.legend(title="cluster", ncols=2, title_fontsize=8)
    return ax


def recognition(table: pd.DataFrame, ax: Axes) -> Axes:
    """Shares of relatives that are recognised, 0 to 1: a row for each case, a column for each
    measure; white where a measure was not taken. Rows of one kind stand together.

    table: index (kind, case).
    """
    image = ax.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.3, anchor=(0, 0), pad=0.1)
    bar.set_label("share recognised")
    kinds = table.index.get_level_values(0)
    for place in np.flatnonzero(kinds[1:] != kinds[:-1]) + 0.5:
        ax.axhline(place, color="white", lw=3)
    for kind in dict.fromkeys(kinds):
        middle = np.flatnonzero(kinds == kind).mean()
        bold = ax.text(1.03, middle, kind, ha="center", va="center", rotation=270, fontsize=8)
        bold.set(fontweight="bold", transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(table)), table.index.get_level_values(1), fontsize=7)
    ax.set_xticks(range(table.shape[1]), [name.replace(" ", "\n") for name in table], fontsize=7)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    return ax


def strengths(data: pd.DataFrame, threshold: float, ax: Axes) -> Axes:
    """Scores by what was done, a strip for each kind: columns kind, score; dashed, the threshold.

    Strangers are triangles, relatives points.
    """
    kinds = list(dict.fromkeys(data.kind))
    rng = np.random.default_rng(0)
    for y, kind in enumerate(kinds):
        score = data.score[data.kind == kind]
        look = ("^", ACCENT) if kind == kinds[0] else ("o", BLUE)
        ax.plot(score, y + rng.uniform(-0.3, 0.3, len(score)), look[0], color=look[1], ms=3, mew=0)
    ax.axvline(threshold, color=INK, lw=1, ls="--")
    counts = data.kind.value_counts()
    ax.set_yticks(range(len(kinds)), [f"{kind} ({counts[kind]})" for kind in kinds])
    ax.invert_yaxis()
    ax.set(xlabel="strength: the score that a tenth of the layers reach")
    return ax


def strips(data: pd.DataFrame, looks: dict[str, dict], ax: Axes) -> Axes:
    """Distances on a log axis in rows under headings: columns heading, row, case, distance.

    Cases that `looks` names are points of that colour and marker; the others are red bars with
    their name. A distance of zero stands at the left edge, beyond a line.
    """
    places = list(dict.fromkeys(zip(data.heading, data.row, strict=True)))
    headings = list(dict.fromkeys(data.heading))
    y = {place: i + 1.4 * headings.index(place[0]) for i, place in enumerate(places)}
    zero = 10.0 ** (np.floor(np.log10(data.distance[data.distance > 0].min())) - 0.5)
    data = data.assign(x=np.maximum(data.distance, zero))
    named = data[~data.case.isin(list(looks))]
    for place, part in data.drop(named.index).groupby(["heading", "row"]):
        cases = [case for case in looks if case in set(part.case)]
        for i, case in enumerate(cases):
            x, level = part.x[part.case == case], y[place] + 0.2 * (i - (len(cases) - 1) / 2)
            ax.plot(x, [level] * len(x), ms=4, alpha=0.75, mew=0, **_points(looks[case]))
    for (heading, row, x), part in named.groupby(["heading", "row", "x"]):
        ax.plot(x, y[heading, row], "|", color=ACCENT, ms=8, mew=1.2)
        box = {"fc": "white", "ec": "none", "pad": 0.5}
        ax.annotate(", ".join(part.case), (x, y[heading, row]), (5, 0), color=ACCENT, bbox=box,
                    fontsize=7.5, textcoords="offset points", va="center_baseline")  # fmt: skip
    for heading in headings:
        top = min(v for place, v in y.items() if place[0] == heading)
        ax.text(-0.01, top - 0.85, heading, transform=ax.get_yaxis_transform(), weight="bold",
                ha="right", va="center", fontsize=8)  # fmt: skip
    ax.axvline(zero * 10**0.4, color=INK, lw=0.6)
    ax.set(xscale="log", xlim=(zero / 2, 2 * max(1, data.distance.max())))
    ax.set_yticks(list(y.values()), [row for _, row in places])
    ax.set_ylim(max(y.values()) + 0.6, -1.3)
    ticks = 10.0 ** np.arange(np.ceil(np.log10(zero)), np.log10(ax.get_xlim()[1]), 1)
    ax.set_xticks([zero, *ticks], ["0", *(f"$10^{{{np.log10(t):.0f}}}$" for t in ticks)])
    ax.minorticks_off()
    return ax


def _points(look: dict) -> dict:
    """A look without its line."""
    return look | {"linestyle": ""}


def points_by_type(data: pd.DataFrame, looks: dict[str, dict], value: str, ax: Axes) -> Axes:
    """A point per run, types across, data sets side by side: columns type, data, and the named."""
    for i, (name, rows) in enumerate(data.groupby("data", sort=False)):
        x = [TYPES.index(t) + 0.22 * (i - (len(looks) - 1) / 2) for t in rows.type]
        ax.plot(x, rows[value], ms=4, alpha=0.75, mew=0, label=name, **_points(looks[name]))
    ax.axhline(0, color=INK, lw=0.6)
    ax.set_xticks(range(len(TYPES)), TYPES)
    return ax


def frame(data: pd.DataFrame, ax: Axes) -> Axes:
    """Frame matrices of a `cluster_map`: columns type, layer; only the rows that are given."""
    for row in data.itertuples():
        corner = (TYPES.index(row.type) - 0.5, row.layer - 0.5)
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, ec=ACCENT, lw=1.6))
    return ax


def against_border(data: pd.DataFrame, ax: Axes) -> Axes:
    """How far matrices moved against the border of their cluster: columns type, margin, moved.

    A matrix below the diagonal cannot have changed its cluster.
    """
    for kind in TYPES:
        rows = data[data.type == kind]
        line = _points(TYPE_LOOKS[kind])
        ax.plot(rows.margin, rows.moved, ms=3.5, mew=0, label=kind, **line)
    ends = np.array([data[["margin", "moved"]].min().min(), data[["margin", "moved"]].max().max()])
    ax.plot(ends, ends, color=INK, lw=0.8)
    ax.set(xscale="log", yscale="log", xlabel="distance to the border of the cluster")
    ax.set(ylabel="moved by training")
    return ax


def runs_matrix(table: np.ndarray, data: Sequence[str], ax: Axes) -> Axes:
    """Distances between runs, which are ordered by their data set: lines between data sets."""
    shown = np.where(np.eye(len(data), dtype=bool), np.nan, table)
    bar = ax.figure.colorbar(ax.imshow(shown, cmap="cividis_r", vmin=0), ax=ax, shrink=0.75)
    bar.set_label("distance / median")
    names = list(dict.fromkeys(data))
    ends = np.cumsum([list(data).count(name) for name in names]) - 0.5
    for end in ends[:-1]:
        ax.axhline(end, color="white", lw=2)
        ax.axvline(end, color="white", lw=2)
    middles = (ends + np.concatenate([[-0.5], ends[:-1]])) / 2
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names, rotation=90, va="center")
    ax.tick_params(length=0)
    ax.grid(False)
    return ax


def against_update(data: pd.DataFrame, value: str, ax: Axes) -> Axes:
    """A change of every matrix against the norm of its update: columns type, update, and the named.

    Log axes; a change of zero is left out.
    """
    for kind in TYPES:
        rows = data[(data.type == kind) & (data[value] > 0)]
        line = _points(TYPE_LOOKS[kind])
        ax.plot(rows["update"], rows[value], ms=3.5, mew=0, label=kind, **line)
    ax.set(xscale="log", yscale="log", xlabel=r"size of the update, $\|\Delta W\| / \|W\|$")
    ax.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    ax.xaxis.set_minor_locator(plt.NullLocator())
    return ax


def layer_against_layer(
    table: np.ndarray, ax: Axes, *, names: tuple[str, str], label: str = "share of matched neurons"
) -> Axes:
    """Two models layer against layer, first down and second across: shares, 0 to 1.

    A copy shows its diagonal, a stack its blocks. table: (layers of the first, of the second);
    names: of the two models. A dot marks the largest value of each row that reaches a quarter.
    """
    look = {"cmap": "cividis", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    best, rows = table.argmax(axis=1), np.flatnonzero(table.max(axis=1) >= 0.25)
    _layers(table, ax, names, label, look)
    ax.plot(best[rows], rows, "o", color=ACCENT, ms=2.5, mew=0, ls="")
    return ax


def nearness(relation: Relation, ax: Axes, *, names: tuple[str, str]) -> Axes:
    """Layers of one model, down, against those of another, across: how near, in `relate`'s unit.

    A copy shows its diagonal, a stack its blocks. A ring marks where each recognised layer is from.
    """
    least = min(-3.0, float(relation.nearness.min()))
    look = {"cmap": "cividis_r", "vmin": least, "vmax": 0, "aspect": "auto"}
    _layers(relation.nearness, ax, names, "log of the difference over its median", look)
    rows = np.flatnonzero(relation.recognised)
    ax.plot(relation.places[rows], rows, "o", mfc="none", mec=ACCENT, mew=0.8, ms=5, ls="")
    return ax


def _layers(
    table: np.ndarray, ax: Axes, names: tuple[str, str], label: str, look: dict[str, Any]
) -> None:
    """A table with the layers of one model down and those of another across. look: of `imshow`."""
    ax.figure.colorbar(ax.imshow(table, **look), ax=ax, shrink=0.75).set_label(label)
    ax.set(xlabel=f"layer of {names[1]}", ylabel=f"layer of {names[0]}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.grid(False)


def picture_of_pair(
    path: Path, model: str, seen: Neighbour, tested: Independence | None = None
) -> Path:
    """Write a picture of two models, layer against layer: a png, svg or pdf by the path's end.

    Shares of matched neurons where the checkpoints were tested, the nearness of their records
    otherwise.

    Raises: WdlibError where there is nothing to draw.
    """
    fig, ax = plt.subplots(figsize=(6.4, 5.4))
    if tested is not None and tested.places_a:
        layer_against_layer(tested.screen, ax, names=(tested.a, tested.b))
        title, of = tested.finding, "neurons, layer against layer"
    elif seen.relation is not None:
        nearness(seen.relation, ax, names=(model, seen.model))
        number, every = int(seen.relation.recognised.sum()), len(seen.relation.layers)
        title = f"{number} of {every} layers of {model} are recognised in {seen.model}"
        of = "records, layer against layer"
    else:
        raise WdlibError(f"the records of {model} and {seen.model} hold no layers to draw")
    headline(fig, title, of)
    with paths.atomic_write(path) as part:
        fig.savefig(part, format=path.suffix[1:])
    plt.close(fig)
    return path
