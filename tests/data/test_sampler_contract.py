"""Every batch sampler of the room against the contract: a new one joins by one line."""

from itertools import islice

import pytest
from torch.utils.data import DataLoader

from batchlab.data.lengths.bucket_batches import BucketBatchSampler
from batchlab.data.lengths.length_buckets import LengthBuckets
from batchlab.data.stream_batches import StreamBatches
from batchlab.testing import samplers
from batchlab.testing.samplers import Subject
from tests.spine.forked import in_ranks


def in_buckets(n, **given):
    lengths = [3 + at * 7 % 31 for at in range(n)]
    return BucketBatchSampler(lengths, LengthBuckets([10, 20, 33]), [7, 5, 3], **given)


SUBJECTS = {
    "buckets": Subject(in_buckets, huge=None),
    "buckets, drop_last": Subject(lambda n, **given: in_buckets(n, drop_last=True, **given), "most", huge=None),
    "stream": Subject(lambda n, **given: StreamBatches(n, 16, **given)),
    "stream, ragged": Subject(lambda n, **given: StreamBatches(n, 17, **given), n=241),
    "stream, drop_last": Subject(lambda n, **given: StreamBatches(n, 17, drop_last=True, **given), visits="most"),
    "stream, endless": Subject(lambda n, **given: StreamBatches(n, 17, endless=True, **given)),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("check", samplers.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_contract(name, check):
    check(SUBJECTS[name])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_what_workers_fetched_ahead_is_given_back():
    whole = samplers.following(StreamBatches(240, 16))
    sampler = StreamBatches(240, 16)
    loader = DataLoader(samplers.Numbers(240), batch_sampler=sampler, collate_fn=list, num_workers=2)
    trained = list(islice(loader, 3))
    assert trained == whole[:3] and sampler.taken > 3
    sampler.load_state_dict(sampler.state_dict(batches=3))
    assert trained + list(loader) == whole


class AllToAll(StreamBatches):
    """Every rank gets the whole batch."""

    def plan(self, epoch, first):
        rank, world = self.rank, self.world_size
        self.rank, self.world_size = 0, 1
        yield from super().plan(epoch, first)
        self.rank, self.world_size = rank, world


class Forgetful(StreamBatches):
    """The state says how far, but not at which size."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(dict(state_dict, batches=0))


class Drawing(StreamBatches):
    """Comes to a batch by drawing all before it."""

    def plan(self, epoch, first):
        self._stream.indices(0, min(self.position(self.start_of(epoch) + first), 20_000))
        yield from super().plan(epoch, first)


class OneShuffle(StreamBatches):
    """The second epoch is the first."""

    def plan(self, epoch, first):
        yield from super().plan(0, first)


class Tensors(StreamBatches):
    """Indices are no plain integers."""

    def plan(self, epoch, first):
        for batch in super().plan(epoch, first):
            yield list(batch)


class Careless(StreamBatches):
    """Loads whatever it is given."""

    def identity(self):
        return {}


class Seedless(StreamBatches):
    """Goes by one seed always."""

    def __init__(self, n, batch_size, seed=0, **given):
        super().__init__(n, batch_size, 0 * seed, **given)


class Losing(StreamBatches):
    """A new loop begins one batch late."""

    def __iter__(self):
        self._taken += self._taken % 15 > 0
        yield from super().__iter__()


BROKEN = {
    AllToAll: samplers.epochs_are_whole,
    Forgetful: samplers.state_goes_round,
    Drawing: samplers.resuming_is_no_work,
    OneShuffle: samplers.seeds_and_epochs_differ,
    Tensors: samplers.epochs_are_whole,
    Careless: samplers.refusals,
    Seedless: samplers.seeds_and_epochs_differ,
    Losing: samplers.leaving_is_no_loss,
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_what_breaks_the_contract_is_found(kind):
    with pytest.raises(AssertionError):
        BROKEN[kind](Subject(lambda n, **given: kind(n, 16, **given)))


def _each_share():
    for subject in SUBJECTS.values():
        samplers.ranks_share(subject)


def test_ranks_of_a_process_group_share_each_epoch(tmp_path):
    assert in_ranks(2, tmp_path, _each_share) == [0, 0]
