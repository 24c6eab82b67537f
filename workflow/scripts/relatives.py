"""Relatives of the default model by training, and a model of its shape that is none.

`python workflow/scripts/relatives.py [folder with the data sets]` trains each of `MADE` for 20
to 100 steps on Alpaca, ten minutes on one core altogether, and keeps the checkpoints in
data/cache/relatives. One that is there is left.
"""

import hashlib
import inspect
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from wdlib import checkpoints, paths
from wdlib.fingerprints import decoder
from wdlib.lora import data, pretrained

BATCH, LENGTH, SEED = 4, 48, 3407
"""Sequences of a step, tokens of each at most, and the seed of all that is random."""


@dataclass(frozen=True)
class Recipe:
    """rate: learning rate of AdamW. adapter: rank of what is trained, 0 for the weights themselves.
    is_new: whether the weights are drawn anew before training."""

    steps: int
    rate: float
    adapter: int = 0
    is_new: bool = False


RECIPES = {
    "fine-tuned, learning rate 5e-4": Recipe(100, 5e-4),
    "fine-tuned, learning rate 2e-5": Recipe(20, 2e-5),
    "adapter of rank 16, learning rate 2e-4": Recipe(20, 2e-4, adapter=16),
    "student of random weights": Recipe(40, 1e-3, is_new=True),
}
MADE = {name: not recipe.is_new for name, recipe in RECIPES.items()}
"""The names, and whether it is a relative."""


def folder(name: str) -> Path:
    """Where a trained model is kept, by all that decides it."""
    parts = [*astuple(RECIPES[name]), BATCH, LENGTH, SEED, inspect.getsource(train)]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
    return paths.CACHE / "relatives" / f"{name.partition(',')[0].replace(' ', '-')}-{digest}"


def load(name: str) -> decoder.Decoder:
    """One of `MADE`, which `main` has trained."""
    return decoder.of(pretrained.load(folder(name)).model)


def train(model: Any, batches: list[dict[str, Any]], recipe: Recipe) -> Any:
    """A model after a step on every batch."""
    if recipe.adapter:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=recipe.adapter, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    for batch in tqdm(batches, unit="step"):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.merge_and_unload() if recipe.adapter else model


def make(name: str, examples: tuple[data.Example, ...]) -> None:
    """Train one of `MADE` and keep it."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    loaded = pretrained.load(checkpoints.DEFAULT)
    model = loaded.model
    if recipe.is_new:
        model = type(model)(model.config).eval()
    rows = data.tokenise(examples, loaded.needed_tokenizer(), max_length=LENGTH)
    plan = data.schedule(len(rows), BATCH, recipe.steps, SEED)
    batches = [data.pad([rows[i] for i in drawn]) for drawn in plan]
    trained = train(model, batches, recipe)
    paths.mark_whole(decoder.write(decoder.of(trained), folder(name)))


def main() -> None:
    """Train those that are not there."""
    lacking = [name for name in MADE if not paths.is_whole(folder(name))]
    if lacking:
        examples = data.examples("alpaca", folder=sys.argv[1] if len(sys.argv) > 1 else None)
        with threadpool_limits(1):
            for name in lacking:
                make(name, examples)


if __name__ == "__main__":
    main()
