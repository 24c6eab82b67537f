"""A language model -> the log-likelihood of every option of every benchmark item, and what follows.

lm-eval's own tasks make the prompts and its own `HFLM` makes the tokens. Only the arithmetic is
ours: all requests that begin alike are one tree of tokens, computed once, in one pass.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import random
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from wdlib import WdlibError, paths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GPQA_PASSWORD = b"deserted-untie-orchid"
"""Published by GPQA's authors: the archive is locked against crawlers, not against readers."""

HARNESS_SEED = 0
"""What lm-eval's command line seeds `random` with, which shuffles the options of GPQA."""

BATCH_TOKENS = 2048
"""Tokens of one forward pass, padding included."""

TREE_TOKENS = 1024
"""Tokens above which a tree is not extended: attention costs their square."""

SOFTMAX_ROWS = 32
"""Positions whose softmax is computed at a time: as many as a processor's cache holds."""

SHARED_TOKENS = 16
"""Requests that begin with fewer tokens in common are computed apart."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Source:
    """Where lm-eval defines a task, and the file that feeds it where the hub does not."""

    folder: str
    file: str
    read: Callable[[Path], list[dict[str, Any]]]
    columns: tuple[str, ...]
    reorder: bool = False


def _lines(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _locked_table(path: Path) -> list[dict[str, Any]]:
    """The rows of the csv file in an encrypted zip file, which stay in memory."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".csv"))
        text = archive.read(name, pwd=GPQA_PASSWORD).decode("utf-8")
    return list(csv.DictReader(io.StringIO(text, newline="")))


_SOURCES = {
    "gpqa_diamond_zeroshot": _Source(
        "gpqa/zeroshot",
        "gpqa_diamond.zip",
        _locked_table,
        ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))),
        reorder=True,
    ),
    "arc_challenge": _Source(
        "arc", "arc_challenge_test.jsonl", _lines, ("question", "choices", "answerKey")
    ),
    "hellaswag": _Source(
        "hellaswag",
        "hellaswag_validation.jsonl.gz",
        _lines,
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
}

TASKS = tuple(_SOURCES)
"""lm-eval's names of the benchmarks."""


@dataclass(frozen=True)
class Protocol:
    """What is measured: the same for all runs that are compared.

    tasks: names from TASKS. limit: task -> only its first so many items. orders: the number of
    orders in which GPQA shows its options (see `option_orders`). seed: of the harness's own order.
    dtype: "float32", or "bfloat16" for the matrix products of the layers, which is about twice as
    fast where the processor knows it and changes one or two answers in a hundred; weights, output
    layer and softmax are float32 always.
    """

    tasks: tuple[str, ...] = TASKS
    limit: Mapping[str, int] = field(default_factory=dict)
    orders: int = 4
    seed: int = HARNESS_SEED
    dtype: str = "float32"


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


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    protocol: Protocol | None = None,
    data_folder: Path | None = None,
) -> Evaluation:
    """Score every option of every item of the protocol's tasks.

    Arguments: model, a causal language model of transformers or a PeftModel, which is scored as a
    merged copy; neither it nor the tokenizer is changed. data_folder, with the files of the tasks
    (arc_challenge_test.jsonl, hellaswag_validation.jsonl.gz, gpqa_diamond.zip); None: the hub.
    Raises: WdlibError for a protocol that cannot be followed and data that cannot be read.
    """
    protocol = protocol or Protocol()
    _check(protocol, data_folder)
    began = time.monotonic()
    loaded = {name: _requests(name, protocol, data_folder) for name in protocol.tasks}
    scores, made = {}, {}
    with _quiet(), _ready(model) as ready:
        scorer = _scorer(ready, tokenizer, protocol.dtype)
        for name, items in loaded.items():
            start = time.monotonic()
            flat = [request for shown in items.shown for request in itertools.chain(*shown)]
            answers = scorer.loglikelihood(flat, disable_tqdm=True)
            scores[name] = _scores(items, [value for value, _ in answers])
            made[name] = {"seconds": time.monotonic() - start, **scorer.counted}
    versions = {name: version(name) for name in ("lm-eval", "transformers", "torch")}
    made = {"seconds": time.monotonic() - began, "tasks": made, "versions": versions}
    return Evaluation(protocol, scores, made)


