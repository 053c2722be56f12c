"""Ranks that decide alike: one number or one value, the same everywhere, as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from batchlab.core.jsonio import dumps, loads


def device_of(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where a group's collectives take their tensors."""
    return torch.device("cuda" if dist.get_backend(group) in ("nccl", "cuda:nccl") else "cpu")


def agree_min(values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """The least of the ranks' values, place by place, in one all-reduce; the values themselves outside a group."""
    if group is None and not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device_of(group))
    dist.all_reduce(tensor, dist.ReduceOp.MIN, group=group)
    return list(tensor.tolist())


def from_first_rank(value: Any) -> Any:
    """What the first rank has, on every rank, as plain JSON makes it; nothing is pickled.

    >>> from_first_rank({"size": 8, "seconds": (0.5, 1.0)})
    {'size': 8, 'seconds': [0.5, 1.0]}
    """
    text = dumps(value).encode()
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = device_of()
        length = torch.tensor(len(text), device=device)
        dist.broadcast(length, 0)
        held = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if dist.get_rank() == 0:
            held.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(held, 0)
        text = bytes(held.cpu().tolist())
    return loads(text)
