"""Schedules of a rate that is a tensor on a GPU, as a captured or compiled step wants it."""

import json

import pytest
import torch
from torch import nn

from batchlab.testing.schedules import UPDATES, run, small_optimizer
from tests.schedule.rates.cases import CASES

pytestmark = pytest.mark.gpu


def _optimizer(accelerator, rate=0.02):
    """AdamW of one group whose rate is a tensor on the device; a capturable step never reads it on the CPU."""
    parameters = [nn.Parameter(torch.ones(2, device=accelerator))]
    tensor = torch.tensor(rate, dtype=torch.float64, device=accelerator)
    capturable = accelerator.type == "cuda"
    return torch.optim.AdamW(parameters, lr=tensor, weight_decay=0.1, foreach=False, capturable=capturable)


@pytest.mark.parametrize("name", CASES)
def test_the_tensor_is_filled_with_the_numbers_of_the_cpu(accelerator, name):
    optimizer, plain = _optimizer(accelerator), small_optimizer([0.02])
    rate = optimizer.param_groups[0]["lr"]
    ours, theirs = CASES[name](optimizer), CASES[name](plain)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, device=accelerator)
    plain.param_groups[0]["params"][0].grad = torch.ones(2)
    moved = set()
    for count in [None] * UPDATES + [24, 200]:
        run(ours, [count])
        run(theirs, [count])
        group, expected = optimizer.param_groups[0], plain.param_groups[0]
        assert group["lr"] is rate and rate.device.type == accelerator.type
        assert rate.item() == expected["lr"] and group["weight_decay"] == expected["weight_decay"]
        assert [float(beta) for beta in group["betas"]] == list(expected["betas"])
        moved.add((rate.item(), group["weight_decay"]))
    assert len(moved) > 1
    weights, wanted = (each.param_groups[0]["params"][0].detach().cpu() for each in (optimizer, plain))
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_state_goes_from_the_device_to_the_cpu_and_back(accelerator, name):
    ours = CASES[name](_optimizer(accelerator))
    run(ours, [None] * 5)
    state = json.loads(json.dumps(ours.state_dict()))
    on_the_cpu, again = CASES[name](small_optimizer([0.02])), CASES[name](_optimizer(accelerator))
    for each in (on_the_cpu, again):
        each.load_state_dict(state)
        run(each, [None] * 4)
    run(ours, [None] * 4)
    rates = [float(each.optimizer.param_groups[0]["lr"]) for each in (ours, on_the_cpu, again)]
    assert rates[0] == rates[1] == rates[2]
    assert ours.state_dict() == on_the_cpu.state_dict() == again.state_dict()
