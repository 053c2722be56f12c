"""What is said of a plan before it is run, with its numbers; and that it is said of the run's present length."""

import dataclasses
import re

import pytest

from batchlab.core.facts import Estimate
from batchlab.core.job import Target
from batchlab.core.plan import Plan, Reason
from batchlab.core.run import Run
from batchlab.spine.batch_control import make_controller
from batchlab.spine.foreseen import MOVES, foreseen
from batchlab.spine.headline import outcome, verdict
from batchlab.spine.learner import Learner
from batchlab.spine.plan import plan
from batchlab.spine.train import train
from tests.spine.facts_fixture import hand_facts, hand_job
from tests.spine.jobs import toy_job, toy_plan

FIVE = {"target": Target("loss", 0.0), "predicted_steps": Estimate(5.0, 4.0, 6.0, "given")}  # 320 of 1,280 examples
RAMP = {"batch_schedule": "ramp", "batch_settings": {"end": 128, "over": 1280}}
SIZES = {"batch_schedule": "milestones", "batch_settings": {"sizes": [[320, 128], [321, 64], [1279, 32]]}}


def said(**changes):
    made = toy_plan(**changes)
    return [note for note in foreseen(made, make_controller(made, 256, 1)) if note != MOVES]


def test_a_warm_up_that_outlasts_the_run_or_the_target_is_said():
    assert said(warmup_examples=1280) == said(warmup_examples=320, **FIVE) == said() == said(**FIVE) == []
    assert said(warmup_examples=1281) == [
        "the warm-up takes 1,281 examples and the run has 1,280: the learning rate never comes to its peak"
    ]
    assert said(warmup_examples=321, **FIVE) == [
        "the warm-up takes 321 examples, more than the 320 after which the target is predicted to be met: "
        "the rate still rises then"
    ]


@pytest.mark.parametrize("none", [{"target": None}, {"predicted_steps": None}])
def test_what_is_not_predicted_is_held_against_the_runs_end_alone(none):
    assert said(**FIVE | {"warmup_examples": 321} | none) == said(**RAMP | FIVE | none) == []


def test_a_run_shorter_than_predicted_is_held_against_its_own_end():
    (note,) = said(**FIVE | {"warmup_examples": 321, "steps": 5})
    assert "the run has 320" in note


@pytest.mark.parametrize(("schedule", "share"), [("linear", "75%"), ("cosine", "85%"), ("wsd", "100%")])
def test_how_far_a_schedule_is_where_the_target_is_predicted(schedule, share):
    assert said(schedule=schedule, **FIVE) == [
        f"the schedule {schedule!r} is laid over all 1,280 examples; at 320, after which the target is predicted to be "
        f"met, the rate is {share} of its peak: with fewer steps it would be further on"
    ]
    assert said(schedule=schedule) == said(schedule=schedule, **FIVE | {"steps": 5}) == []


def test_points_after_the_predicted_end_are_said():
    end = "examples: a batch that stays is predicted to meet the target after 320, and ends there"
    assert said(**RAMP, **FIVE) == [f"the ramp's end at 1,280 {end}"]
    assert said(**SIZES, **FIVE) == [f"milestone 2 at 321, milestone 3 at 1,279 {end}"]
    assert said(**RAMP) == said(**SIZES) == []
    assert foreseen(toy_plan(**RAMP, **FIVE)) == [MOVES] and foreseen(toy_plan(**RAMP)) == []


ADAPTIVE = {"batch_schedule": "adaptive", "noise_scale": Estimate(64.0, 50.0, 80.0, "given")}
WAITS = "batch_schedule 'adaptive' waits"


@pytest.mark.parametrize(
    ("changes", "patience", "note"),
    [
        ({"steps": 60}, 20, None),
        ({"steps": 600, **FIVE}, 1, "1 update before it changes the batch, not the usual 20, for about 5 are expected"),
        ({"steps": 15}, 5, "5 updates before it changes the batch, not the usual 20, for about 15 are expected"),
        ({"steps": 1}, 1, "1 update before it changes the batch, and the run has 1: the batch never moves"),
        ({"steps": 15, "batch_settings": {"patience": 15}}, 15, "15 updates .* the run has 15: the batch never moves"),
        ({"steps": 16, "batch_settings": {"patience": 15}}, 15, None),
        ({**FIVE, "batch_settings": {"patience": 5}}, 5, "5 updates .* predicted to be met after 5: it may never move"),
        ({"batch_schedule": "goodput", "steps": 12}, 6, "6 updates before it changes the batch, not the usual 20"),
        ({"batch_schedule": "goodput", "steps": 6}, 6, "6 updates .* the run has 6: the batch never moves"),
        ({"batch_schedule": "norm_test"}, 1, None),
    ],
)
def test_the_patience_fits_the_run_and_is_said(changes, patience, note):
    made = toy_plan(**ADAPTIVE | changes)
    controller = make_controller(made, 256, 1)
    notes = [each for each in foreseen(made, controller) if each != MOVES]
    assert controller.patience == patience and len(notes) == (note is not None)
    if note is not None:
        assert re.match(WAITS.replace("adaptive", made.batch_schedule) + " " + note, notes[0])


