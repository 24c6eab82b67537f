"""The largest eigenvalue of the loss's Hessian in each start of an adapter, before training.

`python workflow/scripts/curvature.py [folder with the data sets]` attaches every start to the
default model and writes data/results/curvature.csv, atomically; finished starts are kept. The loss
is that of the first EXAMPLES held-out examples of at most TOKENS tokens, weights in float32. A
Hessian-vector product takes seconds of a core and a start some fifteen of them; 6 GB of memory.
"""

import sys

import torch

from wdlib import characterise, lora, paths, provenance
from wdlib.lora import Hyperparameters, Run, curvature, data, pretrained, training

SEED = 3407
EXAMPLES, TOKENS = 4, 100
TOLERANCE = 0.01
REFERENCE = "qwen2.5-coder-0.5b-instruct"

STARTS = (
    *((init, None) for init in ("default", "pissa")),
    *((init, REFERENCE) for init in lora.runs.RESHAPED),
    *((init, None) for init in ("gaussian", "orthogonal", "olora", "eva")),
)
"""Initialisation and reference."""


def main() -> None:
    """Measure every start."""
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    h = Hyperparameters()
    examples = data.examples(Run().data, folder=folder)
    made = provenance.of(
        __file__,
        {
            "seed": SEED,
            "examples": EXAMPLES,
            "tokens": TOKENS,
            "tolerance": TOLERANCE,
            f"sha256 of {Run().data}": data.data_hash(examples),
        },
        inputs=[path for start in STARTS if (path := _run(*start).characterisation())],
        models=[Run().model],
        libraries=("torch", "transformers", "peft"),
    )
    tokenizer = pretrained.load(Run().model).needed_tokenizer()
    to_train, held_out = (
        data.tokenise(part, tokenizer, max_length=h.max_length) for part in data.split(examples)
    )
    batch = data.pad([s for s in held_out if len(s.ids) <= TOKENS][:EXAMPLES])
    plan = data.schedule(len(to_train), h.batch, training.EVA_BATCHES, SEED)
    read = [{"input_ids": data.pad([to_train[i] for i in part])["input_ids"]} for part in plan]

    def rows(init: str, reference: str | None) -> list[dict]:
        path = _run(init, reference).characterisation()
        model, _ = lora.attach(
            pretrained.load(Run().model).model,
            init,
            characterisation=characterise.load(path) if path else None,
            seed=SEED,
            batches=read if init == "eva" else None,
        )
        found = curvature.largest_eigenvalue(model, batch, tolerance=TOLERANCE)
        with torch.no_grad():
            loss = model.eval()(**batch).loss.item()
        kept = {"eigenvalue": found.eigenvalue, "share of B": found.share_b, "loss": loss}
        start = {"init": init, "reference": reference or "", "seed": SEED}
        return [start | kept | {"products": found.products}]

    provenance.write_by_cell(STARTS, rows, paths.RESULTS / "curvature.csv", made)


def _run(init: str, reference: str | None) -> Run:
    return Run(init=init, reference=reference, seed=SEED)


if __name__ == "__main__":
    main()
