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
from batchlab.measure.speed.step_time import Throughput, saturation, throughput
from batchlab.measure.training_step import TrainingStep
from tests.spine.forked import in_ranks
from tests.spine.jobs import toy_job

LOAD, FIXED, EACH, UPDATE = 2.0**-8, 2.0**-6, 2.0**-6, 0.125  # seconds; powers of 2, so that their sums are exact


def pass_seconds(size):
    return FIXED + size * (EACH + LOAD)


class Timed:
    """A job that takes the seconds above, and `first` more at the first pass of each size."""

    def __init__(self, first=0.0, most=math.inf, load=LOAD, **job):
        self.now, self.first, self.most, self.load, self.sizes, self.models = 0.0, first, most, load, [], 0
        self.job = Job("timed", self.model, self.loss, train=self, valid=[0.0], **job)

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.now += self.load
        return torch.zeros(2)

    def model(self):
        self.models += 1
        return nn.Linear(2, 1)

    def loss(self, module, batch):
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
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

    def make(kind=Timed, **options):
        made = kind(**options)
        monkeypatch.setattr("batchlab.measure.speed.step_time.time", SimpleNamespace(perf_counter=lambda: made.now))
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


class Queued(Timed):
    """The same on a device that works behind the program: forward and backward and the update end at `wait`."""

    waiting = 0.0

    def loss(self, module, batch):
        before = self.now
        loss = super().loss(module, batch)
        self.now, self.waiting = before, self.waiting + self.now - before
        return loss

    def updated(self, *_):
        self.waiting += UPDATE

    def wait(self):
        self.now, self.waiting = self.now + self.waiting, 0.0


def test_what_a_device_still_has_to_do_is_waited_for(timed, monkeypatch):
    plain = throughput(timed().job, [1, 8], seconds=math.inf, device="cpu")
    queued = timed(kind=Queued)
    monkeypatch.setattr(TrainingStep, "wait", queued.wait)
    found = throughput(queued.job, [1, 8], seconds=math.inf, device="cpu")
    assert found.micro_batches == plain.micro_batches and found.update == plain.update
    assert found.loading == plain.loading and found.steps == plain.steps


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
        ([], 5.0, r"micro_batches must be a sequence of integers of at least 1, got \[\]"),
        ([4, 0], 5.0, r"micro_batches must be a sequence of integers of at least 1, got \[4, 0\]"),
        ([8.5], 5.0, r"micro_batches must be a sequence of integers of at least 1, got \[8.5\]"),
        (8, 5.0, "micro_batches must be a sequence of integers of at least 1, got 8"),
        ("8", 5.0, "micro_batches must be a sequence of integers of at least 1, got '8'"),
        ([4], 0.0, "seconds must be > 0, got 0.0"),
        ([4], math.nan, "seconds must be > 0, got nan"),
    ],
)
def test_bad_input_is_named(sizes, seconds, message):
    with pytest.raises(InputError, match=message):
        throughput(toy_job(), sizes, seconds=seconds)


def test_a_whole_step_goes_to_loading_the_update_and_the_rest(timed):
    """t(b) = 1/64 + 1/8 + b·(1/64 + 1/256): t0 = 9/64, t1 = 5/256, so that half the speed is reached at 7.2."""
    found = throughput(timed().job, [1, 2, 4, 64], seconds=math.inf, device="cpu")
    law = found.law
    assert law.fixed.value == pytest.approx(9 / 64, rel=1e-12)
    assert law.per_example.value == pytest.approx(5 / 256, rel=1e-12)
    assert (
        law.half.value == pytest.approx(7.2, rel=1e-12) == pytest.approx(law.half.low) == pytest.approx(law.half.high)
    )
    for step in found.steps:
        whole = pass_seconds(step.examples) + UPDATE
        assert step.seconds.low == step.seconds.value == step.seconds.high == whole
        assert step.units_per_second.value == pytest.approx(step.examples / whole, rel=1e-12)
        assert step.loading == pytest.approx(step.examples * LOAD / whole, rel=1e-12)
        assert step.update == pytest.approx(UPDATE / whole, rel=1e-12)
        assert step.overhead == pytest.approx((9 / 64) / whole, rel=1e-9) and step.communication is None
    assert [step.bottleneck for step in found.steps] == 3 * ["launch/overhead"] + ["compute"]
    assert (found.unit, found.units_per_example, found.out_of_memory_at) == ("example", 1.0, None)
    assert (found.saturation.low, found.saturation.value, found.saturation.high) == (64.0, 64.0, 64.0)
    assert Throughput.from_json(found.to_json()) == found


