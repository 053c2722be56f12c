"""What DiLoCo holds: θ and v across saves, freezing, late weights, dtypes and copies."""

import copy
import io
import pickle  # noqa: TID251 - as users' trainers do

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.diloco.diloco import DiLoCo, pseudo_gradient
from tests.optim.diloco.diloco_fixture import INNER, backward, batch, network, train, weights


def test_weights_that_stay_move_no_bit_of_a_finer_theta():
    """1/3 is not a bfloat16: a Δ against unrounded θ would pull it to one."""
    theta = torch.tensor([1 / 3])
    assert pseudo_gradient(theta, theta.bfloat16()).item() == 0.0


def test_half_precision_keeps_theta_in_float32_and_small_steps_add_up():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=1.0), inner_steps=1, outer_lr=0.01, outer_momentum=0.0)
    for _ in range(60):  # each inner step is one bfloat16 grid step below 1, 2^-8; a hundredth of it is none
        model.weight.grad = torch.full_like(model.weight, 2**-8)
        optimizer.step()
    theta = optimizer.state_dict()["diloco"]["theta"][0]
    assert theta.dtype == torch.float32 and theta.item() == pytest.approx(1 - 0.6 * 2**-8, abs=60 * 2**-24)
    assert model.weight.dtype == torch.bfloat16 and model.weight.item() == 1 - 2**-8


@pytest.mark.parametrize("cut", [5, 8, 9])
def test_a_run_saved_within_a_round_goes_on_the_same(cut):
    """H = 4: after one step of a round, at its end, and after the first step of the next."""

    def start(seed):
        model = network(seed)
        inner = INNER["adamw"](model.parameters())
        optimizer = DiLoCo(inner, inner_steps=4, outer_lr=0.6, clip_norm=0.5)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.outer, 5)

    model, optimizer, _ = start(0)
    train(model, optimizer, 17)
    first, half, _ = start(0)
    train(first, half, cut)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(first, half, 3, start=50)  # what was saved does not move with the run
    second, resumed, _ = start(1)
    train(second, resumed, 3)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.steps, resumed.position, resumed.rounds) == (cut, cut % 4, cut // 4)
    train(second, resumed, 17 - cut, start=cut)
    assert torch.equal(weights(second), weights(model))
    one, two = optimizer.state_dict(), resumed.state_dict()
    for key in ("theta", "velocity"):
        assert all(map(torch.equal, one["diloco"].pop(key), two["diloco"].pop(key)))
    assert one["diloco"] == two["diloco"]


def test_weights_within_a_round_and_the_common_ones():
    model = network()
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=4, outer_lr=0.6)
    train(model, optimizer, 4)
    common = weights(model)
    train(model, optimizer, 2)
    own = weights(model)
    with pytest.raises(KeyError), optimizer.global_weights():
        assert torch.equal(weights(model), common)
        raise KeyError
    assert torch.equal(weights(model), own) and not torch.equal(own, common)
    optimizer.rewind()
    assert torch.equal(weights(model), common) and optimizer.position == 0
    before = optimizer.rounds
    optimizer.synchronize()
    assert optimizer.rounds == before and torch.equal(weights(model), common)  # nothing moved: no outer step


def test_frozen_weights_cost_nothing_until_they_are_trained():
    model = network()
    model[0].requires_grad_(False)
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=2, outer_lr=0.5, outer_momentum=0)
    train(model, optimizer, 2)
    assert [theta is None for theta in optimizer.state_dict()["diloco"]["theta"]] == [True, True, False, False]
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    fast = model[0].weight.detach().clone()
    backward(model, *batch(0, 0))
    model[0].weight.grad.zero_()
    optimizer.inner.state.clear()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), (before + fast) / 2, rtol=1e-12, atol=0)


def test_weights_frozen_later_take_their_last_outer_step_and_stay():
    """What they did in the round counts; no outer momentum carries them on."""
    model = network()
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=2, outer_lr=0.5)
    train(model, optimizer, 5)
    start, fast = optimizer.state_dict()["diloco"]["theta"][0].clone(), model[0].weight.detach().clone()
    model[0].requires_grad_(False)
    train(model, optimizer, 1)
    end = model[0].weight.detach().clone()
    torch.testing.assert_close(end, start - 0.5 * 1.9 * (start - fast), rtol=1e-12, atol=0)
    head = model[2].weight.detach().clone()
    train(model, optimizer, 4)
    assert torch.equal(model[0].weight, end) and not torch.equal(model[2].weight, head)


def test_weights_added_later_join_the_next_outer_step():
    model = network()
    optimizer = DiLoCo(INNER["sgd"](model[0].parameters()), inner_steps=2, outer_lr=0.5, outer_momentum=0)
    train(model, optimizer, 2)
    start = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.2})
    train(model, optimizer, 1)
    fast = model[2].weight.detach().clone()
    optimizer.synchronize()
    assert len(optimizer.param_groups) == 2 and not torch.equal(fast, start)
    torch.testing.assert_close(model[2].weight.detach(), (start + fast) / 2, rtol=1e-12, atol=0)


def test_a_deep_copy_is_an_optimizer_of_its_own():
    model = network()
    optimizer = DiLoCo(INNER["adamw"](model.parameters()), inner_steps=3, outer_lr=0.6)
    train(model, optimizer, 4)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 5, start=4)
    train(twin_model, twin, 5, start=4)
    assert torch.equal(weights(model), weights(twin_model))


def test_a_copy_steps_itself_though_a_scheduler_drives_the_first():
    model = nn.Linear(2, 1)
    optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=0.1), inner_steps=5, outer_lr=0.7)
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    other_model, other = copy.deepcopy((model, optimizer))
    before, here = model.weight.detach().clone(), other_model.weight.detach().clone()
    other_model.weight.grad = torch.ones_like(other_model.weight)
    other.step()
    assert (other.steps, optimizer.steps) == (1, 0)
    assert torch.equal(model.weight, before) and not torch.equal(other_model.weight, here)
    assert pickle.loads(pickle.dumps(other)).steps == 1


def test_nesterov_is_no_text():
    with pytest.raises(InputError, match="^nesterov must be True or False, got 'no'$"):
        DiLoCo(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1), inner_steps=5, outer_lr=0.7, nesterov="no")
