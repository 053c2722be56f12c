import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data import stream as module
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


@given(n=st.integers(1, 40_000), places=st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 300)), max_size=8))
def test_jumping_changes_nothing(n, places):
    stream = SampleStream(n, 2)
    for start, count in places:
        assert np.array_equal(stream.indices(start, count), SampleStream(n, 2).indices(start, count))


def test_orders_stay_what_they_were():
    """Recorded: a stream that changes breaks the resuming of every run."""
    assert SampleStream(353, 0).indices(350, 8).tolist() == [328, 298, 129, 173, 38, 331, 24, 327]
    assert SampleStream(10**9, 7).indices(10**12 + 5, 3).tolist() == [469159459, 393465116, 556518583]


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


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_of_a_few_is_equally_likely(n):
    """Chi-square over all n! orders in 12,000 epochs. The Feistel network alone gives 500 at n=5, for 119 degrees."""
    orders = SampleStream(n, 11).indices(0, 12_000 * n).reshape(-1, n)
    code = (orders * n ** np.arange(n)).sum(1)
    counts = np.unique(code, return_counts=True)[1]
    expected = 12_000 / math.factorial(n)
    assert len(counts) == math.factorial(n)
    assert stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) > 1e-4


def shuffles(n, epochs, positions):
    """What stands at the positions in each of many epochs; shape (epochs, positions). The network, over many keys."""
    keys = [[derive_seed(0, "shuffles", n, epoch, r) for epoch in range(epochs)] for r in range(module._ROUNDS)]
    columns = [np.array(column, dtype=np.uint64)[:, None] for column in keys]
    half_bits = SampleStream(n)._half_bits
    values = module._permute(np.broadcast_to(np.uint64(positions), (epochs, len(positions))), columns, half_bits)
    while (values >= n).any():
        values = np.where(values >= n, module._permute(values, columns, half_bits), values)
    return values.astype(np.int64)


@pytest.mark.parametrize("n", [65, 100, 255])
def test_pairs_of_positions_hold_every_pair_equally_often(n):
    """Chi-square of 64 cells of values for each of 28 pairs of positions, near and far, over 6,000 shuffles."""
    positions = [0, 1, 2, 3, n // 2, n // 2 + 1, n - 2, n - 1]
    cells = shuffles(n, 6_000, positions) * 8 // n
    sizes = np.bincount(np.arange(n) * 8 // n)
    pairs = sizes[:, None] * sizes[None, :] - np.diag(sizes)  # a value stands at one position alone
    expected = 6_000 * pairs / (n * (n - 1))
    for a, b in itertools.combinations(range(8), 2):
        counts = np.bincount(cells[:, a] * 8 + cells[:, b], minlength=64).reshape(8, 8)
        assert stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), 63) > 1e-6, (positions[a], positions[b])


def test_the_shuffles_of_this_file_are_the_streams():
    stream = SampleStream(100, 3)
    keys = [[np.uint64(derive_seed(3, "stream", 2, r))] for r in range(module._ROUNDS)]
    values = module._permute(np.arange(100, dtype=np.uint64), keys, stream._half_bits)
    while (values >= 100).any():
        values = np.where(values >= 100, module._permute(values, keys, stream._half_bits), values)
    assert np.array_equal(values.astype(np.int64), stream.indices(200, 100))


@pytest.mark.parametrize("n", [1437, 60_000])
def test_no_structure_shows_within_an_epoch(n):
    """Serial correlation, steps from one index to the next, and how even the start is, each within 5 sigma."""
    for epoch in range(3):
        order = SampleStream(n, 9).indices(epoch * n, n)
        for lag in (1, 2, 7, 64):
            correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(n), (epoch, lag)
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / math.sqrt(n)
        steps = np.bincount((np.diff(order) % n) * 16 // n, minlength=16)  # uniform but that 0 is no step
        assert stats.chi2.sf(((steps - n / 16) ** 2 / (n / 16)).sum(), 15) > 1e-6
        assert stats.kstest(order[: n // 4] / n, "uniform").pvalue > 1e-6
        bits = [(order[: n // 2] >> bit & 1).mean() for bit in range(6)]
        assert max(abs(share - 0.5) for share in bits) < 5 * 0.5 / math.sqrt(n // 2)


@pytest.mark.parametrize("n", [10**4, 10**7, 10**10])
def test_a_seek_costs_what_it_gives_whatever_the_size(n, monkeypatch):
    work = []
    real = module._permute
    monkeypatch.setattr(module, "_permute", lambda value, *rest: work.append(len(value)) or real(value, *rest))
    indices = SampleStream(n, 0).indices(10**12 + 7, 64)
    assert len(set(indices.tolist())) == 64 and indices.max() < n
    assert sum(work) < 10 * 64  # the domain is less than four times n


def test_it_holds_a_block_and_no_more():
    stream = SampleStream(10**10, 0)
    for at in range(0, 100_000, 1000):
        stream.indices(at, 1000)
    assert stream._cached[2].nbytes == 8 * module._BLOCK


@pytest.mark.parametrize("start, count", [(-1, 2), (0, -1), (0.0, 2), (0, 2.5)])
def test_a_place_that_is_none_is_refused(start, count):
    with pytest.raises(InputError, match="(start|count) must be an integer of at least 0"):
        SampleStream(10).indices(start, count)


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_integers_of_other_libraries_are_the_same_numbers(n, integer):
    found = SampleStream(integer(n), integer(3)).indices(integer(2), integer(5))
    assert (found == SampleStream(n, 3).indices(2, 5)).all()


@pytest.mark.parametrize("seed", [3.0, "3", None, True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(InputError, match="seed must be an integer, got "):
        SampleStream(10, seed)


def test_a_size_beyond_64_bits_is_refused():
    assert SampleStream(2**62).indices(5, 3).max() < 2**62
    with pytest.raises(InputError, match=r"n must be at most 2\^62"):
        SampleStream(2**62 + 1)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_size_that_is_none_is_refused(n):
    with pytest.raises(InputError, match="n must be an integer of at least 1"):
        SampleStream(n)
