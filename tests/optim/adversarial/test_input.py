"""The adversarial input: its length, its range, what it leaves as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.dual_batchnorm import DualBatchNorm, use_bn
from batchlab.optim.adversarial.input import adversarial_input, check_inside, perturbation
from tests.optim.adversarial.small_network import RHO, cross_entropy, data, network


def test_the_step_has_the_length_that_was_asked_for_and_raises_the_loss():
    model, (batch,) = network(), data(1, size=200)
    batch[0][:, :, 4, 4] = 0
    model[0].weight.data[:, :, 2, 2] = 0  # the last pixel has no way to the loss
    for norm, rho in (("linf", 0.05), ("l2", 0.3)):
        moved = adversarial_input(model, cross_entropy, batch, rho=rho, norm=norm) - batch[0]
        assert (moved[:, :, 4, 4] == 0).all()
        if norm == "linf":
            others = moved.flatten(1)[:, :-1].abs()
            torch.testing.assert_close(others, torch.full_like(others, rho), rtol=1e-12, atol=0)
        else:
            torch.testing.assert_close(
                moved.flatten(1).norm(dim=1), torch.full((200,), rho).double(), rtol=1e-6, atol=0
            )
        model.eval()
        with torch.no_grad(), use_bn(model, "aux"):
            before, after = (
                nn.functional.cross_entropy(model(x), batch[1], reduction="none") for x in (batch[0], batch[0] + moved)
            )
        assert (after >= before).double().mean() >= 0.95
        model.train()


def test_a_perturbation_knows_no_scale_and_hides_no_nan():
    g = torch.tensor([[3.0, -4.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    sign, unit = perturbation(g, 2.0), perturbation(g, 2.0, "l2")
    assert sign[:2].tolist() == [[2, -2], [0, 0]] and sign[3].tolist() == [2, 2]
    assert sign[2, 0].isnan() and sign[2, 1] == 2
    torch.testing.assert_close(unit[:2], torch.tensor([[1.2, -1.6], [0.0, 0.0]]))
    assert unit[2].isnan().all() and unit[3].isnan().any()
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(perturbation(g[:2] * scale, 2.0, "l2"), unit[:2])
    with pytest.raises(InputError, match='norm must be "linf" or "l2", got \'l1\''):
        perturbation(g, 2.0, "l1")
    half = perturbation(torch.tensor([[6e4, 6e4, -6e4]], dtype=torch.float16), 1.0, "l2")
    assert half.dtype == torch.float16 and half[0].float().norm() == pytest.approx(1, abs=1e-3)


def test_a_range_holds_and_rho_may_differ_by_channel():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.rand(50, 3, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).square().mean()

    rho = torch.tensor([0.1, 0.0, 0.3])
    free = adversarial_input(model, loss, (x,), rho=rho)
    torch.testing.assert_close((free - x).abs(), rho.double().expand(50, 3), rtol=1e-12, atol=1e-15)
    held = adversarial_input(model, loss, (x,), rho=rho, clip=(0.0, torch.tensor([1.0, 1.0, 0.9])))
    assert torch.equal(held, free.clamp(torch.zeros(3).double(), torch.tensor([1.0, 1.0, 0.9]).double()))
    assert not torch.equal(held, free)


def test_the_ends_of_a_range_are_not_rounded():
    """0.7 in float32 is below 0.7: an input of 0.7 in float64 is inside."""
    model, x = nn.Linear(3, 1).double(), torch.full((2, 3), 0.7, dtype=torch.float64)
    check_inside(x, (-0.7, 0.7))
    found = adversarial_input(model, lambda m, b: -m(b[0]).sum(), (x,), rho=5.0, clip=(-0.7, 0.7))
    assert set(found.flatten().tolist()) == {-0.7, 0.7}


def test_preparing_leaves_everything_as_it_was():
    model = network(dropout=0.5)
    model[3].eval()  # a layer's own mode comes back too
    with use_bn(model, "aux"):
        cross_entropy(model, data(1, seed=5)[0]).backward()
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    x_hat = adversarial_input(model, cross_entropy, data(1)[0], rho=RHO)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    assert torch.equal(torch.get_rng_state(), random) and not x_hat.requires_grad
    assert [layer.training for layer in model[:5]] == [True, True, True, False, True]
    assert {layer.branch for layer in model.modules() if isinstance(layer, DualBatchNorm)} == {"main"}


def test_autocast_is_the_losss_own_matter():
    """Under autocast of the caller B is as without it, so that no executor differs; inside the loss it counts."""

    def lower(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    model, batch = network().float(), (data(1)[0][0].float(), data(1)[0][1])
    plain = adversarial_input(model, cross_entropy, batch, rho=RHO, norm="l2")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adversarial_input(model, cross_entropy, batch, rho=RHO, norm="l2"), plain)
    rounded = adversarial_input(model, lower, batch, rho=RHO, norm="l2")
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, atol=0.1 * RHO, rtol=0)
