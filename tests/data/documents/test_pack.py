import bisect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.documents.pack import best_fit, first_fit, pack


def sequences(packing):
    """The (document, start, length) of each sequence's parts."""
    parts = list(zip(packing.document.tolist(), packing.start.tolist(), packing.length.tolist(), strict=True))
    return [parts[a:b] for a, b in zip(packing.first[:-1], packing.first[1:], strict=True)]


def best_fit_one_by_one(lengths, capacity):
    """Longest first, equals in order, each where the least room is left; of those, where it has stood longest."""
    free, contents = [], []
    for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [k for k in range(len(free)) if free[k][0] >= lengths[at]]
        if fits:
            k = min(fits, key=lambda k: free[k])
            room, _, bin_ = free.pop(k)
        else:
            room, bin_ = capacity, len(contents)
            contents.append([])
        contents[bin_].append(at)
        free.append((room - lengths[at], at_time(free, contents), bin_))
    return contents


def at_time(free, contents):
    return sum(map(len, contents))


@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(40, 90))
def test_best_fit_is_that_of_one_by_one(lengths, capacity):
    placed = best_fit(np.array(lengths, dtype=np.int64), capacity)
    expected = best_fit_one_by_one(lengths, capacity)
    assert [sorted(np.flatnonzero(placed == k).tolist()) for k in range(len(expected))] == list(map(sorted, expected))


@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(40, 90))
def test_first_fit_is_that_of_one_by_one(lengths, capacity):
    rooms, expected = [], []
    for length in lengths:
        at = next((k for k, room in enumerate(rooms) if room >= length), len(rooms))
        rooms += [capacity] if at == len(rooms) else []
        rooms[at] -= length
        expected.append(at)
    assert first_fit(np.array(lengths, dtype=np.int64), capacity).tolist() == expected


@given(
    lengths=st.lists(st.integers(0, 200), max_size=50),
    capacity=st.integers(1, 64),
    strategy=st.sampled_from(["best_fit", "first_fit", "wrapped"]),
    overflow=st.sampled_from(["split", "truncate"]),
)
def test_every_token_has_one_place(lengths, capacity, strategy, overflow):
    packing = pack(lengths, capacity, strategy, overflow=overflow)
    parts = [part for each in sequences(packing) for part in each]
    assert all(length > 0 for _, _, length in parts) and (packing.used <= capacity).all() and (packing.used > 0).all()
    kept = np.minimum(lengths, capacity) if overflow == "truncate" and strategy != "wrapped" else np.array(lengths)
    places = sorted((document, start + i) for document, start, length in parts for i in range(length))
    assert places == [(document, i) for document, n in enumerate(kept) for i in range(n)]
    assert packing.dropped_tokens == sum(lengths) - sum(kept)
    many = np.bincount([document for document, _, _ in parts], minlength=len(lengths))
    assert packing.split_documents == (many > 1).sum()
    assert packing.padding_share == pytest.approx(1 - sum(kept) / max(len(packing) * capacity, 1))
    if strategy == "wrapped":
        assert (packing.used[:-1] == capacity).all()
        assert [(document, start) for document, start, _ in parts] == sorted((d, s) for d, s, _ in parts)


def test_trls_own_examples():
    """The sequences in TRL 1.16's docstring of `pack_dataset`."""
    truncated = pack([5, 2, 3, 1], 4, overflow="truncate")
    assert [[length for _, _, length in each] for each in sequences(truncated)] == [[4], [3, 1], [2]]
    assert truncated.dropped_tokens == 1 and truncated.split_documents == 0
    split = pack([5, 2, 3, 1], 4)
    assert sequences(split) == [[(0, 0, 4)], [(2, 0, 3), (0, 4, 1)], [(1, 0, 2), (3, 0, 1)]]


def test_best_fit_leaves_little_and_truncates_little():
    """Ding et al. 2024: as few sequences as concatenation to a hundredth of a per cent, and no short document cut."""
    lengths = np.exp(np.random.default_rng(0).normal(6.5, 1.2, 100_000)).astype(int) + 1
    packing, wrapped = pack(lengths, 2048), pack(lengths, 2048, "wrapped")
    assert len(packing) <= 1.0001 * len(wrapped) and packing.padding_share < 1e-4
    assert packing.split_documents == (lengths > 2048).sum() < 0.4 * wrapped.split_documents
    first = pack(lengths[:20_000], 2048, "first_fit")
    assert pack(lengths[:20_000], 2048).padding_share <= first.padding_share < 0.01


def test_nothing_gives_nothing():
    for strategy in ("best_fit", "first_fit", "wrapped"):
        for lengths in ([], [0, 0]):
            packing = pack(lengths, 8, strategy)
            assert len(packing) == 0 and packing.used.tolist() == [] and packing.padding_share == 1.0


def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"strategy must be one of \['best_fit', 'first_fit', 'wrapped'\], got 'bfd'"):
        pack([1], 4, "bfd")
    with pytest.raises(InputError, match=r"overflow must be one of \['split', 'truncate'\], got 'drop'"):
        pack([1], 4, overflow="drop")
    with pytest.raises(InputError, match="capacity must be an integer of at least 1, got 0"):
        pack([1], 0)
    with pytest.raises(InputError, match="lengths must be integers of at least 0, got float64"):
        pack([1.5], 4)


def test_groups_of_equal_room_are_few(monkeypatch):
    """The cost beside the sort goes with the capacity, not with the documents: searches for room, counted."""
    import batchlab.data.documents.pack as module

    counted = []
    monkeypatch.setattr(module, "bisect_left", lambda *given: counted.append(1) or bisect.bisect_left(*given))
    lengths = np.random.default_rng(0).integers(1, 257, 400_000)
    for many in (4_000, 400_000):
        counted.clear()
        best_fit(lengths[:many], 256)
        assert len(counted) < 256 * 8


@pytest.mark.parametrize("given", [torch.tensor, np.uint8])
@pytest.mark.parametrize("strategy", ["best_fit", "first_fit", "wrapped"])
def test_other_libraries_integers_are_integers(strategy, given):
    same, found = (pack([5, 2, 3, 1], capacity, strategy=strategy) for capacity in (4, given(4)))
    assert found.document.tolist() == same.document.tolist() and type(found.capacity) is int
