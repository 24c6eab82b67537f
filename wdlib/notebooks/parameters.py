"""A notebook's parameters: declared with their types in one cell, checked before anything runs."""

import ast
import builtins
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from wdlib import WdlibError, first_line
from wdlib.notebooks.files import read, tagged

if TYPE_CHECKING:
    from IPython.display import Markdown


_NO_PYTHON = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
"""What `ast` raises for texts that are no Python, or nest too deeply."""


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
    check(declared, {name: namespace[name] for name in names if name in namespace})
    defaults = stored_values(history).items()
    return {name: namespace[name] for name, value in defaults if namespace[name] != value}


def banner(changed: Mapping[str, Any], *, model: str, rank: int | None = None) -> "Markdown | None":
    """What a run that is not the stored one says at its top; None for the stored one.

    changed: what `check_parameters` returned. model, rank: the run's, where it has them, which an
    edit of the parameters cell before its first run changes unseen.
    """
    from IPython.display import Markdown

    from wdlib import paper
    from wdlib.checkpoints.catalogue import DEFAULT

    given = {"model": model, "rank": rank if rank is not None else paper.RANKS[0]}
    usual = {"model": DEFAULT, "rank": paper.RANKS[0]}
    edited = {name: value for name, value in given.items() if usual[name] != value}
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
    cells = tagged(read(notebook), "parameters")
    if len(cells) != 1:
        raise WdlibError(
            f"{Path(notebook).name} has {len(cells)} cells tagged `parameters`: tag exactly one"
        )
    name = Path(notebook).name
    try:
        body = ast.parse(cells[0].source).body
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


def check(declared: Mapping[str, Any], given: Mapping[str, Any]) -> None:
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


def stored_values(history: list[str]) -> dict[str, Any]:
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
