"""The slider: where it starts is drawn at once, and what it is moved to replaces it."""

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from wdlib import WdlibError
from wdlib.plots import interactive


@pytest.fixture
def shown(monkeypatch):
    """(what was done, object) of all that a notebook would show."""
    found = []

    class Handle:
        def display(self, figure):
            found.append(("shown", figure))

        def update(self, figure):
            found.append(("replaced", figure))

    monkeypatch.setattr(interactive, "DisplayHandle", Handle)
    monkeypatch.setattr(interactive, "display", lambda widget: found.append(("control", widget)))
    return found


def test_a_moved_slider_replaces_the_figure(shown):
    def draw(x, ax):
        ax.plot([0, x])
        return f"it is {x}"

    slider = interactive.slider(draw, "x", (0.5, 1.0, 2.0), value=1.0, model="m", rank=4)
    assert slider is None
    (_, control), (how, figure) = shown
    assert how == "shown"
    assert figure.get_suptitle() == "it is 1.0\nm, r = 4"
    assert isinstance(control, ipywidgets.SelectionSlider)
    assert (control.description, control.value) == ("x", 1.0)
    assert not control.continuous_update
    control.value = 2.0
    assert [how for how, _ in shown] == ["control", "shown", "replaced"]
    assert list(shown[-1][1].axes[0].lines[0].get_ydata()) == [0, 2.0]
    assert plt.get_fignums() == []  # or every figure would be shown once more, by matplotlib


def test_a_start_that_is_no_value_is_refused_before_anything_is_shown(shown):
    with pytest.raises(WdlibError, match=r"slider 'x' cannot start at 3: add it"):
        interactive.slider(lambda x, ax: "", "x", (1, 2), value=3, model="m")
    assert shown == []
