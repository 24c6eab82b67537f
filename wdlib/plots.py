"""One function per figure: each takes a tidy table (and an Axes), draws it, returns the Axes.

Notebooks alone import this module. What a figure shows is what its table holds; `save` writes both.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from wdlib import TYPES, characterize, fits, models, paper, paths, rivals
from wdlib.stats import wilson

COLORS = {
    "q": "#1b4f8a",
    "k": "#3f86c4",
    "v": "#8db9dd",
    "o": "#5f5f8f",
    "gate": "#a34a00",
    "up": "#e07b1a",
    "down": "#f2b366",
}
"""Attention in blues, MLP in oranges."""

INK, ACCENT = "#222222", "#c0392b"
CLASS_COLORS = {"power-law": "#1b4f8a", "normal": "#e07b1a", "undecided": "#b8b8b8"}
NULL_COLORS = ("#e07b1a", "#2e7d4f", "#7b5ea7")
ESTIMATOR_COLORS = {"csn": ACCENT, "full": "#2e7d4f", "loglog": "#7b5ea7"}


def set_style() -> None:
    """Use the project's matplotlib style in this session."""
    plt.style.use(paths.STYLE)


def folder(model: str, rank: int) -> Path:
    """Where a notebook's figures go: figures/ for the default run, a folder of their own else."""
    if (model, rank) == (models.DEFAULT, paper.RANKS[0]):
        return paths.FIGURES
    return paths.FIGURES / "other" / f"{Path(model).stem}-r{rank}"


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
        with paths.whole(folder / f"{name}.{suffix}") as part:
            write(part)


def shades(n: int) -> list:
    """n colours for an ordered quantity, dark to bright."""
    return sns.color_palette("viridis", n)


def value_density(data: pd.DataFrame, ax: Axes) -> Axes:
    """Densities of weight values: columns type, value, density; a Gaussian of equal width dashed.

    The values of each type are in units of that type's standard deviation.
    """
    for kind, rows in data.groupby("type", sort=False):
        shown = rows[rows.density > 0]
        ax.plot(shown.value, shown.density, color=COLORS[kind], label=kind)
    grid = np.linspace(-5, 5, 201)
    ax.plot(
        grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), "--", color=INK, lw=1, label="normal"
    )
    ax.set(yscale="log", xlabel="value / standard deviation", ylabel="density", ylim=(1e-7, 3))
    ax.legend(ncols=2, loc="upper right", handlelength=1.2)
    return ax


def singular_values(data: pd.DataFrame, ax: Axes) -> Axes:
    """Spectra of one type, one line per layer: columns layer, index (from 1), relative."""
    layers = data.groupby("layer")
    for shade, (_, rows) in zip(shades(layers.ngroups), layers, strict=True):
        ax.plot(rows["index"], rows.relative, color=shade, lw=0.8)
    ax.set_ylim(0, 1.03)
    return ax


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
    ax.stairs(density, edges, fill=True, color=COLORS["v"], ec=COLORS["q"], lw=0.8, baseline=0)
    ax.set(xscale="log", yscale="log", xlabel="cosine distance", ylabel="density")
    return pd.DataFrame({"from": edges[:-1], "to": edges[1:], "density": density})


def ccdf_table(distances: np.ndarray, points: int = 400) -> pd.DataFrame:
    """The complementary distribution at up to `points` values evenly spread in log x, and all of
    the 100 largest, where single distances are visible."""
    x, p = fits.ccdf(distances)
    x, p = x[x > 0], p[x > 0]
    kept = np.unique(np.searchsorted(x, np.geomspace(x[0], x[-1], points)))
    kept = np.union1d(np.minimum(kept, len(x) - 1), np.arange(max(0, len(x) - 100), len(x)))
    return pd.DataFrame({"distance": x[kept], "ccdf": p[kept]})


def ccdf(data: pd.DataFrame, ax: Axes, *, color: str = INK, label: str | None = None) -> Axes:
    """A complementary distribution on log axes: columns distance, ccdf."""
    ax.plot(data.distance, data.ccdf, drawstyle="steps-post", color=color, label=label)
    ax.set(xscale="log", yscale="log", xlabel="cosine distance x", ylabel="share of distances ≥ x")
    return ax


def fitted(fit: fits.PowerLawFit, ax: Axes, high: float, *, color: str, label: str) -> Axes:
    """The complementary distribution of a fitted law, dashed, from its xmin up to `high`."""
    x = np.geomspace(fit.xmin, min(high, fit.xmax), 200)
    y = fits.power_law_ccdf(fit, x)
    ax.plot(x[y > 0], y[y > 0], "--", color=color, label=label)
    return ax


