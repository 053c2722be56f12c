"""Tables of measurements against references that read like the definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.job import Target
from batchlab.core.run import Run
from batchlab.measure.runs.steps_to_result import (
    Measurement,
    StepsToTarget,
    best_values,
    fewest_steps,
    measurements,
    steps_to_target,
)
from tests.core.test_study import study_folder, trial

LOSS, ACCURACY = Target("loss", 0.5), Target("accuracy", 0.5, "max")
VALUES = st.sampled_from([0.1, 0.4, 0.5, 0.6, 0.9, math.nan, math.inf])
TABLES = st.lists(
    st.builds(Measurement, st.integers(0, 4), st.sampled_from([8, 32]), st.integers(0, 6), VALUES),
    min_size=1,
    max_size=30,
    unique_by=lambda row: (row.batch_size, row.trial, row.step),
)


def reference(table, size, reaches, step_budget=math.inf, example_budget=math.inf):
    """The source's definition, in its order: budgets filter, sort by (step, trial), the first that is good."""
    bad = {row.trial for row in table if row.batch_size == size and not math.isfinite(row.value)}
    rows = [row for row in table if row.batch_size == size and row.trial not in bad]
    rows = [row for row in rows if row.step <= step_budget and size * row.step <= example_budget]
    good = [row for row in sorted(rows, key=lambda row: (row.step, row.trial)) if reaches(row.value)]
    return good[0] if good else None


@given(table=TABLES, maximise=st.booleans(), strict=st.booleans(), steps=st.none() | st.integers(1, 6))
def test_the_answer_is_the_first_good_row_of_the_sorted_table(table, maximise, strict, steps):
    reaches = {
        (False, False): lambda value: value <= 0.5,
        (False, True): lambda value: value < 0.5,
        (True, False): lambda value: value >= 0.5,
        (True, True): lambda value: value > 0.5,
    }[maximise, strict]
    found = fewest_steps(table, ACCURACY if maximise else LOSS, step_budget=steps, example_budget=96, strict=strict)
    assert list(found) == sorted({row.batch_size for row in table})
    for size, row in found.items():
        assert row == reference(table, size, reaches, steps or math.inf, 96)


@given(table=TABLES)
def test_a_best_value_is_no_worse_than_any_within_the_budget_and_the_earliest_of_its_like(table):
    for size, best in best_values(table, "max", step_budget=3).items():
        kept = [reference([row], size, lambda _: True, 3) for row in table]
        bad = {row.trial for row in table if row.batch_size == size and not math.isfinite(row.value)}
        kept = [row for row in kept if row is not None and row.trial not in bad]
        assert (best is None) == (not kept)
        for row in kept:
            assert (best.value, -best.step, -best.trial) >= (row.value, -row.step, -row.trial)


def test_budgets_keep_exactly_what_fits():
    table = [Measurement(0, 32, step, 1.0 - step / 1000) for step in range(1, 101)]
    assert best_values(table, example_budget=320)[32].step == 10
    assert best_values(table, step_budget=10)[32].step == 10
    assert best_values(table, example_budget=319)[32].step == 9
    assert fewest_steps(table, Target("loss", 0.989), example_budget=320)[32] is None
    assert fewest_steps(table, Target("loss", 0.989), example_budget=352)[32].step == 11
    assert best_values(table, step_budget=0.5) == {32: None}


def test_ties_go_to_the_smaller_trial_and_equality_counts_unless_strict():
    table = [Measurement(2, 8, 5, 0.1), Measurement(1, 8, 5, 0.5), Measurement(0, 8, 6, 0.1)]
    assert fewest_steps(table, LOSS)[8].trial == 1
    assert fewest_steps(table, LOSS, strict=True)[8].trial == 2
    assert best_values(table)[8].trial == 2


def test_a_trial_that_diverged_at_any_time_never_enters():
    table = [Measurement(0, 8, 1, 0.1), Measurement(0, 8, 9, math.nan), Measurement(1, 8, 4, 0.2)]
    assert fewest_steps(table, LOSS)[8].trial == 1 == best_values(table)[8].trial
    assert fewest_steps(table[:2], LOSS) == {8: None}


def test_the_first_evaluation_that_reaches_the_target_and_what_is_known_of_it():
    curve = [(0, 2.0), (10, 0.9), (25, 0.5), (30, 0.7), (40, 0.1)]
    assert steps_to_target(curve, LOSS) == StepsToTarget(25, 15)
    assert steps_to_target(curve, LOSS, strict=True) == StepsToTarget(40, 10)
    assert steps_to_target(curve[1:2], Target("loss", 1.0)) == StepsToTarget(10, 10)
    assert steps_to_target(curve, ACCURACY) == StepsToTarget(0, 0, reached_at_start=True)


