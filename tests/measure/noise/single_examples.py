"""A small model with norms, and what single examples tell of it by naive passes."""

import torch
from torch import nn
from torch.nn import functional as F

from batchlab.measure.noise.noise_pair import unbiased_pair


def make_model():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def make_batch(seed, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + torch.randn(n, 3, generator=generator, dtype=torch.float64)).argmax(1)


def run_passes(noise, model, x, y, sizes, total=None):
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        with noise.micro_batch(len(part_x)):
            (F.cross_entropy(model(part_x), part_y) * len(part_x) / (total or len(x))).backward()


def gradient_rows(model, x, y, parameters=None):
    """The gradient of each example, from a backward pass of its own."""
    parameters, rows = parameters or list(model.parameters()), []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def naive_pair(model, x, y, parameters):
    """The pair of single examples, each from a backward pass of its own."""
    rows = gradient_rows(model, x, y, parameters)
    return unbiased_pair(
        rows.square().sum(1).mean().item(), rows.mean(0).square().sum().item(), 1, len(rows)
    ), rows.mean(0).square().sum().item()
