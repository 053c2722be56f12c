"""The sweep on a linear model: counts, seeds, resumption, many workers, divergence, edges, refusals."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics

import optuna
import pytest
import torch

from batchlab.core.errors import InputError, Interrupted, StorageError
from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.study import Study
from batchlab.measure.runs.tradeoff import Tradeoff, fit_tradeoff
from batchlab.spine import sweep as sweep_module
from batchlab.spine import trial as trial_module
from batchlab.spine import trial_queue
from batchlab.spine.learner import Learner
from batchlab.spine.plan import plan as make_plan
from batchlab.spine.sweep import parse_batch_sizes, sweep
from batchlab.spine.sweep_search import BatchSearch, trial_plan
from batchlab.spine.trial import next_evaluation, run_trial
from tests.spine.forked import in_child
from tests.spine.sweep_jobs import TARGET, linear_facts, linear_job, squared_error

SIZES, TRIALS, SEEDS = [4, 16, 64], 4, 2
FORK = multiprocessing.get_context("fork")


def quick(out, *, job=None, facts=None, **changes):
    settings = {"batch_sizes": SIZES, "trials": TRIALS, "seeds": SEEDS, "facts": facts or linear_facts()}
    return sweep(job or linear_job(), out=out, **(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    before = torch.random.get_rng_state()
    seen = []
    study = quick(tmp_path_factory.mktemp("sweep") / "study", progress=lambda phase, done: seen.append((phase, done)))
    assert torch.equal(torch.random.get_rng_state(), before)
    return study, seen


def searched(study, size):
    return [t for t in study.trials() if t["batch_size"] == size and t["kind"] == "search"]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("16..1024", [16, 32, 64, 128, 256, 512, 1024]),
        ("16,64,200", [16, 64, 200]),
        ("10..100", [16, 32, 64]),
        (" 384, 16..64 , 32", [16, 32, 64, 384]),
        ([64, 16, 64], [16, 64]),
        ("7", [7]),
    ],
)
def test_batch_sizes_are_parsed(text, sizes):
    assert parse_batch_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "integers of at least 1, as in 16,64,200, or a span as in 16..1024, got ''"),
        ("16,,64", "got ''"),
        ("0", "got '0'"),
        ("16-64", "got '16-64'"),
        ("1e3", "got '1e3'"),
        ([16, 0], "got 0"),
        ([True], "got True"),
        ([2.0], "got 2.0"),
        ("33..63", "'33..63' holds no power of two: name the sizes"),
        ("64..16", "'64..16' holds no power of two"),
        ([], "at least one batch size, got none"),
    ],
)
def test_bad_batch_sizes_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_batch_sizes(text)


def medians(study, batch_size):
    """Of the fresh runs, by learning rate; every one of them has as many."""
    runs = {}
    for t in study.trials():
        if (t["kind"], t["batch_size"]) == ("confirm", batch_size):
            runs.setdefault(t["learning_rate"], []).append(t["steps_to_target"] or math.inf)
    assert {len(steps) for steps in runs.values()} == {SEEDS}
    return {rate: statistics.median(steps) for rate, steps in runs.items()}


def test_each_size_is_searched_and_its_winner_confirmed(finished):
    study, _ = finished
    assert study.summary["status"] == "finished" == study.meta["status"]
    assert [row["batch_size"] for row in study.rows()] == SIZES
    for row in study.rows():
        tried = searched(study, row["batch_size"])
        assert len(tried) in (TRIALS, TRIALS + 2, TRIALS + 4, TRIALS + 6) and len(tried) == row["trials"]
        assert len({t["learning_rate"] for t in tried}) == len(tried)
        assert all(t["low_rate"] <= t["learning_rate"] <= t["high_rate"] for t in tried)
        assert {t["seed"] for t in tried} == {0} and len(row["seeds"]) == SEEDS
        fewest = min((t for t in tried if t["status"] == "reached"), key=lambda t: t["steps_to_target"])
        again = medians(study, row["batch_size"])
        assert fewest["learning_rate"] in again and row["median"] == min(again.values())
        assert row["learning_rate"] == study.best(row["batch_size"])["learning_rate"]
        assert len(row["steps"]) == SEEDS and row["resolution"] <= max(1, 0.03 * row["high"])
    assert len({t["id"] for t in study.trials()}) == len(study.trials())
    assert len({seed for row in study.rows() for seed in [0, *row["seeds"]]}) == 1 + SEEDS * len(SIZES)


def test_the_first_rate_is_the_planners_own_and_the_rest_fill_the_range(finished):
    study, _ = finished
    for size in SIZES:
        planned = make_plan(linear_job(), linear_facts(), batch_size=size).learning_rate
        first = searched(study, size)[0]
        assert first["learning_rate"] == pytest.approx(planned)
        assert (first["low_rate"], first["high_rate"]) == pytest.approx((planned / 4, planned * 4))


def test_the_summary_is_the_fit_of_the_fresh_runs_beside_the_prediction(finished):
    study, _ = finished
    rows = study.rows()
    pairs = [(row["batch_size"], steps) for row in rows for steps in row["steps"]]
    fit = fit_tradeoff([size for size, _ in pairs], [steps for _, steps in pairs])
    stored = Tradeoff.from_json(json.dumps(study.summary["tradeoff"]))
    assert stored == fit
    assert study.summary["predicted"]["value"] == linear_facts().noise_scale.value
    assert study.summary["ratio"] == pytest.approx(fit.b_crit.value / linear_facts().noise_scale.value)
    gains = [math.log(row["median"] / row["search_steps"]) for row in rows]
    assert study.summary["optimism"] == pytest.approx(math.exp(sum(gains) / len(gains)))
    assert study.summary["seconds"] == pytest.approx(sum(t["seconds"] for t in study.trials()))


def test_progress_ends_at_one_and_optuna_is_left_as_it_was(finished):
    _, seen = finished
    assert {phase for phase, _ in seen} == {"sweep"} and seen[-1][1] == 1.0
    assert all(0 < done <= 1 for _, done in seen)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def test_the_folder_is_strict_json_and_a_database(finished):
    study, _ = finished

    def refuse(text):
        raise AssertionError(f"not strict JSON: {text}")

    json.loads((study.path / "study.json").read_text(), parse_constant=refuse)
    for line in (study.path / "trials.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert {file.name for file in study.path.iterdir()} == {"study.json", "trials.jsonl", "study.db", "study.lock"}
    assert study.facts == linear_facts() and study.target == TARGET


def test_the_same_arguments_give_the_same_steps(finished, tmp_path):
    study, _ = finished
    again = quick(tmp_path / "again", batch_sizes=[16])
    timed = ("seconds",)
    expected = [{k: v for k, v in t.items() if k not in timed} for t in study.trials() if t["batch_size"] == 16]
    assert [{k: v for k, v in t.items() if k not in timed} for t in again.trials()] == expected


def test_a_second_call_runs_only_what_is_missing(tmp_path, monkeypatch):
    runs = []

    def counting(job, plan, **settings):
        runs.append(plan.batch_size)
        return run_trial(job, plan, **settings)

    monkeypatch.setattr(sweep_module, "run_trial", counting)
    first = quick(tmp_path, batch_sizes=[16], trials=2, seeds=1)
    assert len(runs) == 3
    quick(tmp_path, batch_sizes=[16], trials=2, seeds=1)
    assert len(runs) == 3
    wider = quick(tmp_path, batch_sizes=[64], trials=2, seeds=2)
    assert runs[3:] == [64] * 4 and [row["batch_size"] for row in wider.rows()] == [16, 64]
    assert wider.meta["created"] == first.meta["created"]
    quick(tmp_path, batch_sizes=[16, 64], trials=2, seeds=2)
    assert runs[7:] == [16]


def steps_of(study):
    return sorted(
        (t["batch_size"], t["kind"], t["learning_rate"], t["seed"], t["steps_to_target"]) for t in study.trials()
    )


def interrupted_at(call):
    """A loss that sends SIGINT to its own process at its `call`-th use."""
    count = 0

    def loss(module, batch):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGINT)
        return squared_error(module, batch)

    return loss


@pytest.mark.parametrize("call", [1, 300])
def test_sigint_leaves_a_study_that_goes_on(finished, tmp_path, call):
    with pytest.raises(Interrupted, match="sweep into .* again to go on") as caught:
        quick(tmp_path, job=linear_job(loss=interrupted_at(call)))
    assert caught.value.signum == signal.SIGINT
    study = Study.open(tmp_path)
    assert study.summary["status"] == "interrupted"
    assert [t["status"] for t in study.trials()].count("interrupted") == 1
    whole = quick(tmp_path)
    assert whole.summary["status"] == "finished"
    ended = [t for t in whole.trials() if t["status"] != "interrupted"]
    assert sorted((t["batch_size"], t["learning_rate"], t["seed"]) for t in ended) == sorted(
        (t["batch_size"], t["learning_rate"], t["seed"]) for t in finished[0].trials()
    )


def test_an_error_in_the_users_code_puts_the_trial_back(finished, tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(1)
        if len(calls) == 300:
            raise RuntimeError("the user's own")
        return squared_error(module, batch)

    with pytest.raises(RuntimeError, match="the user's own"):
        quick(tmp_path, job=linear_job(loss=loss))
    assert Study.open(tmp_path).summary["status"] == "interrupted"
    assert {t[:4] for t in steps_of(quick(tmp_path))} == {t[:4] for t in steps_of(finished[0])}


def _killed(out):
    calls = []

    def loss(module, batch):
        calls.append(1)
        if len(calls) == 400:
            os.kill(os.getpid(), signal.SIGKILL)
        return squared_error(module, batch)

    quick(out, job=linear_job(loss=loss))


def test_a_killed_workers_trial_is_run_by_the_next(finished, tmp_path):
    assert in_child(_killed, tmp_path) == -signal.SIGKILL
    half = Study.open(tmp_path)
    assert half.summary["status"] == "running" and half.trials()
    assert {t[:4] for t in steps_of(quick(tmp_path))} == {t[:4] for t in steps_of(finished[0])}


def _on_a_small_disk(out):
    import resource

    quick(out, batch_sizes=[4], trials=1, seeds=1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    room = max(file.stat().st_size for file in out.iterdir()) + 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    with pytest.raises(StorageError, match="the database of the trials refused|cannot write"):
        quick(out)


def test_a_full_disk_ends_it_with_an_error_and_keeps_what_was_written(tmp_path):
    assert in_child(_on_a_small_disk, tmp_path) == 0
    kept = Study.open(tmp_path).trials()
    assert len(kept) >= 2
    whole = quick(tmp_path)
    assert whole.summary["status"] == "finished" and whole.trials()[: len(kept)] == kept


def _worker(out):
    torch.set_num_threads(1)
    quick(out, seeds=3)


def test_two_workers_share_the_trials(tmp_path):
    workers = [FORK.Process(target=_worker, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    study = Study.open(tmp_path)
    assert study.summary["status"] == "finished"
    for row in study.rows():
        tried = searched(study, row["batch_size"])
        assert (len(tried) - TRIALS) in (0, 2, 4, 6)
        assert len({t["learning_rate"] for t in tried}) == len(tried)
        assert len(set(row["seeds"])) == 3


def test_machines_that_share_a_database_share_the_trials(finished, tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path}/shared.db"
    one = quick(tmp_path / "one", storage=storage, batch_sizes=[16], trials=2)
    monkeypatch.setattr(sweep_module, "run_trial", None)
    other = quick(tmp_path / "other", storage=storage, batch_sizes=[16], trials=2)
    assert other.trials() == one.trials() and other.rows() == one.rows()
    assert not (tmp_path / "one" / "study.db").exists()


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


def test_a_base_rate_far_too_low_is_mended_by_widening(tmp_path):
    study = quick(tmp_path, batch_sizes=[16], facts=linear_facts(base_learning_rate=2e-4), seeds=1)
    (row,) = study.rows()
    assert row["trials"] > TRIALS and row["learning_rate"] > 4 * 2e-4
    assert max(t["high_rate"] for t in study.trials()) > 4 * 4 * 2e-4


def test_divergence_is_recorded_and_never_wins(tmp_path):
    study = quick(tmp_path, batch_sizes=[16], facts=linear_facts(base_learning_rate=3.0), seeds=1)
    (row,) = study.rows()
    tried = searched(study, 16)
    assert row["diverged"] >= 3 and row["learning_rate"] < 1.0
    assert all(t["steps_to_target"] is None for t in tried if t["status"] == "diverged")
    assert min(t["low_rate"] for t in tried) < 3.0 / 4


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


def test_hopeless_trials_stop_at_twice_the_best(finished):
    study, _ = finished
    for size in SIZES:
        best = math.inf
        for tried in searched(study, size):
            assert tried["steps"] <= max(1.04 * 2 * best, 2 * best + 1) or best == math.inf
            if tried["status"] == "reached":
                best = min(best, tried["steps_to_target"])
            elif best < math.inf:
                assert tried["steps"] >= 2 * best


def test_a_target_out_of_reach_ends_well_and_says_so(tmp_path):
    target = Target("loss", 1e-6)
    facts = linear_facts(target=target, s_min=2.0)
    study = quick(tmp_path, job=linear_job(target=target), facts=facts, trials=2)
    assert all(t["status"] == "not reached" for t in study.trials())
    assert all(row["learning_rate"] is None and row["median"] is None for row in study.rows())
    assert study.summary["status"] == "finished" and study.summary["tradeoff"] is None
    assert "no trade-off was fitted" in study.summary["notes"][0]


def test_a_target_met_at_the_start_is_refused(tmp_path):
    target = Target("loss", 1e6)
    with pytest.raises(InputError, match=r"the target loss of 1e\+06 is met before any update"):
        quick(tmp_path, job=linear_job(target=target), facts=linear_facts(target=target))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [16, 201]}, "batch_sizes must be at most the data set's 200 examples, got 201"),
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"storage": "not a url"}, "storage must be a database URL, as in postgresql://user@host/name"),
        ({"storage": "oracle9://me:secret@host/db"}, r"storage oracle9://me:\*\*\*@host/db cannot be opened"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "storage sqlite:////nowhere/at/all.db cannot be opened"),
        ({"job": linear_job(optimizer="adamw")}, "facts were measured with the optimizer 'sgd', this job has 'adamw'"),
        ({"job": linear_job(target=Target("loss", 0.7))}, "facts were measured with the target"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        quick(tmp_path / "study", **changes)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"job": linear_job(name="other")}, "job"),
        ({"job": linear_job(target=Target("loss", 0.7)), "facts": linear_facts(target=Target("loss", 0.7))}, "target"),
    ],
)
def test_a_study_of_something_else_is_not_added_to(finished, changes, name):
    study, _ = finished
    before = (study.path / "study.json").read_bytes()
    with pytest.raises(InputError, match=f"holds a study of another {name}"):
        quick(study.path, **changes)
    assert (study.path / "study.json").read_bytes() == before


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


def test_a_maximised_metric_counts_downwards(tmp_path):
    def metric(module, batch):
        return {"score": -squared_error(module, batch)}

    target = Target("score", -TARGET.value, "max")
    study = quick(
        tmp_path,
        job=linear_job(target=target, metric=metric),
        facts=linear_facts(target=target),
        batch_sizes=[16],
        trials=2,
        seeds=1,
    )
    least = quick(tmp_path / "loss", batch_sizes=[16], trials=2, seeds=1)
    assert [t[4] for t in steps_of(study)] == [t[4] for t in steps_of(least)]


@pytest.mark.slow
def test_digits_need_fewer_steps_and_more_examples_as_the_batch_grows(tmp_path):
    """Sheet 08's miniature: an MLP 64-64-10, SGD with momentum, 5 % validation error, 12 rates, three fresh seeds."""
    from torch import nn

    from batchlab.workloads import digits

    target = Target("accuracy", 0.95, "max")

    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    job = dataclasses.replace(digits(optimizer="sgd", target=target), model=model)
    facts = linear_facts(
        target,
        job=job.name,
        examples=len(job.train),
        noise_scale=Estimate(50.0, 10.0, 250.0, "set by hand"),
        s_min=40.0,
        base_batch_size=64,
        base_learning_rate=0.03,
        micro_batches=(8, 64, 512),
    )
    study = sweep(job, batch_sizes="8..512", out=tmp_path, trials=12, seeds=3, facts=facts)
    rows = study.rows()
    assert [len(row["seeds"]) for row in rows] == [3] * 7
    for small, large in itertools.pairwise(rows):
        assert large["median"] <= small["median"] + small["resolution"]
    assert rows[-1]["examples"] >= 1.5 * rows[0]["examples"]
    assert study.summary["tradeoff"]["b_crit"]["value"] < 512
