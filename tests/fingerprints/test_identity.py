"""Distances between fingerprints, and copies that come back."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from safetensors.numpy import save_file

from wdlib import TYPES, WdlibError, cli, paths
from wdlib.checkpoints import stream
from wdlib.fingerprints import record
from wdlib.fingerprints.clusters import Clusters, K, cluster
from wdlib.fingerprints.identity import (
    COPY_THRESHOLD,
    cluster_distance,
    comparisons,
    deviation_distance,
    distance_table,
    identify,
    pooled_vectors,
    recovery,
    spectral_difference,
)

SHIPPED = sorted(path.stem for path in (paths.RESULTS / "fingerprints").glob("*.json"))


def rng(seed=0):
    return np.random.default_rng(seed)


# Distances -----------------------------------------------------------------------------------


def test_distances_use_the_shared_types_only():
    full = {t: float(i + 1) for i, t in enumerate(TYPES)}
    encoder = {t: 5 * v for t, v in full.items() if t != "gate"}
    assert deviation_distance(full, encoder) == pytest.approx(0, abs=1e-15)
    assert deviation_distance({"q": 1, "k": 0}, {"q": 0, "k": 7, "up": 3}) == pytest.approx(2**0.5)
    one, two = {"q": np.array([1, 0, 0]), "v": np.eye(3)[1]}, {"q": np.array([0.5, 0.5, 0])}
    assert cluster_distance(one, two) == pytest.approx(0.5)
    with pytest.raises(WdlibError, match="share 1 types, and comparing them takes 2"):
        deviation_distance({"q": 1, "k": 1}, {"q": 1, "up": 1})
    with pytest.raises(WdlibError, match="share 0 types"):
        cluster_distance(one, {"k": np.ones(3) / 3})
    with pytest.raises(WdlibError, match="3 and 2 clusters"):
        cluster_distance(one, {"q": np.array([1, 0])})


def test_the_spectral_difference_of_scaled_cut_and_repeated_spectra():
    vectors, _ = tiny.steep_vectors()
    one = {"q": vectors, "up": vectors[::-1]}
    assert spectral_difference(one, one) == 0
    assert spectral_difference({"q": vectors[[3, 3, 9]]}, one) == 0
    assert spectral_difference({"q": vectors[:, :4]}, one) == 0
    far = {"q": np.array([[8.0, 6.0]])}
    assert spectral_difference(far, {"q": np.array([[4.0, 3.0]])}) == pytest.approx(0.5)
    assert spectral_difference({"q": np.array([[4.0, 3.0]])}, far) == pytest.approx(0.5)


def test_three_ways_to_compare_clustering_vectors(saved):
    one, two = (
        record.compute(saved(f"m{i}", tiny.falling_llama(i)), rank=8, k=3) for i in range(2)
    )
    centres = one.clusters.centres[[1, 2, 0]]
    renumbered = replace(one, clusters=Clusters(centres))
    tables = comparisons([one, renumbered, two])
    assert tables["canonical"][0, 1] > 0.1
    assert tables["matched"][0, 1] == tables["pooled"][0, 1] == 0
    for table in tables.values():
        assert_allclose(table, table.T)
        assert_allclose(np.diag(table), 0)
    vectors = pooled_vectors([one, renumbered, two])
    assert tables["pooled"][0, 2] == cluster_distance(vectors[0], vectors[2])


def test_recovery_against_all_orders_by_hand():
    points = np.array([0.0, 1.0, 5.0, 9.0, 20.0])
    table = distance_table(points, lambda a, b: abs(a - b))
    found = recovery(table, ["a", "a", "b", "c", "d"])
    # Only 0 and 1 are each other's nearest, so of the ten places for a pair one gives two hits, and
    # the pairs (1, 2), (2, 3) and (3, 4) give one.
    assert (found.hits, found.tried) == (2, 2)
    assert found.smallest == found.p == pytest.approx(0.1)
    assert found.expected == pytest.approx((2 + 1 + 1 + 1) / 10)
    worst = recovery(table, ["a", "b", "c", "d", "a"])
    assert (worst.hits, worst.p) == (0, 1)
    with pytest.raises(WdlibError, match="5 models are of as many families"):
        recovery(table, list("abcde"))


def test_recovery_is_sure_with_many_models_and_has_its_level():
    families = np.repeat(np.arange(6), 3)
    points = families * 10 + rng().random(18)
    table = np.abs(points[:, None] - points)
    assert recovery(table, families).p == pytest.approx(1e-4)
    p = [
        recovery(np.abs(np.subtract.outer(x, x)), families, permutations=99, seed=1).p
        for x in rng(3).random((200, 18))
    ]
    assert np.mean(np.array(p) <= 0.05) < 0.1
    assert np.mean(p) > 0.4


# Copies --------------------------------------------------------------------------------------


def merged(tensors, size, *, rank=16):
    """Weights plus a random update of low rank, `size` of their Frobenius norm."""
    found = {}
    for i, (name, matrix) in enumerate(tensors.items()):
        rows, columns = matrix.shape
        update = rng([9, i]).standard_normal((rows, rank)) @ rng(i).standard_normal((rank, columns))
        update *= size * np.linalg.norm(matrix) / np.linalg.norm(update)
        found[name] = matrix + update.astype(np.float32)
    return found


def requantised(tensors, kind):
    """Weights as they come back from a GGUF type."""
    return {
        name: stream.requantise(stream.Projection(0, "q", name, matrix), kind).matrix
        for name, matrix in tensors.items()
    }


GUISES = {
    "renamed": lambda t: t,
    "Q8_0": lambda t: requantised(t, "Q8_0"),
    "Q4_0": lambda t: requantised(t, "Q4_0"),
    "adapter": lambda t: merged(t, 0.01),
    "adapter-then-Q4_0": lambda t: requantised(merged(t, 0.01), "Q4_0"),
    "first-half": lambda t: {n: m for n, m in t.items() if int(n.split(".")[2]) < tiny.LAYERS // 2},
}


@pytest.mark.parametrize("guise", GUISES)
def test_copies_come_back_as_what_they_are(saved, guise):
    known = [record.compute(saved(f"m{i}", tiny.falling_llama(i)), rank=16, k=3) for i in range(3)]
    seen = record.compute(saved(guise, GUISES[guise](tiny.falling_llama(1))), rank=16, k=3)
    first, second, _ = identify(seen, known)
    assert first.model == "m1"
    assert first.is_copy
    assert not second.is_copy


def test_a_model_of_other_weights_is_no_copy_and_a_model_is_not_its_own(saved):
    known = [record.compute(saved(f"m{i}", tiny.falling_llama(i)), rank=16, k=3) for i in range(3)]
    stranger = record.compute(saved("other", tiny.falling_llama(7)), rank=16, k=3)
    assert not any(n.is_copy for n in identify(stranger, known))
    assert [n.model for n in identify(known[0], known) if n.is_copy] == []
    assert len(identify(known[0], known)) == 2


def test_a_type_that_is_absent_stays_absent_everywhere(saved):
    encoder = record.compute(saved("encoder", tiny.falling_llama(0, gate=False)), rank=8, k=3)
    decoder = record.compute(saved("decoder", tiny.falling_llama(0)), rank=8, k=3)
    without = tuple(t for t in TYPES if t != "gate")
    assert encoder.types == tuple(encoder.deviation_vector()) == without
    assert tuple(encoder.clustering_vector()) == without
    (seen,) = identify(encoder, [decoder])
    assert seen.spectral == 0
    assert seen.deviation == pytest.approx(0, abs=1e-12)


def test_no_two_shipped_models_are_taken_for_one_another():
    known = [record.of(model) for model in SHIPPED]
    for one in known:
        assert all(n.spectral > 2 * COPY_THRESHOLD for n in identify(one, known))


# The command ---------------------------------------------------------------------------------


def test_the_command_names_a_copy_and_stores_it(saved, capsys):
    original = saved("original", tiny.falling_llama(0))
    assert cli.main(["fingerprint", str(original), "--rank", "8", "--family", "Toy"]) == 0
    assert "no other fingerprint is stored" in capsys.readouterr().out
    saved("stranger", tiny.falling_llama(5))
    copy = saved("unnamed", requantised(tiny.falling_llama(0), "Q4_0"))
    stranger = str(original.with_stem("stranger"))
    assert cli.main(["fingerprint", str(copy), stranger, "--rank", "8"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert "closest: original (distance 0.00" in first
    assert "a copy of original" in first
    assert "no stored model is close" in second
    stored = sorted(path.name[:6] for path in (paths.CACHE / "fingerprints").glob("*.json"))
    assert stored == ["origin", "strang", "unname"]
    assert [f.family for f in record.library()] == ["Toy", "", ""]


def test_the_command_says_that_it_stored_only_what_it_did(saved, capsys):
    path = str(saved("made", tiny.falling_llama(0)))
    said = []
    for rank in ("8", "4", "16"):
        assert cli.main(["fingerprint", path, "--rank", rank, "--clusters", "3"]) == 0
        said.append(capsys.readouterr().out)
    assert ["stored in " in s for s in said] == [True, False, True]
    assert "json keeps rank 8, 3 clusters, family not known" in said[1]
    assert "share in cluster 2" in said[0]
    assert "share in cluster 3" not in said[0]
    (kept,) = record.library()
    assert (kept.rank, kept.k) == (16, 3)
    assert cli._parser().parse_args(["fingerprint", path]).clusters == K


def test_the_command_fails_in_one_line_before_anything_is_stored(saved, capsys):
    good = saved("good", tiny.falling_llama(0))
    assert cli.main(["fingerprint", str(good), "no-such-model"]) == 1
    assert "wdlib: There is no model, file or folder 'no-such-model'" in capsys.readouterr().err
    assert cli.main(["fingerprint", str(good), "--rank", "33"]) == 1
    assert "from 1 to 32" in capsys.readouterr().err
    assert cli.main(["fingerprint", str(good), "--clusters", "43"]) == 1
    assert "ask for 1 to 42 (`--clusters` of `wdlib fingerprint`)" in capsys.readouterr().err
    assert not (paths.CACHE / "fingerprints").exists()


def test_real_weights_in_another_guise_are_recognised(tmp_path, capsys, monkeypatch):
    """The encoder under another name, in other bits and with an adapter merged; and a stranger."""
    real = {p.name: p.matrix for p in stream.projections("all-minilm-l6-v2")}
    unnamed, stranger = tmp_path / "model.safetensors", tmp_path / "noise.safetensors"
    save_file(requantised(merged(real, 0.01), "Q4_0"), unnamed)
    order = rng()
    save_file({n: order.permuted(m.ravel()).reshape(m.shape) for n, m in real.items()}, stranger)
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(cluster.__kwdefaults__, "starts", 20)
    assert cli.main(["fingerprint", str(unnamed), str(stranger)]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    assert "a copy of all-minilm-l6-v2, or made from it" in first
    assert "no stored model is close" in second


def test_a_shipped_model_needs_no_weights(capsys, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", paths.CACHE / "nowhere")
    assert cli.main(["fingerprint", "smollm2-135m-instruct"]) == 0
    out = capsys.readouterr().out
    assert "no stored model is close" in out
    assert all(t in out for t in ("q", "gate", "closest: "))
