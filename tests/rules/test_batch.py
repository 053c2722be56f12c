"""The laws of batch size: published numbers, units that cannot be confused, and moving from a batch of one's own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import batch
from batchlab.rules.batch import Base
from batchlab.rules.published import law, laws
from batchlab.rules.token_batch import TokenBatch

BASE = Base(batch_tokens=2.0**19, tokens=2.5e9)


def test_power_lines_optimum_agrees_with_the_published_sweep():
    best = batch.power_lines_opt(tokens=1.22e10)
    assert round(best.sequences(2048)) == 223 and best.outside == ""
    assert 126 < best.sequences(2048) < 504  # the sweep is best at 252 of 63, 126, 252, 504


def test_power_lines_critical_batch_agrees_with_where_the_linear_rule_ends():
    assert batch.power_lines_crit(least_tokens=1.22e10).sequences(2048) == pytest.approx(2150, rel=2e-3)


def test_power_lines_ratios():
    twice, ten = (
        batch.power_lines_opt(tokens=k * 1e10).tokens / batch.power_lines_opt(tokens=1e10).tokens for k in (2, 10)
    )
    assert twice == pytest.approx(1.304, abs=5e-4) and ten == pytest.approx(2.415, abs=5e-4)


@pytest.mark.parametrize(("tokens", "wanted"), [(1e9, 7.7e5), (1e11, 2.6e6), (1e12, 4.8e6)])
def test_data_budget_gives_the_published_examples(tokens, wanted):
    assert batch.data_budget(tokens=tokens).tokens == pytest.approx(wanted, rel=0.01)


def test_data_budget_is_its_formula():
    assert batch.data_budget(tokens=1e11).tokens == pytest.approx(3.24e3 * 10**2.904, rel=1e-9)
    ratio = batch.data_budget(tokens=1e11).tokens / batch.data_budget(tokens=1e9).tokens
    assert ratio == pytest.approx(3.373, abs=5e-4)


@pytest.mark.parametrize(
    ("params", "measured"), [(85e6, 745.3), (151e6, 955.2), (302e6, 1393.7), (604e6, 1888.5), (1.2e9, 2533.4)]
)
def test_chinchilla_law_is_near_the_critical_batches_it_was_fitted_to(params, measured):
    assert batch.chinchilla_cbs(params=params).sequences(512) == pytest.approx(measured, rel=0.035)


def test_the_data_law_is_the_chinchilla_law_at_twenty_tokens_a_parameter():
    """So its D counts millions: published once with billions."""
    for tokens in (2e9, 1e10, 2.4e10):
        link = batch.chinchilla_cbs(params=tokens / 20).tokens
        assert batch.data_cbs(tokens=tokens).tokens == pytest.approx(link, rel=0.02)


def test_model_law_is_almost_flat():
    assert batch.model_cbs(params=1.2e9).tokens / batch.model_cbs(params=85e6).tokens == pytest.approx(
        14.1**0.087, rel=1e-2
    )


def test_kaplan_critical_batch_grows_as_the_loss_falls():
    for constants, power in (("kaplan", 1 / 0.21), ("trajectory", 1 / 0.205)):
        high, low = (batch.kaplan_cbs(loss=loss, constants=constants).tokens for loss in (4.0, 2.0))
        assert low / high == pytest.approx(2**power)
    assert batch.kaplan_cbs(loss=1e-2 * 250, constants="trajectory").tokens == pytest.approx(1.7e8 / 2.5 ** (1 / 0.205))


@pytest.mark.parametrize(
    ("params", "joint", "independent", "data_parallel"),
    [(2.4e9, (180, 227, 288, 364), (164, 239, 325, 345), 98), (1e10, (351, 445, 563, 712), (305, 474, 674, 660), 146)],
)
def test_diloco_batches_are_the_published_sequences(params, joint, independent, data_parallel):
    for fit, wanted in (("joint", joint), ("independent", independent)):
        for replicas, sequences in zip((1, 2, 4, 8), wanted, strict=True):
            got = batch.diloco_opt(params=params, algorithm="diloco", replicas=replicas, fit=fit)
            assert round(got.sequences(2048)) == sequences and got.tokens == pytest.approx(2048 * got.sequences(2048))
    assert round(batch.diloco_opt(params=params).sequences(2048)) == data_parallel


def test_compute_budget_keeps_the_accounts():
    moved = batch.compute_budget(
        compute=1e22, base_compute=1e20, base_params=1e9, base_tokens=1e20 / 6e9, base_batch_tokens=1e6
    )
    assert 6 * moved.params * moved.tokens == pytest.approx(1e22, rel=1e-12)  # 0.464 + 0.536 = 1
    assert moved.steps * moved.batch.tokens == pytest.approx(moved.tokens, rel=1e-12)  # 0.434 + 0.102 = 0.536
    assert moved.batch.tokens / 1e6 == pytest.approx(100**0.102, rel=1e-12)


@given(st.floats(1e8, 1e13), st.floats(1e8, 1e13))
def test_moving_from_a_base_composes(first, second):
    for rule, name in (
        (batch.power_lines_opt, "tokens"),
        (batch.power_lines_crit, "least_tokens"),
        (batch.data_budget, "tokens"),
    ):
        middle = rule(**{name: first}, base=BASE).tokens
        there = rule(**{name: second}, base=Base(middle, first)).tokens
        assert there == pytest.approx(rule(**{name: second}, base=BASE).tokens, rel=1e-9)
        assert rule(**{name: BASE.tokens}, base=BASE).tokens == pytest.approx(BASE.batch_tokens, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        (batch.data_cbs, {"tokens": 1700.0}),  # in millions
        (batch.data_cbs, {"tokens": 1.7}),  # in billions: the slip that was copied
        (batch.chinchilla_cbs, {"params": 302.0}),
        (batch.model_cbs, {"params": 0.302}),
        (batch.power_lines_opt, {"tokens": 12.2}),
        (batch.power_lines_opt, {"tokens": 12_200.0}),
        (batch.data_budget, {"tokens": 100.0}),
        (batch.data_budget, {"tokens": 100e3}),
        (batch.diloco_opt, {"params": 2.4}),
        (batch.diloco_opt, {"params": 2400.0}),
    ],
)
def test_counts_in_thousands_millions_or_billions_are_caught(rule, given):
    with pytest.raises(InputError, match="plain count for .* are these thousands, millions, billions or sequences"):
        rule(**given)


def test_millions_of_least_tokens_are_caught_by_name():
    with pytest.raises(InputError, match="least_tokens must be a plain count for power_lines_crit"):
        batch.power_lines_crit(least_tokens=12_200.0)


def test_a_batch_in_sequences_cannot_pass_for_tokens():
    """The slip of the DiLoCo paper: 98 sequences of 2048 are printed as tokens."""
    best = batch.diloco_opt(params=2.4e9)
    with pytest.raises(InputError, match=r"no number: say .tokens or .sequences\(sequence_length\)"):
        float(best)
    with pytest.raises(TypeError):
        best * 2
    with pytest.raises(TypeError):
        batch.diloco_opt(2.4e9)
    with pytest.raises(TypeError):
        best.sequences()
    assert best.tokens > 2e5


def test_beyond_the_fitted_range_it_says_so():
    assert "beyond 3.5e+07 to 2.4e+09" in batch.diloco_opt(params=1e10).outside
    assert batch.data_cbs(tokens=1e12).outside.startswith("tokens of 1e+12 lie beyond")
    assert batch.power_lines_opt(tokens=1e10).outside == ""
    assert batch.power_lines_opt(tokens=1e10, base=BASE).outside == ""  # one's own prefactor


def test_from_a_base_it_says_where_either_run_is_beyond():
    far = batch.data_budget(tokens=1e15, base=Base(5e5, 1e10))
    assert far.outside == "tokens of 1e+15 lie beyond 1e+09 to 3e+11, which data_budget was fitted over"
    small = batch.power_lines_opt(tokens=1e6, base=Base(1e3, 1e5))  # told, not refused
    assert small.outside.startswith("tokens of 1e+06 lie beyond") and "; base_tokens of 1e+05 lie" in small.outside
    crit = batch.power_lines_crit(least_tokens=1e10, base=Base(5e5, 1e9))
    assert crit.outside.startswith("base_least_tokens of 1e+09 lie beyond 2.2e+09")


def test_diloco_was_fitted_to_eight_replicas():
    assert batch.diloco_opt(params=1e9, replicas=8, algorithm="diloco").outside == ""
    far = batch.diloco_opt(params=1e9, replicas=1000, algorithm="diloco").outside
    assert far == "replicas of 1e+03 lie beyond 1 to 8, which diloco_batch was fitted over"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch.power_lines_opt(tokens=-1.0), "tokens must be finite and > 0, got -1.0"),
        (lambda: batch.data_budget(tokens="300B"), "tokens must be finite and > 0, got '300B'"),
        (lambda: batch.power_lines_crit(least_tokens=math.nan), "least_tokens must be finite and > 0, got nan"),
        (lambda: batch.kaplan_cbs(loss=0), "loss must be finite and > 0, got 0"),
        (lambda: batch.kaplan_cbs(loss=3.0, constants="chinchilla"), 'must be "kaplan" or "trajectory"'),
        (
            lambda: batch.data_budget(tokens=1e9, base=Base(1e6, 1e5)),
            "at least one batch of 1e\\+06 \\(got\\), got 100000",
        ),
        (lambda: batch.data_budget(tokens=1e4, base=Base(1e6, 1e9)), "the law gives"),
        (lambda: batch.diloco_opt(params=1e9, replicas=2), 'replicas is for algorithm="diloco"'),
        (lambda: batch.diloco_opt(params=1e9, algorithm="diloco"), "needs replicas, got None"),
        (
            lambda: batch.diloco_opt(params=1e9, algorithm="diloco", replicas=0),
            "replicas must be an integer of at least 1",
        ),
        (
            lambda: batch.diloco_opt(params=1e9, algorithm="diloco", replicas=3, fit="independent"),
            "one of \\(1, 2, 4, 8\\)",
        ),
        (lambda: batch.diloco_opt(params=1e9, algorithm="ddp"), 'must be "data_parallel" or "diloco"'),
        (
            lambda: batch.data_budget(tokens=1e10, base=(5e5, 1e10)),
            r"base must be a rules.batch.Base, got \(500000.0, 1",
        ),
        (
            lambda: batch.compute_budget(
                compute=1e21, base_compute=1e10, base_params=3e8, base_tokens=6e9, base_batch_tokens=5e5
            ),
            r"base_compute must be about 6\*base_params\*base_tokens = 1.08e\+19 FLOP, got 1e\+10",
        ),
        (lambda: law(["data_cbs"]), r"law must be one of .*got \['data_cbs'\]"),
        (lambda: TokenBatch(0.0), "tokens must be finite and > 0"),
        (lambda: law("chinchilla"), "law must be one of power_lines_opt"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_rounding_keeps_at_least_one():
    assert TokenBatch(1000.0).rounded(2048).tokens == 2048
    assert TokenBatch(5000.0, "x").rounded(2048) == TokenBatch(4096.0, "x")


def test_every_law_names_its_source_status_and_limits():
    for name, each in laws().items():
        assert each.name == name and "arXiv" in each.source and each.wrong_when and each.formula and each.gives
        assert each.status.split()[0].strip(";,.") in ("read", "second-hand", "unverified", "p", "m", "constants")
        assert all(0 < low < high for low, high in each.range.values())
