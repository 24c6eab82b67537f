"""wdlib.fingerprints: closed forms, planted clusters, copies that come back, the command."""

import json
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import save_file
from scipy.stats import t as student_t
from sklearn.metrics import adjusted_rand_score

from wdlib import TYPES, WdlibError, cli, paths
from wdlib.checkpoints import catalogue, stream
from wdlib.fingerprints import clusters, record, values
from wdlib.fingerprints.clusters import Clusters, K, choices, cluster, clustering_vector, matched
from wdlib.fingerprints.identity import (
    COPY_THRESHOLD,
    cluster_distance,
    comparisons,
    deviation_distance,
    distance_table,
    identify,
    matched_distance,
    pooled_vectors,
    recovery,
    report,
    spectral_difference,
)
from wdlib.fingerprints.movement import READINGS, changed, effect, movements
from wdlib.fingerprints.values import (
    Moments,
    ValueDistribution,
    deviation_vector,
    moments,
    pooled,
    quantiles,
    tail_ratio,
    value_tables,
)
from wdlib.spectra import jobs, store

SHIPPED = sorted(path.stem for path in (paths.RESULTS / "fingerprints").glob("*.json"))


def rng(seed=0):
    return np.random.default_rng(seed)


# Standard deviations --------------------------------------------------------------------------


def test_moments_are_numpys_in_one_pass_over_blocks(monkeypatch):
    monkeypatch.setattr(values, "BLOCK", 1000)
    matrix = rng().standard_normal((57, 91)).astype(np.float32) + 3
    found = moments(matrix)
    exact = matrix.astype(np.float64)
    assert found.n == exact.size
    assert_allclose(found.mean, exact.mean(), rtol=1e-14)
    assert_allclose(found.deviation, exact.std(), rtol=1e-13)
    assert moments(matrix.T.copy().T).n == exact.size


def test_moments_keep_their_digits_where_sums_of_squares_lose_them():
    values = 1e8 + rng().standard_normal(5000)
    exact = (values - 1e8).std()
    assert_allclose(moments(values).deviation, exact, rtol=1e-7)
    naive = np.sqrt(max(np.mean(values**2) - np.mean(values) ** 2, 0))
    assert abs(naive / exact - 1) > 1e-3


