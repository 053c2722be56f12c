"""The limit of gradient descent with momentum μ on a quadratic of top curvature λ is 2(1 + μ)/λ."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.course.contraction import ContractionLimit, max_stable_lr
from batchlab.measure.course.learning_rate import range_test


def heavy_ball(curvatures, momentum):
    """Starts torch's SGD on ½Σλx² from ones; returns |x| after each step."""

    def start(rate):
        x = torch.ones(len(curvatures), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=rate, momentum=momentum)
        scales = torch.tensor(curvatures, dtype=torch.float64)

        def update():
            x.grad = scales * x.detach()
            optimizer.step()
            return float(x.detach().norm())

        return update

    return start


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_it_is_the_limit_of_gradient_descent_with_momentum(momentum):
    truth = 2 * (1 + momentum) / 8.0
    found = max_stable_lr(heavy_ball([8.0, 1.0], momentum), low=0.8 * truth, high=1.3 * truth, tolerance=5e-5)
    assert found.learning_rate == pytest.approx(truth, rel=1e-4)
    assert found.stable < found.learning_rate < found.unstable <= found.stable * (1 + 5e-5)
    assert ContractionLimit.from_json(found.to_json()) == found


def scalar(curvature, momentum=0.0):
    def start(rate):
        x, v = 1.0, 0.0

        def update():
            nonlocal x, v
            v = momentum * v + curvature * x
            x -= rate * v
            return abs(x)

        return update

    return start


@given(curvature=st.floats(1e-6, 1e6), low=st.floats(1e-4, 0.99), high=st.floats(1.01, 1e4))
def test_any_bracket_and_unit_give_the_same_limit(curvature, low, high):
    limit = 2 / curvature
    found = max_stable_lr(scalar(curvature), low=low * limit, high=high * limit, steps=800, tolerance=1e-3)
    assert found.stable <= limit * (1 + 1e-3) and found.unstable >= limit * (1 - 1e-3)
    assert found.learning_rate == pytest.approx(limit, rel=2e-3)


def test_a_range_tests_stop_is_not_the_limit():
    """Without noise the loss is nearly 0 when a ramp crosses the limit, and has to grow back."""
    x = 1.0

    def update(rate):
        nonlocal x
        loss = 0.5 * x * x
        x -= rate * x
        return loss

    stop = range_test(update, low=1e-3, high=1e3, steps=100).divergence
    assert stop > 3 * max_stable_lr(scalar(1.0), low=0.1, high=10.0).learning_rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 0.0}, "low and high must satisfy 0 < low < high, got low=0.0, high=3.0"),
        ({"high": math.inf}, "low and high must satisfy 0 < low < high"),
        ({"low": 2.5}, "low must be a stable learning rate, but the update does not contract at 2.5"),
        ({"high": 1.5}, "high must be an unstable learning rate, but the update contracts at 1.5"),
        ({"steps": 7}, "steps must be an integer of at least 8, got 7"),
        ({"tolerance": 0.0}, "tolerance must be > 0, got 0.0"),
        ({"blow_up": 1.0}, "blow_up must be > 1, got 1.0"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        max_stable_lr(scalar(1.0), **({"low": 0.5, "high": 3.0} | changes))


def test_what_is_not_finite_is_unstable():
    with pytest.raises(InputError, match="low must be a stable learning rate"):
        max_stable_lr(lambda rate: lambda: math.nan, low=0.5, high=3.0)
