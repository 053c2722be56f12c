"""The micro-batch finder: what it returns was run, what it takes it gives back, and ranks agree."""

import gc
import math
import multiprocessing
import os
import random
import statistics
import traceback
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.job import Job
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.measure.memory.out_of_memory import is_out_of_memory
from batchlab.measure.training_step import TrainingStep
from tests.spine.forked import in_ranks
from tests.spine.jobs import toy_data

PHASES = ("data", "forward", "backward", "step", "evaluation")


def without_freeing(patch):
    """For steps that hold nothing: collecting garbage takes 50 ms."""
    for module in ("micro_batch", "size_finder", "subjects"):
        patch.setattr(f"batchlab.measure.memory.{module}.free", lambda device=None: None)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_freeing(monkeypatch)


class Limited:
    """A step that runs out of memory above a limit."""

    def __init__(self, limit, error=None):
        self.limit, self.error, self.ran = limit, error or torch.OutOfMemoryError("CUDA out of memory."), []

    def __call__(self, size):
        if size > self.limit:
            raise self.error
        self.ran.append(size)


class FakeMeter:
    """Memory that grows as fixed + slope·size; tells the step's size by what ran last."""

    def __init__(self, step, usable, fixed, slope):
        self.step, self.usable, self.fixed, self.slope = step, usable, fixed, slope

    def start(self):
        pass

    def peak(self):
        return self.fixed + self.slope * self.step.ran[-1]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("start", [1, 7, 32, 256])
def test_the_size_was_run_and_is_near_the_limit(start, counted):
    """For all limits to 300, in 8 steps at the median where a step only fits or fails, and in 4 where bytes are told.

    Told bytes are 30 % fixed and linear beyond, so that the limit is where they exceed what is usable.
    """
    steps = []
    for limit in range(1, 301):
        for rel_gap in (0.05, 0.0):
            step = Limited(10**9 if counted else limit)
            meter = FakeMeter(step, 1e6, 3e5, 7e5 / (limit + 0.5)) if counted else None
            settings = {"max_size": 4096, "start": start, "headroom": 0.0, "memory": meter}
            found = find_micro_batch(step, rel_gap=rel_gap, **settings)
            assert found.size in step.ran
            assert found.size == limit or (limit + 1 - found.size) / (limit + 1) <= rel_gap
            steps += [found.steps] if rel_gap else []
    assert statistics.median(steps) <= (4 if counted else 8)


def test_the_record():
    found = find_micro_batch(Limited(100), max_size=1000)
    assert [(each.size, each.fits, each.phase) for each in found.tries] == [
        (32, True, None),
        (128, False, "step"),
        (64, True, None),
        (90, True, None),
        (107, False, "step"),
        (98, True, None),
        (102, False, "step"),
    ]
    assert found.why == "102 does not fit (step)"
    assert find_micro_batch(Limited(100), max_size=48).why == "48 is the largest size allowed"
    assert found.steps == 7


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
        RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size"),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error):
    assert is_out_of_memory(error)
    assert find_micro_batch(Limited(40, error), max_size=64, rel_gap=0).size == 40


def test_a_real_failure_of_the_cpu_allocator():
    def step(size):
        torch.empty(2**45 if size > 20 else 1)

    assert find_micro_batch(step, max_size=64, rel_gap=0).size == 20


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x"), OSError(12, "")]
)
def test_other_errors_pass_unchanged(error):
    """The same object, with its cause and the frames down to where it was raised."""
    cause = LookupError("cause")

    def step(size):
        if size > 40:
            raise error from cause

    with pytest.raises(type(error)) as caught:
        find_micro_batch(step, max_size=64)
    assert caught.value is error and error.__cause__ is cause and error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].name == "step"


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt):
        find_micro_batch(Limited(40, KeyboardInterrupt()), max_size=64)


def test_not_even_one():
    with pytest.raises(InputError, match=r"not even 1 example fits in memory.*CUDA out of memory"):
        find_micro_batch(Limited(0), max_size=64)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({}, "max_size must be given"),
        ({"max_size": 0}, "max_size must be an integer of at least 1, got 0"),
        ({"max_size": 8, "headroom": 1.0}, r"headroom must lie in \[0, 1\), got 1.0"),
        ({"max_size": 8, "start": 0}, "start must be an integer of at least 1, got 0"),
        ({"max_size": 8, "saturation": -0.1}, "saturation must be >= 0, got -0.1"),
        ({"max_size": 8, "seconds": float("nan")}, "seconds must be >= 0, got nan"),
        ({"max_size": 8, "rel_gap": -0.1}, r"rel_gap must lie in \[0, 1\), got -0.1"),
    ],
)
def test_bad_input(settings, text):
    with pytest.raises(InputError, match=text):
        find_micro_batch(Limited(4), **settings)


