"""The finder on a GPU: the size found goes on fitting, and the allocator has its memory back."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.job import Job
from batchlab.measure.memory.micro_batch import find_micro_batch
from batchlab.measure.training_step import TrainingStep
from tests.measure.memory.limited import _quick as _quick


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
