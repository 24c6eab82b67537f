"""Figures: what is drawn is what is saved, and saving twice gives the same bytes."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from wdlib import TYPES, paper, paths
from wdlib.checkpoints import catalogue
from wdlib.fits import estimators
from wdlib.plots import classes, fingerprints, fits, lora, style
from wdlib.plots.distances import histogram, medians_by_type
from wdlib.plots.style import ACCENT, INK, folder, label_lowest, set_style

DRAW = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from wdlib import plots
plots.set_style()
errors = pd.DataFrame({"method": ["a", "b"] * 6, "error": np.logspace(-9, -1, 12),
                       "matrices": ["real"] * 6 + ["planted"] * 6})
fig, ax = plt.subplots()
plots.errors(errors, ax)
plots.save(fig, "99_errors", errors, Path(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def closed_figures():
    with plt.rc_context():
        plt.switch_backend("Agg")
        set_style()
        yield
    plt.close("all")


def test_two_processes_write_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / name)], check=True)
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert written == ["99_errors.csv", "99_errors.png", "99_errors.svg"]
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_figure_that_cannot_be_written_leaves_no_picture(tmp_path):
    fig, _ = plt.subplots()
    with pytest.raises(AttributeError):
        style.save(fig, "99_none", None, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg", ".png"}


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with paths.atomic_write(path) as part:
        part.write_text("old")

    def fail():
        with paths.atomic_write(path) as part:
            part.write_text("new, but only ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_only_the_default_run_writes_to_the_figures_folder():
    default = folder(catalogue.DEFAULT, paper.RANKS[0])
    assert default == paths.FIGURES
    others = {folder(catalogue.DEFAULT, 64), folder("gemma-3-270m", 16)}
    assert default not in others
    assert len(others) == 2


def test_the_drawn_tail_has_every_one_of_the_largest_distances():
    x = np.random.default_rng(0).pareto(1.5, 5000) + 1
    table = fits.ccdf_table(x, points=50)
    assert len(table) <= 150
    np.testing.assert_array_equal(table.distance.tail(100), np.sort(x)[-100:])
    share = [(x >= value).mean() for value in table.distance]
    np.testing.assert_allclose(table.ccdf, share, rtol=1e-12)


def test_the_histogram_is_a_density():
    x = np.random.default_rng(0).lognormal(-6, 2, 4000)
    _, ax = plt.subplots()
    table = histogram(np.append(x, 0.0), ax)
    assert ((table.to - table["from"]) * table.density).sum() == pytest.approx(1)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_a_fitted_law_is_drawn_through_the_data_at_xmin():
    x = np.random.default_rng(1).pareto(1.5, 2000) + 1
    fit = estimators.power_law(x)
    _, ax = plt.subplots()
    fits.fitted(fit, ax, x.max(), color="red", label="law")
    start = ax.lines[0].get_xydata()[0]
    assert start == pytest.approx((fit.xmin, fit.n_tail / fit.n))


def test_intervals_show_the_quantiles_of_the_draws():
    draws = pd.DataFrame({name: np.linspace(1, 2, 401) for name in fits.ESTIMATOR_COLORS})
    _, ax = plt.subplots()
    fits.intervals(draws, dict.fromkeys(draws, 1.5), ax)
    bars = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(bars) == 3
    for bar in bars:
        np.testing.assert_allclose(bar, [1.025, 1.975])


def test_agreement_marks_the_correlations_above_what_renamed_types_give():
    data = pd.DataFrame(
        {
            "pair": ["a, b", "a, c", "b, c"],
            "correlation": [0.8, 0.1, np.nan],
            "low": [-0.4, -0.3, np.nan],
            "high": [0.5, 0.2, np.nan],
        }
    )
    _, ax = plt.subplots()
    assert classes.agreement(data, ax) is ax
    chance = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    np.testing.assert_allclose(chance, data[["low", "high"]])
    points = {line.get_color(): line.get_xydata() for line in ax.lines if line.get_marker() == "o"}
    np.testing.assert_array_equal(points[ACCENT], [[0.8, 0]])
    np.testing.assert_array_equal(points[INK], [[0.1, 1], [np.nan, 2]])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(data.pair)
    low, high = ax.get_ylim()
    assert low > high  # the first pair stands at the top


def test_the_lowest_panel_that_is_drawn_has_labels():
    fig, axes = plt.subplots(2, 2, sharex=True)
    axes[1, 1].set_axis_off()
    label_lowest(axes)
    fig.canvas.draw()
    labelled = [[any(t.get_visible() for t in ax.get_xticklabels()) for ax in row] for row in axes]
    assert labelled == [[False, True], [True, True]]


def test_medians_by_type_leave_a_gap_where_a_type_is_absent():
    kinds = [t for t in TYPES if t != "gate"]
    data = pd.DataFrame(
        [(m, t, s * (i + 1), s / (i + 1))
         for m, s, types in (("full", 1.0, TYPES), ("encoder", 10.0, kinds))
         for i, t in enumerate(types[::-1])],  # in any order
        columns=["model", "type", "median", "null"],
    )  # fmt: skip
    _, ax = plt.subplots()
    assert medians_by_type(data, {"encoder": "blue", "full": "red"}, ax) is ax
    lines = {line.get_label(): line for line in ax.lines[::2]}
    assert {name: line.get_color() for name, line in lines.items()} == {
        "full": "red", "encoder": "blue",
    }  # fmt: skip
    for (model, line), null in zip(lines.items(), ax.lines[1::2], strict=True):
        rows = data[data.model == model].set_index("type").reindex(TYPES)
        np.testing.assert_array_equal(line.get_ydata(), rows["median"])
        np.testing.assert_array_equal(null.get_ydata(), rows.null)
        assert null.get_color() == line.get_color()
        np.testing.assert_array_equal(np.rint(line.get_xdata()), range(len(TYPES)))
    assert np.isnan(lines["encoder"].get_ydata()[TYPES.index("gate")])
    assert lines["full"].get_xdata()[0] < lines["encoder"].get_xdata()[0]  # side by side
    assert [label.get_text() for label in ax.get_xticklabels()] == list(TYPES)
    assert ax.get_yscale() == "log"


# Notebook 08 -------------------------------------------------------------------------------------


def test_training_curves_show_each_seed_and_their_mean():
    data = pd.DataFrame(
        [(v, s, t, t * s) for v, seeds in (("default", (1, 3)), ("literal q", (2,)))
         for s in seeds for t in (1, 2, 3)],
        columns=["variant", "seed", "step", "loss"],
    )  # fmt: skip
    _, ax = plt.subplots()
    lora.training_curves(data, ax, "loss")
    drawn = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    np.testing.assert_allclose(drawn["default"].get_ydata(), [2, 4, 6])
    np.testing.assert_allclose(drawn["literal q"].get_ydata(), [2, 4, 6])
    assert drawn["literal q"].get_color() == lora.START_COLORS["literal"]
    assert len(ax.lines) == 4  # two means, and the two seeds of the one that has several


def test_losses_and_gaps_are_two_panels_with_one_legend():
    data = pd.DataFrame(
        {"variant": "pissa", "seed": 1, "step": [1, 2], "loss": [2.0, 1.5], "gap": [0.25, -0.5]}
    )
    fig, axes = plt.subplots(1, 2)
    lora.loss_and_gap(data, axes)
    for ax, column in zip(axes, ("loss", "gap"), strict=True):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), data[column])
    assert axes[0].get_ylabel() == "training loss, nats per token"
    assert [text.get_text() for legend in fig.legends for text in legend.texts] == ["pissa"]


def test_a_variant_has_the_colour_of_its_initialisation():
    assert lora.start_color("literal ← x lr3") == lora.start_color("literal")
    assert lora.start_color("gaussian") not in lora.START_COLORS.values()


def test_every_seed_is_a_point_and_the_bar_is_their_mean():
    data = pd.DataFrame({"variant": ["b", "b", "a"], "value": [1.0, 3.0, 5.0]})
    _, ax = plt.subplots()
    lora.by_variant(data, ax)
    points = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "o"]
    bars = [line.get_xdata()[0] for line in ax.lines[1:-1:2]]
    assert (points, bars) == ([[1, 3], [5]], [2, 5])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]


def test_a_forest_fills_only_what_stands_after_correction():
    data = pd.DataFrame(
        {
            "variant": ["literal", "pissa"],
            "estimate": [0.1, 0.2],
            "low": [0.0, 0.1],
            "high": [0.3, 0.4],
            "holm": [0.2, 0.01],
        }
    )
    _, ax = plt.subplots()
    lora.forest(data, ax)
    spans, points = ax.lines[0:4:2], ax.lines[1:4:2]
    assert [list(line.get_xdata()) for line in spans] == [[0.0, 0.3], [0.1, 0.4]]
    assert [line.get_xdata()[0] for line in points] == [0.1, 0.2]
    assert [line.get_markerfacecolor() for line in points] == ["white", lora.start_color("pissa")]


def test_sensitivity_is_a_line_through_the_means_of_the_seeds():
    data = pd.DataFrame(
        [("default", s, v, v * s) for s in (1, 3) for v in (0.3, 1.0, 3.0)],
        columns=["start", "seed", "value", "loss"],
    )
    _, ax = plt.subplots()
    lora.sensitivity(data, ax)
    points, means = ax.lines[:2]
    assert len(points.get_xdata()) == 6
    np.testing.assert_allclose(means.get_xydata(), [[0.3, 0.6], [1, 2], [3, 6]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.3", "1", "3"]


def test_letter_shares_add_up():
    data = pd.DataFrame({"label": ["x"], "A": [0.1], "B": [0.2], "C": [0.3], "D": [0.4]})
    _, ax = plt.subplots()
    lora.letter_shares(data, ax)
    np.testing.assert_allclose([bar.get_x() for bar in ax.patches], [0, 0.1, 0.3, 0.6])
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], data.iloc[0, 1:].tolist())


def test_letters_alone_lie_on_the_diagonal_if_nothing_else_counts():
    data = pd.DataFrame(
        {"variant": ["default"] * 2, "expected": [0.2, 0.3], "observed": [0.1, 0.4]}
    )
    _, ax = plt.subplots()
    lora.letters_alone(data, ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), data.observed)
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[0.2, 0.2], [0.3, 0.3]])


def test_the_chance_of_a_gap_is_drawn_for_each_design():
    data = pd.DataFrame({"label": ["a", "a", "b"], "items": [1, 2, 1], "chance": [0.5, 0.1, 0.2]})
    _, ax = plt.subplots()
    lora.chance_of_gap(data, 13, ax)
    assert [line.get_label() for line in ax.lines[:2]] == ["a", "b"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.5, 0.1])
    assert ax.lines[2].get_xdata()[0] == 13


# Notebook 11 -------------------------------------------------------------------------------------


def test_strips_stand_in_rows_with_zero_at_the_left_edge():
    data = pd.DataFrame(
        [("one", "after", "a", 1e-3), ("one", "after", "b", 1e-2), ("one", "rounding", "Q8", 1e-4),
         ("two", "after", "a", 0), ("two", "rounding", "Q8", 0), ("two", "rounding", "Q4", 0)],
        columns=["heading", "row", "case", "distance"],
    )  # fmt: skip
    colors = fingerprints.data_colors(["a", "b", "a"])
    _, ax = plt.subplots()
    assert fingerprints.strips(data, colors, ax) is ax
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in dots] == [colors["a"], colors["b"], colors["a"]]
    x = [line.get_xdata().tolist() for line in dots]
    assert x[:2] == [[1e-3], [1e-2]]
    zero = x[2][0]
    assert ax.get_xlim()[0] < zero < 1e-4
    ticks = dict(zip(ax.get_xticks(), (t.get_text() for t in ax.get_xticklabels()), strict=True))
    assert ticks[zero] == "0"
    assert ticks[1.0] == "$10^{0}$"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["after", "rounding"] * 2
    heights = [line.get_ydata()[0] for line in dots]
    assert heights[0] < heights[1] < heights[2] < ax.get_ylim()[0]
    assert np.mean(heights[:2]) == ax.get_yticks()[0]
    assert {t.get_text() for t in ax.texts} == {"one", "two", "Q8", "Q8, Q4"}
    marks = [line.get_xdata() for line in ax.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(marks, [[1e-4], [zero]])


def test_points_by_type_stand_beside_each_other_over_their_type():
    data = pd.DataFrame(
        {"type": ["k", "down", "k"], "data": ["a", "a", "b"], "change": [1.0, 2.0, 3.0]}
    )
    _, ax = plt.subplots()
    assert fingerprints.points_by_type(data, fingerprints.data_colors("ab"), "change", ax) is ax
    first, second = (line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_array_equal(np.rint(first.get_xdata()), [TYPES.index("k"), len(TYPES) - 1])
    assert first.get_xdata()[0] < second.get_xdata()[0]
    np.testing.assert_array_equal(second.get_ydata(), [3])
    assert [label.get_text() for label in ax.get_xticklabels()] == list(TYPES)


def test_frames_go_round_the_matrices_of_a_cluster_map():
    data = pd.DataFrame({"type": ["k", "down"], "layer": [2, 0]})
    _, ax = plt.subplots()
    assert fingerprints.frame(data, ax) is ax
    middles = [(box.get_x() + 0.5, box.get_y() + 0.5) for box in ax.patches]
    assert middles == [(TYPES.index("k"), 2), (TYPES.index("down"), 0)]
    fingerprints.frame(data.head(0), ax)
    assert len(ax.patches) == 2


def test_movement_is_drawn_against_the_border_and_against_the_update():
    data = pd.DataFrame(
        {"type": ["q", "v"], "margin": [0.1, 0.2], "moved": [0.01, 0.5], "update": [0.001, 0.02]}
    )
    _, (left, right) = plt.subplots(1, 2)
    fingerprints.against_border(data, left)
    diagonal = left.lines[-1].get_xydata()
    np.testing.assert_array_equal(diagonal, [[0.01, 0.01], [0.5, 0.5]])
    for ax in (left, fingerprints.against_update(data, "moved", right)):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines[: len(TYPES)]}
        assert drawn["v"] == [[0.2 if ax is left else 0.02, 0.5]]
        assert drawn["k"] == []
    fingerprints.against_update(data.assign(moved=[0.0, 0.5]), "moved", right)
    assert len(right.lines[len(TYPES)].get_xdata()) == 0  # zero has no place on a log axis
    assert right.xaxis.get_major_formatter()(0.005, 0) == "0.5 %"


def test_a_matrix_of_runs_is_divided_by_data():
    table = np.arange(16.0).reshape(4, 4)
    _, ax = plt.subplots()
    assert fingerprints.runs_matrix(table, ["a", "a", "a", "b"], ax) is ax
    shown = ax.images[0].get_array()
    assert np.isnan(shown.filled(np.nan).diagonal()).all()
    assert shown[1, 2] == table[1, 2]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_xticks().tolist() == [1, 3]
    assert ax.lines[0].get_ydata()[0] == 2.5
    fingerprints.runs_matrix(np.zeros((1, 1)), ["a"], plt.subplots()[1])