def test_known_memory_is_foreseen_and_the_margin_kept():
    for headroom in (0.0, 0.1, 0.5):
        step = Limited(10**9)
        counter = FakeMeter(step, usable=100_000, fixed=1_000, slope=50)
        found = find_micro_batch(step, max_size=10**6, headroom=headroom, memory=counter)
        limit = ((1 - headroom) * 100_000 - 1_000) / 50
        assert 0.95 * limit <= found.size <= limit
        assert max(step.ran) <= 1.06 * limit, "a size was run that was known to take far too much"
        assert found.steps <= 5
        assert {each.phase for each in found.tries if not each.fits} <= {"foreseen", "headroom"}


class Uneven(FakeMeter):
    """The same with a jump of the fixed part above a size, and in whole blocks, as allocators give memory."""

    def __init__(self, *given, jump_above=10**9, jump=0, block=1):
        super().__init__(*given)
        self.jump_above, self.jump, self.block = jump_above, jump, block

    def peak(self):
        bytes_ = super().peak() + (self.jump if self.step.ran[-1] > self.jump_above else 0)
        return -(-bytes_ // self.block) * self.block

    def limit(self, most):
        """By trying every size."""
        sizes = []
        for size in range(1, most + 1):
            self.step.ran.append(size)
            sizes += [size] if self.peak() <= self.usable else []
        self.step.ran.clear()
        return min([max(sizes), self.step.limit])


@pytest.mark.parametrize(
    "shape",
    [
        {"limit": 1000},
        {"limit": 1700},
        {"jump_above": 800, "jump": 30_000},
        {"jump_above": 800, "jump": -30_000},
        {"block": 4096},
        {"block": 40_000},
    ],
    ids=str,
)
def test_memory_that_grows_unevenly_costs_few_steps_and_keeps_the_promise(shape):
    shape = dict(shape)
    step = Limited(shape.pop("limit", 10**9))
    counter = Uneven(step, 100_000, 1_000, 50, **shape)
    limit = counter.limit(4096)
    found = find_micro_batch(step, max_size=4096, headroom=0.0, memory=counter)
    assert (limit + 1 - found.size) / (limit + 1) <= 0.05 or found.size == limit
    assert found.steps <= 12


@given(
    fixed=st.integers(0, 60_000),
    slope=st.integers(1, 3000),
    block=st.sampled_from([1, 512, 8192, 30_000]),
    jump_above=st.integers(1, 2000),
    jump=st.integers(0, 30_000),
    start=st.sampled_from([1, 32, 256]),
)
def test_the_promise_holds_for_memory_of_any_growth(fixed, slope, block, jump_above, jump, start):
    with pytest.MonkeyPatch.context() as patch:
        without_freeing(patch)
        step = Limited(10**9)
        counter = Uneven(step, 100_000, fixed, slope, jump_above=jump_above, jump=jump, block=block)
        limit = counter.limit(2048) if fixed + slope + block <= 100_000 else 0
        if limit == 0:
            return
        found = find_micro_batch(step, max_size=2048, start=start, headroom=0.0, memory=counter)
        assert found.size in step.ran and found.size <= limit
        assert found.size == limit or (limit + 1 - found.size) / (limit + 1) <= 0.05
        assert found.steps <= 24


def test_a_step_that_eats_into_the_margin_does_not_fit():
    step = Limited(10**9)
    found = find_micro_batch(step, max_size=64, headroom=0.5, memory=FakeMeter(step, 1000, 0, 10))
    assert found.size == 50 or (51 - found.size) / 51 <= 0.05
    assert ("headroom" in {each.phase for each in found.tries}) == (max(step.ran) > 50)


def test_stops_where_speed_no_longer_grows(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("batchlab.measure.memory.size_finder.time.perf_counter", lambda: clock[0])

    def step(size):
        clock[0] += 1e-3 * max(size, 16)

    found = find_micro_batch(step, max_size=4096, start=1, saturation=0.05)
    assert found.why == "examples per second grew by less than 5% over two doublings"
    assert max(each.size for each in found.tries) == 64
    assert 16 <= found.size <= 64


def test_stops_when_time_is_up():
    found = find_micro_batch(Limited(10**9), max_size=10**6, start=1, seconds=0.0)
    assert (found.size, found.why) == (1, "the time was up")


class Bulky(nn.Module):
    """Keeps a weak reference to every activation, and fails on demand."""

    def __init__(self, failing, limit, seen):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100))
        self.register_buffer("passes", torch.zeros(()))
        self.failing, self.limit, self.seen, self.size, self.failures = failing, limit, seen, 0, 0

    def check(self, place):
        if self.failing == place and self.size > self.limit:
            self.failures += 1
            raise RuntimeError("HIP out of memory. Tried to allocate")

    def forward(self, x):
        self.size = len(x)
        self.passes += 1
        activation = x[:, None] * self.weight
        self.seen.append(weakref.ref(activation))
        self.check("forward" if self.training else "evaluation")
        if activation.requires_grad:
            activation.register_hook(lambda gradient: self.check("backward"))
        return activation.square()


