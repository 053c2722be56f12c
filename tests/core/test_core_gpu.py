"""Devices, generators and checkpoints where there is a GPU."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.device import TF32_EPS, pick_device, product_eps, whole_float32
from batchlab.core.provenance import machine
from batchlab.core.random import preserved_generators, reseed

pytestmark = pytest.mark.gpu


def test_the_device_of_the_machine_is_picked_and_named(accelerator):
    assert pick_device(accelerator) == accelerator and pick_device(str(accelerator)) == accelerator
    if accelerator.type == "cuda":
        assert pick_device().type == "cuda"
        assert machine()["gpus"][0] == torch.cuda.get_device_name(0)


def draws(device):
    dropped = nn.functional.dropout(torch.ones(64, device=device), 0.5)
    return torch.rand(4, device=device).tolist(), dropped.tolist(), torch.rand(2).tolist(), np.random.rand()


def test_a_seed_sets_the_devices_generator_and_the_callers_is_given_back(accelerator):
    reseed(3)
    first = draws(accelerator)
    reseed(4)
    other = draws(accelerator)
    assert all(one != two for one, two in zip(first, other, strict=True))
    reseed(3)
    draws(accelerator)
    before = copy.deepcopy(random.getstate())
    with preserved_generators():
        expected = draws(accelerator)
    for error in (None, KeyError):
        try:
            with preserved_generators():
                reseed(99)
                draws(accelerator)
                if error is not None:
                    raise error
        except KeyError:
            pass
    assert draws(accelerator) == expected and random.getstate() == before


def stepped(device, **form):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)]
    model = nn.Sequential(*layers).double().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), **form)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    step(model, optimizer, x)
    return model, optimizer, x


def step(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.sin()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("form", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_a_checkpoint_goes_from_any_device_to_any(accelerator, tmp_path, form):
    cpu = torch.device("cpu")
    for there, here in ((accelerator, accelerator), (accelerator, cpu), (cpu, accelerator)):
        model, optimizer, x = stepped(there, **form)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "again": dict(model.state_dict())}
        loaded = load_checkpoint(save_checkpoint(tmp_path / f"{there}-{here}", 1, state))
        assert all(each.is_cpu for each in loaded["model"].values())
        resumed, its_optimizer, at = stepped(here, **form)
        resumed.load_state_dict(loaded["model"])
        its_optimizer.load_state_dict(loaded["optimizer"])
        for _ in range(2):
            step(model, optimizer, x)
            step(resumed, its_optimizer, at)
        ours, theirs = ([p.cpu() for p in each.state_dict().values()] for each in (resumed, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_tensor_in_two_places_is_stored_once(accelerator, tmp_path):
    weight = torch.arange(1 << 16, dtype=torch.float32, device=accelerator)
    path = save_checkpoint(tmp_path, 0, {"a": weight, "b": weight, "half": weight[: 1 << 15].bfloat16()})
    assert path.stat().st_size < 1.5 * weight.nbytes
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["b"], weight.cpu()) and loaded["half"].dtype == torch.bfloat16


def worst_error(device):
    """Of a product and of a convolution in float32, relative to the terms that they are sums of."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    x, w = torch.randn(4, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    product = (a.float().to(device) @ b.float().to(device)).cpu().double() - a.float().double() @ b.float().double()
    convolved = nn.functional.conv2d(x.to(device), w.to(device)).cpu().double()
    right = nn.functional.conv2d(x.double(), w.double())
    return float(product.abs().max()) / 16, float((convolved - right).abs().max()) / 24


def test_whole_float32_keeps_products_from_tf32_and_gives_the_switches_back(accelerator):
    """Σ of 256 products of normal numbers is about 16, of 576 about 24: TF32 is off by 2^-11 or so of that."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    like = torch.zeros(1, device=accelerator)
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        assert product_eps(like) == (TF32_EPS if accelerator.type == "cuda" else torch.finfo(torch.float32).eps)
        assert max(worst_error(accelerator)) < 8 * TF32_EPS
        with whole_float32():
            assert product_eps(like) == torch.finfo(torch.float32).eps
            assert max(worst_error(accelerator)) < 1e-5
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        if accelerator.type == "cuda":
            assert worst_error(accelerator)[0] > 1e-5
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
