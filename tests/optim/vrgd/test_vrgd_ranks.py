"""Groups of several ranks, plain, under DDP and under FSDP2, are those of one process."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.by_name import first_step
from batchlab.optim.vrgd.multiplier import multiplier
from batchlab.optim.vrgd.optimizers import VRSGD, VRAdam
from batchlab.optim.vrgd.vrgd import VRGradient, keep_local
from batchlab.testing.optimizers import same
from tests.optim.vrgd.groups import randn
from tests.spine.forked import in_ranks


@pytest.fixture(scope="module", autouse=True)
def _compiler_is_loaded():
    first_step("adamw")  # here once, so that no forked rank has to


def backward(model, x, y, share):
    ((model(x) - y).square().mean() * share).backward()


def line():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def pieces(step):
    """Eight micro-batches of a step, of unequal sizes, and the examples in all."""
    x, y = randn(40, 6, seed=50 + step).float(), randn(40, 3, seed=90 + step).float()
    sizes = (6, 4, 3, 7, 5, 5, 8, 2)
    return list(zip(x.split(sizes), y.split(sizes), strict=True)), 40


RANKED = {"sgd": lambda p, **o: VRSGD(p, lr=0.1, **o), "adam": lambda p, **o: VRAdam(p, lr=0.01, **o)}


def in_one_process(make):
    model = line()
    optimizer = make(model.parameters(), groups=8)
    for step in range(5):
        micro, total = pieces(step)
        for x, y in micro:
            backward(model, x, y, len(x) / total)
            optimizer.add_group(examples=len(x))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def _own_gradients(one_process):
    """Four ranks of unequally many groups: plain models, and DDP with `keep_local` or `no_sync`."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [(0, 1, 2), (3,), (), (4, 5, 6, 7)][rank]
    even = [(0, 1), (2, 3), (4, 5), (6, 7)][rank]
    for name, make in RANKED.items():
        for how in ("plain", "keep_local", "no_sync"):
            model = line()
            optimizer = make(model.parameters(), groups=8, process_group=dist.group.WORLD)
            wrapped = model if how == "plain" else nn.parallel.DistributedDataParallel(model)
            if how == "keep_local":
                wrapped.register_comm_hook(None, keep_local)
            for step in range(5):
                micro, total = pieces(step)
                for index in mine if how == "plain" else even:
                    x, y = micro[index]
                    share = len(x) * world / total  # DDP's mean over ranks takes the number of ranks out again
                    if how == "no_sync":
                        with wrapped.no_sync():
                            backward(wrapped, x, y, share)
                    else:
                        backward(wrapped, x, y, share)
                    optimizer.add_group(examples=len(x))
                optimizer.step()
                optimizer.zero_grad()
            same([p.detach() for p in model.parameters()], one_process[name], 1e-6)
            assert optimizer.report().keys() == {
                f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(model.parameters())
            }, name
    _gradients_that_were_averaged()
    _one_rank_without_a_parameter()


def _gradients_that_were_averaged():
    import contextlib

    import torch.distributed as dist

    for last_only in (False, True):
        model = nn.parallel.DistributedDataParallel(line())
        vr = VRGradient(model.named_parameters(), process_group=dist.group.WORLD)
        micro, _ = pieces(dist.get_rank())
        for index, (x, y) in enumerate(micro[:3]):
            with model.no_sync() if last_only and index < 2 else contextlib.nullcontext():
                backward(model, x, y, 1.0)
            vr.add_group(examples=len(x))
        with pytest.raises(InputError, match="all ranks have the same gradient, averaged before"):
            vr.finish()


def _one_rank_without_a_parameter():
    """What no group of a rank touches counts as 0 there, and what none touches stays without a gradient."""
    import torch.distributed as dist

    rank = dist.get_rank()
    gradients = randn(4, 30, seed=11)
    w, v, u = (nn.Parameter(torch.zeros(30).double()) for _ in range(3))
    vr = VRGradient([w, v, u], process_group=dist.group.WORLD)
    w.grad = gradients[rank]
    v.grad = gradients[rank] if rank == 2 else None
    vr.add_group()
    vr.finish()
    torch.testing.assert_close(w.grad, multiplier(gradients) * gradients.mean(0), rtol=1e-10, atol=1e-12)
    alone = torch.zeros_like(gradients)
    alone[2] = gradients[2]
    torch.testing.assert_close(v.grad, multiplier(alone) * alone.mean(0), rtol=1e-10, atol=1e-12)
    assert u.grad is None


def test_groups_of_four_ranks_are_those_of_one_process(tmp_path):
    one_process = {name: in_one_process(make) for name, make in RANKED.items()}
    assert in_ranks(4, tmp_path, _own_gradients, one_process) == [0] * 4


def _reduced_gradients():
    """DDP and FSDP2 as they are: the groups are micro-batches, each reduced, and equal one process's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from batchlab.parallel.shards import whole

    rank, world = dist.get_rank(), dist.get_world_size()

    def train(model, make, ranks):
        optimizer = make(model.parameters())
        for step in range(5):
            for index in range(4):
                x, y = randn(8, 6, seed=10 * step + index).float(), randn(8, 3, seed=900 + 10 * step + index).float()
                mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks) if ranks > 1 else slice(None)
                backward(model, x[mine], y[mine], 0.25)
                optimizer.add_group(examples=8)
            optimizer.step()
            optimizer.zero_grad()
        return [whole(p.detach()) for p in model.parameters()]

    for make in RANKED.values():
        expected = train(line(), make, 1)
        model = line()
        train(nn.parallel.DistributedDataParallel(model), make, world)
        same([p.detach() for p in model.parameters()], expected, 1e-6)
        sharded = fully_shard(line(), mesh=init_device_mesh("cpu", (world,)))
        same(train(sharded, make, world), expected, 1e-6)
    with pytest.raises(InputError, match="is spread over ranks, so that no rank has its own gradient"):
        VRGradient(sharded.parameters(), process_group=dist.group.WORLD)
    sharded.set_requires_gradient_sync(False)
    vr = VRGradient(sharded.parameters())
    backward(sharded, torch.ones(2, 6), torch.ones(2, 3), 1.0)
    with pytest.raises(InputError, match="under FSDP2 each must reduce its gradients"):
        vr.add_group()


def test_reduced_micro_batches_are_groups_too(tmp_path):
    assert in_ranks(2, tmp_path, _reduced_gradients) == [0] * 2
