"""One LoRA run: a frozen configuration -> a folder with its adapter, loss curve and provenance.

The run is transformers' `Trainer` on a model that `lora.attach` prepared (docs/method.md, section
8). Which examples form a step, and in which order, depends on the data set and the seed alone, so
that runs with other initialisations pair with it. The step's loss is the mean over all its tokens
however they are divided. So examples of similar length share a micro-batch, which saves padding,
and a GPU computes a step in as few micro-batches as its memory holds. A run that was stopped at any
moment continues at its last whole checkpoint; a finished one is not repeated.
"""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import WdlibError, characterise, paths
from wdlib.checkpoints import files
from wdlib.lora import data, devices, initialisation, pretrained
from wdlib.lora.adapters import ADAPTER, LoraSettings, export
from wdlib.lora.data import Example, Tokens
from wdlib.lora.measure import step0
from wdlib.lora.results import Start, read_report
from wdlib.lora.runs import UNTRAINED, Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HELD_OUT_BATCH = {"cpu": 8, "cuda": 16}
STEP0_EXAMPLES = 4
"""The first held-out examples, on which `measure.step0` is measured."""

EVA_BATCHES = 16
"""Micro-batches of training examples whose activations EVA reads."""

SAVE_EVERY = 10
"""Steps between checkpoints."""

ADAPTER_FILE = "adapter/adapter_model.safetensors"
"""In a run's folder."""

_RESULT, _START, _RUN = "result.json", "start.json", "run.json"
_UNNAMED = {"device": "cpu"}
"""The machine of runs that were begun before they named it."""

_log = logging.getLogger(__name__)


def result(folder: str | Path) -> dict[str, Any] | None:
    """What a finished run left in its folder; None where it is not finished."""
    path = Path(folder) / _RESULT
    if not path.is_file():
        return None
    return read_report(path)


