"""A trunk with two heads, and steps of AGVM on it: shared by AGVM's tests."""

import torch
from torch import nn
from torch.nn import functional as F

from batchlab.optim.agvm.module_groups import groups_by_module


class TwoHeads(nn.Module):
    """Two outputs from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
        self.left = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.right = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        found = self.trunk(x)
        return self.left(found), self.right(found)


def two_heads(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return TwoHeads().to(dtype)


def parts(model):
    return groups_by_module(model, ["trunk", "left", "right"])


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=dtype)
    labels = torch.randint(3, (2, 16), generator=generator)
    return x, *labels


def loss(model, x, y, z):
    left, right = model(x)
    return F.cross_entropy(left, y) + F.cross_entropy(right, z)


def cut(data, count):
    """The batch in so many equal pieces."""
    return list(zip(*(part.chunk(count) for part in data), strict=True))


def in_halves(agvm, model, data):
    """One step with both halves, and the weights after it."""
    agvm.zero_grad()
    for name, half in zip("AB", cut(data, 2), strict=True):
        with agvm.half(name):
            loss(model, *half).backward()
    agvm.step()
    return weights(model)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}
