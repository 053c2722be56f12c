"""The finder on a GPU, within 512 MiB: the size found goes on fitting, and the allocator has its memory back."""

import contextlib
import gc
import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.measure.memory.device_memory import CudaMeter, meter
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.measure.memory.out_of_memory import free, is_out_of_memory
from batchlab.measure.speed.step_time import throughput
from batchlab.measure.training_step import TrainingStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="counts a GPU's memory")]
MIB = 2**20
LIMIT = 512 * MIB


class Untold:
    """A meter that knows nothing: what is left are the device's errors."""

    usable = 0

    def start(self):
        pass

    def peak(self):
        return None


@pytest.fixture
def limited(accelerator):
    """The device with LIMIT more bytes than what stays: cuBLAS's workspaces among it, as after any training step."""
    if accelerator.type != "cuda":
        pytest.skip("counts a GPU's memory")
    step = TrainingStep(job(examples=64), device=accelerator)
    step(64)
    del step
    free(accelerator)
    _, total = torch.cuda.mem_get_info(accelerator)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(accelerator) + LIMIT) / total)
    yield accelerator
    torch.cuda.set_per_process_memory_fraction(1.0)
    free(accelerator)


def job(depth=100, width=256, examples=8192):
    data = torch.randn(examples, width, generator=torch.Generator().manual_seed(0))
    layers = lambda: [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]  # noqa: E731
    return Job("deep", lambda: nn.Sequential(*layers()), lambda m, x: m(x).square().mean(), data, data)


@contextlib.contextmanager
def nothing_kept(device):
    """Memory is given back to within 1 MiB."""
    free(device)
    before = torch.cuda.memory_allocated(device)
    yield
    gc.collect()
    assert torch.cuda.memory_allocated(device) - before <= MIB


@pytest.mark.parametrize("told", [True, False])
def test_real_out_of_memory_on_a_gpu(limited, told):
    """The size found fits again, and 12 % more runs out.

    Told nothing but the errors, every failure is the device's own; told the bytes, none has to be.
    """
    with nothing_kept(limited):
        found = find_micro_batch(job(), headroom=0.0, memory=None if told else Untold(), device=limited)
    phases = {each.phase for each in found.tries if not each.fits}
    assert phases <= ({"headroom", "foreseen", "forward", "backward"} if told else {"forward", "backward"}) and phases
    assert all((each.peak_bytes is not None) == told for each in found.tries if each.fits)
    step = TrainingStep(job(), device=limited, copies=1)
    for _ in range(3):
        step(found.size)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(math.ceil(found.size * 1.12))
    assert is_out_of_memory(caught.value) and step.phase in ("forward", "backward")


def test_with_the_usual_headroom_it_fits_for_100_steps_and_evaluation(limited):
    subject = job(depth=8)
    with nothing_kept(limited):
        found = find_micro_batch(job(depth=8, examples=65536), max_size=65536, device=limited)
    assert found.size < 65536
    model, data = subject.model().to(limited), torch.randn(found.size, 256, device=limited)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(100):
        subject.loss(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        subject.loss(model, data)


def test_a_model_that_does_not_fit_is_said_in_a_line(limited):
    with nothing_kept(limited), pytest.raises(InputError, match="the model .* does not fit in memory"):
        find_micro_batch(job(depth=1, width=8192, examples=8), device=limited)


def test_a_size_that_runs_out_ends_the_timing(limited):
    with nothing_kept(limited):
        found = throughput(job(), [64, 8192], seconds=60.0, device=limited)
    assert found.out_of_memory_at == 8192 and [each.examples for each in found.micro_batches] == [64]


def test_the_meter_knows_what_is_held_and_what_this_process_may_take(limited):
    held = torch.ones(16 * MIB, dtype=torch.uint8, device=limited)
    gauge = meter(limited)
    assert isinstance(gauge, CudaMeter)
    assert abs(gauge.usable - (LIMIT - 16 * MIB)) <= 32 * MIB  # segments of up to 20 MiB may be in part unused
    gauge.start()
    more = [torch.ones(20 * MIB, dtype=torch.uint8, device=limited) for _ in range(2)]
    del more
    assert gauge.peak() == 40 * MIB
    gauge.start()
    assert gauge.peak() == 0
    del held
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(LIMIT + 64 * MIB, dtype=torch.uint8, device=limited)
