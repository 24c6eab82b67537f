"""What is stored, and what of it is out of date: told from contents, not from times of files."""

import numpy as np
import pytest

from wdlib import characterise, cli, paths
from wdlib.spectra import store


def planted(rank=8, **provenance):
    """Spectra of a model "planted", of which each value is what it is at any rank."""
    rng = np.random.default_rng(0)
    values = {t: np.sort(rng.pareto(2, (6, 8)) + 1)[:, ::-1][:, :rank] for t in ("q", "k")}
    rows = {t: tuple((layer, None) for layer in range(6)) for t in values}
    error = {t: np.zeros((6, rank)) for t in values}
    return store.Spectra("planted", values, error, rows, {"source": "hub planted", **provenance})


def test_a_characterisation_from_the_command_line_is_that_of_the_library(tmp_path, capsys):
    made = planted()
    store.save(made, tmp_path / "planted.safetensors")
    out = tmp_path / "new" / "planted-r4.json"
    given = ["characterise", str(tmp_path / "planted.safetensors"), "--out", str(out)]
    assert cli.main([*given, "--rank", "4"]) == 0
    found = characterise.load(out)
    assert found == characterise.characterise(made, rank=4)
    assert (found.model, found.rank) == ("planted", 4)
    before = out.read_bytes()
    assert cli.main([*given, "--rank", "9"]) == 1
    assert capsys.readouterr().err.startswith("wdlib: ")
    assert out.read_bytes() == before


KINDS = ("spectra", "null", "characterisation", "fingerprint", "table")
"""In the order in which the workflow needs them: what is made of others, after them."""


def stored(capsys, *arguments):
    """What the workflow reads of the list of what is stored: kind and name -> rank, state."""
    assert cli.main(["stored", *arguments]) == 0
    rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=KINDS.index)
    return {(kind, name): (rank, state) for kind, name, rank, state in rows}


def test_all_that_is_stored_is_up_to_date_whatever_the_times_of_its_files(capsys):
    found = stored(capsys)
    results = paths.RESULTS
    files = {
        "spectra": {path.stem for path in paths.SPECTRA.glob("*.safetensors")},
        "null": {path.stem for path in (paths.SPECTRA / "nulls").glob("*.safetensors")},
        "characterisation": {p.stem for p in (results / "characterisation").glob("*.json")},
        "fingerprint": {path.stem for path in (results / "fingerprints").glob("*.json")},
        "table": {path.relative_to(results).as_posix() for path in results.rglob("*.csv")},
    }
    files["characterisation"] = {n for n in files["characterisation"] if "provenance" not in n}
    assert set(found) == {(kind, name) for kind, names in files.items() for name in names}
    for (kind, name), (rank, state) in found.items():
        # What a machine was measured for is not measured again for a change to its script.
        script = kind == "table" and ("script has changed" in state or "workflow/scripts/" in state)
        assert state == "up to date" or script, (kind, name, state)
        assert name.endswith(f"-r{rank}") or kind != "characterisation"


@pytest.fixture
def planted_store(house):
    """A store with spectra and two characterisations of a planted model, and its spectra's file."""
    file = store.save(planted(), store.stored_file("planted"))
    for rank in (4, 8):
        made = characterise.characterise(planted(), rank=rank, replicates=20)
        characterise.save(made, characterise.stored_file("planted", rank))
    return file


KEYS = [("spectra", "planted"), *(("characterisation", f"planted-r{rank}") for rank in (4, 8))]


def test_a_characterisation_is_out_of_date_with_its_spectra(planted_store, capsys, monkeypatch):
    def states(*arguments):
        found = stored(capsys, *arguments)
        return [found.pop(key)[1] == "up to date" for key in KEYS if key in found]

    assert states() == [True, True, True]
    assert states("planted=hf://planted") == [True, True, True]
    assert states("planted=hf://another") == [False, True, True]
    changed = planted()
    changed.values["k"][5, 6] *= 1.001  # of the values that only the second one uses
    store.save(changed, planted_store)
    assert states() == [True, True, False]
    store.save(planted(rank=4), planted_store)
    assert states() == [True, True, False]
    store.save(planted(sha256="other"), planted_store)
    assert states() == [True, False, False]
    store.save(planted(), planted_store)
    with monkeypatch.context() as patch:
        patch.setattr(characterise, "NORMAL_CONFIDENCE", 0.5)
        assert states() == [True, False, False]
    planted_store.unlink()
    assert states() == [False, False]
    characterise.stored_file("planted", 4).write_text("{")
    assert cli.main(["stored"]) == 1
    assert "planted-r4.json" in capsys.readouterr().err
