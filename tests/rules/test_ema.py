"""ρ^κ: the κ-th power of one update, composition, the half-life that it keeps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import ema

shares = st.floats(0.01, 0.999999)
kappas = st.floats(0.01, 100.0)


def test_power_of_one_update():
    """Sheet check 1: κ updates at constant gradient against one scaled update, the entry δ included."""
    rate, decay = 0.03, 0.97
    one = np.array([[1, 0, -rate], [1 - decay, decay, 0], [0, 0, 1]])
    for kappa in range(1, 65):
        power = np.linalg.matrix_power(one, kappa)
        scaled = ema.scale_decay(decay, kappa)
        delta = -rate * (kappa - (1 - scaled) / (1 - decay))
        expected = np.array([[1, 0, -kappa * rate], [1 - scaled, scaled, delta], [0, 0, 1]])
        np.testing.assert_allclose(power, expected, rtol=1e-12, atol=1e-12)


@given(shares, kappas, kappas)
def test_composition(decay, first, second):
    """Sheet check 2."""
    twice = ema.scale_decay(ema.scale_decay(decay, first), second)
    assert twice == pytest.approx(ema.scale_decay(decay, first * second), rel=1e-9, abs=1e-300)
    assert ema.scale_decay(ema.scale_decay(decay, 4), 0.25) == pytest.approx(decay, rel=1e-12)
    assert ema.scale_decay(decay, 1) == decay


def test_two_updates_of_n_are_one_of_2n_at_fixed_weights():
    average, weights, decay = 3.0, 5.0, 0.98
    twice = average
    for _ in range(2):
        twice += (weights - twice) * (1 - decay)
    once = average + (weights - average) * (1 - ema.scale_decay(decay, 2))
    assert once == pytest.approx(twice, rel=1e-12)


@given(st.floats(0.5, 0.999999), st.floats(1.0, 1e5), kappas)
def test_half_life_in_examples_is_kept(decay, batch, kappa):
    half_life = ema.half_life_examples(decay, batch)
    assert ema.decay_for_half_life(half_life, batch) == pytest.approx(decay, rel=1e-9)
    assert ema.decay_for_half_life(half_life, kappa * batch) == pytest.approx(ema.scale_decay(decay, kappa), rel=1e-9)


@given(st.floats(0.0, 1.0), kappas)
def test_scaled_momentum_weighs_the_new_value(momentum, kappa):
    expected = 1 - ema.scale_decay(1 - momentum, kappa)
    assert ema.scale_momentum(momentum, kappa) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_small_momentum_loses_no_digits():
    assert ema.scale_momentum(1e-17, 3.0) == pytest.approx(3e-17, rel=1e-12)


@pytest.mark.parametrize(("decay", "same"), [(1.0, 1.0), (0.0, 0.0)])
def test_frozen_and_copied_stay_so(decay, same):
    assert ema.scale_decay(decay, 7.3) == same


def test_bad_numbers():
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"decay must lie in \[0, 1\], got "):
            ema.scale_decay(bad, 2)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="kappa must be finite and > 0, got "):
            ema.scale_decay(0.9, bad)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match=r"decay must lie in \(0, 1\), got "):
            ema.half_life_examples(bad, 32)
    with pytest.raises(InputError, match="half_life_examples must be finite and > 0, got -5"):
        ema.decay_for_half_life(-5, 32)
