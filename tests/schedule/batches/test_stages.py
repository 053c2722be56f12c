"""The staged plan: its arithmetic, a resume from any token, and what it refuses."""

import random

import pytest

from batchlab.core.errors import InputError
from batchlab.schedule.batches.batch_doubling import BatchDoubling
from batchlab.schedule.batches.batch_ramp import BatchRamp
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.stages import Stage, Stages, falcon2_stages

DOUBLE_AT = [10**11, 3 * 10**11, 9 * 10**11, 2 * 10**12]


def falcon2():
    return falcon2_stages(DOUBLE_AT, warmup_tokens=4 * 10**9, multiple_of=128)


def test_the_four_stages():
    plan = falcon2()
    assert plan.total == 5500 * 10**9
    assert [size for _, size in plan.changes()] == [2048, 4096, 8192, 16384, 32768, 16384, 8192]
    switches = [4500 * 10**9, 4750 * 10**9, 5000 * 10**9]
    for point in switches:  # constant tokens an update, exactly
        before, after = plan.where(point - 1), plan.where(point)
        assert before.batch_tokens == after.batch_tokens == 32768 * 2048
        assert after.stage == before.stage + 1 and before.left == 1
        assert after.lr == pytest.approx(1.89e-5, rel=1e-9)
    assert [plan.where(point).context for point in (0, *switches)] == [2048, 4096, 8192, 8192]
    assert [plan.where(point).data for point in (0, *switches)] == ["web", "web", "web", "curated"]
    assert plan.where(0).lr == 0.0 and plan.where(4 * 10**9).lr == pytest.approx(3.7e-4)
    assert plan.where(2 * 10**9).lr == pytest.approx(1.85e-4)
    assert plan.where(plan.total + 10**9).stage == 3 and plan.where(plan.total + 10**9).left == 0


def small():
    ramp = BatchRamp(8, 32, over=30_000, increment=8, lr_rule="sqrt")
    return Stages(
        [
            Stage(50_001, 16, ramp, lr=0.1, data="a"),
            Stage(20_000, 64, lr=lambda tokens: 0.1 - tokens * 1e-6, data="b"),
            Stage(30_000, 32, data="c"),
            Stage(10_000, 32, batch_tokens=1024, lr=0.01, data="d"),
        ],
        multiple_of=8,
    )


def test_a_run_through_the_stages_and_a_resume_from_any_token():
    plan, seen, rows = small(), 0, {}
    while seen < plan.total:
        point = plan.where(seen)
        assert plan.batch_size == point.batch == plan.at(seen)
        rows[seen] = point
        seen += point.batch_tokens
        plan.next_batch(1, StepFacts(seen, point.batch))
    assert len(rows) == small().updates(plan.total)
    assert {point.data: point.batch_tokens for point in rows.values()} == {"a": 512, "b": 512, "c": 512, "d": 1024}
    rng = random.Random(0)
    for at in rng.choices(sorted(rows), k=1000):
        fresh = small()
        if at:
            fresh.next_batch(1, StepFacts(at, 1))
        assert (fresh.where(at), fresh.batch_size) == (rows[at], rows[at].batch)
    assert rows[0].lr == pytest.approx(0.05)  # a quarter of the batch that the rate is of
    last_b = max(at for at in rows if rows[at].data == "b")
    first_c = min(at for at in rows if rows[at].data == "c")
    assert rows[last_b].lr > rows[first_c].lr == pytest.approx(0.08)  # what the stage before ended with


def test_constant_sequences_must_be_said():
    said = Stages([Stage(100, 2, batch_sequences=4), Stage(100, 8, batch_sequences=4)])
    assert said.where(0).batch_tokens == 8 and said.where(100).batch_tokens == 32
    assert said.updates(200) == 13 + 3 and said.where(0).lr is None


def test_a_stage_that_keeps_the_rate_moves_it_with_its_batch_all_the_same():
    doubling = BatchDoubling(4, [50], lr_rule="linear")
    plan = Stages([Stage(100, 1, 4, lr=0.1), Stage(100, 1, doubling), Stage(100, 1)])
    assert [plan.where(seen).lr for seen in (99, 100, 149, 150, 200)] == [0.1, 0.1, 0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Stages([]), "stages must hold at least one stage, got none"),
        (lambda: Stages([Stage(100, 2)]), "the first stage must have batch_sequences or batch_tokens, got neither"),
        (lambda: Stage(0, 2, 4), "tokens must be an integer of at least 1, got 0"),
        (lambda: Stage(100, 2, 4, 8), "batch_sequences and batch_tokens are two batches: give one of them"),
        (lambda: Stage(100, 2, 4, lr=-1.0), "lr must be finite and > 0, got -1.0"),
        (lambda: Stage(100, 2, 4, lr="0.1"), "lr must be finite and > 0, got '0.1'"),
        (lambda: Stage(100, 2, BatchDoubling(4, [100])), "must change within the stage's 100 tokens, got one at 100"),
        (
            lambda: Stages([Stage(100, 2, 4), Stage(100, 3)]),
            "stage 1 has 8 tokens an update, no whole sequences of 3",
        ),
        (
            lambda: Stages([Stage(100, 2, 8), Stage(100, 4)], multiple_of=8),
            "a stage's batch must be a multiple of multiple_of 8, got 4 sequences",
        ),
        (lambda: small().where(-1), "seen must be an integer of at least 0, got -1"),
        (lambda: small().updates(100, per_batch=2), "per_batch must be left at 1, .* got 2"),
        (
            lambda: falcon2_stages(DOUBLE_AT, warmup_tokens=4500 * 10**9),
            "warmup_tokens must be below the first stage's",
        ),
        (
            lambda: falcon2_stages([*DOUBLE_AT[:3], 5 * 10**12], warmup_tokens=1),
            "must change within the stage's 4500000000000 tokens, got one at 5000000000000",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_what_is_no_stage_is_refused():
    with pytest.raises(InputError, match="stages must hold Stages, got {'tokens': 1}"):
        Stages([{"tokens": 1}])
