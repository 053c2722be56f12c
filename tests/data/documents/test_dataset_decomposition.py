import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from batchlab.core.errors import InputError
from batchlab.data.documents.dataset_decomposition import DatasetDecomposition
from batchlab.data.documents.decompose import PieceDataset, decompose
from batchlab.data.documents.decomposition_curriculum import (
    DRAWN,
    IN_SUB_CYCLES,
    bucket_odds,
    cycle_order,
    drawn_order,
    sub_cycle_counts,
)
from batchlab.data.documents.decomposition_plan import plan_decomposition
from batchlab.data.documents.documents import Documents
from tests.spine.forked import in_ranks

EXAMPLE, LENGTHS = (736, 1248, 1552, 1312, 1072, 944), np.array([256, 512, 1024, 2048, 4096, 8192])


def made(curriculum="grow_p2", *, documents=400, tokens_per_step=256, cycles=3, total_tokens=None, **given):
    lengths = np.random.default_rng(1).integers(20, 300, documents)
    pieces = decompose(lengths, 3, 6)
    plan = plan_decomposition(
        pieces.counts, pieces.lengths, tokens_per_step=tokens_per_step, cycles=cycles, total_tokens=total_tokens
    )
    return DatasetDecomposition(pieces, plan, curriculum=curriculum, **given)


def lengths_of(sampler, batches):
    return [sampler.pieces.lengths[sampler.pieces.bucket_of(batch[0])] for batch in batches]


