"""Job, Target, Estimate, Facts, Plan: what they refuse, and that JSON goes both ways."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.facts import Estimate, Facts
from batchlab.core.job import Job, Target
from batchlab.core.jsonio import to_plain
from batchlab.core.plan import FrontierRow, Plan, Reason
from tests.spine.facts_fixture import exact, hand_facts
from tests.spine.jobs import squared_error, toy_data, toy_job, toy_plan

ANY_FLOAT = st.floats(allow_nan=False)


@given(value=st.floats(), ends=st.tuples(ANY_FLOAT, ANY_FLOAT), method=st.text(), coverage=st.floats(0.01, 0.99))
def test_estimates_go_round_as_strict_json(value, ends, method, coverage):
    estimate = Estimate(value, min(ends), max(ends), method, coverage)
    text = estimate.to_json()
    json.loads(text, parse_constant=pytest.fail)
    back = Estimate.from_json(text)
    assert repr(back) == repr(estimate) and (back == estimate or math.isnan(value))


def test_facts_go_round():
    facts = dataclasses.replace(
        hand_facts(), notes=("one",), noise_scale=Estimate(math.inf, 3.0, math.inf, "unbounded")
    )
    assert Facts.from_json(facts.to_json()) == facts


def test_plans_go_round():
    plan = dataclasses.replace(
        toy_plan(hyperparameters={"betas": (0.9, 0.95), "eps": 1e-8}),
        target=Target("loss", 0.5),
        predicted_steps=exact(12.0),
        frontier=(FrontierRow(64, 1, 10.0, 1.0, 1.0, True),),
        reasons={"batch_size": Reason("rule", "source", {"a": 1.5, "b": "x"}, 64)},
    )
    back = Plan.from_json(plan.to_json())
    assert back == plan and isinstance(back.hyperparameters["betas"], tuple)
    assert plan.explain()[0] == ("batch_size", "64", "rule; a = 1.5, b = x", "source")


def reasoned_plan():
    """A toy plan all of whose numbers have the reason "planned", the rate's by the batch and eps."""
    plan = toy_plan(hyperparameters={"eps": 1e-8}, noise_scale=exact(64.0), schedule_settings={"decay_share": 0.5})
    numbers = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)} | {"eps": 1e-8, "noise_scale": 64.0}
    for name in ("job", "goal", "optimizer", "target", "hyperparameters", "reasons", "frontier", "notes", "schema"):
        del numbers[name]
    inputs = {"learning_rate": {"batch_size": 64, "eps": 1e-8, "goal": "balanced", "b_crit": 7.0}}
    reasons = {name: Reason("planned", "paper", inputs.get(name, {}), value) for name, value in numbers.items()}
    return dataclasses.replace(plan, reasons=reasons)


def test_a_number_that_was_changed_says_that_it_was_given():
    plan = reasoned_plan()
    assert {reason.rule for reason in plan.reasons.values()} == {"planned"}
    changes = {"steps": 5, "noise_scale": exact(3.0), "hyperparameters": {"eps": 1e-7, "amsgrad": True}}
    changed = dataclasses.replace(plan, schedule="cosine", schedule_settings={}, **changes)
    given = {name: reason for name, reason in changed.reasons.items() if reason.rule != "planned"}
    assert given == {
        "steps": Reason("given by the user", "user", {"in_place_of": 20}, 5),
        "noise_scale": Reason("given by the user", "user", {"in_place_of": 64.0}, 3.0),
        "schedule": Reason("given by the user", "user", {"in_place_of": "constant"}, "cosine"),
        "schedule_settings": Reason("given by the user", "user", {"in_place_of": {"decay_share": 0.5}}, {}),
        "eps": Reason("given by the user", "user", {"in_place_of": 1e-8}, 1e-7),
        "amsgrad": Reason("given by the user", "user", {}, True),
    }
    again = dataclasses.replace(changed, steps=7)
    assert again.reasons["steps"] == Reason("given by the user", "user", {"in_place_of": 20}, 7)
    assert Plan.from_json(again.to_json()) == again
    edited = plan.to_json().replace('"learning_rate": 0.01', '"learning_rate": 0.02')
    assert Plan.from_json(edited).reasons["learning_rate"].inputs == {"in_place_of": 0.01}


def test_what_has_no_reason_was_given_where_others_have_one():
    few = dataclasses.replace(toy_plan(clip_norm=1.0), reasons={"steps": Reason("planned", "paper", {}, 20)})
    assert few.reasons["clip_norm"] == Reason("given by the user", "user", {}, 1.0)
    assert "ema_half_life" not in few.reasons and toy_plan(clip_norm=1.0).reasons == {}


def test_what_was_computed_from_a_number_that_is_another_by_now_says_so():
    changed = dataclasses.replace(reasoned_plan(), batch_size=32, hyperparameters={"eps": 1e-7}, goal="time")
    rules = {name: rule for name, _, rule, _ in changed.explain()}
    said = "planned; batch_size = 64 (now 32), eps = 1e-08 (now 1e-07), goal = balanced (now time), b_crit = 7"
    assert rules["learning_rate"] == said and "now" not in rules["micro_batch"]
    assert all("now" not in rule for _, _, rule, _ in reasoned_plan().explain())


