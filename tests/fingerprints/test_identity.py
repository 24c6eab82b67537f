"""Distances between the vectors of fingerprints, and families that are recovered."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from wdlib import TYPES, WdlibError
from wdlib.fingerprints import record
from wdlib.fingerprints.clusters import Clusters
from wdlib.fingerprints.identity import (
    cluster_distance,
    comparisons,
    deviation_distance,
    distance_table,
    pooled_vectors,
    recovery,
    spectral_difference,
)


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
