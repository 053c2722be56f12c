"""Multigrid's batches: sizes, shapes and indices of each, over epochs, workers, ranks and restarts; and the cutting."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.data.multigrid.multigrid_batches import MultigridBatches
from batchlab.data.multigrid.resample import Resampled, resample
from batchlab.data.stream import SampleStream
from batchlab.schedule.grids.multigrid import Multigrid
from batchlab.schedule.grids.multigrid_cycles import GridShape
from tests.spine.forked import in_ranks


def schedule(batch=2, **more):
    return Multigrid((8, 16, 16), batch, [0, 8], 10, **more)


@settings(max_examples=25)
@given(n=st.integers(40, 300), seed=st.integers(0, 2**31), drop_last=st.booleans())
def test_every_index_once_in_the_cycle_of_batches(n, seed, drop_last):
    multigrid = schedule()
    batches = MultigridBatches(n, multigrid, seed, drop_last=drop_last)
    for epoch in (0, 7, 11, 14, multigrid.length + 2):
        batches.set_epoch(epoch)
        cycle, length = multigrid.cycle(epoch), len(batches)
        found = list(batches)
        assert len(found) == length
        for place, batch in enumerate(found):
            shape, size = cycle[place % 3]
            assert {each for _, each in batch} == {shape} and shape.cycle == place % 3
            assert len(batch) == size or (place == length - 1 and not drop_last and len(batch) < size)
        indices = [index for batch in found for index, _ in batch]
        assert indices == SampleStream(n, seed).indices(epoch * n, len(indices)).tolist()
        missing = n - len(indices)
        assert 0 <= missing < cycle[length % 3][1] if drop_last else missing == 0


def test_the_long_cycle_moves_through_its_shapes():
    multigrid = schedule()
    batches = MultigridBatches(100, multigrid)
    base = [batch[0][1].sizes for _ in range(multigrid.length) for batch in list(batches)[2::3]]
    assert list(dict.fromkeys(base)) == [(2, 11, 11), (4, 11, 11), (4, 16, 16), (8, 16, 16)]


@pytest.mark.parametrize("stop", [0, 3, 7, 20])
@pytest.mark.parametrize("drop_last", [True, False])
def test_it_resumes_anywhere_and_on_other_ranks(stop, drop_last):
    whole = MultigridBatches(90, schedule(), 3, drop_last=drop_last)
    run = [batch for _ in range(6) for batch in whole]
    first = MultigridBatches(90, schedule(), 3, drop_last=drop_last)
    state = json.loads(json.dumps(first.state_dict(batches=stop)))
    ranks = [MultigridBatches(90, schedule(), 3, drop_last=drop_last, rank=rank, world_size=2) for rank in range(2)]
    found = []
    for sampler in ranks:
        sampler.load_state_dict(state)
        mine = []
        while len(mine) < len(run) - stop:
            mine += list(sampler)
        found.append(mine[: len(run) - stop])
    together = [[*a, *b] for a, b in zip(*found, strict=True)]
    assert together == run[stop:]
    sizes = [(len(a), len(b)) for a, b in zip(*found, strict=True)]
    assert all(a == b or not drop_last for a, b in sizes)
    with pytest.raises(InputError, match="^state_dict must have multigrid"):
        MultigridBatches(90, schedule(gamma=0.2), 3, drop_last=drop_last).load_state_dict(state)


def test_a_batch_far_off_is_got_at_once():
    batches = MultigridBatches(10**8, schedule(batch=64))
    assert next(batches.plan(9, 10**5))[0][1].cycle == 10**5 % 3


def test_shapes_travel_through_workers_that_stay():
    clips = torch.randn(64, 3, 8, 16, 16)
    data = Resampled(TensorDataset(clips, torch.arange(64)), (8, 16, 16))
    batches = MultigridBatches(64, schedule())
    loader = DataLoader(data, batch_sampler=batches, num_workers=2, persistent_workers=True)
    multigrid, seen = batches.multigrid, []
    for epoch in range(multigrid.length):
        assert len(loader) == batches.epoch_length(epoch)
        for place, (x, y) in enumerate(loader):
            shape, size = multigrid.cycle(epoch)[place % 3]
            assert x.shape == (size, 3, *shape.sizes) and len(y) == size
            seen.append(y)
    alone = MultigridBatches(64, schedule())
    expected = [torch.tensor([index for index, _ in batch]) for _ in range(multigrid.length) for batch in alone]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def _ranks_agree():
    import torch.distributed as dist

    batches = MultigridBatches(100, schedule(batch=4), 5)
    assert (batches.rank, batches.world_size) == (dist.get_rank(), 2)
    for _ in range(batches.multigrid.length):
        for batch in batches:
            shapes = {shape for _, shape in batch}
            assert len(shapes) == 1
            mine = torch.tensor([len(batch), batches.taken, shapes.pop().cycle, *next(iter(batch))[1].sizes])
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert torch.equal(*both)
            indices = torch.tensor([index for index, _ in batch])
            all_indices = [torch.empty_like(indices) for _ in range(2)]
            dist.all_gather(all_indices, indices)
            assert len(torch.cat(all_indices).unique()) == 2 * len(batch)


def test_two_ranks_have_the_same_shape_and_size_at_every_step(tmp_path):
    assert in_ranks(2, tmp_path, _ranks_agree) == [0, 0]


def test_bad_input():
    with pytest.raises(InputError, match=r"^n must be at least the largest batch, 32 of shape \(2, 11, 11\), got 31$"):
        MultigridBatches(31, schedule())
    with pytest.raises(InputError, match="^batch must be a multiple of world_size 4, got 2$"):
        MultigridBatches(100, schedule(), rank=0, world_size=4)
    with pytest.raises(InputError, match="^n=65 leaves 1 examples for the last batch of 2 ranks: take drop_last=True$"):
        MultigridBatches(65, schedule(), rank=0, world_size=2, drop_last=False)
    with pytest.raises(InputError, match="^n must be an integer of at least 1, got 0$"):
        MultigridBatches(0, schedule())


def test_the_whole_extent_is_kept():
    """A ramp stays a ramp from end to end, whatever the crop; frames reach the default clip's span at most."""
    ramp = torch.linspace(0, 1, 32).expand(1, 32, 32)
    small = resample(ramp, (8, 8), (32, 32))
    assert small.shape == (1, 8, 8) and small[0, 0, 0] < 0.1 and small[0, 0, -1] > 0.9
    frames = torch.arange(64.0).view(1, 64, 1, 1).expand(1, 64, 4, 4)
    strides, reach = set(), set()
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        at = resample(frames, (4, 4, 4), (16, 4, 4), stride=2, generator=generator)[0, :, 0, 0]
        strides |= set(at.diff().int().tolist())
        reach |= {int(at[0]), int(at[-1])}
        assert len(at.diff().unique()) == 1
    assert strides == set(range(2, 9)) and min(reach) == 0 and max(reach) == 63