def test_a_number_that_batchlab_changes_has_its_own_reason():
    plan = reasoned_plan()
    changed = plan.because("the ranks that there are", "batchlab", world_size=2, accumulation=plan.accumulation)
    reason = Reason("the ranks that there are", "batchlab", {"in_place_of": 1}, 2)
    assert changed.reasons == {**plan.reasons, "world_size": reason} and changed.world_size == 2
    assert toy_plan().because("anything", "batchlab", steps=3) == toy_plan(steps=3)


def test_a_plan_keeps_the_numbers_of_any_library_as_pythons():
    given = toy_plan(
        batch_size=np.int64(64),
        steps=torch.tensor(20),
        warmup_examples=np.uint8(5),
        learning_rate=np.float32(0.5),
        clip_norm=Fraction(1, 4),
        hyperparameters={"betas": (np.float16(0.5), np.float64(0.75)), "eps": np.float32(2**-20)},
        batch_settings={"end": np.int32(128)},
        target=Target("loss", np.float32(0.5)),
    )
    settings = {"batch_settings": {"end": 128}, "hyperparameters": {"betas": (0.5, 0.75), "eps": 2**-20}}
    plain = toy_plan(steps=20, warmup_examples=5, learning_rate=0.5, clip_norm=0.25, **settings)
    plain = dataclasses.replace(plain, target=Target("loss", 0.5))
    assert (
        repr(given) == repr(plain) and given.to_json() == plain.to_json() and Plan.from_json(given.to_json()) == given
    )


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 5.0, np.float64(5), "5", [5]])
@pytest.mark.parametrize("name", ["batch_size", "steps", "warmup_examples"])
def test_what_is_no_integer_is_no_count_of_a_plan(name, value):
    with pytest.raises(InputError, match=f"^plan {name} "):
        dataclasses.replace(toy_plan(), **{name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "plan.json is not valid JSON"),
        ("[]", "plan.json: expected an object for Plan, got list"),
        ("{}", "plan.json: Plan lacks the field 'accumulation'"),
        ('{"nonsense": 1}', "plan.json: Plan has no field 'nonsense'"),
        ("[" * 100_000, "plan.json is not valid JSON"),
        ("1" * 10_000, "plan.json"),
    ],
)
def test_what_is_no_plan_is_said(text, message):
    with pytest.raises(InputError, match=message):
        Plan.from_json(text, source="plan.json")


@pytest.mark.parametrize("field", ["batch_size", "learning_rate", "schedule", "target", "frontier"])
@given(junk=st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)))
def test_a_wrong_value_is_refused_by_name_or_is_a_value(field, junk):
    plain = json.loads(toy_plan().to_json()) | {field: junk}
    try:
        plan = Plan.from_json(json.dumps(plain))
    except InputError as error:
        assert field in str(error)
    else:
        assert Plan.from_json(plan.to_json()) == plan


def test_a_newer_schema_is_refused():
    with pytest.raises(InputError, match="a plan of schema 99 comes from a newer batchlab; this one reads up to 1"):
        Plan.from_json(json.dumps(json.loads(toy_plan().to_json()) | {"schema": 99}))
    with pytest.raises(InputError, match="facts of schema 99 come from a newer batchlab"):
        Facts.from_json(json.dumps(json.loads(hand_facts().to_json()) | {"schema": 99}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "plan batch_size must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "plan steps must be an integer of at least 1, got 2.5"),
        ({"world_size": 100}, "plan batch_size 64 is smaller than world_size 100"),
        ({"learning_rate": math.nan}, "plan learning_rate must be finite and > 0, got nan"),
        ({"ema_half_life": 0.0}, "plan ema_half_life must be finite and > 0 examples, got 0.0"),
        ({"average_power": -1.0}, "plan average_power must be finite and >= 0, got -1.0"),
        ({"average_power": 1.0, "ema_half_life": 5.0}, "plan ema_half_life and average_power are two averages"),
        ({"warmup_examples": -1}, "plan warmup_examples must not be negative, got -1"),
        ({"warmup_examples": 1e3}, "plan warmup_examples must be int, got 1000.0"),
        ({"min_batch_size": 0}, "plan min_batch_size must be an integer of at least 1, got 0"),
        ({"max_batch_size": 1e3}, "plan max_batch_size must be an integer of at least 1, got 1000.0"),
        ({"batch_schedule": "adaptve"}, r"plan batch_schedule must be one of \['fixed', 'adaptive', .* got 'adaptve'"),
        ({"goal": "foo"}, r"plan goal must be one of \['time', 'cost', 'balanced', 'probe'\], got 'foo'"),
        ({"predicted_step_seconds": -1.0}, "plan predicted_step_seconds must be finite and > 0, got -1.0"),
        ({"learning_rate_rule": "root"}, "plan learning_rate_rule must be one of .* got 'root'"),
        ({"precision": "fp16"}, r"plan precision must be one of \['float32', 'bf16'\], got 'fp16'"),
        ({"batch_settings": None}, "plan batch_settings must be an object, got None"),
        ({"batch_settings": {"share": math.sqrt}}, "plan batch_settings cannot be written as JSON: builtin_function"),
    ],
)
def test_plans_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        toy_plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "job name must be a non-empty string, got ''"),
        ({"model": 3}, "job model must be callable, got 3"),
        ({"metric": 3}, "job metric must be callable or None, got 3"),
        ({"train": iter([])}, "job train must be a map-style data set with len"),
        ({"valid": []}, "job valid data set is empty"),
        ({"unit": "word"}, 'job unit must be "example" or "token", got \'word\''),
        ({"units_per_example": 0}, "job units_per_example must be at least 1, got 0"),
        ({"target": 0.9}, "job target must be a batchlab.Target, got 0.9"),
    ],
)
def test_jobs_that_cannot_be(changes, message):
    settings = {"name": "j", "model": lambda: None, "loss": squared_error, "train": toy_data(4), "valid": toy_data(4)}
    with pytest.raises(InputError, match=message):
        Job(**(settings | changes))