def option_orders(count: int, *, options: int = 4) -> np.ndarray:
    """The first `count` orders of some options: (count, options) int8, the option at each position.

    The first is the identity; every further `options` rows are the cyclic shifts of one order, so
    that each option stands at each position once: over them "always A" is right once per option.
    Raises: WdlibError unless count is 1 or a multiple of `options` up to all orders.
    """
    cycles = [(0, *rest) for rest in itertools.permutations(range(1, options))]
    every = [[*order[shift:], *order[:shift]] for order in cycles for shift in range(options)]
    if count != 1 and (count % options or not 0 < count <= len(every)):
        raise WdlibError(
            f"{count} orders of {options} options are not balanced: give 1 or a multiple of "
            f"{options} up to {len(every)}"
        )
    return np.array(every[:count], dtype=np.int8)


@dataclass(frozen=True)
class _Items:
    """Items of one task: shown[item][order] are lm-eval's requests, one for each option."""

    shown: list[list[list[Any]]]
    orders: np.ndarray
    gold: list[int]
    options: list[list[str]]


def _check(protocol: Protocol, data_folder: Path | None) -> None:
    unknown = [name for name in (*protocol.tasks, *protocol.limit) if name not in _SOURCES]
    if unknown:
        raise WdlibError(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(TASKS)}")
    if protocol.dtype not in DTYPES:
        raise WdlibError(f"there is no dtype {protocol.dtype!r} here: give {' or '.join(DTYPES)}")
    option_orders(protocol.orders)
    for name, limit in protocol.limit.items():
        if limit < 1:
            raise WdlibError(f"a limit of {limit} items leaves nothing of {name}: give 1 or more")
    if data_folder is not None:
        for name in protocol.tasks:
            path = Path(data_folder) / _SOURCES[name].file
            if not path.is_file():
                raise WdlibError(f"{path} is missing: put it there, or name no folder for the hub")


def _requests(name: str, protocol: Protocol, data_folder: Path | None) -> _Items:
    """lm-eval's requests for a task's items in every order of their options."""
    source, limit = _SOURCES[name], protocol.limit.get(name)
    with _quiet(), _pristine():
        task = _task(name, data_folder, limit)
        random.seed(protocol.seed)  # the shuffle is the first to draw, as on the command line
        docs = list(itertools.islice(task.eval_docs, limit))
    orders = option_orders(protocol.orders) if source.reorder else None
    shown, gold, options = [], [], []
    for doc in docs:
        seen = [doc] if orders is None else [_reordered(doc, order) for order in orders]
        contexts = [task.fewshot_context(one, num_fewshot=0) for one in seen]
        shown.append(
            [
                task.construct_requests(one, context, metadata=(name, len(shown), 1))
                for one, context in zip(seen, contexts, strict=True)
            ]
        )
        options.append(task.doc_to_choice(doc))
        target = task.doc_to_target(doc)
        gold.append(options[-1].index(target) if isinstance(target, str) else target)
    if orders is None:
        orders = np.arange(max(map(len, options)), dtype=np.int8)[None]
    return _Items(shown, orders, gold, options)


def _task(name: str, data_folder: Path | None, limit: int | None) -> Any:
    """lm-eval's own task object, fed from the hub or with the rows of a local file."""
    import datasets
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml  # TaskManager reads all 14,000 files first

    source = _SOURCES[name]
    config = load_yaml(Path(tasks.__file__).parent / source.folder / f"{name}.yaml")
    config.pop("tag")
    if data_folder is not None:
        rows = _rows(Path(data_folder) / source.file, source)[:limit]
        config |= {"training_split": None, "validation_split": None, "test_split": "local"}
        config["custom_dataset"] = lambda **_: {"local": datasets.Dataset.from_list(rows)}
        return ConfigurableTask(config=config)
    try:
        return ConfigurableTask(config=config)
    except Exception as error:  # of five libraries, and its message may quote an item
        raise WdlibError(
            f"{name} cannot be read from the hub ({type(error).__name__}): log in or go online, or "
            f"name a data folder that holds {source.file}"
        ) from None


def _rows(path: Path, source: _Source) -> list[dict[str, Any]]:
    try:
        rows = source.read(path)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        rows = []
    if not rows:
        raise WdlibError(f"{path} cannot be read or is empty: fetch it again")
    for column in source.columns:
        if any(row.get(column) is None for row in rows):
            raise WdlibError(f"{path} has rows without {column!r}: fetch it again")
    return rows


