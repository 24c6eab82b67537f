"""Strict notebook runs: papermill, but a wrong parameter is an error, a result whole or absent.

papermill, papermill's kernel and nbformat are imported where they are used.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any, TextIO

from wdlib import WdlibError, paths
from wdlib.notebooks.files import normalise, numbered, read, tagged, write
from wdlib.notebooks.parameters import check, declared_parameters, stored_values

if TYPE_CHECKING:
    from nbformat import NotebookNode


DEFAULT_RUN = "default-run"
"""Tag of cells with remarks on the run that is stored; runs with other parameters lack them."""


def find_notebook(name: str | Path) -> Path:
    """The notebook of that path, or the numbered one whose name starts with it ("03", or "3").

    Raises: WdlibError for no match, or several.
    """
    if Path(name).is_file():
        return Path(name)
    start = str(name).zfill(2) if str(name).isdecimal() else str(name)
    found = [path for path in _there() if path.name.startswith(start)]
    if len(found) != 1:
        known = ", ".join(path.stem for path in found or numbered())
        raise WdlibError(f"no single notebook is called {str(name)!r}: choose one of {known}")
    return found[0]


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    on_cell: Callable[[int, int], None] | None = None,
) -> None:
    """Run a notebook in its folder with the running interpreter, and write it with its outputs.

    Names and types of `parameters` are checked before anything runs. `on_cell(i, n)` is called as
    cell i of n starts. What is written is normalised (see `normalise`), by a rename, and only if
    every cell ran; the copy of a failed run goes to the cache. Where a parameter is not as in the
    notebook, cells tagged `default-run` are left out.

    Raises: WdlibError with the message of the notebook's own WdlibError, or with the notebook, the
    number of the cell that failed and the error's message.
    """
    notebook, output, parameters = Path(notebook), Path(output).absolute(), dict(parameters or {})
    check(declared_parameters(notebook), parameters)
    failed = paths.CACHE / "executed" / f"{output.stem}.failed.ipynb"
    failed.parent.mkdir(parents=True, exist_ok=True)
    executed = _execute(notebook, parameters, failed, on_cell)
    failed.unlink(missing_ok=True)
    write(normalise(executed), output)


def figures(
    *, only: str | None = None, force: bool = False, progress: "Progress | None" = None
) -> None:
    """Run every numbered notebook whose figures are out of date (or all with `force`).

    Figures are out of date when a notebook's source, the package, the lock file, the catalogue,
    stored spectra, results or grids of experiments have changed since they were drawn, or when a
    figure itself has changed or gone. The executed copies go to the cache. `only` narrows to
    notebooks whose name starts so.

    Raises: WdlibError as `run_notebook` does, at the first notebook that fails.
    """
    progress = progress or Progress(None)
    for label, notebook in _labelled(only):
        if not force and _recorded(notebook) == _state(notebook):
            progress.line(f"{notebook.stem}: up to date")
        else:
            _draw(notebook, paths.CACHE / "executed" / notebook.name, progress, label)


def refresh(*, only: str | None = None, progress: "Progress | None" = None) -> None:
    """Run the numbered notebooks and store the outputs in them, normalised.

    Raises: WdlibError as `run_notebook` does; the notebook that fails stays as it was.
    """
    for label, notebook in _labelled(only):
        _draw(notebook, notebook, progress or Progress(None), label)


class Progress:
    """Says on a stream what is running, and for how long.

    On a terminal one line is rewritten; elsewhere (a log) a line is added, at most one in five
    seconds. Without a stream it is silent.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()
        self._start = time.monotonic()
        self._last = -float("inf")

    def line(self, text: str) -> None:
        """Say something that stays."""
        self._write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")

    def step(self, text: str) -> None:
        """Say something that the next step may replace, with the time since the start."""
        now = time.monotonic()
        minutes, seconds = divmod(int(now - self._start), 60)
        text = f"{text}, {minutes}:{seconds:02d} elapsed"
        if self._terminal:
            self._write(f"\r\x1b[K{text}")
        elif now - self._last >= 5:
            self._last = now
            self.line(text)

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def _execute(
    notebook: Path, parameters: dict, failed: Path, on_cell: Callable | None
) -> "NotebookNode":
    """Run a notebook through papermill: return it with outputs, or leave it at `failed`."""
    import papermill
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source = read(notebook)
    stored = stored_values([tagged(source, "parameters")[0].source])
    if any(name not in stored or stored[name] != value for name, value in parameters.items()):
        remarks = {cell.id for cell in tagged(source, DEFAULT_RUN)}
        source.cells = [cell for cell in source.cells if cell.id not in remarks]
    total = len(source.cells) + bool(parameters)

    def cell_starts(cell: object, cell_index: int) -> None:
        if on_cell is not None:
            on_cell(cell_index + 1, total)

    try:
        return papermill.execute_notebook(
            source,
            str(failed),
            parameters,
            cwd=notebook.absolute().parent,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            request_save_on_cell_execute=False,
            kernel_manager_class=_this_interpreter(),
            on_cell_start=cell_starts,
            coalesce_streams=True,
        )
    except PapermillExecutionError as error:
        if error.ename == "WdlibError":
            failed.unlink(missing_ok=True)
            raise WdlibError(error.evalue) from None
        if error.ename == "ModuleNotFoundError" and error.evalue.count("'") == 2:
            failed.unlink(missing_ok=True)
            module = error.evalue.split("'")[1]
            raise WdlibError(f"{notebook.name} cannot run: {lacking(module)}") from None
        what = f"{error.ename}: {error.evalue.strip()}".splitlines()[0].rstrip(": ")
        raise WdlibError(
            f"{notebook.name} stopped in cell [{error.exec_count}] with {what}; "
            f"the copy with its traceback is {failed}"
        ) from None
    except (DeadKernelError, CellControlSignal, RuntimeError) as error:
        what = str(error).strip().splitlines()[0]
        raise WdlibError(
            f"the kernel of {notebook.name} stopped ({what}): most often memory ran out"
        ) from None