def errors(data: pd.DataFrame, ax: Axes) -> Axes:
    """Relative errors by method, a point per matrix: columns method, error, matrices."""
    methods, kinds = list(data.method.unique()), list(data.matrices.unique())
    for kind, color, side in zip(kinds, (COLORS["q"], COLORS["up"]), (-0.2, 0.2), strict=True):
        for row, method in enumerate(methods):
            shown = data.error[(data.method == method) & (data.matrices == kind)]
            spread = row + side + np.linspace(-0.13, 0.13, len(shown))
            label = kind if row == 0 else None
            ax.plot(shown, spread, "o", color=color, alpha=0.7, mew=0, label=label)
    ax.set_yticks(range(len(methods)), methods)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="largest relative error of the values")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def before_after(data: pd.DataFrame, ax: Axes) -> Axes:
    """Distances before and after a change of the weights: columns before, after."""
    ax.plot(data.before, data.after, ".", color=COLORS["q"], ms=2.5, alpha=0.6)
    ends = [data.to_numpy().min(), data.to_numpy().max()]
    ax.plot(ends, ends, color=ACCENT, lw=1)
    ax.set(xscale="log", yscale="log", aspect="equal")
    return ax


def relative_change(data: pd.DataFrame, ax: Axes) -> Axes:
    """Relative change of singular values by index: columns type, index, relative change."""
    for kind, rows in data.groupby("type", sort=False):
        shift = (list(TYPES).index(kind) - 3) * 0.1
        ax.plot(
            rows["index"] + shift, 100 * rows["relative change"], ".", color=COLORS[kind], ms=3,
            label=kind,
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
    bar = ax.figure.colorbar(scale, cax=ax.inset_axes([0.1, 0.05, 0.12, 0.9]))
    bar.set_label("layer")
    return ax


def label_lowest(axes: np.ndarray) -> None:
    """Label the x ticks of the lowest panel that is drawn in each column of a grid.

    With shared axes matplotlib labels the last row alone, even where its panel is switched off.
    """
    for column in axes.T:
        [ax for ax in column if ax.axison][-1].tick_params(labelbottom=True)


def intervals(draws: pd.DataFrame, estimates: dict[str, float], ax: Axes) -> Axes:
    """Resampled exponents, a column of `draws` per estimator, with 95 % bar and the estimate."""
    for row, (name, estimate) in enumerate(estimates.items()):
        spread = row + np.linspace(-0.25, 0.25, len(draws))
        ax.plot(draws[name], spread, ".", color=ESTIMATOR_COLORS[name], ms=2, alpha=0.5)
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


def alpha_by_xmin(table: fits.AlphaByXmin, chosen: fits.PowerLawFit, ax: Axes) -> Axes:
    """The exponent against the start of the tail; band: 95 % for independent draws."""
    ax.fill_between(
        table.xmin,
        table.alpha - 1.96 * table.sigma,
        table.alpha + 1.96 * table.sigma,
        color=COLORS["v"],
        lw=0,
    )
    ax.plot(table.xmin, table.alpha, color=COLORS["q"])
    ax.plot(chosen.xmin, chosen.alpha, "X", color="white", mec=INK, ms=8)
    ax.set(xscale="log", yscale="log", xlabel="xmin", ylabel="α of the distances ≥ xmin")
    ax.yaxis.set_major_formatter("{x:g}")
    return ax


def rival_tails(distances: np.ndarray, laws: dict[str, rivals.RivalFit], ax: Axes) -> pd.DataFrame:
    """The tail of the data from the laws' xmin on, with the laws; returns what it drew."""
    xmin = next(iter(laws.values())).xmin
    data = ccdf_table(distances[distances >= xmin]).assign(law="data")
    ccdf(data, ax, label="distances")
    x = np.geomspace(xmin, distances.max(), 200)
    tables = [data]
    for color, (name, law) in zip(sns.color_palette("tab10"), laws.items(), strict=False):
        tables.append(pd.DataFrame({"distance": x, "ccdf": rivals.ccdf(law, x), "law": name}))
        label = name.replace("_", " ")
        ax.plot(x, tables[-1].ccdf, "--", color=color, label=label, lw=1.2)
    ax.set(ylim=(0.5 / data.shape[0], 1.5), ylabel="share of the tail ≥ x")
    return pd.concat(tables)


def rates(data: pd.DataFrame, ax: Axes, *, nominal: float) -> Axes:
    """Rejection rates with 95 % intervals, a row per case: columns case, test, rate, low, high."""
    cases = list(data.case.unique())
    for color, shift, (test, rows) in zip(
        (ACCENT, COLORS["q"]), (-0.15, 0.15), data.groupby("test", sort=False), strict=True
    ):
        y = [cases.index(case) + shift for case in rows.case]
        ax.hlines(y, rows.low, rows.high, color=color, lw=1)
        ax.plot(rows.rate, y, "o", color=color, ms=4, label=test)
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
            low, high = wilson(round(rate * n), n)
            rows.append((f"{case.dependence}, {case.vectors} vectors", test, rate, low, high))
    return pd.DataFrame(rows, columns=["case", "test", "rate", "low", "high"])


def pair_panel(data: pd.DataFrame, pair: characterize.Pair, ax: Axes) -> Axes:
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


def class_map(character: characterize.Characterisation, ax: Axes) -> pd.DataFrame:
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


def text_table(table: pd.DataFrame) -> HTML:
    """A table of sentences for a notebook: aligned to the left, without row numbers."""
    style = table.style.hide(axis="index").set_properties(**{"text-align": "left"})
    header = [{"selector": "th", "props": "text-align: left"}]
    return HTML(style.set_table_styles(header).to_html(table_uuid="text"))


# Across architectures ----------------------------------------------------------------------------


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


def medians_by_type(data: pd.DataFrame, colors: dict, ax: Axes) -> Axes:
    """Median distances within each type: columns model, type, median, null; null as small dots."""
    groups = data.groupby("model", sort=False)
    for i, (model, rows) in enumerate(groups):
        color = colors[model]
        rows = rows.set_index("type").reindex(TYPES)  # so that the line breaks at an absent type
        x = np.arange(len(TYPES)) + 0.08 * (i - (groups.ngroups - 1) / 2)
        ax.plot(x, rows["median"], "o-", color=color, ms=5, lw=0.8, label=model)
        ax.plot(x, rows.null, ".", color=color, ms=4)
    ax.set_xticks(range(len(TYPES)), TYPES)
    ax.set(yscale="log", ylabel="median distance between layers")
    return ax


# Fingerprints ------------------------------------------------------------------------------------


def model_colors(names: list[str]) -> dict:
    """One colour per model."""
    return dict(zip(names, sns.color_palette("tab10", len(names)), strict=True))


def densities_of_models(data: pd.DataFrame, colors: dict, ax: Axes) -> Axes:
    """Densities of one type's values in several models: columns model, value, density.

    Values in standard deviations of that model and type; dashed, the normal distribution.
    """
    for model, rows in data.groupby("model", sort=False):
        ax.plot(rows.value, rows.density, color=colors[model], lw=1, label=model)
    grid = np.linspace(-5, 5, 201)
    ax.plot(grid, stats.norm.pdf(grid), "--", color=INK, lw=1, label="normal")
    ax.set(yscale="log", xlim=(-14, 14), ylim=(1e-7, 3))
    return ax


def parallel_coordinates(data: pd.DataFrame, colors: dict, ax: Axes) -> Axes:
    """A line per model over the types: columns model, type, value; a gap where a type is absent."""
    for model, rows in data.groupby("model", sort=False):
        values = rows.set_index("type").value.reindex(TYPES)
        known = values.dropna()
        ax.plot([TYPES.index(t) for t in known.index], known, ":", color=colors[model], lw=0.8)
        ax.plot(range(len(TYPES)), values, "o-", color=colors[model], ms=4, label=model)
    ax.set_xticks(range(len(TYPES)), TYPES)
    ax.set(ylabel="component of the vector", ylim=(0, None))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=1.4)
    return ax


