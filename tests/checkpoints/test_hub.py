"""Weights read from a hub where they lie: a small hub of our own, which can misbehave."""

import dataclasses
import json
import math
import re
import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from tiny import sha256
from tiny_hub import COMMIT, Hub, served

from wdlib import WdlibError
from wdlib.checkpoints import catalogue, files, hub, stream
from wdlib.checkpoints.hub import Patience, RemoteFile
from wdlib.checkpoints.plan import inventory, projection_parts
from wdlib.spectra import jobs

QUICK = Patience(
    attempts=4, progress=64, wait=0.001, longest=0.1, timeout=10.0, window=10.0, slowest=1000.0
)

HASTY = dataclasses.replace(QUICK, timeout=0.3, window=0.2)
"""For a server that is silent or slow. A busy one may be taken for it."""

LAYERS, HIDDEN = 3, 384


class RangeHub(Hub):
    """A hub that sends on to a storage which gives ranges, and fails as `faults` says, in turn.

    sent: bytes of all answers. asked: (name, first byte, last byte) of every range.
    """

    protocol_version = "HTTP/1.1"
    faults: list[str]
    sent: list[int]
    asked: list[tuple[str, int, int]]
    token: str

    def do_GET(self):
        name = self.path.split("?")[0].partition(f"/resolve/{COMMIT}/")[2]
        if re.match(r"/api/models/lab/(tiny|gated|private)\b.*[?&]blobs=", self.path):
            return self.answer(200, json.dumps(self.info()).encode())
        if re.match(rf"/lab/(tiny|private)/resolve/{COMMIT}/", self.path):
            if "/private/" in self.path and self.headers.get("Authorization") != self.token:
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self.answer(302, b"", {"Location": f"/storage/{name}"})
        if self.path.startswith("/storage/"):
            return self.give(self.path.removeprefix("/storage/"))
        return super().do_GET()

    def info(self) -> dict:
        files = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": sha256(data)[:40],
                **({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}}
                   if name.endswith(".safetensors") else {}),
            }
            for name, data in self.files.items()
        ]  # fmt: skip
        return {"id": "lab/tiny", "sha": COMMIT, "siblings": files}

    def give(self, name: str) -> None:
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        data, size = self.files[name][first : last + 1], len(self.files[name])
        self.asked.append((name, first, last))
        fault = self.faults.pop(0) if self.faults and last - first > 5000 else ""
        if fault.isdigit():
            headers = {"Retry-After": "0"} if fault == "429" else {}
            return self.answer(int(fault), b"{}", headers)
        if fault == "page":
            return self.answer(200, b"<html>log in</html>", {"Content-Type": "text/html"})
        if fault == "whole":
            return self.answer(200, self.files[name])
        begin = first + 1 if fault == "shifted" else first
        headers = {"Content-Range": f"bytes {begin}-{last}/{size}"}
        headers["ETag"] = sha256(self.files[name])
        half = len(data) // 2
        if fault == "short":
            return self.answer(206, data[:half], headers)
        if fault == "long":
            return self.answer(206, data + data, headers)
        if not fault or fault == "shifted":
            return self.answer(206, data, headers)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", headers["Content-Range"])
        self.end_headers()
        if fault == "silent":
            time.sleep(2 * HASTY.timeout)
        elif fault == "drip":
            for i in range(200):
                self.wfile.write(data[i : i + 1])
                time.sleep(0.01)
        else:
            self.wfile.write(data[:half])
            self.wfile.flush()
            if fault == "reset":  # with unsent data and no time to linger, closing is a reset
                linger = b"\1\0\0\0\0\0\0\0"
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.sent.append(len(body))
        super().answer(status, body, headers)

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client has had enough
            self.close_connection = True


def write_shards(folder: Path, shards: int = 3) -> dict[str, bytes]:
    """A bfloat16 Llama in shards, as files of a repository."""
    tensors = tiny.llama_tensors(LAYERS, HIDDEN)
    folder.mkdir()
    weight_map = {}
    for i in range(shards):
        header, content, name = {}, b"", f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        for tensor, matrix in list(tensors.items())[i::shards]:
            span = [len(content), len(content) + 2 * matrix.size]
            header[tensor] = {"dtype": "BF16", "shape": matrix.shape, "data_offsets": span}
            content += (matrix.view("<u4") >> 16).astype("<u2").tobytes()
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + content)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "consolidated.safetensors").write_bytes(b"unwanted")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    write_shards(folder)
    return folder


