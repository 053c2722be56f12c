import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.data.duplicates.near_duplicates import bands_for, candidate_recall, jaccard, near_duplicates


def _naive(signatures, order, threshold, apart):
    kept, found = [], []
    for document in order:
        others = [other for other in kept if apart[other] == apart[document]]
        likeness = [float((signatures[other] == signatures[document]).mean()) for other in others]
        if likeness and max(likeness) >= threshold:
            best = int(np.argmax(likeness))
            found.append((document, others[best], likeness[best]))
        else:
            kept.append(document)
    return found


def test_one_slot_a_band_finds_what_comparing_all_does():
    """With bands of one slot every pair that agrees anywhere is a candidate: the search loses nothing."""
    draw = np.random.default_rng(0)
    base = draw.integers(0, 2**32, size=(12, 16), dtype=np.uint32)
    signatures = base[draw.integers(0, 12, size=80)]
    changed = draw.random(signatures.shape) < 0.25
    signatures = np.where(changed, draw.integers(0, 2**32, size=signatures.shape, dtype=np.uint32), signatures)
    order, apart = draw.permutation(80), draw.integers(0, 2, size=80).astype(np.int32)
    found = near_duplicates(signatures, order, threshold=0.5, bands=16, rows=1, apart=apart)
    assert [tuple(match) for match in found] == _naive(signatures, order.tolist(), 0.5, apart)
    assert 10 < len(found) < 70


def test_recall_of_the_search_is_its_formula():
    """4,000 pairs that agree in each slot with the probability 0.8: the share found, within 4 standard errors."""
    draw, pairs = np.random.default_rng(1), 4000
    first = draw.integers(0, 2**32, size=(pairs, 128), dtype=np.uint32)
    fresh = draw.integers(0, 2**32, size=(pairs, 128), dtype=np.uint32)
    second = np.where(draw.random((pairs, 128)) < 0.8, first, fresh)
    signatures = np.concatenate([first, second])
    bands, rows = bands_for(0.8, 128)
    found = near_duplicates(signatures, np.arange(2 * pairs), threshold=1e-6, bands=bands, rows=rows)
    right = candidate_recall(0.8, bands, rows)
    assert abs(len(found) / pairs - right) < 4 * (right * (1 - right) / pairs) ** 0.5 < 0.03


def test_there_are_no_chains():
    """b resembles a, c resembles b alone: b goes for a, so c stays."""
    a = np.arange(20, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    b[:4], c[:8] = 100, [100] * 4 + [200] * 4
    found = near_duplicates(np.stack([a, b, c]), [0, 1, 2], threshold=0.75, bands=20, rows=1)
    assert [tuple(match) for match in found] == [(1, 0, 0.8)]
    found = near_duplicates(np.stack([a, b, c]), [1, 2, 0], threshold=0.75, bands=20, rows=1)
    assert [tuple(match) for match in found] == [(2, 1, 0.8), (0, 1, 0.8)]


def test_jaccard_and_bands():
    empty = np.empty(0, dtype=np.uint64)
    assert jaccard(empty, empty) == 1.0 and jaccard(empty, np.array([1], dtype=np.uint64)) == 0.0
    for threshold in (0.3, 0.5, 0.8, 0.95):
        bands, rows = bands_for(threshold, 128)
        assert (
            candidate_recall(threshold, bands, rows) >= 0.9 > candidate_recall(threshold, 128 // (rows + 1), rows + 1)
        )
    with pytest.raises(InputError, match="threshold 0.01 is too low for 16 permutations"):
        bands_for(0.01, 16)
    with pytest.raises(InputError, match="bands·rows must be at most the 8 slots, got 3 times 3"):
        near_duplicates(np.zeros((1, 8), np.uint32), [0], threshold=0.5, bands=3, rows=3)
