"""The long run: a table of what became of the cases, kind by kind, put into docs/reliability.md."""

import sys
import tempfile
import time
from pathlib import Path

from fuzz import engine
from fuzz.kinds import KINDS

from wdlib import paths

TIMES = 20
"""So many times the cases of the short run, which come first and are not among them."""

BEGIN, END = "<!-- the table of `make fuzz` begins -->\n", "<!-- and ends -->\n"


def main() -> int:
    """Writes the table; returns 1 where a case failed."""
    rows, failed, begun = [], False, time.monotonic()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            numbers = range(kind.cases, (TIMES + 1) * kind.cases)
            found = engine.run(kind, Path(folder) / "files", numbers)
        rows.append((kind.name, len(numbers), *(found.counts[o] for o in engine.OUTCOMES)))
        sys.stderr.write(f"{time.monotonic() - begun:5.0f} s  {kind.name}\n")
        for number, why in list(found.failures.items())[:20]:
            sys.stderr.write(f"         case {number}: {why}\n")
        failed |= bool(found.failures)
    rows.append(("all", *(sum(row[column] for row in rows) for column in range(1, len(rows[0])))))
    text = table(rows)
    sys.stdout.write(text)
    page = paths.ROOT / "docs" / "reliability.md"
    if page.is_file():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        paths.write_text(page, before + BEGIN + text + END + rest.partition(END)[2])
    return int(failed)


def table(rows: list[tuple[str | int, ...]]) -> str:
    """Markdown of rows: kind, cases, and how many had each outcome."""
    head = ["kind", "cases", *engine.OUTCOMES]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, *numbers in rows:
        lines.append(f"| {name} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
