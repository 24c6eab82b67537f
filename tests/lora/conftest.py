"""Tiny models, data sets and benchmarks for LoRA."""

import copy
import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_lora
import torch
from tiny_lora import ARC, GPQA, HELLASWAG
from transformers import LlamaConfig

from wdlib.checkpoints.catalogue import DEFAULT
from wdlib.lora import pretrained
from wdlib.lora.data import DATA


@pytest.fixture(scope="session")
def untouched():
    """A Llama of six small layers; tests that change it get copies."""
    return tiny.model()


@pytest.fixture
def llama(untouched):
    """A copy of `untouched`."""
    return copy.deepcopy(untouched)


@pytest.fixture(scope="session")
def batch():
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


@pytest.fixture(scope="session")
def smollm():
    """The default model, which takes half a minute to load."""
    return pretrained.load(DEFAULT)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a small Llama and its byte tokenizer (model/), and 240 examples (data/)."""
    folder = tmp_path_factory.mktemp("training")
    pretrained.miniature(LlamaConfig(), folder / "model")
    rng = np.random.default_rng(0)
    rows = [
        {"instruction": f"Repeat {i}.", "input": str(i) * (i % 2), "output": f"{i} " * n}
        for i, n in enumerate(rng.integers(1, 30, 240).tolist())
    ]
    (folder / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / DATA["alpaca"].file).write_text(lines)
    return folder


@pytest.fixture(scope="session")
def items() -> dict[str, list[dict]]:
    return tiny_lora.benchmark_items()


@pytest.fixture(scope="session")
def data(items: dict[str, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as data/README describes it."""
    folder = tmp_path_factory.mktemp("data")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(items[GPQA][0]))
    writer.writeheader()
    writer.writerows(items[GPQA])
    tiny_lora.write_locked(
        folder / "gpqa_diamond.zip", "dataset/gpqa_diamond.csv", table.getvalue().encode()
    )
    lines = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in items.items()}
    (folder / "arc_challenge_test.jsonl").write_text(lines[ARC], encoding="utf-8")
    with gzip.open(folder / "hellaswag_validation.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines[HELLASWAG])
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([tiny_lora.TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