def train(
    run: Run,
    folder: str | Path,
    *,
    data_folder: str | Path | None = None,
    save_every: int = SAVE_EVERY,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train one adapter, or go on where an earlier call was stopped; a finished run is left alone.

    Arguments: folder, of this run alone; data_folder, as `folder` of `examples`; save_every, steps
    between checkpoints; check, called before the first step with what was measured until then, the
    fields of `results.Start`, to refuse the run.
    Returns: folder, in which there are now
        adapter/     an ordinary LoRA adapter of the untouched base model (none for "untrained");
        state/       Trainer's own account of the run;
        result.json  written last: configuration, curve, held-out loss before and after (mean per
                     token and sums per example, in nats), step-0 shift, hashes, versions, timings.
    Raises: WdlibError as `examples`, `resolve`, `pretrained.load`, `characterise.load` and `attach`
    do, for a folder that holds another run or one that was begun on another kind of device, and for
    a number of processes that does not divide the micro-batches of a step.
    Source: arXiv 2509.00046 (docs/method.md, section 8).
    """
    folder = Path(folder)
    _claim(run, folder)
    if (folder / _RESULT).is_file():
        return folder
    begun = time.perf_counter()
    state = devices.process_state()
    if run.hyperparameters.accumulation % state.num_processes:
        raise WdlibError(
            f"{state.num_processes} processes cannot share {run.hyperparameters.accumulation} "
            "micro-batches: use a number that divides them"
        )
    rows = data.examples(run.data, folder=data_folder)
    loaded = pretrained.load(run.model)
    tokens = _tokens(run, rows, loaded.needed_tokenizer())
    model = loaded.model.to(state.device)
    if run.init == UNTRAINED:
        outcome = _measure_untrained(run, model, tokens, folder)
    else:
        outcome = _train_adapter(run, model, tokens, folder, save_every, check)
    if state.is_main_process:
        characterisation = run.characterisation()
        content = {
            "key": run.key,
            "configuration": asdict(run),
            "dtype": dtype(run),
            "data": {"examples": len(rows), **tokens.counts()},
            "held_out": {"before": outcome.start["held_out"], "after": outcome.after},
            "step0": outcome.start["step0"],
            "curve": outcome.curve,
            "model": _model_facts(loaded.checkpoint),
            "hashes": {
                "model": files.content_hash(loaded.checkpoint),
                "data": data.data_hash(rows),
                "held-out tokens": data.tokens_hash(tokens.held_out),
                "characterisation": characterisation and paths.file_sha256(characterisation),
                "adapter": outcome.adapter and paths.file_sha256(outcome.adapter),
            },
            "initialisation": outcome.report and asdict(outcome.report),
            "versions": devices.versions(),
            "machine": {**devices.machine(), "micro_batches": outcome.micro_batches},
            "seconds": {
                "preparation": outcome.ready - begun,
                "steps": sum(step["seconds"] for step in outcome.curve),
                "this_call": time.perf_counter() - begun,
            },
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        paths.write_text(folder / _RESULT, json.dumps(content, indent=1) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    state.wait_for_everyone()
    return folder


@dataclass(frozen=True)
class _RunTokens:
    """The examples of a run: to train on, held out, and in the order in which it trains on them."""

    to_train: list[Tokens]
    held_out: list[Tokens]
    ordered: list[Tokens]

    def counts(self) -> dict[str, int]:
        """How many of each there are, and how many were cut."""
        return {
            "train": sum(s.counted > 0 for s in self.to_train),
            "uncounted": sum(not s.counted for s in self.to_train),
            "held_out": len(self.held_out),
            "seen": len(self.ordered),
            "cut": sum(s.cut for s in self.ordered),
            "cut_held_out": sum(s.cut for s in self.held_out),
        }


@dataclass(frozen=True)
class _Outcome:
    """What a run came to.

    start: held-out loss and step 0, before training. after: held-out loss. curve: a row per step.
    ready: `time.perf_counter` as training could begin. micro_batches: their sizes, more than one if
    memory was short. adapter: its file. report: of its start.
    """

    start: dict[str, Any]
    after: dict[str, Any]
    curve: list[dict[str, Any]]
    ready: float
    micro_batches: list[int] = field(default_factory=list)
    adapter: Path | None = None
    report: initialisation.Report | None = None


def _tokens(run: Run, rows: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> _RunTokens:
    h = run.hyperparameters
    to_train, held_out = (
        data.tokenise(part, tokenizer, max_length=h.max_length, answers_only=h.answers_only)
        for part in data.split(rows)
    )
    # A step without a counted token would have no loss, and no gradient to speak of.
    learnt = [tokens for tokens in to_train if tokens.counted]
    if not learnt or not any(tokens.counted for tokens in held_out):
        raise WdlibError(
            f"with max_length {h.max_length} no token of the answers is left to count in the "
            f"{'held-out ' * bool(learnt)}examples of {run.data}: raise it, or count all tokens "
            "(answers_only: false)"
        )
    plan = data.schedule(len(learnt), h.batch * h.accumulation, h.steps, run.seed)
    ordered = [learnt[i] for step in plan for i in by_length(step, learnt)]
    return _RunTokens(to_train, held_out, ordered)


def dtype(run: Run) -> str:
    """The data type of the frozen weights on this machine."""
    asked = run.hyperparameters.dtype
    return devices.native_dtype() if asked == "auto" else asked


def _measure_untrained(
    run: Run, model: "PreTrainedModel", tokens: _RunTokens, folder: Path
) -> _Outcome:
    _cast(model.parameters(), dtype(run))
    start = _measured_once(
        folder / _START, lambda: {"held_out": held_out_loss(model, tokens.held_out), "step0": None}
    )
    return _Outcome(start, after=start["held_out"], curve=[], ready=time.perf_counter())


def _train_adapter(
    run: Run,
    base: "PreTrainedModel",
    tokens: _RunTokens,
    folder: Path,
    save_every: int,
    check: Callable[[dict[str, Any]], None] | None,
) -> _Outcome:
    """Attach, measure, train, measure again, and export to `folder`/adapter."""
    h, reference = run.hyperparameters, run.characterisation()
    model, report = initialisation.attach(
        base,
        run.init,
        characterisation=characterise.load(reference) if reference else None,
        settings=LoraSettings(h.rank, h.alpha, h.dropout, h.targets),
        b_scale=run.b_scale,
        seed=run.seed,
        batches=_eva_batches(tokens.ordered, h.batch, base.device) if run.init == "eva" else None,
    )
    _cast(
        (p for n, p in model.named_parameters() if not (p.requires_grad or ".lora_" in n)),
        dtype(run),
    )

    def measure() -> dict[str, Any]:
        batch = {
            k: v.to(base.device) for k, v in data.pad(tokens.held_out[:STEP0_EXAMPLES]).items()
        }
        held_out = held_out_loss(model, tokens.held_out)
        return {"held_out": held_out, "step0": asdict(step0(model, batch))}

    start = _measured_once(folder / _START, measure)
    if check:
        check(start)
    ready = time.perf_counter()
    curve, sizes = _fit(model, tokens.ordered, run, folder=folder, save_every=save_every)
    after = held_out_loss(model, tokens.held_out)
    if devices.process_state().is_main_process:
        export(model, folder / "adapter")
    return _Outcome(start, after, curve, ready, sizes, folder / ADAPTER_FILE, report)


def _claim(run: Run, folder: Path) -> None:
    """Write the configuration into a new folder; refuse the folder of another run."""
    path = folder / _RUN
    if path.is_file():
        remedy = f"give {run.key} a folder of its own"
        if paths.read_json(path, Run, what="a run", remedy=remedy) != run:
            raise WdlibError(f"{folder} holds another run ({_RUN}): {remedy}")
        return
    paths.write_text(path, run.to_json())


def by_length(step: np.ndarray, sequences: Sequence[Tokens]) -> list[int]:
    """The examples of a step, by number, the longest first: equals share a micro-batch."""
    return sorted(step.tolist(), key=lambda i: (-len(sequences[i].ids), i))


def _eva_batches(
    ordered: list[Tokens], size: int, device: "torch.device"
) -> list[dict[str, "torch.Tensor"]]:
    starts = range(0, min(len(ordered), EVA_BATCHES * size), size)
    return [{"input_ids": data.pad(ordered[i : i + size])["input_ids"].to(device)} for i in starts]


def _cast(parameters: Iterable["torch.nn.Parameter"], dtype: str) -> None:
    """Frozen weights in a data type of their own; what an adapter holds stays in float32."""
    import torch

    for parameter in parameters:
        parameter.data = parameter.data.to(getattr(torch, dtype))


def _measured_once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before training: read if an earlier call has, else measured and kept."""
    if not path.is_file():
        made = {**measure(), "machine": devices.machine()}
        paths.write_text(path, json.dumps(made))
    what, remedy = "a run's start", "remove the run's folder"
    found = asdict(paths.read_json(path, Start, what=what, remedy=remedy))
    begun = devices.kind(found.pop("machine") or _UNNAMED)
    devices.check_kind(begun, what=f"the run in {path.parent}", remedy=f"go on there, or {remedy}")
    return found


def held_out_loss(
    model: "torch.nn.Module", sequences: Sequence[Tokens], *, batch: int | None = None
) -> dict[str, Any]:
    """Loss on examples that are not trained on, dropout off; the model is left as it was.

    Arguments: batch, examples computed at a time, fewer where memory is short; by default what
    HELD_OUT_BATCH has for the model's device.
    Returns: loss, mean over all predicted tokens in nats; sums and tokens, of each example in
    order, from which a paired test can be computed.
    """
    device, training = next(model.parameters()).device, model.training
    size = batch or HELD_OUT_BATCH.get(device.type, HELD_OUT_BATCH["cpu"])
    model.eval()
    try:
        sums = devices.halving(
            lambda size: _summed_losses(model, sequences, device, size), size, what="examples"
        )
    finally:
        model.train(training)
    tokens = [s.counted for s in sequences]
    return {"loss": sum(sums) / sum(tokens), "sums": sums, "tokens": tokens}


def _summed_losses(
    model: "torch.nn.Module", sequences: Sequence[Tokens], device: "torch.device", batch: int
) -> list[float]:
    """The loss of each example, summed over its tokens, in nats; examples of a length together."""
    import torch

    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    sums = [0.0] * len(order)
    with torch.inference_mode():
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            padded = {k: v.to(device) for k, v in data.pad([sequences[i] for i in chosen]).items()}
            logits = model(input_ids=padded["input_ids"], use_cache=False).logits
            for i, row, labels in zip(chosen, logits, padded["labels"], strict=True):
                counted = labels[1:] != data.IGNORED
                losses = torch.nn.functional.cross_entropy(
                    row[:-1][counted].float(), labels[1:][counted], reduction="none"
                )
                sums[i] = float(losses.cpu().double().sum())
    return sums


def _fit(
    model: "torch.nn.Module", ordered: list[Tokens], run: Run, *, folder: Path, save_every: int
) -> tuple[list[dict], list[int]]:
    """Train on the sequences in their order; one row per step, and the sizes of micro-batches.

    Row: step, loss (mean per token, nats), grad_norm (before clipping), learning_rate, seconds,
    tokens (predicted), padded (positions computed, padding included).
    """
    state, h = devices.process_state(), run.hyperparameters
    per_step = h.batch * h.accumulation
    first = per_step // state.num_processes if state.device.type == "cuda" else h.batch
    begin = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def attempt(size: int) -> Any:
        share = per_step // state.num_processes
        micro_batch = max(d for d in range(1, size + 1) if share % d == 0)
        model.load_state_dict(begin, strict=False)
        trainer = _trainer(
            model,
            ordered,
            run,
            micro_batch=micro_batch,
            folder=folder / "checkpoints",
            save_every=save_every,
        )
        with pretrained.quiet(), warnings.catch_warnings():
            # A checkpoint's adapter does not hold the vocabulary, whatever the base's folder lacks.
            warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
            trainer.train(resume_from_checkpoint=_last_whole(folder / "checkpoints"))
        return trainer

    # Processes that train together would no longer take the same steps.
    smallest = 1 if state.num_processes == 1 else first
    trainer = devices.halving(attempt, first, smallest=smallest, what="examples of a step")
    if trainer.is_world_process_zero():
        (folder / "state").mkdir(exist_ok=True)
        trainer.state.save_to_json(str(folder / "state" / "trainer_state.json"))
    rows = [{"micro_batch": h.batch, **row} for row in trainer.state.log_history if "loss" in row]
    keys = ("step", "loss", "grad_norm", "learning_rate", "seconds")
    curve = []
    for row in rows:
        last = row["step"] * per_step
        counts = token_counts(ordered[last - per_step : last], row["micro_batch"])
        curve.append({key: row[key] for key in keys} | counts)
    return curve, list(dict.fromkeys(row["micro_batch"] for row in rows))


def token_counts(step: list[Tokens], batch: int) -> dict[str, int]:
    """How many tokens of a step are learnt, and how many its padded micro-batches hold."""
    parts = [step[i : i + batch] for i in range(0, len(step), batch)]
    return {
        "tokens": sum(s.counted for s in step),
        "padded": sum(len(part) * max(len(s.ids) for s in part) for part in parts),
    }


def _trainer(
    model: "torch.nn.Module",
    ordered: list[Tokens],
    run: Run,
    *,
    micro_batch: int,
    folder: Path,
    save_every: int,
) -> Any:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        """Adds time and micro-batch of each step to its row, and marks checkpoints as whole."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Here, where the loss has been read: a GPU has done by now what it was told.
            if "loss" in state.log_history[-1]:
                seconds = time.perf_counter() - self.begun
                state.log_history[-1] |= {"seconds": seconds, "micro_batch": micro_batch}

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                paths.mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    class AdapterTrainer(Trainer):
        """Resumes every adapter of the model; Trainer's own way switches all but one off."""

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            target: Any = model or self.model
            for name in target.peft_config:
                part = Path(resume_from_checkpoint) / ("" if name == ADAPTER else name)
                state = load_file(part / "adapter_model.safetensors")
                set_peft_model_state_dict(target, state, adapter_name=name)

    h, state = run.hyperparameters, devices.process_state()
    with pretrained.quiet():
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=h.steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=(
                h.batch * h.accumulation // (micro_batch * state.num_processes)
            ),
            learning_rate=h.learning_rate,
            weight_decay=h.weight_decay,
            max_grad_norm=h.max_grad_norm,
            lr_scheduler_type="linear",
            warmup_steps=h.warmup_steps,
            optim="adamw_torch_fused" if state.device.type == "cuda" else "adamw_torch",
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
            data_collator=data.pad,
            callbacks=[Watch()],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that is whole; what is not, or is damaged, is removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if paths.is_whole(path):
            whole.append(path)
        else:
            _log.warning("%s is not whole and is removed: the run goes on before it", path)
            shutil.rmtree(path, ignore_errors=True)
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _model_facts(checkpoint: files.Checkpoint) -> dict[str, str]:
    return {
        key: getattr(checkpoint, key)
        for key in ("name", "source", "revision", "quantisation", "note")
    }
