"""Attacks on what wdlib has stored: spectra, journals, fingerprints, records, the catalogue."""

import json
import tomllib
import zlib
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import nbformat
import numpy as np
import tiny
from fuzz.checkpoint_kinds import library_header, mutate_safetensors
from fuzz.engine import Kind
from fuzz.mutations import as_json, flipped, odd_array
from fuzz.schemas import check, conform
from safetensors import safe_open
from safetensors.numpy import load, save

from wdlib import TYPES, characterise, notebooks, paths, provenance
from wdlib.checkpoints import catalogue, wheels
from wdlib.fingerprints import ancestors, record
from wdlib.fingerprints.clusters import Clusters
from wdlib.fingerprints.invariants import Spectra
from wdlib.fingerprints.record import Fingerprint
from wdlib.fingerprints.values import Moments
from wdlib.provenance import Provenance
from wdlib.spectra import store
from wdlib.spectra.journal import Journal
from wdlib.spectra.kernel import SingularValues

# Spectra ----------------------------------------------------------------------------------------


def make_spectra(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(0, None), (1, 0), (1, 1)]
    return store.save(tiny.spectra(rows), folder / "toy.safetensors")


def mutate_spectra(rng: Random, data: bytes) -> bytes:
    """Other arrays and other words about them in a file that is whole, or a file that is not."""
    if rng.random() < 0.3:
        return mutate_safetensors(rng, data)
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])["__metadata__"]["wdlib"].encode()
    name = rng.choice([*tensors, "about"])
    if name == "about":
        about = as_json(rng, about)
    elif rng.random() < 0.2:
        del tensors[name]
    else:
        tensors[name] = odd_array(rng, tensors[name])
    return save(tensors, metadata={"wdlib": about.decode("utf-8", "replace")})


def library_spectra(path: Path) -> Any:
    """By the safetensors library, and judged by what the docstring of `Spectra` promises."""
    tensors = {name: _array(*item) for name, item in library_header(path).items()}
    with safe_open(path, "numpy") as file:
        about = check(json.loads(file.metadata()["wdlib"]), {str: str})
    values, error, rows, shapes = {}, {}, {}, {}
    for t in (t for t in TYPES if t in tensors):
        values[t], error[t] = tensors[t], tensors[f"{t}.error"]
        for array in (values[t], error[t]):
            good = array.dtype == np.float64 and array.ndim == 2 and array.size
            if not good or array.shape != values[t].shape:
                raise ValueError("shape or type")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ValueError("numbers")
        if (np.diff(values[t]) > 0).any():
            raise ValueError("order")
        pairs = tensors.get(f"{t}.rows", np.array([(n, -1) for n in range(len(values[t]))]))
        sizes = tensors.get(f"{t}.shapes")
        for table, least in ((pairs, (0, -1)), (sizes, (1, 1))):
            if table is not None and (
                table.dtype != np.int64
                or table.shape != (len(values[t]), 2)
                or (table < least).any()
            ):
                raise ValueError("rows")
        found = [(a, None if b < 0 else b) for a, b in pairs.tolist()]
        if len(set(found)) < len(found) or found != sorted(
            found, key=lambda r: (r[0], -1 if r[1] is None else r[1])
        ):
            raise ValueError("rows twice, or out of order")
        rows[t] = tuple(found)
        if sizes is not None:
            shapes[t] = tuple(map(tuple, sizes.tolist()))
            if min(min(s) for s in shapes[t]) < values[t].shape[1]:
                raise ValueError("more values than a matrix has")
    if len({v.shape[1] for v in values.values()}) != 1:
        raise ValueError("ranks")
    return store.Spectra(about.pop("model"), values, error, rows, about, shapes)


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    kinds = {"F64": "<f8", "I64": "<i8", "F32": "<f4", "I32": "<i4", "F16": "<f2"}
    return np.frombuffer(data, kinds[dtype]).reshape(shape)


# Journals ---------------------------------------------------------------------------------------

PLACES = [(layer, kind, None) for layer in (0, 1) for kind in ("q", "down")]


def _result(place: tuple) -> SingularValues:
    values = np.linspace(2, 1, 4) * (place[0] + 1) * len(place[1])
    return SingularValues(values, values * 1e-7, "product")


