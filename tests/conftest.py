"""What every test, and every kernel that nbval starts, runs under."""

import os
import tempfile
from pathlib import Path

import nbformat
import pytest

from wdlib import paths

# Two test processes with two BLAS threads each wait for one another on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The notebooks that nbval runs draw figures; a test run must leave those in the checkout alone.
os.environ.setdefault("WDLIB_FIGURES", tempfile.mkdtemp(prefix="wdlib-figures-"))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder of the test, with all places that the package writes to in it, and empty."""
    for name in ("SPECTRA", "RESULTS", "CACHE", "FIGURES", "NOTEBOOKS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    monkeypatch.setattr(paths, "OWN_RESULTS", paths.RESULTS)
    return tmp_path


@pytest.fixture
def write_notebook():
    """A function that writes a small notebook of code cells; one is tagged `parameters`."""

    def write(path: Path, *cells: str, parameters: str = "rank: int = 16\n") -> Path:
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        check = "from wdlib.notebooks import check_parameters\n\ncheck_parameters(globals())"
        code = [nbformat.v4.new_code_cell(source) for source in (check, *cells)]
        title = nbformat.v4.new_markdown_cell("# A small notebook")
        notebook = nbformat.v4.new_notebook(cells=[title, tagged, *code])
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook.metadata = {"kernelspec": kernel}
        nbformat.write(notebook, path)
        return path

    return write
