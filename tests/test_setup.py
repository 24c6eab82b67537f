"""`make` and its set-up, in a copy: which environment becomes .venv, and what is left alone.

The Pythons are small scripts that write down what they are asked to do.
"""

import re
import shutil
import subprocess
import sys

import pytest

from wdlib import paths

PYTHON = """\
#!/bin/sh
echo "{name} $*" >>"{log}"
case "$*" in
*ensurepip*) exec "{python}" -c "import sys; sys.version_info = {version}
$2" ;;
"-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
*lock.py*) {lock} ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    """A checkout of the files that set-up reads."""
    folder = tmp_path / "checkout"
    shutil.copytree(paths.ROOT / ".ci", folder / ".ci")
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(paths.ROOT / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def tools(tmp_path):
    """The few commands that set-up calls: none of this machine's Pythons is on its PATH."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "env", "dirname", "cmp", "cat", "cp", "ln", "mkdir", "rm", "sed", "make"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return str(tmp_path / "bin")


@pytest.fixture
def python(tmp_path):
    """A function that makes a Python of a version, on the PATH of set-up unless it is elsewhere."""

    def make(version, folder=tmp_path / "bin", *, lock="exit 1", name=None):
        name = name or f"python{version}"
        folder.mkdir(parents=True, exist_ok=True)
        numbers = f"({version.replace('.', ', ')}, 0)"
        log = tmp_path / "log"
        text = PYTHON.format(name=name, log=log, python=sys.executable, version=numbers, lock=lock)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
        return folder / name

    return make


@pytest.fixture
def setup(copy, tmp_path, tools):
    """A function that runs set-up: its result, and what the Pythons were asked beside versions."""

    def run(**variables):
        (tmp_path / "log").write_text("")
        given = {"PATH": tools, **variables}
        done = subprocess.run([copy / ".ci" / "setup"], capture_output=True, text=True, env=given)
        asked = (tmp_path / "log").read_text().splitlines()
        return done, [line for line in asked if "version_info" not in line and line[0] == "p"]

    return run


def made_with(asked):
    """The Python that an environment was made with; None where none was made."""
    makers = [line.split()[0] for line in asked if "-m venv" in line]
    assert len(makers) <= 1
    return makers[0] if makers else None


def test_the_first_python_that_will_do_makes_the_environment_once(setup, python, copy):
    for version in ("3.12", "3.11", "3.14"):
        python(version)
    done, asked = setup()
    assert (done.returncode, done.stderr) == (0, "")
    assert made_with(asked) == "python3.11"
    assert sum("pip install" in line and "-r requirements.lock" in line for line in asked) == 1
    assert sum("--no-deps --no-build-isolation --editable ." in line for line in asked) == 1
    assert setup()[1] == []
    (copy / "pyproject.toml").write_text("")
    assert [line for line in setup()[1] if "pip" in line] == [
        line for line in asked if "--editable" in line
    ]
    (copy / "requirements.lock").write_text("numpy==0\n")
    assert made_with(setup()[1]) == "python3.11"


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (["3.12", "3.13"], "python3.12"),
        (["3.13"], "python3.13"),
        (["3.14"], "python3.14"),
        (["3.13 as python3"], "python3"),
        (["3.10 as python3.11", "3.12"], "python3.12"),
    ],
)
def test_any_of_the_versions_will_do(there, chosen, setup, python):
    for one in there:
        version, _, name = one.partition(" as ")
        python(version, name=name or None)
    assert made_with(setup()[1]) == chosen


def test_the_python_that_is_named_is_taken_or_refused(setup, python, tmp_path, copy):
    python("3.11")
    own = python("3.13", tmp_path / "own place", name="python")
    active = tmp_path / "active"
    python("3.12", active / "bin", name="python", lock="exit 0")
    assert made_with(setup(PYTHON=str(own), VIRTUAL_ENV=str(active))[1]) == "python"
    shutil.rmtree(copy / ".venv")
    old = python("3.10", tmp_path / "old")
    done, asked = setup(PYTHON=str(old))
    assert (done.returncode, asked) == (1, [])
    assert done.stderr.startswith(f"setup: {old} is not a Python 3.11 to 3.14 with venv: install")
    assert not (copy / ".venv").exists()


