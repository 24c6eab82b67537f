"""What is saved: two runs write the same bytes, and a failed write leaves nothing."""

import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from wdlib import paper, paths
from wdlib.checkpoints import catalogue
from wdlib.plots import style
from wdlib.plots.style import folder, label_lowest

DRAW = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from wdlib import plots
plots.set_style()
errors = pd.DataFrame({"method": ["a", "b"] * 6, "error": np.logspace(-9, -1, 12),
                       "matrices": ["real"] * 6 + ["planted"] * 6})
fig, ax = plt.subplots()
plots.spectra.errors(errors, ax)
plots.save(fig, "99_errors", errors, Path(sys.argv[1]))
"""


def test_two_processes_write_the_same_bytes(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / "one")], check=True)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "two")])
    exec(DRAW, {})
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert written == ["99_errors.csv", "99_errors.png", "99_errors.svg"]
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_figure_that_cannot_be_written_leaves_no_picture(tmp_path):
    fig, _ = plt.subplots()
    with pytest.raises(AttributeError):
        style.save(fig, "99_none", None, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg", ".png"}


def test_only_the_default_run_writes_to_the_figures_folder():
    default = folder(catalogue.DEFAULT, paper.RANKS[0])
    assert default == paths.FIGURES
    changed = ({"seed": 1}, {"seed": 2}, {"replicates": 1}, {"compared": ["gemma-3-270m"]})
    others = {folder(catalogue.DEFAULT, 16, one) for one in changed}
    others |= {folder(catalogue.DEFAULT, 64), folder("gemma-3-270m", 16)}
    assert default not in others
    assert len(others) == len(changed) + 2
    assert folder(catalogue.DEFAULT, 64, {"rank": 64}) in others


def test_every_model_has_a_folder_of_its_own(tmp_path, monkeypatch):
    names = [*catalogue.models(), *(model.hub_id for model in catalogue.models().values())]
    names += ["hf://meta-llama/Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B@main"]
    for place in (
        "a/model.safetensors",
        "b/model.safetensors",
        "b/other.gguf",
        "c/deep/b/other.gguf",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
        names.append(str(tmp_path / place))
    found = {folder(name, rank).name.lower() for name in names for rank in (16, 64)}
    assert len(found) == 2 * len(set(names))
    assert all(
        re.fullmatch(r"[a-z0-9][a-z0-9.-]*-r(16|64)-[0-9a-f]{8}", name)
        for name in found - {paths.FIGURES.name}
    )
    monkeypatch.chdir(tmp_path / "b")
    assert folder("model.safetensors", 16) == folder(str(tmp_path / "b" / "model.safetensors"), 16)
    assert folder("model.safetensors", 16).name.startswith("b-model.safetensors-r16-")


def test_no_two_series_look_alike_even_without_colours():
    assert len({str(style.look(n)) for n in range(280)}) == 280
    assert len({str(style.look(n) | {"color": None}) for n in range(40)}) == 40
    assert len({str(look) for look in style.TYPE_LOOKS.values()}) == len(style.TYPE_LOOKS)


def test_colours_differ_for_those_who_do_not_see_red_and_green():
    """Distances in the space of a deuteranope (Machado, Oliveira and Fernandes 2009)."""
    seen = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])

    def nearest(colours):
        rgb = np.clip(np.array([to_rgb(c) for c in colours]) @ seen.T, 0, 1)
        apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=2)
        return apart[np.triu_indices(len(rgb), 1)].min()

    palettes = [style.COLORS.values(), style._COLORS, [style.INK, *style.NULL_COLORS]]
    assert min(nearest(list(palette)) for palette in palettes) > 0.2
    assert nearest(["#e07b1a", "#2e7d4f", "#c0392b"]) < 0.2  # of the palette before this one


def test_a_headline_stays_inside_its_figure():
    fig, ax = plt.subplots(figsize=(5, 3))
    ax.plot([0, 1])
    style.headline(fig, "a finding of several words " * 5, "folder/model", 8)
    fig.canvas.draw()
    title = fig._suptitle
    assert title.get_text().endswith("\nmodel, r = 8")
    box = title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= fig.bbox.x1
    assert box.y0 >= ax.get_window_extent().y1


def test_a_table_of_texts_shows_markup_as_text():
    table = style.text_table(pd.DataFrame({"a<b": ["x & y", "<i>z</i>"], "n": [1, 2]}))
    assert "&lt;i&gt;z&lt;/i&gt;" in table.data
    assert "a&lt;b" in table.data
    assert repr(table) == "a<b | n\nx & y | 1\n<i>z</i> | 2"


def test_the_lowest_panel_that_is_drawn_has_labels():
    fig, axes = plt.subplots(2, 2, sharex=True)
    axes[1, 1].set_axis_off()
    label_lowest(axes)
    fig.canvas.draw()
    labelled = [[any(t.get_visible() for t in ax.get_xticklabels()) for ax in row] for row in axes]
    assert labelled == [[False, True], [True, True]]
