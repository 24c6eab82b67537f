"""JupyterLab, as `make lab` starts it: what opening and saving does to a stored notebook."""

import json
import shutil

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager
from traitlets.config import PyFileConfigLoader

from wdlib import paths

# The server sets a hook twice, first as the configuration's and then as its own.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding existing pre_save_hook")

BY_LAB = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "version": "3.99.0",
}
"""What JupyterLab writes into the metadata of a notebook when its kernel has started."""


def saved(folder, path, configuration, **changes):
    """The bytes of a notebook after JupyterLab has opened it, written its metadata and saved it."""
    contents = FileContentsManager(root_dir=str(folder), config=configuration)
    model = contents.get(path)
    model["content"]["metadata"] |= {"language_info": BY_LAB, **changes}
    contents.save({key: model[key] for key in ("type", "format", "content")}, path)
    return (folder / path).read_bytes()


@pytest.fixture(scope="module")
def configuration():
    return PyFileConfigLoader("jupyter_server_config.py", str(paths.NOTEBOOKS)).load_config()


def test_opening_and_saving_leaves_a_stored_notebook_as_it_is(configuration, tmp_path):
    path = "notebooks/00_start_here.ipynb"
    (tmp_path / "notebooks").mkdir()
    shutil.copy(paths.NOTEBOOKS / "00_start_here.ipynb", tmp_path / path)
    before = (tmp_path / path).read_bytes()
    assert saved(tmp_path, path, configuration, widgets={"state": {}}) == before
    assert saved(tmp_path, path, None) != before


def test_a_slider_that_ran_is_not_saved_and_its_figure_is(configuration, tmp_path):
    path = "notebooks/03_dsv_power_law.ipynb"
    (tmp_path / "notebooks").mkdir()
    stored = nbformat.read(paths.NOTEBOOKS / "03_dsv_power_law.ipynb", as_version=4)
    before = nbformat.writes(stored) + "\n"
    sliders = [cell for cell in stored.cells if "plots.slider(" in cell.source]
    assert len(sliders) == 2
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Slider"}
    for cell in sliders:
        assert [set(output.data) for output in cell.outputs] == [{"image/png", "text/plain"}]
        cell.outputs.insert(0, nbformat.v4.new_output("display_data", view))
    nbformat.write(stored, tmp_path / path)
    assert saved(tmp_path, path, configuration, widgets={"state": {}}).decode() == before


def test_a_notebook_of_ones_own_is_saved_as_jupyterlab_does(configuration, tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(paths.NOTEBOOKS / "00_start_here.ipynb", tmp_path / "notebooks" / "mine.ipynb")
    kept = json.loads(saved(tmp_path, "notebooks/mine.ipynb", configuration))
    assert kept["metadata"]["language_info"]["version"] == "3.99.0"
