"""What a model scores on every option of every item, and what follows."""

import json
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import WdlibError, first_line, paths
from wdlib.lora.benchmarks import Protocol


@dataclass(frozen=True)
class Scores:
    """One task's items, as the model saw them. N items, O option orders, K options at most.

    loglikelihood: (N, O, K) float32, nats, of the option at each position; NaN where there is none.
    orders: (O, K) int8, the option at each position. Options are named by their position in the
    harness's own order, which is row 0. gold: (N,) int8, the right option.
    characters: (N, K) int32, lengths of the options in row 0's order, 0 where there is none.
    items: (N,) uint32, checksum of each item's text in row 0's order: equal items pair.
    """

    loglikelihood: np.ndarray
    orders: np.ndarray
    gold: np.ndarray
    characters: np.ndarray
    items: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """One model's scores on the tasks of a protocol, and how they were made."""

    protocol: Protocol
    scores: dict[str, Scores]
    made: dict[str, Any]


def save(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation to a compressed .npz file, whole or not at all."""
    arrays = {
        f"{name}/{part.name}": getattr(scores, part.name)
        for name, scores in evaluation.scores.items()
        for part in fields(scores)
    }
    about = {"protocol": asdict(evaluation.protocol), "made": evaluation.made}
    with paths.atomic_write(Path(path)) as part, open(part, "wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)


def load(path: Path) -> Evaluation:
    """Read what `save` wrote.

    Raises: WdlibError for a file that is missing or is not an evaluation.
    """
    what, remedy = f"{path} is not a stored evaluation", "evaluate again"
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > paths.TEXT_BYTES:
                raise ValueError("it says that it is larger than any evaluation")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = paths.parse_json(str(arrays["about"]), _About, what=what, remedy=remedy)
            parts = [part.name for part in fields(Scores)]
            scores = {
                name: _checked(Scores(**{part: arrays[f"{name}/{part}"] for part in parts}))
                for name in about.protocol.tasks
            }
    except WdlibError:
        raise
    except Exception as error:  # whatever a damaged archive makes numpy raise
        raise WdlibError(f"{what} ({first_line(error)}): {remedy}") from error
    return Evaluation(about.protocol, scores, about.made)


@dataclass(frozen=True)
class _About:
    protocol: Protocol
    made: dict[str, Any]


def _checked(scores: Scores) -> Scores:
    """Scores that are what they have to be; ValueError for others."""
    items, orders, options = scores.loglikelihood.shape
    wanted = {
        "loglikelihood": (np.float32, (items, orders, options)),
        "orders": (np.int8, (orders, options)),
        "gold": (np.int8, (items,)),
        "characters": (np.int32, (items, options)),
        "items": (np.uint32, (items,)),
    }
    for name, (dtype, shape) in wanted.items():
        array = getattr(scores, name)
        if array.dtype != dtype or array.shape != shape or not array.size:
            raise ValueError(f"{name} is of type {array.dtype} and shape {array.shape}")
    positions = np.concatenate([scores.orders.ravel(), scores.gold])
    if (positions < 0).any() or (positions >= options).any() or (scores.characters < 0).any():
        raise ValueError("an option is of a number that is not there")
    if np.isposinf(scores.loglikelihood).any():
        raise ValueError("a log-likelihood is infinite")
    return scores


def answers(scores: Scores, *, normalised: bool = False) -> np.ndarray:
    """The position of the likeliest option: (N, O) int64; the first where several are equal.

    Arguments: normalised, by the option's length in characters, as the harness's acc_norm.
    """
    value = scores.loglikelihood.astype(np.float64)
    if normalised:
        lengths = np.where(scores.characters, scores.characters, 1)
        value = value / lengths[:, scores.orders].reshape(value.shape)
    return np.where(np.isnan(value), -np.inf, value).argmax(-1)


def correct(scores: Scores, *, normalised: bool = False) -> np.ndarray:
    """Whether the likeliest option is the right one: (N, O) bool."""
    order = np.arange(len(scores.orders))
    return scores.orders[order, answers(scores, normalised=normalised)] == scores.gold[:, None]


def letters(scores: Scores) -> np.ndarray:
    """How often the answer stands at each position, in each order: (O, K) int64."""
    chosen = answers(scores)
    return np.stack([np.bincount(row, minlength=scores.orders.shape[1]) for row in chosen.T])


def debiased(scores: Scores) -> Scores:
    """The same scores without what a position is worth in itself.

    Each position loses its mean log-likelihood over all items and orders. Over whole cycles of
    orders every option stands at every position, so that only the letter's own part is taken.
    The estimator is PriDe's (arXiv 2309.03882, the prior of an option's letter as the mean of
    log-probabilities over cyclic orders), estimated on the very items it is applied to.
    Differs from the paper: arXiv 2509.00046 corrects nothing.
    """
    prior = np.nanmean(scores.loglikelihood, axis=(0, 1), dtype=np.float64)
    return replace(scores, loglikelihood=(scores.loglikelihood - prior).astype(np.float32))
