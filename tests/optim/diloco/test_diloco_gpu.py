"""DiLoCo on a GPU: the CPU's rounds, its state through files of the other device, a process group of one rank."""

import pytest
import torch
import torch.distributed as dist

from batchlab.core.errors import NonFiniteError
from batchlab.optim.diloco.diloco import DiLoCo
from tests.optim.diloco.diloco_fixture import INNER, backward, batch, network, weights
from tests.optim.on_device import mesh_on, through_file

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def made(inner, device, dtype=torch.float64, **options):
    model = network().to(device, dtype)
    settings = {"inner_steps": 3, "outer_lr": 0.6, "clip_norm": 0.5} | options
    return DiLoCo(INNER[inner](model.parameters()), **settings), model


def run(optimizer, model, steps):
    held = next(model.parameters())
    for step in steps:
        backward(model, *(each.to(held) for each in batch(0, step)))
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("inner", INNER)
def test_the_rounds_are_those_of_the_cpu(inner, accelerator):
    (ours, model), (theirs, twin) = made(inner, accelerator), made(inner, CPU)
    torch.testing.assert_close(run(ours, model, range(7)).cpu(), run(theirs, twin, range(7)), rtol=1e-10, atol=1e-10)
    assert ours.rounds == 2 and ours.position == 1
    inside = []
    for optimizer, net in ((ours, model), (theirs, twin)):
        own = weights(net)
        with optimizer.global_weights():
            inside.append(weights(net).cpu())
        assert torch.equal(weights(net), own) and not torch.equal(inside[-1], own.cpu())
    torch.testing.assert_close(*inside, rtol=1e-10, atol=1e-10)
    ours.synchronize()
    assert ours.rounds == 3


@pytest.mark.parametrize("inner", INNER)
def test_a_state_goes_to_the_device_and_back(inner, accelerator):
    whole = run(*made(inner, CPU), range(12))
    optimizer, model = made(inner, CPU)
    run(optimizer, model, range(4))
    for steps, device in ((range(4, 8), accelerator), (range(8, 12), CPU)):
        resumed, moved = made(inner, device)
        moved.load_state_dict(through_file(model.state_dict(), where=device))
        resumed.load_state_dict(through_file(optimizer.state_dict()))
        last = run(resumed, moved, steps)
        optimizer, model = resumed, moved
    torch.testing.assert_close(last, whole, rtol=1e-10, atol=1e-10)


def test_half_precision_weights_move_as_their_float32_common_ones(accelerator):
    optimizer, model = made("sgd", accelerator, torch.bfloat16)
    before = weights(model)
    run(optimizer, model, range(6))
    thetas = optimizer.state_dict()["diloco"]["theta"]
    assert all(theta.dtype == torch.float32 and theta.device.type == accelerator.type for theta in thetas)
    rounded = torch.cat([theta.to(torch.bfloat16).flatten() for theta in thetas])
    assert torch.equal(rounded, weights(model)) and not torch.equal(rounded, before)


def test_what_is_not_finite_moves_nothing_and_is_rewound(accelerator):
    optimizer, model = made("sgd", accelerator)
    run(optimizer, model, range(3))
    before = weights(model)
    run(optimizer, model, range(3, 5))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="outer step 2; .* is so on this one"):
        run(optimizer, model, range(5, 6))
    optimizer.rewind()
    assert torch.equal(weights(model), before)


def test_a_process_group_of_one_rank_is_one_replica_alone(accelerator):
    alone = run(*made("adamw", accelerator), range(6))
    with mesh_on(accelerator):
        optimizer, model = made("adamw", accelerator, process_group=dist.group.WORLD, buffers=[])
        assert torch.equal(run(optimizer, model, range(6)), alone)
        assert not optimizer.join() and optimizer.rounds == 2


def test_a_model_under_fsdp_in_one_replica(accelerator):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    alone = run(*made("sgd", accelerator), range(4))
    with mesh_on(accelerator) as mesh:
        model = network().to(accelerator)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = DiLoCo(INNER["sgd"](model.parameters()), inner_steps=3, outer_lr=0.6, clip_norm=0.5)
        for step in range(4):
            backward(model, *(each.to(accelerator) for each in batch(0, step)))
            optimizer.step()
        found = torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])
        assert all(isinstance(each, DTensor) for each in optimizer.state_dict()["diloco"]["theta"])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-10)
