"""Sizes at given points; in a loop they are tested in test_batch_ramp.py."""

import json

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.schedule.batches.milestones import Milestones


def test_milestones_multiply_as_a_rate_would_be_divided():
    assert Milestones.by_factors(128, {60: 5, 120: 5, 160: 5}).changes()[-1] == (160, 16_000)
    assert Milestones.by_factors(96, {10: 0.5, 20: 1.5}, multiple_of=24).changes() == [(0, 96), (10, 48), (20, 72)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Milestones(8, {5: 12}, multiple_of=8), "sizes must be multiples of multiple_of 8, got 12"),
        (lambda: Milestones(8, {5: 0}), "sizes must be an integer of at least 1, got 0"),
        (lambda: Milestones.by_factors(8, {5: 1.3}), "factors must give whole sizes, got 10.4 at 5"),
        (lambda: Milestones.by_factors(8, {5: -1}), "factors must be finite and > 0, got -1"),
        (lambda: Milestones.by_factors("8", {5: 2}), "start must be an integer of at least 1, got '8'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_sizes_that_are_no_mapping_are_refused():
    with pytest.raises(InputError, match=r"sizes must be of the form {seen: size}, got \[\]"):
        Milestones(4, [])
    assert json.dumps(Milestones(np.int64(100), {10: np.int64(200)}).changes()) == "[[0, 100], [10, 200]]"
