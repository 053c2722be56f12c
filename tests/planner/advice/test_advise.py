"""Advice: every rule's own number, both definitions of a critical batch in agreement, and which rule is believed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.advice import Advice, Answer, advise
from batchlab.planner.advice.nouns import CHEAP, CRITICAL, DECAY, LEAST_LOSS, LOSS, MEMORY, RATE, STEPS
from batchlab.rules import batch, learning_rate, loss, weight_decay

SEVEN = {"params": 7e9, "tokens": 300e9}
CHINCHILLA = {"params": 302e6, "tokens": 6.04e9}
TUNED = {"learning_rate": 3e-4, "base_batch_tokens": 2.0**19}


def answer(advice, question, rule):
    (found,) = [a for a in advice.answers if (a.question, a.rule) == (question, rule)]
    return found


def refused(advice, rule):
    return [each.why for each in advice.not_asked if each.rule == rule]


def test_each_answer_is_its_rules_own():
    told = advise(**CHINCHILLA)
    wanted = {
        (LEAST_LOSS, "power_lines_opt"): batch.power_lines_opt(tokens=6.04e9).tokens,
        (LEAST_LOSS, "data_budget"): batch.data_budget(tokens=6.04e9).tokens,
        (LEAST_LOSS, "diloco_batch"): batch.diloco_opt(params=302e6).tokens,
        (CRITICAL, "power_lines_crit"): batch.power_lines_crit(least_tokens=3.02e9).tokens,
        (CHEAP, "data_cbs"): batch.data_cbs(tokens=6.04e9).tokens,
        (CHEAP, "chinchilla_cbs"): batch.chinchilla_cbs(params=302e6).tokens,
        (LOSS, "diloco_loss"): loss.diloco(params=302e6).nats,
    }
    for (question, rule), value in wanted.items():
        assert answer(told, question, rule).value == value, rule


def test_a_loss_that_was_given_goes_to_the_laws_that_need_one():
    told = advise(**CHINCHILLA, loss=3.0)
    said = answer(told, CRITICAL, "kaplan_cbs")
    assert said.value == batch.kaplan_cbs(loss=3.0).tokens and said.outside == ""
    assert "of another tokenizer" in answer(advise(**CHINCHILLA), CRITICAL, "kaplan_cbs").outside


@given(st.floats(8e7, 1e10), st.floats(12, 38))
def test_the_two_definitions_agree(params, ratio):
    """Tokens go as 1 + B/B_crit: at B* they are 1.2 times those at 256 sequences of 512."""
    told = advise(params=params, tokens=ratio * params)
    for critical in [a for a in told.answers if a.question == CRITICAL]:
        cheap = answer(told, CHEAP, critical.rule).value
        overhead = (1 + cheap / critical.value) / (1 + 256 * 512 / critical.value)
        assert overhead == pytest.approx(1.2, rel=1e-9), critical.rule


def test_what_was_measured_is_believed_before_all():
    told = advise(**SEVEN, noise_scale_tokens=1e6)
    assert told.verdict(CRITICAL).rule == "noise_scale" and told.verdict(CRITICAL).value == 1e6
    assert told.verdict(CRITICAL).why == "it was measured on the job itself"


def test_a_law_inside_its_range_is_believed_before_one_that_extrapolates():
    told = advise(**SEVEN)
    assert told.verdict(CRITICAL).rule == "power_lines_crit"
    assert answer(told, CHEAP, "data_cbs").outside and not answer(told, CHEAP, "power_lines_crit").outside
    assert told.verdict(CHEAP).why == "it holds here best: the others extrapolate"


def test_well_known_constants_are_believed_before_unverified_ones():
    verdict = advise(**SEVEN).verdict(LEAST_LOSS)
    assert verdict.rule == "data_budget" and "second-hand" in verdict.why


def test_rules_that_differ_warn_with_the_factor():
    verdict = advise(**SEVEN).verdict(CRITICAL)
    assert verdict.agreement > 2 and f"differ by a factor of {verdict.agreement:.3g}" in verdict.warning
    assert advise(**SEVEN).verdict(STEPS).warning == "" and advise(**SEVEN).verdict(LOSS).warning == ""


def test_laws_for_twenty_tokens_a_parameter_are_not_asked_far_from_it():
    told = advise(**SEVEN)
    assert refused(told, "chinchilla_cbs") == ["holds at 20 tokens a parameter, here they are 42.9"]
    assert all(a.rule != "diloco_batch" for a in told.answers)


def test_what_a_law_refuses_is_said_in_its_words():
    told = advise(params=1e5, tokens=2e6, sequence_length=64)
    assert any(
        why.startswith("tokens must be a plain count for power_lines_opt") for why in refused(told, "power_lines_opt")
    )
    assert any("not above 1.2·B_o" in why for why in refused(told, "data_cbs"))


def test_a_setting_that_no_rule_covers_is_refused():
    with pytest.raises(InputError, match=r"no rule applies to 10 parameters and 1e\+03 tokens"):
        advise(params=10, tokens=1e3, sequence_length=8)


@pytest.mark.parametrize(("params", "tokens"), [(7, 300e9), (7e9, 300), (610.0, 1.2e10)])
def test_a_count_in_billions_or_millions_is_refused(params, tokens):
    with pytest.raises(InputError, match="params and tokens must be plain counts, got .* tokens a parameter"):
        advise(params=params, tokens=tokens)


def test_beside_replicas_only_their_own_law_is_believed():
    told = advise(**CHINCHILLA, replicas=4)
    for question, rule in ((LEAST_LOSS, "diloco_batch"), (LOSS, "diloco_loss"), (RATE, "diloco_learning_rate")):
        assert told.verdict(question).rule == rule
    assert told.verdict(LOSS).value == loss.diloco(params=302e6, algorithm="diloco", replicas=4).nats
    assert "not of DiLoCo" in answer(told, LEAST_LOSS, "power_lines_opt").outside


def test_a_law_of_parameters_without_embeddings_waits_for_them():
    assert refused(advise(**CHINCHILLA), "kaplan_loss")[0].startswith("counts parameters without embeddings")
    told = advise(**CHINCHILLA, non_embedding_params=2.5e8, batch_tokens=2.0**20)
    wanted = loss.kaplan(params=2.5e8, steps=6.04e9 / 2**20, batch_tokens=2.0**20, constants="kaplan_loss")
    assert answer(told, LOSS, "kaplan_loss").value == wanted.nats


def test_above_the_critical_batch_decay_and_plain_rules_do_not_hold():
    told = advise(**CHINCHILLA, **TUNED, batch_tokens=4e6, noise_scale_tokens=1e6)
    assert "above the critical one of 1e+06 tokens" in told.verdict(DECAY).warning
    assert "above the noise scale" in answer(told, RATE, "sqrt").outside
    assert answer(told, RATE, "surge").outside == ""


def test_a_law_a_little_outside_is_believed_before_one_that_rests_on_another():
    told = advise(params=70e6, tokens=1.4e9)
    assert answer(told, CHEAP, "chinchilla_cbs").outside and answer(told, CHEAP, "chinchilla_cbs").beyond < 2
    assert answer(told, CHEAP, "kaplan_cbs").beyond == float("inf")
    assert told.verdict(CHEAP).rule not in ("kaplan_cbs", "trajectory_cbs")


def test_losses_warn_by_nats_and_rates_only_by_rules_for_the_optimizer():
    told = advise(params=70e6, tokens=1.4e9, **TUNED, noise_scale_tokens=1e6)
    assert "nats" in told.verdict(LOSS).warning and told.verdict(LOSS).high - told.verdict(LOSS).low > 0.1
    assert {a.rule for a in told.answers if a.question == RATE} == {
        "diloco_learning_rate",
        "sqrt",
        "surge",
        "saturating",
        "saturating_sqrt",
    }


def test_capitals_in_the_optimizers_name_change_nothing():
    assert advise(**SEVEN, **TUNED, optimizer="AdamW") == advise(**SEVEN, **TUNED)


@pytest.mark.parametrize(
    ("optimizer", "noise", "rule"),
    [("adamw", None, "sqrt"), ("adamw", 1e6, "saturating_sqrt"), ("sgd", None, "sqrt")],
)
def test_the_learning_rate_moves_by_the_optimizers_rule(optimizer, noise, rule):
    told = advise(**SEVEN, **TUNED, optimizer=optimizer, batch_tokens=2.0**22, noise_scale_tokens=noise)
    chosen = learning_rate.for_optimizer(optimizer, 3e-4, 2.0**19, 2.0**22, noise_scale=noise)
    assert (
        (told.verdict(RATE).rule, told.verdict(RATE).value) == (rule, chosen.learning_rate) == (chosen.rule, chosen[0])
    )


def test_weight_decay_has_the_published_memory_at_the_moved_rate():
    told = advise(**SEVEN, **TUNED, batch_tokens=2.0**21)
    tau = 1.084 * (300 / 7) ** -0.527
    assert told.verdict(MEMORY).value == pytest.approx(tau, rel=1e-12)
    decay = weight_decay.from_timescale(
        tau, batch_size=2.0**21, learning_rate=told.verdict(RATE).value, total_examples=3e11
    )
    assert told.verdict(DECAY).value == pytest.approx(decay, rel=1e-12)
    assert refused(advise(**SEVEN, **TUNED, optimizer="adam"), "power_lines_timescale") == [
        "holds for decoupled decay times the learning rate, not for adam"
    ]


def test_the_batch_in_mind_sets_updates_and_loss():
    small, large = (advise(**SEVEN, batch_tokens=size) for size in (2.0**20, 2.0**24))
    assert small.verdict(STEPS).value == 3e11 / 2**20
    assert small.verdict(LOSS).value < large.verdict(LOSS).value


def test_replicas_ask_the_joint_law_too():
    told = advise(**CHINCHILLA, replicas=4)
    values = [a.value for a in told.answers if a.rule == "diloco_batch"]
    assert values == [batch.diloco_opt(params=302e6, algorithm="diloco", replicas=4).tokens]


def test_every_answer_names_its_source_and_every_question_has_one_believed_answer():
    told = advise(**CHINCHILLA, **TUNED, noise_scale_tokens=1e6, loss=3.0, replicas=2)
    assert all(a.source and a.formula and a.status for a in told.answers)
    assert len(told.verdicts) == len({a.question for a in told.answers})
    blocks = told.table().split("\n\n")
    for verdict, block in zip(told.verdicts, blocks, strict=False):
        marked = [line for line in block.splitlines() if line.startswith("  * ")]
        assert len(marked) == 1 and marked[0].split()[1] == verdict.rule, block
        assert verdict.low <= verdict.value <= verdict.high


def test_json_goes_round():
    told = advise(**SEVEN, **TUNED)
    assert Advice.from_json(told.to_json()) == told
    assert isinstance(told.answers[0], Answer) and dataclasses.is_dataclass(told.setting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": 0}, "params must be finite and > 0, got 0"),
        ({"tokens": "300B"}, "tokens must be finite and > 0, got '300B'"),
        ({"batch_tokens": 1024}, "must lie between a sequence of 2048 tokens .* got 1024: is it in sequences?"),
        ({"batch_tokens": 4e11}, "the run's 3e\\+11, got 4"),
        ({"noise_scale_tokens": 256}, "noise_scale_tokens must lie between .* is it in sequences?"),
        ({"non_embedding_params": 8e9}, "non_embedding_params must be at most params, 7e\\+09"),
        ({"learning_rate": 3e-4}, "learning_rate and base_batch_tokens, .* go together, got 0.0003 and None"),
        ({"optimizer": "adamx"}, "adamx"),
        ({"sequence_length": 0}, "sequence_length must be an integer of at least 1"),
        ({"replicas": 0}, "replicas must be an integer of at least 1"),
        ({"loss": -1.0}, "loss must be finite and > 0"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        advise(**(SEVEN | changes))


def test_an_unknown_question_names_those_there_are():
    with pytest.raises(InputError, match="question must be one of batch of least loss, critical batch"):
        advise(**SEVEN).verdict("colour")