@pytest.fixture
def server(folder, monkeypatch) -> Iterator[type[RangeHub]]:
    """The handler of a hub that huggingface_hub takes for the real one."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    fresh = {"faults": [], "sent": [], "asked": [], "requested": [], "token": ""}
    handler = type("OneHub", (RangeHub,), {"files": files, **fresh})
    with served(handler) as endpoint:
        use(monkeypatch, endpoint)
        yield handler
        close_session()


def use(monkeypatch, endpoint: str) -> None:
    """Make an address the hub, and everything quick."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub, "PATIENCE", QUICK)


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


# What comes, and how much of it --------------------------------------------------------------


def test_the_matrices_and_their_provenance_are_those_of_a_copy(server, folder):
    assert inventory("hf://lab/tiny") == inventory(folder)
    assert_equal(tiny.read("hf://lab/tiny"), tiny.read(folder))
    there, here = jobs.compute("hf://lab/tiny", 4), jobs.compute(folder, 4)
    assert there.model == "tiny"
    assert there.provenance["source"] == "hub lab/tiny"
    assert there.provenance["revision"] == COMMIT
    for key in ("sha256", "quantisation", "methods", "largest relative error"):
        assert there.provenance[key] == here.provenance[key]
    for t in here.values:
        np.testing.assert_array_equal(there.values[t], here.values[t])


@pytest.mark.parametrize("kind", ["q", "k", "down"])
def test_little_more_than_the_matrices_asked_for_is_sent(server, kind):
    parts = projection_parts("hf://lab/tiny", types=[kind])
    wanted = sum(part.stored for part in parts)
    assert wanted == sum(2 * math.prod(part.entry.shape) for part in parts)
    server.sent.clear()
    jobs.compute("hf://lab/tiny", 4, types=(kind,))
    assert wanted < sum(server.sent) < 1.05 * wanted
    assert "consolidated.safetensors" not in {name for name, *_ in server.asked}


def test_one_file_without_index_and_a_name_of_the_catalogue(server, monkeypatch, folder):
    whole = {"config.json": server.files["config.json"]}
    whole["model.safetensors"] = server.files["model-00001-of-00003.safetensors"]
    server.files = whole | {"other.safetensors": b"unwanted"}
    model = catalogue.Model("small", "lab/tiny", "Lab", "MIT", False, (catalogue.Source("hub"),))
    monkeypatch.setattr(catalogue, "models", lambda: {"small": model})
    checkpoint = files.resolve("hf://small")
    assert [str(file) for file in checkpoint.files] == ["hf://lab/tiny/model.safetensors"]
    assert (checkpoint.name, checkpoint.source) == ("small", "hub lab/tiny")
    assert files.content_hash(checkpoint) == sha256(whole["model.safetensors"])
    plain = dataclasses.replace(checkpoint.files[0], sha256="")
    unknown = dataclasses.replace(checkpoint, files=(plain,))
    assert files.content_hash(unknown) == files.content_hash(checkpoint)


def test_reading_is_one_matrix_ahead_and_no_more(server):
    matrices = stream.projections("hf://lab/tiny", types=["q"])
    server.asked.clear()
    for number in range(1, LAYERS + 1):
        next(matrices)
        ahead = min(number + 1, LAYERS)
        end = time.monotonic() + 5
        while len(server.asked) < ahead and time.monotonic() < end:
            time.sleep(0.001)  # this matrix is in use, and the next is being fetched
        time.sleep(0.02)
        assert len(server.asked) == ahead


def test_memory_is_that_of_a_few_matrices(server):
    jobs.compute("hf://lab/tiny", 4, types=("q",))
    tracemalloc.start()
    for projection in stream.projections("hf://lab/tiny", types=["up", "down"]):
        del projection
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * HIDDEN * HIDDEN * 1.5


def test_a_token_is_sent_and_needed(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "Bearer hf_secret"
    assert inventory("hf://lab/private")
    assert "hf_secret" not in repr(files.resolve("hf://lab/private"))
    server.token = "Bearer other"
    wanted = r"no model lab/private, or shows it only.*hf auth login.*HF_TOKEN"
    with pytest.raises(WdlibError, match=wanted):
        inventory("hf://lab/private")
    stale = {"X-Error-Message": "Invalid credentials in Authorization header"}
    server.do_GET = lambda self: self.answer(401, b"{}", stale)
    with pytest.raises(WdlibError, match=r"lab/private cannot be read .*\(.*401.*the token and"):
        inventory("hf://lab/private")


# Faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["429", "500", "502", "503", "reset", "cut", "short", "long", "shifted"]
)
def test_faults_lose_nothing(server, folder, fault, caplog):
    server.faults = [fault, "", fault, fault]
    assert_equal(tiny.read("hf://lab/tiny", types=["q"]), tiny.read(folder, types=["q"]))
    assert server.faults == []
    assert len([r for r in caplog.records if r.name == "wdlib.checkpoints.hub"]) == 3


