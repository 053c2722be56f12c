import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.stream import SampleStream


@given(n=st.integers(1, 9000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_each_example_once(n, seed, epoch):
    indices = SampleStream(n, seed).indices(epoch * n, n)
    assert np.array_equal(np.sort(indices), np.arange(n))


@given(n=st.integers(1, 9000), start=st.integers(0, 10**9), sizes=st.lists(st.integers(0, 700), max_size=6))
def test_how_it_is_cut_changes_nothing(n, start, sizes):
    whole = SampleStream(n, 1).indices(start, sum(sizes))
    stream, position, parts = SampleStream(n, 1), start, []
    for size in sizes:
        parts.append(stream.indices(position, size))
        position += size
    assert np.array_equal(np.concatenate(parts) if parts else whole, whole)


def test_epochs_and_seeds_differ():
    a, b = SampleStream(1000, 0), SampleStream(1000, 1)
    shares = [(a.indices(0, 1000) == other).mean() for other in (a.indices(1000, 1000), b.indices(0, 1000))]
    assert max(shares) < 0.01  # by chance 0.001


def test_positions_are_uniform_over_epochs():
    """Chi-square of 'which of 16 cells does position 0 hold' over 16,000 epochs: 15 degrees of freedom."""
    n, epochs = 16, 16_000
    stream = SampleStream(n, 5)
    first = np.array([stream.indices(epoch * n, 1)[0] for epoch in range(epochs)])
    expected = epochs / n
    chi_square = ((np.bincount(first, minlength=n) - expected) ** 2 / expected).sum()
    assert chi_square < 44.3  # the 0.9999 quantile


def test_seek_is_flat_in_size_and_position():
    for n in (10**4, 10**10):
        indices = SampleStream(n, 0).indices(10**12 + 7, 64)
        assert len(set(indices.tolist())) == 64 and indices.max() < n


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_size_that_is_none_is_refused(n):
    with pytest.raises(InputError, match="n must be an integer of at least 1"):
        SampleStream(n)
