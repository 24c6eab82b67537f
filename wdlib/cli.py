"""The `wdlib` command: reads arguments, calls the library, prints; a failure is one line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wdlib import TYPES, WdlibError, __version__, paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2 for wrong usage, 130 when interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (WdlibError, OSError) as error:
        unfinished = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{unfinished}wdlib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("wdlib: interrupted", file=sys.stderr)
        return 130
    return 0


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
    print(f"{checkpoint.name}: {', '.join(str(path) for path in checkpoint.files)}")


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
    from contextlib import nullcontext

    from wdlib.spectra import jobs, store

    chosen = {"types": options.types, "layers": options.layers, "shard": options.shard}
    chosen |= {"device": options.device, "progress": True}
    store.check_file(options.out)
    with jobs.processes(options.workers) if options.workers > 1 else nullcontext() as executor:
        jobs.compute_to(options.out, options.model, options.rank, executor=executor, **chosen)


def _merge(options: argparse.Namespace) -> None:
    from wdlib.spectra import jobs, store

    store.save(jobs.merge([store.load(path) for path in options.shards]), options.out)


def _characterise(options: argparse.Namespace) -> None:
    from wdlib import characterise
    from wdlib.spectra import store

    found = characterise.characterise(store.load(options.spectra, rank=options.rank))
    characterise.save(found, options.out)


def _stored(options: argparse.Namespace) -> None:
    from wdlib import characterise
    from wdlib.checkpoints import files
    from wdlib.spectra import store

    sources, held = dict(options.sources), {}
    for path in sorted(paths.SPECTRA.glob("*.safetensors")):
        held[path.stem] = found = store.load(path)
        current = files.matches_source(found.provenance, sources.get(path.stem, path.stem))
        print(f"spectra  {path.stem}  {found.rank}  {_STATES[current]}")
    for path in sorted((paths.RESULTS / "characterisation").glob("*.json")):
        found = characterise.load(path)
        there = held.get(path.stem.removesuffix(f"-r{found.rank}"))
        current = there is not None and characterise.matches_spectra(found, there)
        print(f"characterisation  {path.stem}  {found.rank}  {_STATES[current]}")


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
        print("\n" * (number > 0) + report(found, seen))
        path = record.keep(found)
        kept = record.load(path)
        if kept.to_json() == found.to_json():
            print(f"stored in {path}")
        else:
            about = f"rank {kept.rank}, {kept.k} clusters, {kept.family or 'family not known'}"
            print(f"not stored: {path} keeps {about}")


def _experiments(options: argparse.Namespace) -> None:
    from wdlib.lora.grid import chosen, run_grid, state
    from wdlib.notebooks import Progress

    if options.dry_run:
        for cell in chosen(options.grid, only=options.only):
            needed = cell.run.characterisation()
            name = "-" if needed is None else needed.stem
            print(f"{cell.tier}  {cell.run.key}  {name}  {state(cell)}")
        return
    import torch

    torch.set_num_threads(options.threads)
    settings = {"only": options.only, "data_folder": options.data_folder}
    run_grid(options.grid, **settings, progress=Progress(sys.stderr).line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wdlib", description="Weight distributions of LLMs.")
    parser.add_argument("--version", action="version", version=f"wdlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    figures = commands.add_parser("figures", help="draw the figures that are out of date")
    figures.set_defaults(command=_figures)
    figures.add_argument("--force", action="store_true", help="draw all of them")
    figures.add_argument("--only", metavar="NN", help="only notebooks whose name starts so")

    refresh = commands.add_parser("refresh", help="run the notebooks and store their outputs")
    refresh.set_defaults(command=_refresh)
    refresh.add_argument("--only", metavar="NN", help="only notebooks whose name starts so")

    run = commands.add_parser("run", help="run one notebook, with other parameters if given")
    run.set_defaults(command=_run)
    run.add_argument("notebook", metavar="NOTEBOOK", help="a path, or the start of a name (03)")
    run.add_argument("-p", dest="parameters", nargs="+", action=_Parameter, default=[])
    run.add_argument("--output", type=Path, metavar="FILE", help="the executed copy")

    fetch = commands.add_parser("fetch", help="bring a model's files to this machine")
    fetch.set_defaults(command=_fetch)
    fetch.add_argument("model", metavar="MODEL", nargs="?", help="default: the notebooks'")

    models = commands.add_parser("models", help="list the catalogue of models")
    models.set_defaults(command=_models)

    spectra = commands.add_parser("spectra", help="compute and store top singular values")
    spectra.set_defaults(command=_spectra)
    what = "catalogue name, hub id (hf://... to leave the weights there), folder or file"
    spectra.add_argument("model", metavar="MODEL", help=what)
    spectra.add_argument("--rank", type=int, default=16, metavar="R")
    spectra.add_argument("--out", type=Path, required=True, metavar="FILE")
    spectra.add_argument("--layers", type=_layers, metavar="0-9,20", help="default: all")
    types = {"type": _types, "default": TYPES, "metavar": "q,k"}
    spectra.add_argument("--types", **types, help="default: all")
    shard = {"type": _shard, "default": (1, 1), "metavar": "I/N"}
    spectra.add_argument("--shard", **shard, help="the I-th of N equal jobs; then `wdlib merge`")
    spectra.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes")
    spectra.add_argument("--device", default="cpu", help="cpu, cuda or mps, for the product")

    merge = commands.add_parser("merge", help="join the spectra of all shards of a model")
    merge.set_defaults(command=_merge)
    merge.add_argument("shards", metavar="FILE", nargs="+", type=Path)
    merge.add_argument("--out", type=Path, required=True, metavar="FILE")

    characterise = commands.add_parser("characterise", help="classes and groups from spectra")
    characterise.set_defaults(command=_characterise)
    stored = "a model whose spectra are stored, or a file of `wdlib spectra`"
    characterise.add_argument("spectra", metavar="SPECTRA", help=stored)
    characterise.add_argument("--rank", type=int, metavar="R", help="default: all that are there")
    characterise.add_argument("--out", type=Path, required=True, metavar="FILE")

    text = "list spectra and characterisations in data/, and what is out of date"
    stored = commands.add_parser("stored", help=text)
    stored.set_defaults(command=_stored)
    where = "where the weights of a model are, if not where the catalogue has them"
    stored.add_argument("sources", metavar="MODEL=SOURCE", nargs="*", type=_source, help=where)

    fingerprint = commands.add_parser("fingerprint", help="both vectors, and what model it may be")
    fingerprint.set_defaults(command=_fingerprint)
    fingerprint.add_argument("models", metavar="MODEL", nargs="+", help="as for spectra")
    fingerprint.add_argument("--rank", type=int, default=16, metavar="R")
    clusters = {"type": _positive, "default": 7, "metavar": "K"}
    fingerprint.add_argument("--clusters", **clusters, help="of the clustering vector, default: 7")
    fingerprint.add_argument("--family", metavar="NAME", help="to store, if it is known")

    experiments = commands.add_parser("experiments", help="run what is left of a grid of LoRA runs")
    experiments.set_defaults(command=_experiments)
    grid = paths.DATA / "experiments" / "grid.yaml"
    experiments.add_argument("grid", nargs="?", type=Path, default=grid, metavar="GRID")
    experiments.add_argument("--data-folder", type=Path, metavar="F", help="default: the hub")
    experiments.add_argument("--only", metavar="TIER", help="a tier, or the start of keys")
    experiments.add_argument("--dry-run", action="store_true", help="list cells and states")
    experiments.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
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
    """Types from "q,k", in their order."""
    given = text.split(",")
    if unknown := set(given) - set(TYPES):
        raise argparse.ArgumentTypeError(f"the types are {', '.join(TYPES)}, not {unknown.pop()!r}")
    return tuple(t for t in TYPES if t in given)


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

    def __call__(self, parser, namespace, values, option_string=None):
        pair = values if len(values) == 2 else values[0].split("=", 1)
        if len(values) > 2 or len(pair) != 2:
            parser.error(f"-p takes NAME VALUE or NAME=VALUE, not {' '.join(values)!r}")
        namespace.parameters = [*namespace.parameters, tuple(pair)]
