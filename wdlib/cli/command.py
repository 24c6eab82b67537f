"""The command itself: from words to an exit status."""

import argparse
import os
import sys
from collections.abc import Sequence

from wdlib import WdlibError, first_line
from wdlib.cli.parser import joined, parser
from wdlib.cli.subcommands import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    1 where it failed, 2 for wrong usage, 130 when interrupted, 141 when nobody reads the output to
    its end. `fingerprint` answers a question: 0 related, 1 not, 2 where it failed.
    """
    known = parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(known)
    words = sys.argv[1:] if arguments is None else arguments
    options = known.parse_args(joined(words))
    try:
        status = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        from wdlib.notebooks.runs import lacking

        return _failed(lacking(error.name or ""), options)
    except OSError as error:
        return _failed(f"{error.filename}: " * bool(error.filename) + first_line(error), options)
    except WdlibError as error:
        return _failed(str(error), options)
    except KeyboardInterrupt:
        print("wdlib: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _failed(text: str, options: argparse.Namespace) -> int:
    unfinished = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{unfinished}wdlib: {printable(text)}", file=sys.stderr)
    return int(options.failure)
