"""Byte ranges of files on the model hub, read as they are asked for; nothing is stored.

Addresses, tokens, redirections and the meaning of an answer are `huggingface_hub`'s. What is added
is persistence: its own file system reads 5 MB ahead of every range and begins a range anew when the
connection breaks; here exactly the range is asked for, and a broken read goes on at its last byte.
"""

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from wdlib import WdlibError, first_line, paths

PREFIX = "hf://"
"""Begins the name of a model that is read from the hub where it lies, as fsspec spells it."""

WHOLE_BYTES = 100_000_000
"""Larger files are never read as a whole."""

_Listed = tuple[str, str, int, str]
"""Commit, name, size and sha256 of a file."""

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """What a read puts up with before it gives up; times in seconds.

    attempts: failures in a row, where one that came after `progress` bytes begins a new row.
    wait: after the first failure, twice as long after each further one, never above `longest`, and
    as long as the hub asks for where it does. timeout: without a byte. window, slowest: a
    connection that brings fewer than `slowest` bytes per second during a window is given up.
    """

    attempts: int = 8
    progress: int = 2**20
    wait: float = 1.0
    longest: float = 300.0
    timeout: float = 20.0
    window: float = 30.0
    slowest: float = 2.0**14


PATIENCE = Patience()
"""That of a model whose name begins with PREFIX."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in a model repository, at one commit. sha256 is empty where the hub does not say.

    etags: the first that came with a range, by which a file that was replaced since is noticed.
    """

    repository: str
    commit: str
    name: str
    size: int
    sha256: str = ""
    patience: Patience = PATIENCE
    etags: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def suffix(self) -> str:
        return self.name[self.name.rfind(".") :]

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}/{self.name}"

    def content(self) -> bytearray:
        """All of a small file, such as a configuration. Raises WdlibError as `read_into` does."""
        if self.size > WHOLE_BYTES:
            raise WdlibError(
                f"{self} has {self.size} bytes, which no such file has: check the model."
            )
        return self.read(0, self.size)

    def read(self, offset: int, size: int) -> bytearray:
        """`size` bytes from `offset`. Raises WdlibError as `read_into` does."""
        content = bytearray(size)
        self.read_into(offset, memoryview(content))
        return content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`.

        Raises WdlibError when the hub refuses, or when `patience` is at its end.
        """
        attempts, done = _Attempts(self.repository, str(self), self.patience), 0
        while done < len(buffer):
            before = done
            try:
                for piece in self._stream(offset + done, len(buffer) - done):
                    if len(piece) > len(buffer) - done:
                        raise ConnectionError("more bytes came than were asked for")
                    buffer[done : done + len(piece)] = piece
                    done += len(piece)
                if done < len(buffer):
                    raise ConnectionError(f"{len(buffer) - done} bytes are missing")
            except Exception as error:  # whatever the client's network library raises
                attempts.failed(error, progress=done - before >= self.patience.progress)

    def _stream(self, offset: int, size: int) -> Iterator[bytes]:
        """The pieces of a range as they arrive on one connection."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repository, self.name, revision=self.commit)
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        headers, timeout = build_hf_headers() | wanted, self.patience.timeout
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.headers.get("Content-Type", "").startswith("text/html"):
                raise WdlibError(
                    f"A web page came in place of {self}: a proxy or a login answers for the hub. "
                    "Open the hub in a browser, then run the same command again."
                )
            if response.status_code != 206 and (offset, size) != (0, self.size):
                raise WdlibError(
                    f"The server gives {self} only as a whole: download the model by giving "
                    f"{self.repository} without {PREFIX}."
                )
            if response.status_code == 206:
                got = response.headers.get("Content-Range")
                etag = response.headers.get("ETag", "")
                if etag and etag != self.etags.setdefault("first", etag):
                    raise WdlibError(
                        f"{self} was replaced on the server while it was read: run the same "
                        "command again."
                    )
                if got != f"bytes {offset}-{offset + size - 1}/{self.size}":
                    raise ConnectionError(f"the answer holds other bytes ({got})")
            since, arrived = time.monotonic(), 0
            for piece in response.iter_raw():
                yield piece
                arrived += len(piece)
                if (seconds := time.monotonic() - since) > self.patience.window:
                    if arrived < seconds * self.patience.slowest:
                        raise TimeoutError(f"only {arrived / seconds:.0f} bytes per second came")
                    since, arrived = time.monotonic(), 0


def files(repository: str, revision: str | None = None) -> dict[str, RemoteFile]:
    """The files of a model repository by name, at the commit that `revision` is now.

    Raises WdlibError when there is no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    attempts = _Attempts(repository, repository, PATIENCE)
    while True:
        try:
            info = HfApi().model_info(
                repository, revision=revision, files_metadata=True, timeout=PATIENCE.timeout
            )
            break
        except Exception as error:  # whatever the client's network library raises
            attempts.failed(error)
    told = [(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else "") for f in info.siblings or ()]
    try:
        listed = paths.of_type([(info.sha or "", *row) for row in told], list[_Listed])
    except ValueError as error:
        raise WdlibError(
            f"The hub's listing of {repository} is damaged ({error}): try again later."
        ) from error
    return {
        name: RemoteFile(repository, commit, name, max(0, size), sha256, PATIENCE)
        for commit, name, size, sha256 in listed
    }


def refusal(repository: str, error: Exception) -> WdlibError | None:
    """The sentence for a repository that the hub has not, or does not give; None for other errors.

    error: what `huggingface_hub` raised.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return WdlibError(
            f"The hub does not give out {repository} without permission: accept the licence on "
            f"{constants.ENDPOINT}/{repository} and log in with `hf auth login`, or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return WdlibError(
            f"The hub has no model {repository}, or shows it only to some: check the spelling, or "
            "log in with `hf auth login` (or set HF_TOKEN) if it is private."
        )
    return None


class _Attempts:
    """Counts failures in a row, waits after each, and gives up with one sentence."""

    def __init__(self, repository: str, what: str, patience: Patience) -> None:
        self.repository, self.what, self.patience, self.failures = repository, what, patience, 0

    def failed(self, error: Exception, *, progress: bool = False) -> None:
        """Return when it is time for the next attempt. Raises WdlibError when there is none."""
        from huggingface_hub import errors

        if isinstance(error, WdlibError):
            raise error
        if sentence := refusal(self.repository, error):
            raise sentence from error
        response = getattr(error, "response", None)
        final = response is not None and response.status_code not in _TRANSIENT
        self.failures = 1 if progress else self.failures + 1
        # Addresses of a CDN are signed: whoever reads the log could use them.
        reason = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", first_line(error))
        if final or isinstance(error, errors.OfflineModeIsEnabled):
            raise WdlibError(
                f"{self.what} cannot be read from the hub ({reason}): check the name, the "
                "revision, the token and the network."
            ) from error
        if self.failures >= self.patience.attempts:
            raise WdlibError(
                f"{self.what} could not be read from the hub, {self.failures} times in a row "
                f"({reason}): check the network and run the same command again."
            ) from error
        wait = _asked(response)
        wait = self._wait(self.failures) if wait is None else min(wait, self.patience.longest)
        left = self.patience.attempts - self.failures
        going_on = wait + sum(self._wait(self.failures + n) for n in range(1, left))
        _log.warning(
            "%s: %s; again in %.0f s, gives up after %d more failures (%.0f s of waiting)",
            *(self.what, reason, wait, left, going_on),
        )
        time.sleep(wait)

    def _wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, where the hub does not say."""
        return min(self.patience.wait * 2 ** (failures - 1), self.patience.longest)


def _asked(response: Any) -> float | None:
    """The seconds that an answer asks to wait for (`Retry-After`, or the hub's `RateLimit`)."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response is None:
        return None
    try:
        if after := response.headers.get("Retry-After"):
            return max(0.0, float(after))
        limit = parse_ratelimit_headers(response.headers)
        return float(limit.reset_in_seconds) if limit and not limit.remaining else None
    except (ValueError, TypeError, AttributeError):  # a date, or what no server should send
        return None