def bulky_job(failing, limit, seen):
    """A job that fails above `limit`, its models, and what makes the optimizer's step fail too, while it is hooked."""
    data, models = torch.arange(1024.0), []

    def model():
        models.append(Bulky(failing, limit, seen))
        return models[-1]

    def collate(batch):
        models[-1].size = len(batch)
        models[-1].check("data")
        return torch.stack(batch)

    job = Job("bulky", model, lambda m, x: m(x).mean(), data, data, collate=collate)
    return job, models, register_optimizer_step_pre_hook(lambda *_: models[-1].check("step"))


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def failed_steps(failing, least, limit=130):
    """Searches until `least` steps have failed in that phase; returns the failures, and what the steps kept alive."""
    seen, failures, alive = [], 0, 0
    while failures < least:
        job, models, hook = bulky_job(failing, limit, seen)
        found = find_micro_batch(job, start=512, saturation=0, rel_gap=0, device="cpu")
        hook.remove()
        assert found.size == limit
        assert {each.phase for each in found.tries if not each.fits} == {failing}
        failures += models[0].failures
        dead = weakref.ref(models.pop())
        gc.collect()
        alive += dead() is not None
    return failures, alive + sum(reference() is not None for reference in seen)


def leaves_nothing_behind():
    """A process of its own: a worker's heap moves by itself. What was imported is frozen: it is collected for ever."""
    torch.set_num_threads(1)
    own = Bulky("", 0, [])
    optimizer = torch.optim.AdamW(own.parameters())
    own(torch.ones(3)).sum().backward()
    optimizer.step()

    def state():
        tensors = [own.weight, own.weight.grad, own.passes, *optimizer.state[own.weight].values()]
        generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        return [tensor.clone() for tensor in tensors], generators

    before, generators = state()
    for failing in PHASES:
        failed_steps(failing, 1)  # loads what is loaded once
    gc.collect()
    gc.freeze()
    for failing in PHASES:
        held = resident()
        failures, alive = failed_steps(failing, 100)
        assert failures >= 100 and alive == 0
        assert resident() - held <= 2**20 + 1e-3 * held, failing
    after, generators_after = state()
    assert all(map(torch.equal, before, after)) and own.training
    assert torch.equal(generators[0], generators_after[0]) and generators[2] == generators_after[2]
    assert np.array_equal(generators[1], generators_after[1])


def test_a_hundred_failures_in_each_phase_leave_nothing_behind():
    child = multiprocessing.get_context("spawn").Process(target=leaves_nothing_behind)
    child.start()
    child.join(300)
    assert child.exitcode == 0


def test_an_evaluation_that_runs_out_is_told_from_a_training_step():
    """The metric takes memory that grows faster than that of the step; without it the step's own limit counts."""
    data = torch.zeros(256, 3)

    def metric(module, batch):
        if len(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"pairs": 0.0}

    job = Job("pairs", lambda: nn.Linear(3, 1), lambda m, x: m(x).mean(), data, data[:200], metric=metric)
    settings = {"saturation": 0, "rel_gap": 0, "start": 32, "device": "cpu"}
    found = find_micro_batch(job, **settings)
    assert (found.size, found.why) == (20, "21 does not fit (evaluation)")
    assert find_micro_batch(job, **settings, evaluation=False).size == 256


def test_tensors_of_a_failed_step_die_before_the_next_one():
    alive = []

    def step(size):
        assert not any(reference() is not None for reference in alive)
        held = torch.empty(1000)
        alive.append(weakref.ref(held))
        if size > 20:
            try:
                raise MemoryError("inner")
            except MemoryError as error:
                raise RuntimeError("CUDA out of memory.") from error

    assert find_micro_batch(step, max_size=64, rel_gap=0).size == 20
    assert len(alive) > 4


