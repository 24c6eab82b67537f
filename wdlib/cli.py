"""The `wdlib` command: reads arguments, calls the library, prints; a failure is one line."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wdlib import TYPES, WdlibError, __version__, paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2 for wrong usage, 130 when interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (WdlibError, OSError) as error:
        unfinished = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{unfinished}wdlib: {_printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("wdlib: interrupted", file=sys.stderr)
        return 130
    return 0


def _printable(text: str) -> str:
    """Text for a terminal: names of files and tensors may hold characters that control it."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _say(text: str) -> None:
    print(_printable(text))


def _figures(options: argparse.Namespace) -> None:
    from wdlib.notebooks import Progress, figures

    figures(only=options.only, force=options.force, progress=Progress(sys.stderr))


def _refresh(options: argparse.Namespace) -> None:
    from wdlib.notebooks import Progress, refresh

    refresh(only=options.only, progress=Progress(sys.stderr))


def _run(options: argparse.Namespace) -> None:
    from wdlib.notebooks import Progress, find_notebook, parameters_from_text, run_notebook

    notebook = find_notebook(options.notebook)
    output = options.output or paths.CACHE / "executed" / notebook.name
    progress = Progress(sys.stderr)
    run_notebook(
        notebook,
        parameters_from_text(notebook, dict(options.parameters)),
        output=output,
        on_cell=lambda index, total: progress.step(f"cell {index} of {total}"),
    )
    progress.line(f"wrote {output}")


def _fetch(options: argparse.Namespace) -> None:
    from wdlib.checkpoints.catalogue import DEFAULT
    from wdlib.checkpoints.files import resolve

    checkpoint = resolve(options.model or DEFAULT)
    _say(f"{checkpoint.name}: {', '.join(str(path) for path in checkpoint.files)}")


def _models(options: argparse.Namespace) -> None:
    from wdlib.checkpoints.catalogue import models

    rows = [("name", "hub id", "family", "licence", "access")]
    for name, model in models().items():
        access = "gated" if model.gated else "open"
        rows.append((name, model.hub_id, model.family, model.license, access))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _spectra(options: argparse.Namespace) -> None:
    from wdlib.spectra import jobs

    chosen = {"types": options.types, "layers": options.layers, "shard": options.shard}
    chosen |= {"device": options.device, "workers": options.workers, "stack": options.stack}
    made = jobs.compute_to(options.out, options.model, options.rank, progress=True, **chosen)
    if stack := made.provenance.get("stack"):
        _say(f"read the stack {stack}")


def _merge(options: argparse.Namespace) -> None:
    from wdlib.spectra import jobs, store

    store.save(jobs.merge([store.load(path) for path in options.shards]), options.out)


def _characterise(options: argparse.Namespace) -> None:
    from wdlib import characterise
    from wdlib.spectra import store

    found = characterise.characterise(store.load(options.spectra, rank=options.rank))
    characterise.save(found, options.out)


def _stored(options: argparse.Namespace) -> None:
    from wdlib import characterise, provenance
    from wdlib.checkpoints.files import matches_source
    from wdlib.fingerprints import record
    from wdlib.spectra import store

    sources, held = dict(options.sources), {}
    for path in sorted(paths.SPECTRA.glob("*.safetensors")):
        held[path.stem] = kept = store.load(path)
        current = matches_source(kept.provenance, sources.get(path.stem, path.stem))
        print(f"spectra  {path.stem}  {kept.rank}  {_STATES[current]}")
    for path in sorted((paths.SPECTRA / "nulls").glob("*.safetensors")):
        kept, model = store.load(path), path.stem.rpartition("-")[0]
        current = matches_source({"sha256": kept.provenance.get("sha256 of the model", "")}, model)
        print(f"null  {path.stem}  {kept.rank}  {_STATES[current]}")
    for path in sorted((paths.RESULTS / "characterisation").glob("*-r*.json")):
        found = characterise.load(path)
        there = held.get(path.stem.removesuffix(f"-r{found.rank}"))
        current = there is not None and characterise.matches_spectra(found, there)
        print(f"characterisation  {path.stem}  {found.rank}  {_STATES[current]}")
    for path in sorted((paths.RESULTS / "fingerprints").glob("*.json")):
        known = record.load(path)
        current = matches_source(known.provenance, path.stem)
        print(f"fingerprint  {path.stem}  {known.rank}  {_STATES[current]}")
    for path in provenance.tables():
        name = path.relative_to(paths.RESULTS).as_posix()
        print(f"table  {name}  -  {provenance.state(path)}")


