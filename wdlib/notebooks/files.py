"""Notebook files: read, told apart by the tags of their cells, normalised, written."""

from pathlib import Path
from typing import TYPE_CHECKING

from wdlib import WdlibError, paths

if TYPE_CHECKING:
    from nbformat import NotebookNode


_KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

INJECTED = "injected-parameters"
"""papermill's tag of the cell with the parameters that were given."""

_WIDGET = "application/vnd.jupyter.widget-view+json"


def numbered() -> list[Path]:
    """The numbered notebooks, in their order."""
    return sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def normalise(notebook: "NotebookNode") -> "NotebookNode":
    """The notebook without what differs from run to run or from machine to machine; in place.

    Kept: sources, tags, execution counts, outputs. Dropped: all other metadata (papermill's times,
    the kernel's version), whatever was written to stderr (progress bars), widgets (dead without the
    kernel that made them), and the random id of the cell that papermill injects.
    """
    notebook.metadata = {"kernelspec": dict(_KERNELSPEC), "language_info": {"name": "python"}}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": list(tags)} if tags else {}
        if tags and INJECTED in tags:
            cell.id = INJECTED
        if cell.cell_type == "code":
            kept = (o for o in cell.outputs if _WIDGET not in o.get("data", {}))
            cell.outputs = [o for o in kept if o.get("name") != "stderr"]
    return notebook


def tagged(notebook: "NotebookNode", tag: str) -> list["NotebookNode"]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def read(notebook: str | Path) -> "NotebookNode":
    import nbformat

    try:
        found = nbformat.read(notebook, as_version=4)
        nbformat.validate(found)
    except FileNotFoundError:
        raise WdlibError(f"there is no notebook {notebook}") from None
    except Exception as error:  # whatever damage makes the library raise
        raise WdlibError(f"{notebook} is not a Jupyter notebook") from error
    return found


def write(notebook: "NotebookNode", path: Path) -> None:
    import nbformat

    paths.write_text(path, nbformat.writes(notebook) + "\n")