def test_only_a_block_is_copied(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(values, "BLOCK", 10_000)
    matrix = np.ones((2000, 1000), np.float32)
    tracemalloc.start()
    moments(matrix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # bytes; the matrix has eight million


def test_pooled_moments_are_those_of_all_values_together():
    parts = [rng(i).standard_normal(n) * (i + 1) + i for i, n in enumerate((5, 300, 41))]
    together = np.concatenate(parts)
    found = pooled(moments(part) for part in parts)
    assert found.n == together.size
    assert_allclose([found.mean, found.deviation], [together.mean(), together.std()], rtol=1e-13)
    assert Moments(3, 1.0, 6.0) + Moments(1, 5.0, 0.0) == Moments(4, 2.0, 18.0)


@pytest.mark.parametrize(
    ("normalise", "wanted"), [("l2", (0.6, 0.8)), ("sum", (3 / 7, 4 / 7)), ("max", (0.75, 1))]
)
def test_the_deviation_vector_is_normalised_as_asked(normalise, wanted):
    found = deviation_vector({"q": 0.3, "up": 0.4}, normalise=normalise)
    assert list(found) == ["q", "up"]
    assert_allclose(list(found.values()), wanted)


def test_a_deviation_vector_of_nothing_or_of_an_unknown_kind_is_refused():
    with pytest.raises(WdlibError, match="no normalisation 'l1': choose one of l2, sum, max"):
        deviation_vector({"q": 1.0}, normalise="l1")
    with pytest.raises(WdlibError, match="all zero"):
        deviation_vector({"q": 0.0})


def test_quantiles_and_tail_ratio_of_known_distributions():
    from scipy import stats

    def binned(law, bins=8000):
        edges = np.linspace(-20, 20, bins + 1)
        density = np.diff(law.cdf(edges)) / (edges[1] - edges[0])
        return ValueDistribution(1, 0, 1, 0, (edges[:-1] + edges[1:]) / 2, density)

    normal, laplace = binned(stats.norm()), binned(stats.laplace(scale=0.5**0.5))
    p = [1e-4, 0.1, 0.5, 0.975]
    assert_allclose(quantiles(normal, p), stats.norm.ppf(p), atol=2e-3)
    assert_allclose(tail_ratio(normal), 1, rtol=1e-3)
    wanted = (np.log(2e-4) / np.log(0.5)) / (stats.norm.ppf(1e-4) / stats.norm.ppf(0.25))
    assert_allclose(tail_ratio(laplace), wanted, rtol=2e-3)
    narrow = replace(normal, centres=normal.centres / 10, density=normal.density * 5)
    assert quantiles(narrow, [0.2, 0.9]).tolist() == [-2, 2]


# Clusters -------------------------------------------------------------------------------------


def planted(k=4, per=12, noise=0.01, seed=0):
    """Vectors k^-s of k steepnesses s, each `per` times, of any length; and the truth."""
    index = np.arange(1, 17.0)
    truth = np.repeat(np.arange(k), per)
    shapes = index ** -(0.05 + 0.3 * truth[:, None])
    noisy = shapes * (1 + noise * rng(seed).standard_normal(shapes.shape))
    return noisy * rng(seed + 1).uniform(1, 9, (len(truth), 1)), truth


def test_planted_clusters_are_found_flattest_first_whatever_their_length():
    vectors, truth = planted()
    shuffled = rng(5).permutation(len(truth))
    clusters = cluster({"q": vectors[shuffled][:20], "k": vectors[shuffled][20:]}, k=4, starts=20)
    assert (clusters.assign(vectors) == truth).all()
    shares = clustering_vector({"up": vectors[:18], "q": vectors[12:]}, clusters)
    assert list(shares) == ["q", "up"]
    assert_allclose(shares["up"], [12 / 18, 6 / 18, 0, 0])
    assert_allclose(shares["q"], [0, 1 / 3, 1 / 3, 1 / 3])


def test_unscaled_clusters_go_by_the_norm_of_their_centre():
    vectors = np.concatenate([m * (1 + 0.01 * rng(i).random((9, 5))) for i, m in ((0, 7), (1, 2))])
    clusters = cluster({"q": vectors}, k=2, scaled=False, starts=5)
    assert clusters.assign(vectors).tolist() == [1] * 9 + [0] * 9
    assert_allclose(clusters.centres[0], vectors[9:].mean(axis=0))


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_clusters_of_a_real_model_do_not_hang_on_the_seed_or_on_the_last_digits(model):
    kept = record.of(model)
    wanted = kept.clusters.assign(np.concatenate(list(kept.singular_values.values())))
    noisy = {t: v * (1 + 1e-7 * rng().random(v.shape)) for t, v in kept.singular_values.items()}
    found = cluster(noisy, seed=1).assign(np.concatenate(list(noisy.values())))
    assert adjusted_rand_score(wanted, found) == 1
    assert (wanted == found).all()


def test_clusters_that_cannot_be_are_refused():
    with pytest.raises(WdlibError, match="3 distinct singular value vectors do not make 4"):
        cluster({"q": np.eye(3)[[0, 1, 2, 2]]}, k=4)
    with pytest.raises(WdlibError, match="zero or not finite"):
        cluster({"q": np.array([[1.0, 0], [0, 0]])}, k=1)


def test_matched_clusters_take_the_numbers_of_the_others():
    vectors, _ = planted()
    one = cluster({"q": vectors}, k=4, starts=20)
    other = Clusters(one.centres[[2, 0, 3, 1]] + 1e-6)
    assert_allclose(matched(other, one).centres, one.centres, atol=1e-5)


def test_the_right_number_of_well_separated_clusters_has_the_best_scores():
    vectors, _ = planted()
    scores = {c.k: c for c in choices({"q": vectors}, range(2, 7), resamples=6)}
    assert max(scores.values(), key=lambda c: c.silhouette).k == 4
    assert scores[4].stability == 1
    assert scores[4].spread == 0
    assert scores[4].silhouette > 0.8
    assert scores[6].stability < 0.99


# Distances ------------------------------------------------------------------------------------


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
    vectors, _ = planted()
    one = {"q": vectors, "up": vectors[::-1]}
    assert spectral_difference(one, one) == 0
    assert spectral_difference({"q": vectors[[3, 3, 9]]}, one) == 0
    assert spectral_difference({"q": vectors[:, :4]}, one) == 0
    far = {"q": np.array([[8.0, 6.0]])}
    assert spectral_difference(far, {"q": np.array([[4.0, 3.0]])}) == pytest.approx(0.5)
    assert spectral_difference({"q": np.array([[4.0, 3.0]])}, far) == pytest.approx(0.5)


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


# Fingerprints of models -----------------------------------------------------------------------


LAYERS, SIZES = 6, {"q": (96, 96), "k": (32, 96), "v": (32, 96), "o": (96, 96)}
MLP = {"gate": (128, 96), "up": (128, 96), "down": (96, 128)}
NAMES = {t: f"self_attn.{t}_proj" for t in SIZES} | {t: f"mlp.{t}_proj" for t in MLP}


def matrices(seed, *, slope=0.7, gate=True):
    """Weights of a small decoder whose spectra fall like a power law that differs by type."""
    found = {}
    for layer in range(LAYERS):
        for i, (t, (rows, columns)) in enumerate((SIZES | MLP).items()):
            if t == "gate" and not gate:
                continue
            draw = rng([seed, layer, i])
            falling = np.arange(1, columns + 1.0) ** -(slope * (1 + 0.1 * i) * draw.uniform(0.5, 1))
            matrix = draw.standard_normal((rows, columns)) * falling * draw.uniform(0.5, 1.5)
            found[f"model.layers.{layer}.{NAMES[t]}.weight"] = matrix.astype(np.float32)
    return found


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Empty places for shipped fingerprints and for the cache; quick clusters."""
    for name in ("CACHE", "RESULTS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    monkeypatch.setattr(clusters, "cluster", partial(cluster, starts=20))
    return tmp_path


@pytest.fixture
def saved(house):
    """A function that writes weights as NAME.safetensors and gives the path."""

    def write(name, tensors):
        path = house / f"{name}.safetensors"
        save_file(tensors, path)
        return path

    return write


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


def test_a_fingerprint_holds_what_the_weights_say(saved):
    tensors = matrices(0)
    found = record.compute(saved("made", tensors), rank=8, k=3)
    assert (found.model, found.family, found.types) == ("made", "", TYPES)
    assert (found.rank, found.k, found.matrices) == (8, 3, LAYERS)
    for t in TYPES:
        own = [m for name, m in tensors.items() if NAMES[t] in name]
        values = np.concatenate([m.ravel() for m in own]).astype(np.float64)
        assert_allclose(found.deviations[t], values.std(), rtol=1e-12)
        exact = np.linalg.svd(own[2].astype(np.float64), compute_uv=False)[:8]
        assert_allclose(found.singular_values[t][2], exact, rtol=1e-5)
        assert found.clustering_vector()[t].sum() == pytest.approx(1)
    assert_allclose(np.linalg.norm(list(found.deviation_vector().values())), 1)


def test_a_type_that_is_absent_stays_absent_everywhere(saved):
    encoder = record.compute(saved("encoder", matrices(0, gate=False)), rank=8, k=3)
    decoder = record.compute(saved("decoder", matrices(0)), rank=8, k=3)
    without = tuple(t for t in TYPES if t != "gate")
    assert encoder.types == tuple(encoder.deviation_vector()) == without
    assert tuple(encoder.clustering_vector()) == without
    (seen,) = identify(encoder, [decoder])
    assert seen.spectral == 0
    assert seen.deviation == pytest.approx(0, abs=1e-12)


def test_a_stored_fingerprint_comes_back_and_equal_ones_give_equal_bytes(saved, house):
    found = record.compute(saved("made", matrices(0)), rank=8, k=3, family="Toy")
    path = record.keep(found)
    assert path.parent == paths.CACHE / "fingerprints"
    back = record.load(path)
    assert back.to_json() == found.to_json()
    assert back.family == "Toy"
    assert [f.model for f in record.library()] == ["made"]
    assert record.of(house / "made.safetensors", rank=8, k=3).to_json() == found.to_json()
    fewer = record.of(house / "made.safetensors", rank=4, k=2)
    assert (fewer.rank, fewer.k, fewer.family) == (4, 2, "Toy")
    path.write_text('{"model": "x"}')
    with pytest.raises(WdlibError, match=r"made-\w+\.json does not hold a fingerprint"):
        record.library()


def test_a_folder_named_like_a_shipped_model_is_read(saved, house, monkeypatch):
    monkeypatch.chdir(house)
    shipped = record.compute(saved("made", matrices(0)), rank=8, k=3)
    (house / catalogue.DEFAULT).mkdir()
    saved(f"{catalogue.DEFAULT}/model", matrices(1))
    record.save(shipped, paths.RESULTS / "fingerprints" / f"{catalogue.DEFAULT}.json")
    for model in (f"./{catalogue.DEFAULT}", Path(catalogue.DEFAULT), house / catalogue.DEFAULT):
        found = record.of(model, rank=8, k=3)
        assert (found.model, found.family) == (catalogue.DEFAULT, "")
        assert found.provenance["sha256"] != shipped.provenance["sha256"]


def test_a_shipped_fingerprint_is_not_stored_again(saved):
    found = record.compute(saved("made", matrices(0)), rank=8, k=3)
    shipped = record.save(found, paths.RESULTS / "fingerprints" / "made.json")
    assert record.keep(found) == shipped
    other = record.compute(saved("made", matrices(1)), rank=8, k=3)
    assert record.keep(other).parent == paths.CACHE / "fingerprints"
    assert len(record.library()) == 2


def test_what_is_stored_keeps_its_larger_rank_and_its_family(saved):
    path = saved("made", matrices(0))
    found = record.compute(path, rank=8, k=3, family="Toy")
    file = record.keep(found)
    assert record.keep(found.clustered(rank=4)) == file
    assert record.keep(record.compute(path, rank=4, k=3)) == file
    assert record.load(file).to_json() == found.to_json()
    record.keep(replace(found.clustered(rank=4), family="Other"))
    assert record.load(file).to_json() == replace(found, family="Other").to_json()
    record.keep(record.compute(path, rank=16, k=3))
    assert (record.load(file).rank, record.load(file).family) == (16, "Other")
    assert record.of(path, rank=32, k=3).family == "Other"


def test_who_made_a_fingerprint_is_said_of_the_one_that_is_there(saved):
    found = record.compute(saved("made", matrices(0)), rank=8, k=3)
    assert found.provenance["made by"].endswith("compute(rank=8, k=3)")
    fewer = found.clustered(rank=4, k=2).provenance
    assert fewer["made by"].endswith("clustered(rank=4, k=2)")
    assert fewer | {"made by": ""} == found.provenance | {"made by": ""}


def test_ranks_and_clusters_that_are_not_there_are_refused(saved, monkeypatch):
    path = saved("made", matrices(0))
    with pytest.raises(WdlibError, match="rank 33 is out of range for made.*from 1 to 32"):
        record.of(path, rank=33)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "of", None)
        for k in (0, 43):
            with pytest.raises(WdlibError, match=f"42 matrices of .* do not make {k} clusters"):
                record.of(path, rank=8, k=k)
    found = record.compute(path, rank=8, k=3)
    with pytest.raises(WdlibError, match="holds ranks 1 to 8, not 9"):
        found.clustered(rank=9)
    with pytest.raises(WdlibError, match="do not make 99 clusters"):
        found.clustered(k=99)


def test_halves_are_the_layers_of_even_and_odd_number(saved):
    tensors = matrices(0)
    even, odd = record.compute(saved("made", tensors), rank=8, k=3).halves()
    kept = {n: m for n, m in tensors.items() if int(n.split(".")[2]) % 2}
    values = np.concatenate([m.ravel() for n, m in kept.items() if "q_proj" in n])
    assert_allclose(odd.deviations["q"], values.astype(np.float64).std(), rtol=1e-12)
    assert even.matrices == odd.matrices == LAYERS // 2
    assert not set(map(tuple, even.singular_values["q"])) & set(
        map(tuple, odd.singular_values["q"])
    )


def test_a_mixture_of_experts_has_no_halves_and_says_how_many_matrices_it_has(saved):
    dense = record.compute(saved("made", matrices(0)), rank=8, k=3)
    moments, values = dense.moments, dense.singular_values
    mixture = replace(
        dense,
        moments=moments | {"up": moments["up"] * 4},
        singular_values=values | {"up": np.tile(values["up"], (4, 1))},
    )
    with pytest.raises(WdlibError, match=r"made have \[6, 24\] vectors"):
        mixture.halves()
    assert "6 to 24 matrices of each type" in report(mixture, [])
    assert "6 matrices of each type" in report(dense, [])
    assert json.loads(dense.to_json())["layers"] == 6
    content = json.loads(mixture.to_json())
    assert "layers" not in content
    assert (content["matrices"]["q"], content["matrices"]["up"]) == (6, 24)
    assert record.Fingerprint.from_json(mixture.to_json()).to_json() == mixture.to_json()


def test_three_ways_to_compare_clustering_vectors(saved):
    one, two = (record.compute(saved(f"m{i}", matrices(i)), rank=8, k=3) for i in range(2))
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


def test_value_tables_are_densities_and_shapes_of_every_type(saved):
    densities, shapes = value_tables(saved("made", matrices(0)))
    assert [row["type"] for row in shapes] == list(TYPES)
    for t in TYPES:
        area = sum(row["density"] for row in densities if row["type"] == t) * 40 / 200
        assert area == pytest.approx(1, abs=1e-4)
    assert shapes[0]["n"] == LAYERS * 96 * 96
    assert all(row["tail ratio"] > 1 for row in shapes)


GUISES = {
    "renamed": lambda t: t,
    "Q8_0": lambda t: requantised(t, "Q8_0"),
    "Q4_0": lambda t: requantised(t, "Q4_0"),
    "adapter": lambda t: merged(t, 0.01),
    "adapter-then-Q4_0": lambda t: requantised(merged(t, 0.01), "Q4_0"),
    "first-half": lambda t: {n: m for n, m in t.items() if int(n.split(".")[2]) < LAYERS // 2},
}


@pytest.mark.parametrize("guise", GUISES)
def test_copies_come_back_as_what_they_are(saved, guise):
    known = [record.compute(saved(f"m{i}", matrices(i)), rank=16, k=3) for i in range(3)]
    seen = record.compute(saved(guise, GUISES[guise](matrices(1))), rank=16, k=3)
    first, second, _ = identify(seen, known)
    assert first.model == "m1"
    assert first.is_copy
    assert not second.is_copy


def test_a_model_of_other_weights_is_no_copy_and_a_model_is_not_its_own(saved):
    known = [record.compute(saved(f"m{i}", matrices(i)), rank=16, k=3) for i in range(3)]
    stranger = record.compute(saved("other", matrices(7)), rank=16, k=3)
    assert not any(n.is_copy for n in identify(stranger, known))
    assert [n.model for n in identify(known[0], known) if n.is_copy] == []
    assert len(identify(known[0], known)) == 2


# What is shipped ------------------------------------------------------------------------------


def test_the_shipped_fingerprints_are_those_of_the_stored_spectra_and_pinned_weights():
    from wdlib.checkpoints.catalogue import models

    assert {"smollm2-135m-instruct", "gemma-3-270m", "all-minilm-l6-v2"} < set(SHIPPED)
    for model in SHIPPED:
        kept, known = record.of(model), models()[model]
        assert (kept.model, kept.family, kept.rank, kept.k) == (model, known.family, 16, 7)
        assert kept.provenance["sha256"] == known.sources[0].sha256
        for t, values in store.load(model, rank=16).values.items():
            assert_allclose(kept.singular_values[t], values, rtol=1e-6)
            squares = sum(m.squares for m in kept.moments[t])
            assert (values**2).sum() < squares + sum(m.n * m.mean**2 for m in kept.moments[t])
        assert (paths.RESULTS / "fingerprints" / f"{model}.json").read_text() == kept.to_json()


def test_a_larger_rank_comes_from_the_stored_spectra():
    assert record.of("gemma-3-270m", rank=64, k=3).rank == 64


def test_no_two_shipped_models_are_taken_for_one_another():
    known = [record.of(model) for model in SHIPPED]
    for one in known:
        assert all(n.spectral > 2 * COPY_THRESHOLD for n in identify(one, known))


# The command ----------------------------------------------------------------------------------


def test_the_command_names_a_copy_and_stores_it(saved, capsys):
    original = saved("original", matrices(0))
    assert cli.main(["fingerprint", str(original), "--rank", "8", "--family", "Toy"]) == 0
    assert "no other fingerprint is stored" in capsys.readouterr().out
    saved("stranger", matrices(5))
    copy = saved("unnamed", requantised(matrices(0), "Q4_0"))
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
    path = str(saved("made", matrices(0)))
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
    good = saved("good", matrices(0))
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
    monkeypatch.setattr(clusters, "cluster", partial(cluster, starts=20))
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


# What training moves --------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_margins_are_the_distance_to_the_nearest_border(scaled):
    values, _ = planted(noise=0.1)
    clusters = cluster({"all": values}, k=4, scaled=scaled, starts=20)
    rows = values / np.linalg.norm(values, axis=1, keepdims=True) if scaled else values
    margins, labels = clusters.margins(values), clusters.assign(values)
    assert (margins > 0).all()
    bare = replace(clusters, scaled=False)  # moved vectors are not scaled again
    for shift in rng().standard_normal((50, rows.shape[1])):
        step = 0.999 * margins[:, None] * shift / np.linalg.norm(shift)
        assert (bare.assign(rows + step) == labels).all()
    for row, margin, own in zip(rows, margins, labels, strict=True):
        ways = np.delete(clusters.centres, own, axis=0) - clusters.centres[own]
        steps = 1.001 * margin * ways / np.linalg.norm(ways, axis=1, keepdims=True)
        assert (bare.assign(row + steps) != own).any()


def test_one_cluster_has_no_border():
    values, _ = planted()
    clusters = cluster({"all": values}, k=1, starts=5)
    assert (clusters.margins(values) == np.inf).all()


def descendant(base, size, seed):
    """A model made of another: its spectra and deviations changed by about `size`."""
    noise = rng(seed)
    values = {
        t: -np.sort(-v * (1 + size * noise.standard_normal(v.shape)))
        for t, v in base.singular_values.items()
    }
    moments = {
        t: tuple(replace(m, squares=m.squares * (1 + size * noise.uniform())) for m in parts)
        for t, parts in base.moments.items()
    }
    found = cluster(values, k=base.k, starts=20)
    return replace(base, moments=moments, singular_values=values, clusters=found)


def test_movements_among_a_model_and_its_descendants(saved):
    base = record.compute(saved("made", matrices(0)), rank=8, k=3)
    runs = [descendant(base, size, i) for i, size in enumerate((1e-9, 0.3, 0.3))]
    found = movements(base, runs)
    assert tuple(found) == READINGS
    for name, table in found.items():
        assert table.shape == (4, 4), name
        assert_allclose(np.diag(table), 0, atol=1e-12)
    far = runs[1]
    own, given = far.clustering_vector(), far.clustering_vector(base.clusters)
    assert_allclose(
        found["standard deviations"][0, 2], deviation_distance(base.deviations, far.deviations)
    )
    wanted = cluster_distance(base.clustering_vector(), given)
    assert_allclose(found["clusters of the base"][0, 2], wanted)
    assert wanted > 0
    assert_allclose(found["clusters refitted"][2, 3], matched_distance(far, runs[2]))
    assert cluster_distance(own, given) > 0, "refitting makes a difference here"
    assert found["clusters of the base"][0, 1] == found["clusters refitted"][0, 1] == 0
    changes = changed(base, far)
    assert 0 < sum(c.sum() for c in changes.values()) < base.matrices * len(TYPES)
    assert sum(c.sum() for c in changed(base, runs[0]).values()) == 0
    for t, change in changes.items():
        assert change.shape == (base.matrices,)
        assert (change >= 0).all()
        if not change.any():
            assert_allclose(given[t], base.clustering_vector()[t])


def runs_of(shift, *, seeds=3, common=0.5, seed=0):
    """Distances among a model, at 0, and points: data set i at i * shift, plus seeds' noise."""
    noise = rng(seed)
    points = np.concatenate([
        [0 * noise.standard_normal(5)],
        (np.arange(3)[:, None, None] * shift + noise.standard_normal((3, seeds, 5))
         + common * noise.standard_normal((1, seeds, 5))).reshape(-1, 5),
    ])  # fmt: skip
    data = np.repeat(["a", "b", "c"], seeds).tolist()
    return (
        distance_table(points, lambda x, y: float(np.linalg.norm(x - y))),
        data,
        [*range(seeds)] * 3,
    )


def test_an_effect_of_four_runs_by_hand():
    # Runs (data, seed): (a, 1), (a, 2), (b, 1), (b, 2), after the model before training.
    table = np.zeros((5, 5))
    for (i, j), distance in {
        (0, 1): 3, (0, 2): 4, (0, 3): 5, (0, 4): 8, (1, 2): 1, (3, 4): 3, (1, 4): 7, (2, 3): 9,
        (1, 3): 100, (2, 4): 100,
    }.items():  # fmt: skip
        table[i, j] = table[j, i] = distance
    found = effect(table, ["a", "a", "b", "b"], [1, 2, 1, 2])
    assert found.moved.value == pytest.approx(5 / 2)
    assert found.data.value == pytest.approx(8 / 2)
    assert np.isnan([found.moved.low, found.moved.high, found.data.low, found.data.high]).all()
    assert (found.p, found.smallest, found.seeds, found.data_sets) == (0.5, 0.5, 2, 2)
    other = effect(table, ["a", "b", "b", "a"], [1, 2, 1, 2])
    assert (other.p, other.smallest) == (1, 0.5)
    assert other.data.value == pytest.approx(2 / 8)


def test_the_permutation_takes_every_exchange_within_a_seed():
    table, data, seeds = runs_of(0.2)
    orders = list(permutations(range(3)))

    def within(labels):
        same = [
            table[1 + i, 1 + j]
            for i, j in product(range(9), repeat=2)
            if labels[i] == labels[j] and seeds[i] != seeds[j]
        ]
        return np.mean(same)

    every = [
        within([chosen[seeds[i]]["abc".index(data[i])] for i in range(9)])
        for chosen in product(orders, repeat=3)
    ]
    own = within(["abc".index(d) for d in data])
    found = effect(table, data, seeds)
    assert found.p == pytest.approx(np.mean(np.array(every) <= own + 1e-9))
    assert found.smallest == pytest.approx(1 / 36)
    assert 1 / 36 < found.p < 1
    drawn = effect(table, data, seeds, permutations=30)
    assert 0 < drawn.p <= 1


def test_an_effect_is_found_where_there_is_one_and_has_its_level():
    table, data, seeds = runs_of(50.0)
    found = effect(table, data, seeds)
    assert (found.p, found.seeds, found.data_sets) == (pytest.approx(1 / 36), 3, 3)
    assert 1 < found.data.low < found.data.value < found.data.high
    nothing = [effect(*runs_of(0.0, seed=i)) for i in range(150)]
    assert np.mean([e.p <= 4 / 36 for e in nothing]) == pytest.approx(4 / 36, abs=0.07)
    # Without an effect of the data the ratio is 1, and its interval says so.
    assert np.mean([e.data.low <= 1 <= e.data.high for e in nothing]) >= 0.92
    assert np.median([e.data.value for e in nothing]) == pytest.approx(1, abs=0.05)


def test_the_interval_is_the_jackknife_over_seeds():
    table, data, seeds = runs_of(1.0)
    found, without = effect(table, data, seeds), []
    for left_out in range(3):
        rows = [i for i in range(9) if seeds[i] != left_out]
        places = [0, *(i + 1 for i in rows)]
        part = effect(
            table[np.ix_(places, places)], [data[i] for i in rows], [seeds[i] for i in rows]
        )
        without.append([part.moved.value, part.data.value])
    logs = np.log(without)
    error = np.sqrt(2 / 3 * np.square(logs - logs.mean(axis=0)).sum(axis=0))
    half = student_t.ppf(0.975, 2) * error
    for ratio, h in zip((found.moved, found.data), half, strict=True):
        assert_allclose(np.log([ratio.low, ratio.high]) - np.log(ratio.value), [-h, h])


def test_only_seeds_that_every_data_set_has_are_compared():
    table, data, seeds = runs_of(2.0)
    rows = [0, *(i for i in range(1, 10) if (data[i - 1], seeds[i - 1]) != ("b", 1))]
    fewer = effect(
        table[np.ix_(rows, rows)], *([x[i - 1] for i in rows[1:]] for x in (data, seeds))
    )
    rows = [0, *(i for i in range(1, 10) if seeds[i - 1] != 1)]
    same = effect(table[np.ix_(rows, rows)], *([x[i - 1] for i in rows[1:]] for x in (data, seeds)))
    assert fewer.seeds == same.seeds == 2
    assert (fewer.data.value, fewer.p) == (same.data.value, same.p)


def test_what_does_not_move_has_no_ratio():
    found = effect(np.zeros((5, 5)), ["a", "a", "b", "b"], [1, 2, 1, 2])
    assert np.isnan([found.moved.value, found.data.value]).all()
    assert found.p == 1
    table, data, seeds = runs_of(1.0)
    table[1:, 1:] = 0  # all runs are equal, and not what they were made of
    found = effect(table, data, seeds)
    assert found.moved.value == np.inf
    assert np.isnan(found.moved.low)


def test_too_few_runs_are_refused():
    with pytest.raises(WdlibError, match="1 data sets with 2 seeds in common"):
        effect(np.zeros((3, 3)), ["a", "a"], [1, 2])
    with pytest.raises(WdlibError, match="2 data sets with 1 seeds in common"):
        effect(np.zeros((4, 4)), ["a", "a", "b"], [1, 2, 1])
