"""Coordinates that are idle, never had a gradient, underflow, are not finite, few or of half precision."""

import math

import pytest
import torch
from torch import nn

from batchlab.measure.course.adam_stability import AdamStability
from tests.measure.course.adam_runs import N, last, run, white


def test_rows_that_are_idle_now_do_not_narrow_the_rest():
    """All rows have gradients at first, later a few alone: theirs is the variance of a layer of those rows."""
    readings = []
    for rows in (200, 20):
        weight, noise = nn.Parameter(torch.zeros(rows, 50)), white(n=1000)
        optimizer = torch.optim.Adam([weight], lr=0.0)
        with AdamStability(optimizer, every=300) as stability:
            for step in range(300):
                weight.grad = torch.zeros(rows, 50)
                weight.grad[:20] = noise(step).view(20, 50)
                weight.grad[20:] = 1.0 if step < 3 else 0.0
                optimizer.step()
        readings.append(last([stability.reading]))
        assert len(stability.updates("group0.0")) == 1000
    for column in ("coordinates", "variance_ratio", "sarle", "high_share", "rms", "eps_share", "root_over_eps"):
        assert getattr(readings[0], column) == pytest.approx(getattr(readings[1], column), rel=1e-6)
    assert readings[0].coordinates == 1000 and readings[0].variance_ratio > 0.8


def test_squares_that_underflow_freeze_the_layer_and_stay_finite():
    """Below 1e-23 v = g² is 0 in float32: u = m/ε, whatever ε is."""
    for eps in (1e-8, 1e-30):
        readings, _ = run(white(scale=1e-25), steps=200, betas=(0.9, 0.95), eps=eps)
        layer = last(readings)
        assert layer.coordinates == N and layer.eps_share == 1.0 and "frozen" in layer.alarms
        assert all(math.isfinite(value) for value in (layer.variance_ratio, layer.rms, layer.cosine, layer.lag1))


def test_rows_that_never_had_a_gradient_are_left_out():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 8))

    model = Rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    stability = AdamStability(optimizer, model=model, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model.weight[:5].square().sum().backward()
        optimizer.step()
    assert stability.reading.layer("weight").coordinates == 40
    assert len(stability.updates("weight")) == 40


def test_a_gradient_that_is_not_finite_is_no_correlation():
    gradients = iter([*[torch.randn(200) for _ in range(9)], torch.full((200,), math.inf), torch.randn(200)])
    p = nn.Parameter(torch.zeros(200))
    optimizer = torch.optim.Adam([p], lr=0.0)
    stability = AdamStability(optimizer, every=1)
    seen = []
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
        seen.append(stability.reading.layers[0])
    assert math.isfinite(seen[8].lag1) and seen[9].lag1 == seen[8].lag1
    assert math.isnan(seen[10].rms) and seen[10].alarms == ()


def test_half_precision_states_are_read_in_float32():
    p = nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([p], lr=0.0, foreach=False)
    stability, noise = AdamStability(optimizer, every=100), white(n=3000)
    for step in range(200):
        p.grad = noise(step).bfloat16()
        optimizer.step()
    layer = stability.reading.layers[0]
    assert stability.updates(layer.name).dtype == torch.float32 and 0.5 < layer.variance_ratio < 1.6


def test_shapes_that_break_things():
    shapes = [(0,), (1,), (), (3, 0), (2, 3, 4)]
    ps = [nn.Parameter(torch.randn(shape)) for shape in shapes] + [nn.Parameter(torch.randn(6, 5).t())]
    optimizer = torch.optim.Adam(ps, lr=0.01, foreach=False)
    stability = AdamStability(optimizer, every=1, coordinates=4)
    for step in range(3):
        for p in ps[: len(ps) - (step == 0)]:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()
    layers = {layer.name: layer for layer in stability.reading.layers}
    assert layers["group0.0"].coordinates == 0 and math.isnan(layers["group0.0"].rms)
    assert layers["group0.1"].coordinates == 1 and math.isnan(layers["group0.1"].sarle)
    assert layers["group0.5"].t == 2 and layers["group0.5"].coordinates == 4
    assert not any(layer.alarms for layer in layers.values())
