"""The generator's distances as they are drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from wdlib.plots import generator


def test_distances_that_follow_the_first_order_law_lie_under_it():
    ratios = np.random.default_rng(0).chisquare(15, 200_000) / 15
    _, ax = plt.subplots()
    assert generator.against_first_order(ratios, 15, ax) is ax
    law, mean = ax.lines
    heights = ax.patches[0].get_data().values
    assert heights == pytest.approx(law.get_ydata(), abs=0.04)
    assert mean.get_xdata()[0] == pytest.approx(1, abs=0.01)
    limits = ax.get_xlim(), ax.get_ylim()
    _, other = plt.subplots()
    generator.against_first_order(ratios / 10, 15, other)
    assert (other.get_xlim(), other.get_ylim()) == limits
    assert other.patches[0].get_data().values.sum() * 0.05 == pytest.approx(1)
