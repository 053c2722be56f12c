"""The optimizers on a GPU: the contract there, the CPU's steps, states that change devices, half precision."""

import copy

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim import LAMB, LARS, Lion, Muon
from batchlab.optim.by_name import create, first_step, names, step_alone
from batchlab.optim.newton_schulz import NewtonSchulz, orthogonalised, orthogonality_error
from batchlab.optim.watch import watched_step
from batchlab.testing.optimizers import (
    CHECKS,
    compiled_equals_the_loop,
    drawn,
    gradients_for,
    lists_equal_the_loop,
    same,
    small_model,
    trained,
)
from tests.optim.cases import CASES, LISTED
from tests.optim.on_device import mesh_on, started, tensors_of, through_file, weights_after

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
COMPILED = ("lamb", "lars", "muon", "came", "lion")  # some ten seconds each
SCALED = ("lamb", "lars", "lion", "muon", "came", "mars", "adagrad_norm")


@pytest.fixture(autouse=True)
def _same_bits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def grads(parameters, step):
    """Drawn gradients, the same on each device, in each parameter's dtype."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, check, accelerator):
    with torch.device(accelerator):
        assert next(small_model().parameters()).device.type == accelerator.type
        check(CASES[name])


@pytest.mark.parametrize("name", LISTED)
def test_the_form_for_lists(name, accelerator):
    with torch.device(accelerator):
        lists_equal_the_loop(LISTED[name])


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_form(name, accelerator):
    with torch.device(accelerator):
        compiled_equals_the_loop(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_steps_are_those_of_the_cpu(name, accelerator):
    found = weights_after(CASES[name], accelerator)
    assert all(each.device.type == accelerator.type for each in found)
    same(found, weights_after(CASES[name], CPU), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_state_goes_to_the_device_and_back(name, accelerator):
    whole = weights_after(CASES[name], CPU, 6)
    optimizer, model = started(CASES[name], CPU)
    trained(optimizer, model, range(2))
    for steps, device in ((range(2, 4), accelerator), (range(4, 6), CPU)):
        moved = copy.deepcopy(model).to(device)
        resumed = CASES[name](moved.parameters())
        resumed.load_state_dict(through_file(optimizer.state_dict()))  # its tensors are where the last one had them
        last = trained(resumed, moved, steps)
        optimizer, model = resumed, moved
    same(last, whole, 1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("vr_")])
def test_half_precision_parameters(name, accelerator):
    """Gradients are given: those of half-precision layers, and of groups made of them, differ between devices."""
    ends, states = [], []
    for device in (accelerator, CPU):
        optimizer, model = started(CASES[name], device, torch.bfloat16)
        for step in range(3):
            grads(model.parameters(), step)
            optimizer.step()
            if not step:
                states.append(copy.deepcopy([list(optimizer.state[p].values()) for p in model.parameters()]))
        ends.append([p.detach() for p in model.parameters()])
    assert all(each.dtype == torch.float32 for each in tensors_of(states[0]))
    same(tensors_of(states[0]), tensors_of(states[1]), 1e-5)
    same(*ends, 2**-7)


@pytest.mark.parametrize("name", SCALED)
def test_a_gradient_scaler(name, accelerator):
    """The steps of gradients that are divided by hand, bit for bit; a step that overflows is left out whole."""
    made = [started(CASES[name], accelerator, torch.float32) for _ in range(2)]
    (scaled, one), (plain, other) = made
    scaler = torch.amp.GradScaler(accelerator.type, init_scale=2.0**10, growth_interval=100)
    for step in range(4):
        x, y = drawn(12, 2, 8, generator=torch.Generator().manual_seed(step)), torch.ones(12, 6)
        for model in (one, other):
            model.zero_grad()
            with torch.autocast(accelerator.type, torch.float16):
                loss = (model(x.to(accelerator)) - y.to(accelerator)).square().mean()
            (scaler.scale(loss) if model is one else loss * 2.0**10).backward()
        for parameter in other.parameters():
            parameter.grad.div_(2.0**10)
        scaler.step(scaled)
        scaler.update()
        plain.step()
    same([p.detach() for p in one.parameters()], [p.detach() for p in other.parameters()])
    assert scaler.get_scale() == 2.0**10
    next(one.parameters()).grad[0] = torch.inf
    scaler.step(scaled)
    scaler.update()
    same([p.detach() for p in one.parameters()], [p.detach() for p in other.parameters()])
    assert scaler.get_scale() == 2.0**9 and {float(state["step"]) for state in scaled.state.values()} == {4.0}


@pytest.mark.parametrize("name", CASES)
def test_tensors_spread_over_a_mesh_of_one(name, accelerator):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with mesh_on(accelerator) as mesh:
        plain = [p.detach().clone().to(accelerator) for p in small_model().parameters()]
        spread = [distribute_tensor(each.clone(), mesh, [Shard(0)]) for each in plain]
        ours, theirs = ([nn.Parameter(each) for each in held] for held in (spread, plain))
        optimizers = CASES[name](ours), CASES[name](theirs)
        for step in range(3):
            grads(theirs, step)
            for a, b in zip(ours, theirs, strict=True):
                a.grad = distribute_tensor(b.grad.clone(), mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        assert all(isinstance(each, DTensor) for each in ours)
        same([p.detach().to_local() for p in ours], [p.detach() for p in theirs], 1e-10)


@pytest.mark.parametrize("name", ["lamb", "muon", "adagrad_norm"])
def test_a_model_under_fsdp(name, accelerator):
    from torch.distributed.fsdp import fully_shard

    with mesh_on(accelerator) as mesh:
        model = small_model().to(accelerator)
        fully_shard(model, mesh=mesh)
        optimizer = CASES[name](model.parameters())
        for step in range(3):
            gradients_for_spread(model, step, accelerator)
            optimizer.step()
        found = [p.detach().full_tensor() for p in model.parameters()]
    same(found, weights_after(CASES[name], CPU, 3), 1e-10)


def gradients_for_spread(model, step, device):
    """`gradients_for`, whose batch goes where the parameters are, and these are spread."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = drawn(12, 2, 8, generator=generator), drawn(12, 6, generator=generator)
    model.zero_grad()
    (model(x.to(device, torch.float64)) - y.to(device, torch.float64)).square().mean().backward()


