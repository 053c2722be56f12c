"""Throughput by a clock that the job itself moves, so that every second is known; by the real one where it is not."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.core.job import Job
from batchlab.measure.step_time import Throughput, saturation, throughput
from tests.spine.jobs import toy_job

LOAD, FIXED, EACH, UPDATE = 2.0**-8, 2.0**-6, 2.0**-6, 0.125  # seconds; powers of 2, so that their sums are exact


def pass_seconds(size):
    return FIXED + size * (EACH + LOAD)


class Timed:
    """A job that takes the seconds above, and `first` more at the first pass of each size."""

    def __init__(self, first=0.0):
        self.now, self.first, self.sizes, self.models = 0.0, first, [], 0
        self.job = Job("timed", self.model, self.loss, train=self, valid=[0.0])

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.now += LOAD
        return torch.zeros(2)

    def model(self):
        self.models += 1
        return nn.Linear(2, 1)

    def loss(self, module, batch):
        self.now += FIXED + len(batch) * EACH + self.first * (len(batch) not in self.sizes)
        self.sizes.append(len(batch))
        return module(batch).mean()

    def updated(self, *_):
        self.now += UPDATE

    @property
    def spent(self):
        """Without the update that makes the optimizer's state, before the time begins."""
        return self.now - UPDATE


@pytest.fixture
def timed(monkeypatch):
    hooks = []

    def make(**options):
        made = Timed(**options)
        monkeypatch.setattr("batchlab.measure.step_time.time", SimpleNamespace(perf_counter=lambda: made.now))
        hooks.append(register_optimizer_step_post_hook(made.updated))
        return made

    yield make
    for hook in hooks:
        hook.remove()


def test_each_second_goes_where_it_belongs_and_the_sizes_take_turns(timed):
    clock = timed()
    found = throughput(clock.job, [6, 1, 8, 6], seconds=math.inf, device="cpu", memory_bytes={1: 77, 8: None})
    for point, size in zip(found.micro_batches, (1, 6, 8), strict=True):
        seconds = point.seconds
        assert point.examples == size and seconds.method == "wall clock, median of 60"
        assert seconds.low == seconds.value == seconds.high == pass_seconds(size)
    assert [point.memory_bytes for point in found.micro_batches] == [77, None, None]
    assert (found.update.value, found.update.method) == (UPDATE, "wall clock, median of 180")
    assert found.loading.value == LOAD and found.saturates_at == 6  # from 5.07 on
    assert clock.sizes == [1, 6, 8] * 61 and clock.models == 1
    assert Throughput.from_json(found.to_json()) == found


def test_warming_up_counts_only_for_a_size_that_has_no_other(timed):
    """The first pass of each size takes 16 s more. In 48.3 s there is time for two such, no third."""
    found = throughput(timed(first=16.0).job, [1, 2], seconds=48.3, device="cpu")
    assert [point.seconds.value for point in found.micro_batches] == [pass_seconds(1), 16.0 + pass_seconds(2)]
    assert found.micro_batches[1].seconds.method == "wall clock, median of 1"
    assert found.micro_batches[1].seconds.high == math.inf


@pytest.mark.parametrize(("seconds", "sizes"), [(1e-9, [1]), (2.0, [1]), (20.0, [1, 64]), (110.0, [1, 64, 4096])])
def test_a_size_that_does_not_fit_into_the_time_is_left_out(timed, seconds, sizes):
    """Foreseen from the size before, in proportion: 64 examples end after 2.4 s, 4096 after 83 s."""
    clock = timed()
    found = throughput(clock.job, [4096, 64, 1], seconds=seconds, device="cpu")
    assert [point.examples for point in found.micro_batches] == sizes == sorted(set(clock.sizes))
    assert clock.spent - seconds <= 4096 * LOAD + UPDATE or len(clock.sizes) == 2


def test_it_goes_on_while_a_pass_fits_into_the_time(timed):
    clock = timed()
    throughput(clock.job, [4, 8], seconds=20.0, device="cpu")
    assert -(8 * LOAD + UPDATE) <= 20.0 - clock.spent < pass_seconds(4)


def test_the_callers_generators_are_kept():
    job = toy_job(dropout=0.3, dtype=torch.float32)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = throughput(job, [16, 4], seconds=0.05, device="cpu")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert found.micro_batches[0].examples == 4 and found.update.value > 0


@given(
    fixed=st.floats(1e-6, 10.0),
    each=st.floats(1e-6, 10.0),
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=9, unique=True),
    tolerance=st.floats(0.01, 0.5),
)
def test_saturation_of_a_linear_time_is_its_closed_form(fixed, each, sizes, tolerance):
    """n/(a + bn) ≥ (1 - t)·N/(a + bN) for n ≥ (1 - t)·N·a/(a + t·bN)."""
    largest = max(sizes)
    bound = (1 - tolerance) * largest * fixed / (fixed + tolerance * each * largest)
    points = [MicroBatchTime(n, Estimate(fixed + each * n, 0.0, math.inf, "given")) for n in sizes]
    assume(all(abs(n / bound - 1) > 1e-9 for n in sizes))
    assert saturation(points, tolerance) == min(n for n in sizes if n > bound)


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ([], 5.0, r"micro_batches must be sizes of at least 1, got \[\]"),
        ([4, 0], 5.0, r"micro_batches must be sizes of at least 1, got \[4, 0\]"),
        ([4], 0.0, "seconds must be > 0, got 0.0"),
        ([4], math.nan, "seconds must be > 0, got nan"),
    ],
)
def test_bad_input_is_named(sizes, seconds, message):
    with pytest.raises(InputError, match=message):
        throughput(toy_job(), sizes, seconds=seconds)
