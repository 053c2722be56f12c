"""LARS does what the paper says: steps by norms, free of the gradient's scale, blind to how a weight is written."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.sgd import sgd

from batchlab.core.errors import InputError
from batchlab.optim import lars
from batchlab.optim.lars import LARS
from tests.optim.problem import STEPS, after, close


def one_step(w, g, **settings):
    parameter = nn.Parameter(w.clone())
    parameter.grad = g.clone()
    optimizer = LARS([parameter], **{"lr": 2.0, "momentum": 0.0, "weight_decay": 0.0} | settings)
    optimizer.step()
    return parameter.detach(), optimizer


def test_a_step_has_the_length_of_the_rate_and_the_trust():
    generator = torch.Generator().manual_seed(0)
    for size in (1e-8, 1.0, 1e8):
        w = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        moved, optimizer = one_step(w, size * torch.randn(7, 5, generator=generator, dtype=torch.float64), trust=0.01)
        assert (moved - w).norm() / w.norm() == pytest.approx(0.02, rel=1e-12)
        assert next(iter(optimizer.report().values()))["trust_ratio"] > 0


def test_only_decay_sees_the_gradients_scale():
    def run(decay, scale):
        return after(lambda p: LARS(p, lr=1.0, weight_decay=decay, trust=0.1, exclude_vectors=False), scale=scale)[0]

    for scale in (1e-6, 1e6):
        np.testing.assert_allclose(run(0.0, scale), run(0.0, 1.0), rtol=1e-10)
        assert abs(run(0.1, scale) - run(0.1, 1.0)).max() > 1e-6


def test_the_two_momenta_part_when_the_rate_moves():
    def run(rates, inside):
        return after(lambda p: LARS(p, lr=1.0, trust=0.1, lr_in_momentum=inside), rates=rates)

    close(run([0.5] * STEPS, True), run([0.5] * STEPS, False))
    halved = [0.5] * 10 + [0.25] * 10
    a, b = run(halved, True)[0], run(halved, False)[0]
    assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(b)


def test_a_tensor_without_a_norm_takes_a_plain_step():
    zero, g = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    assert torch.equal(one_step(zero, g)[0], -2 * g)
    w = torch.ones(2, 2, dtype=torch.float64)
    assert torch.equal(one_step(w, 0 * g)[0], w)


def test_the_clipping_form_never_exceeds_the_global_rate():
    w, g = torch.ones(2, 2, dtype=torch.float64), torch.full((2, 2), 1e-3, dtype=torch.float64)
    settings = {"trust": 0.02, "clip": True, "lr_in_momentum": False}
    small = one_step(w, g, lr=0.1, **settings)[0]
    torch.testing.assert_close(small, w - 0.1 * g, rtol=1e-12, atol=0)  # λ = 20 > γ
    large = one_step(w, 1e6 * g, lr=0.1, **settings)[0]
    assert (large - w).norm() / w.norm() == pytest.approx(0.02, rel=1e-12)  # λ = 2e-5 < γ


def _large(seed=0):
    """Large enough for the kernel, which takes float32; and one of zeros, which has no norm."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(150, 120, generator=generator), torch.zeros(160, 110)]


def _trained(gradient, rates, **settings):
    parameters = [nn.Parameter(w) for w in _large()]
    optimizer, reports = LARS(parameters, lr=1.0, **settings), []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, g in zip(parameters, _large(step + 1), strict=True):
            parameter.grad = gradient(g)
        optimizer.step()
        reports.append(optimizer.report())
    state = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    return [p.detach() for p in parameters] + state, reports


