"""What the base of all batch controllers does with a wish; that each keeps it is in test_controller_contract.py."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import Moments
from batchlab.schedule.batches.controller import BatchController, StepFacts
from batchlab.schedule.batches.decay_by_batch import DecayByBatch
from batchlab.schedule.batches.milestones import Milestones
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from tests.spine.facts_fixture import exact


class Wishing(BatchController):
    """Wants what `wish` says."""

    wish = None

    def wanted(self, step, facts):
        return self.wish


def after(size, wish, **limits):
    control = Wishing(size, **{"maximum": 10_000, **limits})
    control.wish = wish
    return control.next_batch(1, StepFacts(size, size))


def test_a_wish_is_bounded_limited_and_rounded_down():
    assert after(100, 150.9) == 150
    assert after(100, 250.0) == 200 and after(100, 250.0, growth=3.0) == 250 and after(100, 1.0) == 50
    assert after(100, 1e9, growth=math.inf, maximum=700) == 700 and after(100, 1e-9, growth=math.inf) == 1
    assert after(96, 131.0, multiple_of=8, maximum=800) == 128 and after(96, 103.9, multiple_of=8, maximum=800) == 96
    assert after(96, 90.0, multiple_of=8, maximum=800) == 88
    assert after(24, 3.0, multiple_of=8, minimum=10, maximum=80, growth=math.inf) == 16  # never below the minimum
    assert after(64, 512 * (1 - 1e-12), growth=math.inf) == 512  # whole but for rounding


def test_growth_always_lets_one_multiple_through():
    """From 1 with a growth of 1.5 nothing would ever change otherwise."""
    assert after(1, 100.0, growth=1.5) == 2 and after(2, 0.5, growth=1.5) == 1
    assert after(8, 100.0, growth=1.5, multiple_of=8, maximum=800) == 16
    assert after(16, 1.0, growth=1.5, multiple_of=8, maximum=800) == 8


@given(
    size=st.integers(1, 200),
    unit=st.integers(1, 9),
    wish=st.floats(1e-3, 1e6),
    growth=st.floats(1.0, 5.0),
    low=st.integers(1, 50),
)
def test_a_change_goes_towards_the_wish_and_never_past_it(size, unit, wish, growth, low):
    start, low = size * unit, min(low, size * unit)
    maximum = 400 * unit
    found = after(start, wish, multiple_of=unit, growth=growth, minimum=low, maximum=maximum)
    assert low <= found <= maximum and found % unit == 0
    if wish >= start:
        assert start <= found <= max(wish, start) + 1e-6
    else:
        assert min(wish, start) - unit < found <= start or found < low + unit


def capped(size, wish, **limits):
    control = Wishing(size, **{"maximum": 512, **limits})
    control.wish = wish
    control.next_batch(1, StepFacts(size, size))
    return control.capped


def test_a_size_is_capped_where_the_maximum_alone_keeps_it_from_being_larger():
    assert capped(512, 513.0) and capped(500, 600.0) and capped(256, 513.0, growth=3.0) and capped(508, 1e308)
    assert not capped(512, 512.0) and not capped(512, 3.0) and not capped(100, 300.0)
    assert not capped(100, 1e9) and not capped(256, 1e9)  # it is the growth that holds it
    assert not capped(500, 600.0, deadband=1.5) and capped(500, 800.0, deadband=1.5)
    assert capped(512, 520.0, multiple_of=8) and not capped(512, 519.0, multiple_of=8)  # 519 is rounded down


def test_that_a_size_is_capped_is_known_until_the_next_wish_and_goes_round():
    control = Wishing(512, maximum=512)
    control.wish = 600.0
    control.next_batch(1, StepFacts(512, 512))
    control.wish = None
    control.next_batch(2, StepFacts(1024, 512))
    again, wider = Wishing(512, maximum=512), Wishing(512, maximum=1024)
    for other in (again, wider):
        other.load_state_dict(control.state_dict())
    assert control.capped and again.capped and not wider.capped
    control.wish = 500.0
    assert control.next_batch(3, StepFacts(1536, 512)) == 500 and not control.capped


@pytest.mark.parametrize(
    ("control", "facts"),
    [
        (NoiseScaleBatch(64, exchange_rate=64.0, maximum=100, patience=1), {"noise_scale": exact(1e6)}),
        (NormTestBatch(64, maximum=100), {"batch_test": Moments(64, 1.0, 1e6, 1.0, 1e6)}),
        (NormTestBatch(64, maximum=100), {"batch_test": Moments(64, 0.0, 1.0, 0.0, 1.0)}),
        (DecayByBatch(64, share=lambda _: 0.25, exponent=1.0, headroom=None, maximum=100, patience=1), {}),
        (DecayByBatch(64, share=lambda _: 0.0, exponent=1.0, headroom=None, maximum=100, patience=1), {}),
    ],
)
def test_rules_that_would_go_beyond_their_maximum_are_capped_and_those_settled_beforehand_are_not(control, facts):
    assert control.next_batch(1, StepFacts(64, 64, **facts)) == 100 and control.capped
    settled = Milestones(64, {64: 100})
    assert settled.next_batch(1, StepFacts(64, 64)) == 100 and not settled.capped


def test_what_is_no_wish_changes_nothing():
    for wish in (None, math.nan, math.inf, -math.inf, 0.0, -3.0):
        assert after(100, wish) == 100


def test_due_says_when_the_next_call_may_move():
    control = Wishing(10, maximum=1000, patience=3)
    control.wish = 1000.0
    told = []
    for _ in range(7):
        due = control.due
        before = control.batch_size
        told.append((due, control.next_batch(1, StepFacts(1, 1)) != before))
    assert told == [(False, False), (False, False), (True, True)] * 2 + [(False, False)]


def test_a_size_is_placed_as_micro_batches_over_workers_and_takes_their_product():
    control = Wishing(100, maximum=1000)
    placed = control.place(workers=8, max_micro_batch=4)
    assert placed == (128, 4, 4) and control.batch_size == 128 == 4 * 4 * 8
    assert control.place(workers=8, max_micro_batch=4) == placed  # once placed it stays
    top = Wishing(1000, maximum=1000)
    assert top.place(workers=8, max_micro_batch=4).batch == 992  # rounding up would pass the maximum
    with pytest.raises(InputError, match="multiple_of must divide micro_batch x workers x accumulation = 9, got 8"):
        Wishing(8, maximum=80, multiple_of=8).place(workers=3)


def test_old_states_without_a_name_load_and_a_resumed_run_may_have_other_bounds():
    control = Wishing(64, maximum=512, patience=3)
    control.load_state_dict({"batch_size": 96, "waited": 2})
    assert control.batch_size == 96 and control.due
    on_eight = Wishing(64, maximum=512, multiple_of=64)
    with pytest.warns(UserWarning, match="batch_size 100 is not in 1..512 in multiples of 64: going on with 64"):
        on_eight.load_state_dict({"batch_size": 100, "waited": 0})
    assert on_eight.batch_size == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_eight.load_state_dict({"batch_size": 128, "waited": 0})


def test_facts_alone_are_agreed():
    facts = StepFacts(1, 1, seconds=0.5)
    assert facts.agreed() == facts and StepFacts(1, 1).agreed() == StepFacts(1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Wishing(8, maximum=4), "1 <= minimum <= batch_size <= maximum, got 1, 8, 4"),
        (lambda: Wishing(8, minimum=9, maximum=80), "got 9, 8, 80"),
        (lambda: Wishing(0, maximum=4), "batch_size must be an integer of at least 1, got 0"),
        (lambda: Wishing(8.0, maximum=80), "batch_size must be an integer of at least 1, got 8.0"),
        (lambda: Wishing(8, maximum=math.inf), "maximum must be an integer of at least 1, got inf"),
        (lambda: Wishing(10, maximum=80, multiple_of=8), "batch_size must be a multiple of multiple_of 8, got 10"),
        (lambda: Wishing(8, maximum=81, multiple_of=8), "maximum must be a multiple of multiple_of 8, got 81"),
        (lambda: StepFacts(1.5, 8), "seen must be an integer of at least 0, got 1.5"),
        (lambda: StepFacts(8, 0), "batch must be an integer of at least 1, got 0"),
        (lambda: StepFacts(8, 8, noise_scale=64.0), "noise_scale must be an Estimate or None, got 64.0"),
        (lambda: Wishing(8, maximum=80, growth=0.5), "growth must be at least 1, got 0.5"),
        (lambda: Wishing(8, maximum=80, growth=math.nan), "growth must be at least 1, got nan"),
        (lambda: Wishing(8, maximum=80, deadband=0), "deadband must be at least 1, got 0"),
        (lambda: Wishing(8, maximum=80, patience=0), "patience must be an integer of at least 1, got 0"),
        (lambda: Wishing(8, maximum=80, patience=1.5), "patience must be an integer of at least 1, got 1.5"),
    ],
)
def test_bad_limits_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


class Reading(Wishing):
    needs = frozenset({"noise_scale"})


def test_a_fact_that_never_comes_is_warned_of_once():
    control = Reading(64, maximum=128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 101):
            control.next_batch(step, StepFacts(64 * step, 64))
        assert not caught
        for step in range(101, 400):
            control.next_batch(step, StepFacts(64 * step, 64))
    (warning,) = caught
    assert str(warning.message) == (
        "Reading reads noise_scale, which has not come for 101 updates: the batch stays at 64"
    )


def test_a_test_that_is_no_longer_due_at_the_maximum_is_not_missed():
    control = NormTestBatch(8, eta=0.5, maximum=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 300):
            moments = Moments(8, 1.0, 1e6, 1.0, 1e6) if control.due else None
            control.next_batch(step, StepFacts(16 * step, control.batch_size, batch_test=moments))
    assert control.batch_size == 16


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"loss": "x"}, "loss must be a number or None, got 'x'"),
        ({"loss": [1.0, 2.0]}, r"loss must be a number or None, got \[1.0, 2.0\]"),
        ({"seconds": "3"}, "seconds must be a number or None, got '3'"),
        ({"batch_test": 3.0}, "batch_test must be Moments, CoordinateMoments or None, got 3.0"),
    ],
)
def test_facts_that_are_none_are_refused(facts, message):
    with pytest.raises(InputError, match=message):
        StepFacts(64, 64, **facts)


def test_a_wish_of_numpys_leaves_a_state_of_json():
    control = Wishing(8, maximum=16, growth=10)
    control.wish = np.float64(64.0)
    control.next_batch(1, StepFacts(8, 8))
    assert json.loads(json.dumps(control.state_dict()))["capped"] is True
    with pytest.raises(InputError, match=r"the state must be what state_dict gave, got \[\]"):
        control.load_state_dict([])


def test_losses_of_other_libraries_are_numbers_without_a_warning():
    for loss in (torch.tensor(2.0, requires_grad=True), np.ones(1) * 2, torch.full((1,), 2.0)):
        assert StepFacts(8, 8, loss=loss).loss == 2.0
