"""What training moves in a fingerprint, against what a seed moves."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from scipy.stats import t as student_t

from wdlib import TYPES, WdlibError
from wdlib.fingerprints import record
from wdlib.fingerprints.clusters import cluster
from wdlib.fingerprints.identity import (
    cluster_distance,
    deviation_distance,
    distance_table,
    matched_distance,
)
from wdlib.fingerprints.movement import READINGS, changed, effect, movements


def rng(seed=0):
    return np.random.default_rng(seed)


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
    base = record.compute(saved("made", tiny.falling_llama(0)), rank=8, k=3)
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
