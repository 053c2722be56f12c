"""The plan: every number has its reason, what moves with the batch, what is given and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Reference
from batchlab.core.job import Target
from batchlab.core.plan import Plan
from batchlab.rules import learning_rate as lr_rules
from batchlab.rules import weight_decay
from batchlab.spine.plan import plan
from tests.spine.facts_fixture import exact, hand_facts, hand_job

UNKNOWN = Estimate(math.nan, -math.inf, math.inf, "no signal in 12 updates")
CASES = {
    "balanced": ({}, {}),
    "time on 64": ({}, {"goal": "time", "devices": 64}),
    "cost on 3": ({}, {"goal": "cost", "devices": 3}),
    "batch given": ({}, {"batch_size": 200, "devices": 8}),
    "sgd": ({"optimizer": "sgd"}, {}),
    "adam": ({"optimizer": "adam"}, {}),
    "rmsprop": ({"optimizer": "rmsprop"}, {}),
    "noise unknown": ({"noise_scale": UNKNOWN}, {"devices": 4}),
    "noise unbounded": ({"noise_scale": Estimate(64.0, 10.0, math.inf, "short run")}, {}),
    "target not reached": ({"reached": False}, {}),
}


def made(facts_changes=None, plan_changes=None):
    facts = hand_facts(**(facts_changes or {}))
    return plan(hand_job(optimizer=facts.optimizer, examples=facts.train_examples), facts, **(plan_changes or {}))


def numbers(plain, name=""):
    """The names of the fields that hold a number, the hyperparameters among them."""
    for key, value in plain.items():
        if key in ("schema", "target", "reasons", "frontier") or value == {}:
            continue
        if key == "hyperparameters":
            yield from numbers(value)
        elif isinstance(value, dict) or (isinstance(value, (int, float, list)) and not isinstance(value, bool)):
            yield key


@pytest.mark.parametrize("case", CASES)
def test_every_number_has_its_reason(case):
    result = made(*CASES[case])
    plain = json.loads(result.to_json())
    named = set(numbers(plain)) - {"notes"}
    assert named <= set(result.reasons)
    assert {"batch_size", "steps", "learning_rate", "weight_decay", "warmup_examples", "evaluate_every"} <= (
        named | {"weight_decay"}
    )
    for name in named:
        reason, value = plain["reasons"][name], plain.get(name, plain["hyperparameters"].get(name))
        assert reason["rule"] and reason["source"]
        assert reason["value"] == (value["value"] if isinstance(value, dict) else value)
    assert len(result.explain()) == len(result.reasons)
    assert all("given" not in rule or case == "batch given" for _, _, rule, _ in result.explain())
    assert all("(now" not in rule for _, _, rule, _ in result.explain())


def test_what_is_given_after_the_plan_says_so_and_what_follows_from_it_says_from_what():
    given = dataclasses.replace(made({"optimizer": "ademamix"}), steps=30, schedule="cosine", batch_schedule="adaptive")
    rows = {name: (value, rule) for name, value, rule, _ in given.explain()}
    assert rows["steps"][0] == "30" and rows["steps"][1].startswith("given by the user; in_place_of = ")
    assert rows["schedule"] == ("cosine", "given by the user; in_place_of = constant")
    assert rows["batch_schedule"] == ("adaptive", "given by the user; in_place_of = fixed")
    assert rows["alpha_warmup"][1].endswith("(now 30)")
    rules = {name: rule for name, _, rule, _ in dataclasses.replace(made(), batch_size=64).explain()}
    for name in ("learning_rate", "weight_decay", "predicted_steps"):
        assert "batch_size = 16 (now 64)" in rules[name]


def test_the_noise_is_measured_as_seldom_as_makes_it_cheap():
    def every(seconds, **changes):
        cost = None if seconds is None else exact(seconds)
        return made({"noise_seconds": cost, "s_min": 1000.0, "example_seconds": 1e-4} | changes)

    free, dear, unknown = every(0.0), every(2e-3), every(None)
    assert free.noise_every == unknown.noise_every == 1 and free.measure_noise
    share = dear.accumulation * 2e-3 / (dear.noise_every * dear.predicted_step_seconds)
    assert share <= 0.01 < share * dear.noise_every / (dear.noise_every - 1)
    assert every(10.0).noise_every == math.floor(every(10.0).predicted_steps.value / 30)


@pytest.mark.parametrize("case", CASES)
def test_json_round_trip_and_determinism(case):
    result = made(*CASES[case])
    assert Plan.from_json(result.to_json()) == result
    assert made(*CASES[case]) == result


@pytest.mark.parametrize("case", CASES)
def test_shape_of_the_plan(case):
    result = made(*CASES[case])
    share = math.ceil(result.batch_size / result.world_size)
    assert result.micro_batch <= min(share, 256)
    assert (result.accumulation - 1) * result.micro_batch < share <= result.accumulation * result.micro_batch
    assert result.measure_noise == (result.accumulation * result.world_size > 1)
    picked = [row for row in result.frontier if row.picked]
    assert [(row.batch_size, row.devices) for row in picked] == [(result.batch_size, result.world_size)]
    assert result.min_batch_size <= result.batch_size <= result.max_batch_size <= 4096
    assert result.checkpoint_every % result.evaluate_every == 0
    assert result.steps == math.ceil(4 * picked[0].steps)


def test_one_device_takes_the_fastest_batch():
    """t₀ = 4 ms, c = 1 ms, B_crit = 64: B = √(4·64) = 16, for every goal."""
    for goal in ("time", "cost", "balanced"):
        assert made({}, {"goal": goal}).batch_size == 16


def test_balanced_with_devices_to_spare_takes_the_knee():
    result = made({}, {"devices": 64})
    assert (result.batch_size, result.world_size) == (64, 16)
    assert "16 of 64 devices serve this goal best" in result.notes


def test_goals_order_time_and_cost():
    rows = {
        goal: next(r for r in made({}, {"goal": goal, "devices": 64}).frontier if r.picked)
        for goal in ("time", "balanced", "cost")
    }
    assert rows["time"].time < rows["balanced"].time < rows["cost"].time
    assert rows["time"].cost > rows["balanced"].cost > rows["cost"].cost


def test_given_batch_is_taken_on_all_devices():
    result = made({}, {"batch_size": 200, "devices": 8})
    assert (result.batch_size, result.world_size) == (200, 8)
    assert result.reasons["batch_size"].rule == "given by the user"
    far = made({}, {"batch_size": 4000})
    assert any("lies outside 4..1024" in note for note in far.notes)


def test_learning_rate_is_the_rules_from_the_base():
    adam = made({}, {"batch_size": 256})
    assert adam.learning_rate == pytest.approx(1e-3 * ((1 + 64 / 32) / (1 + 64 / 256)) ** 0.5, rel=1e-12)
    assert adam.learning_rate_rule == "saturating_sqrt"
    sgd = made({"optimizer": "sgd"}, {"batch_size": 256})
    assert sgd.learning_rate == lr_rules.saturating_sqrt(1e-3, 32, 256, noise_scale=64.0)
    assert sgd.hyperparameters["momentum"] == 0.9


def test_batchlabs_own_optimizers_are_planned_by_their_rules():
    slow = made({"optimizer": "ademamix"}, {"batch_size": 256})
    assert (slow.hyperparameters["alpha_warmup"], slow.hyperparameters["beta3_warmup"]) == (slow.steps, slow.steps)
    assert slow.learning_rate_rule == "saturating_sqrt" and slow.reasons["alpha"].source == "batchlab"
    muon = made({"optimizer": "muon"}, {"batch_size": 256})
    assert muon.hyperparameters["weight_decay"] != 0.1 and muon.reasons["weight_decay"].source.startswith("Bergsma")
    assert made({"optimizer": "lars"}, {"batch_size": 256}).hyperparameters["weight_decay"] == 5e-4


def test_at_the_base_nothing_moves():
    result = made({}, {"batch_size": 32})
    assert result.learning_rate == 1e-3 and result.warmup_examples == 0
    assert result.hyperparameters["weight_decay"] == pytest.approx(0.01, rel=1e-12)
    assert result.predicted_steps.value == 300


def test_weight_decay_keeps_its_timescale():
    taus = []
    for size in (8, 32, 64, 512):
        result = made({}, {"batch_size": size})
        taus.append(
            weight_decay.timescale(
                batch_size=size,
                learning_rate=result.learning_rate,
                weight_decay=result.hyperparameters["weight_decay"],
                total_examples=result.predicted_steps.value * size,
            )
        )
    assert taus == pytest.approx([taus[0]] * 4, rel=1e-12)
    assert made({"optimizer": "adam"}, {"batch_size": 512}).hyperparameters["weight_decay"] == 0


def test_warm_up_and_average_are_those_of_the_reference_run():
    facts = hand_facts()
    reference = dataclasses.replace(facts.reference, warmup_examples=480, average_power=4.0)
    for size in (16, 64, 512):
        result = plan(hand_job(), dataclasses.replace(facts, reference=reference), batch_size=size)
        assert (result.warmup_examples, result.average_power) == (480, 4.0)
        assert result.reasons["average_power"].value == 4.0


def test_unknown_noise_stays_at_the_base():
    result = made({"noise_scale": UNKNOWN})
    assert result.batch_size == 32 and result.noise_scale is None
    assert result.learning_rate == 1e-3 and result.learning_rate_rule == "sqrt"
    assert any("no signal in 12 updates" in note for note in result.notes)
    assert made({"noise_scale": UNKNOWN, "optimizer": "sgd"}, {"batch_size": 64}).learning_rate == pytest.approx(
        2**0.5 / 1e3
    )


def test_unreached_target_is_said():
    result = made({"reached": False})
    assert result.predicted_steps is None
    assert any("300 updates stand for the steps to the target, which it did not reach" in note for note in result.notes)


def test_noise_is_measured_where_splitting_is_cheap():
    cheap = made({"pass_seconds": 0.0}, {"batch_size": 64})
    dear = made({"pass_seconds": 0.05}, {"batch_size": 64})
    assert cheap.measure_noise and cheap.accumulation >= 2
    assert not dear.measure_noise and (dear.micro_batch, dear.accumulation) == (64, 1)


def test_share_larger_than_memory_is_accumulated():
    result = made({"pass_seconds": 1e-3, "micro_batches": (1, 8, 32)}, {"batch_size": 500, "devices": 2})
    assert (result.micro_batch, result.accumulation) == (32, 8)


def test_more_devices_than_examples():
    result = made({"examples": 40}, {"goal": "time", "devices": 64})
    assert result.world_size == 32 and result.batch_size <= 40


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"goal": "speed"}, r"goal must be one of \['balanced', 'cost', 'time'\], got 'speed'"),
        ({"devices": 0}, "devices must be an integer of at least 1, got 0"),
        ({"devices": 1.5}, "devices must be an integer of at least 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"batch_size": math.nan}, "batch_size must be an integer of at least 1, got nan"),
        ({"batch_size": 5000}, r"batch_size must lie in 1\.\.4096, .*no more than the data set holds, got 5000"),
        ({"batch_size": 4, "devices": 8}, r"batch_size must lie in 8\.\.4096, an example for each device"),
    ],
)
def test_bad_arguments(changes, text):
    with pytest.raises(InputError, match=text):
        made({}, changes)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        ({"name": "other"}, "facts were measured with the name 'by hand', this job has 'other': probe it again"),
        ({"optimizer": "sgd"}, "facts were measured with the optimizer 'adamw', this job has 'sgd'"),
        ({"examples": 10}, "facts were measured with the number of train examples 4096, this job has 10"),
        ({"target": Target("loss", 0.1)}, "facts were measured with the target Target"),
    ],
)
def test_facts_of_another_job(job, text):
    with pytest.raises(InputError, match=text):
        plan(hand_job(**job), hand_facts())


def test_target_met_untrained():
    facts = dataclasses.replace(hand_facts(), reference=Reference(32, 1e-3, 10, 1.0, 0, ((0, 0.1),)))
    with pytest.raises(InputError, match="the target is met before any training"):
        plan(hand_job(), facts)


def test_exact_noise_scale_gives_an_interval_of_the_evaluations_and_the_seeds_alone():
    alike = dataclasses.replace(hand_facts().reference, steps_by_seed=(300,) * 4)
    found = made({"noise_scale": exact(64.0), "reference": alike}, {"batch_size": 64}).predicted_steps
    assert found.high == found.value == pytest.approx(200)
    assert found.low == pytest.approx(200 * 291 / 300)


def test_all_devices_are_used_where_they_are_there_already():
    facts = {"examples": 8192, "s_min": 100.0}
    assert made(facts, {"devices": 16, "goal": "cost"}).world_size == 1
    assert made(facts, {"devices": 16, "goal": "cost", "all_devices": True}).world_size == 16
    many = made(facts, {"devices": 5000, "all_devices": True})
    assert many.world_size == many.batch_size == 5000  # more devices than the rules would give examples
    assert made(facts, {"all_devices": True}).frontier == made(facts).frontier
    with pytest.raises(InputError, match="devices must be at most the data set's 64 examples, got 100"):
        made({"examples": 64}, {"devices": 100, "all_devices": True})


def test_integers_of_numpy_are_integers():
    given, numpys = (
        plan(hand_job(), hand_facts(), batch_size=64),
        plan(hand_job(), hand_facts(), batch_size=np.int64(64)),
    )
    assert numpys.to_json() == given.to_json()


def test_a_model_that_normalises_over_the_batch_gets_as_much_as_fits_at_once():
    """A micro-batch is part of what such a model computes; others take the sizes that are the fastest."""
    facts = hand_facts(micro_batches=(2, 8, 32))
    for size, micro in ((32, 32), (64, 32), (80, 27)):
        normalised = plan(hand_job(), dataclasses.replace(facts, batch_norm=True), batch_size=size)
        assert normalised.micro_batch == micro and normalised.accumulation == math.ceil(size / 32)
        assert "batch normalisation" in normalised.reasons["micro_batch"].rule
    assert "batch normalisation" not in plan(hand_job(), facts, batch_size=64).reasons["micro_batch"].rule


@pytest.mark.parametrize("goal", ["time", "cost", "balanced"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("all_devices", [False, True])
def test_batch_normalisation_has_two_examples_of_each_device(goal, devices, all_devices):
    facts = dataclasses.replace(hand_facts(noise_scale=exact(1.0)), batch_norm=True)
    made = plan(hand_job(), facts, devices=devices, goal=goal, all_devices=all_devices)
    assert all(row.batch_size >= 2 * row.devices for row in made.frontier)
    assert made.batch_size >= 2 * made.world_size and (made.world_size == devices or not all_devices)
    assert plan(hand_job(), facts, devices=devices, batch_size=devices).batch_size == devices  # what is asked for