def test_nouns_are_frozen():
    for noun, field in ((toy_job(), "name"), (toy_plan(), "steps"), (Target("a", 1.0), "value"), (exact(1.0), "low")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(noun, field, 1)


def test_the_target():
    assert Target("loss", 0.5).reached(0.5) and not Target("loss", 0.5).reached(math.nan)
    assert Target("accuracy", 0.5, "max").reached(0.5) and not Target("accuracy", 0.5, "max").reached(math.nan)
    with pytest.raises(InputError, match='target direction must be "min" or "max"'):
        Target("loss", 0.5, "down")
    with pytest.raises(InputError, match="target value must be finite, got nan"):
        Target("loss", math.nan)


def test_step_time_is_passes_and_one_update():
    facts = hand_facts(pass_seconds=1e-3, example_seconds=1e-3, update_seconds=5e-3, micro_batches=(8, 16, 32))
    assert facts.step_time(32) == pytest.approx(0.038)
    assert facts.step_time(72, micro_batch=32) == pytest.approx(2 * 0.033 + 0.009 + 0.005)
    assert facts.step_time(64, devices=4) == facts.step_time(16)
    assert facts.micro_batch_seconds(24) == pytest.approx(0.025)
    for wrong in (0, 33):
        with pytest.raises(InputError, match=r"examples must lie in 1..32 \(max_micro_batch\)"):
            facts.micro_batch_seconds(wrong)
    with pytest.raises(InputError, match="batch_size must be at least devices"):
        facts.step_time(3, devices=4)


def test_bad_input_is_a_value_error_and_ours():
    assert issubclass(InputError, ValueError) and issubclass(InputError, BatchlabError)
    with pytest.raises(InputError, match="coverage must lie in"):
        Estimate(1.0, 0.0, 2.0, "x", coverage=1.0)
    with pytest.raises(InputError, match="an interval's low must not exceed its high"):
        Estimate(1.0, 3.0, 2.0, "x")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_FLOAT | st.text() | st.sampled_from(["inf", "-inf", "nan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("text"), inner, max_size=3),
    max_leaves=5,
)


@given(inputs=st.dictionaries(st.text() | st.just("text"), anything, max_size=3), value=anything)
@example(inputs={"noise_scale": math.inf, "said": "inf", "text": "nan"}, value=-math.inf)
@example(inputs={}, value={"text": "inf"})
def test_a_reasons_inputs_go_round_whatever_they_are(inputs, value):
    reason = Reason("inf", "nan", inputs, value)
    text = reason.to_json()
    json.loads(text, parse_constant=pytest.fail)
    assert Reason.from_json(text) == reason and '"rule": "inf"' in text


def test_a_reasons_nan_comes_back_as_a_number():
    assert math.isnan(Reason.from_json(Reason("r", "s", {}, math.nan).to_json()).value)


def test_numpys_numbers_are_written_as_pythons():
    row = FrontierRow(np.int64(64), np.int32(1), np.float32(10.5), np.float64(1.0), 1.0)
    assert FrontierRow.from_json(row.to_json()) == row == FrontierRow(64, 1, 10.5, 1.0, 1.0)
    plain = to_plain({"a": np.float32(math.inf), "b": [np.int8(3)], "c": np.float64(0.5)})
    assert plain == {"a": "inf", "b": [3], "c": 0.5}
    assert type(plain["b"][0]) is int and type(plain["c"]) is float


def test_a_plan_keeps_every_kind_of_hyperparameter():
    settings = {"weight_decay": 0.1, "ns_steps": 5, "nesterov": True, "state_dtype": "8bit", "clamp": None}
    settings |= {"betas": (0.9, 0.99), "three": (0.9, 0.99, 0.999)}
    plan = toy_plan(hyperparameters=settings)
    read = Plan.from_json(plan.to_json()).hyperparameters
    assert read == settings and list(map(type, read.values())) == list(map(type, settings.values()))
