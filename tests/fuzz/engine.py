"""Cases of a kind, each in a process with limits to memory and time -> one outcome each.

A case is right if its reader refuses in a sentence (`WdlibError`), gives what the file held before
it was changed, or gives what another reader makes of the changed file. All else is a failure: an
other error, an end of the process, a limit passed, another value, or a value where the other reader
refuses.
"""

import ast
import dataclasses
import os
import resource
import select
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz.mutations import Mutation

from wdlib import WdlibError

OUTCOMES = REFUSED, RIGHT, SAME, FAILED = "refused", "right", "as the library", "failed"

BROKEN = "broken"
"""What a process says when the test itself fails, and not a reader."""

MEMORY = 2**28
"""Bytes that a case may take beside what its process had before; the files have some kilobytes."""

SECONDS = 2.0
"""Processor time that a case may take."""

SILENCE = 60.0
"""Seconds after which a case that uses no processor time is ended from outside."""


@dataclass(frozen=True)
class Kind:
    """A reader, and what it is fed.

    make(folder): writes valid files, and returns the one to change. mutate: see `Mutation`. read,
    library: the path of the changed file -> value, by wdlib and by another reader, which raises
    what it likes for a file that is not to be read. cases: of the short run.
    """

    name: str
    make: Callable[[Path], Path]
    mutate: Mutation
    read: Callable[[Path], Any]
    library: Callable[[Path], Any]
    cases: int = 100


@dataclass
class Result:
    """How the cases of a kind ended, and of each failure its number and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)


class Overtime(BaseException):
    """A case has used its processor time."""


def run(kind: Kind, folder: Path, cases: range) -> Result:
    """The outcomes of some cases; case 0 is the file as it was, and has to come out right."""
    kind.make(folder)  # here too, so that what it imports is imported once
    result, number = Result(), cases.start
    while number < cases.stop:
        for outcome, detail in _of_child(kind, folder, range(number, cases.stop)):
            result.counts[outcome] += 1
            if outcome == FAILED or (number == 0 and outcome != RIGHT):
                result.failures[number] = detail or outcome
            number += 1
    return result


def changed(kind: Kind, original: bytes, number: int) -> bytes:
    """The bytes of a case."""
    return kind.mutate(Random(f"{kind.name} {number}"), original) if number else original


def _of_child(kind: Kind, folder: Path, cases: range) -> Iterator[tuple[str, str]]:
    """Outcomes of the cases that one process does before it ends, however it ends."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            _work(kind, folder, cases, write_end)
        except BaseException:  # of the test itself
            os.write(write_end, f"{BROKEN}\t{traceback.format_exc()!r}\n".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    number, buffer = cases.start, b""
    try:
        while number < cases.stop:
            while b"\n" not in buffer:
                ready, *_ = select.select([read_end], [], [], SILENCE)
                more = os.read(read_end, 2**16) if ready else b""
                if not more:
                    why = "the process ended" if ready else f"nothing for {SILENCE:.0f} s"
                    yield FAILED, why
                    return
                buffer += more
            line, _, buffer = buffer.partition(b"\n")
            outcome, _, detail = line.decode("utf-8", "replace").partition("\t")
            if outcome == BROKEN:
                raise RuntimeError(f"{kind.name}, case {number}: {ast.literal_eval(detail)}")
            yield outcome, detail
            number += 1
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _work(kind: Kind, folder: Path, cases: range, pipe: int) -> None:
    """In the child: the cases one by one, a line for each."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    warnings.simplefilter("ignore")
    path = kind.make(folder)
    original = path.read_bytes()
    truth = plain(kind.read(path))
    signal.signal(signal.SIGPROF, _overtime)
    for number in cases:
        path.write_bytes(changed(kind, original, number))
        try:
            with _limits():
                outcome, detail = _outcome(kind, path, truth)
        except Overtime:  # while another error was being told
            outcome, detail = FAILED, "Overtime"
        detail = " ".join(detail.split())[:300]
        os.write(pipe, f"{outcome}\t{detail}\n".encode("utf-8", "replace"))


class _limits:
    """Limits to memory and processor time, lifted again afterwards."""

    def __enter__(self) -> None:
        status = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _overtime(*_: object) -> None:
    raise Overtime


def _outcome(kind: Kind, path: Path, truth: Any) -> tuple[str, str]:
    try:
        found = plain(kind.read(path))
    except WdlibError:
        return REFUSED, ""
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            FAILED,
            f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}",
        )
    try:
        other = plain(kind.library(path))
    except BaseException as error:
        return FAILED, f"read what is refused elsewhere: {error!r}"
    if found == truth:
        return RIGHT, ""
    return (SAME, "") if found == other else (FAILED, "another value than elsewhere")


def plain(value: Any) -> Any:
    """A value as tuples and text that are equal where it is, to the type and the last bit."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        named = [(f.name, plain(getattr(value, f.name))) for f in dataclasses.fields(value)]
        return (type(value).__name__, *named)
    if isinstance(value, dict):
        return (
            "dict",
            *(
                (plain(key), plain(item))
                for key, item in sorted(value.items(), key=lambda pair: repr(pair[0]))
            ),
        )
    if isinstance(value, list | tuple):
        return ("sequence", *map(plain, value))
    return type(value).__name__, repr(value)