def make_journal(folder: Path) -> Path:
    """Of four matrices; the records are those that `Journal.add` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "out.safetensors.unfinished"
    path.unlink(missing_ok=True)
    journal = Journal(path, "a job")
    for place in PLACES:
        entry = type("Entry", (), {"place": place})
        journal.add(type("Part", (), {"entry": entry}), _result(place))  # type: ignore[arg-type]
    return path


def mutate_journal(rng: Random, data: bytes) -> bytes:
    """Also records of another job, of right checksum, and lines in another order."""
    lines = data.splitlines()
    match rng.randrange(5):
        case 0 | 1:
            return flipped(rng, data)
        case 2:
            rng.shuffle(lines)
        case 3:
            at = rng.randrange(len(lines))
            del lines[at : at + rng.randrange(3)]
        case _:
            at = rng.randrange(len(lines))
            text = as_json(rng, lines[at].partition(b" ")[2])
            if b"\n" not in text:
                lines[at] = (
                    text if rng.random() < 0.3 else b"%08x %s" % (zlib.crc32(text) ^ 1, text)
                )
    return b"\n".join(lines) + b"\n"


def read_journal(path: Path) -> Any:
    """What a job would end with: found or computed, each matrix once."""
    journal = Journal(path, "a job")
    if strange := journal.found.keys() - set(PLACES):
        raise ValueError(f"a record of {strange}")
    return [journal.found.get(place) or _result(place) for place in PLACES]


# Records in JSON --------------------------------------------------------------------------------


def make_fingerprint(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    values = {t: -np.sort(-rng.uniform(1, 2, (3, 4))) for t in ("q", "down")}
    moments = {t: tuple(Moments(64, 0.1 * n, 2.0 + n) for n in range(3)) for t in values}
    centres = Clusters(-np.sort(-rng.uniform(0.4, 0.6, (2, 4))))
    made = Fingerprint("toy", "", moments, values, centres, {"sha256": "0" * 64}, _invariants(rng))
    return record.save(made, folder / "toy.json")


def read_fingerprint(path: Path) -> Any:
    """What is read, and can be used."""
    found = record.load(path)
    reference = make_reference()
    ancestors.report(found, ancestors.identify(found, [reference]))
    ancestors.report(reference, ancestors.identify(reference, [found]))
    found.to_json()
    return _told(found)


def make_reference() -> Fingerprint:
    """Another model's."""
    values = {t: np.linspace(3, 1, 12).reshape(3, 4) + 9 for t in ("q", "down")}
    moments = {t: (Moments(64, 0.0, 1.0),) * 3 for t in values}
    centres = Clusters(np.linspace(0.6, 0.4, 8).reshape(2, 4))
    rng = np.random.default_rng(1)
    about = {"sha256": "1" * 64}
    return Fingerprint("other", "", moments, values, centres, about, _invariants(rng))


def _invariants(rng: np.random.Generator) -> dict[str, Spectra]:
    return {
        "gate": Spectra(np.arange(3), -np.sort(-rng.uniform(1, 2, (3, 4)))),
        "qk": Spectra(np.repeat([0, 2], 2), -np.sort(-rng.uniform(1, 2, (4, 5)))),
    }


def _told(found: Fingerprint) -> Any:
    moments = {
        t: [[m.n, float(m.mean), float(m.squares)] for m in rows]
        for t, rows in found.moments.items()
    }
    return (
        found.model, found.family, found.provenance, moments, found.singular_values,
        found.clusters.centres, found.clusters.scaled,
        {kind: (s.layers.tolist(), s.values) for kind, s in found.invariants.items()},
    )  # fmt: skip


def library_fingerprint(path: Path) -> Any:
    """By `json`, and judged by what the docstring of `Fingerprint` promises."""
    content = conform(
        path,
        {
            "model": str, "family": str, "provenance": {str: str}, "scaled": bool,
            "moments": {str: [[float]]}, "singular values": {str: [[float]]}, "centres": [[float]],
        },
        more=True,
    )  # fmt: skip
    moments, values = content["moments"], content["singular values"]
    arrays = {t: np.array(rows, np.float64) for t, rows in values.items()}
    centres = np.array(content["centres"], np.float64)
    raw = json.loads(path.read_bytes())["moments"]
    ranks = {a.shape[1] for a in [*arrays.values(), centres]}
    if moments.keys() != values.keys() or not values.keys() <= set(TYPES) or len(ranks) != 1:
        raise ValueError("types or ranks")
    for t, array in arrays.items():
        if not np.isfinite(array).all() or (array < 0).any() or (np.diff(array) > 0).any():
            raise ValueError("singular values")
        if len(array) != len(moments[t]) or not np.isfinite(np.array(moments[t])).all():
            raise ValueError("moments")
        for (n, _, _), (_, mean, squares) in zip(raw[t], moments[t], strict=True):
            if type(n) is not int or not 1 <= n < 2**63 or not 0 <= squares < 1e150 > abs(mean):
                raise ValueError("moments")
    if not np.isfinite(centres).all() or not centres.size:
        raise ValueError("centres")
    invariants = {
        kind: _library_invariants(kind, rows)
        for kind, rows in check(content.get("invariants", {}), {str: Any}).items()
    }
    told = {
        t: [[row[0], *m[1:]] for row, m in zip(raw[t], moments[t], strict=True)] for t in moments
    }
    return (
        content["model"], content["family"], content["provenance"], told, arrays, centres,
        content["scaled"], invariants,
    )  # fmt: skip


