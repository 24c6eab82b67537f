"""The directive that docs/api.md is made of: a station's face, read from its source.

    ```{face} spectra
    ```

shows the docstring of `wdlib.spectra`, then each function, class and constant that the face lists,
with its signature and docstring. Nothing is imported.
"""

import ast
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PACKAGE = Path(__file__).resolve().parents[1] / "wdlib"


def source(module: str) -> Path | None:
    """The file of a module of the package, by its full name."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def definitions(path: Path) -> dict[str, tuple[ast.stmt, str]]:
    """What a file defines, by name: the statement, and the docstring, below a constant too."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = {}
    for statement, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = (statement, ast.get_docstring(statement) or "")
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            words = str(after.value.value) if told else ""
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            found.update(dict.fromkeys(names, (statement, words)))
    return found


def face(station: str) -> dict[str, tuple[str, ast.stmt, str]]:
    """What a face shows, rooms apart: by name, the module that defines it, statement, docstring."""
    module = f"wdlib.{station}"
    path = source(module)
    here = definitions(path)
    if path.name != "__init__.py":
        shown = {n: d for n, d in here.items() if not n.startswith("_") and d[1]}
        return {name: (module, *found) for name, found in shown.items()}
    names = ast.literal_eval(here["__all__"][0].value)
    origins = {
        alias.name: node.module
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = {}
    for name in names:
        if source(f"{module}.{name}") is None:
            origin = source(origins[name])
            found[name] = (origins[name], *definitions(origin)[name])
    return found


def signature(statement: ast.stmt) -> str:
    """The arguments of a function, with types and defaults, or the fields of a dataclass."""
    if isinstance(statement, ast.FunctionDef):
        returns = f" -> {ast.unparse(statement.returns)}" if statement.returns else ""
        return f"({ast.unparse(statement.args)}){returns}"
    if isinstance(statement, ast.ClassDef):
        fields = [ast.unparse(node) for node in statement.body if isinstance(node, ast.AnnAssign)]
        return f"({', '.join(fields)})" if fields else ""
    return ""


def markdown(docstring: str) -> str:
    """A docstring as Markdown: "name: text" at the beginning of a line is an item of a list."""
    lines = re.sub(r"^(?=[\w\[\], .*`]{1,40}: )", "- ", docstring, flags=re.M).splitlines()
    told = []
    for line in lines:
        item, before = line.startswith("- "), told[-1] if told else ""
        if item and before and not before.startswith(("- ", "  ")):
            told.append("")
        told.append(line)
    return "\n".join(told)


class Face(SphinxDirective):
    """Everything that one station shows."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The docstring of the station, and an entry for each name."""
        (station,) = self.arguments
        path = source(f"wdlib.{station}")
        if path is None:
            raise self.error(f"wdlib has no station {station}: name one of those in wdlib/")
        text = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "", ""]
        for name, (_, statement, docstring) in face(station).items():
            kind = {ast.FunctionDef: "function", ast.ClassDef: "class"}.get(type(statement), "data")
            text += [f"`````{{py:{kind}}} {station}.{name}{signature(statement)}", ""]
            text += [markdown(docstring), "`````", ""]
        return self.parse_text_to_nodes("\n".join(text))


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directive known."""
    app.add_directive("face", Face)
    return {"parallel_read_safe": True}
