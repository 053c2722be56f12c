"""DiLoCo between real gloo processes: means, bytes, buffers, shards, and what they refuse."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import BatchlabError, InputError, NonFiniteError
from tests.optim.diloco.diloco_fixture import ByHand, backward, batch, network, weights
from tests.optim.diloco.in_rank import adamw, optimizer_of, save, saved, sgd, train
from tests.spine.forked import in_ranks


def _every_step(folder):
    found = {}
    for name, inner, clip_norm in (("sgd", sgd, None), ("clipped", sgd, 0.5), ("adamw", adamw, None)):
        model = network(dist.get_rank())  # begins as rank 0's
        optimizer = optimizer_of(model, inner, inner_steps=1, outer_lr=1.0, outer_momentum=0.0, clip_norm=clip_norm)
        train(model, optimizer, range(20))
        found[name] = weights(model)
    save(folder, **found)


@pytest.mark.parametrize("world", [2, 4])
def test_at_every_step_it_is_data_parallel_for_linear_inner_steps_alone(tmp_path, world):
    """H = 1, η = 1, μ = 0: the mean of SGD steps is the step on the mean gradient; of clipped ones or AdamW's not."""
    assert in_ranks(world, tmp_path, _every_step, tmp_path) == [0] * world
    ranks = saved(tmp_path, world)
    for name, inner, clip_norm in (("sgd", sgd, None), ("clipped", sgd, 0.5), ("adamw", adamw, None)):
        model = network()
        optimizer = inner(model.parameters())
        for step in range(20):
            examples = [torch.cat(parts) for parts in zip(*(batch(r, step) for r in range(world)), strict=True)]
            backward(model, *examples)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
        assert all(torch.equal(each[name], ranks[0][name]) for each in ranks)
        apart = (ranks[0][name] - weights(model)).abs().max().item()
        assert apart < 1e-12 if name == "sgd" else apart > 1e-3, (name, apart)


def _bytes():
    handed, reduced = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **named: (handed.append(tensor.nbytes), reduced(tensor, *rest, **named))[1]
    model = network().float()
    optimizer = optimizer_of(model, inner_steps=5)
    handed.clear()
    for step in range(20):
        x, y = batch(dist.get_rank(), step)
        backward(model, x.float(), y.float())
        optimizer.step()
    ours, dist.all_reduce = sum(handed), reduced
    copied, theirs = DistributedDataParallel(network().float()), []

    def hook(_, bucket):
        theirs.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    copied.register_comm_hook(None, hook)
    for step in range(20):
        x, y = batch(dist.get_rank(), step)
        (copied(x.float()) - y.float()).square().mean().backward()
    assert optimizer.bytes_sent == ours == 4 * 4 * sum(p.numel() for p in model.parameters())
    assert len(handed) == 4 and sum(theirs) == 5 * ours


def test_an_outer_step_sends_one_copy_of_the_weights_and_so_a_part_in_h_of_ddp(tmp_path):
    assert in_ranks(2, tmp_path, _bytes) == [0, 0]


def _run(folder, steps):
    model = network(dist.get_rank())
    optimizer = optimizer_of(model)
    train(model, optimizer, range(steps))
    optimizer.synchronize()
    save(folder, weights=weights(model), rounds=optimizer.rounds)


@pytest.mark.parametrize(("world", "steps"), [(3, 30), (2, 31)])
def test_replicas_by_hand(tmp_path, world, steps):
    """Also with a tail shorter than a round."""
    assert in_ranks(world, tmp_path, _run, tmp_path, steps) == [0] * world
    hand = ByHand(adamw, lr=0.6)
    hand.rounds(range(world), 0, steps, 3)
    for each in saved(tmp_path, world):
        assert each["rounds"] == -(-steps // 3)
        torch.testing.assert_close(each["weights"], hand.theta, rtol=1e-12, atol=1e-12)


def _nan_on_one(folder):
    model = network()
    statistic = torch.ones(2) * dist.get_rank()
    optimizer = optimizer_of(model, buffers=[statistic, torch.tensor(3)])
    train(model, optimizer, range(5))
    held = copy.deepcopy(optimizer.state_dict()["diloco"])
    x, y = batch(dist.get_rank(), 5)
    backward(model, x * (float("nan") if dist.get_rank() == 1 else 1.0), y)
    own = (
        r"param_groups\[0\]\['params'\]\[0\] is so on this one"
        if dist.get_rank() == 1
        else "this one's own weights are"
    )
    with pytest.raises(NonFiniteError, match=f"in outer step 2; {own}"):
        optimizer.step()
    now = optimizer.state_dict()["diloco"]
    assert all(map(torch.equal, held["theta"] + held["velocity"], now["theta"] + now["velocity"]))
    optimizer.rewind()
    if dist.get_rank() == 1:
        optimizer.state.clear()
    train(model, optimizer, range(6, 12))
    assert optimizer.rounds == 3
    save(folder, weights=weights(model), buffer=statistic)


def test_nan_on_one_replica_stops_all_alike_and_all_go_on_together(tmp_path):
    assert in_ranks(2, tmp_path, _nan_on_one, tmp_path) == [0, 0]
    first, second = saved(tmp_path, 2)
    assert torch.equal(first["weights"], second["weights"]) and first["weights"].isfinite().all()
    assert first["buffer"].tolist() == second["buffer"].tolist() == [0.0, 0.0]  # as rank 0's from the start


def _statistics():
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    optimizer = optimizer_of(model, buffers=model.buffers(), inner_steps=4)
    train(model, optimizer, range(3))
    x, y = batch(dist.get_rank(), 3)
    backward(model, x, y)
    own = model[1].running_var.clone()
    optimizer.step()
    mean = own.clone()
    dist.all_reduce(mean)
    assert not torch.equal(own, mean / 2) and torch.equal(model[1].running_var, mean / 2)
    assert model[1].num_batches_tracked == 4
    floats = sum(p.numel() for p in model.parameters()) + 8
    assert optimizer.bytes_sent == 8 * floats


def test_running_statistics_are_averaged_where_they_are_given(tmp_path):
    assert in_ranks(2, tmp_path, _statistics) == [0, 0]


def _late(folder):
    """Rank 1's new layer and unfrozen weights begin as rank 0's, whatever they were."""
    model, extra = network(dist.get_rank()), nn.Linear(2, 2).double()
    nn.init.constant_(extra.weight, dist.get_rank())
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model)
    whole = nn.Sequential(model, extra)
    train(model, optimizer, range(4))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": extra.parameters()})
    train(whole, optimizer, range(4, 9))
    save(folder, weights=weights(whole), bytes=optimizer.bytes_sent)


