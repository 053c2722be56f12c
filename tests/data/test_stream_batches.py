import json
from itertools import chain

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.stream import SampleStream
from batchlab.data.stream_batches import StreamBatches
from batchlab.testing.samplers import following
from tests.spine.forked import in_ranks

CHANGES = st.lists(st.tuples(st.integers(0, 9), st.integers(4, 60)), max_size=6)  # batches taken, then a size


def run(batches, changes, more=8):
    """All batches under the changes of size, and then some more."""
    found = []
    for count, size in changes:
        found += following(batches, count)
        batches.batch_size = size
    return found + following(batches, more)


@given(n=st.integers(1, 500), size=st.integers(1, 60), changes=CHANGES, endless=st.booleans())
def test_the_stream_is_the_same_whatever_the_sizes(n, size, changes, endless):
    found = run(StreamBatches(n, size, seed=7, endless=endless), changes)
    flat = [index for batch in found for index in batch]
    assert flat == SampleStream(n, 7).indices(0, len(flat)).tolist()


@given(n=st.integers(4, 500), size=st.integers(4, 60), changes=CHANGES, end=st.sampled_from(["drop", "endless"]))
def test_ranks_put_together_are_the_global_batch(n, size, changes, end):
    options = {"drop_last": end == "drop", "endless": end == "endless"}
    changes = [(count, min(each, n)) for count, each in changes]
    whole = run(StreamBatches(n, min(size, n), **options), changes)
    ranks = [run(StreamBatches(n, min(size, n), rank=r, world_size=3, **options), changes) for r in range(3)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert batch == [index for share in shares for index in share]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def naive(n, sizes, *, drop_last):
    """(position, count) of each batch, one at a time. sizes: of each batch."""
    at, result = 0, []
    for size in sizes:
        rest = n - at % n
        if drop_last and rest < size:
            at, rest = at + rest, n
        count = min(size, rest)
        result.append((at, count))
        at += count
    return result


@given(n=st.integers(60, 300), size=st.integers(1, 60), changes=CHANGES, drop_last=st.booleans())
def test_positions_lengths_and_epochs_against_a_walk(n, size, changes, drop_last):
    batches, sizes = StreamBatches(n, size, drop_last=drop_last), []
    for count, new in changes:
        sizes += [batches.batch_size] * count
        following(batches, count)
        batches.batch_size = new
    sizes += [batches.batch_size] * 40
    walked = naive(n, sizes, drop_last=drop_last)
    first = batches.locate(batches.taken)[0] - 1  # earlier epochs may be forgotten
    for index, (at, _) in enumerate(walked):
        epoch = at // n
        if epoch >= max(first, 0):
            assert batches.position(index) % n == at % n and batches.locate(index)[0] == epoch
            assert batches.start_of(epoch) == next(k for k, (p, _) in enumerate(walked) if p // n == epoch)


@given(n=st.integers(60, 300), size=st.integers(3, 60), changes=CHANGES, stop=st.integers(0, 30), drop=st.booleans())
def test_it_resumes_at_any_batch_under_changes_of_size(n, size, changes, stop, drop):
    changes = [(count, max(each, 3)) for count, each in changes]
    options = {"drop_last": True} if drop else {"endless": True}
    batches = StreamBatches(n, size, **options)
    run(batches, changes, stop)
    state = json.loads(json.dumps(batches.state_dict()))
    resumed = [StreamBatches(n, 5, rank=rank, world_size=3, **options) for rank in range(3)]
    for each in resumed:
        each.load_state_dict(state)
        assert each.state_dict() == state
    shares = [following(each, 12) for each in resumed]
    assert [list(chain(*parts)) for parts in zip(*shares)] == following(batches, 12)


def test_a_size_that_a_prefetching_loader_has_already_seen_stays_set_for_its_batch():
    whole = StreamBatches(1000, 10)
    following(whole, 8)
    whole.batch_size = 20  # training is at the fifth batch
    resumed = StreamBatches(1000, 10)
    resumed.load_state_dict(whole.state_dict(batches=5))
    assert [len(batch) for batch in following(resumed, 5)] == [10, 10, 10, 20, 20]
    resumed.load_state_dict(whole.state_dict(batches=5))
    resumed.batch_size = 30  # a size of now replaces what was set for later
    assert [len(batch) for batch in following(resumed, 5)] == [30] * 5


def test_a_size_for_each_batch_does_not_make_the_state_grow():
    batches = StreamBatches(500, 10)
    for batch in range(1500):
        batches.batch_size = 10 + batch % 2
        following(batches, 1)
    assert len(batches.state_dict()["cuts"]) < 110 > len(batches._cuts)  # two epochs of at most 50, and the next
    with pytest.raises(InputError, match="what came before is forgotten"):
        batches.state_dict(batches=3)


def test_an_epoch_whose_start_is_forgotten_is_refused():
    """Sizes are kept of two epochs: an earlier one began at a batch that cannot be told any more."""
    batches = StreamBatches(10, 4)
    for size in (5, 2, 4):
        following(batches, 6 * len(batches))
        batches.batch_size = size
    before = batches.state_dict()
    assert batches.epoch == 18 and batches._cuts[0].position == 120
    for epoch in (0, 2, 11):
        with pytest.raises(InputError, match=f"epoch must be at least 12, what came before is forgotten: {epoch}"):
            batches.set_epoch(epoch)
        assert batches.state_dict() == before
    for epoch in (17, 12, 18):
        batches.set_epoch(epoch)
        assert batches.epoch == epoch and sum(map(len, batches)) == 10
    behind = StreamBatches(10, 4)  # a loader's workers are more than an epoch ahead of training
    for size in (5, 2, 4, 3):
        following(behind, 2)
        behind.batch_size = size
    with pytest.raises(InputError, match="is forgotten"):
        behind.state_dict(batches=1)


def test_far_positions_are_exact_integers():
    batches = StreamBatches(10**13, 1024, rank=1, world_size=2)
    batches.load_state_dict(batches.state_dict(batches=10**15 + 1))
    at = batches.position() + 512
    assert at == (10**15 + 1) * 1024 + 512
    assert next(iter(batches)) == SampleStream(10**13, 0).indices(at, 512).tolist()


def _resumed_in_three(folder):
    batches = StreamBatches(101, 10, seed=2, endless=True)
    batches.load_state_dict(json.loads((folder / "state.json").read_text()))
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(following(batches, 15)))


def test_real_ranks_go_on_from_one_process(tmp_path):
    one = StreamBatches(101, 10, seed=2, endless=True)
    following(one, 7)
    one.batch_size = 13
    (tmp_path / "state.json").write_text(json.dumps(one.state_dict()))
    assert in_ranks(3, tmp_path, _resumed_in_three, tmp_path) == [0, 0, 0]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks)] == following(one, 15)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
        ({"batch_size": 3, "world_size": 4}, "batch_size must be an integer of at least 4, got 3"),
        ({"batch_size": 101, "drop_last": True}, "batch_size must be at most n=100 with drop_last, got 101"),
        ({"drop_last": True, "endless": True}, "drop_last and endless cannot both be True"),
        ({"batch_size": 33, "world_size": 2}, "batch_size 33 leaves 1 of n=100 examples for the last batch of 2 ranks"),
    ],
)
def test_bad_input_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        StreamBatches(**({"n": 100, "batch_size": 10} | given))