def lacking(module: str) -> str:
    """The sentence for a module that is not installed, with the extra that brings it."""
    package = module.split(".")[0]
    wanted = {"yaml": "pyyaml"}.get(package, package).replace("_", "-")
    try:
        needed = importlib.metadata.requires("wdlib") or []
    except importlib.metadata.PackageNotFoundError:
        needed = []
    pattern = re.compile(rf"{re.escape(wanted)}\W.*extra == ['\"](\w+)['\"]")
    for text in needed:
        if found := pattern.match(text.replace("_", "-")):
            extra = found[1]
            return (
                f"{package} is not installed, it comes with the extra `{extra}`: in the project's "
                f'folder, `pip install ".[{extra}]"`'
            )
    return f"{package} is not installed: install it into the environment that wdlib runs in"


def _this_interpreter() -> type:
    """A kernel manager that starts this very interpreter, whatever the user calls `python3`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class ThisInterpreter(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(**get_kernel_dict())

    class Manager(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _this_interpreter(self) -> KernelSpecManager:
            return ThisInterpreter(parent=self)

        # The base class assigns its own, from a function that is not async.
        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            # What the cells write to stderr comes over the channels. Left on the process's own
            # stderr are the debugger's and the transport's start-up notices.
            # The notebook runs in its own folder; its results go where ours do.
            home = {**os.environ, "WDLIB_HOME": str(paths.HOME)}
            await super().start_kernel(stderr=DEVNULL, env=home, **options)

    return Manager


def _there() -> list[Path]:
    if found := numbered():
        return found
    raise WdlibError(
        f"there are no notebooks in {paths.NOTEBOOKS}: they are in a checkout of the project, so "
        "call this there, or give the path of one to `wdlib run`"
    )


def _labelled(only: str | None) -> Iterator[tuple[str, Path]]:
    """The numbered notebooks whose name starts with `only`, each with its place in the row."""
    chosen = [path for path in _there() if path.name.startswith(only or "")]
    if not chosen:
        raise WdlibError(f"no notebook in {paths.NOTEBOOKS} starts with {only!r}")
    for place, path in enumerate(chosen, start=1):
        yield f"notebook {place} of {len(chosen)}, {path.stem}", path


def _draw(notebook: Path, output: Path, progress: Progress, label: str) -> None:
    """Run one notebook with its defaults and record what it drew from what."""
    sources = _sources(notebook)

    def cell_starts(index: int, total: int) -> None:
        progress.step(f"{label}, cell {index} of {total}")

    start = time.monotonic()
    run_notebook(notebook, output=output, on_cell=cell_starts)
    drawn = _figures(notebook)
    paths.write_text(
        _record(notebook), json.dumps({"sources": sources, "figures": drawn}, indent=1)
    )
    seconds = time.monotonic() - start
    progress.line(f"{notebook.stem}: run in {seconds:.0f} s, {len(drawn)} figure files")


def _record(notebook: Path) -> Path:
    return paths.CACHE / "drawn" / f"{notebook.stem}.json"


def _recorded(notebook: Path) -> dict | None:
    try:
        return paths.read_json(_record(notebook), dict[str, Any], what="a record", remedy="")
    except WdlibError:
        return None


def _state(notebook: Path) -> dict:
    return {"sources": _sources(notebook), "figures": _figures(notebook)}


def _figures(notebook: Path) -> dict[str, str]:
    """Digest of every figure file that carries the notebook's number."""
    drawn = sorted(paths.FIGURES.glob(f"{notebook.name[:2]}_*"))
    return {path.name: _digest(path.read_bytes()) for path in drawn if path.is_file()}


def _sources(notebook: Path) -> str:
    """Digest of all that a notebook's figures are drawn from; its stored outputs are not."""
    package = paths.PACKAGE
    files = {path: path.relative_to(package) for path in package.rglob("*.py")}
    files |= {path: path.relative_to(package) for path in package.rglob("*.mplstyle")}
    for folder in (paths.SPECTRA, paths.RESULTS, paths.DATA / "experiments"):
        files |= {path: path.relative_to(folder.parent) for path in folder.rglob("*.*")}
    files = {path: name for path, name in files.items() if ".provenance" not in name.suffixes}
    files |= {path: Path(path.name) for path in (paths.CATALOGUE, paths.ROOT / "requirements.lock")}
    parts = sorted((str(n), _digest(p.read_bytes())) for p, n in files.items() if p.is_file())
    cells = [(cell.cell_type, cell.source) for cell in read(notebook).cells]
    return _digest(json.dumps([cells, parts]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