def test_an_adaptive_batch_moves_in_a_run_of_fifteen_updates():
    made = toy_plan(**ADAPTIVE | {"steps": 15, "noise_scale": Estimate(1.0, 0.5, 2.0, "given")})
    learner = Learner(toy_job(), made, device="cpu")
    sizes = [learner.update().batch_size for _ in range(15)]
    assert sizes[:5] == [64] * 5 and sizes[5] > 64


def test_a_plan_says_it_of_its_own_warm_up():
    facts = hand_facts(s_min=10.0)
    reference = dataclasses.replace(facts.reference, warmup_examples=4000)
    made = plan(hand_job(), dataclasses.replace(facts, reference=reference))
    assert any("the warm-up takes 4,000 examples and the run has" in note for note in made.notes)
    assert not any("warm-up" in note for note in plan(hand_job(), facts).notes)


def test_a_run_says_it_of_the_length_that_it_has(tmp_path):
    made = toy_plan(steps=5, warmup_examples=400, notes=("planned",))
    first = train(toy_job(), made, out=tmp_path / "r", device="cpu").plan
    assert first.notes[0] == "planned" and "the run has 320" in first.notes[1]
    for given in (first, made):
        longer = train(toy_job(), dataclasses.replace(given, steps=6), out=tmp_path / "r", device="cpu", resume=True)
        assert [note for note in longer.plan.notes if "warm-up" in note] == [
            "the warm-up takes 400 examples and the run has 384: the learning rate never comes to its peak"
        ]
    whole = train(toy_job(), dataclasses.replace(first, steps=8), out=tmp_path / "r", device="cpu", resume=True)
    assert whole.plan.notes[0] == "planned" and Run.open(tmp_path / "r").plan == whole.plan


def test_what_was_foreseen_of_the_planned_length_is_not_said_of_another(tmp_path):
    planned = toy_plan(steps=4, warmup_examples=300, reasons={"steps": Reason("4 x the predicted", "rule", {}, 4)})
    planned = dataclasses.replace(planned, notes=("kept", *foreseen(planned)))
    assert len(planned.notes) == 2
    run = train(toy_job(), dataclasses.replace(planned, steps=6), out=tmp_path / "r", device="cpu")
    assert run.plan.notes == ("kept",) and run.plan.reasons["steps"].value == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 512, "accumulation": 8}, "batch size {batch_size}"),
        ({"learning_rate": 0.5}, "a learning rate of {learning_rate:.4g}"),
        ({"optimizer": "lamb"}, "adamw"),
        ({"target": Target("loss", 0.01)}, "{target}"),
        ({"optimizer": "lamb", "learning_rate": 0.5}, "a learning rate of {learning_rate:.4g} and adamw"),
    ],
)
def test_what_was_given_since_has_no_prediction(change, said):
    planned = plan(hand_job(), hand_facts())
    assert planned.prediction is not None and not planned.predicted_for
    again = Plan.from_json(planned.to_json())
    assert again.prediction == planned.prediction
    other = dataclasses.replace(again, **change)
    assert other.prediction is None and set(other.predicted_for) == set(change) - {"accumulation"}
    said = said.format(**{name: getattr(planned, name) for name in ("batch_size", "learning_rate", "target")})
    assert f"the predicted steps and time are for {said}, not for this run's" in foreseen(other)
    summary = {"status": "reached", "steps": 9, "seconds": 1.0, "target_step": 9, "target_seconds": 1.0}
    if other.target is not None:
        assert verdict(other, summary).text.endswith(f"the prediction is for {said}, not for this run's.")
        lines = {name: remark for name, _, remark in outcome(other, summary)}
        assert lines["Predicted steps to target"].endswith(f"for {said}, not for this run's")
