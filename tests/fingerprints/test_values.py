"""Moments, value distributions and the Standard-Deviation Vector: closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import tiny
from numpy.testing import assert_allclose

from wdlib import TYPES, WdlibError
from wdlib.fingerprints import values
from wdlib.fingerprints.values import (
    Moments,
    ValueDistribution,
    deviation_vector,
    moments,
    pooled,
    quantiles,
    tail_ratio,
    value_distributions,
    value_tables,
)


def rng(seed=0):
    return np.random.default_rng(seed)


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


# Distributions of values ---------------------------------------------------------------------


def test_value_distributions_have_the_moments_of_all_layers_together(tmp_path):
    rng = np.random.default_rng(0)
    layers = [rng.laplace(0.3, 1.0 + layer, (64, 64)).astype(np.float32) for layer in range(3)]
    tiny.write_alike(tmp_path / "model.safetensors", layers)
    found = value_distributions(tmp_path / "model.safetensors", reach=40)
    together = np.concatenate([matrix.ravel() for matrix in layers]).astype(np.float64)
    for v in found.values():
        assert v.n == together.size
        assert v.mean == pytest.approx(together.mean())
        assert v.standard_deviation == pytest.approx(together.std())
        assert v.excess_kurtosis == pytest.approx(scipy.stats.kurtosis(together))
        width = v.centres[1] - v.centres[0]
        assert (v.density * width).sum() == pytest.approx(1)
        assert (v.density * width * v.centres**2).sum() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_values_that_are_all_equal_have_no_distribution(value, tmp_path):
    tiny.write_alike(tmp_path / "flat.safetensors", [np.full((64, 64), value, np.float32)] * 2)
    with pytest.raises(WdlibError, match="values of type q of flat are all equal"):
        value_distributions(tmp_path / "flat.safetensors")


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


def test_value_tables_are_densities_and_shapes_of_every_type(saved):
    densities, shapes = value_tables(saved("made", tiny.falling_llama(0)))
    assert [row["type"] for row in shapes] == list(TYPES)
    for t in TYPES:
        area = sum(row["density"] for row in densities if row["type"] == t) * 40 / 200
        assert area == pytest.approx(1, abs=1e-4)
    assert shapes[0]["n"] == tiny.LAYERS * 96 * 96
    assert all(row["tail ratio"] > 1 for row in shapes)
