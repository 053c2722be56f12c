"""Parameters with drawn gradients, where some steps bring them, and networks of a known output."""

import torch
from torch import nn

from batchlab.optim.learned.features import INPUTS
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import fresh_weights

SHAPES = [(7,), (5, 3), (4, 3, 3, 3), (6, 6), ()]


def parameters(shapes=SHAPES, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.3 * torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(held, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in held:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def after(held, steps=4, **options):
    """The weights after some steps."""
    optimizer = LearnedOptimizer(held, **{"weights": fresh_weights(0)} | options)
    for step in range(steps):
        give_gradients(held, step)
        optimizer.step()
    return [p.detach().clone() for p in held]


def constant(d, q, hidden=4):
    """A network that says the same of all elements."""
    zeros = {"w0": torch.zeros(INPUTS, hidden), "b0": torch.zeros(hidden)}
    return zeros | {"w1": torch.zeros(hidden, 2), "b1": torch.tensor([d, q])}


def passing(index):
    """A network whose direction is input `index`: relu(x) - relu(-x)."""
    w0 = torch.zeros(INPUTS, 2)
    w0[index] = torch.tensor([1.0, -1.0])
    return {"w0": w0, "b0": torch.zeros(2), "w1": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "b1": torch.zeros(2)}