def test_a_silent_server_is_asked_again(server, folder, monkeypatch, caplog):
    monkeypatch.setattr(hub, "PATIENCE", HASTY)
    server.faults = ["silent"]
    assert_equal(tiny.read("hf://lab/tiny", types=["q"]), tiny.read(folder, types=["q"]))
    assert server.faults == []
    assert "timed out" in caplog.text


def test_a_drip_is_given_up_and_asked_again(server, folder, monkeypatch, caplog):
    monkeypatch.setattr(hub, "PATIENCE", dataclasses.replace(HASTY, timeout=QUICK.timeout))
    server.faults = ["drip"]
    assert_equal(tiny.read("hf://lab/tiny", types=["q"]), tiny.read(folder, types=["q"]))
    assert "bytes per second came" in caplog.text
    first, second = [begin for _, begin, last in server.asked if last - begin > 5000][:2]
    assert first < second < first + 200  # not all 200 were waited for, and none was asked for again


def test_a_broken_connection_goes_on_at_the_byte_where_it_stopped(server):
    server.faults = ["cut"]
    tensor = projection_parts("hf://lab/tiny", types=["o"], layers=[1])[0].tensor
    server.asked.clear()
    tiny.read("hf://lab/tiny", types=["o"], layers=[1])
    last = tensor.offset + tensor.size - 1
    begins = [first for _, first, end in server.asked if end == last]
    assert begins == [tensor.offset, tensor.offset + tensor.size // 2]


@pytest.mark.parametrize("fault", ["500", "429", "shifted"])
def test_patience_ends_with_one_sentence(server, fault):
    plan = projection_parts("hf://lab/tiny", types=["q"])
    server.faults = [fault] * 20
    server.asked.clear()
    with pytest.raises(WdlibError, match=r"^hf://lab/tiny/model.*4 times in a row \(.*\): check"):
        stream.read(plan[0])
    assert len(server.asked) == QUICK.attempts


def test_progress_begins_a_new_row_of_failures(server, folder):
    server.faults = ["cut"] * 6  # more than `attempts`, but each brings half of what is missing
    assert_equal(
        tiny.read("hf://lab/tiny", types=["q"], layers=[0]),
        tiny.read(folder, types=["q"], layers=[0]),
    )
    assert server.faults == []


def test_waiting(server, monkeypatch, caplog):
    waited = []
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    patience = Patience(attempts=9, wait=1.0, longest=20.0)
    attempts = hub._Attempts("lab/tiny", "a file", patience)
    for _ in range(7):
        attempts.failed(ConnectionError("gone"))
    assert waited == [1, 2, 4, 8, 16, 20, 20]
    said = [
        re.search(r"after (\d+) more failures \((\d+) s of", m).groups() for m in caplog.messages
    ]
    assert said == [(str(8 - n), f"{sum([*waited, 20][n:]):.0f}") for n in range(7)]
    attempts.failed(ConnectionError("gone"), progress=True)
    assert waited[-1] == 1

    class Answer(Exception):
        response = type("Response", (), {"status_code": 429, "headers": {}})

    for headers, seconds in [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "999"}, 20),
        ({"ratelimit": '"resolvers";r=0;t=11'}, 11),
        ({"ratelimit": '"resolvers";r=3;t=11'}, 2),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 2),
    ]:
        Answer.response.headers = headers
        attempts.failures = 1
        attempts.failed(Answer())
        assert waited[-1] == seconds


def test_a_server_without_ranges_is_not_read_to_its_end(server):
    plan = projection_parts("hf://lab/tiny", types=["q"])
    server.faults = ["whole"]
    with pytest.raises(WdlibError, match=r"only as a whole: download .* lab/tiny without hf://"):
        stream.read(plan[0])


def test_a_page_in_place_of_a_file_is_called_so(server):
    plan = projection_parts("hf://lab/tiny", types=["q"])
    server.faults = ["page"]
    with pytest.raises(WdlibError, match=r"A web page came in place of hf://lab/tiny/.*a proxy"):
        stream.read(plan[0])


def test_a_file_that_is_gone_is_asked_for_once(server):
    file = RemoteFile("lab/tiny", COMMIT, "absent.safetensors", 10**6, patience=QUICK)
    server.files = {}
    server.faults = ["404", "404"]
    server.files["absent.safetensors"] = b"\0" * 10**6
    with pytest.raises(WdlibError, match=r"absent\.safetensors cannot be read .*\(.*404"):
        file.read(0, 10**6)
    assert server.faults == ["404"]


