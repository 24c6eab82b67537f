"""The command: usage, interrupts, lists; what its subcommands do is tested where that is."""

import argparse
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys

import pytest
import tiny

from wdlib import WdlibError, __version__, cli, notebooks
from wdlib.checkpoints import catalogue
from wdlib.cli.parser import joined, parser


@pytest.mark.parametrize("words", [["-p", "rank"], ["-p", "a", "b", "c"], ["--nope"]])
def test_wrong_usage_is_exit_2(words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "00", *words])
    assert caught.value.code == 2


def test_an_interrupt_is_exit_130(monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks.runs, "figures", interrupted)
    assert cli.main(["figures"]) == 130


def test_the_command_starts_without_the_heavy_libraries():
    heavy = {"torch", "transformers", "peft", "papermill", "numpy", "scipy", "gguf", "matplotlib"}
    code = f"import sys, wdlib.cli, wdlib.notebooks; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_catalogue_is_listed(capsys):
    assert cli.main(["models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {row[0]: row for row in (re.split("  +", line) for line in lines)}
    assert re.split("  +", head)[4:] == ["weights from", "stored spectra"]
    assert list(rows) == list(catalogue.models())
    assert rows[catalogue.DEFAULT][2:] == ["SmolLM2", "Apache-2.0", "package index", "rank 192"]
    assert rows["smollm2-360m"][4:] == ["hub", "-"]
    assert rows["llama-3.2-1b"][4:] == ["hub, gated", "-"]
    assert rows["gemma-3-270m"][4] == "package index"


# Help and completion --------------------------------------------------------------------------


def subcommands():
    """The parsers of all subcommands, by name."""
    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return group.choices


EXAMPLES = [
    line.strip()
    for parser in subcommands().values()
    for line in parser.epilog.splitlines()
    if line.startswith("  wdlib ")
]


@pytest.mark.parametrize("name", subcommands())
def test_help_has_an_example_and_every_default(name, capsys):
    parser = subcommands()[name]
    assert any(line.startswith(f"wdlib {name}") for line in EXAMPLES)
    for action in parser._actions:
        is_flag = action.nargs == 0
        if not action.required and not is_flag:
            assert "default" in action.help, action.dest
        assert action.help, action.dest
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert "examples:\n" in capsys.readouterr().out


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_can_be_typed(line):
    words = joined(shlex.split(line)[1:])
    options = parser().parse_args(words)
    for model in (getattr(options, "model", None), getattr(options, "spectra", None)):
        named = model and not re.search(r"[/.]", model)
        assert not named or model in catalogue.models()


def test_the_shell_completes_names():
    pytest.importorskip("argcomplete")

    def offered(line):
        given = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_TYPE": "9"}
        given |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull}
        code = (
            "import os, sys; os.dup2(1, 8); from wdlib import cli; "
            "os.environ.pop('_ARGCOMPLETE_STDOUT_FILENAME'); cli.main([])"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        return [word.strip() for word in done.stdout.split("\v")]

    assert {"models", "merge"} == set(offered("wdlib m"))
    assert "gemma-3-270m" in offered("wdlib fingerprint gem")
    assert "03" in offered("wdlib run 0")
    assert "--rank" in offered("wdlib spectra x --r")


# What is typed, and what is said --------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "rank=64", "03"],
        ["03", "-p", "rank=64"],
        ["-p", "rank", "64", "03"],
        ["03", "-p", "rank", "64"],
        ["-prank=64", "03"],
    ],
)
def test_parameters_are_given_before_or_after_the_notebook(words):
    options = parser().parse_args(joined(["run", *words]))
    assert (options.notebook, options.parameters) == ("03", [("rank", "64")])


