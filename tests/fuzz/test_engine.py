"""The engine tells each way to fail from the three ways to be right."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
from fuzz import engine
from fuzz.engine import FAILED, REFUSED, RIGHT, SAME, Kind

from wdlib import WdlibError


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("truth")
    return folder / "file"


def refuses(path: Path) -> str:
    raise WdlibError("it is damaged: get another")


def hangs(path: Path) -> str:
    while True:
        pass


def sleeps(path: Path) -> str:
    time.sleep(60)
    return ""


def allocates(path: Path) -> str:
    return str(len(bytearray(2**34)))


def dies(path: Path) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def library(path: Path) -> str:
    if (text := path.read_text()) == "no":
        raise ValueError("refused")
    return text


@pytest.mark.parametrize(
    ("changed", "reader", "outcome", "why"),
    [
        ("truth", Path.read_text, RIGHT, ""),
        ("other", Path.read_text, SAME, ""),
        ("other", refuses, REFUSED, ""),
        ("truth", refuses, REFUSED, ""),
        ("other", lambda path: "truth", RIGHT, ""),
        ("other", lambda path: "third", FAILED, "another value"),
        ("other", lambda path: 1 / 0, FAILED, "ZeroDivisionError at test_engine.py"),
        ("no", Path.read_text, FAILED, "refused elsewhere"),
        ("no", lambda path: "truth", FAILED, "refused elsewhere"),
        ("other", hangs, FAILED, "Overtime"),
        ("other", sleeps, FAILED, "nothing for 1 s"),
        ("other", allocates, FAILED, "MemoryError"),
        ("other", dies, FAILED, "the process ended"),
    ],
)
def test_an_outcome(changed, reader, outcome, why, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SILENCE", 1.0 if reader is sleeps else 20.0)
    monkeypatch.setattr(engine, "SECONDS", 0.2)

    seen = []

    def first_right(path: Path) -> object:
        seen.append(path)
        return "truth" if len(seen) == 1 else reader(path)

    kind = Kind("a kind", make, lambda rng, data: changed.encode(), first_right, library)
    found = engine.run(kind, tmp_path / "files", range(1, 2))
    assert found.counts == {outcome: 1}
    assert why in found.failures.get(1, "")
    assert bool(found.failures) == (outcome == FAILED)


def test_cases_after_a_death_go_on(tmp_path):
    def read(path: Path) -> str:
        return dies(path) if path.read_text() == "die" else path.read_text()

    kind = Kind("a kind", make, lambda rng, data: rng.choice((b"die", b"other")), read, library)
    found = engine.run(kind, tmp_path / "files", range(20))
    deaths = [n for n in range(1, 20) if Random(f"a kind {n}").choice((b"die", b"other")) == b"die"]
    assert list(found.failures) == deaths
    assert found.counts == {RIGHT: 1, FAILED: len(deaths), SAME: 19 - len(deaths)}


def test_a_fault_of_the_test_itself_is_told(tmp_path):
    def mutate(rng: Random, data: bytes) -> bytes:
        raise KeyError("mine")

    kind = Kind("a kind", make, mutate, Path.read_text, library)
    with pytest.raises(RuntimeError, match=r"(?s)a kind, case 1: .*mine"):
        engine.run(kind, tmp_path / "files", range(2))
