"""A wheel, unpacked elsewhere, in a folder that is no checkout: what it carries, what it writes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

from wdlib import paths
from wdlib.checkpoints.catalogue import DEFAULT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
SOURCES = ("wdlib", "data", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder where a wheel of this checkout is unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    source, wheels = folder / "source", folder / "wheels"
    ignored = shutil.ignore_patterns("cache", "__pycache__")
    for name in SOURCES:
        path = paths.ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*PIP, *build, str(source)], check=True)
    (wheel,) = wheels.iterdir()
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*PIP, *install, str(wheel)], check=True)
    shutil.rmtree(source)
    return folder / "site"


@pytest.fixture
def python(site, tmp_path):
    """A function that runs the interpreter on the installed copy in an empty folder."""
    (tmp_path / "work").mkdir()

    def run(*words, **variables):
        given = {k: v for k, v in os.environ.items() if not k.startswith(("WDLIB_", "XDG_"))}
        given |= {"PYTHONPATH": str(site), "HOME": str(tmp_path / "home"), **variables}
        where = {"cwd": tmp_path / "work", "env": given}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **where)
        assert "Traceback" not in done.stderr
        return done

    return run


PLACES = """
import json
from wdlib import paths
names = ("PACKAGE", "CATALOGUE", "SPECTRA", "RESULTS", "OWN_RESULTS", "CACHE", "FIGURES")
print(json.dumps({name: str(getattr(paths, name)) for name in names}))
"""


def test_it_carries_what_is_known_and_writes_where_the_user_is(python, site, tmp_path):
    found = json.loads(python("-c", PLACES).stdout)
    assert found["PACKAGE"] == str(site / "wdlib")
    for name in ("CATALOGUE", "SPECTRA", "RESULTS"):
        assert found[name].startswith(str(site / "wdlib" / "data"))
    for name in ("OWN_RESULTS", "FIGURES"):
        assert found[name].startswith(str(tmp_path / "work"))
    assert found["CACHE"].startswith(str(tmp_path / "home"))
    moved = json.loads(python("-c", PLACES, WDLIB_HOME="there", WDLIB_CACHE="kept").stdout)
    assert moved["OWN_RESULTS"] == str(tmp_path / "work" / "there" / "data" / "results")
    assert moved["FIGURES"] == str(tmp_path / "work" / "there" / "figures")
    assert moved["CACHE"] == str(tmp_path / "work" / "kept")


def test_a_checkpoint_of_ones_own_is_compared_with_the_models_that_are_known(python, tmp_path):
    tiny.write_llama(tmp_path / "mine")
    done = python("-m", "wdlib", "fingerprint", str(tmp_path / "mine"), "--rank", "4")
    assert done.returncode == 1, done.stderr  # none of them is a relative
    known = {path.stem for path in (paths.RESULTS / "fingerprints").glob("*.json")}
    assert sum(name in done.stdout for name in known) >= 3
    (kept,) = (tmp_path / "home").rglob("fingerprints/mine-*.json")
    assert f"stored in {kept}" in done.stdout
    assert list((tmp_path / "work").iterdir()) == []


def test_the_stored_models_need_no_weights(python):
    done = python("-m", "wdlib", "stored")
    assert f"spectra  {DEFAULT}  192  up to date" in done.stdout
    assert f"fingerprint  {DEFAULT}  16  up to date" in done.stdout
    stored = list((paths.RESULTS / "characterisation").glob("*-r*.json"))
    assert done.stdout.count("characterisation  ") == len(stored) > 0
    code = f"from wdlib import spectra; print(spectra.of({DEFAULT!r}, 16).rank)"
    assert python("-c", code).stdout == "16\n"
    assert python("-m", "wdlib", "experiments", "--dry-run").stdout.count("to do") > 50


def test_what_needs_a_checkout_says_so(python):
    done = python("-m", "wdlib", "run", "03")
    assert done.returncode == 1
    assert "notebooks" in done.stderr
    assert "checkout" in done.stderr