@pytest.mark.parametrize(
    "settings", [{}, {"lr_in_momentum": False}, {"clip": True, "trust": 0.02, "weight_decay": 0.0}]
)
@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_the_kernel_is_the_loop_to_float32(settings, scale, monkeypatch):
    """At a scale of 1e9 the share of the gradient is too small for the kernel, and the loop takes over."""
    calls = []
    monkeypatch.setattr(lars, "sgd", lambda *args, **numbers: (calls.append(1), sgd(*args, **numbers)))
    rates = [0.5, 2.0, 0.0, 1.0]
    want, told = _trained(lambda g: scale * (g + 0.1), rates, foreach=False, **settings)
    assert not calls
    found, reports = _trained(lambda g: scale * (g + 0.1), rates, **settings)
    assert calls
    torch.testing.assert_close(found, want, rtol=2e-6, atol=2e-6 * float(max(abs(each).max() for each in want)))
    for ours, theirs in zip(reports, told, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-6) for name in ours)


def test_the_kernel_is_left_where_memory_order_differs_and_where_a_gradient_is_not_finite():
    def turned(g):
        return (g + 0.1).T.contiguous().T

    want, _ = _trained(turned, [1.0, 1.0], foreach=False)
    assert all(map(torch.equal, _trained(turned, [1.0, 1.0])[0], want))
    spoilt, _ = _trained(lambda g: g / 0, [1.0])
    assert all(each.isnan().any() for each in spoilt[:2])


def test_vectors_take_plain_steps_unless_told_otherwise():
    w, g = torch.full((4,), 2.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(one_step(w, g, lr=0.1, weight_decay=0.5)[0], w - 0.1 * g)
    adapted = one_step(w, g, lr=0.1, trust=0.5, exclude_vectors=False)[0]
    torch.testing.assert_close(adapted, w - 0.1 * 0.5 * 2 * g)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust": 0.0}, "trust must be finite and > 0, got 0.0"),
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"momentum": 1.0}, r"momentum must lie in \(0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"foreach": True, "fused": True}, "foreach and fused cannot both be True"),
    ],
)
def test_bad_numbers_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        LARS([nn.Parameter(torch.ones(2, 2))], **{"lr": 1.0} | settings)


class Scaled(nn.Module):
    """A bias-free MLP on digits whose middle matrix is c·u."""

    def __init__(self, c, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def he(rows, columns):
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * (2 / columns) ** 0.5

        self.c, self.first, self.last = c, nn.Parameter(he(128, 64)), nn.Parameter(he(10, 128))
        self.middle = nn.Parameter(he(128, 128) / c)

    def forward(self, x):
        return ((x @ self.first.T).relu() @ (self.c * self.middle).T).relu() @ self.last.T


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.tensor(x[order] / 16.0), torch.tensor(y[order])
    return x[:1436], y[:1436], x[1436:], y[1436:]


def trained(c, make, warmup=12, epochs=60):
    x, y, test_x, test_y = digits()
    model = Scaled(c)
    optimizer = make(model.parameters())
    peak, total = optimizer.param_groups[0]["lr"], 2 * epochs
    for t in range(total):
        rows = slice(0, 718) if t % 2 == 0 else slice(718, 1436)
        rise, fall = min(1.0, (t + 1) / warmup), (1 - t / total) ** 2
        optimizer.param_groups[0]["lr"] = peak * rise * fall
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model(test_x)
    return logits, float((logits.argmax(1) == test_y).double().mean())


def test_how_a_weight_is_written_changes_nothing_for_lars_and_ruins_sgd():
    """w = c·u with u trained: LARS gives the same logits for every c, SGD at its good rate breaks at c = 100."""
    logits, accuracy = zip(
        *(trained(c, lambda p: LARS(p, lr=5.0, weight_decay=0.0)) for c in (1.0, 100.0, 0.01)), strict=True
    )
    assert accuracy[0] > 0.95
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-9, atol=1e-9)
    sgd = [trained(c, lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9))[1] for c in (1.0, 100.0)]
    assert sgd[0] > 0.95
    assert sgd[1] < 0.5


@pytest.mark.parametrize("rate", [1.0, 40.0])
def test_its_rate_is_broad(rate):
    assert trained(1.0, lambda p: LARS(p, lr=rate, weight_decay=0.0))[1] >= 0.93
