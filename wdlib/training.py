"""One LoRA run: a frozen configuration -> a folder with its adapter, loss curve and provenance.

The run is transformers' `Trainer` on a model that `lora.attach` prepared (docs/method.md, section
8). Which examples form a step, and in which order, depends on the data set and the seed alone, so
that runs with other initialisations pair with it. Within a step, examples of similar length share
a micro-batch: the step's loss is the mean over all its tokens however they are divided, and less
padding is computed. A run that was stopped at any moment continues at its last whole checkpoint; a
finished one is not repeated.
"""

import hashlib
import json
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import WdlibError, __version__, characterize, lora, models, paths, pretrained
from wdlib.lora import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

UNTRAINED = "untrained"
"""The "initialisation" of a run that has no adapter and takes no step: it measures the model."""

INITIALISATIONS = (UNTRAINED, *lora.INITIALISATIONS)

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

HELD_OUT_BATCH = 8
STEP0_EXAMPLES = 4
"""The first held-out examples, on which `lora.step0` is measured."""

EVA_BATCHES = 16
"""Micro-batches of training examples whose activations EVA reads."""

SAVE_EVERY = 10
"""Steps between checkpoints."""

ADAPTER_FILE = "adapter/adapter_model.safetensors"
"""In a run's folder."""

_RESULT, _START, _RUN, _WHOLE = "result.json", "start.json", "run.json", "whole"


# Data --------------------------------------------------------------------------------------------


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
differs, and `experiments` does not mix the two."""

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
    except (KeyError, TypeError, ValueError) as error:
        raise WdlibError(
            f"a row of the data set {name!r} lacks what it should have ({error!r}): get "
            f"{source.file} again"
        ) from error
    return tuple({(e.instruction, e.input): e for e in reversed(read)}.values())[::-1]


def _local_rows(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WdlibError(
            f"{source.url} cannot be read ({reason}): check the network, or name a local folder "
            f"with {source.file}"
        ) from error


def _example(row: dict) -> Example:
    if "choices" not in row:
        return Example(row["instruction"], row["input"], row["output"])
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    options = [f"{chr(ord('A') + index)}. {text}" for index, text in enumerate(texts)]
    return Example(
        CHOICE_INSTRUCTION,
        "\n".join([row["question"], *options]),
        options[labels.index(row["answerKey"])],
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
    """
    done = []
    for row in rows:
        prompt = PROMPT.format(instruction=row.instruction, input=row.input)
        coded = tokenizer(prompt + row.output, return_offsets_mapping=True)
        ids, starts = list(coded["input_ids"]), [start for start, _ in coded["offset_mapping"]]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
            starts.append(len(prompt) + len(row.output))
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


# Configuration -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyperparameters:
    """How to train; the defaults are those of docs/method.md, section 8.

    batch, accumulation: sequences of a micro-batch, and micro-batches of a step on all devices
    together. weight_decay, max_grad_norm: not in the papers; of the unsloth template and Trainer.
    max_length: tokens of an example, more than any of the default data set has. answers_only: the
    loss counts the answers' tokens alone. dtype of the frozen base weights: "auto" is bfloat16
    where the processor or GPU computes with it natively, float32 elsewhere; the adapter is always
    float32.
    Differs from the template: AdamW keeps its state in float32 instead of 8 bits.
    """

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = lora.LoraSettings.targets
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 5
    steps: int = 60
    batch: int = 2
    accumulation: int = 4
    max_length: int = 1024
    answers_only: bool = False
    dtype: str = "auto"


