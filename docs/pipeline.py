"""The picture of the way from a checkpoint to the results: docs/pipeline.svg and .png.

`python docs/pipeline.py` draws both, narrow enough for their text to be read on a phone.
"""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from wdlib import paths

BOXES = {
    "checkpoint": ((0, 1), "a file, a folder,\na name on the hub", "#56B4E9"),
    "matrices": ((1, 1), "q, k, v, o, gate,\nup, down; streamed", "#56B4E9"),
    "singular values": ((2, 1), "the r largest,\neach one proven", "#009E73"),
    "fingerprints": ((2, 0), "whose copy is it?\n09, 10, 11", "#E69F00"),
    "distances": ((1, 0), "a power law?\n03, 04, 05, 12", "#E69F00"),
    "LoRA": ((0, 0), "does a reshaped start\nhelp? 06, 07, 08", "#E69F00"),
}
"""By title: the place (column, row), what is told below the title, and the colour (Okabe-Ito)."""

ARROWS = (
    ("checkpoint", "matrices"),
    ("matrices", "singular values"),
    ("singular values", "fingerprints"),
    ("singular values", "distances"),
    ("distances", "LoRA"),
)
WIDTH, HEIGHT, GAP = 1.0, 0.62, 0.18


def centre(title: str) -> tuple[float, float]:
    """Where the middle of a box is."""
    (column, row), _, _ = BOXES[title]
    return column * (WIDTH + GAP), row * (HEIGHT + 2 * GAP)


def draw(ax: Axes) -> Axes:
    """The boxes and the arrows."""
    for title, (_, words, colour) in BOXES.items():
        x, y = centre(title)
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        ax.add_patch(plt.Rectangle(corner, WIDTH, HEIGHT, fc="white", ec=colour, lw=2))
        ax.text(x, y + 0.17, title, ha="center", va="center", size=10, weight="bold")
        ax.text(x, y - 0.1, words, ha="center", va="center", size=8, linespacing=1.4)
    for one, other in ARROWS:
        (x0, y0), (x1, y1) = centre(one), centre(other)
        level, upright = y0 == y1, x0 == x1
        right = (x1 > x0) - (x1 < x0)
        begin = (x0 + right * WIDTH / 2 * (level or 0.6), y0 - HEIGHT / 2 * (not level))
        end = (x1 - right * WIDTH / 2 * (level or 0.2), y1 + HEIGHT / 2 * (not level))
        end = (x1, end[1]) if upright else end
        arrow = {"arrowstyle": "-|>", "color": "0.3", "lw": 1.4, "shrinkA": 1, "shrinkB": 1}
        ax.annotate("", xy=end, xytext=begin, arrowprops=arrow)
    ax.set(xlim=(-0.56, 2.92), ylim=(-0.38, 1.36), aspect="equal")
    ax.axis("off")
    return ax


if __name__ == "__main__":
    plt.style.use(paths.ROOT / "wdlib" / "wdlib.mplstyle")
    figure, axes = plt.subplots(figsize=(5.2, 2.65))
    draw(axes)
    for ending in ("svg", "png"):
        metadata = {"Date": None} if ending == "svg" else {}
        figure.savefig(paths.ROOT / "docs" / f"pipeline.{ending}", metadata=metadata)
