"""EGN's step against the d x d system it stands for, however the batch is cut; its state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.optim.egn.egn import EGN
from batchlab.optim.egn.loss import LOSSES
from tests.optim.egn.problems import TORCH_LOSS, batch, flat, naive, network, primal, put, relative, taken


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("solver", ["lu", "cholesky"])
@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_a_step_solves_the_damped_system_of_torchs_loss(loss, solver, damping):
    model, (x, y) = network(), batch(loss)
    value, g, H = naive(model, loss, x, y)
    delta, returned = taken(model, EGN(model, loss, damping=damping, lr=0.5, solver=solver), x, y)
    assert relative(delta, 0.5 * primal(g, H, damping)) < 1e-10
    assert returned.item() == pytest.approx(value.item(), rel=1e-14) and returned.dtype == torch.float64


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_direction_is_that_of_curvlinops_matrix(loss):
    """277 weights; H + λI made of curvlinops' own products."""
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y) = network(outputs=5, inputs=10, hidden=17), batch(loss, b=6, c=5, inputs=10)
    function = nn.MSELoss() if loss == "mse" else nn.CrossEntropyLoss()
    H = curvlinops.GGNLinearOperator(model, function, list(model.parameters()), [(x, y)])
    H = (H @ torch.eye(277, dtype=torch.float64)).detach()
    g = torch.cat([each.flatten() for each in torch.autograd.grad(function(model(x), y), list(model.parameters()))])
    delta, _ = taken(model, EGN(model, loss, damping=1e-2), x, y)
    assert len(delta) == 277 and relative(delta, primal(g, H, 1e-2)) < 1e-8


