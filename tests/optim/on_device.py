"""Optimizers on a device against the CPU: models moved, states through files, a mesh of this process alone."""

import contextlib
import io

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from batchlab.testing.optimizers import small_model, trained


@contextlib.contextmanager
def mesh_on(device):
    """A mesh of this process alone in a process group of its own: NCCL on a GPU, else gloo."""
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


def started(make, device, dtype=torch.float64):
    """The small model on the device, and its optimizer."""
    model = small_model(dtype).to(device)
    return make(model.parameters()), model


def weights_after(make, device, steps=6, dtype=torch.float64):
    """The small model's weights after the contract's steps on the device."""
    return trained(*started(make, device, dtype), range(steps))


def through_file(state, where=None):
    """As it comes back from a file; where: the device that its tensors are put on, None as they were."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location=where)


def tensors_of(state):
    """All tensors of a state of dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