def test_an_active_environment_that_has_the_lock_is_used(setup, python, tmp_path, copy):
    python("3.11")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        active = tmp_path / variable.lower()
        python("3.12", active / "bin", name="python", lock="exit 0")
        done, asked = setup(**{variable: str(active)})
        assert done.stdout == f"setup: using the active environment {active}\n"
        assert made_with(asked) is None
        assert not any("-r requirements.lock" in line for line in asked)
        assert (copy / ".venv").readlink() == active
        assert sum("--editable ." in line for line in asked) == 1
        assert not any("pip" in line for line in setup()[1])
        (copy / ".venv").unlink()


def test_an_active_environment_that_lacks_something_is_left_alone(setup, python, tmp_path, copy):
    python("3.11")
    active = tmp_path / "active"
    python("3.12", active / "bin", name="python", lock="echo it has no torch==2; exit 1")
    done, asked = setup(VIRTUAL_ENV=str(active))
    assert f"not using the active environment {active}: it has no torch==2\n" in done.stdout
    assert made_with(asked) == "python3.11"
    assert [path.name for path in active.rglob("*")] == ["bin", "python"]
    assert setup(VIRTUAL_ENV=str(active))[1] == []
    assert setup(VIRTUAL_ENV=str(copy / ".venv"))[1] == []


def test_an_environment_that_no_longer_has_the_lock_is_unlinked_and_kept(
    setup, python, tmp_path, copy
):
    python("3.11")
    active = tmp_path / "active"
    python("3.12", active / "bin", name="python", lock="exit 0")
    setup(VIRTUAL_ENV=str(active))
    python("3.12", active / "bin", name="python", lock="exit 1")
    assert made_with(setup()[1]) == "python3.11"
    assert not (copy / ".venv").is_symlink()
    assert (active / "bin" / "python").is_file()


def test_the_lock_is_compared_with_what_is_installed(tmp_path):
    def said(text):
        (tmp_path / "lock").write_text(text)
        command = [sys.executable, paths.ROOT / ".ci" / "lock.py", tmp_path / "lock"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr

    from importlib.metadata import version

    right = f"# a comment\n--only-binary :all:\nscikit_learn=={version('scikit-learn')}\n"
    assert said(right) == (0, "")
    assert said(f"{right}numpy==0.1\n") == (1, "it has no numpy==0.1\n")
    assert said("numpy==0.1\nnowhere==1\n") == (1, "it has no numpy==0.1 and 1 more\n")


# make -----------------------------------------------------------------------------------------


def test_make_alone_prints_what_there_is(copy):
    def made(*words):
        done = subprocess.run(["make", *words], cwd=copy, capture_output=True, text=True)
        return done.stdout

    said = made()
    assert said == made("help")
    targets = re.findall(r"^  make (\S+)  +\S", said, re.M)
    declared = re.search(r"^\.PHONY: (.*)", (copy / "Makefile").read_text(), re.M)[1].split()
    assert sorted(["help", *targets]) == sorted(declared)
    assert not (copy / ".venv").exists()


def test_ci_has_an_environment_of_its_own(copy, tmp_path, tools):
    fake = tmp_path / "bin" / "make"
    fake.unlink()
    fake.write_text('#!/bin/sh\necho "$* ${VIRTUAL_ENV-none} ${CONDA_PREFIX-none}"\n')
    fake.chmod(0o755)
    given = {"PATH": tools, "VIRTUAL_ENV": "/x", "CONDA_PREFIX": "/y"}
    done = subprocess.run([copy / ".ci" / "run"], capture_output=True, text=True, env=given)
    assert done.stdout == "test none none\n"
