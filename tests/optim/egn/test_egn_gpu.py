"""EGN on a GPU: the CPU's steps for each loss, solver and search; blocks and micro-batches; its state."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.egn.egn import EGN
from batchlab.optim.egn.loss import LOSSES
from tests.optim.egn.problems import batch, flat, network
from tests.optim.on_device import mesh_on, through_file

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def run(loss, device, *, dtype=torch.float64, steps=3, layers=None, **settings):
    model = (network() if layers is None else layers()).to(device, dtype)
    optimizer = EGN(model, loss, **{"damping": 0.1, "lr": 0.5} | settings)
    losses = []
    for step in range(steps):
        x, y = batch(loss, seed=step)
        losses.append(optimizer.step(x.to(device, dtype), y.to(device)))
    assert all(each.device.type == device.type and each.dtype == dtype for each in losses)
    return flat(model).cpu(), torch.stack(losses).cpu()


def close(ours, theirs, tolerance=1e-9):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("solver", ["lu", "cholesky"])
def test_the_steps_are_those_of_the_cpu(loss, solver, accelerator):
    settings = {"solver": solver, "momentum": 0.9}
    close(run(loss, accelerator, **settings), run(loss, CPU, **settings))


@pytest.mark.parametrize("search", ["armijo", "conservative", "goldstein"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_searches_and_adaptive_damping(search, momentum, accelerator):
    """With momentum the direction is pushed forward through the network."""
    settings = {"line_search": search, "adaptive_damping": "trust_region", "momentum": momentum, "lr": 1.0}
    close(run("mse", accelerator, **settings), run("mse", CPU, **settings), 1e-8)


@pytest.mark.parametrize("settings", [{"chunk": 2}, {"memory_bytes": 4000}, {"solve_dtype": torch.float32}])
def test_blocks_and_dtypes(settings, accelerator):
    tolerance = 1e-4 if "solve_dtype" in settings else 1e-9
    close(run("mse", accelerator, **settings), run("mse", CPU), tolerance)


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, 3))


def test_convolutions_in_single_precision(accelerator):
    """On GPUs torch lets convolutions round to TF32; those of single examples and of batches count as the same."""
    ours = run("mse", accelerator, dtype=torch.float32, layers=convolutions)
    close(ours, run("mse", CPU, dtype=torch.float32, layers=convolutions), 2e-2)


def test_micro_batches_are_one_batch(accelerator):
    whole, cut = network().to(accelerator), network().to(accelerator)
    x, y = (each.to(accelerator) for each in batch("cross_entropy", b=6))
    EGN(whole, "cross_entropy").step(x, y)
    EGN(cut, "cross_entropy").step(list(x.split((1, 3, 2))), list(y.split((1, 3, 2))))
    close([flat(cut)], [flat(whole)])


def test_a_state_goes_to_the_device_and_back(accelerator):
    def steps(model, optimizer, numbers):
        held = next(model.parameters())
        for step in numbers:
            x, y = batch("mse", seed=step)
            optimizer.step(x.to(held.device), y.to(held.device))
        return flat(model)

    def made(device):
        model = network().to(device)
        return model, EGN(model, "mse", lr=0.5, momentum=0.9)

    whole = steps(*made(CPU), range(6))
    model, optimizer = made(CPU)
    steps(model, optimizer, range(2))
    for numbers, device in ((range(2, 4), accelerator), (range(4, 6), CPU)):
        moved, resumed = made(device)
        moved.load_state_dict(through_file(model.state_dict(), where=device))
        resumed.load_state_dict(through_file(optimizer.state_dict()))
        last = steps(moved, resumed, numbers)
        model, optimizer = moved, resumed
    close([last], [whole])


def test_a_process_group_of_one_rank_changes_nothing(accelerator):
    import torch.distributed as dist

    alone = run("cross_entropy", accelerator)
    with mesh_on(accelerator):
        close(run("cross_entropy", accelerator, process_group=dist.group.WORLD), alone, 1e-12)


def test_a_singular_system_is_refused(accelerator):
    model = nn.Linear(2, 1, bias=False).double().to(accelerator)
    x = torch.zeros(4, 2, dtype=torch.float64, device=accelerator)
    before = flat(model).clone()
    for solver in ("cholesky", "lu"):
        with pytest.raises(InputError, match="is singular"):
            EGN(model, "mse", damping=0.0, solver=solver).step(x, x[:, :1] + 1)
    assert torch.equal(flat(model), before)
