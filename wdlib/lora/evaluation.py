"""A language model -> the log-likelihood of every option of every benchmark item, and what follows.

lm-eval's own tasks make the prompts and its own `HFLM` makes the tokens. Only the arithmetic is
ours: all requests that begin alike are one tree of tokens, computed once, in one pass.
"""

import contextlib
import itertools
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from wdlib import WdlibError
from wdlib.lora import devices
from wdlib.lora.benchmarks import Items, Protocol, check_folder, quiet, requests
from wdlib.lora.scores import Evaluation, Scores

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward pass, padding included, by device; fewer where memory is short."""

TREE_TOKENS = 1024
"""Tokens above which a tree is not extended: attention costs their square."""

SOFTMAX_ROWS = {"cpu": 32, "cuda": 4096}
"""Positions whose softmax is computed at a time: as many as a processor's cache holds."""

SHARED_TOKENS = 16
"""Requests that begin with fewer tokens in common are computed apart."""


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    protocol: Protocol | None = None,
    data_folder: Path | None = None,
) -> Evaluation:
    """Score every option of every item of the protocol's tasks.

    Arguments: model, a causal language model of transformers or a PeftModel, which is scored in the
    state that it is in: active adapters, or none where they are switched off; neither it nor the
    tokenizer is changed. data_folder, with the files of the tasks
    (arc_challenge_test.jsonl, hellaswag_validation.jsonl.gz, gpqa_diamond.zip); None: the hub.
    Raises: WdlibError for a protocol that cannot be followed and data that cannot be read.
    """
    protocol = protocol or Protocol()
    check_folder(protocol.tasks, data_folder)
    began = time.monotonic()
    loaded = {name: requests(name, protocol, data_folder) for name in protocol.tasks}
    scores: dict[str, Scores] = {}
    tasks: dict[str, dict[str, Any]] = {}
    with quiet(), _ready(model) as ready:
        scorer = tree_scorer(ready, tokenizer, protocol.dtype)
        for name, items in loaded.items():
            start = time.monotonic()
            flat = [request for shown in items.shown for request in itertools.chain(*shown)]
            answers = scorer.loglikelihood(flat, disable_tqdm=True)
            scores[name] = _scores(items, [value for value, _ in answers])
            made = {"seconds": time.monotonic() - start, "device": ready.device.type}
            tasks[name] = {**made, **scorer.counted}
    versions = {name: version(name) for name in ("lm-eval", "transformers", "torch")}
    made = {"seconds": time.monotonic() - began, "tasks": tasks, "versions": versions}
    return Evaluation(protocol, scores, made)


def _scores(items: Items, answers: Sequence[float]) -> Scores:
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
def _ready(model: Any) -> Iterator[Any]:
    """The model with float32 weights in evaluation mode, a copy where it is not so already.

    An adapter is merged into the copy where that leaves the function as it is: in bfloat16 the sum
    would lose most of it. Elsewhere the model is scored with its adapters as they are.
    """
    import copy

    import torch

    merged = _merges(model)
    if merged or model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    if merged:
        _untie(model)
        model = model.merge_and_unload()
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True


def _merges(model: Any) -> bool:
    """Whether a model is a PeftModel whose function merging keeps.

    It does not where adapters are switched off, and where more than matrices is trained.
    Raises: WdlibError for an adapter that adds tokens of its own to the input.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "active_adapters"):
        return False
    active = [model.peft_config[name] for name in model.active_adapters]
    if any(config.is_prompt_learning for config in active):
        raise WdlibError(
            f"the adapter ({active[0].peft_type.value}) puts tokens of its own before every prompt "
            "and cannot be scored here: evaluate one that changes weights, such as LoRA"
        )
    more = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices")
    special = any(
        getattr(c, key, None) not in (None, False, "none") for c in active for key in more
    )
    return not special and not any(layer.disable_adapters for layer in _adapted(model))


def _adapted(model: Any) -> list[Any]:
    """The layers of a PeftModel that hold adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _untie(model: Any) -> None:
    """Give adapted layers a weight of their own: merging would change what they are tied to."""
    import torch

    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for layer in (adapted.get_base_layer() for adapted in _adapted(model)):
        if owners[id(layer.weight)] > 1:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
            model.config.tie_word_embeddings = False


