"""The sweep on a linear model: sizes searched and confirmed, the summary, divergence, edges, a target out of reach."""

import dataclasses
import itertools
import json
import math
import statistics

import optuna
import pytest

from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.measure.runs.tradeoff import Tradeoff, fit_tradeoff
from batchlab.spine.plan import plan as make_plan
from batchlab.spine.sweep import sweep
from tests.spine.sweep_jobs import (
    SEEDS,
    SIZES,
    TARGET,
    TRIALS,
    linear_facts,
    linear_job,
    quick,
    searched,
    squared_error,
    steps_of,
)
from tests.spine.sweep_jobs import finished as finished


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