def _reordered(doc: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A document of GPQA as its task makes them, with its options in another order."""
    options = {f"choice{1 + position}": doc[f"choice{1 + o}"] for position, o in enumerate(order)}
    return {**doc, **options}


def _scores(items: _Items, answers: Sequence[float]) -> Scores:
    width = max(map(len, items.options))
    loglikelihood = np.full((len(items.shown), len(items.orders), width), np.nan, np.float32)
    characters = np.zeros((len(items.shown), width), np.int32)
    taken = iter(answers)
    for row, options in enumerate(items.options):
        characters[row, : len(options)] = [len(option) for option in options]
        for order in range(len(items.orders)):
            loglikelihood[row, order, : len(options)] = list(itertools.islice(taken, len(options)))
    texts = ["\0".join(itertools.chain(*(r.args for r in shown[0]))) for shown in items.shown]
    checksums = np.array([zlib.crc32(text.encode()) for text in texts], np.uint32)
    gold = np.array(items.gold, np.int8)
    return Scores(loglikelihood, items.orders, gold, characters, checksums)


@contextlib.contextmanager
def _pristine() -> Iterator[None]:
    """Leave Python's global random state as it was, and see no shuffle that an earlier run stored.

    `datasets` keeps the outcome of a `map` on disk and takes it for that of every later seed.
    """
    import datasets

    state, cached = random.getstate(), datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        random.setstate(state)
        if cached:
            datasets.enable_caching()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No notices of lm-eval and datasets, some of which quote an item; no progress bars."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    barred = datasets.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not barred:
            datasets.utils.enable_progress_bars()


@contextlib.contextmanager
def _ready(model: "PreTrainedModel") -> "Iterator[PreTrainedModel]":
    """The model with float32 weights in evaluation mode, a copy where it is not so already.

    An adapter is merged into the copy: in bfloat16 the sum would lose most of it.
    """
    import copy

    import torch

    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).float().merge_and_unload()
    elif model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True


def _scorer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", dtype: str) -> Any:
    """lm-eval's HFLM, which scores requests that begin alike together."""
    import copy

    from lm_eval.models.huggingface import HFLM

    class TreeLM(HFLM):
        counted: dict[str, int]

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            # As HFLM cuts what is too long for the model: from the left.
            pairs = [((c + t)[-(self.max_length + 1) :], len(t)) for _, c, t in requests]
            naive = sum(len(tokens) - 1 for tokens, _ in pairs)
            if not _plain_attention(self.model, max(len(tokens) for tokens, _ in pairs)):
                self.counted = {"tokens": naive, "naive": naive}
                return super()._loglikelihood_tokens(requests, disable_tqdm=True)
            trees = _trees(pairs)
            self.counted = {"tokens": sum(len(t.tokens) for t in trees), "naive": naive}
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            with tqdm(total=len(trees), desc="evaluation", disable=None, leave=False) as bar:
                for batch in _batches(trees):
                    for request, answer in _score(self.model, batch, dtype):
                        answers[request] = answer
                    bar.update(len(batch))
            return answers

    return TreeLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=1,
        softmax_dtype="float32",
    )


def _plain_attention(model: "PreTrainedModel", length: int) -> bool:
    """Whether a mask says all there is to say of which tokens see which, at that length."""
    window = getattr(model.config, "sliding_window", None)
    layers = set(getattr(model.config, "layer_types", None) or ())
    return (
        getattr(model, "_supports_attention_backend", False)
        and model.config._attn_implementation in ("sdpa", "eager")
        and layers <= {"full_attention", "sliding_attention"}
        and (window is None or length <= window)
    )


@dataclass(frozen=True)
class _Tree:
    """Requests merged where they begin alike: a node is a token after all those above it.

    tokens, depth: (n,) int64. sees: (n, n) bool, whether a node is below another, or is it.
    targets: for each request its number, and for each token of its continuation the node that
    predicts it and the token.
    """

    tokens: np.ndarray
    depth: np.ndarray
    sees: np.ndarray
    targets: list[tuple[int, list[int], list[int]]]


def _trees(pairs: Sequence[tuple[list[int], int]]) -> list[_Tree]:
    """Trees of (tokens, length of the continuation), neighbours in sorted order together."""
    trees, group, size, last = [], [], 0, []
    for request in sorted(range(len(pairs)), key=lambda request: pairs[request][0]):
        tokens = pairs[request][0]
        unequal = (i for i, (a, b) in enumerate(zip(last, tokens, strict=False)) if a != b)
        shared = next(unequal, min(len(last), len(tokens)))
        grown = size + len(tokens) - shared
        if group and (shared < SHARED_TOKENS or grown > TREE_TOKENS):
            trees.append(_tree(group, pairs))
            group, grown = [], len(tokens)
        group, size, last = [*group, request], grown, tokens
    return [*trees, _tree(group, pairs)] if group else trees