@dataclass(frozen=True)
class Run:
    """One configuration, complete: equal runs give equal adapters on equal machines.

    model: as for `models.resolve`; init: one of INITIALISATIONS; reference: model whose stored
    characterisation at the adapter's rank shapes it, for the reshaped initialisations alone; data:
    one of DATA; seed: of the initialisation and of the data order; b_scale: as for `lora.attach`.
    Raises: WdlibError for what is none of these.
    """

    model: str = models.DEFAULT
    init: str = "default"
    reference: str | None = None
    data: str = "alpaca"
    seed: int = 3407
    b_scale: float = 1.0
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)

    def __post_init__(self) -> None:
        if self.init not in INITIALISATIONS:
            raise WdlibError(
                f"there is no initialisation {self.init!r}: choose from "
                f"{', '.join(INITIALISATIONS)}"
            )
        if self.data not in DATA:
            raise WdlibError(f"there is no data set {self.data!r}: choose from {', '.join(DATA)}")
        reshaped = self.init not in (UNTRAINED, *lora.PEFT_INITIALISATIONS)
        if reshaped != (self.reference is not None):
            raise WdlibError(
                f"the initialisation {self.init!r} {'needs' if reshaped else 'takes no'} reference"
            )
        if self.hyperparameters.dtype not in ("auto", "float32", "bfloat16"):
            raise WdlibError(
                f"there is no dtype {self.hyperparameters.dtype!r}: give auto, float32 or bfloat16"
            )

    @property
    def variant(self) -> str:
        """What is compared, whatever the seed, model and data: "literal qwen lr0.0006", say."""
        return " ".join(self._variant())

    @property
    def key(self) -> str:
        """A short name, readable and unique: what differs from the defaults makes its hash."""
        init, *others = self._variant()
        reference = others.pop(0) if self.reference else None
        parts = [Path(self.model).name, init, reference, self.data, *others]
        parts += [f"s{self.seed}"] * (self.init != UNTRAINED)
        digest = hashlib.sha256(json.dumps(_changed(self), sort_keys=True).encode()).hexdigest()
        return "-".join([part for part in parts if part] + [digest[:8]])

    def _variant(self) -> list[str]:
        """The initialisation, its reference, and the settings named in a key if changed."""
        changed = _changed(self)
        hyperparameters = changed.get("hyperparameters", {})
        parts = [self.init] + [self.reference] * (self.reference is not None)
        parts += [f"lr{self.hyperparameters.learning_rate:g}"] * (
            "learning_rate" in hyperparameters
        )
        parts += [f"r{self.hyperparameters.rank}"] * ("rank" in hyperparameters)
        parts += [f"b{self.b_scale:g}"] * ("b_scale" in changed)
        return parts

    def to_json(self) -> str:
        """As text, to be read back by `from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Run":
        """From the fields' names and values; missing ones have their defaults.

        Raises: WdlibError for names that are no fields, and as the constructor does.
        """
        content = dict(content)
        hyperparameters = dict(content.pop("hyperparameters", {}))
        for kind, given in ((cls, content), (Hyperparameters, hyperparameters)):
            unknown = set(given) - {f.name for f in fields(kind)}
            if unknown:
                raise WdlibError(f"a run has no setting {sorted(unknown)[0]!r}: correct its name")
        _check_types(cls, content)
        _check_types(Hyperparameters, hyperparameters)
        if "targets" in hyperparameters:
            hyperparameters["targets"] = tuple(hyperparameters["targets"])
        return cls(**content, hyperparameters=Hyperparameters(**hyperparameters))

    @classmethod
    def from_json(cls, text: str) -> "Run":
        """Read what `to_json` wrote. Raises WdlibError for anything else."""
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise WdlibError(f"this text is no run ({error})") from error

    def characterisation(self) -> Path | None:
        """The file of the reference's characterisation; None without a reference."""
        if self.reference is None:
            return None
        name = f"{self.reference}-r{self.hyperparameters.rank}.json"
        return paths.RESULTS / "characterisation" / name


def _check_types(kind: type, given: dict[str, Any]) -> None:
    """Numbers must be numbers: YAML reads 2e-4, without a point, as a text."""
    for f in fields(kind):
        wanted = type(f.default)
        if f.name not in given or wanted not in (bool, int, float):
            continue
        if type(given[f.name]) not in ((int, float) if wanted is float else (wanted,)):
            raise WdlibError(
                f"{f.name} must be of type {wanted.__name__}, not {given[f.name]!r} (a number like "
                "2e-4 needs a point in YAML: 2.0e-4)"
            )


