"""Figures that move where a kernel runs."""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from IPython.display import DisplayHandle, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdlib import WdlibError
from wdlib.plots.style import headline


def slider(
    draw: Callable[[float, Axes], str],
    name: str,
    values: Sequence[float],
    *,
    value: float,
    model: str,
    rank: int | None = None,
) -> None:
    """Show the figure of one value, and over it a slider that draws those of the others.

    The figure is an ordinary output of its cell, and the slider changes it: where no kernel runs,
    it stays as it was stored. `notebooks.normalise` drops the slider, which would be dead there.
    The figure is drawn anew when the slider is let go.

    draw: draws one of `values` on an Axes, and returns its finding, which heads the figure as
    `headline` says it, with model and rank. name: beside the slider. value: where it starts.

    Raises: WdlibError where `value` is none of the values.
    """
    import ipywidgets

    if value not in values:
        raise WdlibError(f"the slider {name!r} cannot start at {value}: add it to its values")

    def figure(chosen: float) -> Figure:
        fig, ax = plt.subplots(figsize=(5.5, 3.6))
        headline(fig, draw(chosen, ax), model, rank)
        plt.close(fig)  # or matplotlib shows it once more at the end of the cell
        return fig

    control = ipywidgets.SelectionSlider(
        options=[(f"{number:.3g}", number) for number in values],
        value=value,
        description=name,
        continuous_update=False,
    )
    shown = DisplayHandle()
    control.observe(lambda change: shown.update(figure(change["new"])), names="value")
    display(control)
    shown.display(figure(value))
