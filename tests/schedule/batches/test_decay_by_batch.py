"""A decay handed to the batch: its closed form, the rate that stays up, and what the noise scale forbids."""

import math

import pytest

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.rules.learning_rate import rescale
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.decay_by_batch import DecayByBatch

TOTAL = 100_000
LARGE = Estimate(1e9, 1e9, 1e9, "given")


def linear_decay(seen):
    return max(0.0, 1 - seen / TOTAL)


def run(control, noise=LARGE):
    """(seen before, size) of each update."""
    seen, size, found = 0, control.batch_size, []
    while seen < TOTAL:
        found.append((seen, size))
        seen += size
        size = control.next_batch(len(found), StepFacts(seen, size, noise_scale=noise))
    return found


@pytest.mark.parametrize(("exponent", "rule", "saved"), [(1.0, "linear", 2), (2.0, "sqrt", 3)])
def test_a_linear_decay_becomes_half_or_a_third_of_the_updates_at_a_constant_rate(exponent, rule, saved):
    """∫(1 - x)^p dx = 1/(p + 1) of the updates, within what rounding and the cap of 64 times leave."""
    control = DecayByBatch(
        64, share=linear_decay, exponent=exponent, maximum=4096, deadband=1.0, growth=64.0, patience=1
    )
    updates = run(control)
    assert len(updates) == pytest.approx(TOTAL / 64 / saved, rel=0.02)
    for seen, size in updates:
        asked = 64 * linear_decay(seen) ** -exponent
        assert size == (math.floor(asked + 1e-9) if asked < 4096 else 4096)
        if asked < 4096:
            rate = rescale(0.1, 64, asked, rule=rule) * linear_decay(seen)
            assert rate == pytest.approx(0.1, rel=1e-9)


def test_the_noise_scale_holds_it():
    control = DecayByBatch(16, share=linear_decay, exponent=1.0, maximum=1024, headroom=0.5)
    assert 50 / 1.1 <= max(size for _, size in run(control, Estimate(100.0, 90.0, 110.0, "given"))) <= 50
    below = DecayByBatch(64, share=linear_decay, exponent=1.0, maximum=1024)
    assert {size for _, size in run(below, Estimate(40.0, 30.0, 50.0, "given"))} == {64}
    unknown = DecayByBatch(64, share=linear_decay, exponent=1.0, maximum=1024)
    with pytest.warns(UserWarning, match="reads noise_scale, which has not come"):
        assert {size for _, size in run(unknown, None)} == {64}


def test_without_headroom_it_is_the_papers_and_reads_nothing():
    made = {"share": linear_decay, "exponent": 1.0, "maximum": 256}
    control = DecayByBatch(64, headroom=None, **made)
    assert control.needs == frozenset() and DecayByBatch(64, **made).needs == {"noise_scale"}
    assert run(control, None) == run(DecayByBatch(64, **made))
    assert 256 / 1.1 < max(size for _, size in run(DecayByBatch(64, headroom=None, **made), None)) <= 256


def test_it_never_shrinks_and_takes_the_whole_at_the_end():
    control = DecayByBatch(16, share=linear_decay, exponent=2.0, maximum=512, patience=1)
    assert control.next_batch(1, StepFacts(99_999, 16, noise_scale=LARGE)) == 32
    for turn in range(10):
        size = control.next_batch(turn, StepFacts(TOTAL, 16, noise_scale=LARGE))
    assert size == 512
    assert control.next_batch(20, StepFacts(0, 512, noise_scale=Estimate(20.0, 10.0, 30.0, "given"))) == 512


@pytest.mark.parametrize(("share", "size"), [(math.nan, 16), (1e-200, 32), (0.0, 32)])
def test_a_share_that_is_no_number_moves_nothing_and_one_next_to_0_all(share, size):
    control = DecayByBatch(16, share=lambda _: share, exponent=2.0, headroom=None, maximum=64, patience=1)
    assert control.next_batch(1, StepFacts(16, 16)) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exponent": 0.0}, r"exponent must be finite and > 0, got 0"),
        ({"headroom": 0}, r"headroom must be finite and > 0, got 0"),
        ({"headroom": -1.0}, r"headroom must be finite and > 0, got -1"),
        ({"maximum": 8}, r"sizes must satisfy 1 <= minimum <= batch_size <= maximum, got 1, 16, 8"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        DecayByBatch(16, **{"share": linear_decay, "exponent": 1.0, "maximum": 64} | settings)


def test_a_share_next_to_nothing_asks_for_the_maximum():
    sizes = []
    for share in (0.0, 1e-160, 1e-150):
        limits = {"maximum": 1024, "headroom": None, "patience": 1, "growth": 1e9}
        control = DecayByBatch(64, share=lambda seen, share=share: share, exponent=2.0, **limits)
        sizes.append(control.next_batch(1, StepFacts(1, 64)))
    assert sizes == [1024] * 3
