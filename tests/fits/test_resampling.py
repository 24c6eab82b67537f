"""Vectors drawn again, whole."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from wdlib import WdlibError
from wdlib.fits.goodness import goodness_of_fit_vectors
from wdlib.fits.resampling import vector_bootstrap


def test_vector_bootstrap_draws_whole_vectors():
    table = 10.0 * np.arange(5)[:, None] + np.arange(5)
    table = np.minimum(table, table.T)  # the entry names its pair: 10 * smaller + larger
    rng = np.random.default_rng(0)
    draws = []
    vector_bootstrap(table, lambda d: draws.append(d) or 0.0, replicates=200, rng=rng)
    for drawn in draws:
        first, second = np.divmod(drawn, 10)
        assert (first != second).all()
        present = np.unique([first, second])
        pairs, counts = np.unique(drawn, return_counts=True)
        assert pairs.size == present.size * (present.size - 1) // 2
        # how often each vector was drawn explains how often each pair occurs
        if pairs.size == 1:
            assert counts[0] in (4, 6)
    # as in notebook 03: the statistic, the count and the generator decide alone
    results = [
        vector_bootstrap(table, np.mean, replicates=9, rng=np.random.default_rng(3))
        for _ in range(2)
    ]
    assert_array_equal(*results)


def test_vector_bootstrap_between_two_sets_draws_rows_and_columns_apart():
    table = 10.0 * np.arange(4)[:, None] + np.arange(7)
    draws = []
    vector_bootstrap(
        table,
        lambda d: draws.append(d) or 0.0,
        replicates=100,
        rng=np.random.default_rng(0),
        symmetric=False,
    )
    for drawn in draws:
        rows, columns = np.divmod(drawn.reshape(4, 7), 10)
        assert (rows == rows[:, :1]).all()
        assert (columns == columns[:1]).all()
    rows, columns = np.divmod(np.concatenate(draws), 10)
    assert set(rows) == set(range(4))
    assert set(columns) == set(range(7))
    assert any((np.unique(d // 10).size, np.unique(d % 10).size) == (2, 5) for d in draws)


def test_vector_bootstrap_spread_is_that_of_the_mean():
    rng = np.random.default_rng(2)
    u = rng.normal(size=200)
    table = u[:, None] + u
    results = vector_bootstrap(table, np.mean, replicates=400, rng=rng)
    assert_allclose(results.std(), 2 * u.std() / np.sqrt(200), rtol=0.15)


@pytest.mark.parametrize("function", [vector_bootstrap, goodness_of_fit_vectors])
def test_a_table_must_have_its_shape(function):
    options = {"replicates": 2}
    if function is vector_bootstrap:
        options |= {"statistic": np.mean, "rng": np.random.default_rng(0)}
    with pytest.raises(WdlibError, match=r"shape \(3, 4\): expected all distances within"):
        function(np.ones((3, 4)), **options)
    with pytest.raises(WdlibError, match=r"shape \(4,\)"):
        function(np.ones(4), symmetric=False, **options)
