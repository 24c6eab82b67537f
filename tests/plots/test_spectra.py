"""Spectra as they are drawn."""

import matplotlib.pyplot as plt
import numpy as np

from wdlib.plots import spectra


def test_profiles_are_medians_over_the_layers_on_axes_that_stay():
    rng = np.random.default_rng(0)
    values = {kind: -np.sort(-rng.random((5, 8)), axis=1) for kind in ("q", "up")}
    limits = []
    for r in (3, 8):
        _, ax = plt.subplots()
        cut = {kind: v[:, :r] for kind, v in values.items()}
        assert spectra.profiles(cut, ax, most=8) is ax
        for line, (kind, v) in zip(ax.lines, cut.items(), strict=True):
            assert line.get_label() == kind
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, r + 1))
            np.testing.assert_allclose(line.get_ydata(), np.median(v.T / v[:, 0], axis=1))
        limits.append((ax.get_xlim(), ax.get_ylim()))
    assert limits[0] == limits[1]
