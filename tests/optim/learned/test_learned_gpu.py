"""The learned optimizer on a GPU: chunks, single precision, its gradient's checks."""

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.testing.optimizers import same
from tests.optim.learned.parameters import SHAPES, give_gradients, parameters

pytestmark = pytest.mark.gpu


def after(device, dtype=torch.float64, shapes=SHAPES, steps=4, **options):
    held = [torch.nn.Parameter(p.detach().to(device)) for p in parameters(shapes, dtype=dtype)]
    optimizer = LearnedOptimizer(held, **options)  # with the weights that ship
    for step in range(steps):
        own = parameters(shapes, dtype=dtype)
        give_gradients(own, step)
        for p, q in zip(held, own, strict=True):
            p.grad = q.grad.to(device)
        optimizer.step()
    return [p.detach() for p in held]


@pytest.mark.parametrize("options", [{}, {"chunk": 5}, {"max_grad_norm": 0.5, "weight_decay": 1e-4, "lr": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_steps_are_those_of_the_cpu(options, dtype, accelerator):
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    same(after(accelerator, dtype, **options), after("cpu", dtype, **options), tolerance)


def test_a_gradient_that_is_not_finite_moves_nothing(accelerator):
    held = [torch.nn.Parameter(p.detach().to(accelerator)) for p in parameters()]
    optimizer = LearnedOptimizer(held)
    for p in held:
        p.grad = torch.ones_like(p)
    held[2].grad.view(-1)[5] = torch.inf
    before = [p.detach().clone() for p in held]
    with pytest.raises(InputError, match="parameter 2 of shape"):
        optimizer.step()
    same([p.detach() for p in held], before)
