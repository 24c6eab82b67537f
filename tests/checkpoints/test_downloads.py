"""Snapshots of the hub, and their copy in the cache."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_hub import COMMIT, Hub, served

from wdlib import paths


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
    with served(handler) as endpoint:
        yield endpoint, handler


SCRIPT = """
import sys, time
from wdlib import WdlibError
from wdlib.checkpoints import files
files._PATIENCE = 0.5
start = time.monotonic()
try:
    c = files.resolve(sys.argv[1])
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
    assert re.match(
        r"ERROR The hub's lab/tiny holds no safetensors .*_model\.bin is a pickle", said
    )
    config = b'{"base_model_name_or_path": "lab/base"}'
    handler.files = {"adapter_config.json": config, "adapter_model.safetensors": b"unwanted"}
    said, _ = resolve_at(endpoint, "lab/tiny", tmp_path)
    assert re.match(r"ERROR The hub's lab/tiny is an adapter for lab/base, and no model", said)
    assert not any("adapter_model" in path for path in handler.requested if "/resolve/" in path)


def test_only_the_files_that_are_read_are_downloaded(hub, tmp_path):
    """Of a repository whose weights lie in a folder, beside others for other libraries."""
    endpoint, handler = hub
    whole = handler.files["model-00001-of-00002.safetensors"]
    handler.files = {
        "config.json": b"{}",
        "inner/model.safetensors": whole,
        "inner/model.fp16.safetensors": b"unwanted",
        "inner/config.json": b"{}",
        "inner/deeper/notes.json": b"{}",
        "other/notes.json": b"{}",
    }
    said, _ = resolve_at(endpoint, "lab/tiny", tmp_path)
    assert said == f"OK tiny hub lab/tiny {COMMIT} model.safetensors"
    taken = {path.partition(COMMIT)[2] for path in handler.requested if "/resolve/" in path}
    assert taken == {"/config.json", "/inner/model.safetensors", "/inner/config.json"}


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
