"""Clusters of singular value vectors: planted ones are found, whatever the seed."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from sklearn.metrics import adjusted_rand_score

from wdlib import WdlibError
from wdlib.fingerprints import record
from wdlib.fingerprints.clusters import Clusters, choices, cluster, clustering_vector, matched


def rng(seed=0):
    return np.random.default_rng(seed)


def test_planted_clusters_are_found_flattest_first_whatever_their_length():
    vectors, truth = tiny.steep_vectors()
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
    vectors, _ = tiny.steep_vectors()
    one = cluster({"q": vectors}, k=4, starts=20)
    other = Clusters(one.centres[[2, 0, 3, 1]] + 1e-6)
    assert_allclose(matched(other, one).centres, one.centres, atol=1e-5)


def test_the_right_number_of_well_separated_clusters_has_the_best_scores():
    vectors, _ = tiny.steep_vectors()
    scores = {c.k: c for c in choices({"q": vectors}, range(2, 7), resamples=6)}
    assert max(scores.values(), key=lambda c: c.silhouette).k == 4
    assert scores[4].stability == 1
    assert scores[4].spread == 0
    assert scores[4].silhouette > 0.8
    assert scores[6].stability < 0.99


@pytest.mark.parametrize("scaled", [True, False])
def test_margins_are_the_distance_to_the_nearest_border(scaled):
    values, _ = tiny.steep_vectors(noise=0.1)
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
    values, _ = tiny.steep_vectors()
    clusters = cluster({"all": values}, k=1, starts=5)
    assert (clusters.margins(values) == np.inf).all()
