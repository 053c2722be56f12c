import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from batchlab.core.errors import InputError
from batchlab.data.documents.pack import pack
from batchlab.data.documents.packed_batches import PackedBatches
from tests.spine.forked import in_ranks

PACKING = pack(np.random.default_rng(0).integers(1, 90, 300), 128)


def test_an_epoch_has_every_sequence_once_and_ranks_share_it():
    whole, halves = PackedBatches(PACKING, 4), [PackedBatches(PACKING, 4, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        batches = list(whole)
        assert len(batches) == len(whole) == len(PACKING) // 4
        seen = [index for batch in batches for index in batch]
        assert len(set(seen)) == len(seen) == 4 * len(whole)
        assert batches == [a + b for a, b in zip(*halves, strict=True)]
    assert list(whole) != batches


def test_a_run_goes_on_in_another_world():
    first = PackedBatches(PACKING, 4, seed=3)
    before = [next(iter(first)) for _ in range(5)]
    state = json.loads(json.dumps(first.state_dict()))
    parts = [PackedBatches(PACKING, 4, seed=3, rank=rank, world_size=4) for rank in range(4)]
    for part in parts:
        part.load_state_dict(state)
    rest = [[index for part in each for index in part] for each in zip(*parts, strict=True)]
    assert before + rest == list(PackedBatches(PACKING, 4, seed=3))


def _ranks():
    sampler = PackedBatches(PACKING, 4)
    mine = torch.tensor([index for batch in sampler for index in batch])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert len(set(torch.cat(both).tolist())) == 2 * len(mine) == 4 * len(sampler)


def test_two_ranks(tmp_path):
    assert in_ranks(2, tmp_path, _ranks) == [0, 0]


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="sequences must be a multiple of world_size 2, got 3"):
        PackedBatches(PACKING, 3, rank=0, world_size=2)
    with pytest.raises(InputError, match=f"sequences must be at most the {len(PACKING)} of the packing, got 9999"):
        PackedBatches(PACKING, 9999)
    with pytest.raises(InputError, match="state_dict must have sequences 2 as this sampler has, got 4"):
        PackedBatches(PACKING, 2).load_state_dict(PackedBatches(PACKING, 4).state_dict())
