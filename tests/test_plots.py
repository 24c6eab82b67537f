"""Figures: what is drawn is what is saved, and saving twice gives the same bytes."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from wdlib import fits, models, paper, paths, plots

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
plots.errors(errors, ax)
plots.save(fig, "99_errors", errors, Path(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def closed_figures():
    with plt.rc_context():
        plt.switch_backend("Agg")
        plots.set_style()
        yield
    plt.close("all")


def test_two_processes_write_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / name)], check=True)
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert written == ["99_errors.csv", "99_errors.png", "99_errors.svg"]
    for name in written:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_figure_that_cannot_be_written_leaves_no_picture(tmp_path):
    fig, _ = plt.subplots()
    with pytest.raises(AttributeError):
        plots.save(fig, "99_none", None, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg", ".png"}


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with paths.whole(path) as part:
        part.write_text("old")

    def fail():
        with paths.whole(path) as part:
            part.write_text("new, but only ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_only_the_default_run_writes_to_the_figures_folder():
    default = plots.folder(models.DEFAULT, paper.RANKS[0])
    assert default == paths.FIGURES
    others = {plots.folder(models.DEFAULT, 64), plots.folder("gemma-3-270m", 16)}
    assert default not in others
    assert len(others) == 2


def test_the_drawn_tail_has_every_one_of_the_largest_distances():
    x = np.random.default_rng(0).pareto(1.5, 5000) + 1
    table = plots.ccdf_table(x, points=50)
    assert len(table) <= 150
    np.testing.assert_array_equal(table.distance.tail(100), np.sort(x)[-100:])
    share = [(x >= value).mean() for value in table.distance]
    np.testing.assert_allclose(table.ccdf, share, rtol=1e-12)


def test_the_histogram_is_a_density():
    x = np.random.default_rng(0).lognormal(-6, 2, 4000)
    _, ax = plt.subplots()
    table = plots.histogram(np.append(x, 0.0), ax)
    assert ((table.to - table["from"]) * table.density).sum() == pytest.approx(1)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_a_fitted_law_is_drawn_through_the_data_at_xmin():
    x = np.random.default_rng(1).pareto(1.5, 2000) + 1
    fit = fits.fit_power_law(x)
    _, ax = plt.subplots()
    plots.fitted(fit, ax, x.max(), color="red", label="law")
    start = ax.lines[0].get_xydata()[0]
    assert start == pytest.approx((fit.xmin, fit.n_tail / fit.n))


def test_intervals_show_the_quantiles_of_the_draws():
    draws = pd.DataFrame({name: np.linspace(1, 2, 401) for name in plots.ESTIMATOR_COLORS})
    _, ax = plt.subplots()
    plots.intervals(draws, dict.fromkeys(draws, 1.5), ax)
    bars = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(bars) == 3
    for bar in bars:
        np.testing.assert_allclose(bar, [1.025, 1.975])
