import json
from itertools import chain

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.data.lengths.bucket_batches import BucketBatchSampler, batches_of, sizes_for_budget
from batchlab.data.lengths.length_buckets import LengthBuckets, padding_share
from batchlab.data.stream import SampleStream
from batchlab.measure.memory.buckets import MicroBatchTable
from batchlab.measure.memory.micro_batch import MicroBatch
from batchlab.testing.samplers import following
from tests.spine.forked import in_ranks

# BGE M3-Embedding, table 9: ranges up to, and sizes on each GPU; totals of 96 and 24 GPUs
RANGES = [500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192]
UNSUPERVISED = [700, 570, 388, 288, 224, 180, 157, 128, 104], 96
UNSUPERVISED_TOTAL = [67200, 54720, 37248, 27648, 21504, 17280, 15072, 12288, 9984]
FINE_TUNING = [48, 32, 20, 18, 14, 14, 12, 10, 8], 24
FINE_TUNING_TOTAL = [1152, 768, 480, 432, 336, 336, 288, 240, 192]


def lengths_of(n, seed=0):
    return np.minimum(np.random.default_rng(seed).lognormal(3, 0.8, n).astype(np.int64) + 1, 400)


def pairs_of(n, seed=0):
    """Log-normal inputs and outputs with a correlation of 0.5 between their logarithms."""
    z = np.random.default_rng(seed).standard_normal((n, 2))
    inputs = np.exp(4 + 0.8 * z[:, 0])
    outputs = np.exp(3 + 0.7 * (0.5 * z[:, 0] + 0.75**0.5 * z[:, 1]))
    return np.stack([np.ceil(inputs), np.ceil(outputs)], 1)