def matrix_of_models(table: np.ndarray, names: list[str], ax: Axes, *, rows: bool = True) -> Axes:
    """Distances between models with their numbers; only with `rows` are the rows named."""
    shown = np.where(np.eye(len(names), dtype=bool), np.nan, table)
    ax.imshow(shown, cmap="viridis_r", vmin=0, vmax=np.nanmax(shown))
    dark = np.nanmax(shown) / 2
    for (i, j), value in np.ndenumerate(shown):
        if i != j:
            color = "white" if value > dark else INK
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, size=7)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
    ax.set_yticks(range(len(names)), names if rows else [], fontsize=7)
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
    for (rank, rows), color in zip(data.groupby("rank"), (COLORS["q"], COLORS["up"]), strict=False):
        axes[0].plot(rows.k, rows.silhouette, "o-", color=color, label=f"r = {rank}")
        low, high = rows.stability - rows.spread, rows.stability + rows.spread
        axes[1].fill_between(rows.k, low, high, color=color, alpha=0.15, lw=0)
        axes[1].plot(rows.k, rows.stability, "o-", color=color)
    axes[0].set(xlabel="clusters K", ylabel="mean silhouette", ylim=(0, 1))
    axes[1].set(xlabel="clusters K", ylabel="adjusted Rand index", ylim=(0, 1.02))
    axes[0].legend()
    return axes