@pytest.mark.parametrize("kind", [LAMB, LARS, Lion, Muon])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"])
def test_a_state_in_few_bits(kind, state_dtype, accelerator):
    """One step from no state is that of the CPU; the next, from rounded states, all but."""
    if state_dtype == "8bit":
        pytest.importorskip("torchao")
    ends = []
    for device in (accelerator, CPU):
        w = nn.Parameter(drawn(64, 128, generator=torch.Generator().manual_seed(0)).to(device))
        options = {"ns_dtype": torch.float32} if kind is Muon else {}
        optimizer = kind([w], lr=0.01, state_dtype=state_dtype, **options)
        for step in range(2):
            grads([w], step)
            optimizer.step()
            ends.append(w.detach().clone())
    held = [value for name, value in optimizer.state[w].items() if name != "step"]
    assert any(value.dtype != torch.float32 or hasattr(value, "codes") for value in held)
    same(ends[:1], ends[2:3], 1e-5)
    same(ends[1:2], ends[3:], 1e-2 if kind is not Lion else 0.02)


@pytest.mark.parametrize("name", names())
def test_each_name_that_can_be_made(name, accelerator):
    ends = []
    for device in (accelerator, CPU):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)]
        model = nn.Sequential(*layers).double().to(device)
        optimizer = create(name, model, lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(device)
            (model(x) - x[:, :2]).square().mean().backward()
            step_alone(optimizer)
        ends.append([p.detach() for p in model.parameters()])
    same(*ends, 1e-6 if name in ("mkor", "small_fc_lopt") else 1e-9)  # MKOR's factors are float32
    with torch.device(accelerator):
        first_step(name)


def test_what_a_step_did_is_told(accelerator):
    told = []
    for device in (accelerator, CPU):
        optimizer, model = started(CASES["lamb_clipped"], device)
        gradients_for(model, 0)
        told.append(watched_step(optimizer.step, optimizer, dict(model.named_parameters())))
    assert told[0].keys() == told[1].keys() and told[0]["3.weight"].keys() == told[1]["3.weight"].keys()
    for name, values in told[1].items():
        assert told[0][name] == pytest.approx(values, rel=1e-10)
    optimizer, model = started(CASES["muon"], accelerator)
    gradients_for(model, 0)
    with optimizer.watching():
        optimizer.step()
    assert sum("orthogonality_error" in each for each in optimizer.report().values()) == 3


def test_muon_takes_no_step_with_a_gradient_that_is_not_finite(accelerator):
    optimizer, model = started(CASES["muon"], accelerator)
    before = trained(optimizer, model, range(1))
    gradients_for(model, 1)
    list(model.parameters())[2].grad[0, 0] = torch.nan
    with pytest.raises(InputError, match="parameter 2 of shape"):
        optimizer.step()
    same([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6), (2, 2, 4, 4)])
def test_newton_schulz(shape, accelerator):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = NewtonSchulz(dtype=torch.float64)
    there, here = orthogonalised(g.to(accelerator), how), orthogonalised(g, how)
    same([there], [here], 1e-10)
    same([orthogonality_error(there)], [orthogonality_error(here)], 1e-10)
    coarse = orthogonalised(g.to(accelerator, torch.float32))
    assert coarse.dtype == torch.bfloat16 and (coarse.double().cpu() - here).abs().max() < 0.05


def test_autocast_takes_no_product_in_half_precision(accelerator):
    for make in (CASES["came"], CASES["muon"]):
        inside, outside = (started(make, accelerator, torch.float32) for _ in range(2))
        for step in range(2):
            for optimizer, model in (inside, outside):
                gradients_for(model, step)
                with torch.autocast(accelerator.type, torch.bfloat16, enabled=model is inside[1]):
                    optimizer.step()
        same(*([p.detach() for p in model.parameters()] for _, model in (inside, outside)))


def test_a_rate_on_either_device(accelerator):
    """A tensor for a rate, as torch's optimizers take it, on the CPU or beside the parameters."""
    for name in ("lamb", "lion", "lars", "came"):
        keywords = {**CASES[name].keywords}
        lr = keywords.pop("lr")
        ends = []
        for rate in (lr, torch.tensor(lr), torch.tensor(lr, device=accelerator)):
            model = small_model().to(accelerator)
            ends.append(trained(CASES[name].func(model.parameters(), lr=rate, **keywords), model, range(2)))
        same(ends[1], ends[0], 1e-6)
        same(ends[2], ends[0], 1e-6)