def _tree(group: Sequence[int], pairs: Sequence[tuple[list[int], int]]) -> _Tree:
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    targets = []
    for request in group:
        (tokens, predicted), path, node = pairs[request], [], -1
        for token in tokens[:-1]:  # the last token is predicted, not read
            node = nodes.setdefault((node, token), len(nodes))
            path.append(node)
        targets.append((request, path[-predicted:], tokens[-predicted:]))
    depth, sees = np.zeros(len(nodes), np.int64), np.eye(len(nodes), dtype=bool)
    for (parent, _), node in nodes.items():  # in the order of their making: parents first
        if parent >= 0:
            depth[node] = depth[parent] + 1
            sees[node] |= sees[parent]
    return _Tree(np.array([token for _, token in nodes], np.int64), depth, sees, targets)


def _batches(trees: Sequence[_Tree]) -> Iterator[list[_Tree]]:
    """The trees from the largest down, so that those padded to one length are of a size."""
    batch: list[_Tree] = []
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _score(
    model: "PreTrainedModel", batch: Sequence[_Tree], dtype: str
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Each request of some trees with its log-likelihood, and whether it is the likeliest text."""
    import torch

    length = len(batch[0].tokens)
    tokens = np.zeros((len(batch), length), np.int64)
    depth = np.zeros((len(batch), length), np.int64)
    sees = np.broadcast_to(np.eye(length, dtype=bool), (len(batch), length, length)).copy()
    requests, nodes, continuations = [], [], []
    for row, tree in enumerate(batch):
        size = len(tree.tokens)
        tokens[row, :size], depth[row, :size], sees[row, :size, :size] = (
            tree.tokens,
            tree.depth,
            tree.sees,
        )
        for request, path, continuation in tree.targets:
            requests.append((request, len(path)))
            nodes += [row * length + node for node in path]
            continuations += continuation
    wanted, at = (torch.from_numpy(a) for a in np.unique(nodes, return_inverse=True))
    with torch.inference_mode():
        mask = torch.zeros(sees.shape, dtype=model.dtype)
        mask.masked_fill_(torch.from_numpy(~sees), torch.finfo(model.dtype).min)
        logits = _logits(
            model,
            wanted.to(model.device),
            dtype,
            input_ids=torch.from_numpy(tokens).to(model.device),
            position_ids=torch.from_numpy(depth).to(model.device),
            attention_mask=mask[:, None].to(model.device),
        )
        rows, at = logits.split(SOFTMAX_ROWS), at.to(model.device)
        total = torch.cat([part.logsumexp(-1) for part in rows])[at]
        top = torch.cat([part.amax(-1) for part in rows])[at]
        chosen = logits[at, torch.tensor(continuations, device=model.device)]
        lengths = [predicted for _, predicted in requests]
        values = (chosen - total).split(lengths)
        likeliest = (chosen >= top).split(lengths)
        for (request, _), value, greedy in zip(requests, values, likeliest, strict=True):
            yield request, (float(value.sum()), bool(greedy.all()))


def _logits(
    model: "PreTrainedModel", wanted: "torch.Tensor", dtype: str, **inputs: "torch.Tensor"
) -> "torch.Tensor":
    """The model's logits at some positions of the flattened batch: (wanted, vocabulary) float32."""
    import torch

    head, device = model.get_output_embeddings(), model.device.type
    forward = head.forward

    def exact(hidden: "torch.Tensor") -> "torch.Tensor":
        with torch.autocast(device, enabled=False):  # logits in bfloat16 make ties
            return forward(hidden.flatten(0, 1)[wanted][None].float())

    head.forward = exact
    try:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(**inputs, use_cache=False).logits[0]
    finally:
        del head.forward


def save(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation to a compressed .npz file, whole or not at all."""
    arrays = {
        f"{name}/{part.name}": getattr(scores, part.name)
        for name, scores in evaluation.scores.items()
        for part in fields(scores)
    }
    about = {"protocol": asdict(evaluation.protocol), "made": evaluation.made}
    with paths.whole(Path(path)) as part, open(part, "wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)


def load(path: Path) -> Evaluation:
    """Read what `save` wrote.

    Raises: WdlibError for a file that is missing or is not an evaluation.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            protocol = Protocol(**{**about["protocol"], "tasks": tuple(about["protocol"]["tasks"])})
            parts = [part.name for part in fields(Scores)]
            scores = {
                name: Scores(**{part: arrays[f"{name}/{part}"] for part in parts})
                for name in protocol.tasks
            }
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise WdlibError(f"{path} is not a stored evaluation: evaluate again") from error
    return Evaluation(protocol, scores, about["made"])


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


def accuracy(scores: Scores, *, normalised: bool = False) -> float:
    """The harness's acc, or acc_norm: the share of right answers in its own order of options."""
    return float(correct(scores, normalised=normalised)[:, 0].mean())


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