def cluster_map(data: pd.DataFrame, k: int, ax: Axes) -> Axes:
    """Clusters of all matrices, layers down and types across: columns type, layer, cluster."""
    table = data.pivot(index="layer", columns="type", values="cluster").reindex(columns=TYPES)
    ax.imshow(table, cmap=plt.get_cmap("viridis", k), vmin=-0.5, vmax=k - 0.5, aspect="auto")
    ax.set_xticks(range(len(TYPES)), TYPES, rotation=90, fontsize=7)
    ax.tick_params(length=0)
    ax.grid(False)
    return ax


def cluster_centres(data: pd.DataFrame, k: int, ax: Axes) -> Axes:
    """Centres of clusters: columns cluster, index (from 1), value; colours as in `cluster_map`."""
    colors = plt.get_cmap("viridis", k)
    for number, rows in data.groupby("cluster"):
        ax.plot(rows["index"], rows.value, color=colors(number), label=f"{number}")
    ax.set(xlabel="index i", ylabel="singular value / length of the vector", ylim=(0, None))
    ax.legend(title="cluster", ncols=2, title_fontsize=8)
    return ax


def identification(data: pd.DataFrame, threshold: float, ax: Axes) -> Axes:
    """Spectral differences of copies and others on a log axis: columns case, copy, distance."""
    cases = list(data.case.unique())
    for copy, color, label in (
        (True, COLORS["q"], "from the model it was made of"),
        (False, COLORS["up"], "from any other"),
    ):
        rows = data[data["copy"] == copy]
        y = [cases.index(case) for case in rows.case]
        ax.plot(rows.distance, y, "o", color=color, ms=4, alpha=0.7, mew=0, label=label)
    ax.axvline(threshold, color=ACCENT, lw=1)
    ax.set_yticks(range(len(cases)), cases)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="spectral difference")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


# Reshaped LoRA -----------------------------------------------------------------------------------

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


def disagreements(
    character: characterize.Characterisation, reference: characterize.Characterisation, ax: Axes
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


# Notebook 06: the distribution generator -------------------------------------------------------


def replaced_share(data: pd.DataFrame, slope: float, ax: Axes) -> Axes:
    """Distance to the template against the share of new entries: columns share, low, mean, high.

    slope: of the first-order law, distance = slope * share, drawn dashed.
    """
    ax.fill_between(
        data.share, data.low, data.high, color=COLORS["v"], lw=0, label="90 % of arrays"
    )
    ax.plot(data.share, data["mean"], "o-", color=COLORS["q"], ms=3, label="mean")
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
        data["shape"], data.window, yerr=1.96 * data.error, fmt="o", color=COLORS["q"], ms=4,
        label="distances, linear range",
    )  # fmt: skip
    ax.plot(
        data["shape"], data["product"], "_", color=COLORS["up"], ms=12, mew=2, label="count × χ²"
    )
    ax.plot(
        data["shape"], data.csn, "x", color=ESTIMATOR_COLORS["csn"], ms=5, label="distances, csn"
    )
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
    ax.stairs(density, edges, fill=True, color=COLORS["v"])
    ax.plot(middle, table["chi-square"], color=ACCENT, label=f"χ², {freedom} degrees of freedom")
    ax.plot(middle, table["normal"], "--", color=INK, label="normal")
    ax.set(xlabel="distance / mean", ylim=(0, 1.35 * density.max()))
    ax.legend(loc="upper right", fontsize=7)
    return table


