"""Distances: what is drawn is what the table holds."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from wdlib import TYPES
from wdlib.plots.distances import histogram, medians_by_type
from wdlib.plots.style import look


def test_the_histogram_is_a_density():
    x = np.random.default_rng(0).lognormal(-6, 2, 4000)
    _, ax = plt.subplots()
    table = histogram(np.append(x, 0.0), ax)
    assert ((table.to - table["from"]) * table.density).sum() == pytest.approx(1)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_medians_by_type_leave_a_gap_where_a_type_is_absent():
    kinds = [t for t in TYPES if t != "gate"]
    data = pd.DataFrame(
        [(m, t, s * (i + 1), s / (i + 1))
         for m, s, types in (("full", 1.0, TYPES), ("encoder", 10.0, kinds))
         for i, t in enumerate(types[::-1])],  # in any order
        columns=["model", "type", "median", "null"],
    )  # fmt: skip
    looks = {name: look(n) for n, name in enumerate(("encoder", "full"))}
    _, ax = plt.subplots()
    assert medians_by_type(data, looks, ax) is ax
    *curves, said = ax.lines
    assert said.get_label().startswith("open: ")
    assert len(said.get_xdata()) == 0
    lines = {line.get_label(): line for line in curves[::2]}
    assert {name: line.get_color() for name, line in lines.items()} == {
        name: looks[name]["color"] for name in ("full", "encoder")
    }  # fmt: skip
    for (model, line), null in zip(lines.items(), curves[1::2], strict=True):
        rows = data[data.model == model].set_index("type").reindex(TYPES)
        np.testing.assert_array_equal(line.get_ydata(), rows["median"])
        np.testing.assert_array_equal(null.get_ydata(), rows.null)
        assert null.get_color() == line.get_color()
        assert null.get_markerfacecolor() == said.get_markerfacecolor() == "white"
        np.testing.assert_array_equal(np.rint(line.get_xdata()), range(len(TYPES)))
    assert np.isnan(lines["encoder"].get_ydata()[TYPES.index("gate")])
    assert lines["full"].get_xdata()[0] < lines["encoder"].get_xdata()[0]  # side by side
    assert [label.get_text() for label in ax.get_xticklabels()] == list(TYPES)
    assert ax.get_yscale() == "log"