def test_a_run_that_did_not_reach_it_has_no_number():
    found = steps_to_target([(10, 0.9), (20, 0.6)], LOSS)
    assert found == StepsToTarget(None, None, censored_at=20) and not found.reached
    diverged = steps_to_target([(10, 0.4), (20, math.inf)], LOSS)
    assert diverged == StepsToTarget(None, None, censored_at=20, diverged=True)
    assert steps_to_target([(10, "0.4"), (20, "nan")], LOSS).diverged
    assert StepsToTarget.from_json(found.to_json()) == found


def test_trials_of_a_study_are_read_by_their_own_names(tmp_path):
    first = trial(0, steps=100, evaluations=[[90, 0.7], [97, 0.6], [100, 0.1]], resolution=3)
    assert steps_to_target(first, Target("loss", 0.1)) == StepsToTarget(100, 3)
    others = [trial(1, "diverged", 50, evaluations=[[50, "nan"]]), trial(2, kind="confirm"), trial(3, "interrupted")]
    study = study_folder(tmp_path, [first, *others])
    table = measurements(study)
    assert [(row.trial, row.step) for row in table] == [(0, 90), (0, 97), (0, 100), (1, 50)]
    assert fewest_steps(table, study.target)[16] == Measurement(0, 16, 100, 0.1)
    assert study.best(16)["number"] == fewest_steps(table, study.target)[16].trial


class RunOfLines(Run):
    def __init__(self, path, lines):
        super().__init__(path, {})
        self.lines = lines

    def steps(self):
        return iter(self.lines)


def test_a_run_is_read_where_it_was_evaluated(tmp_path):
    lines = [{"step": k} | ({"valid": {"loss": 1 / k, "accuracy": "nan"}} if k % 4 == 0 else {}) for k in range(1, 13)]
    run = RunOfLines(tmp_path, lines)
    assert steps_to_target(run, Target("loss", 0.2)) == StepsToTarget(8, 4)
    assert steps_to_target(run, ACCURACY).diverged
    with pytest.raises(InputError, match="evaluations without the target's metric 'error'; they measure .'accuracy', "):
        steps_to_target(run, Target("error", 0.2))
    mixed = RunOfLines(tmp_path, [*lines, {"step": 13, "valid": {"bits": 1.0}}])
    with pytest.raises(InputError, match="without the target's metric 'loss'; they measure .'bits'."):
        steps_to_target(mixed, LOSS)
    with pytest.raises(InputError, match="run holds no evaluation of 'loss'"):
        steps_to_target(RunOfLines(tmp_path, lines[:2]), LOSS)


@pytest.mark.parametrize(
    ("run", "target", "message"),
    [
        ([], LOSS, "run holds no evaluation of 'loss'"),
        ([(1, 0.9), (1, 0.8)], LOSS, "evaluations at ascending updates of at least 0, got 1 after 1"),
        ([(-1, 0.9)], LOSS, "at ascending updates of at least 0, got -1 after -1"),
        ([(1.5, 0.9)], LOSS, r"run must hold pairs .updates, value., a whole number and a number, got \(1.5, 0.9\)"),
        ([(1, "low")], LOSS, "a whole number and a number, got .1, 'low'."),
        ([3], LOSS, "a whole number and a number, got 3"),
        ([(1, 0.9)], 0.5, "target must be a batchlab.Target, got 0.5"),
        ({"steps": 3}, LOSS, "run must be a trial with `evaluations`, got the keys .'steps'."),
    ],
)
def test_a_bad_run_is_named(run, target, message):
    with pytest.raises(InputError, match=message):
        steps_to_target(run, target)


def test_a_bad_table_is_named():
    with pytest.raises(InputError, match="table must hold at least one measurement, got none"):
        fewest_steps([], LOSS)
    with pytest.raises(InputError, match="step_budget must be > 0, or None, got 0"):
        fewest_steps([Measurement(0, 8, 1, 0.1)], LOSS, step_budget=0)
    with pytest.raises(InputError, match="example_budget must be > 0, or None, got nan"):
        best_values([Measurement(0, 8, 1, 0.1)], example_budget=math.nan)
    with pytest.raises(InputError, match='direction must be "min" or "max", got \'up\''):
        best_values([Measurement(0, 8, 1, 0.1)], "up")


def test_a_goal_that_is_no_target_is_refused():
    with pytest.raises(InputError, match="target must be a batchlab.Target, got 0.5"):
        fewest_steps([Measurement(0, 8, 1, 0.4)], 0.5)