def sweep(data: pd.DataFrame, axes: np.ndarray) -> None:
    """One parameter swept, a column of three panels: median distance, alpha, share power-law.

    data: columns value, median, alpha, alpha_low, alpha_high, rate, and default (bool, one row).
    """
    top, middle, bottom = axes
    for ax, column in zip(axes, ("median", "alpha", "rate"), strict=True):
        ax.plot(data.value, data[column], "o-", color=COLORS["q"], ms=3, lw=1)
        chosen = data[data.default]
        ax.plot(chosen.value, chosen[column], "o", color=ACCENT, ms=5)
        ax.set(xscale="log")
        ax.tick_params(labelsize=6, which="both")
        ax.set_xticks(data.value, [f"{value:g}" for value in data.value], rotation=60)
        ax.xaxis.set_minor_locator(plt.NullLocator())
    middle.fill_between(data.value, data.alpha_low, data.alpha_high, color=COLORS["v"], lw=0)
    top.set(yscale="log")
    middle.set(yscale="log", ylim=(1.2, 30))
    middle.set_yticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    middle.yaxis.set_minor_locator(plt.NullLocator())
    bottom.set(ylim=(-0.05, 1.05), xlabel=data.parameter.iloc[0])


# Notebook 08: the LoRA experiments -------------------------------------------------------------


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


# Notebook 11: fingerprints under LoRA ------------------------------------------------------------

DATA_COLORS = ("#1b4f8a", "#e07b1a", "#2e7d4f", "#7b5ea7")
"""By the order of the data sets."""


def data_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each data set, in the order of their first appearance."""
    return dict(zip(dict.fromkeys(names), cycle(DATA_COLORS), strict=False))


def strips(data: pd.DataFrame, colors: dict[str, str], ax: Axes) -> Axes:
    """Distances on a log axis in rows under headings: columns heading, row, case, distance.

    Cases that `colors` names are dots of that colour; the others are red marks with their name. A
    distance of zero stands at the left edge, beyond a line.
    """
    places = list(dict.fromkeys(zip(data.heading, data.row, strict=True)))
    headings = list(dict.fromkeys(data.heading))
    y = {place: i + 1.4 * headings.index(place[0]) for i, place in enumerate(places)}
    zero = 10.0 ** (np.floor(np.log10(data.distance[data.distance > 0].min())) - 0.5)
    data = data.assign(x=np.maximum(data.distance, zero))
    named = data[~data.case.isin(list(colors))]
    for place, part in data.drop(named.index).groupby(["heading", "row"]):
        cases = [case for case in colors if case in set(part.case)]
        for i, case in enumerate(cases):
            x, level = part.x[part.case == case], y[place] + 0.2 * (i - (len(cases) - 1) / 2)
            ax.plot(x, [level] * len(x), "o", color=colors[case], ms=4, alpha=0.75, mew=0)
    for (heading, row, x), part in named.groupby(["heading", "row", "x"]):
        ax.plot(x, y[heading, row], "|", color=ACCENT, ms=8, mew=1.2)
        style = {"bbox": {"fc": "white", "ec": "none", "pad": 0.5}, "va": "center_baseline"}
        ax.annotate(", ".join(part.case), (x, y[heading, row]), (5, 0), color=ACCENT,
                    fontsize=6.5, textcoords="offset points", **style)  # fmt: skip
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


def points_by_type(data: pd.DataFrame, colors: dict[str, str], value: str, ax: Axes) -> Axes:
    """A point per run, types across, data sets side by side: columns type, data, and the named."""
    for i, (name, rows) in enumerate(data.groupby("data", sort=False)):
        x = [TYPES.index(t) + 0.22 * (i - (len(colors) - 1) / 2) for t in rows.type]
        ax.plot(x, rows[value], "o", color=colors[name], ms=4, alpha=0.75, mew=0, label=name)
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
        ax.plot(rows.margin, rows.moved, "o", color=COLORS[kind], ms=3, mew=0, label=kind)
    ends = np.array([data[["margin", "moved"]].min().min(), data[["margin", "moved"]].max().max()])
    ax.plot(ends, ends, color=INK, lw=0.8)
    ax.set(xscale="log", yscale="log", xlabel="distance to the border of the cluster")
    ax.set(ylabel="moved by training")
    return ax


def runs_matrix(table: np.ndarray, data: Sequence[str], ax: Axes) -> Axes:
    """Distances between runs, which are ordered by their data set: lines between data sets."""
    shown = np.where(np.eye(len(data), dtype=bool), np.nan, table)
    ax.figure.colorbar(ax.imshow(shown, cmap="viridis_r", vmin=0), ax=ax, shrink=0.75)
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
        ax.plot(rows["update"], rows[value], "o", color=COLORS[kind], ms=3, mew=0, label=kind)
    ax.set(xscale="log", yscale="log", xlabel=r"size of the update, $\|\Delta W\| / \|W\|$")
    ax.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    ax.xaxis.set_minor_locator(plt.NullLocator())
    return ax
