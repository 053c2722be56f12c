"""The micro-batch finder on given steps: what it returns was run and is near the limit, told the bytes or not."""

import statistics
import traceback

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.measure.memory.out_of_memory import is_out_of_memory
from tests.measure.memory.limited import Limited, without_freeing
from tests.measure.memory.limited import _quick as _quick


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


def test_an_error_that_the_caller_handles_keeps_its_frames():
    """A search where training ran out of memory: the errors of its own steps have that one as their context."""
    try:
        raise RuntimeError("CUDA out of memory.")
    except RuntimeError as error:
        assert find_micro_batch(Limited(20), max_size=64, rel_gap=0).size == 20
        assert traceback.extract_tb(error.__traceback__)


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
