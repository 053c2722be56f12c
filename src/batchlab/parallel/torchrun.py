"""Joining the process group that torchrun prepared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from batchlab.parallel.agree import device_of


@contextlib.contextmanager
def process_group(timeout_seconds: float = 600.0, *, device: str | None = None) -> Iterator[bool]:
    """Inside, the default process group is the one torchrun's environment names; without such, nothing happens.

    NCCL where there is a GPU for each local rank and `device`, where one is named, is a GPU; else gloo, for NCCL takes
    no tensors of the CPU. timeout_seconds: after it, a collective that a rank
    does not join fails in place of hanging. Yields whether a group was joined. A group that stands already is kept.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield False
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = on_gpu and (device is None or device.startswith("cuda"))
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield True
    finally:
        dist.destroy_process_group()


def agree_max(value: int) -> int:
    """The largest of the ranks' values; `value` itself outside a process group."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, device=device_of())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def is_main() -> bool:
    """Whether this process speaks and writes for all ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0
