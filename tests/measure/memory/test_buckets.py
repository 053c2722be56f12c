"""A table of sizes by length: longest first, every size run, none smaller than that of a longer bucket."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.measure.memory.buckets import MicroBatchTable, ascending, edges, within
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.measure.memory.size_finder import MicroBatch
from tests.measure.memory.limited import without_freeing

PAIRS = ((10, 5), (10, 10), (20, 12), (20, 18), (40, 12), (40, 40))


class Modelled:
    """mem = a + B (c1 L_in + c2 L_out + c3 L_in^2), against a limit."""

    def __init__(self, limit, a=100.0, c1=3.0, c2=2.0, c3=0.05):
        self.limit, self.a, self.c1, self.c2, self.c3 = limit, a, c1, c2, c3
        self.ran, self.order = [], []

    def bytes(self, size, bucket):
        length, out = (*edges(bucket), 0)[:2]
        return self.a + size * (self.c1 * length + self.c2 * out + self.c3 * length**2)

    def fits(self, size, bucket):
        return self.bytes(size, bucket) <= self.limit

    def most(self, bucket):
        return int((self.limit - self.a) // (self.bytes(1, bucket) - self.a))

    def __call__(self, size, bucket):
        self.order += [bucket] if self.order[-1:] != [bucket] else []
        if not self.fits(size, bucket):
            raise MemoryError
        self.ran.append((size, bucket))


class Counting:
    """The meter of a modelled step."""

    def __init__(self, step):
        self.step, self.usable = step, step.limit

    def start(self):
        pass

    def peak(self):
        return self.step.bytes(*self.step.ran[-1])


def check(table, step, rel_gap=0.05):
    for bucket, found in zip(table.buckets, table.found, strict=True):
        assert (found.size, bucket) in step.ran
        limit = step.most(bucket)
        assert found.size == limit or (limit + 1 - found.size) / (limit + 1) <= rel_gap
    for (short, size), (long, smaller) in itertools.product(zip(table.buckets, table.sizes, strict=True), repeat=2):
        if within(short, long):
            assert size >= smaller


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("buckets", [(64, 8, 16, 32, 12.5), PAIRS])
def test_each_fits_was_run_and_none_falls_with_a_shorter_length(buckets, counted, monkeypatch):
    without_freeing(monkeypatch)
    step = Modelled(50_000.0)
    memory = Counting(step) if counted else None
    table = find_micro_batch(step, buckets=buckets, max_size=10**5, memory=memory, headroom=0.0)
    check(table, step)
    assert table.buckets == tuple(sorted(buckets)) and step.order == sorted(buckets, reverse=True)
    assert table.steps == len([each for found in table.found for each in found.tries if each.phase != "foreseen"])
    assert table[buckets[0]].size == table.sizes[table.buckets.index(buckets[0])]
    exact = find_micro_batch(step, buckets=buckets, max_size=10**5, rel_gap=0, memory=memory, headroom=0.0)
    assert exact.sizes == tuple(step.most(bucket) for bucket in exact.buckets)
    assert not any(step.fits(size + 1, bucket) for size, bucket in zip(exact.sizes, exact.buckets, strict=True))


@given(
    buckets=st.one_of(
        st.lists(st.integers(1, 2000), min_size=1, max_size=8, unique=True),
        st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=8, unique=True),
    ),
    limit=st.floats(1e3, 1e7),
    quadratic=st.sampled_from([0.0, 0.05, 1.0]),
    most=st.sampled_from([10, 100, 10**6]),
)
def test_any_table_keeps_the_promise(buckets, limit, quadratic, most):
    with pytest.MonkeyPatch.context() as patch:
        without_freeing(patch)
        step = Modelled(limit, c3=quadratic)
        if min(map(step.most, buckets)) < 1:
            with pytest.raises(InputError, match=r"^bucket .*: not even 1 example fits"):
                find_micro_batch(step, buckets=buckets, max_size=most)
            return
        inner = step.most
        step.most = lambda bucket: min(inner(bucket), most)
        check(find_micro_batch(step, buckets=buckets, max_size=most), step)


def test_the_next_bucket_starts_at_twice_the_longer_one(monkeypatch):
    without_freeing(monkeypatch)
    step = Modelled(50_000.0, c2=0.0, c3=0.0)
    table = find_micro_batch(step, buckets=[100, 50], max_size=10**6)
    assert table[50].tries[0].size == 2 * table[100].size
    assert table[50].steps < table[100].steps


def test_a_bucket_for_which_nothing_fits_is_named():
    with pytest.raises(InputError, match=r"bucket \(40, 40\): not even 1 example fits in memory, it ran out"):
        find_micro_batch(Modelled(150.0), buckets=PAIRS, max_size=64)


def test_a_job_by_buckets(monkeypatch):
    """1000 tokens fit, which the model counts itself; the size is that of the batch that was made."""
    without_freeing(monkeypatch)
    seen = []

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            seen.append((*x.shape[:2], self.training))
            if x.shape[0] * x.shape[1] > 1000:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self.inner(x)

    def make_batch(size, length):
        return torch.zeros(size, length, 4)

    data = torch.zeros(4096, 4)
    job = Job("recurrent", Recurrent, lambda m, x: m(x).square().mean(), data, data)
    settings = {"make_batch": make_batch, "device": "cpu", "saturation": 0, "rel_gap": 0}
    table = find_micro_batch(job, buckets=[10, 100, 31], **settings)
    assert dict(zip(table.buckets, table.sizes, strict=True)) == {10: 100, 31: 32, 100: 10}
    assert {each.phase for found in table.found for each in found.tries} == {None, "forward"}
    assert (100, 10, True) in seen and (100, 10, False) in seen, "trained and evaluated"
    lengths = {"make_batch": lambda length: torch.zeros(4, length, 4), "unit": "token", "max_size": 4096}
    found = find_micro_batch(job, **settings | lengths)
    assert (found.size, found.unit) == (250, "token")
    with pytest.raises(InputError, match="not even 1 token fits in memory"):
        find_micro_batch(job, **settings | lengths | {"make_batch": lambda length: torch.zeros(2000, length, 4)})


def test_what_does_not_go_together():
    data = torch.zeros(4, 1)
    job = Job("j", lambda: nn.Linear(1, 1), lambda m, x: m(x).mean(), data, data)
    for job_or_step, settings, text in (
        (job, {"buckets": [1]}, "make_batch must be given with the buckets of a job"),
        (job, {"unit": "token", "make_batch": lambda size: data}, "max_size must be given in tokens"),
        (job, {"renew": lambda: None}, "renew is for a step function"),
        (len, {"max_size": 4, "make_batch": lambda size: data}, "make_batch is for a job"),
    ):
        with pytest.raises(InputError, match=text):
            find_micro_batch(job_or_step, **settings)


@pytest.mark.parametrize(
    "buckets, text",
    [
        ([], r"buckets must be a list or tuple of at least one length or tuple of lengths, got \[\]"),
        ("12", "buckets must be a list or tuple of at least one"),
        ([0], "buckets must hold finite lengths > 0, got 0"),
        ([float("nan")], "buckets must hold finite lengths > 0, got nan"),
        ([(3, -1)], r"buckets must hold finite lengths > 0, got \(3, -1\)"),
        ([3, (3, 1)], "buckets must be all lengths, or all tuples of as many lengths"),
        ([3, 3.0], "buckets must differ"),
    ],
)
def test_bad_buckets(buckets, text):
    with pytest.raises(InputError, match=text):
        find_micro_batch(len, buckets=buckets, max_size=4)


def table(**sizes):
    return MicroBatchTable(
        tuple(int(edge[1:]) for edge in sizes), tuple(MicroBatch(size, "", ()) for size in sizes.values())
    )


def test_neighbours_of_one_size_are_merged_into_the_longer():
    merged = table(_5=64, _10=32, _20=32, _30=32, _40=8).merged()
    assert (merged.buckets, merged.sizes) == ((5, 30, 40), (64, 32, 8))
    with pytest.raises(InputError, match="only buckets of one length can be merged"):
        MicroBatchTable(((1, 2),), (MicroBatch(1, "", ()),)).merged()


def test_the_size_for_an_example():
    one = table(_5=64, _10=32)
    assert [one.size_for(length) for length in (1, 5, 5.5, 10, 10.5)] == [64, 64, 32, 32, None]
    pairs = MicroBatchTable(PAIRS, tuple(MicroBatch(size, "", ()) for size in (9, 8, 7, 6, 5, 4)))
    assert [pairs.size_for(*pair) for pair in ((8, 5), (8, 11), (21, 1), (10, 10), (41, 1))] == [9, 7, 5, 8, None]
    with pytest.raises(InputError, match="lengths must be 2 of them"):
        pairs.size_for(3)
    with pytest.raises(InputError, match=r"bucket must be one of \[5, 10\], got 6"):
        one[6]
    assert ascending([(2, 1), (1, 9)]) == ((1, 9), (2, 1))
    assert ascending([np.int64(20), np.float32(10)]) == (10, 20)
