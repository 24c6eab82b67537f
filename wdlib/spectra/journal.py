"""The finished matrices of a job, kept as they come, so that a killed job goes on after them."""

import hashlib
import json
import logging
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from wdlib import paths
from wdlib.checkpoints.plan import Part
from wdlib.spectra.kernel import SingularValues

_log = logging.getLogger(__name__)


class Journal:
    """Finished matrices of a job: lines of JSON, appended one by one, after one that says whose.

    found: (layer, type, expert) -> singular values. created: the day on which the job began.
    Every line has a checksum and names its job. A line that a killed process left torn, that has
    changed since, or that is of another job is passed over; a file of another job begins anew.
    """

    def __init__(self, path: Path | None, job: str) -> None:
        self.path, self.created = path, datetime.now(UTC).date().isoformat()
        self.found: dict[tuple[int, str, int | None], SingularValues] = {}
        self.job = hashlib.sha256(job.encode()).hexdigest()[:16]
        if path is None:
            return
        lines = path.read_bytes().splitlines() if path.is_file() else []
        head, *records = [_parsed(line) for line in lines] or [{}]
        if head.get("job") != self.job or "created" not in head:
            if lines:
                _log.warning("%s is of other weights or another job, and begins anew", path)
            with paths.atomic_write(path) as part:
                part.write_bytes(_line({"job": self.job, "created": self.created}))
            return
        self.created = head["created"]
        for r in (r for r in records if r.get("job") == self.job and "values" in r):
            found = SingularValues(np.array(r["values"]), np.array(r["error"]), r["method"])
            self.found[r["layer"], r["type"], r["expert"]] = found
        self._append(b"\n")  # ends a torn line

    def add(self, part: Part, result: SingularValues) -> None:
        layer, type, expert = part.entry.place
        self.found[layer, type, expert] = result
        record = {"job": self.job, "layer": layer, "type": type, "expert": expert}
        record |= {"values": result.values.tolist(), "error": result.error.tolist()}
        record |= {"method": result.method}
        self._append(_line(record))

    def _append(self, line: bytes) -> None:
        if self.path is not None:
            with self.path.open("ab", buffering=0) as file:
                file.write(line)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any]:
    """The record of a line; empty where its checksum is not that of its text."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return {}
    record = json.loads(text)
    return record if isinstance(record, dict) else {}