def test_a_refused_size_or_state_changes_nothing():
    batches = StreamBatches(100, 10, world_size=2)
    following(batches, 3)
    before = batches.state_dict()
    with pytest.raises(InputError, match="leaves 1 of n=100"):
        batches.batch_size = 23  # 70 are left in this epoch: 1 beyond 69
    for cuts in ({name: value for name, value in before.items() if name != "cuts"}, before | {"cuts": []}):
        with pytest.raises(InputError, match="as 'cuts'"):
            batches.load_state_dict(cuts)
    with pytest.raises(InputError, match="batches must be at least 7, what came before is forgotten: 3"):
        batches.load_state_dict(before | {"cuts": [[7, 70, 10]]})
    with pytest.raises(InputError, match="must have n 100 as this sampler has, got 99"):
        batches.load_state_dict(before | {"n": 99})
    small = StreamBatches(100, 10, world_size=1)
    small.batch_size = 1
    with pytest.raises(InputError, match="batch_size must be an integer of at least 2, got 1"):
        batches.load_state_dict(small.state_dict())
    assert batches.state_dict() == before and batches.epoch == 0
    assert np.array_equal(following(batches, 1)[0], SampleStream(100, 0).indices(30, 5))


def test_length_is_that_of_the_epoch_under_the_sizes_so_far():
    batches = StreamBatches(100, 10)
    following(batches, 3)
    assert len(batches) == 10
    batches.batch_size = 20
    assert len(batches) == 3 + 4 == 3 + len(following(batches))
    assert len(batches) == 5
    with pytest.raises(TypeError, match="has no length"):
        len(StreamBatches(100, 10, endless=True))
    with pytest.raises(InputError, match="epoch must be 0"):
        StreamBatches(100, 10, endless=True).set_epoch(1)


def test_a_size_set_anew_after_a_resume_drops_what_was_set_for_later():
    """A state taken while a loader was ahead knows of sizes to come: setting the present one takes them back."""
    ahead = StreamBatches(100, 4, endless=True)
    batches = iter(ahead)
    for _ in range(3):
        next(batches)
    ahead.batch_size = 8
    resumed = StreamBatches(100, 4, endless=True)
    resumed.load_state_dict(ahead.state_dict(1))
    resumed.batch_size = 4
    assert [len(batch) for batch, _ in zip(resumed, range(4))] == [4, 4, 4, 4]
    kept = StreamBatches(100, 4, endless=True)
    kept.load_state_dict(ahead.state_dict(1))
    assert [len(batch) for batch, _ in zip(kept, range(4))] == [4, 4, 8, 8]


def test_an_epoch_that_was_cut_for_fewer_ranks_is_not_gone_back_to():
    one = StreamBatches(13, 1, drop_last=True, rank=0, world_size=1)
    list(one)
    one.batch_size = 4
    next(iter(one))
    for rank in range(4):
        batches = StreamBatches(13, 4, drop_last=True, rank=rank, world_size=4)
        batches.load_state_dict(one.state_dict())
        assert all(len(batch) == 1 for batch in batches)
        batches.set_epoch(0)
        with pytest.raises(
            InputError, match="^epoch 0 was cut for fewer ranks, and a batch of it has 1 examples for 4"
        ):
            next(iter(batches))
