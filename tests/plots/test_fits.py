"""Tails and fits: what is drawn is what the table holds."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from wdlib.fits import estimators
from wdlib.plots import fits


def test_the_drawn_tail_has_every_one_of_the_largest_distances():
    x = np.random.default_rng(0).pareto(1.5, 5000) + 1
    table = fits.ccdf_table(x, points=50)
    assert len(table) <= 150
    np.testing.assert_array_equal(table.distance.tail(100), np.sort(x)[-100:])
    share = [(x >= value).mean() for value in table.distance]
    np.testing.assert_allclose(table.ccdf, share, rtol=1e-12)


def test_a_fitted_law_is_drawn_through_the_data_at_xmin():
    x = np.random.default_rng(1).pareto(1.5, 2000) + 1
    fit = estimators.power_law(x)
    _, ax = plt.subplots()
    fits.fitted(fit, ax, x.max(), color="red", label="law")
    start = ax.lines[0].get_xydata()[0]
    assert start == pytest.approx((fit.xmin, fit.n_tail / fit.n))


def test_a_part_of_the_distances_is_drawn_on_the_axes_of_the_whole():
    whole = np.random.default_rng(2).pareto(1.5, 2000) + 1
    part = np.sort(whole)[:1000]
    limits = []
    for distances, lines in ((part, 4), (whole, 3)):
        _, ax = plt.subplots()
        fit = estimators.power_law(distances)
        assert fits.tail_of(distances, fit, ax, whole=whole) is ax
        assert len(ax.lines) == lines  # the whole, the part if it is one, the law and its start
        assert ax.lines[-2].get_xdata()[[0, -1]] == pytest.approx([fit.xmin, distances.max()])
        limits.append((ax.get_xlim(), ax.get_ylim()))
    assert limits[0] == limits[1]


def test_intervals_show_the_quantiles_of_the_draws():
    draws = pd.DataFrame({name: np.linspace(1, 2, 401) for name in fits.ESTIMATOR_LOOKS})
    _, ax = plt.subplots()
    fits.intervals(draws, dict.fromkeys(draws, 1.5), ax)
    bars = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(bars) == 3
    for bar in bars:
        np.testing.assert_allclose(bar, [1.025, 1.975])


def test_the_table_of_sizes_has_a_row_for_each_case_and_test():
    sizes = pd.DataFrame(
        {"dependence": ["product", "walk"], "vectors": [8, 9], "repetitions": [200, 50],
         "rejected_iid": [0.5, 0.02], "rejected_vectors": [0.05, 0.0]}
    )  # fmt: skip
    table = fits.size_table(sizes).set_index(["case", "test"])
    assert len(table) == 4
    assert table.rate["product, 8 vectors", "independent draws"] == 0.5
    none = table.loc["walk, 9 vectors", "shared vectors"]
    z2 = 1.959964**2  # Wilson's interval of no success in n
    np.testing.assert_allclose(none, [0, 0, z2 / (50 + z2)], atol=1e-6)