# What cannot be had --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "lab/gated",
            r"does not give out lab/gated .*accept the licence on \S+/lab/gated and.*HF_TOKEN",
        ),
        ("lab/absent", r"no model lab/absent, .*check the spelling, or log in"),
        ("lab/broken", r"lab/broken could not be read .* 4 times in a row \(.*500"),
        ("lab/tiny@nowhere", r"lab/tiny cannot be read from the hub \(.*404.*the revision"),
        ("tiny", r"hf://tiny names no model: write hf://organisation/name"),
        ("", r"hf:// names no model"),
    ],
)
def test_models_that_cannot_be_had(server, monkeypatch, model, message):
    if "@" in model:
        monkeypatch.setattr(RangeHub, "info", lambda self: {}[0], raising=True)
        server.do_GET = lambda self: self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    with pytest.raises(WdlibError, match=message) as caught:
        inventory(f"hf://{model}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"holds no \.safetensors"),
        (("a.safetensors", "b.safetensors"), "holds 2 files with weights"),
        (("x/model.safetensors", "y/model.safetensors"), r"2 folders in it do \(x, y\)"),
        (("model.onnx",), "weights as ONNX keeps them"),
        (
            ("a.gguf",),
            r"holds a\.gguf and no safetensors: download it with `hf download lab/tiny a",
        ),
    ],
)
def test_repositories_without_weights_that_can_be_read(server, names, message):
    server.files = {"config.json": b"{}", **dict.fromkeys(names, b"")}
    with pytest.raises(WdlibError, match=rf"hub's lab/tiny .*{message}"):
        files.resolve("hf://lab/tiny")


def test_the_one_folder_of_a_repository_that_holds_the_weights(server):
    expected = inventory("hf://lab/tiny")
    server.files = {f"inner/{name}": content for name, content in server.files.items()}
    checkpoint = files.resolve("hf://lab/tiny")
    assert str(checkpoint.config) == "hf://lab/tiny/inner/config.json"
    assert inventory(checkpoint) == expected


def test_an_index_that_is_broken_or_names_what_is_not_there(server):
    del server.files["model-00002-of-00003.safetensors"]
    with pytest.raises(WdlibError, match=r"lacks model-00002-of-00003\.safetensors, which"):
        files.resolve("hf://lab/tiny")
    server.files["model.safetensors.index.json"] = b"[]"
    with pytest.raises(WdlibError, match=r"lab/tiny/model\S+index\.json is corrupt"):
        files.resolve("hf://lab/tiny")


def test_a_hub_out_of_reach_and_offline(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(WdlibError, match=r"lab/tiny cannot be read from the hub \(.*offline"):
        files.resolve("hf://lab/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    use(monkeypatch, "http://127.0.0.1:9")
    refused = r"could not be read .* \(Connection refused\): check the net"
    with pytest.raises(WdlibError, match=refused):
        files.resolve("hf://lab/tiny")


def test_a_file_that_is_replaced_between_two_ranges_is_noticed(server, monkeypatch):
    """Every range of one file carries one ETag; another one is another file."""
    parts = projection_parts("hf://lab/tiny", types=["q"])
    stream.read(parts[0])
    changed = {name: content[:-1] + b"\0" for name, content in server.files.items()}
    monkeypatch.setattr(server, "files", changed)
    with pytest.raises(WdlibError, match="was replaced on the server"):
        stream.read(parts[0])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry-After": "²"}, None),
        ({"Retry-After": "-5"}, 0.0),
        ({"ratelimit": "r=x;t="}, None),
    ],
)
def test_what_a_server_says_of_waiting_is_read_or_passed_over(headers, seconds):
    from types import SimpleNamespace

    from wdlib.checkpoints import hub as room

    assert room._asked(SimpleNamespace(headers=headers)) == seconds


def test_signed_addresses_do_not_reach_the_log(monkeypatch, caplog):
    from wdlib.checkpoints import hub as room

    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    attempts = room._Attempts("lab/tiny", "a file", Patience(attempts=3, wait=0.0))
    attempts.failed(OSError("Client error for url 'https://cdn.example/x?Signature=SECRET&Key=1'"))
    assert "https://cdn.example/x" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_small_file_that_claims_to_be_huge_is_not_asked_for():
    with pytest.raises(WdlibError, match="10000000000000 bytes"):
        RemoteFile("lab/tiny", COMMIT, "config.json", 10**13).content()
