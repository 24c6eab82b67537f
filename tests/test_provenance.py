"""What made a table: its record, what is out of date, and tables that go on where they stopped."""

import json

import pytest

from wdlib import WdlibError, paths, provenance
from wdlib.checkpoints.catalogue import DEFAULT, models

ROWS = [{"case": "a", "value": 1}, {"case": "b, c", "value": "0.50"}]


@pytest.fixture
def made(house, monkeypatch):
    """The provenance of a script with one input, in a repository of the test."""
    monkeypatch.setattr(paths, "ROOT", house)
    (house / "script.py").write_text("print()")
    (house / "input.txt").write_text("1")
    return provenance.of(str(house / "script.py"), {"seed": (1, 2)}, inputs=[house / "input.txt"])


@pytest.fixture
def table(made, house):
    path = house / "results" / "folder" / "table.csv"
    provenance.write(ROWS, path, made)
    return path


def test_a_table_is_written_with_its_record(table):
    assert table.read_text() == 'case,value\na,1\n"b, c",0.50\n'
    found = provenance.load(table)
    assert (found.script, found.parameters, found.note) == ("script.py", {"seed": [1, 2]}, "")
    assert found.inputs == {"input.txt": paths.file_sha256(table.parents[2] / "input.txt")}
    assert found.sha256 == paths.file_sha256(table)
    assert {"wdlib", "numpy"} < set(found.versions)
    assert provenance.tables() == [table]
    assert provenance.state(table) == "up to date"


@pytest.mark.parametrize(
    ("file", "content", "state"),
    [
        ("results/folder/table.csv", "case,value\n", "changed since it was written"),
        ("input.txt", "2", "out of date: input.txt changed"),
        ("input.txt", None, "out of date: input.txt changed"),
        ("script.py", "print() # a comment", "the script has changed since"),
        ("script.py", None, "the script has changed since"),
        ("results/folder/table.provenance.json", None, "nothing says what made it"),
    ],
)
def test_what_changed_is_said(table, house, file, content, state):
    (house / file).unlink()
    if content is not None:
        (house / file).write_text(content)
    assert provenance.state(table) == state


def test_weights_are_compared_where_the_catalogue_knows_them(tmp_path):
    weights = [DEFAULT, "all-minilm-l6-v2"]
    found = provenance.of(str(paths.ROOT / "wdlib" / "paths.py"), {}, models=weights)
    known = {f"weights of {name}": models()[name].sources[0].sha256 for name in weights}
    assert found.inputs == known
    path = tmp_path / "table.csv"
    for inputs, state in [
        (known, "up to date"),
        (known | {f"weights of {DEFAULT}": "0" * 64}, f"out of date: weights of {DEFAULT} changed"),
        ({"weights of a/b": "0" * 64, "weights of llama-3-8b": "0" * 64}, "up to date"),
    ]:
        provenance.write(ROWS, path, provenance.Provenance(**{**vars(found), "inputs": inputs}))
        assert provenance.state(path) == state


def test_a_damaged_record_is_named(table):
    for text in ("{", "[]", '{"script": "x"}'):
        provenance.record_file(table).write_text(text)
        with pytest.raises(
            WdlibError, match=r"table\.provenance\.json does not hold a record .*anew"
        ):
            provenance.state(table)


# Tables cell by cell --------------------------------------------------------------------------

CELLS = [("x", 1), ("y", None), ("z", 3)]


class Rows:
    """Two rows for each cell; fails at one of them, if it is told to."""

    def __init__(self, fails=None):
        self.fails, self.asked = fails, []

    def __call__(self, name, number):
        self.asked.append(name)
        if name == self.fails:
            raise KeyboardInterrupt
        return ({"name": name, "value": f"{number} {i}"} for i in range(2))


def test_a_table_goes_on_after_the_cells_that_are_finished(made, house):
    whole, path = house / "whole.csv", house / "table.csv"
    provenance.write_by_cell(CELLS, Rows(), whole, made)
    with pytest.raises(KeyboardInterrupt):
        provenance.write_by_cell(CELLS, Rows(fails="y"), path, made)
    assert not path.exists()
    rest = Rows()
    provenance.write_by_cell(CELLS, rest, path, made)
    assert rest.asked == ["y", "z"]
    assert path.read_bytes() == whole.read_bytes()
    assert provenance.load(path) == provenance.load(whole)
    assert list((house / "cache" / "tables").iterdir()) == []


def test_cells_of_another_script_or_input_are_computed_again(made, house):
    with pytest.raises(KeyboardInterrupt):
        provenance.write_by_cell(CELLS, Rows(fails="z"), house / "table.csv", made)
    (kept,) = (house / "cache" / "tables").iterdir()
    begun = kept.read_text()
    for change in ({"script_sha256": "0"}, {"parameters": {}}, {"inputs": {}}, {"versions": {}}):
        kept.write_text(begun)
        anew = Rows()
        other = provenance.Provenance(**{**vars(made), **change})
        provenance.write_by_cell(CELLS, anew, house / "table.csv", other)
        assert anew.asked == ["x", "y", "z"]
    kept.write_text("{")
    with pytest.raises(
        WdlibError, match=r"table\.json does not hold the finished cells .*: remove"
    ):
        provenance.write_by_cell(CELLS, Rows(), house / "table.csv", made)


def test_the_order_is_that_of_the_cells_whichever_was_finished_first(made, house):
    path = house / "table.csv"
    with pytest.raises(KeyboardInterrupt):
        provenance.write_by_cell([*CELLS[:2], ("w", 0)], Rows(fails="w"), path, made)
    provenance.write_by_cell([("w", 0), *CELLS[:2]], Rows(), path, made)
    assert [line[0] for line in path.read_text().splitlines()[1:]] == list("wwxxyy")
    assert json.loads(provenance.record_file(path).read_text())["script"] == "script.py"