def test_late_and_unfrozen_weights_are_common_from_then_on(tmp_path):
    assert in_ranks(2, tmp_path, _late, tmp_path) == [0, 0]
    first, second = saved(tmp_path, 2)
    assert torch.equal(first["weights"], second["weights"])
    assert first["bytes"] == 8 * (12 + 2 * (12 + 20 + 6))  # one round of the head alone, two of all


def _refused():
    rank = dist.get_rank()
    for name, settings in (
        ("inner_steps must be the same on every replica, got 3 to 4", {"inner_steps": 3 + rank}),
        ("outer_lr must be the same on every replica, got 0.5 to 0.6", {"outer_lr": 0.5 + rank / 10}),
        ("buffers must be the same on every replica, got 0 to 1", {"buffers": [torch.ones(1)] * rank}),
    ):
        with pytest.raises(InputError, match=name):
            optimizer_of(network(), **settings)
    with pytest.raises(InputError, match="weights must be the same on every replica, got 6 to 8"):
        optimizer_of(nn.Linear(2 + rank, 2).requires_grad_(True))
    optimizer = optimizer_of(network())
    with pytest.raises(InputError, match="source must be a rank of the group, 0 to 1, got 2"):
        optimizer.join(2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    with pytest.raises(InputError, match="process_group must join ranks of different replicas, got ranks that share"):
        optimizer_of(fully_shard(network(), mesh=mesh))
    outside = dist.new_group([0])
    if rank == 1:
        with pytest.raises(InputError, match="process_group must be a torch.distributed.ProcessGroup that this rank"):
            optimizer.set_process_group(outside)


def test_what_differs_between_replicas_is_named_before_anything_hangs(tmp_path):
    assert in_ranks(2, tmp_path, _refused) == [0, 0]


def _sharded(folder):
    """Two replicas of two shards: rank = 2·replica + shard, and both ranks of a replica see its whole batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    replica = mesh.get_local_rank("replica")
    model = fully_shard(network(), mesh=mesh["shard"])
    group = mesh["replica"].get_group()
    optimizer = optimizer_of(model, process_group=group, clip_norm=0.5)
    train(model, optimizer, range(7), replica=replica)
    state = copy.deepcopy(optimizer.state_dict())
    own = [p.detach().to_local().clone() for p in model.parameters()]
    train(model, optimizer, range(7, 12), replica=replica)
    whole = torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])
    again = fully_shard(network(5), mesh=mesh["shard"])
    resumed = optimizer_of(again, process_group=group, clip_norm=0.5)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for p, held in zip(again.parameters(), own, strict=True):
            p.to_local().copy_(held)
    train(again, resumed, range(7, 12), replica=replica)
    assert torch.equal(whole, torch.cat([p.full_tensor().detach().flatten() for p in again.parameters()]))
    theta = torch.cat([each.full_tensor().flatten() for each in resumed.state_dict()["diloco"]["theta"]])
    save(folder, weights=whole, theta=theta, bytes=optimizer.bytes_sent)
    x, y = batch(replica, 12)
    backward(model, x, y)
    if dist.get_rank() == 3:  # in one shard of one replica: all four must stop, none of them moved
        next(model.parameters()).grad.to_local().fill_(float("nan"))
    optimizer.clip_norm, optimizer.inner_steps = None, 1
    with pytest.raises(NonFiniteError, match="in outer step 5"):
        optimizer.step()
    optimizer.rewind()
    optimizer.state.clear()
    backward(model, x, y)
    lost = dist.get_rank() % 2 == 1  # one of the two groups fails: the other must not move its shards alone
    if lost:
        optimizer._replicas.mean_ = _fail
    with pytest.raises(RuntimeError if lost else BatchlabError, match="gone" if lost else "another shard of this rep"):
        optimizer.step()
    optimizer.rewind()
    assert torch.equal(whole, torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()]))


def _fail(_):
    raise RuntimeError("gone")


def test_sharded_replicas_train_as_whole_ones(tmp_path):
    assert in_ranks(4, tmp_path, _sharded, tmp_path) == [0] * 4

    def clipped(parameters):
        inner = adamw(parameters)
        inner.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(inner.param_groups[0]["params"], 0.5) and None)
        return inner

    hand = ByHand(clipped, lr=0.6)
    hand.rounds(range(2), 0, 12, 3)
    ranks = saved(tmp_path, 4)
    for each in ranks:
        torch.testing.assert_close(each["weights"], hand.theta, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(each["theta"], hand.theta, rtol=1e-11, atol=1e-12)
    one_copy = 8 * hand.theta.numel()  # float64, over the two shards of a replica
    assert ranks[0]["bytes"] + ranks[1]["bytes"] == 4 * one_copy
