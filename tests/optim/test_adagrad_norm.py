"""AdaGrad-Norm against its definition: one b for all parameters."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.errors import InputError
from batchlab.optim.adagrad_norm import AdaGradNorm

F64 = torch.float64


def network(dtype=F64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def gradients(model, step, scale=1.0):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=model[0].weight.dtype)
    model.zero_grad()
    (scale * model(x).square().mean()).backward()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_it_is_its_definition_in_a_plain_loop(foreach, maximize):
    """100 steps in float64, two groups of other rates and decays, a rate that moves: 1e-12."""
    ours, naive = network(), network()
    groups = [{"params": ours[0].parameters()}, {"params": ours[2].parameters(), "lr": 0.02, "weight_decay": 0.1}]
    optimizer = AdaGradNorm(groups, lr=0.05, b0=0.7, foreach=foreach, maximize=maximize)
    square = 0.7**2
    for step in range(100):
        for model in (ours, naive):
            gradients(model, step)
        optimizer.param_groups[0]["lr"] = rate = 0.05 / (1 + step)
        optimizer.step()
        for p in naive.parameters():
            square += sum(float(g) ** 2 for g in p.grad.flatten())
        for layer, lr, decay in ((naive[0], rate, 0.0), (naive[2], 0.02, 0.1)):
            for p in layer.parameters():
                sign = -1 if maximize else 1
                p.data = p.data - lr * decay * p.data - sign * lr * p.grad / math.sqrt(square)
        for p, q in zip(ours.parameters(), naive.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert optimizer.b == pytest.approx(math.sqrt(square), rel=1e-12)


def test_of_one_number_it_is_torchs_adagrad():
    ours, theirs = nn.Parameter(torch.ones((), dtype=F64)), nn.Parameter(torch.ones((), dtype=F64))
    mine = AdaGradNorm([ours], lr=0.3, b0=0.5)
    torchs = torch.optim.Adagrad([theirs], lr=0.3, initial_accumulator_value=0.25, eps=0.0)
    for step in range(50):
        for p, optimizer in ((ours, mine), (theirs, torchs)):
            p.grad = torch.cos(p.detach() * step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_scale_of_the_loss_drops_out_with_b0_in_it():
    found = []
    for scale in (1.0, 1e6):
        model = network()
        optimizer = AdaGradNorm(model.parameters(), lr=0.1, b0=0.1 * scale)
        for step in range(20):
            gradients(model, step, scale)
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_it_finds_the_minimum_at_rates_a_thousandfold_apart():
    """Of x²/2 from 1 with exact gradients, as the theorem says: within 1e-3 in 500 steps."""
    for lr in (0.1, 1.0, 100.0):
        x = nn.Parameter(torch.ones((), dtype=F64))
        optimizer = AdaGradNorm([x], lr=lr, b0=0.1)
        for _ in range(500):
            x.grad = x.detach().clone()
            optimizer.step()
        assert abs(x.item()) < 1e-3, lr


def test_a_large_float32_gradient_does_not_overflow_the_norm():
    x = nn.Parameter(torch.zeros(2))
    optimizer = AdaGradNorm([x], lr=1.0)
    x.grad = torch.tensor([3e30, 4e30])
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.tensor([-0.6, -0.8]))
    assert optimizer.b == pytest.approx(5e30, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(bad):
    x = nn.Parameter(torch.ones(2))
    optimizer = AdaGradNorm([("x", x)], lr=1.0, b0=0.5)
    x.grad = torch.tensor([bad, 1.0])
    with pytest.raises(InputError, match="the gradient of x must be finite, and so must b: what joins it stays"):
        optimizer.step()
    assert optimizer.b == 0.5 and optimizer.state[x]["step"] == 0 and torch.equal(x.detach(), torch.ones(2))


def test_b0_is_the_loaded_one():
    x = nn.Parameter(torch.ones(2))
    optimizer = AdaGradNorm([x], lr=1.0, b0=7.0)
    optimizer.load_state_dict(AdaGradNorm([x], lr=1.0, b0=0.5).state_dict())
    assert optimizer.b == 0.5


def test_a_parameter_without_gradient_stays_and_a_late_group_shares_b():
    a, b, c = (nn.Parameter(torch.ones(1, dtype=F64)) for _ in range(3))
    optimizer = AdaGradNorm([{"params": [a, b]}], lr=1.0, b0=1.0, weight_decay=0.5)
    optimizer.step()
    assert optimizer.b == 1.0
    a.grad = torch.full((1,), 3.0, dtype=F64)
    optimizer.step()
    optimizer.add_param_group({"params": [c], "weight_decay": 0.0})
    a.grad, c.grad = None, torch.full((1,), 4.0, dtype=F64)
    optimizer.step()
    assert b.item() == 1.0 and a.item() == pytest.approx(0.5 - 3 / 10**0.5)
    assert optimizer.b == pytest.approx(26**0.5) and c.item() == pytest.approx(1 - 4 / 26**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_round_and_b_keeps_its_precision(dtype, tmp_path):
    whole, first, second = network(dtype), network(dtype), network(dtype)
    one, two, three = (AdaGradNorm(model.parameters(), lr=0.1) for model in (whole, first, second))
    for step in range(12):
        gradients(whole, step)
        one.step()
        if step < 5:
            gradients(first, step)
            two.step()
    save_checkpoint(tmp_path, 1, {"optimizer": two.state_dict(), "model": first.state_dict()})
    state = load_checkpoint(next(tmp_path.iterdir()))
    second.load_state_dict(state["model"])
    three.load_state_dict(state["optimizer"])
    assert three.b == two.b and three.param_groups[0]["sum_sq"].dtype == F64
    for step in range(5, 12):
        gradients(second, step)
        three.step()
    assert three.b == one.b
    assert all(map(torch.equal, second.parameters(), whole.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be finite and >= 0, got nan"),
        ({"lr": 0.1, "b0": 0.0}, "b0 must be finite and > 0, got 0.0"),
        ({"lr": 0.1, "b0": math.inf}, "b0 must be finite and > 0, got inf"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be finite and >= 0, got -1"),
        ({"lr": 0.1, "differentiable": True}, "AdaGradNorm cannot be differentiated through"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        AdaGradNorm([nn.Parameter(torch.ones(1))], **options)


def test_b0_is_one_for_all_groups():
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "b0": 2.0}]
    with pytest.raises(
        InputError, match="b0 must be one for all groups, 0.1, got 2.0: b is the norm of all parameters"
    ):
        AdaGradNorm(groups, lr=0.1)
