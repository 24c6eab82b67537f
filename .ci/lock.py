"""Whether the running environment has pip and every package of a lock file, as it pins them.

    python .ci/lock.py requirements.lock

The exit status says it, and one line what is missing. More packages may be there.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def key(name: str) -> str:
    """A name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(lock: str, installed: dict[str, str]) -> list[str]:
    """The lines of a lock file that do not hold; "+cpu" after a version is of no matter."""
    pins = [line.strip() for line in lock.splitlines() if "==" in line]
    return [
        f"{name}=={version}"
        for name, version in (pin.split("==") for pin in pins)
        if installed.get(key(name), "").partition("+")[0] != version
    ]


if __name__ == "__main__":
    here = {key(d.metadata["Name"]): d.version for d in distributions()}
    found = missing(Path(sys.argv[1]).read_text(encoding="utf-8"), here)
    found = found if "pip" in here else ["pip", *found]
    if found:
        sys.exit(f"it has no {found[0]}" + f" and {len(found) - 1} more" * (len(found) > 1))
