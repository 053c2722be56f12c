"""A small network with both BatchNorms, its batches, its adversarial inputs by hand, and its training."""

import copy

import torch
from torch import nn

from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.dual_batchnorm import convert_dual_batchnorm, use_bn

RHO = 0.05


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(dropout), nn.Flatten()]
    return convert_dual_batchnorm(nn.Sequential(*layers, nn.Linear(36, 3))).double()


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 1, 5, 5, generator=generator, dtype=torch.float64)
    return [(x[i], torch.randint(3, (size,), generator=generator)) for i in range(count)]


def by_hand(model, batch, norm="linf", rho=RHO):
    """x̂ with the weights of now, written out: on a copy in evaluation mode, through the auxiliary layers."""
    model = copy.deepcopy(model).eval()
    x, y = batch[0].clone().requires_grad_(), batch[1]
    with use_bn(model, "aux"):
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    g = x.grad
    step = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + rho * step).detach()


def ours(model, batches, tau, lr=0.1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    made, terms = [], []
    with ConcurrentAdversarial(model, cross_entropy, rho=RHO, tau=tau, **settings) as adversarial:
        for batch in adversarial.batches(batches):
            optimizer.zero_grad()
            terms.append(adversarial.backward(batch))
            made.append(adversarial.adversarial)
            optimizer.step()
    return made, terms


def assert_same(one, other, tolerance=1e-12):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=tolerance, atol=tolerance, msg=name)
