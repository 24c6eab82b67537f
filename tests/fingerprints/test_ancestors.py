"""Models that are recognised in another guise, what is said of them, and the command."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from wdlib import TYPES, cli, paths
from wdlib.checkpoints import stream
from wdlib.cli.parser import parser
from wdlib.fingerprints import record
from wdlib.fingerprints.ancestors import SAME, identify, report, verdict
from wdlib.fingerprints.clusters import K, cluster


def rng(seed=0):
    return np.random.default_rng(seed)


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
    assert first.relation.share == 1
    assert (first.relation.change <= SAME) == (guise in ("renamed", "first-half"))
    assert not second.is_related


def test_a_model_of_other_weights_is_unrelated_and_a_model_is_not_its_own(saved):
    known = [record.compute(saved(f"m{i}", tiny.falling_llama(i)), rank=16, k=3) for i in range(3)]
    stranger = record.compute(saved("other", tiny.falling_llama(7)), rank=16, k=3)
    assert not any(n.is_related for n in identify(stranger, known))
    assert len(identify(known[0], known)) == 2


def test_a_record_without_invariants_is_named(saved):
    known = record.compute(saved("known", tiny.falling_llama(0)), rank=8, k=3)
    seen = identify(
        record.compute(saved("copy", tiny.falling_llama(0)), rank=8, k=3),
        [replace(known, invariants={})],
    )
    assert not seen[0].is_related
    assert "not compared with known: compute their records anew" in "\n".join(verdict(seen))


def test_a_type_that_is_absent_stays_absent_everywhere(saved):
    encoder = record.compute(saved("encoder", tiny.falling_llama(0, gate=False)), rank=8, k=3)
    decoder = record.compute(saved("decoder", tiny.falling_llama(0)), rank=8, k=3)
    without = tuple(t for t in TYPES if t != "gate")
    assert encoder.types == tuple(encoder.deviation_vector()) == without
    assert tuple(encoder.clustering_vector()) == without
    (seen,) = identify(encoder, [decoder])
    assert seen.spectral == 0
    assert seen.deviation == pytest.approx(0, abs=1e-12)


# The command ---------------------------------------------------------------------------------


def test_the_command_names_a_copy_and_stores_it(saved, capsys):
    original = saved("original", tiny.falling_llama(0))
    assert cli.main(["fingerprint", str(original), "--rank", "8", "--family", "Toy"]) == 1
    assert "no other fingerprint is stored" in capsys.readouterr().out
    saved("stranger", tiny.falling_llama(5))
    copy = saved("unnamed", requantised(tiny.falling_llama(0), "Q4_0"))
    stranger = str(original.with_stem("stranger"))
    assert cli.main(["fingerprint", str(copy), "--rank", "8"]) == 0
    out = capsys.readouterr().out
    assert "made from original, or both from one model: 6 of 6 layers are recognised" in out
    assert "layers: 0-5 from 0-5" in out
    assert "as after fewer bits" in out
    assert cli.main(["fingerprint", stranger, "--rank", "8"]) == 1
    out = capsys.readouterr().out
    assert "no relative among stored models" in out
    assert "what could hide a relative: " in out
    stored = sorted(path.name[:6] for path in (paths.CACHE / "fingerprints").glob("*.json"))
    assert stored == ["origin", "strang", "unname"]
    assert [f.family for f in record.library()] == ["Toy", "", ""]


def test_the_command_says_that_it_stored_only_what_it_did(saved, capsys):
    path = str(saved("made", tiny.falling_llama(0)))
    said = []
    for rank in ("8", "4", "16"):
        assert cli.main(["fingerprint", path, "--rank", rank, "--clusters", "3"]) == 1
        said.append(capsys.readouterr().out)
    assert ["stored in " in s for s in said] == [True, False, True]
    assert "json keeps rank 8, 3 clusters, family not known" in said[1]
    assert "share in cluster 2" in said[0]
    assert "share in cluster 3" not in said[0]
    (kept,) = record.library()
    assert (kept.rank, kept.k) == (16, 3)
    assert parser().parse_args(["fingerprint", path]).clusters == K


def test_the_command_fails_in_one_line_before_anything_is_stored(saved, capsys):
    good = saved("good", tiny.falling_llama(0))
    assert cli.main(["fingerprint", str(good), "no-such-model"]) == 2
    assert "wdlib: There is no model, file or folder 'no-such-model'" in capsys.readouterr().err
    assert cli.main(["fingerprint", str(good), "--rank", "33"]) == 2
    assert "from 1 to 32" in capsys.readouterr().err
    assert cli.main(["fingerprint", str(good), "--clusters", "43"]) == 2
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
    assert cli.main(["fingerprint", str(unnamed)]) == 0
    assert "made from all-minilm-l6-v2, or both from one model" in capsys.readouterr().out
    assert cli.main(["fingerprint", str(stranger)]) == 1
    assert "no relative among stored models" in capsys.readouterr().out


def test_a_shipped_model_needs_no_weights(capsys, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", paths.CACHE / "nowhere")
    assert cli.main(["fingerprint", "smollm2-135m-instruct"]) == 1
    out = capsys.readouterr().out
    assert "no relative among stored models" in out
    assert all(t in out for t in ("q", "gate", "0 of 30"))


def test_what_was_rewritten_and_which_layers_are_from_where_is_said(saved):
    weights, scaled = tiny.falling_llama(0), {}
    for name, matrix in weights.items():
        factor = 3 if "up_proj" in name else 1 / 3 if "down_proj" in name else 1
        scaled[name] = (factor * matrix).astype(np.float32)
    known = record.compute(saved("known", weights), rank=8, k=3)
    (seen,) = identify(record.compute(saved("scaled", scaled), rank=8, k=3), [known])
    assert seen.rewritten == ("up", "down")
    assert "rewritten without changing the function: up, down" in "\n".join(verdict([seen]))

    def moved(name, layer):
        return name.replace(name.split(".")[2], str(layer), 1)

    order = [0, 1, 2, 3, 1, 2, 3, 4, 5]
    stacked = {
        moved(name, i): matrix
        for i, layer in enumerate(order)
        for name, matrix in weights.items()
        if int(name.split(".")[2]) == layer
    }
    (seen,) = identify(record.compute(saved("stacked", stacked), rank=8, k=3), [known])
    assert "  layers: 0-3 from 0-3, 4-8 from 1-5" in verdict([seen])
    assert "9 of 9" in report(known, [seen])


def test_two_checkpoints_are_decided_and_drawn(saved, capsys, house):
    weights = tiny.falling_llama(0)
    one, two = saved("one", weights), saved("two", requantised(weights, "Q8_0"))
    stranger = saved("stranger", tiny.falling_llama(5))
    picture = house / "pair.png"
    pair = ["--rank", "8", "--clusters", "3"]
    assert cli.main(["fingerprint", str(two), str(one), *pair, "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "made from one, or both from one model: 6 of 6 layers are recognised" in out
    assert "two and one are related: 6 of 6 layers" in out
    assert f"wrote {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["fingerprint", str(stranger), str(one), *pair]) == 1
    out = capsys.readouterr().out
    assert "no relative among the layers of one" in out
    assert "Nothing shows that stranger and one are related" in out


def test_a_picture_of_one_model_shows_its_nearest_known_one(saved, capsys, house):
    known, copy = (saved(name, tiny.falling_llama(0)) for name in ("known", "copy"))
    cli.main(["fingerprint", str(known), "--rank", "8"])
    picture = house / "layers.svg"
    assert cli.main(["fingerprint", str(copy), "--rank", "8", "--out", str(picture)]) == 0
    assert b"<svg" in picture.read_bytes()
    wrong = ["fingerprint", str(copy), "--rank", "8", "--out", str(house / "layers.doc")]
    assert cli.main(wrong) == 2
    assert "let it end in .png, .svg or .pdf" in capsys.readouterr().err
    three = ["fingerprint", *[str(known)] * 3, "--out", str(picture)]
    assert cli.main(three) == 2
    assert "give one or two models" in capsys.readouterr().err