_STATES = ("out of date", "up to date")


def _fingerprint(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from wdlib.fingerprints import record
    from wdlib.fingerprints.identity import identify, report

    size = {"rank": options.rank, "k": options.clusters}
    for model in options.models:
        record.check(model, **size)
    for number, model in enumerate(options.models):
        found = record.of(model, **size)
        if options.family is not None:
            found = replace(found, family=options.family)
        seen = identify(found, record.library())
        _say("\n" * (number > 0) + report(found, seen))
        path = record.keep(found)
        kept = record.load(path)
        if kept.to_json() == found.to_json():
            _say(f"stored in {path}")
        else:
            about = f"rank {kept.rank}, {kept.k} clusters, {kept.family or 'family not known'}"
            _say(f"not stored: {path} keeps {about}")


def _experiments(options: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from wdlib.lora.grid import WORK, chosen, run_grid, state
    from wdlib.lora.results import RESULTS
    from wdlib.notebooks import Progress
    from wdlib.spectra import workers

    todo, places = chosen(options.grid, only=options.only), {"results": RESULTS, "work": WORK}
    if options.results:
        places = {"results": options.results, "work": options.results / "work"}
    if options.dry_run:
        for cell in todo:
            needed = cell.run.characterisation()
            name = "-" if needed is None else needed.stem
            print(f"{cell.tier}  {cell.run.key}  {name}  {state(cell, **places)}")
        return
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(options.threads or max(1, min(2, (cores or 1) // options.workers)))
    settings = {"data_folder": options.data_folder, **places}
    progress = Progress(sys.stderr).line
    with workers.processes(options.workers) if options.workers > 1 else nullcontext() as executor:
        run_grid(todo, executor=executor, progress=progress, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wdlib", description="Weight distributions of LLMs.")
    parser.add_argument("--version", action="version", version=f"wdlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> Callable[..., argparse.Action]:
        """A subcommand; returns the function that adds its arguments."""
        added = commands.add_parser(name, help=text)
        added.set_defaults(command=function)
        return added.add_argument

    add = command("figures", _figures, "draw the figures that are out of date")
    add("--force", action="store_true", help="draw all of them")
    add("--only", metavar="NN", help="only notebooks whose name starts so")

    add = command("refresh", _refresh, "run the notebooks and store their outputs")
    add("--only", metavar="NN", help="only notebooks whose name starts so")

    add = command("run", _run, "run one notebook, with other parameters if given")
    add("notebook", metavar="NOTEBOOK", help="a path, or the start of a name (03)")
    add("-p", dest="parameters", nargs="+", action=_Parameter, default=[])
    add("--output", type=Path, metavar="FILE", help="the executed copy")

    add = command("fetch", _fetch, "bring a model's files to this machine")
    add("model", metavar="MODEL", nargs="?", help="default: the notebooks'")

    command("models", _models, "list the catalogue of models")

    add = command("spectra", _spectra, "compute and store top singular values")
    what = "catalogue name, hub id (hf://... to leave the weights there), folder or file"
    add("model", metavar="MODEL", help=what)
    add("--rank", type=int, default=16, metavar="R")
    add("--out", type=Path, required=True, metavar="FILE")
    add("--layers", type=_layers, metavar="0-9,20", help="default: all")
    which = f"default: {','.join(TYPES)}, as far as there are any"
    add("--types", type=_types, default=TYPES, metavar="q,k", help=which)
    stack = "encoder, vision, ... or a name; default: the language model's, or the decoder"
    add("--stack", metavar="NAME", help=stack)
    dealt = "the I-th of N equal jobs; then `wdlib merge`"
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help=dealt)
    number = "processes, default: one per core, as far as memory and work go"
    add("--workers", type=_positive, metavar="N", help=number)
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ... or mps")

    add = command("merge", _merge, "join the spectra of all shards of a model")
    add("shards", metavar="FILE", nargs="+", type=Path)
    add("--out", type=Path, required=True, metavar="FILE")

    add = command("characterise", _characterise, "classes and groups from spectra")
    stored = "a model whose spectra are stored, or a file of `wdlib spectra`"
    add("spectra", metavar="SPECTRA", help=stored)
    add("--rank", type=int, metavar="R", help="default: all that are there")
    add("--out", type=Path, required=True, metavar="FILE")

    add = command("stored", _stored, "list what is in data/, and what is out of date")
    where = "where the weights of a model are, if not where the catalogue has them"
    add("sources", metavar="MODEL=SOURCE", nargs="*", type=_source, help=where)

    add = command("fingerprint", _fingerprint, "both vectors, and what model it may be")
    add("models", metavar="MODEL", nargs="+", help="as for spectra")
    add("--rank", type=int, default=16, metavar="R")
    number = "of the clustering vector, default: 7"
    add("--clusters", type=_positive, default=7, metavar="K", help=number)
    add("--family", metavar="NAME", help="to store, if it is known")

    add = command("experiments", _experiments, "run what is left of a grid of LoRA runs")
    grid = paths.DATA / "experiments" / "grid.yaml"
    add("grid", nargs="?", type=Path, default=grid, metavar="GRID")
    add("--data-folder", type=Path, metavar="F", help="default: the hub")
    add("--only", metavar="TIER", help="a tier, or the start of keys")
    add("--results", type=Path, metavar="F", help="for runs that are not those of this checkout")
    add("--dry-run", action="store_true", help="list cells and states")
    add("--workers", type=_positive, default=1, metavar="N", help="cells at a time")
    add("--threads", type=_positive, metavar="N", help="of each; default: 2 if there are enough")
    return parser


def _layers(text: str) -> tuple[int, ...]:
    """Layers from "0-9,20"."""
    found = set()
    for item in text.split(","):
        first, dash, last = item.partition("-")
        numbers = first.isdigit() and (last.isdigit() or not dash)
        if not numbers or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"write layers as 0-9,20, not {text!r}")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def _types(text: str) -> tuple[str, ...]:
    """Types from "q,k", in their order; whether a model has them is for its plan to say."""
    from wdlib.checkpoints.architectures import type_order

    given = text.split(",")
    if not all(re.fullmatch(r"\w+", name) for name in given):
        raise argparse.ArgumentTypeError(f"write types as q,k, not {text!r}")
    return tuple(sorted(set(given), key=type_order))


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"write a number from 1, not {text!r}")
    return int(text)


def _source(text: str) -> tuple[str, str]:
    """Model and source from "model=source"."""
    model, equals, source = text.partition("=")
    if not (model and equals and source):
        raise argparse.ArgumentTypeError(f"write MODEL=SOURCE, not {text!r}")
    return model, source


def _shard(text: str) -> tuple[int, int]:
    """Number of a shard and of all from "1/4"."""
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise argparse.ArgumentTypeError(f"write a shard as 1/4, not {text!r}")
    return int(number), int(of)


class _Parameter(argparse.Action):
    """Collects `-p name value` and `-p name=value` as pairs."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pair = values if len(values) == 2 else values[0].split("=", 1)
        if len(values) > 2 or len(pair) != 2:
            parser.error(f"-p takes NAME VALUE or NAME=VALUE, not {' '.join(values)!r}")
        namespace.parameters = [*namespace.parameters, tuple(pair)]
