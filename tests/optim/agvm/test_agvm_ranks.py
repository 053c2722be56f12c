"""AGVM over ranks: halves in space are halves in time, under DDP and FSDP2 too."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError
from batchlab.optim.agvm.agvm import AGVM
from batchlab.optim.by_name import first_step
from tests.optim.agvm.two_heads import OPTIMIZERS, batch, cut, loss, parts, two_heads, weights
from tests.spine.forked import in_ranks

STEPS = 9
SETTINGS = {"start": 2, "interval": 3, "alpha": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _compiler_is_loaded():
    first_step("adamw")  # here once, so that no forked rank has to


def alone(name, order=lambda pieces: pieces, pieces=2):
    """The weights, factors and φ after the same steps in one process, its halves cut into so many pieces each."""
    model = two_heads()
    agvm = AGVM(OPTIMIZERS[name](parts(model)), **SETTINGS)
    for step in range(STEPS):
        agvm.zero_grad()
        found = order(cut(batch(step), 2 * pieces))
        for half, chosen in (("A", found[:pieces]), ("B", found[pieces:])):
            with agvm.half(half):
                for piece in chosen:
                    (loss(model, *piece) / pieces).backward()
        agvm.step()
    return weights(model), torch.tensor([agvm.factors, agvm.phis])


def _in_space(folder, name, how):
    rank, world = dist.get_rank(), dist.get_world_size()
    model = two_heads()
    view = {"gradient_as_bucket_view": True} if how == "buckets" else {}
    called = model if how == "plain" else DistributedDataParallel(model, **view)
    agvm = AGVM(OPTIMIZERS[name](parts(called)), **SETTINGS)
    for step in range(STEPS):
        agvm.zero_grad()
        mine = cut(cut(batch(step), world)[rank], 2)
        with agvm.rank_halves(called):
            for index, piece in enumerate(mine):
                early = index == 0 and how != "plain"
                with called.no_sync() if early else contextlib.nullcontext():
                    (loss(called, *piece) / 2).backward()
        if how == "plain":  # as a loop written without AGVM does, for which it changes nothing
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= world
        agvm.step()
    torch.save((weights(model), torch.tensor([agvm.factors, agvm.phis])), folder / f"{rank}.pt")


def agree(folder, world, expected):
    for rank in range(world):
        for found, wanted in zip(torch.load(folder / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (expected[1][0] - 1).abs().max() > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["plain", "ddp", "buckets"])
def test_two_ranks_are_two_halves_in_one_process(tmp_path, name, how):
    assert in_ranks(2, tmp_path, _in_space, tmp_path, name, how) == [0, 0]
    agree(tmp_path, 2, alone(name))


def test_of_four_ranks_the_first_two_are_half_a(tmp_path):
    assert in_ranks(4, tmp_path, _in_space, tmp_path, "sgd", "ddp") == [0] * 4
    agree(tmp_path, 4, alone("sgd", pieces=4))


def _in_time(folder, name, how):
    """Each rank cuts its own examples into halves: half A of all ranks is the whole batch's half A."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = two_heads()
    if how == "fsdp":
        for part in (model.trunk, model.left, model.right):
            fully_shard(part)
        called = fully_shard(model)
    else:
        called = DistributedDataParallel(model, gradient_as_bucket_view=True)
    agvm = AGVM(OPTIMIZERS[name](parts(called)), **SETTINGS)
    for step in range(STEPS):
        agvm.zero_grad()
        for half, data in zip("AB", cut(cut(batch(step), world)[rank], 2), strict=True):
            with agvm.half(half):
                loss(called, *data).backward()
        agvm.step()
    found = [p.full_tensor() if how == "fsdp" else p for p in model.parameters()]
    found = torch.cat([p.detach().flatten() for p in found])
    torch.save((found, torch.tensor([agvm.factors, agvm.phis])), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("name", "how"), [("sgd", "ddp"), pytest.param("sgd", "fsdp", marks=pytest.mark.slow), ("adamw", "fsdp")]
)
def test_halves_in_time_are_those_of_the_whole_batch(tmp_path, name, how):
    assert in_ranks(2, tmp_path, _in_time, tmp_path, name, how) == [0, 0]
    agree(tmp_path, 2, alone(name, order=lambda pieces: [pieces[0], pieces[2], pieces[1], pieces[3]]))


def _odd():
    model = two_heads()
    bare = OPTIMIZERS["sgd"](parts(model))
    message = 'rank_halves needs an even number of ranks, got 3: take the halves with half\\("A"\\) and half\\("B"\\)'
    with pytest.raises(InputError, match=message), AGVM(bare).rank_halves():
        pass
    with pytest.raises(InputError, match=message):
        AGVM(bare, process_group=dist.group.WORLD)


def test_an_odd_number_of_ranks_is_refused(tmp_path):
    assert in_ranks(3, tmp_path, _odd) == [0] * 3


def _averaged_early(case):
    model = two_heads()
    data = cut(batch(0), 2)[0 if case == "same examples" else dist.get_rank()]
    if case == "sharded":
        called, message = fully_shard(model), "trunk.0.weight is spread over ranks, so that no rank has its own gradie"
    else:
        called, message = DistributedDataParallel(model), "all ranks have the same gradient, averaged before rank_halv"
    agvm = AGVM(OPTIMIZERS["sgd"](parts(model)), start=0)
    value = loss(called, *data) if case == "forward outside" else None
    with pytest.raises(InputError, match=message), agvm.rank_halves(None if case == "no model" else called):
        (loss(called, *data) if value is None else value).backward()


@pytest.mark.parametrize("case", ["forward outside", "no model", "same examples", "sharded"])
def test_what_was_averaged_too_early_is_refused(tmp_path, case):
    assert in_ranks(2, tmp_path, _averaged_early, case) == [0, 0]


def _unused():
    """A head that one rank alone uses, one that none does, and a gradient that is infinite on one rank."""
    rank, model = dist.get_rank(), two_heads()
    agvm = AGVM(OPTIMIZERS["sgd"](parts(model)), start=0, interval=1, alpha=0.0)
    x, y, _ = batch(rank)
    model.right.requires_grad_(False)
    with agvm.rank_halves():
        found = model.trunk(x)
        torch.nn.functional.cross_entropy(model.left(found) if rank else found[:, :3], y).backward()
    assert all(p.grad is None for p in model.right.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.left.parameters())
    agvm.step()
    assert math.isnan(agvm.phis[1]) and math.isnan(agvm.phis[2]) and 0 < agvm.phis[0] < 2 and agvm.factors == (1, 1, 1)
    agvm.zero_grad()
    with agvm.rank_halves():
        loss(model, *batch(rank)).backward()
        if rank:
            model.left[0].bias.grad[0] = math.inf
    assert model.left[0].bias.grad[0] == math.inf
    agvm.step()
    assert agvm.skipped == 1


def test_parameters_without_gradient_on_a_rank_count_as_zero_there(tmp_path):
    assert in_ranks(2, tmp_path, _unused) == [0, 0]
