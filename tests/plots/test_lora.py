"""Starts, training and evaluation: what is drawn is what the table holds."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from wdlib.plots import lora


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
    for name in drawn:
        assert drawn[name].get_color() == lora.start_look(name)["color"]
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


def test_a_variant_looks_like_its_initialisation():
    assert lora.start_look("literal ← x lr3") == lora.start_look("literal")
    assert lora.start_look("another") not in lora.START_LOOKS.values()
    for part in ("marker", "linestyle"):
        pairs = {(look["color"], look[part]) for look in lora.START_LOOKS.values()}
        assert len(pairs) == len(lora.START_LOOKS)


def test_every_seed_is_a_point_and_the_bar_is_their_mean():
    data = pd.DataFrame({"variant": ["b", "b", "a"], "value": [1.0, 3.0, 5.0]})
    _, ax = plt.subplots()
    lora.by_variant(data, ax)
    points = [line.get_xdata().tolist() for line in ax.lines[:-1:2]]
    bars = [line.get_xdata()[0] for line in ax.lines[1:-1:2]]
    assert (points, bars) == ([[1, 3], [5]], [2, 5])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]


def test_far_values_do_not_squeeze_the_others():
    near = [0.01, 0.012, 0.015, 0.02, 0.018, 0.017, 0.016, 0.011, 0.013]
    for far, scale in ((0.021, "linear"), (-0.5, "symlog")):
        data = pd.DataFrame({"variant": ["default"] * 9 + ["pissa"], "value": [*near, far]})
        _, ax = plt.subplots()
        lora.by_variant(data, ax)
        assert ax.get_xscale() == scale
        low, high = ax.transData.transform([(0, 0), (0.02, 0)])[:, 0]
        assert high - low > 0.15 * ax.bbox.width
        assert ax.get_xlim()[0] < min(far, 0) < 0.02 < ax.get_xlim()[1]


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
    assert [line.get_markerfacecolor() for line in points] == [
        "white",
        lora.start_look("pissa")["color"],
    ]


def test_a_table_of_differences_is_text():
    row = {"estimate": 0.01234, "low": -0.1, "high": 0.2, "holm": 0.004, "detectable": 0.25}
    rows = [row | {"seeds": 3}, row | {"holm": 0.5, "seeds": 1}]
    text = lora.difference_table(pd.DataFrame(rows, index=["a", "b"]))
    assert list(text.loc["a"]) == ["+0.0123", "[-0.1000, +0.2000]", "< 0.01", "0.250", 3]
    assert text.loc["b", "p, Holm"] == "0.50"


def test_losses_by_rate_are_lines_through_the_means_of_whole_seeds():
    data = pd.DataFrame(
        [("default", s, v, v * s) for s in (1, 3) for v in (1e-4, 6.67e-4, 1e-3)]
        + [("default", 5, 1e-3, 1.0)],
        columns=["start", "seed", "rate", "loss"],
    ).assign(whole=lambda t: t.seed < 5)
    _, ax = plt.subplots()
    lora.loss_by_rate(data, ax, 2e-4)
    template, points, means = ax.lines
    assert list(template.get_xdata()) == [2e-4, 2e-4]
    assert len(points.get_xdata()) == 7
    np.testing.assert_allclose(
        means.get_xydata(), [[1e-4, 2e-4], [6.67e-4, 1.334e-3], [1e-3, 2e-3]]
    )
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["1.0e-4", "6.7e-4", "1.0e-3"]
    assert ax.get_legend_handles_labels()[1] == ["default"]


def test_rates_as_expected_lie_on_the_line_and_intervals_stay_in_the_frame():
    data = pd.DataFrame(
        {"start": ["default", "pissa"], "expected": [1e-3, 1e-4], "rate": [1e-3, 4e-4],
         "low": [5e-4, 0], "high": [np.inf, 6e-4]}
    )  # fmt: skip
    _, ax = plt.subplots()
    lora.expected_rates(data, ax, ends=(5e-5, 2e-3))
    intervals, points = ax.lines[0:4:2], ax.lines[1:4:2]
    assert [list(p.get_xydata()[0]) for p in points] == [[1e-3, 1e-3], [1e-4, 4e-4]]
    low, high = ax.get_ylim()
    assert (low, high) == (5e-5, 2e-3)
    assert list(intervals[0].get_ydata()) == [5e-4, high]
    assert list(intervals[1].get_ydata()) == [low, 6e-4]
    diagonal = ax.lines[4].get_xydata()
    np.testing.assert_allclose(diagonal[:, 0], diagonal[:, 1])


def test_a_label_says_the_reference_in_short_and_the_rate():
    assert lora.label("literal qwen2.5-coder-0.5b-instruct lr0.0006") == (
        "literal ← Qwen 0.5B at rate 0.0006"
    )
    assert lora.label("literal other") == "literal other"
    assert lora.start_look(lora.label("pissa lr6.67e-05")) == lora.start_look("pissa")


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
