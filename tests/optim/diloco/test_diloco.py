"""DiLoCo in one process: its limits, its outer step by hand, its state, and what it refuses."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError, NonFiniteError
from batchlab.optim.diloco.diloco import DiLoCo, outer_learning_rate, pseudo_gradient
from batchlab.optim.diloco.replicas import clip_
from batchlab.optim.vrgd.optimizers import VRSGD
from tests.optim.diloco.diloco_fixture import ByHand, backward, batch, network, weights

INNER = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
}


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        backward(model, *batch(0, step))
        optimizer.step()


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("inner_steps", [1, 10])
def test_one_replica_with_a_plain_outer_step_is_its_inner_optimizer(name, inner_steps):
    """η = 1, μ = 0: to rounding, for θ - (θ - θ_m) rounds; so the inner state goes on across outer steps."""
    model, plain = network(), network()
    inner, alone = INNER[name](model.parameters()), INNER[name](plain.parameters())
    optimizer = DiLoCo(inner, inner_steps=inner_steps, outer_lr=1.0, outer_momentum=0.0)
    train(model, optimizer, 60)
    train(plain, alone, 60)
    assert optimizer.rounds == 60 // inner_steps and optimizer.position == 0
    assert (weights(model) - weights(plain)).abs().max() < 1e-14
    for mine, theirs in zip(inner.state.values(), alone.state.values(), strict=True):
        assert mine.keys() == theirs.keys() and mine
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", INNER)
def test_a_hundred_steps_by_hand(name, momentum):
    model = network()
    optimizer = DiLoCo(INNER[name](model.parameters()), inner_steps=7, outer_lr=0.6, outer_momentum=momentum)
    train(model, optimizer, 100)
    optimizer.synchronize()
    hand = ByHand(INNER[name], lr=0.6, momentum=momentum)
    hand.rounds([0], 0, 100, 7)
    assert optimizer.rounds == 15
    torch.testing.assert_close(weights(model), hand.theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_outer_step_is_torch_sgd_on_the_pseudo_gradient(nesterov):
    """Five rounds, bit for bit."""
    model = network()
    optimizer = DiLoCo(INNER["adamw"](model.parameters()), inner_steps=3, outer_lr=0.7, nesterov=nesterov)
    theta = weights(model).requires_grad_()
    outer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=nesterov)
    for round_ in range(5):
        train(model, optimizer, 2, start=3 * round_)
        backward(model, *batch(0, 3 * round_ + 2))
        end, inner = copy.deepcopy((model, optimizer.inner))
        for copied, p in zip(end.parameters(), model.parameters(), strict=True):
            copied.grad = p.grad.clone()
        inner.step()  # the last of the round, without what follows it
        theta.grad = theta.detach() - weights(end)
        outer.step()
        optimizer.step()
        assert torch.equal(weights(model), theta.detach()), round_


def test_without_momentum_it_is_lookahead():
    """Slow weights φ ← φ + α(fast - φ) every k steps (Zhang et al. 2019)."""
    model, fast = network(), network()
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=5, outer_lr=0.5, outer_momentum=0)
    inner, slow = INNER["sgd"](fast.parameters()), weights(fast)
    for step in range(40):
        train(fast, inner, 1, start=step)
        if step % 5 == 4:
            slow = slow + 0.5 * (weights(fast) - slow)
            nn.utils.vector_to_parameters(slow.clone(), fast.parameters())
    train(model, optimizer, 40)
    torch.testing.assert_close(weights(model), slow, rtol=1e-13, atol=1e-13)


@given(theta=st.floats(-1e3, 1e3), moved=st.floats(-10.0, 10.0))
def test_the_pseudo_gradient_points_where_a_subtracting_optimizer_follows(theta, moved):
    old = torch.tensor([theta], dtype=torch.float64)
    assert old - pseudo_gradient(old, old + moved) == pytest.approx(theta + moved, abs=1e-12)


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


def test_schedules_of_both_rates_are_read_at_each_step():
    model, optimizer = network(), None
    optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=0.1), inner_steps=2, outer_lr=1.0, outer_momentum=0)
    inner_lr = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(2):
        backward(model, *batch(0, step))
        optimizer.step()
        inner_lr.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.025
    optimizer.outer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(model, optimizer, 1)
    assert not torch.equal(weights(model), before)
    train(model, optimizer, 1)
    assert torch.equal(weights(model), before)  # an outer rate of 0 goes back


def test_a_closure_is_called_by_the_inner_optimizer_clipped_and_its_loss_returned():
    one, two = network(), network()
    first = DiLoCo(INNER["sgd"](one.parameters()), inner_steps=2, outer_lr=0.6, clip_norm=0.01)
    second = DiLoCo(INNER["sgd"](two.parameters()), inner_steps=2, outer_lr=0.6)
    for step in range(6):
        loss = first.step(lambda step=step: backward(one, *batch(0, step)))
        assert loss == backward(two, *batch(0, step))
        nn.utils.clip_grad_norm_(two.parameters(), 0.01)
        second.step()
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-12, atol=1e-14)


def test_clipping_is_torchs_over_all_tensors():
    gradients = [torch.randn(4, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    for most in (0.1, 100.0):
        mine, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
        for p, g in zip(mine + theirs, gradients * 2, strict=True):
            p.grad = g.clone()
        clip_([("", p) for p in mine], most)
        nn.utils.clip_grad_norm_(theirs, most)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)
    mine[0].grad[0, 0] = math.nan
    clip_([("", p) for p in mine], 1.0)
    assert all(p.grad.isnan().all() for p in mine)


def test_micro_batches_make_the_step_of_their_whole():
    x, y = batch(0, 0, examples=10)
    models = network(), network()
    for model, sizes in zip(models, ([10], [4, 4, 2]), strict=True):
        optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=2, outer_lr=0.6)
        for _ in range(4):
            optimizer.zero_grad()
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
                ((model(a) - b).square().mean() * (len(a) / 10)).backward()
            optimizer.step()
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-12, atol=1e-14)


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


def test_a_bad_round_is_named_and_moves_nothing_common():
    model = network()
    optimizer = DiLoCo(INNER["adamw"](model.named_parameters()), inner_steps=2, outer_lr=0.6)
    train(model, optimizer, 3)
    held = copy.deepcopy(optimizer.state_dict()["diloco"])
    backward(model, *batch(0, 3))
    model[2].bias.grad[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"in outer step 2; 2.bias is so on this one, whose inner state must"):
        optimizer.step()
    now = optimizer.state_dict()["diloco"]
    for key in ("theta", "velocity"):
        assert all(map(torch.equal, held[key], now[key]))
    assert model[2].bias.isnan().any()  # nothing was silently made finite
    optimizer.rewind()
    optimizer.state.clear()
    train(model, optimizer, 4)
    assert optimizer.rounds == 3 and weights(model).isfinite().all()


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


def test_any_shape_and_memory_order_will_do():
    parts = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(2, 2)]
    odd = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(3).double())]
    parameters = [p for part in parts for p in part.parameters()] + odd
    optimizer = DiLoCo(torch.optim.SGD(parameters, lr=0.1), inner_steps=1, outer_lr=0.5, outer_momentum=0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.05 * p.grad)


def test_a_deep_copy_is_an_optimizer_of_its_own():
    model = network()
    optimizer = DiLoCo(INNER["adamw"](model.parameters()), inner_steps=3, outer_lr=0.6)
    train(model, optimizer, 4)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 5, start=4)
    train(twin_model, twin, 5, start=4)
    assert torch.equal(weights(model), weights(twin_model))


def test_hooks_and_profile_names_are_those_of_any_optimizer():
    model, calls = network(), []
    optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=3, outer_lr=0.6)
    optimizer.register_step_post_hook(lambda *_: calls.append(optimizer.steps))
    train(model, optimizer, 3)
    assert calls == [1, 2, 3] and isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith("DiLoCo (\nParameter Group 0") and optimizer.bytes_sent == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be an integer of at least 1, got 0"),
        ({"inner_steps": 2.5}, "inner_steps must be an integer of at least 1, got 2.5"),
        ({"outer_lr": 0.0}, "outer_lr must be finite and > 0, got 0.0"),
        ({"outer_lr": math.nan}, "outer_lr must be finite and > 0, got nan"),
        ({"outer_lr": None}, "outer_lr must be finite and > 0, got None"),
        ({"outer_momentum": 1.0}, r"outer_momentum must lie in \[0, 1\), got 1.0"),
        ({"outer_momentum": -0.1}, r"outer_momentum must lie in \[0, 1\), got -0.1"),
        ({"outer_momentum": "0.9"}, r"outer_momentum must lie in \[0, 1\), got '0.9'"),
        ({"clip_norm": 0.0}, "clip_norm must be finite and > 0, got 0.0"),
        ({"process_group": 3}, "process_group must be a torch.distributed.ProcessGroup that this rank is in, or None"),
        (
            {"buffers": [("scale", torch.ones(1))]},
            r"buffers must be several tensors, as model.buffers\(\) gives them, go",
        ),
        ({"buffers": torch.ones(2)}, r"buffers must be several tensors, as model.buffers\(\) gives them, got tensor"),
        ({"inner": nn.Linear(1, 1)}, "inner must be the torch.optim.Optimizer of one replica, got Linear"),
    ],
)
def test_bad_input_is_named(arguments, message):
    given_ = {"inner": INNER["sgd"](network().parameters()), "inner_steps": 3, "outer_lr": 0.6} | arguments
    with pytest.raises(InputError, match=message):
        DiLoCo(given_.pop("inner"), **given_)


def test_what_the_inner_optimizer_may_not_be():
    inner = DiLoCo(INNER["sgd"](network().parameters()), inner_steps=2, outer_lr=0.6)
    with pytest.raises(InputError, match="inner must be the torch.optim.Optimizer of one replica, got DiLoCo"):
        DiLoCo(inner, inner_steps=2, outer_lr=0.6)
    through = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, differentiable=True)
    with pytest.raises(InputError, match="inner must have differentiable=False"):
        DiLoCo(through, inner_steps=2, outer_lr=0.6)
    grouped = VRSGD(network().parameters(), lr=0.1)
    with pytest.raises(InputError, match="clip_norm must be None where inner takes its gradient in groups, as VRSGD d"):
        DiLoCo(grouped, inner_steps=2, outer_lr=0.6, clip_norm=1.0)
    complex_ = torch.optim.SGD([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))], lr=0.1)
    with pytest.raises(InputError, match="DiLoCo needs real weights, got a complex w: make it a parameter by torch.vi"):
        DiLoCo(complex_, inner_steps=2, outer_lr=0.6)
    nowhere = torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"param_groups\[0\]\['params'\]\[0\] is on meta: give it some before DiLoCo"):
        DiLoCo(nowhere, inner_steps=2, outer_lr=0.6)


def test_sparse_gradients_are_the_inner_optimizers_but_for_clipping():
    table = nn.Embedding(4, 2, sparse=True)
    for clip_norm in (None, 1.0):
        inner = torch.optim.SGD([("table", table.weight)], lr=0.1)
        optimizer = DiLoCo(inner, inner_steps=1, outer_lr=0.6, clip_norm=clip_norm)
        optimizer.zero_grad()
        table(torch.tensor([1])).sum().backward()
        if clip_norm is None:
            optimizer.step()
            continue
        with pytest.raises(InputError, match="clip_norm needs dense gradients, got a sparse one of table: build it"):
            optimizer.step()


def test_states_of_other_things_are_refused():
    model = network()
    inner = INNER["adamw"](model.named_parameters())
    optimizer = DiLoCo(inner, inner_steps=2, outer_lr=0.6)
    with pytest.raises(InputError, match=r'state_dict must be of DiLoCo \(no "diloco" in it\): load a plain one into'):
        optimizer.load_state_dict(inner.state_dict())
    state = optimizer.state_dict()
    state["diloco"]["theta"] = state["diloco"]["theta"][:3]
    with pytest.raises(InputError, match="state_dict must be of 4 parameters, got 3"):
        optimizer.load_state_dict(state)
    state["diloco"]["theta"] = [torch.zeros(2, 2)] * 4
    with pytest.raises(InputError, match=r"θ of 0.weight must be of shape \(5, 3\), got \(2, 2\)"):
        optimizer.load_state_dict(state)
    with pytest.raises(InputError, match="join needs a process group: give it to set_process_group first"):
        optimizer.join()


def test_outer_rates_are_the_sources_where_it_has_one():
    assert [outer_learning_rate(m) for m in (1, 2, 4, 8)] == [0.4, 0.6, 0.6, 0.8]
    with pytest.raises(InputError, match=r"replicas must be one of \(1, 2, 4, 8\), .* got 3: try outer rates of 0.4"):
        outer_learning_rate(3)
    with pytest.raises(InputError, match="replicas must be an integer of at least 1, got 0"):
        outer_learning_rate(0)
