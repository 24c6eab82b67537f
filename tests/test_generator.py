"""The generator: planted laws and closed forms."""

import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from wdlib import WdlibError, generator
from wdlib.distances import cosine_distances
from wdlib.generator import (
    GaussianCounts,
    ParetoCounts,
    counts_for,
    generate,
    redraw_entries,
    spectra_of,
    tail_exponent,
    template,
)

SHAPE = (16, 512)
ENTRIES = 16 * 512


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def to_template(law, arrays: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Distances of copies from one template."""
    return generator.distances_to_template(arrays, shape, law, rng=rng(seed))[0]


def alike(count: int, shape: tuple[int, int]) -> GaussianCounts:
    """Always this count."""
    return GaussianCounts(count / (shape[0] * shape[1]), 0.0)


# Counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.6, 1.0, 3.0])
def test_pareto_counts_have_the_survival_function_they_state(shape):
    entries = 10**7
    counts = ParetoCounts(shape, 1e-4).draw(20_000, entries, rng())
    law = stats.pareto(shape, scale=1e-4 * entries)
    inside = counts[counts < entries]
    truncated = law.cdf(inside) / law.cdf(entries)
    assert stats.kstest(truncated, "uniform").pvalue > 0.01


def test_gaussian_counts_have_mean_and_deviation():
    counts = GaussianCounts(0.3, 0.05).draw(20_000, ENTRIES, rng())
    assert_allclose(counts.mean(), 0.3 * ENTRIES, rtol=0.01)
    assert_allclose(counts.std(), 0.05 * ENTRIES, rtol=0.03)


@pytest.mark.parametrize(
    "counts", [ParetoCounts(0.1, 0.5), ParetoCounts(2.0, 1e-9), GaussianCounts(0.5, 2.0)]
)
def test_counts_are_clipped_to_what_there_is(counts):
    drawn = counts.draw(5000, ENTRIES, rng())
    assert drawn.dtype == np.int64
    assert 1 <= drawn.min() <= drawn.max() <= ENTRIES
    assert 1 in drawn or ENTRIES in drawn


# Arrays --------------------------------------------------------------------------------------


def test_as_many_entries_as_counted_are_new_and_the_rest_is_the_template():
    base = template(ENTRIES + 100, sigma=0.02, rng=rng())
    kept = base.copy()
    counts = np.array([0, 1, 17, ENTRIES // 2, ENTRIES])
    arrays = redraw_entries(base, SHAPE, counts, sigma=0.02, rng=rng(1))
    assert arrays.shape == (5, *SHAPE)
    assert arrays.dtype == np.float32
    new = (arrays.reshape(5, -1) != base[:ENTRIES]).sum(axis=1)
    assert_allclose(new, counts, atol=2)  # float32 draws are equal by chance once in 10^7
    assert_array_equal(base, kept)


def test_new_entries_are_anywhere_and_as_wide_as_asked():
    base = np.zeros(600, dtype=np.float32)
    arrays = redraw_entries(base, (20, 30), np.full(4000, 30), sigma=3.0, rng=rng())
    new = arrays.reshape(4000, 600) != 0
    expected = 4000 * 30 / 600
    assert stats.chisquare(new.sum(axis=0), np.full(600, expected)).pvalue > 0.01
    assert_allclose(arrays[arrays != 0].std(), 3.0, rtol=0.01)


def test_ratio_is_that_of_new_entries_to_the_template():
    arrays = generate(2, (200, 200), GaussianCounts(0.5, 0), sigma=0.1, ratio=5, rng=rng())
    same = arrays[0] == arrays[1]
    assert_allclose(arrays[0][same].std(), 0.1, rtol=0.03)
    differing = arrays[:, ~same]
    assert_allclose((differing**2).mean(), 0.1**2 / 3 + 2 * 0.5**2 / 3, rtol=0.05)


def test_a_seed_gives_the_same_arrays_and_another_gives_others():
    first, again, other = (
        generate(3, (8, 5, 2), ParetoCounts(1.0, 0.1), rng=rng(s)) for s in (0, 0, 1)
    )
    assert first.shape == (3, 8, 5, 2)
    assert_array_equal(first, again)
    assert not np.isin(first, other).any()


def test_distances_do_not_know_sigma():
    spectra = [
        spectra_of(generate(9, SHAPE, ParetoCounts(1.0, 0.01), sigma=s, rng=rng()))
        for s in (1e-3, 7.0)
    ]
    assert_allclose(cosine_distances(spectra[0]), cosine_distances(spectra[1]), rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: redraw_entries(np.zeros(9), (2, 5), [1], sigma=1, rng=rng()), "draw 10"),
        (lambda: redraw_entries(np.zeros(10), (2, 5), [11], sigma=1, rng=rng()), "clip them"),
        (lambda: redraw_entries(np.zeros(10), (2, 5), [-1], sigma=1, rng=rng()), "clip them"),
        (lambda: generate(1, (2, 5), GaussianCounts(1, 0), ratio=0, rng=rng()), "positive"),
        (lambda: generate(1, (2, 5), GaussianCounts(1, 0), sigma=-1, rng=rng()), "positive"),
        (lambda: spectra_of(np.ones((1, 3, 5)), 4), "from 1 to 3"),
        (lambda: tail_exponent(np.ones(5), 2.0, 3.0), "between 2 and 3"),
        (lambda: counts_for(1.0, 0.1, SHAPE), "above 1"),
        (lambda: counts_for(2.0, 0.0, SHAPE), "xmin positive"),
        (lambda: counts_for(2.0, 0.1, SHAPE, rank=17), "from 2 to 16"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(call, message):
    with pytest.raises(WdlibError, match=message):
        call()


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (16, 16)])
def test_spectra_are_those_of_lapack(shape):
    arrays = rng().standard_normal((6, *shape))
    expected = np.linalg.svd(arrays, compute_uv=False)
    assert_allclose(spectra_of(arrays), expected, rtol=1e-9)
    assert_allclose(spectra_of(arrays, 3), expected[:, :3], rtol=1e-12)


def test_a_thousand_arrays_cost_a_few_times_the_draw_of_their_entries():
    def seconds(call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    entries = 16 * 2048
    draw = min(seconds(lambda: rng().standard_normal((1000, entries), "f4")) for _ in range(2))
    counts = ParetoCounts(0.7, 1e-3)
    made = min(seconds(lambda: generate(1000, (16, 2048), counts, rng=rng())) for _ in range(2))
    assert made < max(6 * draw, 2.0)
    assert made < 12 * draw


# The law of the distances --------------------------------------------------------------------


def test_fixed_counts_give_a_chi_square_not_a_normal_law():
    count = 160
    distances = np.concatenate(
        [to_template(alike(count, (16, 1024)), 400, (16, 1024), seed) for seed in range(5)]
    )
    scaled = distances * (16 * 1024) ** 2 / count
    assert 0.75 * 15 < scaled.mean() < 1.0 * 15
    unit = scaled / scaled.mean()
    chi = stats.kstest(15 * unit, stats.chi2(15).cdf).statistic
    normal = stats.kstest((unit - 1) / unit.std(), "norm").statistic
    assert chi < 0.04 < normal
    assert_allclose(stats.skew(scaled), np.sqrt(8 / 15), atol=0.3)


def test_the_chi_square_has_one_degree_of_freedom_less_than_there_are_rows():
    """With one row there is one direction, so nothing to differ in; with two, one degree."""
    assert np.all(to_template(alike(40, (1, 1024)), 5, (1, 1024), 0) == 0)
    distances = [to_template(alike(20, (2, 4096)), 400, (2, 4096), s) for s in range(12)]
    scaled = np.concatenate(distances) * (2 * 4096) ** 2 / 20
    assert stats.kstest(scaled / scaled.mean(), stats.chi2(1).cdf).statistic < 0.05


def test_the_first_order_law_has_the_mean_it_states_and_arrays_of_few_new_entries_follow_it():
    counts = np.array([[20.0], [80.0]])
    drawn = generator.first_order_distances(np.tile(counts, 20_000), SHAPE, rng(0))
    assert drawn.shape == (2, 20_000)
    stated = generator.first_order(counts[:, 0] / ENTRIES, SHAPE)
    assert_allclose(drawn.mean(axis=1), stated, rtol=0.02)
    assert_allclose(drawn.var(axis=1), stated**2 * 2 / (min(SHAPE) - 1), rtol=0.05)
    arrays = to_template(alike(20, SHAPE), 800, SHAPE, 0)
    assert_allclose(arrays.mean(), stated[0], rtol=0.1)


def test_two_copies_are_apart_by_the_entries_new_in_either():
    counts = GaussianCounts(0.002, 0)
    between, own = [], []
    for seed in range(20):
        base = template(ENTRIES, sigma=1, rng=rng(seed))
        number = counts.draw(40, ENTRIES, rng(seed))
        spectra = spectra_of(redraw_entries(base, SHAPE, number, sigma=1, rng=rng([seed, 1])))
        between.append(cosine_distances(spectra).mean())
        own.append(cosine_distances(spectra_of(base.reshape(1, *SHAPE)), spectra).mean())
    assert_allclose(np.mean(between) / np.mean(own), 2.0, rtol=0.1)


@pytest.mark.parametrize("shape", [0.8, 1.0, 1.5, 2.0])
def test_the_exponent_of_the_distances_is_shape_plus_one(shape):
    """At a small scale; at larger ones the tail is steeper, by tenths (notebook 06)."""
    scale = 3e-4
    counts = ParetoCounts(shape, scale)
    distances = generator.distances_to_template(1000, SHAPE, counts, templates=6, rng=rng(7))
    assert distances.shape == (6, 1000)
    unit = 15 / ENTRIES
    alpha, error = tail_exponent(distances.ravel(), 3 * scale * unit, 0.005 * unit)
    saturation = 0.05 * shape  # distances grow a little slower than counts
    assert -2.6 * error < alpha - (shape + 1) < 2.6 * error + saturation
    assert error < 0.1


def test_clipping_ends_the_power_law():
    """With a scale near 1 every array is independent of the template, and no distance is large."""
    law = ParetoCounts(0.8, 0.5)
    assert np.mean(law.draw(500, ENTRIES, rng()) == ENTRIES) > 0.5
    distances = to_template(law, 500, SHAPE, 0)
    assert distances.max() < 4 / ENTRIES


def test_tail_exponent_of_a_censored_pareto_law():
    x = stats.pareto(1.3).rvs(20_000, random_state=0)
    alpha, error = tail_exponent(x, 2.0, 20.0)
    assert alpha == tail_exponent(np.minimum(x, 20.0), 2.0, 20.0)[0]
    assert_allclose(alpha, 2.3, atol=3 * error)
    assert error < 0.03


def test_counts_for_is_the_closed_form_within_its_range():
    entries = 16 * 65536
    assert counts_for(1.6, 1e-9, (16, 65536)) == ParetoCounts(
        pytest.approx(0.6), pytest.approx(1e-9 * entries / 30)
    )
    assert counts_for(1.6, 1e-9, (16, 65536), rank=4).scale == pytest.approx(1e-9 * entries / 6)
    assert counts_for(1.2, 1.0, SHAPE).shape == generator.SHAPES[0]
    assert counts_for(9.0, 1.0, SHAPE) == ParetoCounts(generator.SHAPES[1], generator.LARGEST_SCALE)
