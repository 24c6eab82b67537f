"""What an evaluation costs by lm-eval alone, and by trees of tokens in two data types.

`python workflow/scripts/evaluation_speed.py [folder with the benchmarks]` scores the first items of
each task of the default protocol, with GPQA in its four orders, in three ways, and writes
data/results/evaluation_speed.csv. Five minutes on a free core.
"""

import copy
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from wdlib import checkpoints, paths, provenance
from wdlib.lora import benchmarks, evaluation, pretrained

LIMIT = {"gpqa_diamond_zeroshot": 6, "arc_challenge": 18, "hellaswag": 18}
BATCH = 8
"""Sequences that lm-eval alone scores together."""


def main() -> None:
    """Time every way on every task."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    loaded = pretrained.load(checkpoints.DEFAULT)
    protocol = benchmarks.Protocol(limit=LIMIT)
    made = provenance.of(
        __file__,
        {"limit": LIMIT, "batch": BATCH, "orders": protocol.orders},
        models=[checkpoints.DEFAULT],
        libraries=("torch", "transformers", "lm-eval"),
    )
    rows = []
    for task in protocol.tasks:
        shown = benchmarks.requests(task, protocol, folder).shown
        requests = [request for item in shown for request in itertools.chain(*item)]
        exact = None
        for way, dtype in (("lm-eval", "float32"), ("trees", "float32"), ("trees", "bfloat16")):
            scorer = _scorer(way, dtype, loaded)
            wall, processor = time.perf_counter(), time.process_time()
            with benchmarks.quiet():
                answers = [a for a, _ in scorer.loglikelihood(requests, disable_tqdm=True)]
            used = {"cpu seconds": time.process_time() - processor}
            used["seconds"] = time.perf_counter() - wall
            exact = np.array(answers) if exact is None else exact
            rows.append(
                {
                    "task": task,
                    "way": way,
                    "dtype": dtype,
                    "threads": torch.get_num_threads(),
                    "items": LIMIT[task],
                    "requests": len(requests),
                    **used,
                    "largest difference, nats": float(np.abs(np.array(answers) - exact).max()),
                }
            )
    provenance.write(rows, paths.RESULTS / "evaluation_speed.csv", made)


def _scorer(way: str, dtype: str, loaded: pretrained.Pretrained) -> Any:
    if way == "trees":
        return evaluation.tree_scorer(loaded.model, loaded.tokenizer, dtype)
    return HFLM(
        pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=BATCH
    )


if __name__ == "__main__":
    main()
