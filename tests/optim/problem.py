"""A fixed problem with matrices, a convolution, a vector and a number: weights, gradients, a rate that moves."""

import numpy as np
import torch

SHAPES = ((5, 3), (2, 3, 3), (4,), (1,))
STEPS = 100
RATES = [0.02 * (1 - 0.9 * t / STEPS) * (0.3 if 40 <= t < 60 else 1.0) for t in range(STEPS)]


def weights():
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape) for shape in SHAPES]


def gradients(ws, t):
    """Of a quadratic with a moving centre and noise: a function of weights and step alone."""
    noise = np.random.default_rng(100 + t)
    return [(i + 1) * (w - 0.3) + 0.5 * noise.normal(size=w.shape) for i, w in enumerate(ws)]


def after(make, *, rates=RATES, scale=1.0, dtype=torch.float64):
    """The weights after the steps of a torch optimizer."""
    parameters = [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in weights()]
    optimizer = make(parameters)
    for t, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = gradients([p.detach().numpy().astype(np.float64) for p in parameters], t)
        for parameter, g in zip(parameters, found, strict=True):
            parameter.grad = torch.tensor(g * scale, dtype=dtype)
        optimizer.step()
    return [p.detach().numpy() for p in parameters]


def close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def matrix(w):
    return w.ndim > 1
