"""A model, however it is named -> its files, and a stream of its weight matrices.

In: a name of the catalogue, a hub id, a folder or a file. Out: `inventory`, what matrices there
are; `projections`, one float32 matrix at a time. The weights are never loaded as a whole. The room
`attention` tests that these are the matrices with which a model computes.
"""

from wdlib.checkpoints import attention
from wdlib.checkpoints.catalogue import DEFAULT, models
from wdlib.checkpoints.files import Checkpoint, content_hash, resolve
from wdlib.checkpoints.plan import Entry, inventory
from wdlib.checkpoints.stream import Projection, projections, requantise

__all__ = [
    "DEFAULT", "Checkpoint", "Entry", "Projection", "attention", "content_hash", "inventory",
    "models", "projections", "requantise", "resolve",
]  # fmt: skip
