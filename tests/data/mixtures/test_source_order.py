import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.mixtures.source_order import BLOCK, SourceOrder

WEIGHTS = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6)


@given(weights=WEIGHTS, seed=st.integers(0, 2**31), start=st.integers(0, 10**12), count=st.integers(0, 3000))
def test_counts_and_numbers_agree_wherever_one_starts(weights, seed, start, count):
    order = SourceOrder(weights, seed)
    which, number = SourceOrder(weights, seed).span(start, count)
    before, after = order.before(start), order.before(start + count)
    assert before.sum() == start and np.array_equal(after - before, np.bincount(which, minlength=len(weights)))
    for source in range(len(weights)):
        assert np.array_equal(number[which == source], before[source] + np.arange(after[source] - before[source]))


@given(weights=WEIGHTS, seed=st.integers(0, 2**31), block=st.integers(0, 10**9))
def test_counts_stray_by_less_than_the_number_of_sources(weights, seed, block):
    order = SourceOrder(weights, seed)
    shares = np.array(order.weights)
    drift = 2.0**-40 * block * BLOCK
    assert (abs(order.before(block * BLOCK) - block * BLOCK * shares) < len(weights) + 1 + drift).all()


def test_each_position_has_the_shares_over_seeds():
    """Position 5 over 800 seeds: within 4 standard errors of w."""
    shares = np.array([0.6, 0.3, 0.1])
    drawn = np.bincount([SourceOrder(shares, seed).span(5, 1)[0][0] for seed in range(800)], minlength=3) / 800
    assert (abs(drawn - shares) < 4 * np.sqrt(shares * (1 - shares) / 800)).all()


def test_runs_are_no_longer_than_chance_makes_them():
    """The order within a block is shuffled: neighbours agree as often as independent draws do, 4 standard errors."""
    which, _ = SourceOrder([0.5, 0.5], 0).span(0, 50 * BLOCK)
    assert abs((which[1:] == which[:-1]).mean() - 0.5) < 4 * 0.5 / len(which) ** 0.5


def test_bad_input():
    for weights, message in (
        ([], "weights must hold one number at least"),
        ([1, 0], r"weights\[1\] must be finite and > 0, got 0"),
        ([1.0, float("nan")], r"weights\[1\] must be finite and > 0, got nan"),
        ([1.0, 1e-15], "weights must be at least 2\\^-41 of their sum, got 1e-15"),
    ):
        with pytest.raises(InputError, match=message):
            SourceOrder(weights)
    for call in (lambda o: o.before(-1), lambda o: o.span(-1, 2), lambda o: o.span(1, -2)):
        with pytest.raises(InputError, match="-"):
            call(SourceOrder([1.0]))
