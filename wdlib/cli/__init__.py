# PYTHON_ARGCOMPLETE_OK
"""The `wdlib` command: reads arguments, calls the library, prints; a failure is one line."""

from wdlib.cli.command import main

__all__ = ["main"]
