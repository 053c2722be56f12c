"""What ranks tell one another over NCCL: a process group of one rank, as one GPU has it, and a mesh of it."""

import socket

import pytest
import torch
import torch.distributed as dist

from batchlab.optim.rule import Sum
from batchlab.parallel.agree import agree_min, device_of, from_first_rank
from batchlab.parallel.margins import margin_like
from batchlab.parallel.owners import Whole, at_owners
from batchlab.parallel.shards import over_meshes, part_like, share, whole
from batchlab.parallel.sums import layout_of, sums_over
from batchlab.parallel.torchrun import agree_max, is_main, process_group
from tests.optim.on_device import mesh_on

pytestmark = pytest.mark.gpu


def drawn(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def test_values_that_ranks_agree_on(accelerator):
    with mesh_on(accelerator):
        assert device_of().type == device_of(dist.group.WORLD).type == accelerator.type
        assert agree_min([3.5, -1e300]) == [3.5, -1e300]
        assert agree_max(2**40) == 2**40 and is_main()
        assert from_first_rank({"size": 8}) == {"size": 8}


def test_torchruns_group(accelerator, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**given, "TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    with process_group() as joined:
        assert joined and dist.get_backend() == ("nccl" if accelerator.type == "cuda" else "gloo")
        assert agree_max(7) == 7
    assert not dist.is_initialized()


def test_parts_sums_and_wholes_of_spread_tensors(accelerator):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with mesh_on(accelerator) as mesh:
        plain = drawn(6, 4, device=accelerator)
        for placement in (Shard(0), Shard(1), Replicate()):
            spread = distribute_tensor(plain.clone(), mesh, [placement])
            part, held_by, holders = share(spread)
            assert held_by is not None and holders == 1 and part.device.type == accelerator.type
            assert torch.equal(part, plain) and torch.equal(whole(spread), plain)
            assert torch.equal(part_like(spread, plain), plain)
            (found,) = sums_over([Sum(part.square().sum())], [layout_of(spread)])
            assert found.item() == plain.square().sum().item()
            assert over_meshes({held_by: [1.5, 2.0], None: [0.5, 0.25]}) == [2.0, 2.25]
            for dim, length in ((-1, 6), (-2, 4)):
                margin = margin_like(spread, dim)
                assert margin.shape == (length,) and share(margin).part.device.type == accelerator.type
            request = Whole(
                [part], plain.shape, lambda tensors: ([2 * each for each in tensors], plain[:1, :1]), notes=1
            )
            (((doubled,), notes),) = at_owners([request], [layout_of(spread)])
            assert torch.equal(doubled, 2 * plain) and torch.equal(notes, plain[:1, :1])
