"""Whether an optimizer gives the same weights however the model is spread: to be called in every one of four ranks.

The default process group must have four ranks. `HOW` names the ways: DDP; FSDP2 over one dimension of ranks, where most
tensors do not divide evenly; FSDP2 over a mesh of two replicas of two shards; FSDP2 over two ranks of tensor
parallelism over two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.parallel.shards import whole
from batchlab.testing.optimizers import Make, same

HOW = ("ddp", "fsdp", "hsdp", "fsdp_tp")
BATCH = 16


def model_to_spread(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Two matrices that tensor parallelism can cut, a tall one, biases, a norm."""
    generator = torch.Generator().manual_seed(seed)
    up, down = nn.Linear(6, 8), nn.Linear(8, 6)
    layers = [("up", up), ("act", nn.GELU()), ("down", down), ("norm", nn.LayerNorm(6)), ("head", nn.Linear(6, 9))]
    model = nn.Sequential(OrderedDict[str, nn.Module](layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def spread(how: str, model: nn.Module) -> tuple[nn.Module, int, int]:
    """The model spread in one of the ways of `HOW`, the data-parallel ranks, and this rank's place among them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world, rank = dist.get_world_size(), dist.get_rank()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model), world, rank
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    elif how == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    else:
        both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh, world, rank = both["data"], world // 2, both.get_local_rank("data")
    for name in ("up", "down", "head"):
        fully_shard(cast(Any, model).get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, world, rank


def take_steps(
    model: nn.Module, step: Callable[[], Any], steps: Iterable[int], world: int = 1, rank: int = 0
) -> list[Tensor]:
    """The whole weights after the steps, each on this rank's share of a fixed batch."""
    dtype = next(model.parameters()).dtype
    for index in steps:
        generator = torch.Generator().manual_seed(1000 + index)
        x = torch.randn(BATCH, 6, generator=generator).to(dtype).chunk(world)[rank]
        y = torch.randn(BATCH, 9, generator=generator).to(dtype).chunk(world)[rank]
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        step()
    return [whole(parameter.detach()).clone() for parameter in model.parameters()]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def spread_equals_whole(
    make: Make, how: str, *, steps: int = 20, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
) -> None:
    """Four ranks end where one process does: within 1e-10 in float64 and 1e-6 in float32 of each tensor's largest."""
    for dtype in dtypes:
        tolerance = TOLERANCE[dtype]
        alone = model_to_spread(dtype)
        expected = take_steps(alone, make(alone.parameters()).step, range(steps))
        model, world, rank = spread(how, model_to_spread(dtype))
        found = take_steps(model, make(model.parameters()).step, range(steps), world, rank)
        same(found, expected, tolerance)
