"""Instruction data -> examples, tokens, and the order in which a run sees them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from wdlib import WdlibError, first_line, paths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


_T = TypeVar("_T")

IGNORED = -100
"""The label of a token that has no part in the loss; transformers' number."""

PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompt of Stanford Alpaca (Apache-2.0) with an input, which unsloth's notebooks use for
examples without one too. The answer and the tokenizer's end-of-sequence token follow it."""

HELD_OUT = 100
"""Examples of each data set that are never trained on; their loss is measured before and after."""

SPLIT_SEED = 0
"""Seed of the shuffle that chooses them: the same ones for every run."""


@dataclass(frozen=True)
class Example:
    """One instruction, its input (empty where it needs none) and the wanted answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class DataSet:
    """Where a data set is: a file name in a local folder (JSON lines), an address otherwise."""

    file: str
    url: str


DATA = {
    "alpaca": DataSet(
        "alpaca_en_demo.jsonl", "hf://datasets/llamafactory/demo_data/alpaca_en_demo.json"
    ),
    "math": DataSet(
        "math_word_problems_train.jsonl",
        "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/"
        "d059072c72528256bfa7cfa38b98710cbcdcbf02/math_data.json",
    ),
    "arc": DataSet(
        "arc_challenge_train.jsonl",
        "hf://datasets/allenai/ai2_arc/ARC-Challenge/train-00000-of-00001.parquet",
    ),
}
"""Alpaca instructions answered by GPT-4 (LLaMA-Factory's sample), arithmetic word problems
(LLM-Adapters), and the training questions of ARC-Challenge as instructions. The stored runs on
"math" had an earlier version of the file, with other words around the same answers: their hash
differs, and `grid` does not mix the two."""

CHOICE_INSTRUCTION = "Choose the correct answer to the question."


def examples(name: str, *, folder: str | Path | None = None) -> tuple[Example, ...]:
    """The examples of a data set in their order, without repeated questions.

    Two examples with equal instruction and input count as one, with the answer of the first and at
    the place of the last: otherwise a held-out question could have been trained on.

    Arguments: name, one of DATA; folder, with the file of that name; None reads the hub.
    Raises: WdlibError for an unknown name, for a missing or damaged file, and where the network or
    the packages that read from it are missing.
    """
    if name not in DATA:
        raise WdlibError(f"there is no data set {name!r}: choose from {', '.join(DATA)}")
    source = DATA[name]
    rows = _remote_rows(source) if folder is None else _local_rows(Path(folder) / source.file)
    try:
        read = [_example(row) for row in rows]
    except (WdlibError, TypeError) as error:
        raise WdlibError(
            f"a row of the data set {name!r} lacks what it should have ({error}): get "
            f"{source.file} again"
        ) from error
    return tuple({(e.instruction, e.input): e for e in reversed(read)}.values())[::-1]


def _local_rows(path: Path) -> list[dict]:
    try:
        return paths.json_lines(path)
    except (OSError, ValueError) as error:
        raise WdlibError(
            f"{path} cannot be read ({error}): name the folder that holds it, or none to read the "
            "data set from the hub"
        ) from error


def _remote_rows(source: DataSet) -> list[dict]:
    try:
        import fsspec

        with fsspec.open(source.url, "rb") as file:
            if source.url.endswith(".parquet"):
                from pyarrow import parquet

                return parquet.read_table(file).to_pylist()
            return json.load(file)
    except Exception as error:  # whatever the network library raises
        raise WdlibError(
            f"{source.url} cannot be read ({first_line(error)}): check the network, or name a "
            f"local folder with {source.file}"
        ) from error


@dataclass(frozen=True)
class _Instruction:
    instruction: str
    input: str | None
    output: str


@dataclass(frozen=True)
class _Choices:
    text: tuple[str, ...]
    label: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A row of ARC: the options, their labels, and the label of the right one."""

    question: str
    choices: _Choices
    answerKey: str

    def __post_init__(self) -> None:
        labels = self.choices.label
        if len(labels) != len(self.choices.text) or self.answerKey not in labels:
            raise ValueError("the answer is none of the options")


def _example(row: dict) -> Example:
    def parsed(kind: type[_T]) -> _T:
        what, remedy = "it is no example", "correct it"
        return paths.parse_json(json.dumps(row), kind, what=what, remedy=remedy, others="ignore")

    if "choices" not in row:
        given = parsed(_Instruction)
        return Example(given.instruction, given.input or "", given.output)
    asked = parsed(Question)
    options = [f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(asked.choices.text)]
    return Example(
        CHOICE_INSTRUCTION,
        "\n".join([asked.question, *options]),
        options[asked.choices.label.index(asked.answerKey)],
    )


def split(rows: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and the last HELD_OUT after one fixed shuffle.

    Raises: WdlibError where fewer would be left to train on than are held out.
    """
    if len(rows) < 2 * HELD_OUT:
        raise WdlibError(f"{len(rows)} examples are too few: {2 * HELD_OUT} are needed")
    shuffled = [rows[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(rows))]
    return shuffled[:-HELD_OUT], shuffled[-HELD_OUT:]


@dataclass(frozen=True)
class Tokens:
    """Token ids of an example, their labels, and whether its end was cut off."""

    ids: list[int]
    labels: list[int]
    cut: bool

    @property
    def counted(self) -> int:
        """How many tokens have a part in the loss."""
        return len(self.labels) - self.labels.count(IGNORED)


def tokenise(
    rows: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    answers_only: bool = False,
) -> list[Tokens]:
    """Examples in the Alpaca format as token ids with labels.

    Arguments: max_length, in tokens: what is longer loses its end; answers_only gives the prompt's
    tokens the label IGNORED. The first token is never predicted, so its label is IGNORED too.
    Raises: WdlibError for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise WdlibError(
            "the tokenizer has no end-of-sequence token, by which a model learns to stop: set its "
            "eos_token"
        )
    done = []
    for row in rows:
        prompt = PROMPT.format(instruction=row.instruction, input=row.input)
        coded = tokenizer(prompt + row.output, return_offsets_mapping=True)
        ids, starts = list(coded["input_ids"]), [start for start, _ in coded["offset_mapping"]]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            starts.append(0)
        starts[-1] = max(starts[-1], len(prompt))  # tokenizers that append it say that it is at 0
        labels = [
            i if not answers_only or start >= len(prompt) else IGNORED
            for i, start in zip(ids, starts, strict=True)
        ]
        labels[0] = IGNORED
        done.append(Tokens(ids[:max_length], labels[:max_length], len(ids) > max_length))
    return done


def schedule(rows: int, batch: int, steps: int, seed: int) -> np.ndarray:
    """Which examples each step trains on: (steps, batch) indices below `rows`.

    Every example is seen once before one is seen twice; each pass has an order of its own.
    """
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(rows) for _ in range(-(-steps * batch // rows))]
    return np.concatenate(passes)[: steps * batch].reshape(steps, batch)


def pad(sequences: Sequence[Tokens], padding: int = 0) -> "dict[str, torch.Tensor]":
    """A batch: input_ids and labels (sequences, longest), padded on the right with IGNORED labels.

    There is no attention mask: causal attention never looks to the right of a token.
    """
    import torch

    longest = max(len(s.ids) for s in sequences)
    ids = [s.ids + [padding] * (longest - len(s.ids)) for s in sequences]
    labels = [s.labels + [IGNORED] * (longest - len(s.ids)) for s in sequences]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def data_hash(rows: Sequence[Example]) -> str:
    """The sha256 of examples in their order, by which runs on the same data know each other."""
    lines = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def tokens_hash(sequences: Sequence[Tokens]) -> str:
    """The sha256 of token ids and labels, by which runs of one tokenizer know each other."""
    lines = "".join(json.dumps([s.ids, s.labels]) + "\n" for s in sequences)
    return hashlib.sha256(lines.encode()).hexdigest()
