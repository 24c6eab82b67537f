"""A journal belongs to one job: locked, its records bound to it, each with a checksum."""

import threading

import numpy as np
import pytest
import tiny

from wdlib import WdlibError
from wdlib.spectra import jobs, store
from wdlib.spectra.journal import Journal


@pytest.fixture
def half(tmp_path, monkeypatch):
    """A folder with a model, and the journal of a job that was stopped midway."""
    folder, real, left = tiny.write_llama(tmp_path / "toy"), jobs.top_singular_values, [6]

    def stops(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "top_singular_values", stops)
        with pytest.raises(KeyboardInterrupt):
            jobs.compute_to(tmp_path / "out.safetensors", folder, 8)
    return folder, store.journal_path(tmp_path / "out.safetensors")


def test_no_flipped_bit_goes_unseen(half):
    folder, path = half
    whole, written = jobs.compute(folder, 8), path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(written), 60, replace=False):
        flipped = bytearray(written)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        found = jobs.compute(folder, 8, journal=path)
        for t in whole.values:
            np.testing.assert_array_equal(found.values[t], whole.values[t])
            np.testing.assert_array_equal(found.error[t], whole.error[t])


def test_records_of_another_job_are_passed_over(half, tmp_path):
    folder, path = half
    mine = path.read_bytes().splitlines(keepends=True)
    jobs.compute(tiny.write_llama(tmp_path / "other", seed=1), 8, journal=tmp_path / "theirs")
    theirs = (tmp_path / "theirs").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*mine, *theirs[1:]]))
    kept = Journal(path, "made by nobody")
    assert kept.found == {}
    path.write_bytes(b"".join([*mine, *theirs[1:]]))
    found, expected = jobs.compute(folder, 8, journal=path), jobs.compute(folder, 8)
    for t in expected.values:
        np.testing.assert_array_equal(found.values[t], expected.values[t])


def test_a_second_job_with_the_same_file_waits_for_nobody(tmp_path, monkeypatch):
    folder, real = tiny.write_llama(tmp_path / "toy"), jobs.top_singular_values
    begun, go_on = threading.Event(), threading.Event()

    def waits(*args, **options):
        begun.set()
        go_on.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(jobs, "top_singular_values", waits)
    out = tmp_path / "out.safetensors"
    first = threading.Thread(target=jobs.compute_to, args=(out, folder, 8))
    first.start()
    begun.wait(60)
    with pytest.raises(WdlibError, match=r"another job is writing out\.safetensors"):
        jobs.compute_to(out, folder, 4)
    go_on.set()
    first.join(60)
    assert store.load(out).rank == 8
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []
