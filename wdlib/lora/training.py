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
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import WdlibError, __version__, characterise, paths
from wdlib.checkpoints import files
from wdlib.lora import initialisation, pretrained
from wdlib.lora.adapters import ADAPTER, LoraSettings, export
from wdlib.lora.data import (
    IGNORED,
    Example,
    Tokens,
    data_hash,
    examples,
    pad,
    schedule,
    split,
    tokenise,
)
from wdlib.lora.measure import step0
from wdlib.lora.runs import UNTRAINED, Run

if TYPE_CHECKING:
    import torch


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
        model, report = initialisation.attach(
            model,
            run.init,
            characterisation=characterise.load(characterisation) if characterisation else None,
            settings=LoraSettings(h.rank, h.alpha, h.dropout, h.targets),
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
            export(model, folder / "adapter")
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
                "model": files.content_hash(loaded.checkpoint),
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
        paths.write_text(folder / _RESULT, json.dumps(content, indent=1) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    state.wait_for_everyone()
    return folder


def _claim(run: Run, folder: Path) -> None:
    """Write the configuration into a new folder; refuse the folder of another run."""
    path = folder / _RUN
    if path.is_file():
        remedy = f"give {run.key} a folder of its own"
        if paths.read_json(path, Run.from_dict, what="a run", remedy=remedy) != run:
            raise WdlibError(f"{folder} holds another run ({_RUN}): {remedy}")
        return
    paths.write_text(path, run.to_json())


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
        "step0": asdict(step0(model, batch)) if adapter else None,
    }
    paths.write_text(path, json.dumps(measured))
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
                part = Path(resume_from_checkpoint) / ("" if name == ADAPTER else name)
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


def _model_facts(checkpoint: files.Checkpoint) -> dict[str, str]:
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


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
