"""Layers that are recognised, and where they are from: planted relatives and strangers."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from wdlib import WdlibError, paths
from wdlib.fingerprints import record
from wdlib.fingerprints.invariants import Spectra, of_layers
from wdlib.fingerprints.relation import relate

KINDS = {"qk": 3, "ov": 3, "gate": 1, "up": 1, "down": 1, "neurons": 1}
SHIPPED = sorted(path.stem for path in (paths.RESULTS / "fingerprints").glob("*.json"))


def model(seed, *, layers=24, kinds=tuple(KINDS)):
    """Spectra that fall, with a trend along the depth that all models share, and their own."""
    rng, found = np.random.default_rng(seed), {}
    for kind, groups in KINDS.items():
        rows = np.repeat(np.arange(layers), groups)
        depth = rows[:, None] / layers
        slopes = 0.5 + depth + 0.1 * rng.standard_normal((len(rows), 1))
        steps = rng.exponential(0.03, (len(rows), 16))
        logs = np.sin(3 * depth) + 0.3 * rng.standard_normal((len(rows), 1))
        logs = logs - slopes * np.log(np.arange(1, 17)) - np.cumsum(steps, axis=1)
        if kind in kinds:
            found[kind] = Spectra(rows, np.exp(logs))
    return found


def noisy(found, size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        kind: Spectra(
            s.layers, -np.sort(-s.values * np.exp(size * rng.standard_normal(s.values.shape)))
        )
        for kind, s in found.items()
    }


@pytest.mark.parametrize(
    "layers",
    [range(24), range(8), range(0, 24, 3), [*range(16), *range(8, 24)]],
    ids=["whole", "a part", "every third layer", "stacked"],
)
@pytest.mark.parametrize("size", [0, 0.02])
def test_relatives_are_recognised_layer_by_layer(layers, size):
    found = relate(noisy(of_layers(model(0), layers), size), model(0))
    assert found.share == 1
    assert list(found.partners) == list(layers)
    assert found.change == pytest.approx(size, rel=0.3, abs=2e-4)


def test_one_factor_of_all_layers_is_taken_out_of_each_kind():
    scaled = {kind: Spectra(s.layers, 7 * s.values) for kind, s in model(0).items()}
    found = relate(scaled, model(0))
    assert found.share == 1
    assert found.change < 2e-4
    halved = {k: Spectra(s.layers, s.values * (1 + s.layers[:, None])) for k, s in scaled.items()}
    assert np.median(np.diagonal(relate(halved, model(0)).difference)) > 0.1


def test_strangers_are_not_recognised():
    found = [relate(model(i), model(i + 1)) for i in range(0, 60, 2)]
    assert not any(r.is_related for r in found)
    assert np.mean([r.share for r in found]) < 0.01


@pytest.mark.parametrize(("layers", "needed"), [(12, 2), (24, 3), (31, 4)])
def test_a_tenth_of_the_layers_and_two_at_least_make_a_relative(layers, needed):
    for copied in (needed - 1, needed):
        made = model(1, layers=layers)
        for kind, spectra in model(0, layers=layers).items():
            own = spectra.layers < copied
            made[kind].values[own] = spectra.values[own]
        found = relate(made, model(0, layers=layers))
        assert found.is_related == (copied == needed)


def test_a_run_recognises_what_a_single_layer_does_not():
    size = 0.1
    found = relate(noisy(model(0), size), model(0))
    alone = found.nearness.min(axis=1)
    assert found.share > 0.8
    assert (alone > -2.25).all()
    apart = relate(noisy(of_layers(model(0), range(0, 24, 3)), size), model(0))
    assert apart.share == 0


def test_two_ancestors_share_the_layers_of_a_model_made_of_both():
    one, two = of_layers(model(0), range(12)), of_layers(model(1), range(12, 24))
    made = {
        kind: Spectra(
            np.concatenate([one[kind].layers, two[kind].layers + 12]),
            np.concatenate([one[kind].values, two[kind].values]),
        )
        for kind in one
    }
    for ancestor, own in ((model(0), range(12)), (model(1), range(12, 24))):
        found = relate(made, ancestor)
        assert set(np.flatnonzero(found.recognised)) == set(own)


def test_kinds_that_one_model_or_layer_lacks_are_left_out():
    encoder = model(0, kinds=("up", "down", "neurons"))
    assert relate(encoder, model(0)).share == 1
    hybrid = model(0)
    for kind in ("qk", "ov"):
        own = hybrid[kind].layers % 4 == 0
        hybrid[kind] = Spectra(hybrid[kind].layers[own], hybrid[kind].values[own])
    found = relate(hybrid, model(0))
    assert found.share == 1
    assert list(found.partners) == list(range(24))
    with pytest.raises(WdlibError, match="invariants of qk and gate share none"):
        relate(model(0, kinds=("qk",)), model(0, kinds=("gate",)))


def test_values_of_zero_are_compared():
    zero = {"gate": Spectra(np.arange(3), np.zeros((3, 4)))}
    assert np.isfinite(relate(zero, model(0)).nearness).all()
    assert_allclose(relate(zero, zero).difference, 0, atol=1e-3)


@pytest.mark.parametrize("one", SHIPPED)
def test_no_shipped_model_is_taken_for_another(one):
    own = record.of(one)
    assert own.invariants
    for other in SHIPPED:
        if other != one:
            assert not relate(own.invariants, record.of(other).invariants).recognised.any()
