import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.lengths.length_buckets import (
    LengthBuckets,
    estimate_bins,
    estimate_bins_2d,
    padding_share,
)

EDGES = [(10, 5), (10, 10), (20, 12), (20, 18)]


def walked(lengths, buckets):
    """The published rule, one example at a time (lhotse's `estimate_duration_buckets`)."""
    ascending = np.sort(np.asarray(lengths, dtype=np.float64))
    mass, edges, within = ascending.sum() / buckets, [], 0.0
    for length in ascending.tolist():
        if within > mass:
            edges.append(length)
            within = 0.0
        within += length
    return edges


@given(
    lengths=st.one_of(
        st.lists(st.floats(0, 1e6), min_size=2, max_size=300),
        st.lists(st.integers(0, 9), min_size=2, max_size=300),
    ),
    buckets=st.integers(2, 40),
)
def test_bins_are_those_of_the_walk_to_the_last_bit(lengths, buckets):
    if buckets <= len(lengths):
        assert estimate_bins(lengths, buckets) == walked(lengths, buckets)


# by lhotse 1.33.0's estimate_duration_buckets on np.random.default_rng(0).lognormal(2, 0.8, 100_000), 8 buckets
OF_LHOTSE = [
    5.5845701749215895,
    8.162773865377588,
    10.878516976485251,
    13.969517526400763,
    18.00173038540494,
    23.938589075427494,
    35.284103134032456,
]


def test_bins_equal_those_that_lhotse_gave():
    assert estimate_bins(np.random.default_rng(0).lognormal(2, 0.8, 100_000), 8) == OF_LHOTSE


@pytest.mark.parametrize("buckets", [2, 10, 30, 100])
def test_bins_have_equal_mass(buckets):
    """Within one longest example of Σ/buckets each, but the last, which the others' excess leaves short."""
    lengths = np.random.default_rng(1).lognormal(3, 1, 20_000)
    edges = estimate_bins(lengths, buckets)
    masses = np.bincount(np.searchsorted(edges, lengths, side="right"), weights=lengths)
    mean = lengths.sum() / buckets
    tops = np.append(edges, lengths.max())
    assert len(masses) == buckets and (np.abs(masses - mean)[:-1] <= tops[:-1]).all()
    assert 0 < mean - masses[-1] <= tops[:-1].sum()


def test_choice_of_the_published_example():
    asked = [(8, 11), (8, 5), (10, 10), (20, 18), (21, 1)]
    assert LengthBuckets(EDGES).choose(asked).tolist() == [-1, 0, 1, 3, -1]
    assert LengthBuckets(EDGES, strict=False).choose(asked).tolist() == [2, 0, 1, 3, -1]
    bounded = LengthBuckets(EDGES, max_ratio=[0.5, 1.0, 0.6, 0.9])
    assert bounded.choose([(10, 5), (8, 5), (10, 10), (9, 10), (20, 12), (19, 12)]).tolist() == [0, -1, 1, -1, 2, -1]
    assert bounded.choose([(0, 0), (0, 1)]).tolist() == [0, -1]  # nothing to nothing is within any ratio


@pytest.mark.parametrize("strict, bounded", [(True, False), (True, True), (False, False)])
def test_choice_against_a_scan(strict, bounded):
    draw = np.random.default_rng(2)
    pairs = draw.integers(0, 60, (100_000, 2))
    edges = sorted({(int(a), int(b)) for a, b in zip(draw.integers(1, 6, 30) * 10, draw.integers(1, 60, 30))})
    ratios = [1.0 + at % 3 for at in range(len(edges))] if bounded else None
    found = LengthBuckets(edges, ratios, strict).choose(pairs).tolist()

    def scan(x, y):
        first = next((edge[0] for edge in edges if edge[0] >= x), None)
        for at, (a, b) in enumerate(edges):
            if x <= a and y <= b and (not strict or a == first):
                far = bounded and (y / x if x else math.inf if y else 0) > ratios[at]
                return -1 if far else at
        return -1

    known = {}
    for (x, y), bucket in zip(pairs.tolist(), found):
        if (x, y) not in known:
            known[x, y] = scan(x, y)
        assert bucket == known[x, y], (x, y)
    assert len(set(found)) > 10


def test_two_dimensions_hold_what_was_not_an_outlier():
    draw = np.random.default_rng(3)
    inputs = draw.lognormal(3, 0.7, 20_000)
    pairs = np.stack([inputs, np.rint(inputs * draw.lognormal(0, 0.3, 20_000))], 1)
    pairs[:20, 1] = pairs[:20, 0] * 50
    buckets = LengthBuckets.fitted(pairs)
    chosen = buckets.choose(pairs)
    assert (chosen[:20] == -1).all() and (chosen == -1).mean() < 0.01
    edges, ratios = np.array(buckets.edges), np.array(buckets.max_ratio)
    inside = chosen >= 0
    assert (pairs[inside] <= edges[chosen[inside]]).all()
    assert (pairs[inside, 1] / pairs[inside, 0] <= ratios[chosen[inside]]).all()
    assert len(buckets) == 60 and len(set(edges[:, 0])) == 30
    by_input = estimate_bins(pairs[:, 0], 30)
    assert sorted(set(edges[:, 0])) == [*by_input, pairs[:, 0].max()]
    for edge in sorted(set(edges[:, 0]))[:-1]:  # a bin's own sub-bins: their top is its own longest output
        below = max([each for each in edges[:, 0] if each < edge], default=0)
        own = pairs[(pairs[:, 0] > below) & (pairs[:, 0] <= edge)]
        ratio = own[:, 1] / own[:, 0]
        kept = own[(ratio - ratio.mean()) / ratio.std() <= 4]
        assert edges[edges[:, 0] == edge, 1].max() == kept[:, 1].max()
        cut, half = edges[edges[:, 0] == edge, 1].min(), kept[:, 1].sum() / 2
        assert kept[kept[:, 1] < cut, 1].sum() <= half + cut and kept[kept[:, 1] <= cut, 1].sum() > half


