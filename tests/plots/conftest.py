"""Figures without a screen, and closed after each test."""

import matplotlib.pyplot as plt
import pytest

from wdlib.plots.style import set_style


@pytest.fixture(autouse=True)
def closed_figures():
    with plt.rc_context():
        plt.switch_backend("Agg")
        set_style()
        yield
    plt.close("all")
