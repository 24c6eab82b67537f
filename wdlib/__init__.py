"""wdlib: how the weights of large language models are distributed, and what that is good for.

Data flows one way, from station to station: checkpoints -> spectra -> distances -> fits ->
characterise -> generator -> lora, and beside them fingerprints. A station is a file or a folder
whose `__init__` is its face. It imports only stations before it, and importing the package itself
imports none of them.
"""

import re

__version__ = "0.1.0"

TYPES = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven projection types, in the order of every table and figure (arXiv 2509.00046)."""


class WdlibError(Exception):
    """An error whose message is one sentence that names the thing and the remedy."""


def first_line(error: Exception) -> str:
    """The first line of an error's message without its full stop, or the error's type.

    Of the system's errors that is the reason alone, without its number and the name of the file.
    """
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = (message.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return re.sub(r"^\[Errno -?\d+\] ", "", first)
