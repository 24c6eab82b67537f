"""docs/architectures.md -> the same with its tables made anew, from the types of transformers.

Run `PYTHONPATH=tests .venv/bin/python docs/architectures.py`; it takes two minutes.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny_zoo
import transformers
import zoo_truth
from tqdm.auto import tqdm

PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- from here on made by docs/architectures.py -->\n"
HEAD = "| type | stack that is read, or why not | others | types of their own | joined | not read |"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = {task: table(task) for task in tiny_zoo.MAPPINGS}
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(above + MARK + "\n".join([*summary(rows), *tables(rows)]), encoding="utf-8")


def table(task: str) -> dict[str, tuple[str, ...]]:
    """Row by type of a mapping."""
    found = {}
    for name in tqdm(tiny_zoo.names(task), desc=task, file=sys.stderr):
        with TemporaryDirectory() as folder:
            found[name] = zoo_truth.examine(task, name, Path(folder)).row
    unbuilt = sorted(tiny_zoo.mapping(task).keys() & tiny_zoo.UNBUILT.keys())
    return found | {name: (f"not built: {tiny_zoo.UNBUILT[name]}", *[""] * 4) for name in unbuilt}


def summary(rows: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    lines = [
        f"\nAs of transformers {transformers.__version__}:\n",
        "| mapping | types | built | read | refused |",
        "|---|---|---|---|---|",
    ]
    for task, found in rows.items():
        types = [row for name, row in found.items() if ", " not in name]
        built = [row for row in types if not row[0].startswith("not built")]
        read = [row for row in built if row[0].startswith("`")]
        numbers = len(types), len(built), len(read), len(built) - len(read)
        lines.append(f"| {task} | {' | '.join(map(str, numbers))} |")
    return lines


def tables(rows: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    lines = []
    for task, found in rows.items():
        lines += [f"\n## {task}\n", HEAD, "|---|---|---|---|---|---|"]
        lines += [f"| {name} | {' | '.join(row)} |" for name, row in found.items()]
    return [*lines, ""]


if __name__ == "__main__":
    main()