@pytest.mark.parametrize("curriculum", [*DRAWN, *IN_SUB_CYCLES, (5.0, 1.0, 2.0, 0.5)])
def test_every_step_has_its_tokens_on_every_rank_and_the_plan_comes_out(curriculum):
    ranks = [made(curriculum, rank=rank, world_size=2) for rank in range(2)]
    planned, pieces = ranks[0].planned, ranks[0].pieces
    steps, seen = [0] * 4, [set() for _ in range(planned.cycles)]
    for at, both in enumerate(zip(*ranks, strict=True)):
        buckets = {pieces.bucket_of(index) for batch in both for index in batch}
        assert len(buckets) == 1 and len(both[0]) == len(both[1])
        bucket = buckets.pop()
        assert 2 * len(both[0]) * pieces.lengths[bucket] == planned.tokens_per_step
        steps[bucket] += 1
        seen[at // sum(planned.batches_per_cycle)].update(both[0] + both[1])
    assert steps == [planned.cycles * count for count in planned.batches_per_cycle]
    assert planned.tokens_per_step * sum(steps) == planned.total_tokens
    assert [len(each) for each in seen] == [sum(planned.sequences_per_cycle)] * planned.cycles  # none twice in a cycle
    assert len(set.union(*seen)) == planned.cycles * sum(planned.sequences_per_cycle)  # nor in the run


def test_the_order_is_that_of_drawing_one_by_one():
    batches, odds, u = [5, 3, 7], [3.0, 1.0, 0.5], np.random.default_rng(0).random(15)
    left, one_by_one = list(batches), []
    for each in u:
        alive = [b for b in range(3) if left[b]]
        weights = np.array([odds[b] for b in alive])
        one_by_one.append(alive[np.searchsorted(np.cumsum(weights) / weights.sum(), each, side="right")])
        left[one_by_one[-1]] -= 1
    assert drawn_order(batches, odds, u).tolist() == one_by_one


def test_the_first_draws_follow_the_odds():
    """Chi-square of the first bucket of 2,000 cycles: 2 degrees of freedom; and of odds that sum their weights."""
    first = [cycle_order([4, 8, 2], "grow_p2", seed)[0] for seed in range(2000)]
    expected = 2000 * np.array([16, 16, 2]) / 34
    assert ((np.bincount(first, minlength=3) - expected) ** 2 / expected).sum() < 18.4  # the 0.9999 quantile
    assert bucket_odds([4, 8, 2], "natural").tolist() == [4, 8, 2]
    assert bucket_odds([4, 8, 2], "grow_linear").tolist() == [12, 16, 2]
    assert bucket_odds([4, 8, 2], "uniform").tolist() == [1, 1, 1]
    assert bucket_odds([4, 8, 2], [1, 10, 100]).tolist() == [4, 80, 200]


def test_a_growing_cycle_grows_and_a_natural_one_is_flat():
    def means(curriculum):
        cycles = [LENGTHS[cycle_order(EXAMPLE, curriculum, seed)] for seed in range(5)]
        return np.mean([[part.mean() for part in np.array_split(cycle, 8)] for cycle in cycles], axis=0)

    grown = means("grow_p2")
    assert np.abs(grown / [900, 900, 1100, 1300, 1900, 2700, 4200, 7000] - 1).max() < 0.15
    assert (np.diff(grown[1:]) > 0).all()
    natural = means("natural")
    assert np.abs(natural / natural.mean() - 1).max() < 0.1


def test_sub_cycles_are_those_of_olmo_core():
    rows = ["32 16 8 4 2 1", "16 32 8 4 2 1", "8 16 32 4 2 1", "4 8 16 32 2 1", "2 4 8 16 32 1", "1 2 4 8 16 32"]
    for bucket, row in enumerate(rows):
        assert sub_cycle_counts(bucket, 63, 6) == [int(each) for each in row.split()]
    for batches in range(1, 400):
        for curriculum in IN_SUB_CYCLES:
            counts = sub_cycle_counts(batches % 5, batches, 5, curriculum)
            assert sum(counts) == batches and min(counts) >= 0
    order = cycle_order([63] * 6, "olmo_grow_p2", 4)
    first = np.bincount(order[: 32 + 16 + 8 + 4 + 2 + 1], minlength=6)
    assert first.tolist() == [32, 16, 8, 4, 2, 1] and np.bincount(order).tolist() == [63] * 6


def test_the_rest_of_a_run_is_the_same_after_a_resume_into_another_world():
    whole = [batch for _, batch in zip(range(3 * len(made())), endless(made()))]
    for stop in (0, 7, len(made()) - 1, len(made()), 2 * len(made()) + 5):
        first = made()
        for _ in zip(range(stop), endless(first)):
            pass
        state = json.loads(json.dumps(first.state_dict()))
        parts = [made(rank=rank, world_size=2) for rank in range(2)]
        for part in parts:
            part.load_state_dict(state)
        rest = [a + b for a, b in zip(*map(endless, parts)) for _ in [0]][: 3 * len(made()) - stop]
        assert rest == whole[stop : stop + len(rest)] and len(rest) > 50
    assert whole[: len(made())] != whole[len(made()) : 2 * len(made())]


def endless(sampler):
    for _ in range(4):
        yield from sampler


def test_the_longest_first_moves_one_batch():
    plain, first = list(made()), list(made(longest_first=True))
    assert lengths_of(made(), first[:1]) == [64] and lengths_of(made(), plain[:1]) == [8]
    assert sorted(lengths_of(made(), plain)) == sorted(lengths_of(made(), first))
    assert sum(a != b for a, b in zip(lengths_of(made(), plain), lengths_of(made(), first), strict=True)) == 2


def test_more_tokens_than_there_are_come_again_in_other_orders():
    once = made()
    twice = made(total_tokens=2 * once.planned.total_tokens)
    batches = list(twice)
    many = np.bincount(np.concatenate(batches), minlength=len(once.pieces))
    assert many.max() <= 3 and (many >= 1).mean() > 0.97 and twice.planned.total_tokens == 2 * once.planned.total_tokens
    first_cycle = np.concatenate(batches[: len(twice) // 3])  # the second lies across the seam of two passes
    assert len(set(first_cycle.tolist())) == len(first_cycle)


def test_the_length_of_every_batch_is_known_beforehand():
    sampler = made()
    lengths = np.concatenate([sampler.cycle_lengths(cycle) for cycle in range(3)])
    assert lengths.tolist() == lengths_of(sampler, list(sampler))
    with pytest.raises(InputError, match="cycle must be below 3, got 3"):
        sampler.cycle_lengths(3)


def test_a_place_in_a_long_run_is_found_at_once():
    sampler = made()
    sampler.load_state_dict(sampler.state_dict(batches=10**9 + 3))
    assert len(next(iter(sampler))) > 0 and sampler.taken == 10**9 + 4


def _ranks(folder):
    sampler = made()
    assert (sampler.rank, sampler.world_size) == (dist.get_rank(), 2)
    stop = 11
    batches = [batch for _, batch in zip(range(stop), sampler)]
    resumed = made()
    resumed.load_state_dict(sampler.state_dict(batches=stop))
    batches += list(resumed)
    lengths = torch.tensor(lengths_of(sampler, batches))
    low, high = lengths.clone(), lengths.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    assert torch.equal(low, high) and len(batches) == len(sampler)
    assert batches == list(made())
    both = [None, None]
    dist.all_gather_object(both, [index for batch in batches for index in batch])
    assert not set(both[0]) & set(both[1])


def test_two_ranks_draw_the_same_buckets_after_a_resume_too(tmp_path):
    assert in_ranks(2, tmp_path, _ranks, tmp_path) == [0, 0]


class _Row(Dataset):
    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        return self.data[index]


def test_workers_change_nothing():
    sampler = made(documents=60, tokens_per_step=64, cycles=1)
    documents = Documents(torch.arange(int(_lengths(sampler).sum())), _lengths(sampler))
    plain = [inputs for inputs, _ in DataLoader(PieceDataset(documents, sampler.pieces), batch_sampler=sampler)]
    again = made(documents=60, tokens_per_step=64, cycles=1)
    data = PieceDataset(documents, sampler.pieces)
    many = [inputs for inputs, _ in DataLoader(data, batch_sampler=again, num_workers=2)]
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, many, strict=True))
    rows = made(documents=60, tokens_per_step=64, cycles=1)
    one_by_one = [inputs for inputs, _ in DataLoader(_Row(data), batch_sampler=rows)]
    assert all(torch.equal(a, b) for a, b in zip(plain, one_by_one, strict=True))
    assert {inputs.numel() for inputs in plain} == {64}


def _lengths(sampler):
    return np.random.default_rng(1).integers(20, 300, 60)


def test_bad_input_names_the_bucket():
    with pytest.raises(InputError) as error:
        made(accumulation=3)
    expected = (
        "the 4 sequences of a step in the bucket of length 64 must be a multiple of world_size 1 times accumulation 3"
    )
    assert str(error.value) == expected
    with pytest.raises(InputError, match="bucket of length 64 must be a multiple of world_size 8 times accumulation 1"):
        made(world_size=8, rank=0)
    with pytest.raises(InputError, match="curriculum must be one of .* or weights, got 'p2'"):
        made("p2")
    with pytest.raises(InputError, match="curriculum must have one weight for each of 4 buckets, got \\[1, 2\\]"):
        made([1, 2])
    with pytest.raises(InputError, match="curriculum must have one weight for each of 4 buckets, got None"):
        made(None)
    with pytest.raises(InputError, match="curriculum must be finite and > 0, got nan"):
        made([1, 2, float("nan"), 1])
    with pytest.raises(InputError, match="plan must be of these pieces"):
        DatasetDecomposition(decompose([100] * 50, 3, 6), made().planned)
    with pytest.raises(
        InputError, match="state_dict must have curriculum 'grow_p2' as this sampler has, got 'natural'"
    ):
        made().load_state_dict(made("natural").state_dict())
    with pytest.raises(InputError, match="has odds for each sub-cycle"):
        bucket_odds([1, 2], "olmo_grow_p2")


def test_buckets_may_be_left_out_of_a_plan():
    pieces = decompose([100] * 40 + [6] * 64, 2, 6, randomize=False)
    assert 0 in pieces.counts
    with pytest.raises(InputError, match="^the bucket of length 8 must have at least 1 sequence, got 0: leave it out$"):
        plan_decomposition(pieces.counts, pieces.lengths, tokens_per_step=64, cycles=2)
    kept = [(count, length) for count, length in zip(pieces.counts, pieces.lengths, strict=True) if count]
    plan = plan_decomposition(*map(list, zip(*kept, strict=True)), tokens_per_step=64, cycles=2)
    sampler = DatasetDecomposition(pieces, plan)
    batches = list(sampler)
    for batch in batches:
        of = {pieces.lengths[pieces.bucket_of(index)] for index in batch}
        assert len(of) == 1 and len(batch) * of.pop() == 64
    assert len({index for batch in batches for index in batch}) == sum(map(len, batches))
    for bad, message in (
        ((pieces, None), "plan must be a DecompositionPlan, got NoneType"),
        (([1], plan), "pieces must be a Pieces, got list"),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            DatasetDecomposition(*bad)
