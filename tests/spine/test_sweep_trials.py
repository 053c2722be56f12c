"""The trials of a sweep: the queue that gives them out, which rates run again, and how one ends."""

import dataclasses
import math

import optuna
import pytest

from batchlab.core.errors import InputError
from batchlab.core.job import Target
from batchlab.spine import trial as trial_module
from batchlab.spine import trial_queue
from batchlab.spine.learner import Learner
from batchlab.spine.sweep_search import BatchSearch, trial_plan
from batchlab.spine.trial import next_evaluation, run_trial
from tests.spine.sweep_jobs import TARGET, linear_facts, linear_job


def test_a_trial_too_many_is_given_back(tmp_path):
    with trial_queue.quiet_optuna():
        storage = trial_queue.open_storage(f"sqlite:///{tmp_path}/study.db")
        queue = trial_queue.TrialQueue(storage, "toy")
        claims = [queue.take([(0.1, 1.0, 2), (1.0, 4.0, 1)]) for _ in range(4)]
        assert [(c.low, c.high) for c in claims[:3]] == [(0.1, 1.0), (0.1, 1.0), (1.0, 4.0)] and claims[3] is None
        late = queue._study.ask()
        assert queue.take([(0.1, 1.0, 3)]) is None
        queue._study.tell(late, state=optuna.trial.TrialState.FAIL)
        claims[0].put_back()
        again = queue.take([(0.1, 1.0, 2), (1.0, 4.0, 1)])
        assert again.learning_rate == claims[0].learning_rate and again.run == 0 and again.number > late.number
        claims[0].finish({"status": "reached", "steps_to_target": 5})
        assert queue.records() == [] and queue.fewest_steps() == math.inf
        again.finish({"status": "reached", "steps_to_target": 7})
        assert queue.fewest_steps() == 7.0 and len(queue.records()) == 1


@pytest.mark.parametrize(
    ("worker", "age", "seen", "lost"),
    [
        ({"host": "elsewhere", "pid": 1, "born": None}, 3000, None, False),
        ({"host": "elsewhere", "pid": 1, "born": None}, 4000, None, True),
        ({"host": "elsewhere", "pid": 1, "born": None}, 9000, 60, False),
        ({"host": "elsewhere", "pid": 1, "born": None}, 9000, 4000, True),
        (trial_queue._this_worker(), 9000, None, False),
        (trial_queue._this_worker() | {"born": "another"}, 1, None, True),
        (None, 10, None, False),
        (None, 60, None, True),
    ],
)
def test_who_counts_as_lost(worker, age, seen, lost):
    import datetime
    import time

    attributes = ({} if worker is None else {"worker": worker}) | ({} if seen is None else {"seen": time.time() - seen})
    started = datetime.datetime.now() - datetime.timedelta(seconds=age)
    assert trial_queue._is_lost(attributes, started) is lost


def test_rates_are_spread_evenly_after_any_number():
    """The golden sequence: gaps of n points on the circle differ by no more than φ² (three-gap theorem)."""
    for count in range(1, 200):
        points = sorted(trial_queue.quasi_random(n) for n in range(count))
        gaps = [b - a for a, b in zip(points, points[1:] + [points[0] + 1], strict=True)]
        assert max(gaps) < (2.619 if count > 1 else 2) * min(gaps)


def _raced(searched, fresh):
    """Which rates run again, by number of the search trial; trial k takes searched[k] steps, and fresh[k] again."""
    search = BatchSearch(
        optuna.storages.InMemoryStorage(),
        "toy",
        trial_plan(linear_job(), linear_facts(), 16),
        trials=2,
        seeds=3,
        seed=0,
    )
    numbers, again = {}, []
    while (task := search.next_task()) is not None:
        rate = task.plan.learning_rate
        if task.kind == "search":
            numbers[rate] = len(numbers)
        else:
            again.append(numbers[rate])
        steps = (searched if task.kind == "search" else fresh)[numbers[rate]]
        task.claim.finish(task.record({"status": "reached" if steps else "not reached", "steps_to_target": steps}))
    assert search.finished and len(search.records()) == len(numbers) + len(again)
    assert search.counts() == (len(numbers) + 3 * max(1, len(set(again))),) * 2
    assert all(again.count(number) == 3 for number in again)
    return list(dict.fromkeys(again))


@pytest.mark.parametrize(
    ("searched", "fresh", "again"),
    [
        ([50, 52], [60, 1], [0]),
        ([50, 52], [63, 70], [0, 1]),
        ([52, 50], [70, 70], [1, 0]),
        ([50, 52], [None, 70], [0, 1]),
        ([50, None], [None, 70], [0]),
        ([None, None], [1, 1], []),
    ],
    ids=["within a fifth", "beyond", "the other first", "never again", "no other", "none"],
)
def test_the_next_contender_runs_again_only_where_it_may_be_better(searched, fresh, again):
    assert _raced(searched, fresh) == again


def test_steps_are_known_to_three_percent_or_one_update():
    for first in (1, 7, 50):
        at = next_evaluation(0, first)
        assert at == first
        while at < 5000:
            later = next_evaluation(at, first)
            assert 1 <= later - at <= max(1, 0.03 * later)
            at = later


def test_a_trial_meets_the_target_where_a_plain_loop_does():
    plan = trial_plan(linear_job(), linear_facts(), 16)
    learner, steps = Learner(linear_job(), plan, seed=3), 0
    while not TARGET.reached(learner.evaluate()["loss"]):
        learner.update()
        steps += 1
    found = run_trial(linear_job(), plan, seed=3, expected_steps=1)
    assert found["status"] == "reached" and found["steps_to_target"] - found["resolution"] < steps
    assert found["steps_to_target"] >= steps and found["resolution"] <= max(1, 0.03 * found["steps"])
    assert found["examples"] == 16 * found["steps"] and found["evaluations"][-1] == (found["steps"], found["metric"])


def test_a_trial_ends_at_its_limits():
    plan = dataclasses.replace(trial_plan(linear_job(), linear_facts(), 16), target=Target("loss", 1e-9), steps=50)
    assert run_trial(linear_job(), plan, seed=0, expected_steps=10)["steps"] == 50
    hopeless = run_trial(linear_job(), plan, seed=0, expected_steps=10, most_steps=lambda: 20)
    assert (hopeless["status"], hopeless["steps"], hopeless["steps_to_target"]) == ("not reached", 20, None)
    stopped = run_trial(linear_job(), plan, seed=0, expected_steps=10, stop=lambda: True)
    assert (stopped["status"], stopped["steps"]) == ("interrupted", 1)
    with pytest.raises(InputError, match="needs plan.target"):
        run_trial(linear_job(), dataclasses.replace(plan, target=None), seed=0, expected_steps=10)
    lost = dataclasses.replace(plan, target=Target("accuracy", 1.0, "max"))
    with pytest.raises(InputError, match="target metric 'accuracy' is not among the measured .'loss'."):
        run_trial(linear_job(), lost, seed=0, expected_steps=10)
    assert trial_module.RESOLUTION <= 0.05
