"""MKOR on several ranks is MKOR in one process: replicas, shards, unequal work."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from tests.optim.mkor.small_mlp import DOUBLE, batch, close, drawn, made, mlp, run
from tests.spine.forked import in_ranks

SIZES = (3, 1, 4)


def in_parts(folder, sharded):
    """Each rank's rows of a batch of 8, with losses that sum to its mean; the first rank's weights are kept."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = SIZES[:world] if world == 3 else (3, 5)
    model = mlp()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2], model):
            fully_shard(layer)
    net = model if sharded else DistributedDataParallel(model)
    optimizer = made(net, inv_freq=2)
    for step in range(12):
        optimizer.zero_grad()
        x, y = (part.split(sizes)[rank] for part in batch(step))
        (F.cross_entropy(net(x), y) * len(x) * world / 8).backward()
        optimizer.step()
    whole = [p.full_tensor() if sharded else p for p in (q.detach() for q in model.parameters())]
    state = optimizer.state_dict()["mkor"]
    torch.save((whole, state), folder / f"{rank}.pt")


@pytest.mark.parametrize("world, sharded", [(3, False), (2, True)])
def test_ranks_of_unequal_rows_are_one_process(tmp_path, world, sharded):
    assert in_ranks(world, tmp_path, in_parts, tmp_path, sharded) == [0] * world
    model = mlp()
    optimizer = made(model, inv_freq=2)
    wanted = run(model, optimizer, 12)
    for rank in range(world):
        weights, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        close(list(weights), wanted)
        assert state["layers"].keys() == {"0", "2"}
        for name, layer in optimizer.state_dict()["mkor"]["layers"].items():
            close(state["layers"][name]["A"], layer["A"])
            assert state["layers"][name]["mean_share"] == pytest.approx(layer["mean_share"])
    resumed = mlp()
    resumed.load_state_dict(model.state_dict())
    other = made(resumed)
    other.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "mkor": state})  # into another world size
    close(run(resumed, other, 4, start=12), run(model, optimizer, 4, start=12))


def unequal_work():
    """A layer that one rank alone calls, and a knee that only the mean of both losses has."""
    import torch.distributed as dist

    model = mlp()
    extra = nn.Linear(3, 3, dtype=DOUBLE)
    both = nn.ModuleList([model, extra])
    optimizer = made(both, inv_freq=1, switch="knee")
    optimizer._knee.warm_up = 2
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step)
        out = extra(model(x)) if dist.get_rank() else model(x)
        F.cross_entropy(out, y).backward()
        for p in both.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= 2
        optimizer.observe(10.0 - step if dist.get_rank() else 10.0 + step * (1 if step < 3 else 2))
        optimizer.step()
        if step < 2:
            assert optimizer.report()[2].updates == step + 1
            factors = torch.cat([layer.A.flatten() for layer in optimizer._layers])
            theirs = factors.clone()
            dist.broadcast(theirs, 0)
            assert torch.equal(theirs, factors)
    assert not optimizer.second_order


def test_ranks_agree_where_they_do_unequal_work(tmp_path):
    assert in_ranks(2, tmp_path, unequal_work) == [0, 0]


def spread_in_other_ways():
    """A gradient that is a sum still to be taken, and a layer that is called with DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    layer = distribute_module(nn.Linear(4, 2, dtype=DOUBLE), mesh)
    optimizer = made(layer, inv_freq=1)
    with pytest.raises(InputError, match=r"layer '' is called with DTensors \(tensor parallel\): put it in ignore"):
        layer(distribute_tensor(drawn(3, 4), mesh, [Replicate()]))
    optimizer._layers[0].A, optimizer._layers[0].G = torch.eye(5, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
    optimizer.steps, optimizer.inv_freq = 1, 2
    layer.weight.grad = DTensor.from_local(drawn(2, 4), mesh, [Partial()])
    with pytest.raises(InputError, match="the gradient of weight is a sum still to be taken over ranks: redistribute"):
        optimizer.step()


def test_what_is_spread_otherwise_is_refused(tmp_path):
    assert in_ranks(1, tmp_path, spread_in_other_ways) == [0]
