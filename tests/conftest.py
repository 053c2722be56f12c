"""Shared by all tests: no deadlines for hypothesis, one thread, global generators as they were; a mesh, a device."""

import os

import hypothesis
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels then run without a GPU

hypothesis.settings.register_profile("batchlab", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("batchlab")


@pytest.fixture(autouse=True)
def _quiet_torch():
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def accelerator():
    """The device of tests marked `gpu`: BATCHLAB_TEST_DEVICE, else cuda. With "cpu" they try themselves without one."""
    device = torch.device(os.environ.get("BATCHLAB_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def mesh_of_one():
    """A device mesh of this process alone, in a process group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
