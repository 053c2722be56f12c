"""The choice of batch and devices against the closed forms of its derivation."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.plan import FrontierRow
from batchlab.planner.batch import EQUAL_WITHIN, GOALS, pick
from batchlab.planner.frontier_rows import frontier, size_grid, size_range
from batchlab.planner.prediction import Prediction
from tests.spine.facts_fixture import exact, hand_facts

positive = st.floats(0.01, 100.0)


def rows_of(b_crit, fixed, per_example, devices):
    """All batches of a fine grid on each number of devices, by T = (1 + B_crit/B)(t₀ + c·B/n)."""
    sizes = [2 ** (k / 8) * b_crit for k in range(-64, 65)]
    rows = []
    for count in devices:
        for size in sizes:
            time = (1 + b_crit / size) * (fixed + per_example * size / count)
            rows.append(FrontierRow(size, count, 1 + b_crit / size, time, count * time))
    return rows


@given(fixed=positive, per_example=positive, count=st.integers(1, 64))
def test_fastest_batch_is_the_geometric_mean(fixed, per_example, count):
    """B = √(n·b·B_crit), T = (√t₀ + √(c·B_crit/n))²; cost on the same devices agrees."""
    b_crit = 1000.0
    rows = rows_of(b_crit, fixed, per_example, [count])
    best = math.sqrt(count * fixed / per_example * b_crit)
    least = (math.sqrt(fixed) + math.sqrt(per_example * b_crit / count)) ** 2
    for goal in ("time", "cost"):
        row = pick(rows, goal, b_crit=b_crit)
        assert row.time == pytest.approx(least, rel=0.01) and row.time >= least * (1 - 1e-12)
        assert 2 ** (-1 / 8) < row.batch_size / best < 2 ** (1 / 8)


def test_balanced_with_devices_to_spare_is_the_knee():
    """B = B_crit on B_crit/b devices, whatever the step's fixed part."""
    for saturation in (1.0, 4.0, 16.0):
        rows = rows_of(256.0, saturation, 1.0, [2**k for k in range(11)])
        row = pick(rows, "balanced", b_crit=256.0)
        assert row.batch_size == pytest.approx(256.0)
        assert row.devices == 256 / saturation
        assert pick(rows, "cost", b_crit=256.0).devices == 1
        assert pick(rows, "time", b_crit=256.0).devices == 1024


@given(fixed=positive, per_example=positive, devices=st.integers(1, 64))
def test_balanced_is_fast_on_the_devices_it_takes(fixed, per_example, devices):
    rows = rows_of(256.0, fixed, per_example, range(1, devices + 1))
    row = pick(rows, "balanced", b_crit=256.0)
    fastest = min(other.time for other in rows if other.devices == row.devices)
    assert row.time <= math.sqrt(EQUAL_WITHIN) * fastest * (1 + 1e-12)


@given(
    fixed=st.floats(1e-4, 1e2),
    wrong=st.floats(0.5, 2.0),
    b_crit=st.floats(50.0, 500.0),
    base=st.sampled_from([16, 32, 64, 128]),
)
def test_time_to_target_survives_a_noise_scale_wrong_by_two(fixed, wrong, b_crit, base):
    """On one device the plan is within 1.25 of the best batch there is, whatever the fixed part of a step."""
    facts = hand_facts(
        noise_scale=exact(wrong * b_crit),
        true_b_crit=b_crit,
        s_min=1000.0,
        base_batch_size=base,
        update_seconds=fixed,
        examples=10**6,
    )
    sizes = size_grid(*size_range(wrong * b_crit, facts.train_examples))
    rows = frontier(facts, Prediction.of(facts), batch_sizes=[*sizes, base])
    for goal in GOALS:
        size = pick(rows, goal, b_crit=wrong * b_crit).batch_size
        truth = (1 + b_crit / size) * (fixed + 1e-3 * size)
        assert truth <= 1.25 * (math.sqrt(fixed) + math.sqrt(1e-3 * b_crit)) ** 2


def test_equal_choices_go_to_the_knee_and_to_fewer_devices():
    rows = [FrontierRow(32, 1, 1, 1.0, 1.0), FrontierRow(64, 1, 1, 1.02, 1.02), FrontierRow(128, 1, 1, 1.03, 1.03)]
    assert pick(rows, "balanced", b_crit=60.0).batch_size == 64
    assert pick(rows, "balanced", b_crit=math.inf).batch_size == 64
    assert pick(rows, "time", b_crit=60.0).batch_size == 32
    same = [FrontierRow(64, 4, 1, 1.0, 4.0), FrontierRow(64, 2, 1, 1.0, 2.0)]
    assert pick(same, "time", b_crit=60.0).devices == 2


def test_errors():
    rows = [FrontierRow(1, 1, 1, 1.0, 1.0)]
    with pytest.raises(InputError, match=r"goal must be one of \['balanced', 'cost', 'time'\], got 'speed'"):
        pick(rows, "speed", b_crit=1)
    with pytest.raises(InputError, match="rows must hold at least one choice, got none"):
        pick([], "time", b_crit=1)
    with pytest.raises(InputError, match="b_crit must be finite and > 0, got nan"):
        pick(rows, "time", b_crit=math.nan)
