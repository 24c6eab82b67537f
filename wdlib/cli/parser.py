"""The arguments of the command: what it takes, and how their values are read."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from wdlib import TYPES, __version__, paths
from wdlib.cli import subcommands


def joined(words: Sequence[str]) -> list[str]:
    """The words of a command line, with "-p NAME VALUE" written as "-p NAME=VALUE"."""
    found: list[str] = []
    for word in words:
        if found[-2:-1] == ["-p"] and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def parser() -> argparse.ArgumentParser:
    """All subcommands; parsed options hold `command`, to be called with them, and `failure`."""
    main = argparse.ArgumentParser(
        prog="wdlib",
        description="Weight distributions of LLMs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="version", version=f"wdlib {__version__}")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str,
        function: Callable[[argparse.Namespace], int | None],
        text: str,
        *examples: str,
        failure: int = 1,
    ) -> Callable[..., argparse.Action]:
        """A subcommand, its exit status where it fails; returns what adds its arguments."""
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n".join(["examples:", *(f"  wdlib {name}{example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=function, failure=failure)
        return added.add_argument

    only = {"metavar": "NN", "help": "notebooks whose name starts so, default: all"}
    what = "catalogue name, hub id (hf://... to leave the weights there), folder or file"
    rank = {"type": int, "default": 16, "metavar": "R", "help": "values per matrix, default: 16"}
    out = {"type": Path, "required": True, "metavar": "FILE"}
    weights = "where the weights of a model are, default: where the catalogue has them"

    text = "draw the figures that are out of date"
    add = command("figures", subcommands.figures, text, "", " --only 03 --force")
    add("--force", action="store_true", help="draw those too that are up to date")
    add("--only", **only)

    add = command(
        "refresh", subcommands.refresh, "run the notebooks and store their outputs", " --only 03"
    )
    add("--only", **only)

    text = "run one notebook, with other parameters if given"
    add = command(
        "run",
        subcommands.run,
        text,
        " 3",
        " 03 -p model=gemma-3-270m -p rank 64 --output out.ipynb",
    )
    _complete(add("notebook", metavar="NOTEBOOK", help="its number, or a path"), _notebook_names)
    parameter = "a parameter of the notebook (or NAME VALUE), default: as it stands in it"
    option = {"action": "append", "default": [], "metavar": "NAME=VALUE", "help": parameter}
    add("-p", dest="parameters", type=_parameter, **option)
    executed = "the executed copy, default: in the cache"
    add("--output", type=Path, metavar="FILE", help=executed)

    text = "bring a model's files to this machine"
    add = command("fetch", subcommands.fetch, text, "", " qwen2.5-coder-0.5b-instruct")
    model = "catalogue name or hub id, default: that of the notebooks"
    _complete(add("model", metavar="MODEL", nargs="?", help=model), _model_names)

    command("models", subcommands.models, "list the catalogue of models", "")

    examples = (
        " gemma-3-270m --rank 64 --out gemma.safetensors",
        " hf://meta-llama/Llama-3.1-70B --types q --shard 1/4 --out q1.safetensors",
    )
    add = command(
        "spectra", subcommands.spectra, "compute and store top singular values", *examples
    )
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
    add = command(
        "merge", subcommands.merge, text, " q1.safetensors q2.safetensors --out q.safetensors"
    )
    add("shards", metavar="FILE", nargs="+", type=Path, help="all that `wdlib spectra` wrote")
    add("--out", **out, help="ends in .safetensors")

    text = "classes and groups from spectra"
    add = command(
        "characterise", subcommands.characterise, text, " gemma.safetensors --out gemma.json"
    )
    stored = "a model whose spectra are stored, or a file of `wdlib spectra`"
    _complete(add("spectra", metavar="SPECTRA", help=stored), _model_names)
    add("--rank", type=int, metavar="R", help="default: all that are there")
    add("--out", **out, help="as JSON")

    text = "list what is stored, and what of it is out of date"
    add = command("stored", subcommands.stored, text, "", " gemma-3-270m=path/to/gemma")
    add("sources", metavar="MODEL=SOURCE", nargs="*", type=_source, help=weights)

    text = "what a checkpoint is made from; exit status: 0 a relative, 1 none, 2 it failed"
    examples = (" path/to/checkpoint", " suspect.gguf path/to/original --out pair.png")
    add = command("fingerprint", subcommands.fingerprint, text, *examples, failure=2)
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
    add = command("experiments", subcommands.experiments, text, *examples)
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
    return main


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