def tree_scorer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", dtype: str) -> Any:
    """lm-eval's HFLM, which scores requests that begin alike together."""
    import copy

    from lm_eval.models.huggingface import HFLM

    class TreeLM(HFLM):
        counted: dict[str, int]

        def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
            """As HFLM does it, without the end-of-text token that some tokenizers append."""
            ids: list[int] = super().tok_encode(string, *args, **options)
            end = self.tokenizer.eos_token
            appended = ids[-1:] == [self.tokenizer.eos_token_id] and not string.endswith(end)
            return ids[:-1] if appended else ids

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            # As HFLM cuts what is too long for the model: from the left.
            pairs = [((c + t)[-(self.max_length + 1) :], len(t)) for _, c, t in requests]
            if not all(predicted for _, predicted in pairs):
                raise WdlibError(
                    "an option has no token of its own: this tokenizer joins it to the end of the "
                    "prompt, so that it cannot be scored; evaluate with another tokenizer"
                )
            naive = sum(len(tokens) - 1 for tokens, _ in pairs)
            if not _plain_attention(self.model, max(len(tokens) for tokens, _ in pairs)):
                self.counted = {"tokens": naive, "naive": naive}
                return super()._loglikelihood_tokens(requests, disable_tqdm=True)
            trees = _trees(pairs)
            self.counted = {"tokens": sum(len(t.tokens) for t in trees), "naive": naive}
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            left = sorted(trees, key=lambda tree: -len(tree.tokens))

            def score(tokens: int) -> None:
                for batch in _batches(left, tokens):
                    for request, answer in _score(self.model, batch, dtype):
                        answers[request] = answer
                    del left[: len(batch)]
                    bar.update(len(batch))

            tokens = _by_device(BATCH_TOKENS, self.model)
            with tqdm(total=len(trees), desc="evaluation", disable=None, leave=False) as bar:
                devices.halving(score, tokens, smallest=TREE_TOKENS, what="tokens")
            return answers

    # Of a prompt without text, which no task has; HFLM fails where a tokenizer names neither.
    named = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return TreeLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=1,
        softmax_dtype="float32",
        prefix_token_id=0 if named is None else named,
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
    trees: list[_Tree] = []
    group: list[int] = []
    last: list[int] = []
    size = 0
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


def _by_device(sizes: dict[str, int], model: "PreTrainedModel") -> int:
    return sizes.get(model.device.type, sizes["cpu"])


def _batches(trees: Sequence[_Tree], tokens: int) -> list[list[_Tree]]:
    """The trees, which go from the largest down, divided: those padded to one length are alike."""
    batches: list[list[_Tree]] = []
    for tree in trees:
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].tokens) > tokens:
            batches.append([])
        batches[-1].append(tree)
    return batches


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
        hidden = torch.from_numpy(~sees).to(model.device)
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=model.device)
        mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        logits = _logits(
            model,
            wanted.to(model.device),
            dtype,
            input_ids=torch.from_numpy(tokens).to(model.device),
            position_ids=torch.from_numpy(depth).to(model.device),
            attention_mask=mask[:, None],
        )
        rows, at = logits.split(_by_device(SOFTMAX_ROWS, model)), at.to(model.device)
        total = torch.cat([part.logsumexp(-1) for part in rows])[at]
        top = torch.cat([part.amax(-1) for part in rows])[at]
        chosen = logits[at, torch.tensor(continuations, device=model.device)]
        lengths = [predicted for _, predicted in requests]
        values = (chosen - total).cpu().split(lengths)
        likeliest = (chosen >= top).cpu().split(lengths)
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
