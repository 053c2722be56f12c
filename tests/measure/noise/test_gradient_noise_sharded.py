"""The noise scale of models spread over ranks is that of one process."""

import contextlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from tests.spine.forked import in_ranks


class _Tied(nn.Module):
    """An embedding used twice, layers with odd sizes, a parameter of no module but the root."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        layers = lambda: nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6))  # noqa: E731
        self.blocks = nn.ModuleList([layers() for _ in range(2)])
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(self.norm(x) * self.scale.sum(), self.embedding.weight)


def _model(width=5):
    torch.manual_seed(3)
    return _Tied(width).double()


def _tokens(step):
    return torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(step))


def _loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _pairs(
    model, optimizer, pieces_of, total, method, weighted, sync=lambda last: contextlib.nullcontext(), group=None
):
    """Four updates: the pair of each."""
    weights = {"weighting": "preconditioned", "optimizer": optimizer} if weighted else {}
    noise = GradientNoise(model, method=method, process_group=group, **weights)
    pairs = []
    for step in range(4):
        optimizer.zero_grad()
        pieces = pieces_of(_tokens(step))
        for index, piece in enumerate(pieces):
            with sync(index == len(pieces) - 1), noise.micro_batch(len(piece)):
                (_loss(model, piece) * len(piece) / total).backward()
        noise.step()
        pairs.append(noise.pair or (0.0, 0.0))
        optimizer.step()
    noise.close()
    return torch.tensor(pairs, dtype=torch.float64)


def _of_one_process(sizes, weighted, width=5):
    model = _model(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    return _pairs(model, optimizer, lambda tokens: tokens.split(sizes), 12, "micro_batch", weighted)


def _sharded(folder, sizes, method, weighted, sync, replicas=1, checkpointed=False):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world, model = dist.get_rank(), dist.get_world_size(), _model()
    shape = (replicas, world // replicas) if replicas > 1 else (world,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        if checkpointed:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)

    @contextlib.contextmanager
    def last_alone(last):
        model.set_requires_gradient_sync(sync or last)
        yield

    share = 12 // world
    pieces_of = lambda tokens: tokens.split(share)[rank].split(sizes)  # noqa: E731
    torch.save(_pairs(model, optimizer, pieces_of, share, method, weighted, last_alone), folder / f"{rank}.pt")
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("method", "sizes", "sync", "same_as"),
    [
        ("micro_batch", [6], True, [6, 6]),
        ("micro_batch", [2, 4], True, [2, 4, 2, 4]),
        ("micro_batch", [2, 4], False, [2, 4, 2, 4]),
        ("ranks", [2, 4], False, [6, 6]),
    ],
)
def test_fully_sharded_ranks_give_what_one_process_gives(tmp_path, method, sizes, sync, same_as, weighted):
    assert in_ranks(2, tmp_path, _sharded, tmp_path, sizes, method, weighted, sync) == [0, 0]
    expected = _of_one_process(same_as, weighted)
    assert expected[-1].abs().min() > 0
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("world", "replicas", "checkpointed", "sizes", "same_as"),
    [(4, 2, False, [3], [3] * 4), (2, 1, True, [2, 4], [2, 4, 2, 4])],
)
def test_replicas_of_shards_and_recomputed_activations_change_nothing(
    tmp_path, world, replicas, checkpointed, sizes, same_as
):
    how = (sizes, "micro_batch", False, True, replicas, checkpointed)
    assert in_ranks(world, tmp_path, _sharded, tmp_path, *how) == [0] * world
    expected = _of_one_process(same_as, False)
    for rank in range(world):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-9, atol=1e-12)


def _refused(case):
    from torch.distributed.fsdp import fully_shard

    model = _model()
    if case == "ranks":
        fully_shard(model)
        noise, message = GradientNoise(model, method="ranks"), "set_requires_gradient_sync"
    else:
        model.norm.forward = lambda x: x * model.norm.weight
        model.embedding.forward = None
        model.forward = lambda tokens: F.linear(F.embedding(tokens, model.embedding.weight), model.embedding.weight)
        fully_shard(model)
        noise, message = GradientNoise(model), "1 sharded parameters have a gradient that no micro_batch saw"
    with pytest.raises(InputError, match=message):
        for piece in _tokens(0).split(6):
            with noise.micro_batch(len(piece)):
                (_loss(model, piece) / 2).backward()
        noise.step()


@pytest.mark.parametrize("case", ["ranks", "weights read without their module"])
def test_what_cannot_be_seen_is_refused(tmp_path, case):
    assert in_ranks(2, tmp_path, _refused, case) == [0, 0]


def _wrong_group():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, model = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)), _model(4)
    parallelize_module(model.blocks[0], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    noise = GradientNoise(model)
    for piece in _tokens(0).split(6):
        with noise.micro_batch(len(piece)):
            (_loss(model, piece) / 2).backward()
    with pytest.raises(InputError, match="process_group must hold the data-parallel ranks alone"):
        noise.step()


def test_tensor_parallel_ranks_are_not_taken_for_data_parallel_ones(tmp_path):
    assert in_ranks(2, tmp_path, _wrong_group) == [0, 0]


def _tensor_parallel(folder, sharded, weighted):
    """Two data-parallel ranks times two tensor-parallel ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), _model(4)
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if sharded:
            fully_shard(block, mesh=mesh["data"])
    if sharded:
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    group, place = mesh.get_group("data"), mesh.get_local_rank("data")

    @contextlib.contextmanager
    def averaged(_):
        yield
        if not sharded:
            for p in model.parameters():
                held = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                dist.all_reduce(held, group=group)
                held.div_(2)

    pieces_of = lambda tokens: [tokens.split(6)[place]]  # noqa: E731
    pairs = _pairs(model, optimizer, pieces_of, 6, "micro_batch", weighted, averaged, group)
    torch.save(pairs, folder / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize(("sharded", "weighted"), [(True, False), (True, True), (False, False)])
def test_tensor_parallel_ranks_give_what_one_process_gives(tmp_path, sharded, weighted):
    assert in_ranks(4, tmp_path, _tensor_parallel, tmp_path, sharded, weighted) == [0] * 4
    expected = _of_one_process([6, 6], weighted, width=4)
    for rank in range(4):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-9, atol=1e-12)
