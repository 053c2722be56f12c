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
        delta = ema.scaling_error(decay, kappa, learning_rate=rate)
        expected = np.array([[1, 0, -kappa * rate], [1 - scaled, scaled, delta], [0, 0, 1]])
        np.testing.assert_allclose(power, expected, rtol=1e-12, atol=1e-12)


def test_error_to_first_order():
    """δ ≈ -ηκ(κ - 1)(1 - ρ)/2, to a relative κ(1 - ρ)/3."""
    for kappa in (2, 8, 64):
        first = -0.03 * kappa * (kappa - 1) * 1e-6 / 2
        assert ema.scaling_error(1 - 1e-6, kappa, learning_rate=0.03) == pytest.approx(first, rel=1e-4)


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


def test_error_of_a_frozen_average_is_refused():
    with pytest.raises(InputError, match=r"decay must lie in \[0, 1\), got 1: a frozen average"):
        ema.scaling_error(1.0, 2, learning_rate=0.1)


@given(st.floats(0.0, 1.0))
def test_a_factor_of_one_changes_no_bit(share):
    assert ema.scale_momentum(share, 1) == share and ema.scale_decay(share, 1) == share


ADAM = ema.Averaged(1e-3, 0.999, betas=(0.9, 0.999), eps=1e-8)


def test_the_rule_of_each_optimizer():
    sgd = ema.with_optimizer(ema.Averaged(0.1, 0.99, 1e-4), 4, optimizer="sgd")
    assert sgd == (pytest.approx(0.4), 0.99**4, pytest.approx(1e-4), (), 0.0)
    adam = ema.with_optimizer(ADAM, 4, optimizer="adam")
    assert adam == (pytest.approx(2e-3), 0.999**4, 0.0, pytest.approx((0.6, 0.996)), 5e-9)
    adamw = ema.with_optimizer(ADAM._replace(weight_decay=0.1), 4, optimizer="adamw")
    assert adamw.weight_decay == pytest.approx(0.2) and adamw.betas == adam.betas
    rms = ema.with_optimizer(ema.Averaged(1e-3, 0.9, betas=(0.99,), eps=1e-8), 4, optimizer="rmsprop")
    assert rms.betas == pytest.approx((0.96,)) and rms.learning_rate == pytest.approx(2e-3)
    exact = ema.with_optimizer(ADAM, 4, optimizer="adam", beta_rule="half_life")
    assert exact.betas == (0.9**4, 0.999**4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@given(first=st.floats(0.2, 4.0), second=st.floats(0.2, 4.0), rule=st.sampled_from(["sde", "half_life"]))
def test_moving_all_twice_is_moving_all_once(optimizer, first, second, rule):
    start = {
        "sgd": ema.Averaged(0.1, 0.99, 1e-4),
        "adam": ADAM._replace(betas=(0.97, 0.999)),
        "adamw": ADAM._replace(betas=(0.97, 0.999), weight_decay=0.1),
        "rmsprop": ADAM._replace(betas=(0.99,)),
    }[optimizer]

    def move(settings, kappa):
        return ema.with_optimizer(settings, kappa, optimizer=optimizer, beta_rule=rule)

    twice, once = move(move(start, first), second), move(start, first * second)
    for name in ema.Averaged._fields:
        assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-9), name
    assert move(start, 1) == start


def test_rules_refuse():
    with pytest.raises(InputError, match=r"kappa\*\(1 - beta\) must be at most 1, got 16\*\(1 - 0.9\)"):
        ema.with_optimizer(ADAM, 16, optimizer="adam")
    with pytest.raises(InputError, match="weight_decay must be 0 for adam, got 0.1: an L2 penalty divided by"):
        ema.with_optimizer(ADAM._replace(weight_decay=0.1), 2, optimizer="adam")
    with pytest.raises(InputError, match=r"sgd has no betas and no eps, got \(0.9, 0.999\) and 1e-08"):
        ema.with_optimizer(ADAM, 2, optimizer="sgd")
    with pytest.raises(InputError, match=r"optimizer must be one of \['adam', 'adamw', .*got 'lion'"):
        ema.with_optimizer(ADAM, 2, optimizer="lion")


def test_each_stage_is_moved_from_the_base():
    base = ema.Averaged(0.1, 0.996, 1e-6)
    stages = ema.progressive(base, [(1000, 64), (5000, 192)], base_batch_size=32)
    assert [stage.kappa for stage in stages] == [1, 2, 6]
    assert stages[0].settings == base
    for stage in stages:
        assert stage.settings == ema.with_optimizer(base, stage.batch_size / 32, optimizer="sgd")
    asked = [0, 999, 1000, 4999.5, 5000, 1e9]
    assert [ema.stage_at(stages, examples).batch_size for examples in asked] == [32, 32, 64, 64, 192, 192]


def test_stages_keep_the_half_life_in_examples():
    stages = ema.progressive(ema.Averaged(0.1, 0.996), [(10, 100), (20, 3200), (30, 7)], base_batch_size=50)
    found = {ema.half_life_examples(s.settings.decay, s.batch_size) for s in stages}
    assert max(found) == pytest.approx(min(found), rel=1e-9)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ([(0, 64)], "switch_examples must be finite and > 0, got 0"),
        ([(10, 0)], "switch_batch_size must be finite and > 0, got 0"),
        ([(10, 64), (10, 128)], "switches must be at rising numbers of examples > 0, got 10 after 10"),
        ([(math.nan, 64)], "switch_examples must be finite and > 0, got nan"),
    ],
)
def test_bad_switches(switches, message):
    with pytest.raises(InputError, match=message):
        ema.progressive(ema.Averaged(0.1, 0.99), switches, base_batch_size=32)


def test_stage_at_needs_one_that_has_begun():
    stages = ema.progressive(ema.Averaged(0.1, 0.99), [(10, 64)], base_batch_size=32)
    with pytest.raises(InputError, match="stages must hold one that starts at 5 examples or before, got 1 others"):
        ema.stage_at(stages[1:], 5)
    with pytest.raises(InputError, match="examples must be >= 0, got -1"):
        ema.stage_at(stages, -1)


def test_a_scheduled_decay_is_moved_point_by_point():
    """BYOL's cosine to 1 over 6400 examples: products of ρ over the same examples agree to first order in a step."""

    def cosine(examples):
        return 1 - 0.004 * (math.cos(math.pi * examples / 6400) + 1) / 2

    base = math.prod(cosine(32 * t) for t in range(200))
    moved = math.prod(ema.scale_decay(cosine(128 * t), 4) for t in range(50))
    unmoved = math.prod(cosine(128 * t) for t in range(50))
    assert moved == pytest.approx(base, rel=0.004 * 4) and unmoved > 1.3 * base