def _library_invariants(kind: str, rows: Any) -> tuple[list[int], np.ndarray]:
    known = check(rows, {"layers": [int], "values": [[float]]}, more=True)
    layers, values = known["layers"], np.array(known["values"], np.float64)
    if kind not in ("qk", "ov", "gate", "up", "down", "neurons") or len(layers) != len(values):
        raise ValueError("kinds of invariants")
    if values.ndim != 2 or not values.size or layers != sorted(layers) or layers[0] < 0:
        raise ValueError("layers of invariants")
    if not np.isfinite(values).all() or (values < 0).any() or (np.diff(values) > 0).any():
        raise ValueError("invariants")
    return layers, values


def make_characterisation(folder: Path) -> Path:
    made = tiny.characterisation(("q", "k"), ("down",))
    return characterise.save(made, folder / "toy.json")


def library_characterisation(path: Path) -> Any:
    verdict = {
        "label": str, "evidence": float, "power_law_share": float, "normal_share": float,
        "start": float, "n": int,
    }  # fmt: skip
    pair = {"types": [str], "verdict": verdict, "alpha": (None, float), "xmin": (None, float)}
    schema = {
        "model": str, "rank": int, "groups": [{"referenced": str, "members": [str]}],
        "pairs": [pair], "replicates": int, "seed": int, "rule": {str: float},
        "provenance": {str: str}, "made_by": str,
    }  # fmt: skip
    content = conform(path, schema)
    if any(len(p["types"]) != 2 for p in content["pairs"]):
        raise ValueError("a pair of other than two")
    return content


def read_characterisation(path: Path) -> Any:
    return json.loads(json.dumps(_floats(asdict(characterise.load(path)))))


def _floats(content: Any) -> Any:
    """With the numbers as floats that the schema says are."""
    for p in content["pairs"]:
        for part, names in (
            (p, ("alpha", "xmin")),
            (p["verdict"], ("evidence", "power_law_share", "normal_share", "start")),
        ):
            for name in names:
                part[name] = part[name] if part[name] is None else float(part[name])
    content["rule"] = {name: float(value) for name, value in content["rule"].items()}
    return content


def make_record(folder: Path) -> Path:
    made = Provenance(
        "docs/bench.py", "00", {"n": [1, None]}, {"numpy": "2"}, {"a": "b"}, "2026-01-01", "11"
    )
    provenance.save(made, folder / "table.csv")
    return folder / "table.provenance.json"


def library_record(path: Path) -> Any:
    text = {str: str}
    needed = {
        "script": str,
        "script_sha256": str,
        "parameters": {str: Any},
        "versions": text,
        "inputs": text,
    }
    rest = dict.fromkeys(("date", "sha256", "note"), str)
    content = {**dict.fromkeys(rest, ""), **conform(path, needed, more=True)}
    return check(content, needed | rest)


# The catalogue, stamps and notebooks ------------------------------------------------------------


def make_catalogue(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models.toml").write_text(
        '["a"]\nhub_id = "lab/a"\nfamily = "A"\nlicense = "MIT"\ngated = false\n'
        '[["a".wheels]]\nfile = "a.gguf"\nsha256 = "00"\nquantisation = "Q4_1"\n'
        'archive_member = "a.gguf"\n'
        'packages = [{name = "a", version = "1", sha256 = "11", member = "a/a.gguf"}]\n'
        '["b"]\nhub_id = "lab/b"\nfamily = "B"\nlicense = "MIT"\ngated = true\n'
    )
    return folder / "models.toml"


def mutate_catalogue(rng: Random, data: bytes) -> bytes:
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    odd = (
        "1",
        "[]",
        "{}",
        '"x"',
        "true",
        "-1",
        "[" * 3000 + "]" * 3000,
        "1979-05-27",
        "nan",
        "[{}]",
        '"../x"',
    )
    match rng.randrange(4):
        case 0:
            return flipped(rng, data)
        case 1:
            del lines[at]
        case 2:
            lines[at] = f"{lines[at].partition('=')[0]} = {rng.choice(odd)}"
        case _:
            lines.insert(at, f"{rng.choice(('extra', 'hub_id', 'file'))} = {rng.choice(odd)}")
    return "\n".join(lines).encode()


def read_catalogue(path: Path) -> Any:
    paths.CATALOGUE = path
    catalogue.models.cache_clear()
    return catalogue.models()