@pytest.mark.parametrize(("loss", "momentum"), [("mse", 0.9), ("cross_entropy", 0.0)])
def test_a_hundred_steps_of_a_plain_loop(loss, momentum):
    """A scheduler halves the rate on the way; v ← m·v + (1 - m)·d and v/(1 - mᵗ) as written."""
    model, twin = network(), network()
    optimizer = EGN(model, loss, lr=0.5, momentum=momentum)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.5)
    v = torch.zeros_like(flat(twin))
    for t in range(1, 101):
        x, y = batch(loss, seed=t)
        optimizer.step(x, y)
        schedule.step()
        _, g, H = naive(twin, loss, x, y)
        v = momentum * v + (1 - momentum) * primal(g, H, 1.0)
        put(twin, flat(twin) + 0.5 * 0.5 ** ((t - 1) // 30) * v / (1 - momentum**t))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-12, atol=1e-12)


def test_one_step_fits_what_is_linear_with_the_least_change():
    model = nn.Linear(30, 1).double()
    x, y = torch.randn(8, 30, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(8, 1, dtype=torch.float64)], 1)
    least = torch.linalg.pinv(ones) @ (y - model(x)).detach()
    delta, _ = taken(model, EGN(model, "half_mse", damping=1e-10), x, y)
    assert (model(x) - y).abs().max() < 1e-8
    assert relative(delta, least.flatten()) < 1e-8
    nn.init.zeros_(model.weight)
    EGN(model, "half_mse", damping=0.0).step(x, y)
    assert (model(x) - y).abs().max() < 1e-12


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_much_damping_makes_it_the_gradient(loss):
    model, (x, y) = network(), batch(loss)
    _, g, _ = naive(model, loss, x, y)
    delta, _ = taken(model, EGN(model, loss, damping=1e6), x, y)
    assert F.cosine_similarity(delta, -g, dim=0) > 1 - 1e-6
    assert 1e6 * delta.norm() == pytest.approx(g.norm().item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("limits", [{"chunk": 1}, {"chunk": 3}, {"memory_bytes": 1}, {"memory_bytes": 15 * 8 * 10}])
def test_neither_chunks_nor_blocks_of_columns_change_the_step(loss, limits):
    whole, cut, (x, y) = network(), network(), batch(loss)
    EGN(whole, loss, damping=0.1).step(x, y)
    EGN(cut, loss, damping=0.1, **limits).step(x, y)
    assert (flat(whole) - flat(cut)).abs().max() < 1e-10


def test_every_batch_has_a_direction_of_descent():
    for trial in range(200):
        loss, damping = ("mse", "cross_entropy")[trial % 2], 10 ** (-6 * trial / 199)
        model, (x, y) = network(seed=trial), batch(loss, b=1 + trial % 7, seed=trial)
        g = torch.autograd.grad(TORCH_LOSS[loss](model(x), y), list(model.parameters()))
        delta, _ = taken(model, EGN(model, loss, damping=damping), x, y)
        assert delta @ torch.cat([each.flatten() for each in g]) < 0, trial


@pytest.mark.parametrize("solver", ["lu", "cholesky"])
@pytest.mark.parametrize("gap", [30.0, 1e3, 1e5])
def test_a_certain_network_still_gets_a_finite_step(solver, gap):
    """Q is 0 where p is one-hot to rounding: right or wrong, the step is -g/λ."""
    model = nn.Linear(3, 3, bias=False)
    model.load_state_dict({"weight": gap * torch.eye(3)})
    x, y = torch.eye(3), torch.tensor([0, 1, 0])
    p = F.softmax(gap * torch.eye(3), 1)
    want = -((p - F.one_hot(y, 3)).T @ x) / 3
    delta, _ = taken(model, EGN(model, "cross_entropy", damping=1.0, solver=solver), x, y)
    torch.testing.assert_close(delta.view(3, 3), want, rtol=1e-5, atol=gap * 2**-23)  # of logits of size gap
    assert delta.isfinite().all()


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_micro_batches_of_any_sizes_are_the_joined_batch(loss):
    whole, parts, (x, y) = network(), network(), batch(loss, b=9)
    options = dict(damping=0.1, momentum=0.5, line_search="armijo", adaptive_damping="trust_region")
    one, two = EGN(whole, loss, **options), EGN(parts, loss, **options)
    for _ in range(3):
        a, b = one.step(x, y), two.step(x.split([4, 3, 2]), list(y.split([4, 3, 2])))
        assert a == pytest.approx(b.item(), rel=1e-12)
    torch.testing.assert_close(flat(whole), flat(parts), rtol=1e-11, atol=1e-11)


def test_groups_scale_their_part_and_late_ones_join():
    model, (x, y) = network(), batch("mse")
    _, g, H = naive(model, "mse", x, y)
    head = list(model[2].parameters())
    optimizer = EGN(model, params=[{"params": head, "lr": 0.1}], damping=1.0, adaptive_damping="trust_region")
    optimizer.param_groups[0]["damping"] = 2.0
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert [group["damping"] for group in optimizer.param_groups] == [2.0, 2.0]
    delta, _ = taken(model, optimizer, x, y)
    want = primal(g, H, 2.0)
    want[30:] *= 0.1
    assert relative(delta, want) < 1e-12
    assert optimizer.param_groups[0]["damping"] == optimizer.param_groups[1]["damping"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_the_solve_is_in_float64(dtype):
    exact, rough, (x, y) = network(), network().to(dtype), batch("mse")
    at = flat(rough).clone()
    want, _ = taken(exact, EGN(exact, damping=0.1), x, y)
    optimizer = EGN(rough, damping=0.1, momentum=0.5)
    loss = optimizer.step(x.to(dtype), y.to(dtype))
    assert loss.dtype == flat(rough).dtype == dtype and not torch.equal(flat(rough), at)
    error = relative((flat(rough) - at).double(), want)
    assert error < {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    assert {state["direction"].dtype for state in optimizer.state.values()} == {dtype}


@pytest.mark.parametrize("solver", ["cholesky", "lu"])
def test_a_system_that_is_singular_in_its_dtype_is_refused_and_in_float64_solved(solver):
    """Every example stands twice in the batch, so that K alone is singular and bλ is below the rounding of float32."""
    model = nn.Linear(40, 1)
    x, y = (torch.randn(6, n).repeat(2, 1) for n in (40, 1))
    at = flat(model).clone()
    with pytest.raises(InputError, match="12 x 12 system is singular in torch.float64 at damping=0.0: raise damping$"):
        EGN(model, damping=0.0, solver=solver).step(torch.zeros_like(x), y)
    assert torch.equal(flat(model), at)
    if solver == "cholesky":
        with pytest.raises(InputError, match="in torch.float32 at damping=1e-09.*or use solve_dtype=torch.float64"):
            EGN(model, damping=1e-9, solve_dtype=torch.float32).step(x, y)
        assert torch.equal(flat(model), at)
    EGN(model, damping=1e-9, solver=solver).step(x, y)
    assert (model(x) - y).abs().max() < 1e-4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_goes_round_and_the_run_goes_on_the_same(momentum, tmp_path):
    options = dict(lr=3.0, momentum=momentum, line_search="armijo", adaptive_damping="trust_region")
    one, two = network(), network()
    first, second = EGN(one, "cross_entropy", **options), EGN(two, "cross_entropy", **options)
    for t in range(10):
        for optimizer in (first, *([second] if t < 4 else [])):
            optimizer.step(*batch("cross_entropy", seed=t))
    torch.save({"model": two.state_dict(), "optimizer": second.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    third = network(seed=5)
    resumed = EGN(third, "cross_entropy", line_search="armijo", adaptive_damping="trust_region")
    third.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in range(4, 10):
        resumed.step(*batch("cross_entropy", seed=t))
    assert torch.equal(flat(one), flat(third)) and resumed.last == first.last
    assert first.last.damping != 1.0 and bool(first.state) == (momentum > 0)


def test_a_closure_gives_the_batch_and_hooks_see_the_step():
    one, two, (x, y) = network(), network(), batch("mse")
    seen, optimizer = [], EGN(one)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    loss = optimizer.step(lambda: (x, y))
    assert loss == EGN(two).step(x, y) and torch.equal(flat(one), flat(two)) and seen == [1]
    assert not loss.requires_grad


def test_a_rate_of_zero_leaves_the_weights():
    model, (x, y) = network(), batch("mse")
    optimizer = EGN(model, lr=0.0, line_search="armijo", adaptive_damping="trust_region")
    delta, _ = taken(model, optimizer, x, y)
    assert not delta.any() and optimizer.param_groups[0]["damping"] == 1.0 and optimizer.last.ratio is None


def test_a_copy_steps_itself_though_a_scheduler_drives_the_first():
    model = nn.Linear(3, 1)
    optimizer = EGN(model, "mse")
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    other_model, other = copy.deepcopy((model, optimizer))
    before = model.weight.detach().clone()
    other.step(torch.randn(4, 3), torch.randn(4, 1))
    assert torch.equal(model.weight, before) and not torch.equal(other_model.weight, before)
