"""The command: usage, interrupts, lists; what its subcommands do is tested where that is."""

import subprocess
import sys

import pytest

from wdlib import __version__, cli, notebooks


@pytest.mark.parametrize("words", [["-p", "rank"], ["-p", "a", "b", "c"], ["--nope"]])
def test_wrong_usage_is_exit_2(words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "00", *words])
    assert caught.value.code == 2


def test_an_interrupt_is_exit_130(monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "figures", interrupted)
    assert cli.main(["figures"]) == 130


def test_the_command_starts_without_the_heavy_libraries():
    heavy = {"torch", "transformers", "peft", "papermill", "numpy", "scipy", "gguf", "matplotlib"}
    code = f"import sys, wdlib.cli, wdlib.notebooks; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_catalogue_is_listed(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "hub"]
    assert any("SmolLM2-135M-Instruct" in line and "Apache-2.0" in line for line in lines)


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
