"""The numbered notebooks: strict parameters, runs with the outputs stored, figures kept up to date.

A notebook declares its parameters in one cell tagged `parameters`, each with its type
(`rank: int = 16`), and calls `check_parameters(globals())` in the next cell.
"""

from wdlib.notebooks.files import normalise, numbered
from wdlib.notebooks.parameters import (
    banner,
    check_parameters,
    declared_parameters,
    parameters_from_text,
)
from wdlib.notebooks.runs import figures, find_notebook, refresh, run_notebook

__all__ = [
    "banner", "check_parameters", "declared_parameters", "figures", "find_notebook", "normalise",
    "numbered", "parameters_from_text", "refresh", "run_notebook",
]  # fmt: skip
