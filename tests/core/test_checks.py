"""Numbers that are none are refused by name, as those out of range are."""

import math

import numpy as np
import pytest
import torch

from batchlab.core.checks import (
    check_count,
    check_inside,
    check_not_negative,
    check_positive,
    check_share,
    check_truth,
    is_count,
)
from batchlab.core.errors import InputError

NO_NUMBERS = ["64", None, (1, 2), [3.0], object(), torch.ones(2)]


@pytest.mark.parametrize("check", [check_positive, check_not_negative, check_share, check_inside, check_count])
@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, -1, -math.inf, True, False, np.True_, torch.tensor(True)])
def test_what_is_no_number_is_refused_by_name(check, value):
    with pytest.raises(InputError, match="^size must .*, got "):
        check(size=value)


@pytest.mark.parametrize(
    ("check", "inside", "outside"),
    [
        (check_positive, [5e-324, 1, 1e308, np.float32(2), torch.tensor(3.0)], [0, math.inf]),
        (check_not_negative, [0, 1, math.inf], [-5e-324]),
        (check_share, [0, 0.5, 1], [1.0000001]),
        (check_inside, [5e-324, 0.95], [0, 1]),
        (check_count, [1, np.int64(64), 10**30], [0, 1.0, True, np.True_, torch.tensor(True), np.float64(2)]),
    ],
)
def test_the_edges(check, inside, outside):
    for value in inside:
        check(size=value)
    for value in outside:
        with pytest.raises(InputError, match="size must"):
            check(size=value)


def test_every_number_is_checked_and_the_wrong_one_named():
    with pytest.raises(InputError, match="^second must be finite and > 0, got 0$"):
        check_positive(first=1, second=0)


def test_a_count_from_another_least():
    check_count(0, seed=0)
    assert is_count(0, 0)
    assert not is_count(0)
    with pytest.raises(InputError, match="^steps must be an integer of at least 4, got 3$"):
        check_count(4, steps=3)


@pytest.mark.parametrize("value", ["no", 0, 1, None, torch.tensor([True, False])])
def test_what_is_no_truth_is_refused_by_name(value):
    with pytest.raises(InputError, match="^exact must be True or False, got "):
        check_truth(exact=value)
    check_truth(exact=True, other=np.False_, third=torch.tensor(True))
