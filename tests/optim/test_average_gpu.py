"""Averages of the weights on a GPU: the CPU's, in half precision too, and through files of the other device."""

import pytest
import torch

from batchlab.optim.average import WeightAverage
from batchlab.testing.optimizers import same, small_model
from tests.optim.on_device import through_file

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
FORMS = [{"half_life": 20.0}, {"power": 2.0}]


def updated(average, model, steps):
    """Takes in weights that are drawn, the same on each device."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        average.update(model, examples=8 + step)
    return [p.detach() for p in average.module.parameters()]


@pytest.mark.parametrize("form", FORMS, ids=["half_life", "power"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_average_is_that_of_the_cpu(form, dtype, accelerator):
    ends = []
    for device in (accelerator, CPU):
        model = small_model(dtype).to(device)
        ends.append(updated(WeightAverage(model, **form), model, range(5)))
    assert all(each.device.type == accelerator.type for each in ends[0])
    same(*ends, 1e-12 if dtype == torch.float64 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_goes_to_the_device_and_back(dtype, accelerator):
    model = small_model(dtype)
    whole = updated(WeightAverage(model, half_life=20.0), model, range(6))
    average = WeightAverage(small_model(dtype), half_life=20.0)
    updated(average, small_model(dtype), range(2))
    for steps, device in ((range(2, 4), accelerator), (range(4, 6), CPU)):
        model = small_model(dtype).to(device)
        resumed = WeightAverage(model, half_life=20.0)
        resumed.load_state_dict(through_file(average.state_dict()))
        last, average = updated(resumed, model, steps), resumed
    same(last, whole, 1e-12 if dtype == torch.float64 else 2**-7)