def test_tokens_are_counted_as_the_job_counts_them(timed):
    fixed = throughput(timed(unit="token", units_per_example=8).job, [2], seconds=math.inf, device="cpu")
    varied = throughput(timed(unit="token", units_per_example=lambda b: 3 * len(b)).job, [2], seconds=9.0, device="cpu")
    whole = pass_seconds(2) + UPDATE
    assert fixed.steps[0].units_per_second.value == pytest.approx(16 / whole, rel=1e-12)
    assert varied.steps[0].units_per_second.value == pytest.approx(6 / whole, rel=1e-12)
    assert (varied.unit, varied.units_per_example) == ("token", 3.0)
    assert math.isnan(fixed.law.half.value) and math.isnan(fixed.steps[0].overhead)
    assert fixed.law.half.method == "undefined: 1 sizes, a line needs 2"
    assert Throughput.from_json(fixed.to_json()).law.half.method == fixed.law.half.method


def test_a_count_of_tokens_may_be_a_tensor(timed):
    """As a masked batch gives it; the result is written as numbers."""
    job = timed(unit="token", units_per_example=lambda batch: torch.tensor(3) * len(batch)).job
    found = throughput(job, [1, 4], seconds=20, device="cpu")
    assert found.units_per_example == 3.0 and Throughput.from_json(found.to_json()) == found


def test_the_size_that_runs_out_of_memory_ends_the_ascent(timed):
    clock = timed(most=20)
    found = throughput(clock.job, [1, 16, 32, 64], seconds=math.inf, device="cpu")
    assert [point.examples for point in found.micro_batches] == [1, 16] and found.out_of_memory_at == 32
    assert max(clock.sizes) == 16
    assert [step.bottleneck for step in found.steps] == ["launch/overhead", "memory capacity"]
    told = throughput(timed().job, [128, 160], seconds=math.inf, device="cpu", out_of_memory_at=256)
    assert [step.bottleneck for step in told.steps] == ["compute", "compute"]  # 160 gains under 5 % on 128
    with pytest.raises(torch.OutOfMemoryError):
        throughput(timed(most=3).job, [4, 8], seconds=math.inf, device="cpu")
    with pytest.raises(InputError, match="out_of_memory_at must be larger than every micro-batch to time, got 8"):
        throughput(timed().job, [4, 8], out_of_memory_at=8)


def test_slow_loading_is_named(timed):
    found = throughput(timed(load=1.0).job, [1, 8], seconds=math.inf, device="cpu")
    assert found.steps[1].bottleneck == "data" and found.steps[1].loading == pytest.approx(
        8 / (8 + 17 / 64 + 0.0), rel=0.02
    )


def _speaks():
    import torch.distributed as dist

    job = toy_job(dtype=torch.float32, dropout=0.1)
    before = torch.get_rng_state()
    silent = throughput(job, [8, 2], seconds=0.2, device="cpu")
    found = throughput(job, [8, 2], seconds=0.2, device="cpu", communication=True)
    assert [step.communication for step in silent.steps] == [None, None]
    for step, plain in zip(found.steps, found.micro_batches, strict=True):
        assert math.isfinite(step.communication) and "DDP step less no_sync step, 2 ranks" in step.seconds.method
        assert step.seconds.value != plain.seconds.value and step.examples == plain.examples
    assert torch.equal(torch.get_rng_state(), before) and dist.get_world_size() == 2


def test_communication_is_measured_between_ranks_and_none_in_one_process(tmp_path):
    assert in_ranks(2, tmp_path, _speaks) == [0, 0]
    alone = throughput(toy_job(dtype=torch.float32), [2], seconds=0.05, device="cpu", communication=True)
    assert alone.steps[0].communication is None


def _delayed():
    """An all-reduce that takes 20 ms longer, by a communication hook that sleeps: it must be found."""
    import time

    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    from batchlab.measure.speed import communication

    class Slow(DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_comm_hook(
                dist.group.WORLD, lambda group, bucket: time.sleep(0.02) or allreduce_hook(group, bucket)
            )

    communication.DistributedDataParallel = Slow
    found = throughput(toy_job(dtype=torch.float32), [4], seconds=0.1, device="cpu", communication=True)
    assert found.steps[0].communication > 0.5 and found.steps[0].bottleneck == "communication"
    assert found.steps[0].seconds.value > 0.02


def test_a_slow_all_reduce_is_the_bottleneck(tmp_path):
    assert in_ranks(2, tmp_path, _delayed) == [0, 0]


@pytest.mark.slow
def test_a_small_transformer_saturates_before_its_memory():
    """A CPU is saturated almost at once: the speed at the best size is at least 1.2 times that at 1 (measured 1.5)."""
    from batchlab.workloads.models import ByteTransformer

    tokens = torch.randint(256, (64, 129), generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    data = torch.utils.data.TensorDataset(tokens)
    job = Job("bytes", lambda: ByteTransformer(128, width=128, layers=4, heads=4), loss, train=data, valid=data)
    found = throughput(job, [1, 2, 4, 8, 16, 32, 64], seconds=60.0, device="cpu")
    speeds = {step.examples: step.units_per_second.value for step in found.steps}
    assert max(speeds.values()) >= 1.2 * speeds[1]
    assert found.saturation.low <= found.saturation.value <= found.saturation.high
