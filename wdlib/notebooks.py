"""Strict notebook runs: papermill, but a wrong parameter is an error, a result whole or absent.

A notebook declares its parameters in one cell tagged `parameters`, each with its type
(`rank: int = 16`), and calls `check_parameters(globals())` in the next cell. papermill, papermill's
kernel and nbformat are imported where they are used.
"""

import ast
import builtins
import hashlib
import importlib.metadata
import json
import os
import re
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from subprocess import DEVNULL
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TextIO, Union, get_args, get_origin

from wdlib import WdlibError, first_line, paper, paths
from wdlib.checkpoints import catalogue

if TYPE_CHECKING:
    from IPython.display import Markdown
    from nbformat import NotebookNode

_KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

_NO_PYTHON = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
"""What `ast` raises for texts that are no Python, or nest too deeply."""

_INJECTED = "injected-parameters"
"""papermill's tag of the cell with the parameters that were given."""

DEFAULT_RUN = "default-run"
"""Tag of cells with remarks on the run that is stored; runs with other parameters lack them."""

_USUAL = {"model": catalogue.DEFAULT, "rank": paper.RANKS[0]}
"""What the stored runs of all notebooks have in common."""


def check_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a notebook's parameters where one is unknown or of the wrong type.

    Called in a notebook as `changed = check_parameters(globals())`, straight after the parameters
    cell. The annotations in that cell say what is allowed; the cell that papermill injects after
    it, which the kernel's input history holds, says what was given. Without such a cell
    (JupyterLab, default run) the types alone are checked, so names that other cells define never
    matter.

    Returns: the parameters that are not as the notebook declares them, by name, for its banner and
    `plots.folder`. What a session declared first counts: a value that is edited before the cell's
    first run is taken for the default.
    Raises: WdlibError that names the parameter, and what is known or expected.
    """
    declared, history = namespace.get("__annotations__", {}), namespace.get("In", [])
    names = [*declared, *_injected(history)]
    _check(declared, {name: namespace[name] for name in names if name in namespace})
    defaults = _defaults(history).items()
    return {name: namespace[name] for name, value in defaults if namespace[name] != value}


def banner(
    changed: Mapping[str, Any], *, model: str, rank: int = paper.RANKS[0]
) -> "Markdown | None":
    """What a run that is not the stored one says at its top; None for the stored one.

    changed: what `check_parameters` returned. model, rank: the run's, which an edit of the
    parameters cell before its first run changes unseen.
    """
    from IPython.display import Markdown

    given = {"model": model, "rank": rank}
    edited = {name: value for name, value in given.items() if _USUAL[name] != value}
    told = ", ".join(f"`{name} = {value!r}`" for name, value in (edited | dict(changed)).items())
    if not told:
        return None
    return Markdown(
        f"> **Not the default run:** {told}. Tables, figures and verdicts are those of this run. "
        "Passages that begin with *In the default run* are about the stored one."
    )


def declared_parameters(notebook: str | Path) -> dict[str, Any]:
    """Name and type of every parameter of a notebook, read from its `parameters` cell unexecuted.

    Raises: WdlibError where the file is no notebook or has no such cell.
    """
    tagged = _tagged(_read(notebook), "parameters")
    if len(tagged) != 1:
        raise WdlibError(
            f"{Path(notebook).name} has {len(tagged)} cells tagged `parameters`: tag exactly one"
        )
    name = Path(notebook).name
    try:
        body = ast.parse(tagged[0].source).body
    except _NO_PYTHON as error:
        raise WdlibError(
            f"the parameters cell of {name} is not plain Python ({first_line(error)}): keep magics "
            "and commands in other cells"
        ) from error
    declared = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            raise WdlibError(
                f"the parameter {node.targets[0].id!r} of {name} has no type: write it as "
                "`rank: int = 16`"
            )
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared[node.target.id] = _type(ast.unparse(node.annotation), node.target.id, name)
    return declared


_NODES = {"Module", "Expr", "Name", "Load", "Subscript", "Tuple", "Constant", "BinOp", "BitOr"}
"""The parts of an annotation that only names a type, and runs nothing."""


def _tagged(notebook: "NotebookNode", tag: str) -> list["NotebookNode"]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def _type(annotation: str, parameter: str, notebook: str) -> Any:
    """The type that an annotation names, of the built-in ones and those of `typing`."""
    try:
        if strange := {type(node).__name__ for node in ast.walk(ast.parse(annotation))} - _NODES:
            raise ValueError(f"it has a {strange.pop()}")
        return eval(annotation, {**vars(typing), **vars(builtins)})
    except Exception as error:  # whatever a stranger's annotation does
        raise WdlibError(
            f"the type {annotation} of the parameter {parameter!r} of {notebook} is not known here "
            f"({first_line(error)}): use str, int, float, bool, None, or a list or choice of these"
        ) from error


def parameters_from_text(notebook: str | Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """Parameter values from what was typed on a command line, read by each parameter's type.

    A text stays what it is where the parameter takes a string (a model called "1"), and where it
    reads as nothing else; whether it fits is for `run_notebook` to say.
    """
    declared = declared_parameters(notebook)
    return {name: _value(text, declared.get(name, str)) for name, text in texts.items()}


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
    _check(declared_parameters(notebook), parameters)
    failed = paths.CACHE / "executed" / f"{output.stem}.failed.ipynb"
    failed.parent.mkdir(parents=True, exist_ok=True)
    executed = _execute(notebook, parameters, failed, on_cell)
    failed.unlink(missing_ok=True)
    _write_notebook(normalise(executed), output)


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


def normalise(notebook: "NotebookNode") -> "NotebookNode":
    """The notebook without what differs from run to run or from machine to machine; in place.

    Kept: sources, tags, execution counts, outputs. Dropped: all other metadata (papermill's times,
    the kernel's version), whatever was written to stderr (progress bars), and the random id of the
    cell that papermill injects.
    """
    notebook.metadata = {"kernelspec": dict(_KERNELSPEC), "language_info": {"name": "python"}}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": list(tags)} if tags else {}
        if tags and _INJECTED in tags:
            cell.id = _INJECTED
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


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

    source = _read(notebook)
    stored = _defaults([_tagged(source, "parameters")[0].source])
    if any(name not in stored or stored[name] != value for name, value in parameters.items()):
        remarks = {cell.id for cell in _tagged(source, DEFAULT_RUN)}
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


def _check(declared: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise WdlibError for a given name that is not declared, or a value not of its type."""
    for name, value in given.items():
        if name not in declared:
            close = get_close_matches(name, declared, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ":"
            known = ", ".join(declared) or "none"
            raise WdlibError(f"unknown parameter {name!r}{hint} The notebook's are: {known}")
        if not _fits(value, declared[name]):
            expected = getattr(declared[name], "__name__", None)
            if get_origin(declared[name]) is not None or expected is None:
                expected = str(declared[name])
            raise WdlibError(
                f"parameter {name!r} must be of type {expected}, "
                f"but is {value!r} of type {type(value).__name__}"
            )


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value that came through JSON is of an annotated type; an int is a float too."""
    origin = get_origin(annotation)
    if annotation is None or annotation is NoneType:
        return value is None
    if origin is Literal:
        return any(
            value == option and type(value) is type(option) for option in get_args(annotation)
        )
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if origin is list:
        return isinstance(value, list) and all(_fits(v, get_args(annotation)[0]) for v in value)
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or annotation)


def _value(text: str, annotation: Any) -> Any:
    if _fits(text, annotation):
        return text
    try:
        return ast.literal_eval(text.title() if text.lower() in ("true", "false", "none") else text)
    except _NO_PYTHON:
        return text


def _injected(history: list[str]) -> list[str]:
    """The names that papermill's injected cell assigns, from the kernel's input history."""
    cells = [source for source in history if source.startswith("# Parameters\n")]
    if not cells:
        return []
    targets = (n.targets[0] for n in ast.parse(cells[-1]).body if isinstance(n, ast.Assign))
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _defaults(history: list[str]) -> dict[str, Any]:
    """Names and values of the first cell that holds nothing but annotated, plain values."""
    for source in history:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a magic
            continue
        found = [(n.target, n.value) for n in body if isinstance(n, ast.AnnAssign) and n.value]
        if found and len(found) == len(body):
            return {ast.unparse(target): _plain(value) for target, value in found}
    return {}


def _plain(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError as error:
        text = ast.unparse(value)
        raise WdlibError(
            f"a parameter is declared as {text}: write a number, a text, or a list of these"
        ) from error


def numbered() -> list[Path]:
    """The numbered notebooks, in their order."""
    return sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


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
    package = Path(__file__).parent
    files = {path: path.relative_to(package) for path in package.rglob("*.py")}
    files |= {path: path.relative_to(package) for path in package.rglob("*.mplstyle")}
    for folder in (paths.SPECTRA, paths.RESULTS, paths.DATA / "experiments"):
        files |= {path: path.relative_to(folder.parent) for path in folder.rglob("*.*")}
    files = {path: name for path, name in files.items() if ".provenance" not in name.suffixes}
    files |= {path: Path(path.name) for path in (paths.CATALOGUE, paths.ROOT / "requirements.lock")}
    parts = sorted((str(n), _digest(p.read_bytes())) for p, n in files.items() if p.is_file())
    cells = [(cell.cell_type, cell.source) for cell in _read(notebook).cells]
    return _digest(json.dumps([cells, parts]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(notebook: str | Path) -> "NotebookNode":
    import nbformat

    try:
        found = nbformat.read(notebook, as_version=4)
        nbformat.validate(found)
    except FileNotFoundError:
        raise WdlibError(f"there is no notebook {notebook}") from None
    except Exception as error:  # whatever damage makes the library raise
        raise WdlibError(f"{notebook} is not a Jupyter notebook") from error
    return found


def _write_notebook(notebook: "NotebookNode", path: Path) -> None:
    import nbformat

    paths.write_text(path, nbformat.writes(notebook) + "\n")
