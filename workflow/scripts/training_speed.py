"""What sorting a step's examples by length and bfloat16 base weights save.

`python workflow/scripts/training_speed.py [folder with the data sets]` computes loss and gradient
of the same steps of the default run in four ways, one after the other within every step, and writes
data/results/training_speed.csv, atomically. "plain" divides a step's examples into micro-batches in
the order in which they were drawn, with an attention mask. Ten minutes on two free cores.
"""

import sys
import time
from itertools import product

import torch

from wdlib import lora, paths, provenance
from wdlib.lora import Hyperparameters, Run, data, pretrained, training

STEPS = 3
SEED = 3407


def step(model: torch.nn.Module, parts: list[list[data.Tokens]], *, mask: bool) -> float:
    """Loss of a step, its gradient added to the model's."""
    tokens = sum(len(s.ids) - 1 for part in parts for s in part)
    total = 0.0
    for part in parts:
        batch = data.pad(part)
        if mask:
            lengths = torch.tensor([[len(s.ids)] for s in part])
            batch["attention_mask"] = (torch.arange(batch["labels"].shape[1]) < lengths).long()
        loss = model(**batch, num_items_in_batch=tokens).loss
        loss.backward()
        total += loss.item()
    model.zero_grad()
    return total


def main() -> None:
    """Time every way on every step."""
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    run, h = Run(), Hyperparameters()
    examples = data.examples(run.data, folder=folder)
    made = provenance.of(
        __file__,
        {
            "run": run.key,
            "steps": STEPS,
            "seed": SEED,
            f"sha256 of {run.data}": data.data_hash(examples),
        },
        models=[run.model],
        libraries=("torch", "transformers", "peft"),
    )
    models = {}
    for dtype in ("float32", "bfloat16"):
        loaded = pretrained.load(run.model)
        models[dtype], _ = lora.attach(loaded.model, run.init, seed=SEED)
        for parameter in models[dtype].parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
        models[dtype].train()
    to_train, _ = data.split(examples)
    sequences = data.tokenise(to_train, loaded.tokenizer, max_length=h.max_length)
    ways = list(product(("plain", "sorted"), models))
    rows = {way: {"seconds": 0.0, "cpu seconds": 0.0, "loss": 0.0} for way in ways}
    sizes = {way: {"tokens": 0, "padded": 0} for way in ways}
    plan = data.schedule(len(sequences), h.batch * h.accumulation, STEPS, SEED)
    for drawn in plan:
        for order, dtype in ways:
            chosen = training.by_length(drawn, sequences) if order == "sorted" else drawn.tolist()
            picked = [sequences[i] for i in chosen]
            parts = [picked[i : i + h.batch] for i in range(0, len(picked), h.batch)]
            wall, processor = time.perf_counter(), time.process_time()
            loss = step(models[dtype], parts, mask=order == "plain")
            row, size = rows[order, dtype], sizes[order, dtype]
            row["seconds"] += time.perf_counter() - wall
            row["cpu seconds"] += time.process_time() - processor
            row["loss"] += loss / STEPS
            for key, value in training.token_counts(picked, h.batch).items():
                size[key] += value
    table = [
        {
            "micro-batches": order,
            "base weights": dtype,
            "threads": torch.get_num_threads(),
            "steps": STEPS,
            **sizes[order, dtype],
            **row,
            "tokens per second": sizes[order, dtype]["tokens"] / row["seconds"],
            "tokens per cpu second": sizes[order, dtype]["tokens"] / row["cpu seconds"],
        }
        for (order, dtype), row in rows.items()
    ]
    provenance.write(table, paths.RESULTS / "training_speed.csv", made)


if __name__ == "__main__":
    main()