def test_no_batch_mixes_buckets_and_each_has_its_size():
    lengths = lengths_of(5000)
    buckets = LengthBuckets.fitted(lengths, 8)
    sizes = [40, 35, 30, 25, 20, 15, 10, 5]
    chosen = buckets.choose(lengths)
    batches = list(BucketBatchSampler(lengths, buckets, sizes))
    assert sorted(chain(*batches)) == list(range(5000))
    kinds = [set(chosen[batch].tolist()) for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    for bucket, size in enumerate(sizes):
        found = [len(batch) for batch, kind in zip(batches, kinds) if kind == {bucket}]
        count = int((chosen == bucket).sum())
        assert sorted(found, reverse=True) == [size] * (count // size) + [count % size] * (count % size > 0)


def test_buckets_come_in_mixed_order_and_examples_are_shuffled():
    lengths = lengths_of(20_000)
    buckets = LengthBuckets.fitted(lengths, 8)
    sampler = BucketBatchSampler(lengths, buckets, [20] * 8)
    chosen = buckets.choose(lengths)
    first, second = list(sampler), list(sampler)
    kinds = [[int(chosen[batch[0]]) for batch in epoch] for epoch in (first, second)]
    assert sorted(kinds[0]) == sorted(kinds[1]) and kinds[0] != kinds[1]
    half = np.bincount(kinds[0][: len(first) // 2], minlength=8) / np.bincount(kinds[0], minlength=8)
    counts = np.bincount(kinds[0], minlength=8)
    assert (np.abs(half - 0.5) < 4 * 0.5 / np.sqrt(counts)).all()  # as many early as late
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 7), min_size=5, max_size=5),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
)
def test_what_an_epoch_visits_is_what_the_report_says(counts, sizes, world, drop_last):
    lengths = np.repeat(np.arange(1, len(counts) + 1), counts)
    sizes, buckets = sizes[: len(counts)], LengthBuckets(range(1, len(counts) + 1))
    if not len(lengths) or not batches_of(counts, sizes, world, drop_last=drop_last).sum():
        with pytest.raises(InputError, match="lengths must"):
            BucketBatchSampler(lengths, buckets, sizes, drop_last=drop_last, world_size=world)
        return
    given = {"drop_last": drop_last, "world_size": world}
    ranks = [BucketBatchSampler(lengths, buckets, sizes, rank=rank, **given) for rank in range(world)]
    report = ranks[0].report()
    epoch = [list(rank) for rank in ranks]
    assert {len(batches) for batches in epoch} == {len(ranks[0])} == {report["batches"]}
    for step in zip(*epoch):
        length = lengths[step[0][0]]
        assert all(batch and (lengths[batch] == length).all() for batch in step)
        assert max(map(len, step)) - min(map(len, step)) <= 1
        assert max(map(len, step)) <= sizes[length - 1]
        assert not drop_last or {len(batch) for batch in step} == {sizes[length - 1]}
    seen = list(chain(*chain(*epoch)))
    assert len(set(seen)) == len(seen) == len(lengths) - report["left_out"]
    visited = np.bincount(lengths[seen], minlength=len(counts) + 1)[1:]
    for bucket, (count, size) in enumerate(zip(counts, sizes)):
        left = count - visited[bucket]
        if drop_last:
            assert left == count % (size * world)
        else:
            assert left == 0 or (left < world and (size == 1 or count < world))


def test_world_size_changes_in_mid_epoch_twice_and_every_example_still_comes_once():
    lengths = lengths_of(3000)
    buckets = LengthBuckets.fitted(lengths, 6)
    seen, state = [], None
    for world, steps in ((2, 20), (3, 15), (1, None)):
        ranks = [
            BucketBatchSampler(lengths, buckets, [9, 8, 7, 6, 5, 4], rank=r, world_size=world) for r in range(world)
        ]
        for rank in ranks:
            if state:
                rank.load_state_dict(state)
            seen += chain(*(following(rank, steps)))
        state = json.loads(json.dumps(ranks[0].state_dict()))
    assert sorted(seen) == list(range(3000))
    assert ranks[0].epoch == 1 and sorted(chain(*ranks[0])) == list(range(3000))
    with pytest.raises(InputError, match="batches must be at least 35, where the world size changed, got 3"):
        ranks[0].state_dict(batches=3)
    late = BucketBatchSampler(lengths, buckets, [9, 8, 7, 6, 5, 4], world_size=3)
    late.load_state_dict(ranks[0].state_dict())
    with pytest.raises(InputError, match="epoch must be at least 2, where the world size changed, got 1"):
        late.set_epoch(1)
    late.set_epoch(3)
    assert late.epoch == 3


def test_a_state_of_the_same_world_size_is_exact_after_a_change():
    lengths = lengths_of(3000)
    buckets = LengthBuckets.fitted(lengths, 6)
    before, after, again = (BucketBatchSampler(lengths, buckets, [9] * 6, world_size=world) for world in (2, 3, 3))
    following(before, 20)
    after.load_state_dict(before.state_dict())
    following(after, 7)
    again.load_state_dict(json.loads(json.dumps(after.state_dict())))
    assert again.state_dict() == after.state_dict()
    assert following(again, 200) == following(after, 200)
    again.load_state_dict(after.state_dict(batches=23))
    assert again.taken == 23
    one = BucketBatchSampler(lengths, buckets, [9] * 6, world_size=4)
    following(one, 20)  # as many batches as of two ranks, and more of the epoch
    fresh = BucketBatchSampler(lengths, buckets, [9] * 6, world_size=3)
    for each in (again, fresh):
        each.load_state_dict(before.state_dict() if each is again else one.state_dict())
        following(each, 1)
        each.load_state_dict(one.state_dict())
    assert following(again) == following(fresh)


def test_several_data_sets_give_steps_of_one_data_set_and_range():
    lengths = lengths_of(4000)
    datasets = np.random.default_rng(1).integers(0, 3, 4000)
    buckets = LengthBuckets([10, 30, 400])
    sizes = [[30, 20, 10], [15, 10, 5], [8, 4, 2]]  # a set of symmetric pairs takes half
    ranks = [
        BucketBatchSampler(lengths, buckets, sizes, datasets=datasets, drop_last=True, rank=rank, world_size=2)
        for rank in range(2)
    ]
    chosen = buckets.choose(lengths)
    for step in zip(*ranks, strict=True):
        kinds = {(int(datasets[index]), int(chosen[index])) for batch in step for index in batch}
        assert len(kinds) == 1
        dataset, bucket = kinds.pop()
        assert [len(batch) for batch in step] == [sizes[dataset][bucket]] * 2
    rows = ranks[0].report()["buckets"]
    assert [(row["dataset"], row["size"]) for row in rows] == [(d, s) for d, each in enumerate(sizes) for s in each]
    assert all(row["left_out"] == row["examples"] % (2 * row["size"]) for row in rows)


@pytest.mark.parametrize("table, totals", [(UNSUPERVISED, UNSUPERVISED_TOTAL), (FINE_TUNING, FINE_TUNING_TOTAL)])
def test_the_published_table_of_totals_comes_from_sizes_per_gpu(table, totals):
    sizes, gpus = table
    lengths = np.repeat(RANGES, np.array(sizes) * gpus)
    sampler = BucketBatchSampler(lengths, LengthBuckets(RANGES), sizes, drop_last=True, world_size=gpus, rank=5)
    report = sampler.report()
    assert [row["size_over_ranks"] for row in report["buckets"]] == totals
    assert len(sampler) == 9 and report["left_out"] == 0
    assert sorted(len(batch) for batch in sampler) == sorted(sizes)


def test_padding_falls_with_buckets_and_two_dimensions_carry_more_at_equal_memory():
    """Log-normal input and output: padding 2-D < 1-D < none, and at least 1.15 times the examples in a step.

    A batch must fit whatever of its bucket it holds: by input alone, that is the bucket's longest output as well. The
    examples are those that two dimensions do not reject, for both.
    """
    pairs = pairs_of(40_000)
    two = LengthBuckets.fitted(pairs, 30, 2)
    pairs = pairs[two.choose(pairs) >= 0]
    pairs = pairs[: len(pairs) // 100 * 100]
    one = LengthBuckets.fitted(pairs[:, 0], 30)
    chosen = one.choose(pairs[:, 0])
    tops = np.maximum.accumulate([pairs[chosen == bucket, 1].max() for bucket in range(len(one))])
    mean, padding = {}, {}
    for name, buckets in (("1-D", LengthBuckets(list(zip(one.edges, tops.tolist())))), ("2-D", two)):
        batches = list(BucketBatchSampler(pairs, buckets, sizes_for_budget(buckets, 16_000)))
        assert sorted(chain(*batches)) == list(range(len(pairs)))
        mean[name] = len(pairs) / len(batches)
        padding[name] = padding_share(pairs, batches)
    plain = SampleStream(len(pairs), 0).indices(0, len(pairs)).reshape(-1, 100)
    assert padding["2-D"] < padding["1-D"] < padding_share(pairs, plain)
    assert mean["2-D"] >= 1.15 * mean["1-D"]


def test_padding_is_at_most_a_third_of_random_batches():
    lengths = lengths_of(40_000)
    buckets = LengthBuckets.fitted(lengths, 30)
    ours = padding_share(lengths, BucketBatchSampler(lengths, buckets, sizes_for_budget(buckets, 4000)))
    plain = SampleStream(len(lengths), 0).indices(0, len(lengths)).reshape(-1, 80)
    assert ours <= padding_share(lengths, plain) / 3


def test_a_table_of_the_finder_is_taken_as_it_is():
    found = [MicroBatch(size=1000 // edge, why="", tries=()) for edge in (10, 50, 400)]
    table = MicroBatchTable((10, 50, 400), tuple(found))
    lengths = lengths_of(4000)
    sampler = BucketBatchSampler(lengths, LengthBuckets(table.buckets), table.sizes)
    assert all(len(batch) * lengths[batch].max() <= 1000 for batch in sampler)
    fine = LengthBuckets.fitted(lengths, 40)  # finer buckets, with the size of the one that each lies in
    finer = BucketBatchSampler(lengths, fine, [table.size_for(edge) for edge in fine.edges])
    assert all(len(batch) * lengths[batch].max() <= 1000 for batch in finer)


def test_rejected_examples_are_counted_and_never_come():
    pairs = pairs_of(3000)
    buckets = LengthBuckets.fitted(pairs[:2000], 10, 2)
    sampler = BucketBatchSampler(pairs, buckets, [8] * len(buckets))
    out = np.flatnonzero(buckets.choose(pairs) == -1)
    assert len(out) and sorted(sampler.rejected.tolist()) == out.tolist()
    assert sorted(chain(*sampler)) == sorted(set(range(3000)) - set(out.tolist()))
    lenient = BucketBatchSampler(pairs, LengthBuckets(buckets.edges, strict=False), [8] * len(buckets))
    assert len(lenient.rejected) < len(out) and lenient.report()["rejected"] == len(lenient.rejected)


def test_budgets():
    assert sizes_for_budget(LengthBuckets([10, 20, 40]), 100) == [10, 5, 2]
    assert sizes_for_budget(LengthBuckets([10, 20, 40]), 100, quadratic=40) == [8, 3, 1]  # 12.5, 30 and 80 each
    assert sizes_for_budget(LengthBuckets([(10, 10), (10, 15)]), 100) == [5, 4]
    for quadratic in (None, 50.0):
        lengths = lengths_of(5000)
        buckets = LengthBuckets.fitted(lengths, 20)
        for batch in BucketBatchSampler(lengths, buckets, sizes_for_budget(buckets, 6000, quadratic)):
            longest = lengths[batch].max()
            assert len(batch) * (longest + (longest**2 / quadratic if quadratic else 0)) <= 6000


def test_mean_tokens_makes_a_sum_of_losses_a_mean_over_tokens():
    lengths = lengths_of(5000)
    sampler = BucketBatchSampler(lengths, LengthBuckets.fitted(lengths, 6), [12] * 6, world_size=1)
    batches = list(sampler)
    loss = np.random.default_rng(0).standard_normal(5000)  # of a token of the example
    steps = [(loss[batch] * lengths[batch]).sum() / sampler.mean_tokens for batch in batches]
    assert np.mean(steps) == pytest.approx((loss * lengths).sum() / lengths.sum(), rel=1e-12)
    pairs = np.stack([lengths, lengths // 2], 1)
    buckets = LengthBuckets([(15, 7), (30, 15), (400, 200)])
    dropping = BucketBatchSampler(pairs, buckets, [90, 80, 70], drop_last=True, world_size=2, rank=1)
    means = [2 * pairs[batch].sum() / len(dropping) for _ in range(40) for batch in dropping]
    assert sum(means) / 40 == pytest.approx(dropping.mean_tokens, rel=0.01)


def test_what_is_held_is_a_few_bytes_an_example():
    sampler = BucketBatchSampler(lengths_of(200_000), LengthBuckets.fitted(lengths_of(200_000), 50), [64] * 50)
    list(sampler)
    held = [value for value in vars(sampler).values() if isinstance(value, np.ndarray)]
    streams = sum(stream._cached[2].nbytes for stream in sampler._streams.values())
    assert sum(array.nbytes for array in held) + sampler._kept[1].nbytes < 4.5 * 200_000
    assert streams <= 8 * 200_000


def test_a_far_state_costs_one_order_of_batches(monkeypatch):
    drawn = []
    real = SampleStream.indices
    monkeypatch.setattr(SampleStream, "indices", lambda self, at, n: drawn.append(n) or real(self, at, n))
    lengths = lengths_of(100_000)
    sampler = BucketBatchSampler(lengths, LengthBuckets.fitted(lengths, 20), [50] * 20)
    sampler.load_state_dict(sampler.state_dict(batches=10**8 + 3))
    next(iter(sampler))
    assert sum(drawn) <= len(sampler) + 50


def _write_batches(folder):
    lengths = lengths_of(600)
    sampler = BucketBatchSampler(lengths, LengthBuckets.fitted(lengths, 5), [8, 7, 6, 5, 4])
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(list(sampler)))


def test_real_ranks_step_through_the_same_buckets(tmp_path):
    assert in_ranks(2, tmp_path, _write_batches, tmp_path) == [0, 0]
    lengths = lengths_of(600)
    chosen = LengthBuckets.fitted(lengths, 5).choose(lengths)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    first, second = ([set(chosen[batch].tolist()) for batch in rank] for rank in ranks)
    assert first == second and all(len(kinds) == 1 for kinds in first)
    assert sorted(chain(*chain(*ranks))) == list(range(600))


@pytest.mark.parametrize(
    "given, says",
    [
        ({"buckets": [2, 4]}, r"buckets must be LengthBuckets, as LengthBuckets\(table.buckets\), got \[2, 4\]"),
        ({"sizes": [4]}, r"sizes must be 2 numbers, one for each bucket, got shape \(1,\)"),
        ({"sizes": [4, 0]}, "sizes must be integers of at least 1"),
        ({"sizes": [4.5, 2]}, "sizes must be integers of at least 1"),
        ({"sizes": [[4, 2]] * 3, "datasets": [0, 1, 0, 1]}, "sizes must be 2 numbers, one for each bucket, or 2 rows"),
        ({"datasets": [0, 1]}, "datasets must be an integer >= 0 for each of 4 examples"),
        ({"datasets": [0, -1, 0, 0]}, "datasets must be an integer >= 0"),
        ({"lengths": [9, 9]}, "lengths must fill at least one batch of 1 ranks: 2 of 2 examples are rejected"),
        ({"drop_last": True, "world_size": 2}, "lengths must fill at least one batch of 2 ranks: 0 of 4"),
    ],
)
def test_bad_input_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        BucketBatchSampler(**({"lengths": [1, 2, 3, 4], "buckets": LengthBuckets([2, 4]), "sizes": [4, 2]} | given))


@pytest.mark.parametrize("tokens, quadratic, says", [(30, None, "takes 40, got 30"), (50, 40, "takes 80, got 50")])
def test_a_budget_that_one_example_exceeds_is_refused(tokens, quadratic, says):
    with pytest.raises(InputError, match=f"tokens must suffice for one example of every bucket: 40.0 {says}"):
        sizes_for_budget(LengthBuckets([10, 40]), tokens, quadratic)


def test_a_budget_takes_buckets():
    with pytest.raises(InputError, match=r"buckets must be LengthBuckets, as .*, got \[10, 40\]"):
        sizes_for_budget([10, 40], 100)


def test_a_damaged_state_is_refused_and_changes_nothing():
    sampler = BucketBatchSampler(lengths_of(300), LengthBuckets([20, 400]), [5, 4])
    following(sampler, 3)
    state = sampler.state_dict()
    one = {"since": {"batch": 0, "epoch": 0, "used": [5]}}
    over = {"since": {"batch": 0, "epoch": 0, "used": [10**6, 0]}}
    for wrong in (one, over, {"since": None}, {"world_size": 10**6}, {"counts": [1, 2]}, {"sizes": [5, 5]}):
        with pytest.raises(InputError, match="state_dict must|world_size"):
            sampler.load_state_dict(state | wrong)
        assert sampler.state_dict() == state


def test_data_sets_are_numbered_from_0():
    with pytest.raises(InputError, match="^datasets must be numbered from 0 on, got 300000000: memory"):
        BucketBatchSampler([1, 2], LengthBuckets([2, 3]), [1, 1], datasets=[0, 300_000_000])


def test_ragged_tables_are_refused_by_name():
    with pytest.raises(InputError, match="sizes must be 2 numbers, one for each bucket"):
        BucketBatchSampler([3, 1], LengthBuckets([3.0, 4.0]), [[2], [1, 2]])
    with pytest.raises(InputError, match="datasets must be an integer >= 0 for each of 2 examples"):
        BucketBatchSampler([3, 1], LengthBuckets([3.0]), [2], datasets=[[0], [1, 2]])