def test_pixels_are_scaled_between_the_bounds_and_cropped_anywhere():
    x = torch.zeros(1, 40, 60)
    x[0, 20:] = 1
    shares = []
    for seed in range(200):
        crop = resample(x, (16, 16), (32, 32), scales=(36, 40), generator=torch.Generator().manual_seed(seed))
        assert crop.shape == (1, 16, 16)
        shares.append(float(crop.mean()))
    assert min(shares) == 0 and max(shares) == 1  # a crop of 16 from a short side of 18 to 40
    same = [resample(x, (16, 16), (32, 32), scales=(36, 40), generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*same)


def test_a_default_device_elsewhere_changes_nothing():
    x, given = torch.randn(3, 20, 24, 24), {"scales": (18, 22), "stride": 2}
    torch.manual_seed(0)
    expected = resample(x, (4, 8, 8), (8, 16, 16), **given)
    for generator in (None, torch.Generator().manual_seed(0)):
        torch.manual_seed(0)
        with torch.device("meta"):
            assert torch.equal(resample(x, (4, 8, 8), (8, 16, 16), generator=generator, **given), expected)


def test_examples_without_a_shape_have_the_default_sizes():
    data = Resampled([(torch.randn(3, 8, 20, 20), "a")], (8, 16, 16))
    assert len(data) == 1 and data[0][0].shape == (3, 8, 16, 16) and data[0][1] == "a"
    assert data[0, GridShape((2, 8, 8), 0)][0].shape == (3, 2, 8, 8)


def test_what_cannot_be_cut():
    with pytest.raises(InputError, match="^x must have 15 frames at stride 2, got 8$"):
        resample(torch.zeros(3, 8, 4, 4), (8, 4, 4), (8, 4, 4), stride=2)
    with pytest.raises(InputError, match="^scales must not be below the crop 32 x 32, got 24 of"):
        resample(torch.zeros(3, 40, 40), (32, 32), (32, 32), scales=(24, 24))
    with pytest.raises(InputError, match="^x must have channels and one axis for each of 2 or 3 sizes"):
        resample(torch.zeros(40, 40), (32, 32), (32, 32))
    with pytest.raises(InputError, match="^default must be an integer of at least 8, got 4$"):
        resample(torch.zeros(3, 8, 4, 4), (8, 4, 4), (4, 4, 4))


def test_a_schedule_of_numpys_numbers_is_saved_as_pythons():
    given = Multigrid(
        np.array([8, 16, 16]),
        np.int64(2),
        np.array([0, 4]),
        np.int64(6),
        epoch_factor=np.float32(1.5),
        gamma=np.float64(0.1),
    )
    plain = Multigrid((8, 16, 16), 2, [0, 4], 6)
    ours, theirs = MultigridBatches(100, given), MultigridBatches(100, plain)
    ours.load_state_dict(json.loads(json.dumps(theirs.state_dict())))
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    with pytest.raises(InputError, match="^multigrid must be a Multigrid, got str$"):
        MultigridBatches(100, "x")
