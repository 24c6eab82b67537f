"""One function per figure: each takes a tidy table (and an Axes), draws it, returns the Axes.

Notebooks alone import this package. What a figure shows is what its table holds; `save` writes
both. The rooms are named by what they draw: `plots.fits.ccdf`.
"""

from wdlib.plots import classes, distances, fingerprints, fits, generator, lora, spectra
from wdlib.plots.interactive import slider
from wdlib.plots.style import (
    ACCENT,
    COLORS,
    INK,
    NULL_COLORS,
    TYPE_LOOKS,
    folder,
    headline,
    label_lowest,
    looks,
    save,
    set_style,
    shades,
    text_table,
)

__all__ = [
    "ACCENT", "COLORS", "INK", "NULL_COLORS", "TYPE_LOOKS", "classes", "distances",
    "fingerprints", "fits", "folder", "generator", "headline", "label_lowest", "looks", "lora",
    "save", "set_style", "shades", "slider", "spectra", "text_table",
]  # fmt: skip
