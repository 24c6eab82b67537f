"""The `wdlib` command: reads arguments, calls the library, prints; a failure is one line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wdlib import WdlibError, __version__, paths


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
    from wdlib.run import Progress, figures

    figures(only=options.only, force=options.force, progress=Progress(sys.stderr))


def _refresh(options: argparse.Namespace) -> None:
    from wdlib.run import Progress, refresh

    refresh(only=options.only, progress=Progress(sys.stderr))


def _run(options: argparse.Namespace) -> None:
    from wdlib.run import Progress, find_notebook, parameters_from_text, run_notebook

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
    from wdlib.models import DEFAULT, resolve

    checkpoint = resolve(options.model or DEFAULT)
    print(f"{checkpoint.name}: {', '.join(str(path) for path in checkpoint.files)}")


def _models(options: argparse.Namespace) -> None:
    from wdlib.models import catalogue

    rows = [("name", "hub id", "family", "licence", "access")]
    for name, model in catalogue().items():
        access = "gated" if model.gated else "open"
        rows.append((name, model.hub_id, model.family, model.license, access))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _spectra(options: argparse.Namespace) -> None:
    from wdlib import spectra

    spectra.save(spectra.compute(options.model, options.rank, progress=True), options.out)


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
    spectra.add_argument("model", metavar="MODEL", help="catalogue name, hub id, folder or file")
    spectra.add_argument("--rank", type=int, default=16, metavar="R")
    spectra.add_argument("--out", type=Path, required=True, metavar="FILE")
    return parser


class _Parameter(argparse.Action):
    """Collects `-p name value` and `-p name=value` as pairs."""

    def __call__(self, parser, namespace, values, option_string=None):
        pair = values if len(values) == 2 else values[0].split("=", 1)
        if len(values) > 2 or len(pair) != 2:
            parser.error(f"-p takes NAME VALUE or NAME=VALUE, not {' '.join(values)!r}")
        namespace.parameters = [*namespace.parameters, tuple(pair)]


if __name__ == "__main__":
    sys.exit(main())
