"""A reference's characterisation -> a LoRA adapter that starts from it, trained and evaluated.

In: a model and the characterisation of another. Out: an adapter (`attach`, `reshape_`), a trained
one (`train`), its answers (`evaluate`), and a grid of such runs with their results (`grid`,
`results`). Importing this imports none of torch, transformers and peft.
"""

from wdlib.lora import (
    benchmarks,
    comparison,
    curvature,
    data,
    evaluation,
    grid,
    initialisation,
    letters,
    measure,
    pretrained,
    results,
    runs,
    scores,
    training,
)
from wdlib.lora.adapters import LoraSettings, export
from wdlib.lora.evaluation import evaluate
from wdlib.lora.initialisation import attach, reshape_
from wdlib.lora.runs import Hyperparameters, Run
from wdlib.lora.training import train

__all__ = [
    "Hyperparameters", "LoraSettings", "Run", "attach", "benchmarks", "comparison", "curvature",
    "data", "evaluate", "evaluation", "export", "grid", "initialisation", "letters", "measure",
    "pretrained", "reshape_", "results", "runs", "scores", "train", "training",
]  # fmt: skip
