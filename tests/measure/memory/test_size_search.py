"""The search against an oracle: every limit, several starts."""

import math
import statistics

import pytest

from batchlab.core.errors import InputError
from batchlab.measure.memory.size_search import SizeSearch

STARTS = (1, 7, 32, 64, 256)


def answer(limit, **settings):
    search = SizeSearch(**settings)
    while (size := search.next_size()) is not None:
        assert size not in search.tried, "a size was tried twice"
        assert 1 <= size <= search.most
        search.record(size, fits=size <= limit)
    return search


def check(limits, start, rel_gap, most):
    counts = []
    for limit in limits:
        search = answer(limit, start=start, most=most, rel_gap=rel_gap)
        counts.append(len(search.tried))
        truth = min(limit, most)
        assert search.ok in search.tried
        assert search.ok <= truth
        gap = (truth + 1 - search.ok) / (truth + 1)
        assert search.ok == truth or gap <= rel_gap
        assert len(search.tried) <= 2 * math.log2(max(limit, start)) + 5
    return counts


@pytest.mark.parametrize("start", STARTS)
def test_within_the_gap_for_every_limit(start):
    check(range(1, 301), start, 0.05, 4096)


@pytest.mark.parametrize("start", STARTS)
def test_exact_without_a_gap(start):
    check(range(1, 301), start, 0.0, 4096)


def test_never_above_the_largest_allowed():
    check(range(1, 301), 32, 0.05, 100)


@pytest.mark.parametrize("start", [1, 7, 32, 256])
@pytest.mark.parametrize("most", [512, 4096, 10**6])
def test_tries_at_the_median(start, most):
    counts = check(range(1, 301), start, 0.05, most)
    assert statistics.median(counts) <= 8
    assert max(counts) <= 11


@pytest.mark.parametrize("least", [2, 5])
@pytest.mark.parametrize("start", [1, 4, 32])
def test_nothing_below_the_least_is_tried(start, least):
    for limit in range(1, 100):
        search = answer(limit, start=start, most=80, rel_gap=0.0, least=least)
        assert min(search.tried) >= least and search.ok == (min(limit, 80) if limit >= least else None)
    with pytest.raises(InputError, match=r"max_size must be at least 5, the fewest that can be run, got 4"):
        SizeSearch(start=1, most=4, least=5)


def test_an_expected_size_is_tried_where_larger_ones_fail():
    search = SizeSearch(start=90, most=1000, growth=2, leap=1, expected=45)
    while (size := search.next_size()) is not None:
        search.record(size, fits=size <= 45)
    assert search.tried[:2] == [90, 45] and search.ok == 45
    search = SizeSearch(start=90, most=1000, expected=45)
    while (size := search.next_size()) is not None:
        search.record(size, fits=size <= 7)
    assert search.tried[:3] == [90, 45, 22] and search.ok == 7


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rel_gap", [0.0, 0.05])
def test_every_limit_to_2000(start, rel_gap):
    check(range(1, 2001), start, rel_gap, 8192)


def test_nothing_fits():
    search = answer(0, start=32, most=64)
    assert search.ok is None and search.tried == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("guess", [0.0, 1.0, 99.0, 100.0, 101.0, 1e9])
def test_a_guess_however_wrong_keeps_the_promise(guess):
    search = SizeSearch(start=32, most=4096, rel_gap=0.0)
    while (size := search.next_size(guess)) is not None:
        assert size not in search.tried
        search.record(size, fits=size <= 100)
    assert search.ok == 100


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"start": 0, "most": 8}, "start must be an integer of at least 1, got 0"),
        ({"start": 1, "most": 0}, "max_size must be an integer of at least 1, got 0"),
        ({"start": 1, "most": 8, "rel_gap": 1.0}, r"rel_gap must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(settings, text):
    with pytest.raises(InputError, match=text):
        SizeSearch(**settings)
