"""What a trial did to a model, an optimizer and the generators is undone in every bit."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.measure.course.learning_rate import range_test
from batchlab.measure.restore import restored


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
    model[3].eval()
    model[0].bias.requires_grad_(False)
    return model


def loss_of(model, n=32):
    x = torch.randn(n, 6)
    return (model(x).squeeze(1) - x.sin().sum(1)).square().mean()


def picture(model, optimizer):
    """All that must come back, as comparable values."""
    bits = [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]
    bits += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [part.training for part in model.modules()]
    state = copy.deepcopy(optimizer.state_dict())
    return bits, modes, state, torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def assert_same(before, after):
    assert len(before[0]) == len(after[0]) and all(map(torch.equal, before[0], after[0]))
    assert before[1] == after[1] and before[2]["param_groups"] == after[2]["param_groups"]
    assert before[2]["state"].keys() == after[2]["state"].keys()
    for held, now in zip(before[2]["state"].values(), after[2]["state"].values(), strict=True):
        assert held.keys() == now.keys()
        assert all(torch.equal(torch.as_tensor(held[key]), torch.as_tensor(now[key])) for key in held)
    assert torch.equal(before[3], after[3]) and before[4:] == after[4:]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("trained", [0, 3])
def test_a_range_test_on_a_model_in_use_leaves_no_trace(name, trained):
    model = network()
    options = {"momentum": 0.9} if name == "SGD" else {"fused": True}
    optimizer = getattr(torch.optim, name)([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)
    for _ in range(trained):
        loss_of(model).backward()
        optimizer.step()
    before, gradients = picture(model, optimizer), [p.grad for p in model.parameters()]

    def update(rate):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(model.train())
        loss.backward()
        optimizer.step()
        return loss.item()

    with restored(model, optimizer):
        range_test(update, low=1e-3, high=1.0, steps=10)
        assert not torch.equal(before[0][0], model[0].weight)
    assert_same(before, picture(model, optimizer))
    assert all(p.grad is old for p, old in zip(model.parameters(), gradients, strict=True))
    loss_of(model).backward()
    optimizer.step()  # the state is still of use


def test_a_learning_rate_held_in_a_tensor_is_put_back_in_place():
    model = network()
    optimizer = torch.optim.Adam(model[4].parameters(), lr=torch.tensor(0.01), capturable=False, foreach=False)
    loss_of(model).backward()
    optimizer.step()
    rate, moment = optimizer.param_groups[0]["lr"], optimizer.state[model[4].weight]["exp_avg"]
    held = moment.clone()
    with restored(model, optimizer):
        rate.fill_(1.0)
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.01)
    assert optimizer.state[model[4].weight]["exp_avg"] is moment and torch.equal(moment, held)


def test_it_restores_after_an_error_and_without_an_optimizer():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), restored(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        raise KeyError
    assert all(map(torch.equal, before, model.parameters()))


def test_the_run_afterwards_is_the_run_without_it():
    losses = []
    for tried in (False, True):
        model = network()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        course = []
        for step in range(6):
            if tried and step == 3:
                with restored(model, optimizer):
                    optimizer.param_groups[0]["lr"] = 1.0
                    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
                    loss_of(model).backward()
                    optimizer.step()
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        losses.append(course)
    assert losses[0] == losses[1]


class Running(nn.Module):
    """Each pass puts a new tensor in the place of its buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.layer(x - self.mean)


def test_buffers_that_are_replaced_or_new_come_back():
    model = Running()
    held = model.mean
    with restored(model):
        loss_of(model)
        model.register_buffer("more", torch.ones(1))
        assert model.mean is not held
    assert model.mean is held and not held.any() and [name for name, _ in model.named_buffers()] == ["mean"]


def test_lists_in_an_optimizers_state_come_back_as_long_as_they_were():
    model, x = nn.Linear(6, 1), torch.randn(32, 6)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x.sin().sum(1)).square().mean()
        loss.backward()
        return loss

    def history():
        (state,) = optimizer.state.values()
        return [tensor.clone() for name in ("old_dirs", "old_stps", "ro") for tensor in state[name]]

    optimizer.step(closure)
    before = history()
    with restored(model, optimizer):
        optimizer.step(closure)
        assert len(history()) > len(before)
    assert len(history()) == len(before) and all(map(torch.equal, before, history()))