def library_catalogue(path: Path) -> Any:
    found = {}
    package = {"name": str, "version": str, "sha256": str, "member": str}
    row = {"hub_id": str, "family": str, "license": str, "gated": bool}
    for name, given in check(tomllib.loads(path.read_bytes().decode()), {str: dict}).items():
        check(given, row, more=True)
        sources = []
        for wheel in given.get("wheels", []):
            texts = ("file", "sha256", "archive_member", "quantisation", "note")
            whole = {**dict.fromkeys(texts, ""), **wheel}
            check(whole, dict.fromkeys(texts, str) | {"packages": [package]})
            parts = tuple(catalogue.Package(**p) for p in whole.pop("packages"))
            sources.append(catalogue.Source("wheel", parts, **whole))
        if set(given) - {*row, "wheels"}:
            raise ValueError("another field")
        fields = {key: given[key] for key in row}
        found[name] = catalogue.Model(name, **fields, sources=(*sources, catalogue.Source("hub")))
    return found


def make_stamp(folder: Path) -> Path:
    """A file in the cache that is known to be whole, with the note that says so."""
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    (models / "a.gguf").write_bytes(b"weights")
    paths.CACHE = folder
    wheels.cached(_source())
    return models / "a.gguf.verified"


def _source() -> catalogue.Source:
    return catalogue.Source("wheel", (), "a.gguf", tiny.sha256(b"weights"))


PARAMETERS = "rank: int = 16\nmodel: str = 'a'\nshare: float | None = None"


def make_notebook(folder: Path) -> Path:
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, id="a", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(1)", id="b"),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "a.ipynb")
    return folder / "a.ipynb"


ANNOTATIONS = {"int": int, "str": str, "float | None": float | None}


def library_notebook(path: Path) -> Any:
    """By nbformat; of annotations, those that the notebook began with."""
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    declared = {}
    for line in check(cell.source, str).split("\n"):
        name, _, rest = line.partition(":")
        if rest and not line.startswith("#"):
            declared[name] = ANNOTATIONS[rest.partition("=")[0].strip()]
    return declared


TEXTS = {"rank": "16", "model": "a", "share": "0.5"}


def make_parameters(folder: Path) -> Path:
    make_notebook(folder)
    (folder / "given.json").write_text(json.dumps(TEXTS))
    return folder / "given.json"


def mutate_parameters(rng: Random, data: bytes) -> bytes:
    """What could stand on a command line: texts, without zero bytes."""
    texts, odd = json.loads(data), as_json(rng, data).decode("utf-8", "replace")
    texts[rng.choice([*texts, "other"])] = odd.replace("\0", "")[: rng.choice((3, 30, 300_000))]
    return json.dumps(texts).encode()


def read_parameters(path: Path) -> Any:
    book = path.parent / "a.ipynb"
    given = notebooks.parameters_from_text(book, json.loads(path.read_bytes()))
    notebooks.parameters.check(notebooks.declared_parameters(book), given)
    return given


def library_parameters(path: Path) -> Any:
    texts = conform(path, dict.fromkeys(TEXTS, str))
    found: dict[str, Any] = {"model": texts["model"]}
    for name, kind in (("rank", int), ("share", float)):
        value = (
            json.loads(texts[name].strip().replace("_", ""))
            if name == "rank" or texts[name].title() != "None"
            else None
        )
        if type(value) not in (kind, int, type(None)):
            raise ValueError(name)
        found[name] = value
    return {name: found[name] for name in texts}


KINDS = (
    Kind("spectra", make_spectra, mutate_spectra, store.load, library_spectra, 300),
    Kind("journal", make_journal, mutate_journal, read_journal, lambda p: None, 300),
    Kind("fingerprint", make_fingerprint, as_json, read_fingerprint, library_fingerprint, 100),
    Kind(
        "characterisation",
        make_characterisation,
        as_json,
        read_characterisation,
        library_characterisation,
        200,
    ),
    Kind(
        "record of a table",
        make_record,
        as_json,
        lambda p: provenance.load(p.with_name("table.csv")),
        lambda p: Provenance(**library_record(p)),
        100,
    ),
    Kind("catalogue", make_catalogue, mutate_catalogue, read_catalogue, library_catalogue, 200),
    Kind(
        "stamp of a download",
        make_stamp,
        flipped,
        lambda p: wheels.cached(_source()),
        lambda p: None,
        50,
    ),
    Kind("notebook", make_notebook, as_json, notebooks.declared_parameters, library_notebook, 100),
    Kind(
        "notebook's parameters",
        make_parameters,
        mutate_parameters,
        read_parameters,
        library_parameters,
        100,
    ),
)
