"""Compiled models in the finder: every size is compiled, and what a compiler takes is not measured as the step's."""

import pytest
import torch
import torch._dynamo
from torch import nn

from batchlab.core.job import Job
from batchlab.measure.memory.compiled import compiled_graphs, every_size_compiled
from batchlab.measure.memory.micro_batch import find_micro_batch
from tests.measure.memory.limited import without_freeing


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    torch._dynamo.reset()
    without_freeing(monkeypatch)
    yield
    torch._dynamo.reset()


class Bounded(nn.Module):
    """Runs out above a limit, outside of what is compiled; notes the sizes it ran."""

    def __init__(self, limit, backend, dynamic):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.compiled = torch.compile(self.inner, backend=backend, dynamic=dynamic)
        self.limit, self.ran = limit, []

    def forward(self, x):
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.ran.append((len(x), self.training))
        return self.compiled(x)


def compiled_job(backend, dynamic, limit=200):
    data, models = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0)), []

    def model():
        models.append(Bounded(limit, backend, dynamic))
        return models[-1]

    return Job("compiled", model, lambda m, x: m(x).square().mean(), data, data), models


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, False])
def test_a_compiled_model_is_searched_as_any_other(backend, dynamic):
    """Without dynamic shapes each size is compiled, also beyond the 8 after which torch would run eager code."""
    job, models = compiled_job(backend, dynamic)
    before, limit = compiled_graphs(), torch._dynamo.config.recompile_limit
    found = find_micro_batch(job, start=3, saturation=0, rel_gap=0, device="cpu")
    graphs = compiled_graphs() - before
    fitting = {each.size for each in found.tries if each.fits}
    assert found.size == 200 and {size for size, _ in models[0].ran} == fitting
    if dynamic is False:
        assert graphs == 2 * len(fitting) > 8, "once in training and once in evaluation"
    else:
        assert 0 < graphs <= 6
    assert torch._dynamo.config.recompile_limit == limit


def test_runs_that_compiled_are_repeated_and_neither_timed_nor_metered():
    """The compiler is made to take an hour and a terabyte; what is measured is the run after it."""
    clock, peaks, compiling = [0.0], [], [False]

    def backend(module, inputs):
        clock[0] += 3600.0
        compiling[0] = True
        return module.forward

    class Metered:
        usable = 10**9

        def start(self):
            compiling[0] = False

        def peak(self):
            peaks.append(10**12 if compiling[0] else 1000)
            return peaks[-1]

    job, models = compiled_job(backend, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchlab.measure.memory.size_finder.time.perf_counter", lambda: clock[0])
        found = find_micro_batch(
            job, start=4, max_size=64, saturation=0, headroom=0.0, device="cpu", memory=Metered(), seconds=10**9
        )
    assert found.size == 64 and clock[0] >= 3600.0
    assert {each.seconds for each in found.tries} == {0.0}
    assert {each.peak_bytes for each in found.tries} == {1000}
    trained = [size for size, training in models[0].ran if training]
    assert trained == [each.size for each in found.tries for _ in range(2)]


def test_a_step_that_compiles_each_time_ends():
    compiled = torch.compile(torch.sin, backend="eager")

    def step(size):
        torch._dynamo.reset()
        compiled(torch.ones(size))

    assert find_micro_batch(step, max_size=16, start=4).size == 16


def test_the_limit_is_lifted_inside_only():
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    with every_size_compiled():
        assert torch._dynamo.config.recompile_limit > 100
    assert limits == (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)


@pytest.mark.slow
def test_inductor():
    job, _ = compiled_job("inductor", None)
    assert find_micro_batch(job, start=8, saturation=0, rel_gap=0, device="cpu").size == 200
