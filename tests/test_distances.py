"""wdlib.distances: closed forms, and the accuracy that 1 - cos does not have."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist

from wdlib import TYPES, WdlibError
from wdlib.distances import cosine_distances, dsv, dsv_all, dsv_pairs, msv


def spectra(layers: int = 5, rank: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    # not in the order of TYPES: the functions must not rely on it
    return {
        type: -np.sort(-rng.gamma(3, size=(layers, rank)), axis=1) + 0.1 for type in TYPES[::-1]
    }


def exact_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cos in 80 decimal digits, from the exact binary values."""
    with localcontext() as context:
        context.prec = 80
        a, b = ([Decimal(float(value)) for value in vector] for vector in (a, b))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return float(1 - dot / (sum(x * x for x in a) * sum(y * y for y in b)).sqrt())


def test_orthogonal_same_and_opposite():
    a = np.array([[3.0, 0.0], [0.0, 0.5], [-7.0, 0.0]])
    assert_array_equal(cosine_distances(a), [1, 2, 1])
    assert_array_equal(cosine_distances(a, a), [[0, 1, 2], [1, 0, 1], [2, 1, 0]])


@pytest.mark.parametrize("theta", [3.0, 1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_known_angle(theta):
    a = np.array([[1.0, 0.0]])
    b = np.array([[np.cos(theta), np.sin(theta)]])
    assert_allclose(cosine_distances(a, b), [[2 * np.sin(theta / 2) ** 2]], rtol=1e-7)
    if theta < 1e-7:
        assert abs(1 - (a @ b.T).item()) < 1e-20  # the plain formula has no digit left


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4, 1e-6])
def test_as_accurate_as_its_docstring_says(step):
    rng = np.random.default_rng(1)
    a = rng.gamma(3, size=(20, 16))
    b = a * (1 + step * rng.normal(size=a.shape))
    exact = np.array([exact_distance(x, y) for x, y in zip(a, b, strict=True)])
    error = np.abs(np.diagonal(cosine_distances(a, b)) - exact) / exact
    assert np.all(error < 3e-16 / np.sqrt(exact) + 1e-15)


def test_equals_scipy_cosine_at_moderate_distances():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(30, 16)), rng.normal(size=(20, 16))
    assert_allclose(cosine_distances(a, b), cdist(a, b, "cosine"), rtol=1e-12, atol=1e-14)


def test_condensed_is_the_upper_triangle():
    a = np.random.default_rng(3).normal(size=(9, 4))
    assert_array_equal(cosine_distances(a), cosine_distances(a, a)[np.triu_indices(9, 1)])
    assert cosine_distances(a[:1]).shape == (0,)


def test_a_common_factor_changes_nothing():
    rng = np.random.default_rng(4)
    a = rng.gamma(3, size=(12, 16))
    for factor in (1e-300, 1e-5, 3.0, 1e300):
        assert_allclose(cosine_distances(a * factor), cosine_distances(a), rtol=1e-12)
    factors = rng.uniform(0.1, 10, size=(12, 1))
    assert_allclose(cosine_distances(a * factors), cosine_distances(a), rtol=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_without_direction_is_named(bad):
    a = np.ones((4, 3))
    a[2] = bad
    with pytest.raises(WdlibError, match="row 2 of the first matrix"):
        cosine_distances(a)
    with pytest.raises(WdlibError, match="row 2 of the second matrix"):
        cosine_distances(np.ones((1, 3)), a)
    with pytest.raises(WdlibError, match=r"row 2 of MSV\[v\]"):
        dsv_all({"q": np.ones((4, 3)), "v": a})


def test_one_bad_entry_is_enough():
    a = np.ones((4, 3))
    a[1, 2] = np.nan
    with pytest.raises(WdlibError, match="row 1"):
        cosine_distances(a)


def test_shapes_are_checked():
    with pytest.raises(WdlibError, match="shape"):
        cosine_distances(np.ones(3))
    with pytest.raises(WdlibError, match="3 and 4 entries"):
        cosine_distances(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(WdlibError, match="rank"):
        dsv_all({"q": np.ones((2, 3)), "k": np.ones((2, 4))})


def test_msv_is_the_type_asked_for():
    values = spectra()
    assert_array_equal(msv(values, "up"), values["up"])
    assert msv({"q": np.ones((2, 3), dtype=np.float32)}, "q").dtype == np.float64
    with pytest.raises(WdlibError, match="'gate'.*has q, k"):
        msv({"q": np.ones((2, 3)), "k": np.ones((2, 3))}, "gate")


def test_dsv_between_two_types_is_every_layer_with_every_layer():
    values = spectra(layers=4)
    distances = dsv(values, "v", "gate")
    assert distances.shape == (16,)
    for i in range(4):
        for j in range(4):
            expected = exact_distance(values["v"][i], values["gate"][j])
            assert_allclose(distances[4 * i + j], expected, rtol=1e-13)


def test_dsv_within_a_type_counts_each_pair_once():
    values = spectra(layers=4)
    distances = dsv(values, "k", "k")
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    expected = [exact_distance(values["k"][i], values["k"][j]) for i, j in pairs]
    assert_allclose(distances, expected, rtol=1e-13)


def test_dsv_all_goes_by_type_then_layer():
    values = spectra(layers=3)
    rows = np.array([values[type][layer] for type in TYPES for layer in range(3)])
    assert dsv_all(values).shape == (21 * 20 // 2,)
    assert_array_equal(dsv_all(values), cosine_distances(rows))


def test_dsv_pairs_tells_apart_what_dsv_all_holds():
    values = spectra(layers=3)
    del values["gate"]  # an encoder has none
    pairs = dsv_pairs(values)
    assert len(pairs) == 6 * 7 // 2
    assert list(pairs)[:2] == [("q", "q"), ("q", "k")]
    assert all(TYPES.index(p) <= TYPES.index(q) for p, q in pairs)
    assert_array_equal(pairs["k", "down"], dsv(values, "k", "down"))
    everything = np.concatenate(list(pairs.values()))
    assert_array_equal(np.sort(everything), np.sort(dsv_all(values)))


def test_unknown_or_no_types_are_refused():
    with pytest.raises(WdlibError, match="found query"):
        dsv_all({"query": np.ones((2, 3))})
    with pytest.raises(WdlibError, match="found nothing"):
        dsv_pairs({})
