"""Classes of pairs: what is drawn is what the table holds."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from wdlib.plots import classes
from wdlib.plots.style import ACCENT, INK


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
    points = {line.get_color(): line.get_xydata() for line in ax.lines[:2]}
    np.testing.assert_array_equal(points[ACCENT], [[0.8, 0]])
    np.testing.assert_array_equal(points[INK], [[0.1, 1], [np.nan, 2]])
    assert [label.get_text() for label in ax.get_yticklabels()] == list(data.pair)
    low, high = ax.get_ylim()
    assert low > high  # the first pair stands at the top
