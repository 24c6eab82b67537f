"""Fingerprints and what training moves: what is drawn is what the table holds."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from wdlib import TYPES
from wdlib.plots import fingerprints, style


def test_strips_stand_in_rows_with_zero_at_the_left_edge():
    data = pd.DataFrame(
        [("one", "after", "a", 1e-3), ("one", "after", "b", 1e-2), ("one", "rounding", "Q8", 1e-4),
         ("two", "after", "a", 0), ("two", "rounding", "Q8", 0), ("two", "rounding", "Q4", 0)],
        columns=["heading", "row", "case", "distance"],
    )  # fmt: skip
    looks = style.looks(["a", "b", "a"])
    _, ax = plt.subplots()
    assert fingerprints.strips(data, looks, ax) is ax
    dots = [line for line in ax.lines if line.get_marker() in "os"]
    for part in ("color", "marker"):
        drawn = [getattr(line, f"get_{part}")() for line in dots]
        assert drawn == [looks[case][part] for case in "aba"]
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
    assert fingerprints.points_by_type(data, style.looks("ab"), "change", ax) is ax
    first, second = ax.lines[:2]
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


def test_a_matrix_of_models_names_rows_and_columns_where_it_is_asked_to():
    names, table = ["a", "b", "c"], 1.0 - np.eye(3)
    for rows, columns in ((True, True), (True, False), (False, True)):
        _, ax = plt.subplots()
        assert fingerprints.matrix_of_models(table, names, ax, rows=rows, columns=columns) is ax
        sides = (rows, ax.get_yticklabels()), (columns, ax.get_xticklabels())
        for named, labels in sides:
            assert [t.get_text() for t in labels if t.get_text()] == names * named
        assert len(ax.texts) == 6


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


def test_layers_against_layers_are_drawn_as_they_are_with_a_dot_on_matches():
    table = np.array([[0.9, 0.1, 0.0], [0.2, 0.1, 0.6], [0.1, 0.2, 0.05]])
    _, ax = plt.subplots()
    drawn = fingerprints.layer_against_layer(table, ax, names=("a", "b"))
    assert drawn is ax
    np.testing.assert_array_equal(ax.images[0].get_array(), table)
    assert ax.images[0].get_clim() == (0, 1)
    dots = ax.lines[0]
    np.testing.assert_array_equal([dots.get_xdata(), dots.get_ydata()], [[0, 2], [0, 1]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer of b", "layer of a")