def _changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, nested ones too.

    A new field with a default leaves the keys of old runs as they were.
    """
    changed = {}
    for f in fields(value):
        default = f.default if f.default is not MISSING else f.default_factory()
        here = getattr(value, f.name)
        if here != default:
            changed[f.name] = _changed(here) if hasattr(here, "__dataclass_fields__") else here
    return changed


# Training ----------------------------------------------------------------------------------------


def process_state() -> Any:
    """accelerate's view of the processes that train together, one without a launcher."""
    import torch
    from accelerate import PartialState

    # Without a GPU, accelerate joins processes only if it is told so.
    return PartialState(cpu=not torch.accelerator.is_available())


def native_dtype() -> str:
    """ "bfloat16" where this machine's GPU, or its processor without one, computes with it."""
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def result(folder: str | Path) -> dict | None:
    """What a finished run left in its folder; None where it is not finished."""
    path = Path(folder) / _RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def train(
    run: Run,
    folder: str | Path,
    *,
    data_folder: str | Path | None = None,
    save_every: int = SAVE_EVERY,
) -> Path:
    """Train one adapter, or go on where an earlier call was stopped; a finished run is left alone.

    Arguments: folder, of this run alone; data_folder, as `folder` of `examples`; save_every, steps
    between checkpoints.
    Returns: folder, in which there are now
        adapter/     an ordinary LoRA adapter of the untouched base model (none for "untrained");
        state/       Trainer's own account of the run;
        result.json  written last: configuration, curve, held-out loss before and after (mean per
                     token and sums per example, in nats), step-0 shift, hashes, versions, timings.
    Raises: WdlibError as `examples`, `models.resolve`, `pretrained.load`, `characterize.load` and
    `lora.attach` do, for a folder that holds another run, and for a number of processes that does
    not divide the micro-batches of a step.
    Source: arXiv 2509.00046 (docs/method.md, section 8).
    """
    folder = Path(folder)
    _claim(run, folder)
    if (folder / _RESULT).is_file():
        return folder
    begun = time.perf_counter()
    h = run.hyperparameters
    state = process_state()
    if h.accumulation % state.num_processes:
        raise WdlibError(
            f"{state.num_processes} processes cannot share {h.accumulation} micro-batches: use a "
            "number that divides them"
        )
    rows = examples(run.data, folder=data_folder)
    characterisation = run.characterisation()
    loaded = pretrained.load(run.model)
    if loaded.tokenizer is None:
        raise WdlibError(
            f"{loaded.checkpoint.name} has no tokenizer: give the model's whole folder"
        )
    settings = {"max_length": h.max_length, "answers_only": h.answers_only}
    to_train, held_out = (tokenise(part, loaded.tokenizer, **settings) for part in split(rows))
    plan = schedule(len(to_train), h.batch * h.accumulation, h.steps, run.seed)
    ordered = [to_train[i] for step in plan for i in _by_length(step, to_train)]

    model, report = loaded.model.to(state.device), None
    if run.init != UNTRAINED:
        model, report = lora.attach(
            model,
            run.init,
            characterisation=characterize.load(characterisation) if characterisation else None,
            settings=lora.LoraSettings(h.rank, h.alpha, h.dropout, h.targets),
            b_scale=run.b_scale,
            seed=run.seed,
            **_eva_batches(run, ordered, state.device),
        )
    dtype = native_dtype() if h.dtype == "auto" else h.dtype
    _cast_frozen(model, dtype, everything=run.init == UNTRAINED)
    start = _measure_start(model, held_out, folder / _START, adapter=run.init != UNTRAINED)
    prepared = time.perf_counter() - begun
    after, curve = start["held_out"], []
    if run.init != UNTRAINED:
        curve = _fit(model, ordered, run, folder=folder, save_every=save_every)
        after = held_out_loss(model, held_out)
    if state.is_main_process:
        if run.init != UNTRAINED:
            lora.export(model, folder / "adapter")
        content = {
            "key": run.key,
            "configuration": asdict(run),
            "dtype": dtype,
            "data": _data_facts(rows, to_train, held_out, ordered),
            "held_out": {"before": start["held_out"], "after": after},
            "step0": start["step0"],
            "curve": curve,
            "model": _model_facts(loaded.checkpoint),
            "hashes": {
                "model": models.content_hash(loaded.checkpoint),
                "data": data_hash(rows),
                "characterisation": _file_hash(characterisation) if characterisation else None,
                "adapter": _file_hash(folder / ADAPTER_FILE) if run.init != UNTRAINED else None,
            },
            "initialisation": asdict(report) if report else None,
            "versions": versions(),
            "machine": _machine(state),
            "seconds": {
                "preparation": prepared,
                "steps": sum(step["seconds"] for step in curve),
                "this_call": time.perf_counter() - begun,
            },
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with paths.whole(folder / _RESULT) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    state.wait_for_everyone()
    return folder


def _claim(run: Run, folder: Path) -> None:
    """Write the configuration into a new folder; refuse the folder of another run."""
    path = folder / _RUN
    if path.is_file():
        if Run.from_json(path.read_text(encoding="utf-8")) != run:
            raise WdlibError(f"{folder} holds another run ({_RUN}): give {run.key} its own folder")
        return
    with paths.whole(path) as part:
        part.write_text(run.to_json(), encoding="utf-8")


def _by_length(step: np.ndarray, sequences: Sequence[Tokens]) -> list[int]:
    return sorted(step.tolist(), key=lambda i: (-len(sequences[i].ids), i))


def _eva_batches(run: Run, ordered: list[Tokens], device: Any) -> dict[str, Any]:
    if run.init != "eva":
        return {}
    size = run.hyperparameters.batch
    starts = range(0, min(len(ordered), EVA_BATCHES * size), size)
    return {
        "batches": [
            {"input_ids": pad(ordered[i : i + size])["input_ids"].to(device)} for i in starts
        ]
    }


def _cast_frozen(model: "torch.nn.Module", dtype: str, *, everything: bool) -> None:
    """The base weights in a data type of their own; what an adapter holds stays in float32."""
    import torch

    for name, parameter in model.named_parameters():
        if everything or not (parameter.requires_grad or ".lora_" in name):
            parameter.data = parameter.data.to(getattr(torch, dtype))


def _measure_start(
    model: "torch.nn.Module", held_out: list[Tokens], path: Path, *, adapter: bool
) -> dict:
    """Held-out loss and step-0 shift before training, measured once and kept."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in pad(held_out[:STEP0_EXAMPLES]).items()}
    measured = {
        "held_out": held_out_loss(model, held_out),
        "step0": asdict(lora.step0(model, batch)) if adapter else None,
    }
    with paths.whole(path) as part:
        part.write_text(json.dumps(measured), encoding="utf-8")
    return measured


def held_out_loss(
    model: "torch.nn.Module", sequences: Sequence[Tokens], *, batch: int = HELD_OUT_BATCH
) -> dict[str, Any]:
    """Loss on examples that are not trained on, dropout off; the model is left as it was.

    Returns: loss, mean over all predicted tokens in nats; sums and tokens, of each example in
    order, from which a paired test can be computed.
    """
    import torch

    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    sums, tokens = [0.0] * len(order), [0] * len(order)
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            padded = {k: v.to(device) for k, v in pad([sequences[i] for i in chosen]).items()}
            logits = model(input_ids=padded["input_ids"], use_cache=False).logits
            for i, row, labels in zip(chosen, logits, padded["labels"], strict=True):
                counted = labels[1:] != IGNORED
                losses = torch.nn.functional.cross_entropy(
                    row[:-1][counted].float(), labels[1:][counted], reduction="none"
                )
                sums[i], tokens[i] = float(losses.cpu().double().sum()), int(counted.sum())
    model.train(training)
    return {"loss": sum(sums) / sum(tokens), "sums": sums, "tokens": tokens}


def _fit(
    model: "torch.nn.Module", ordered: list[Tokens], run: Run, *, folder: Path, save_every: int
) -> list[dict]:
    """Train on the sequences in their order; one row per step.

    Row: step, loss (mean per token, nats), grad_norm (before clipping), learning_rate, seconds,
    tokens (predicted), padded (positions computed, padding included).
    """
    trainer = _trainer(model, ordered, run, folder=folder / "checkpoints", save_every=save_every)
    with pretrained.quiet(), warnings.catch_warnings():
        # A checkpoint's adapter does not hold the vocabulary, whatever the base's folder lacks.
        warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
        trainer.train(resume_from_checkpoint=_last_whole(folder / "checkpoints"))
    if trainer.is_world_process_zero():
        (folder / "state").mkdir(exist_ok=True)
        trainer.state.save_to_json(str(folder / "state" / "trainer_state.json"))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    h = run.hyperparameters
    keys = ("step", "loss", "grad_norm", "learning_rate", "seconds")
    per_step = h.batch * h.accumulation
    curve = []
    for row in rows:
        last = row["step"] * per_step
        curve.append(
            {key: row[key] for key in keys} | _size(ordered[last - per_step : last], h.batch)
        )
    return curve


def _size(step: list[Tokens], batch: int) -> dict[str, int]:
    parts = [step[i : i + batch] for i in range(0, len(step), batch)]
    return {
        "tokens": sum(label != IGNORED for s in step for label in s.labels),
        "padded": sum(len(part) * max(len(s.ids) for s in part) for part in parts),
    }


def _trainer(
    model: "torch.nn.Module", ordered: list[Tokens], run: Run, *, folder: Path, save_every: int
) -> Any:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Adds the time of each step to its row, and marks each checkpoint that is whole."""

        def on_step_begin(self, args, state, control, **_):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            self.seconds = time.perf_counter() - self.begun

        def on_log(self, args, state, control, **_):
            if "loss" in state.log_history[-1]:
                state.log_history[-1]["seconds"] = self.seconds

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()

    class AdapterTrainer(Trainer):
        """Resumes every adapter of the model; Trainer's own way switches all but one off."""

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            target = model or self.model
            for name in target.peft_config:
                part = Path(resume_from_checkpoint) / ("" if name == lora.ADAPTER else name)
                state = load_file(part / "adapter_model.safetensors")
                set_peft_model_state_dict(target, state, adapter_name=name)

    h = run.hyperparameters
    with pretrained.quiet():
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=h.steps,
            per_device_train_batch_size=h.batch,
            gradient_accumulation_steps=h.accumulation // process_state().num_processes,
            learning_rate=h.learning_rate,
            weight_decay=h.weight_decay,
            max_grad_norm=h.max_grad_norm,
            lr_scheduler_type="linear",
            warmup_steps=h.warmup_steps,
            optim="adamw_torch",
            seed=run.seed,
            train_sampling_strategy="sequential",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_steps=save_every,
            save_total_limit=2,  # one is whole while the other is being written
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )
        # Several GPUs without a launcher would each take a batch, which is another run.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = AdapterTrainer(
            model,
            arguments,
            train_dataset=ordered,
            data_collator=pad,
            callbacks=[Watch()],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; what was not is removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / _WHOLE).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


# Provenance --------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of Python and of every package that has a say in a run."""
    packages = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        "wdlib": __version__,
        **{name: metadata.version(name) for name in packages},
    }


def _machine(state: Any) -> dict[str, Any]:
    import torch

    return {
        "platform": f"{sys.platform} {platform.machine()}",
        "device": str(state.device),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
    }


def _model_facts(checkpoint: models.Checkpoint) -> dict[str, str]:
    return {
        key: getattr(checkpoint, key)
        for key in ("name", "source", "revision", "quantisation", "note")
    }


def _data_facts(
    rows: Sequence[Example], to_train: list[Tokens], held_out: list[Tokens], ordered: list[Tokens]
) -> dict[str, int]:
    return {
        "examples": len(rows),
        "train": len(to_train),
        "held_out": len(held_out),
        "seen": len(ordered),
        "cut": sum(s.cut for s in ordered),
        "cut_held_out": sum(s.cut for s in held_out),
    }


def data_hash(rows: Sequence[Example]) -> str:
    """The sha256 of examples in their order, by which runs on the same data know each other."""
    lines = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
