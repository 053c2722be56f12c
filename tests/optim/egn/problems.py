"""Small networks with their batches, and the damped d x d system that a step must solve, by autodiff."""

import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

TORCH_LOSS = {
    "mse": F.mse_loss,
    "half_mse": lambda f, y: 0.5 * (f - y).square().sum(1).mean(),
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
}


def network(outputs=3, seed=0, inputs=4, hidden=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def batch(loss, b=5, c=3, seed=0, inputs=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, inputs, generator=g, dtype=torch.float64)
    if loss == "cross_entropy":
        return x, torch.randint(0, c, (b,), generator=g)
    y = torch.randn(b, c, generator=g, dtype=torch.float64)
    return x, (y > 0).double() if loss == "binary_cross_entropy" else y


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def put(model, w):
    nn.utils.vector_to_parameters(w, list(model.parameters()))


def naive(model, loss, x, y):
    """L, g and H of the batch, H = JᵀQJ with J and the Hessian of torch's own loss by automatic differentiation."""
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    sizes = [shape.numel() for shape in shapes]

    def f(w):
        parts = {n: part.view(s) for n, part, s in zip(names, w.split(sizes), shapes, strict=True)}
        return functional_call(model, parts, (x,))

    def of_outputs(outputs):
        return TORCH_LOSS[loss](outputs.view_as(f(flat(model))), y)

    w = flat(model)
    J, out = jacrev(lambda w: f(w).flatten())(w), f(w).flatten()
    return of_outputs(out), J.T @ jacrev(of_outputs)(out), J.T @ hessian(of_outputs)(out) @ J


def primal(g, H, damping):
    return -torch.linalg.solve(H + damping * torch.eye(len(g), dtype=g.dtype), g)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def taken(model, optimizer, *arguments):
    """The change of the weights by a step, and the loss it returns."""
    before = flat(model).clone()
    loss = optimizer.step(*arguments)
    return flat(model) - before, loss
