"""Benchmarks as lm-eval's requests: one for each option of each item in each order."""

import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import random
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import WdlibError, paths
from wdlib.lora.data import Question

GPQA_PASSWORD = b"deserted-untie-orchid"
"""Published by GPQA's authors: the archive is locked against crawlers, not against readers."""

HARNESS_SEED = 0
"""What lm-eval's command line seeds `random` with, which shuffles the options of GPQA."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class _Source:
    """Where lm-eval defines a task, and the file that feeds it where the hub does not.

    row: what a row of the file has to be, its names with underscores for spaces.
    """

    folder: str
    file: str
    read: Callable[[Path], list[dict[str, Any]]]
    row: type
    reorder: bool = False


def _locked_table(path: Path) -> list[dict[str, Any]]:
    """The rows of the csv file in an encrypted zip file, which stay in memory."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".csv"))
        text = archive.read(name, pwd=GPQA_PASSWORD).decode("utf-8")
    return list(csv.DictReader(io.StringIO(text, newline="")))


@dataclass(frozen=True)
class _GpqaRow:
    Question: str
    Correct_Answer: str
    Incorrect_Answer_1: str
    Incorrect_Answer_2: str
    Incorrect_Answer_3: str


@dataclass(frozen=True)
class _HellaswagRow:
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: str

    def __post_init__(self) -> None:
        if self.label not in map(str, range(len(self.endings))):
            raise ValueError("the label is that of no ending")


_SOURCES = {
    "gpqa_diamond_zeroshot": _Source(
        "gpqa/zeroshot",
        "gpqa_diamond.zip",
        _locked_table,
        _GpqaRow,
        reorder=True,
    ),
    "arc_challenge": _Source("arc", "arc_challenge_test.jsonl", paths.json_lines, Question),
    "hellaswag": _Source(
        "hellaswag",
        "hellaswag_validation.jsonl.gz",
        paths.json_lines,
        _HellaswagRow,
    ),
}

_DAMAGED = (zipfile.BadZipFile, zlib.error, csv.Error)

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
    Raises: WdlibError for what is none of these.
    """

    tasks: tuple[str, ...] = TASKS
    limit: Mapping[str, int] = field(default_factory=dict)
    orders: int = 4
    seed: int = HARNESS_SEED
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.limit):
            if name not in _SOURCES:
                raise WdlibError(f"there is no benchmark {name!r}: choose from {', '.join(TASKS)}")
        if self.dtype not in DTYPES:
            raise WdlibError(f"there is no dtype {self.dtype!r} here: give {' or '.join(DTYPES)}")
        option_orders(self.orders)
        for name, limit in self.limit.items():
            if limit < 1:
                raise WdlibError(
                    f"a limit of {limit} items leaves nothing of {name}: give 1 or more"
                )


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
class Items:
    """Items of one task: shown[item][order] are lm-eval's requests, one for each option."""

    shown: list[list[list[Any]]]
    orders: np.ndarray
    gold: list[int]
    options: list[list[str]]


def check_folder(tasks: Iterable[str], folder: Path | None) -> None:
    """Raise WdlibError where a folder lacks the file of a task; None stands for the hub."""
    for name in tasks:
        if folder and not (path := folder / _SOURCES[name].file).is_file():
            raise WdlibError(f"{path} is missing: put it there, or name no folder for the hub")


def requests(name: str, protocol: Protocol, data_folder: Path | None) -> Items:
    """lm-eval's requests for a task's items in every order of their options."""
    source, limit = _SOURCES[name], protocol.limit.get(name)
    with quiet(), _pristine():
        task = _task(name, data_folder, limit)
        random.seed(protocol.seed)  # the shuffle is the first to draw, as on the command line
        docs = list(itertools.islice(task.eval_docs, limit))
    orders = option_orders(protocol.orders) if source.reorder else None
    with _templates_compiled_once():
        return _shown(task, docs, orders, name)


def _shown(task: Any, docs: Sequence[Any], orders: np.ndarray | None, name: str) -> Items:
    """What a task asks of its documents, in some orders of their options or as they are."""
    shown: list[list[list[Any]]] = []
    gold, options = [], []
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
    return Items(shown, orders, gold, options)


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
    except (OSError, EOFError, ValueError, RuntimeError, *_DAMAGED):
        rows = []
    if not rows:
        raise WdlibError(f"{path} cannot be read or is empty: fetch it again")
    what, remedy = f"{path} has a row that is no item of the benchmark", "fetch it again"
    for row in rows:
        named = row
        if isinstance(row, dict):
            named = {str(name).replace(" ", "_"): value for name, value in row.items()}
        paths.parse_json(json.dumps(named), source.row, what=what, remedy=remedy, others="ignore")
    return rows


def _reordered(doc: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A document of GPQA as its task makes them, with its options in another order."""
    options = {f"choice{1 + position}": doc[f"choice{1 + o}"] for position, o in enumerate(order)}
    return {**doc, **options}


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Spare lm-eval to compile a task's templates for every item, most of what requests cost."""
    from lm_eval.utils import env

    vars(env)["from_string"] = functools.lru_cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string


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
def quiet() -> Iterator[None]:
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
