"""Null models: what each keeps and destroys; a seed gives the same again."""

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from wdlib import TYPES, WdlibError, paths
from wdlib.checkpoints import catalogue
from wdlib.checkpoints.stream import Projection
from wdlib.distances import dsv, dsv_all
from wdlib.spectra import nulls


def projections() -> list[Projection]:
    rng = np.random.default_rng(0)
    shapes = {"q": (60, 50), "gate": (90, 50)}
    return [
        Projection(
            layer, t, f"{layer}.{t}", ((layer + 1) * rng.standard_t(3, shapes[t])).astype("f4")
        )
        for layer in range(3)
        for t in shapes
    ]


def spectra_values(layers: int = 12, rank: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {t: -np.sort(-rng.lognormal(i, 0.3, (layers, rank))) for i, t in enumerate(TYPES)}


@pytest.mark.parametrize("null", nulls.OF_WEIGHTS.values(), ids=nulls.OF_WEIGHTS)
def test_a_null_stream_keeps_the_form_and_depends_on_seed_layer_and_type_alone(null):
    given = projections()
    drawn = list(null(given, seed=7))
    for before, after in zip(given, drawn, strict=True):
        assert (after.layer, after.type, after.name) == (before.layer, before.type, before.name)
        assert after.matrix.dtype == np.float32
        assert after.matrix.shape == before.matrix.shape
        assert abs(np.corrcoef(before.matrix.ravel(), after.matrix.ravel())[0, 1]) < 0.1
    (alone,) = null(given[3:4], seed=7)
    assert_array_equal(alone.matrix, drawn[3].matrix)
    (other,) = null(given[3:4], seed=8)
    assert not np.array_equal(other.matrix, alone.matrix)
    first, of_another_type, of_another_layer = (drawn[i].matrix[:60].ravel() for i in range(3))
    assert abs(np.corrcoef(first, of_another_type)[0, 1]) < 0.1
    assert abs(np.corrcoef(first, of_another_layer)[0, 1]) < 0.1


def test_gaussian_keeps_the_standard_deviation_and_nothing_of_the_tails():
    for before, after in zip(projections(), nulls.gaussian(projections(), seed=0), strict=True):
        assert_allclose(after.matrix.std(), before.matrix.std(), rtol=0.06)
        assert np.abs(after.matrix).max() < 5 * after.matrix.std()


def test_shuffled_keeps_every_entry():
    for before, after in zip(projections(), nulls.shuffled(projections(), seed=0), strict=True):
        assert_array_equal(np.sort(after.matrix, axis=None), np.sort(before.matrix, axis=None))


def test_experts_get_noise_of_their_own():
    first = projections()[0]
    twins = [Projection(0, "q", "n", first.matrix, expert) for expert in (None, 0, 1)]
    a, b, c = (p.matrix for p in nulls.gaussian(twins, seed=0))
    assert not np.array_equal(a, b)
    assert not np.array_equal(b, c)


def test_a_folder_named_like_a_model_gets_no_null_spectra_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    tiny.write_alike(tmp_path / catalogue.DEFAULT / "model.safetensors", [tiny.gaussian(8, 8)] * 2)
    for model in (f"./{catalogue.DEFAULT}", tmp_path / catalogue.DEFAULT):
        assert nulls.of(model, "gaussian", 4).values["q"].shape == (2, 4)
    assert nulls.of(catalogue.DEFAULT, "gaussian", 4).values["q"].shape == (30, 4)


def test_null_spectra_are_computed_once_and_anew_where_they_are_damaged(house, monkeypatch, caplog):
    folder, compute, made = tiny.write_llama(house / "toy"), nulls.compute, []
    monkeypatch.setattr(nulls, "compute", lambda *given: made.append(given[1:]) or compute(*given))
    first = nulls.of(folder, "shuffled", 4)
    tiny.assert_same(nulls.of(folder, "shuffled", 4), first)
    assert made == [("shuffled", 4)]
    (path,) = (house / "cache" / "spectra").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    tiny.assert_same(nulls.of(folder, "shuffled", 4), first)
    assert made == [("shuffled", 4)] * 2
    assert path.read_bytes() == good
    assert "does not hold spectra" in caplog.text


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
def test_gaussian_values_have_the_law_of_a_normal_matrix(shape):
    rng = np.random.default_rng(2)
    drawn = np.array([nulls.gaussian_values(shape, 12, rng) for _ in range(2000)])
    assert drawn.shape == (2000, 12)
    assert (np.diff(drawn, axis=1) <= 0).all()
    true = np.linalg.svd(rng.standard_normal((2000, *shape)), compute_uv=False)
    assert_allclose(drawn.mean(axis=0), true.mean(axis=0), atol=0.04)
    assert_allclose(np.cov(drawn.T), np.cov(true.T), atol=0.04)


def test_gaussian_values_are_as_many_as_asked_for_of_the_largest():
    few, every = (nulls.gaussian_values((7, 5), rank, np.random.default_rng(3)) for rank in (2, 5))
    assert_allclose(few, every[:2], rtol=1e-12)
    with pytest.raises(WdlibError, match="5 x 7 matrix has 5 singular values: 6 are too many"):
        nulls.gaussian_values((7, 5), 6, np.random.default_rng(3))


def test_types_shuffled_deals_the_vectors_of_a_layer_out_again():
    values = spectra_values()
    dealt = nulls.types_shuffled(values, np.random.default_rng(3))
    assert list(dealt) == list(values)
    for layer in range(12):
        before = sorted(tuple(values[t][layer]) for t in TYPES)
        assert sorted(tuple(dealt[t][layer]) for t in TYPES) == before
    assert_allclose(np.sort(dsv_all(dealt)), np.sort(dsv_all(values)), rtol=1e-12)
    origins = {t for row in dealt["q"] for t in TYPES if (values[t] == row).all(1).any()}
    assert len(origins) >= 4
    again = nulls.types_shuffled(values, np.random.default_rng(3))
    assert_array_equal(again["up"], dealt["up"])


def test_types_of_different_shapes_cannot_be_shuffled():
    values = spectra_values() | {"up": np.ones((24, 5))}
    with pytest.raises(WdlibError, match="different shapes"):
        nulls.types_shuffled(values, np.random.default_rng(0))


def test_trend_plus_noise_returns_a_trend_without_noise_as_it_is():
    x = np.linspace(-1, 1, 20)[:, None]
    exact = {"q": np.exp(2 + 0.5 * x - 0.3 * x**3 - np.arange(4) * (1 + 0.1 * x**2))}
    drawn = nulls.trend_plus_noise(exact, np.random.default_rng(0))
    assert_allclose(drawn["q"], exact["q"], rtol=1e-10)
    assert not np.allclose(
        nulls.trend_plus_noise(exact, np.random.default_rng(0), degree=2)["q"], exact["q"]
    )


def test_trend_plus_noise_keeps_the_spread_of_the_residuals():
    rng = np.random.default_rng(5)
    values = {"q": np.exp(1 - 10 * np.arange(3) + rng.normal(0, 0.1, (30, 3)))}
    logs = [np.log(nulls.trend_plus_noise(values, rng)["q"]) for _ in range(400)]
    assert_allclose(np.std(logs, axis=0).mean(), 0.1, rtol=0.15)
    assert np.std(np.mean(logs, axis=0) - np.log(values["q"])) > 0.05  # around the trend
    drawn = nulls.trend_plus_noise(spectra_values(), rng)
    assert all((np.diff(v) <= 0).all() for v in drawn.values())
    assert dsv(drawn, "q", "up").shape == (144,)


@pytest.mark.parametrize("rows", [np.ones((4, 3)), np.zeros((12, 3))], ids=["few", "zero"])
def test_a_trend_needs_layers_and_positive_values(rows):
    with pytest.raises(WdlibError, match="type o"):
        nulls.trend_plus_noise({"o": rows}, np.random.default_rng(0))
