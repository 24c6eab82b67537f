"""A real SLURM on this host, over loopback: its three daemons in a folder of their own."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}
"""What is needed, and the Debian package that has it."""

CPUS = 2
PATIENCE = 30
"""Seconds that a daemon may take to start or to stop."""

CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


PLACE = Path("/etc/slurm/slurm.conf")
"""Where SLURM's commands look; a job has no variable that could name another place."""


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start a cluster that lives in `folder`, but for a link to its configuration in PLACE.

    At the end, and after any error, its jobs are cancelled, its daemons stopped, the link removed.

    Raises RuntimeError where the host belongs to a cluster already, or a daemon does not start.
    """
    install()
    if PLACE.exists():
        raise RuntimeError(f"{PLACE} is there: this host has a SLURM that the test would disturb")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(configuration(folder))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    starts = {
        "munged": ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        "slurmctld": ["slurmctld", "-D", "-c"],
        "slurmd": ["slurmd", "-D"],
    }
    running = []
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.unlink(missing_ok=True)  # what a killed test leaves points nowhere
    PLACE.symlink_to(folder / "slurm.conf")
    try:
        for name, command in starts.items():
            with (folder / f"{name}.out").open("wb") as out:
                running.append(subprocess.Popen(command, stdout=out, stderr=out))
            if name == "munged":
                until((folder / "munge.socket").exists, "munged has made no socket")
        idle = ["sinfo", "--noheader", "--format=%T"]
        until(lambda: said(idle) == "idle", "the node is not idle", folder)
        yield
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], check=False)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        PLACE.unlink()


def install() -> None:
    """Install what is missing, on Debian as root; elsewhere it must be there."""
    missing = {package for name, package in PROGRAMS.items() if _path(name) is None}
    if missing:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            subprocess.run(
                ["apt-get", "-qq", *command], env=quiet, check=True, stdout=subprocess.DEVNULL
            )
    os.environ["PATH"] += os.pathsep + "/usr/sbin"


def configuration(folder: Path) -> str:
    """slurm.conf for this host: one node, one partition, free ports."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    return CONFIGURATION.format(
        folder=folder,
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        controller=ports[0],
        daemon=ports[1],
        cpus=min(CPUS, os.cpu_count()),
        megabytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
    )


def until(true, otherwise: str, folder: Path | None = None) -> None:
    """Wait for a condition; the daemons' logs are in the error if it does not come."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            logs = sorted(folder.glob("slurm*.log")) if folder else []
            tails = "\n".join(log.read_text()[-2000:] for log in logs)
            raise RuntimeError(f"{otherwise} after {PATIENCE} s\n{tails}")
        time.sleep(0.2)


def said(command: list[str]) -> str:
    """What a command prints; empty if it fails."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
