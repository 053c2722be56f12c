import numpy as np
import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.data.documents.decomposition_curriculum import bucket_odds
from batchlab.data.documents.decomposition_plan import nearest_counts, plan_decomposition, released_counts

# the example of apple/ml-dataset-decomposition's README
SHARDS, PER_SHARD = (3560, 5996, 7410, 6309, 5157, 4513), (4096, 2048, 1024, 512, 256, 128)
LENGTHS, GPUS = (256, 512, 1024, 2048, 4096, 8192), 8
EXAMPLE = dict(
    tokens_per_step=64 * 8192, cycles=8, total_tokens=28_795_904_000, units=[GPUS * each for each in PER_SHARD]
)
NONE = (
    " has no full batch a cycle: of its {} sequences, in units of {}, {} cycles get none; "
    "take fewer cycles or tokens a step, or leave it out"
)
BOTH = "balanced and total_tokens cannot both be given: the one sets the counts, so does the other"
AVAILABLE = [shards * each for shards, each in zip(SHARDS, PER_SHARD, strict=True)]


def test_the_released_example_is_reproduced():
    plan = plan_decomposition(AVAILABLE, LENGTHS, released=True, **EXAMPLE)
    assert plan.units_per_cycle == (46, 78, 97, 82, 67, 60)
    assert plan.sequences_per_cycle == (1507328, 1277952, 794624, 335872, 137216, 61440)
    assert plan.tokens_per_cycle == 3_607_101_440
    assert bucket_odds(plan.units_per_cycle, "grow_p2").tolist() == [1472, 1248, 776, 328, 134, 60]
    assert plan.batch == (2048, 1024, 512, 256, 128, 64)
    assert plan.batches_per_cycle == (736, 1248, 1552, 1312, 1072, 960)


def test_the_nearer_total_is_planned_and_offered():
    plan = plan_decomposition(AVAILABLE, LENGTHS, **EXAMPLE)
    assert plan.units_per_cycle == (46, 78, 97, 82, 67, 59) and plan.tokens_per_cycle == 3_598_712_832
    assert plan.batches_per_cycle[-1] == 944 and plan.total_tokens == plan.nearest_tokens == 8 * 3_598_712_832
    assert plan.summary() == ("28,789,702,656 tokens in 8 cycles of 6,864 steps of 524,288; 28,795,904,000 were wanted")
    released = plan_decomposition(AVAILABLE, LENGTHS, released=True, **EXAMPLE)
    assert released.summary().endswith("28,795,904,000 were wanted, 28,789,702,656 are the nearest in whole units")


def test_a_reachable_total_is_exact_to_the_token():
    for steps in (8 * 100, 8 * 6000):
        plan = plan_decomposition(AVAILABLE, LENGTHS, tokens_per_step=2**19, total_tokens=steps * 2**19)
        assert plan.total_tokens == steps * 2**19 and "wanted" not in plan.summary()
        assert 8 * sum(plan.batches_per_cycle) == steps
        assert plan.tokens_per_step * steps == plan.total_tokens


def test_one_pass_takes_whole_batches_and_repeats_nothing():
    plan = plan_decomposition([1000, 300, 90], [8, 16, 32], tokens_per_step=64, cycles=4)
    assert plan.batches_per_cycle == (31, 18, 11) and max(plan.repeats) <= 1 and plan.wanted_tokens is None
    even = plan_decomposition([1000, 300, 90], [8, 16, 32], tokens_per_step=64, cycles=4, balanced=True)
    assert even.batches_per_cycle == (11, 11, 11)
    twice = plan_decomposition([1000, 300, 90], [8, 16, 32], tokens_per_step=64, cycles=4, total_tokens=2 * 15680)
    assert twice.repeats == pytest.approx((2, 2, 2), rel=0.05)


def test_the_nearest_counts_are_the_nearest_of_all_single_changes():
    """Against every change of one bucket by up to 60 units."""
    for total in range(3000, 9000, 137):
        counts, tokens, cycles = [9, 7, 5], [12, 20, 35], 4
        found = nearest_counts(counts, tokens, total, cycles)
        away = abs(total - cycles * sum(c * t for c, t in zip(found, tokens, strict=True)))
        for at in range(3):
            for change in range(-60, 61):
                other = [c + change * (i == at) for i, c in enumerate(counts)]
                if other[at] >= 1:
                    assert away <= abs(total - cycles * sum(c * t for c, t in zip(other, tokens, strict=True)))
    assert released_counts([2, 2], [4, 8], 24, 1) == [2, 2]


@pytest.mark.parametrize("integers", [np.array, torch.tensor])
def test_integers_of_other_libraries_do_not_overflow(integers):
    """10^21 tokens times sequences are past 64 bits."""
    given = [10**9, 3 * 10**8, 9 * 10**7], [8, 16, 32], [16, 8, 4]
    whole = dict(tokens_per_step=64, cycles=4, total_tokens=10**12)
    plan = plan_decomposition(*map(integers, given[:2]), units=integers(given[2]), **whole)
    assert plan == plan_decomposition(*given[:2], units=given[2], **whole)
    shares = [count * length for count, length in zip(plan.sequences_per_cycle, plan.lengths, strict=True)]
    assert shares == pytest.approx([10**12 / 4 * part / 15.68 for part in (8, 4.8, 2.88)], rel=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens_per_step=100), "tokens_per_step must be a multiple of the bucket of length 32, got 100"),
        (dict(tokens_per_step=0), "tokens_per_step must be an integer of at least 1, got 0"),
        (dict(cycles=46), "the bucket of length 32" + NONE.format(90, 2, 46)),
        (dict(available=[1000, 0, 90]), "the bucket of length 16 must have at least 1 sequence, got 0: leave it out"),
        (dict(lengths=[8, 32, 16]), "lengths must be integers of at least 1, ascending, got [8, 32, 16]"),
        (dict(available=[1000]), "available must have one count for each of the lengths, got 1 and 3"),
        (dict(units=[8, 5, 2]), "units must be multiples of a batch: 4 sequences in the bucket of length 16, got 5"),
        (
            dict(units=[8.5, 4, 2]),
            "units must be multiples of a batch: 8 sequences in the bucket of length 8, got 8.5",
        ),
        (dict(units=[8]), "units must have one number for each of the 3 buckets, got 1"),
        (dict(total_tokens=10), "the bucket of length 8" + NONE.format(1000, 8, 4)),
        (dict(total_tokens=1e6), "total_tokens must be an integer of at least 1, got 1000000.0"),
        (dict(total_tokens=10**4, balanced=True), BOTH),
    ],
)  # fmt: skip
def test_bad_input_names_the_bucket(change, message):
    given = dict(available=[1000, 300, 90], lengths=[8, 16, 32], tokens_per_step=64, cycles=4) | change
    with pytest.raises(InputError) as error:
        plan_decomposition(given.pop("available"), given.pop("lengths"), **given)
    assert str(error.value) == message
