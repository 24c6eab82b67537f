"""What an adapter is and does before and after training: loss, logits, norms, spectra."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import TYPES, WdlibError, generator
from wdlib.lora.adapters import ADAPTER, adapted_sites, lora_layers, place_key
from wdlib.lora.data import IGNORED
from wdlib.spectra.store import Spectra

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


@dataclass(frozen=True)
class Step0:
    """What an adapter does to a model before training, on one batch.

    base_loss, loss: mean loss per token in nats without and with the adapter; shift: loss -
    base_loss. logit_change: largest change of a logit relative to the largest logit, padding (with
    the label IGNORED) left out. norms: of `relative_norms`.
    """

    base_loss: float
    loss: float
    shift: float
    logit_change: float
    norms: dict[str, float]


def step0(peft_model: "PeftModel", batch: "Mapping[str, torch.Tensor]") -> Step0:
    """What the adapter, as it is now, changes on one batch; dropout off, the model left as it was.

    Arguments: batch, of integer tensors (sequences, tokens): input_ids, and attention_mask and
    labels if wanted; labels are the input_ids by default.
    Raises: WdlibError for a model that is no causal language model.
    """
    import torch

    base_model: Any = peft_model.get_base_model()
    if not base_model.can_generate():
        raise WdlibError(
            f"a {type(base_model).__name__} has no loss of its own: step0 needs a "
            "causal language model"
        )
    batch = {"labels": batch["input_ids"], **batch}
    training = peft_model.training
    peft_model.eval()
    try:
        with torch.no_grad():
            with peft_model.disable_adapter():
                base = peft_model(**batch)
            adapted = peft_model(**batch)
    finally:
        peft_model.train(training)
    counted = batch["labels"] != IGNORED
    change = (adapted.logits.float() - base.logits.float())[counted].abs().max()
    return Step0(
        base_loss=float(base.loss),
        loss=float(adapted.loss),
        shift=float(adapted.loss) - float(base.loss),
        logit_change=float(change / base.logits.float()[counted].abs().max()),
        norms=relative_norms(peft_model),
    )


def relative_norms(peft_model: "PeftModel") -> dict[str, float]:
    """||scaling B A|| / ||W|| (Frobenius) of the adapter "default", by projection."""
    return {name: _relative_norm(layer) for name, layer in lora_layers(peft_model)}


def _relative_norm(layer: Any) -> float:
    """Of a LoraLayer of peft, from r x r products: ||B A||^2 = <B^T B, A A^T>."""
    a = layer.lora_A[ADAPTER].weight.detach().cpu().double()
    b = layer.lora_B[ADAPTER].weight.detach().cpu().double()
    square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
    size = layer.get_base_layer().weight.detach().cpu().double().norm()
    return float(layer.scaling[ADAPTER] * square.sqrt() / size)


def initial_spectra(peft_model: "PeftModel") -> dict[str, Spectra]:
    """Singular values of the matrices of the adapter "default" as they are now, all `rank` of them.

    Returns: "A" and "B", the latter only if no B is 0; rows by layer (and expert), ascending.
    """
    adapted = sorted(adapted_sites(peft_model), key=lambda pair: place_key(pair[0])[1:])
    found = {}
    for key in ("A", "B"):
        values, rows = defaultdict(list), defaultdict(list)
        for site, layer in adapted:
            matrix = getattr(layer, f"lora_{key}")[ADAPTER].weight.detach().float().cpu().numpy()
            values[site.type].append(generator.spectra_of(matrix[None])[0])
            rows[site.type].append((site.layer, site.expert))
        if all(v.any() for kind in values.values() for v in kind):
            stacked = {t: np.array(values[t]) for t in TYPES if t in values}
            error = {t: 1e-8 * v[:, :1] + np.zeros_like(v) for t, v in stacked.items()}
            found[key] = Spectra(key, stacked, error, {t: tuple(rows[t]) for t in stacked})
    return found
