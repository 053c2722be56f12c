"""What each rank is thought to hold is what DTensor gives it, in every way of spreading; parts come back in place."""

from itertools import product

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.parallel.owners import Whole, at_owners, pieces_of
from batchlab.parallel.shards import whole
from batchlab.parallel.sums import Layout, layout_of
from tests.spine.forked import in_ranks


def test_uneven_shards_are_torchs_chunks():
    layout = Layout(None, (0, None, 1), (1, 1, 1))
    places = list(product(range(4), range(2), range(2)))
    full = torch.arange(9 * 5).view(9, 5)
    rows = [*full.chunk(4), full[:0]][:4]
    for place, (of_rows, of_columns) in zip(places, pieces_of((9, 5), (4, 2, 2), layout), strict=True):
        part = (rows[place[0]] if place[0] < len(rows) else full[:0]).chunk(2, 1)[place[2]]
        assert (sum(n for _, n in of_rows), sum(n for _, n in of_columns)) == tuple(part.shape)
        if part.numel():
            assert full[of_rows[0][0], of_columns[0][0]] == part[0, 0]


def test_blocks_are_cut_one_by_one():
    """FSDP2 over tensor parallelism: rows 0 to 7 in two blocks for the second dimension, each cut by the first."""
    found = pieces_of((8,), (2, 2), Layout(None, (0, 0), (2, 1)))
    assert found == ((((0, 2),),), (((4, 2),),), (((2, 2),),), (((6, 2),),))


def _ways():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    line = init_device_mesh("cpu", (4,))
    generator = torch.Generator().manual_seed(0)
    for shape in ((9, 5), (3, 7), (2, 5, 3), (8, 8)):
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        ways = [(mesh, each) for each in product((Shard(0), Shard(1), Replicate()), repeat=2) if each[0] != each[1]]
        ways += [(mesh, (Replicate(), Replicate())), (line, (Shard(0),)), (line, (Shard(1),))]
        for over, placements in ways:
            spread = distribute_tensor(tensor, over, placements)
            calls = []

            def of(wholes, calls=calls, tensor=tensor):
                calls.append(len(wholes))
                assert all(torch.equal(each, tensor) for each in wholes)
                return [2 * each + 1 for each in wholes], torch.full((len(wholes), 1), 7.0)

            request = Whole([spread.to_local()] * 3, spread.shape, of, notes=1)
            ((found, notes),) = at_owners([request], [layout_of(spread)])
            assert all(torch.equal(each, 2 * spread.to_local() + 1) for each in found)
            assert notes.tolist() == [[7.0]] * 3
            count = torch.tensor(sum(calls))
            torch.distributed.all_reduce(count)
            assert count == 3, f"{count} results of 3 tensors"
            assert torch.equal(whole(spread), tensor)


def test_every_way_of_spreading_gathers_once_and_hands_back(tmp_path):
    assert in_ranks(4, tmp_path, _ways) == [0] * 4


def _unknown():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    request = Whole([torch.zeros(3, 2)], torch.Size((4, 2)), lambda wholes: (wholes, torch.empty(1, 0)))
    with pytest.raises(InputError, match=r"this rank should hold \(2, 2\), it holds \(3, 2\)"):
        at_owners([request], [Layout(mesh, (0,), (1,))])
    torch.distributed.barrier()


def test_an_unknown_way_is_refused(tmp_path):
    assert in_ranks(2, tmp_path, _unknown) == [0] * 2