def test_a_value_may_begin_with_a_dash():
    options = parser().parse_args(joined(["run", "03", "-p", "x", "-1", "-p", "y=-2"]))
    assert options.parameters == [("x", "-1"), ("y", "-2")]


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(buffered):
    """With a buffer the output fails at its end, without one at the first line."""
    command = f"{shlex.quote(sys.executable)} -m wdlib models | true; exit ${{PIPESTATUS[0]}}"
    given = os.environ | {"PYTHONUNBUFFERED": buffered}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=given)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_job_says_what_it_wrote_and_what_is_next(tmp_path, capsys):
    model, out = str(tiny.write_llama(tmp_path / "model")), tmp_path / "all of it.safetensors"
    assert cli.main(["spectra", model, "--rank", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said == (
        f"wrote {out}: 14 matrices of model, 4 values each\n"
        f"next: wdlib characterise '{out}' --out FILE\n"
    )
    shards = [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    for number, shard in enumerate(shards, start=1):
        words = ["--rank", "4", "--shard", f"{number}/2", "--out", shard]
        assert cli.main(["spectra", model, *words]) == 0
        said = capsys.readouterr().out
        assert f"wrote {shard}: shard {number} of 2, 7 matrices of model, 4 values each" in said
        assert "next: wdlib merge FILES --out FILE, with all 2 shards" in said
    assert cli.main(["merge", *shards, "--out", str(out)]) == 0
    assert f"wrote {out}: 14 matrices of model" in capsys.readouterr().out


def test_a_system_error_is_said_without_its_number(tmp_path, capsys):
    def said(*words):
        assert cli.main(words) == 1
        return capsys.readouterr().err

    absent = "wdlib: nofile.yaml cannot be read (No such file or directory): give the YAML file"
    assert said("experiments", "nofile.yaml").startswith(absent)
    (tmp_path / "file").touch()
    under = str(tmp_path / "file" / "x.safetensors")
    error = said("spectra", str(tiny.write_llama(tmp_path / "m")), "--rank", "4", "--out", under)
    assert "Errno" not in error
    assert str(tmp_path / "file") in error


def test_a_model_that_is_not_there_is_told_in_a_statement(capsys):
    assert cli.main(["fetch", "no-such-model-at-all"]) == 1
    assert capsys.readouterr().err.endswith("an existing folder or an existing file.\n")
    assert cli.main(["fetch", "smolm2-135m-instruct"]) == 1
    said = capsys.readouterr().err
    assert ". Did you mean smollm2-135m-instruct or " in said


# Without the extras ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "module", "extra"),
    [
        (["run", "00"], "papermill", "notebooks"),
        (["run", "00"], "nbformat", "notebooks"),
        (["figures"], "nbformat", "notebooks"),
        (["refresh"], "nbformat", "notebooks"),
        (["experiments"], "yaml", "lora"),
        (["experiments", "--only", "none"], "torch", "lora"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(words, module, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said == (
        f"wdlib: {module} is not installed, it comes with the extra `{extra}`: in the project's "
        f'folder, `pip install ".[{extra}]"`\n'
    )


def test_a_notebook_whose_extra_is_not_installed_names_it(tmp_path, write_notebook):
    cell = "raise ModuleNotFoundError(\"No module named 'lm_eval.tasks'\", name='lm_eval.tasks')"
    notebook = write_notebook(tmp_path / "n.ipynb", cell)
    with pytest.raises(WdlibError, match=r"^n.ipynb cannot run: lm_eval .*the extra `lora`: in"):
        notebooks.run_notebook(notebook, output=tmp_path / "out.ipynb")


def test_every_library_of_an_extra_is_known(monkeypatch):
    for module in ("matplotlib", "pandas", "seaborn", "powerlaw", "ipykernel", "jupyter_client"):
        assert "`notebooks`" in notebooks.runs.lacking(module)
    for module in ("accelerate", "datasets", "lm_eval", "peft", "torch", "transformers", "yaml"):
        assert "`lora`" in notebooks.runs.lacking(module)
    assert notebooks.runs.lacking("nowhere.at.all") == (
        "nowhere is not installed: install it into the environment that wdlib runs in"
    )
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert notebooks.runs.lacking("torch").startswith("torch is not installed: install it")


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "wdlib"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"wdlib {__version__}\n"
    failed = subprocess.run([*command, "run", "no-such"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("wdlib: no single notebook is called 'no-such'")


def test_characters_that_control_the_terminal_are_shown_as_text(capsys):
    assert cli.main(["run", "no\x1b[2Jsuch\x07"]) == 1
    assert "no\\x1b[2Jsuch\\x07" in capsys.readouterr().err


def test_a_folder_is_no_place_for_code(tmp_path):
    """A `signal.py` or `pip.py` in a downloaded model's folder is never run."""
    import tiny

    tiny.write_llama(tmp_path / "model")
    for name in ("signal", "socket", "pickle", "random", "pip"):
        (tmp_path / "model" / f"{name}.py").write_text("open('ran', 'w').close()\n")
    command = [sys.executable, "-P", "-m", "wdlib", "spectra", ".", "--rank", "4"]
    done = subprocess.run(
        [*command, "--workers", "2", "--out", "out.safetensors"],
        cwd=tmp_path / "model",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "out.safetensors").is_file()
    assert not (tmp_path / "model" / "ran").exists()