def test_neither_model_nor_generators_nor_data_change():
    made = []

    def model():
        made.append(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double())
        return made[-1]

    own = model()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    job = toy_job(model=model)
    state = torch.get_rng_state()
    found = find_micro_batch(job, start=2, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert 2 <= found.size <= len(job.train) and len(made) == 2
    assert all(each.peak_bytes is None or each.peak_bytes >= 0 for each in found.tries)


def toy_job(model):
    def loss(module, batch):
        x, y = batch
        return (module(x).squeeze(1) - y).square().mean()

    data = toy_data(256)
    return Job("toy", model, loss, data, toy_data(8, seed=1))


def test_the_state_of_the_optimizer_is_there_before_the_first_size():
    found_state = []

    def loss(module, batch):
        x, y = batch
        frame = __import__("sys")._getframe()
        while "self" not in frame.f_locals or not hasattr(frame.f_locals["self"], "optimizer"):
            frame = frame.f_back
        found_state.append(len(frame.f_locals["self"].optimizer.state))
        return (module(x).squeeze(1) - y).square().mean()

    job = Job("toy", lambda: nn.Linear(6, 1).double(), loss, toy_data(64), toy_data(8, seed=1), optimizer="adamw")
    find_micro_batch(job, device="cpu", evaluation=False)
    assert found_state and all(count == 2 for count in found_state)


def _one_rank_runs_out(folder):
    without_freeing(pytest.MonkeyPatch())
    rank = dist.get_rank()
    for limit in range(3, 53):
        found = find_micro_batch(Limited(limit if rank == 1 else 10**6), max_size=4096, start=32)
        assert found.size == limit or (limit + 1 - found.size) / (limit + 1) <= 0.05
        (folder / f"{rank}-{limit}").write_text(f"{found.size} {[each.size for each in found.tries]}")


def test_ranks_agree_when_one_runs_out(tmp_path):
    assert in_ranks(2, tmp_path, _one_rank_runs_out, tmp_path) == [0, 0]
    for limit in range(3, 53):
        assert (tmp_path / f"0-{limit}").read_text() == (tmp_path / f"1-{limit}").read_text()


def _one_rank_fails(folder):
    error = KeyError("broken") if dist.get_rank() == 1 else torch.OutOfMemoryError("CUDA out of memory.")
    try:
        find_micro_batch(Limited(40, error), max_size=64)
    except (KeyError, BatchlabError) as caught:
        (folder / f"{dist.get_rank()}").write_text(f"{type(caught).__name__}: {caught}")


def test_a_rank_that_fails_otherwise_stops_all(tmp_path):
    assert in_ranks(2, tmp_path, _one_rank_fails, tmp_path) == [0, 0]
    assert (tmp_path / "1").read_text() == "KeyError: 'broken'"
    assert (tmp_path / "0").read_text().startswith("BatchlabError: another rank failed in a step with 64 examples")


def _job_under_ranks(folder):
    found = find_micro_batch(toy_job(lambda: nn.Linear(6, 1).double()), device="cpu")
    (folder / f"{dist.get_rank()}").write_text(f"{found.size} {[each.size for each in found.tries]}")


def test_a_job_under_ranks(tmp_path):
    assert in_ranks(2, tmp_path, _job_under_ranks, tmp_path) == [0, 0]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_fits_for_500_steps():
    data = torch.randn(65536, 4096)
    job = Job(
        "wide",
        lambda: nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8))),
        lambda m, x: m(x).square().mean(),
        data,
        data[:8],
    )
    before = torch.cuda.memory_allocated()
    found = find_micro_batch(job, headroom=0.9)
    assert torch.cuda.memory_allocated() - before <= 2**20
    model = job.model().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(500):
        job.loss(model, data[: found.size].cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("told", [True, False])
def test_real_out_of_memory_on_a_gpu(told):
    """Within 2 GiB: the size found fits again, 12 % more runs out, and the allocator has its memory back.

    Told nothing but the errors, every failure is the device's own; told the bytes, most are foreseen.
    """

    class Untold:
        usable = 0

        def start(self):
            pass

        def peak(self):
            return None

    free, total = torch.cuda.mem_get_info()
    data = torch.randn(8192, 256)
    job = Job(
        "deep",
        lambda: nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(1500))),
        lambda m, x: m(x).square().mean(),
        data,
        data,
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(min(free, 2**31) / total)
    try:
        found = find_micro_batch(job, headroom=0.0, memory=None if told else Untold())
        assert torch.cuda.memory_allocated() - before <= 2**20 + before // 1000
        assert {each.phase for each in found.tries} & {"forward", "backward", "foreseen", "headroom"}
        step = TrainingStep(job, device=torch.device("cuda"), copies=1)
        for _ in range(3):
            step(found.size)
        with pytest.raises(torch.OutOfMemoryError):
            step(math.ceil(found.size * 1.12))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