def test_slips_of_the_published_script_are_mended():
    constant = [(x, 2 * x) for x in range(1, 41)]  # one ratio: nothing is an outlier
    assert (LengthBuckets.fitted(constant, 4, 2).choose(constant) >= 0).all()
    thirds = [(x, x / 3) for x in range(1, 41)]  # ratios that differ by rounding
    assert (LengthBuckets.fitted(thirds, 4, 2).choose(thirds) >= 0).all()
    digits = [(1.00049, 1), (2.00049, 3), (3.00049, 2), (4.00049, 3)]  # rounding to three digits cut off the longest
    assert (LengthBuckets.fitted(digits, 2, 1).choose(digits) >= 0).all()
    assert estimate_bins_2d([(1, 1), (1, 1), (9, 5)], 2, 1).edges == [(9.0, 5.0)]  # no inner edge
    same = [(5, 3)] * 30 + [(8, 3)] * 30
    assert estimate_bins_2d(same, 6, 2).edges == [(5.0, 3.0), (8.0, 3.0)]  # each bin once


def test_skewed_data_gives_the_merged_bin_the_sub_bins_of_its_parts():
    draw = np.random.default_rng(4)
    inputs = np.minimum(draw.lognormal(3, 1, 5000), 30.0)  # most of the mass at the cap
    pairs = np.stack([inputs, inputs * draw.uniform(0.5, 1.5, 5000)], 1)
    edges = estimate_bins_2d(pairs, 10, 2).edges
    inner = estimate_bins(inputs, 10)
    assert inner.count(30.0) >= 3
    assert sum(edge[0] == 30.0 for edge in edges) == 2 * (inner.count(30.0) + 1)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: estimate_bins([1, 2, 3], 1), "buckets must be an integer of at least 2, got 1"),
        (lambda: estimate_bins([1, 2, 3], 4), "buckets must be at most the number of lengths, 3, got 4"),
        (lambda: estimate_bins([], 2), r"lengths must have shape \(n,\) or \(n, 2\) and n >= 1, got \(0,\)"),
        (lambda: estimate_bins([1, float("nan")], 2), r"lengths must be finite and >= 0, got nan at \[1\]"),
        (lambda: estimate_bins([1, -2], 2), "lengths must be finite and >= 0, got -2"),
        (lambda: estimate_bins(["a"], 2), "lengths must be numbers"),
        (lambda: estimate_bins([(1, 2)], 2), r"lengths must have shape \(n,\) as the buckets have, got \(1, 2\)"),
        (lambda: estimate_bins_2d([(0, 2), (1, 1)], 2), "lengths must have inputs > 0"),
        (lambda: LengthBuckets([3, 3]), "edges must ascend"),
        (lambda: LengthBuckets([(3, 2), (3, 1)]), "edges must ascend"),
        (lambda: LengthBuckets([]), "edges must have shape"),
        (lambda: LengthBuckets([3], max_ratio=[1]), "max_ratio is for strict buckets of two dimensions"),
        (lambda: LengthBuckets(EDGES, [1, 2]), "max_ratio must be a number >= 0 for each of 4 buckets"),
        (lambda: LengthBuckets(EDGES).choose([1, 2]), r"lengths must have shape \(n, 2\) as the buckets have"),
        (lambda: padding_share([1, 2], [[]]), r"batches must hold indices of the 2 lengths, got \[\]"),
        (lambda: padding_share([1, 2], [[2]]), r"batches must hold indices of the 2 lengths, got \[2\]"),
        (lambda: padding_share([0, 0], [[0, 1]]), "batches must hold at least one example of length > 0"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_padding_of_pairs_adds_both_sides():
    lengths = [(4, 1), (2, 3)]
    assert padding_share(lengths, [[0, 1]]) == 1 - 10 / (2 * 4 + 2 * 3)
    assert padding_share(lengths, [[0], [1]]) == 0


def test_buckets_of_empty_outputs_take_empty_outputs_alone():
    buckets = LengthBuckets.fitted([(1, 0), (2, 0), (3, 0), (4, 0)], buckets=2)
    assert buckets.choose([(1, 0), (4, 0), (1, 1)]).tolist()[2] == -1
    assert (buckets.choose([(1, 0), (4, 0)]) >= 0).all()
