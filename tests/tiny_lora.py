"""Adapters on tiny models, and made-up items of the benchmarks."""

import copy
import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tiny

from wdlib import TYPES
from wdlib.lora import initialisation
from wdlib.lora.adapters import LoraSettings, adapted_sites
from wdlib.lora.benchmarks import GPQA_PASSWORD, TASKS, quiet

GPQA, ARC, HELLASWAG = TASKS
REFERENCE = "qwen2.5-coder-0.5b-instruct"
"""A model whose characterisation is stored."""

LITERAL = {"init": "literal", "reference": REFERENCE}
"""Of a run that starts from it."""

# Adapters -------------------------------------------------------------------------------------

RANK = 8
SMALL = LoraSettings(rank=RANK, alpha=12)
GROUPS = tiny.characterisation(
    ("q", "k", "v"), ("gate", "up"), ("o",), ("down",), alone=("down",), rank=RANK
)


def reshaped(model, init="literal", character=GROUPS, **options):
    return initialisation.attach(model, init, characterisation=character, settings=SMALL, **options)


def matrices(peft_model):
    """(A, B) in units of A's standard deviation, by type, in the order of layers."""
    found = {kind: [] for kind in TYPES}
    for site, layer in adapted_sites(peft_model):
        a, b = (f["default"].weight.detach().numpy() for f in (layer.lora_A, layer.lora_B))
        unit = math.sqrt(3 * layer.in_features)
        found[site.type].append((a * unit, b * unit))
    return found


def logits(model, batch):
    import torch

    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def snapshot(model):
    """Weights, trainability and names: what a failed call must leave alone."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [(n, p.requires_grad) for n, p in model.named_parameters()], model.training


def assert_untouched(model, before):
    import torch

    state, flags, training = snapshot(model)
    assert flags == before[1]
    assert training == before[2]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[name], value) for name, value in before[0].items())


def train(peft_model, batch, steps=2):
    import torch

    peft_model.train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        peft_model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
    peft_model.eval()


def stock(model, adapter="default", **options):
    """The model with an adapter of peft's own."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": RANK, "target_modules": ["q_proj", "up_proj"], **options}
    return get_peft_model(model, LoraConfig(**settings), adapter_name=adapter)


# Benchmarks -----------------------------------------------------------------------------------

TEXT = "the a river stone light sings turns under seven green 12 305 bright — über not"
WORDS = TEXT.split()


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def locked(data: bytes, password: bytes) -> bytes:
    """Traditional zip encryption, which `zipfile` reads but does not write."""

    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        return value

    table = [entry(value) for value in range(256)]
    keys = [0x12345678, 0x23456789, 0x34567890]

    def update(byte: int) -> None:
        keys[0] = (keys[0] >> 8) ^ table[(keys[0] ^ byte) & 0xFF]
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = (keys[2] >> 8) ^ table[(keys[2] ^ (keys[1] >> 24)) & 0xFF]

    for byte in password:
        update(byte)
    out = bytearray()
    for byte in bytes(11) + bytes([zlib.crc32(data) >> 24]) + data:
        key = keys[2] | 2
        out.append(byte ^ (key * (key ^ 1) >> 8 & 0xFF))
        update(byte)
    return bytes(out)


def write_locked(path: Path, name: str, data: bytes) -> None:
    """A zip file of one stored, encrypted member."""
    buffer = io.BytesIO()
    secret = locked(data, GPQA_PASSWORD)
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, secret)
    raw = bytearray(buffer.getvalue())
    central = raw.index(b"PK\x01\x02")
    for flags, crc, size in ((6, 14, 22), (central + 8, central + 16, central + 24)):
        raw[flags] |= 1
        raw[crc : crc + 4] = zlib.crc32(data).to_bytes(4, "little")
        raw[size : size + 4] = len(data).to_bytes(4, "little")
    path.write_bytes(raw)


def benchmark_items() -> dict[str, list[dict]]:
    """Made-up items of each benchmark, in the columns of the real ones."""
    rng = np.random.default_rng(0)
    gpqa = [
        {
            "Record ID": str(row),
            "Question": f"secretword {words(rng, 30)}?",
            "Correct Answer": words(rng, 4),
            **{f"Incorrect Answer {i}": f" {words(rng, 3 + i)}\n" for i in (1, 2, 3)},
        }
        for row in range(16)
    ]
    arc = [
        {
            "id": str(row),
            "question": words(rng, 12) + "?",
            "choices": {
                "text": [words(rng, rng.integers(1, 6)) for _ in range(count)],
                "label": list("ABCDE"[:count]),
            },
            "answerKey": "ABCDE"[rng.integers(count)],
        }
        for row, count in enumerate((4, 4, 5, 3, 4, 4, 4, 4, 4))
    ]
    hellaswag = [
        {
            "ind": row,
            "activity_label": words(rng, 2),
            "ctx_a": words(rng, 14) + ".",
            "ctx_b": words(rng, 3),
            "ctx": "",
            "endings": [words(rng, rng.integers(3, 12)) + "." for _ in range(4)],
            "label": str(rng.integers(4)),
        }
        for row in range(9)
    ]
    return {GPQA: gpqa, ARC: arc, HELLASWAG: hellaswag}


def answering(kind: str = "llama", **options):
    """A small model, far from uniform, as a trained one is."""
    ends = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    given = {"initializer_range": 0.3, "max_position_embeddings": 512, **options}
    return tiny.model(kind, layers=2, **ends, **given)


def harness(model, tokenizer, given: list) -> np.ndarray:
    """What lm-eval's own model class answers."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
        return np.array(plain.loglikelihood(given, disable_tqdm=True))
