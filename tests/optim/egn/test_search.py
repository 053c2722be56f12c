"""The line search against the authors' loop, and the damping that follows the gain ratio."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.optim.egn.egn import EGN
from batchlab.optim.egn.search import first_share, gain_ratio, next_damping, search
from tests.optim.egn.problems import batch, flat, naive, network, primal, put


def naive_search(f, start, slope, goldstein):
    """The authors' loop, word for word in its order, with a cap at 1."""
    s, here = start, f(0.0)
    for _ in range(15):
        short = -s * 0.1 * slope > here - f(s)
        s = s * 0.8 if short else s
        long = goldstein and here - f(s) > -s * 0.9 * slope
        s = min(s * 1.5, 1.0) if long else s
        if not (short or long):
            break
    return s


@pytest.mark.parametrize("goldstein", [False, True])
def test_the_search_is_the_authors_loop(goldstein):
    for k in (0.3, 0.7, 1.0, 2.0, 7.0, 300.0):
        for start in (1.0, 0.3, 1e-3):

            def f(s, k=k):
                return (1 - k * s) ** 2 + 0.1 * math.sin(5 * s)

            slope = -2 * k + 0.5
            found, after = search(start, f(0.0), slope, f, goldstein=goldstein, eps=0.0)
            assert found == naive_search(f, start, slope, goldstein) and after == f(found)
    assert search(1.0, 1.0, -1.0, lambda s: math.nan, eps=0.0)[0] == pytest.approx(0.8**15)
    assert (first_share("armijo", 0.8), first_share("armijo", 0.5)) == (1.0, 0.75)
    assert first_share("conservative", 0.5) == first_share("goldstein", 0.5) == 0.5


@pytest.mark.parametrize("kind", ["armijo", "conservative", "goldstein"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_searched_run_is_a_plain_loops(kind, momentum):
    """Steps of up to 60 times the direction, so that the search has to shorten them; the share is then remembered."""
    model, twin = network(), network()
    optimizer = EGN(model, "cross_entropy", lr=60.0, momentum=momentum, line_search=kind)
    share, v, shares, fell_back = 1.0, torch.zeros_like(flat(twin)), [], 0
    for t in range(1, 26):
        x, y = batch("cross_entropy", seed=t)
        value, g, H = naive(twin, "cross_entropy", x, y)
        d = primal(g, H, 1.0)
        v = momentum * v + (1 - momentum) * d
        used = 60 * v / (1 - momentum**t)
        if g @ used >= 0:
            used, fell_back = 60 * d, fell_back + 1
        at = flat(twin).clone()

        def f(s, at=at, used=used, x=x, y=y):
            put(twin, at + s * used)
            with torch.no_grad():
                return F.cross_entropy(twin(x), y).item()

        share = naive_search(
            f, min(1.5 * share, 1.0) if kind == "armijo" else share, float(g @ used), kind == "goldstein"
        )
        after = f(share)
        optimizer.step(x, y)
        shares.append(share)
        assert optimizer.last.share == pytest.approx(share) and optimizer.last.loss == pytest.approx(value.item())
        assert optimizer.last.loss_after == pytest.approx(after, rel=1e-9)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-9)
    assert len(set(shares)) > 1 and min(shares) < 1
    assert fell_back > 0 or momentum == 0 or kind == "goldstein"


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_damping_follows_a_model_that_is_right(momentum):
    """A linear network under a squared error: the model is exact, ρ = 1, and λ halves at each step."""
    model, (x, y) = nn.Linear(4, 2).double(), batch("mse", b=9, c=2)
    optimizer = EGN(model, "half_mse", lr=0.1, adaptive_damping="trust_region", momentum=momentum)
    for step in range(1, 9):
        optimizer.step(x, y)
        assert optimizer.last.ratio == pytest.approx(1.0, abs=1e-6)
        assert optimizer.param_groups[0]["damping"] == 0.5**step
        assert optimizer.last.damping == 0.5 ** (step - 1)


def test_the_ratio_is_that_of_the_shortened_step():
    """An exact model, and a rate that the search has to cut: ρ is still 1."""
    model, (x, y) = nn.Linear(4, 2).double(), batch("mse", b=9, c=2)
    optimizer = EGN(model, "half_mse", lr=20.0, line_search="armijo", adaptive_damping="trust_region")
    optimizer.step(x, y)
    assert optimizer.last.share < 0.5 and optimizer.last.ratio == pytest.approx(1.0, abs=1e-6)


def test_a_step_the_wrong_way_raises_the_damping():
    """On the same exact model, from a direction put into the momentum that leads up."""
    model, (x, y) = nn.Linear(4, 2).double(), batch("mse", b=9, c=2)
    optimizer = EGN(model, "half_mse", adaptive_damping="trust_region", momentum=0.9)
    optimizer.step(x, y)
    for state in optimizer.state.values():
        state["direction"].mul_(-100)
    optimizer.step(x, y)
    assert optimizer.last.ratio == -5.0 and optimizer.param_groups[0]["damping"] == 0.75
    assert optimizer.last.loss_after > optimizer.last.loss


def test_the_ratio_and_its_damping():
    assert gain_ratio(1.0, 0.8, -1.0, 1.2) == pytest.approx(0.5)
    assert gain_ratio(1.0, 0.0, -1e-3, 0.0) == 5.0
    assert gain_ratio(0.0, 1.0, -1e-3, 0.0) == gain_ratio(0.0, 1.0, 1.0, 1.0) == gain_ratio(1.0, 0.0, 1.0, 1.0) == -5.0
    assert gain_ratio(1.0, 1.0, 0.0, 0.0) is gain_ratio(1.0, math.nan, -1.0, 1.0) is None
    assert [next_damping(1.0, each) for each in (None, 0.25, 0.75)] == [1.0, 1.0, 1.0]
    assert (next_damping(1e6, -1.0), next_damping(1e-12, 1.0)) == (1e6, 1e-12)
