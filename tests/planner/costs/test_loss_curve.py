"""Loss for the money: a known curve to a percent, nothing beyond its samples, and one batch to a curve."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.costs.cost_table import cost_table
from batchlab.planner.costs.loss_curve import LossCurve, LossTable, loss_per_dollar
from batchlab.planner.costs.run_cost import cost
from batchlab.planner.costs.training import Training
from batchlab.planner.hardware import Device

CARD = Device("card", 80e9, 100e12, 2e12, 100e9, 8, 500.0, "by hand", "2026-01-01")
MODEL = Training(parameters=1e9, tokens=1e9, sequence_length=1000)
TOKENS = np.geomspace(1e6, 1e10, 13)


def law(tokens):
    return 2 + 3 * tokens**-0.3


CURVE = LossCurve(tuple(TOKENS), tuple(law(TOKENS)), batch=64)


def grid(**changes):
    settings = {"batches": [64], "devices": [CARD], "counts": [1, 2, 4, 8], "strategies": ["ddp", "full"]}
    return cost_table(MODEL, **(settings | {"step_time": (0.3, 0.05), "prices": {"card": 2.0}} | changes)).rows


def test_dollars_to_a_loss_are_the_closed_form():
    """2 + 3·tokens^-0.3 from three samples a decade: ((ℓ - 2)/3)^(-1/0.3) tokens, within 1 %; the loss likewise."""
    targets = [2.04, 2.03, 2.01, 2.005]
    found = loss_per_dollar(CURVE, grid(), budgets=[1.0, 30.0], targets=targets)
    for each in found.rows:
        exact = [((loss - 2) / 3) ** (-1 / 0.3) / each.row.tokens_per_dollar for loss in targets]
        assert each.dollars == pytest.approx(exact, rel=0.01)
        losses = [law(budget * each.row.tokens_per_dollar) for budget in (1.0, 30.0)]
        assert np.array(each.losses) - 2 == pytest.approx(np.array(losses) - 2, rel=0.01)
        assert each.warning == ""
    assert LossTable.from_json(found.to_json()) == found


def test_at_one_batch_dollars_rank_as_tokens_for_a_dollar():
    rows = grid()
    found = loss_per_dollar(CURVE, rows, targets=[2.01])
    by_loss = sorted(range(len(rows)), key=lambda place: found.rows[place].dollars[0])
    assert by_loss == sorted(range(len(rows)), key=lambda place: -rows[place].tokens_per_dollar)
    assert len({each.dollars for each in found.rows}) == len(rows) - 1  # on one device the strategies are one


def test_nothing_is_extrapolated():
    assert CURVE.tokens(law(1e10) - 1e-9) is None and CURVE.loss(1.001e10) is None and CURVE.loss(0.9e6) is None
    assert CURVE.tokens(law(1e10)) == pytest.approx(1e10) and CURVE.loss(1e10) == pytest.approx(law(1e10))
    assert CURVE.tokens(law(1e6)) == 1e6
    row = cost(MODEL, batch=64, device=CARD, step_time=(0.3, 0.05), price_per_hour=2.0)
    text = loss_per_dollar(CURVE, [row], budgets=[1e-9, 1.0, 1e9], targets=[2.01, 1.9]).table()
    assert text.splitlines()[0].split("  ")[-1].strip() == "USD to 1.9"
    assert text.count("off the curve") == 2 and text.count("not reached") == 1


@given(st.lists(st.floats(1.0, 9.0), min_size=2, max_size=9), st.floats(0.0, 1.0))
def test_loss_and_tokens_are_inverse_and_monotone(losses, share):
    """Any samples: the curve falls, and the fewest tokens to a loss are at that loss."""
    curve = LossCurve(tuple(10.0 ** np.arange(3, 3 + len(losses))), tuple(losses))
    places = np.geomspace(curve.token_counts[0], curve.token_counts[-1] * (1 - 1e-12), 50)
    read = np.array([curve.loss(tokens) for tokens in places])
    assert (np.diff(read) <= 1e-12).all()
    target = read[-1] + share * (read[0] - read[-1])
    tokens = curve.tokens(target)
    assert tokens is not None and curve.loss(tokens) == pytest.approx(target, abs=1e-9)
    assert curve.smoothed <= max(losses) - min(losses)


def test_samples_that_rise_are_pooled_to_their_mean():
    """3, 4, 2: the nearest falling values are 3.5, 3.5, 2."""
    curve = LossCurve((1e3, 1e4, 1e5), (3.0, 4.0, 2.0))
    assert [curve.loss(10.0**k) for k in (3, 4, 5)] == pytest.approx([3.5, 3.5, 2.0])
    assert curve.smoothed == 0.5 and CURVE.smoothed == 0.0


def test_a_curve_is_of_one_batch():
    rows = grid(batches=[64, 128], counts=[1], strategies=["ddp"])
    same, other = loss_per_dollar(CURVE, rows, targets=[2.01]).rows
    assert same.warning == "" and other.warning == "batch 128 is not the curve's 64: its loss per token is another"
    unknown = LossCurve(CURVE.token_counts, CURVE.losses)
    table = loss_per_dollar(unknown, rows, targets=[2.01])
    assert table.table().count("warning: the curve's global batch is not given") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1e3,), (2.0,)), r"a curve needs as many losses as token counts, two at least, got 1, 1"),
        (((1e3, 1e4), (2.0,)), r"a curve needs as many losses as token counts, two at least, got 2, 1"),
        (((1e4, 1e3), (2.0, 1.0)), r"token_counts must ascend, got \[10000.0, 1000.0\]"),
        (((0.0, 1e3), (2.0, 1.0)), r"token_counts must be finite and > 0, got 0.0"),
        (((1e3, 1e4), (2.0, math.nan)), r"losses must be finite, got nan"),
        (("ab", (5.0, 4.0)), r"token_counts must be numbers in a sequence, got 'ab'"),
        (((1e3, 1e4), 5.0), r"losses must be numbers in a sequence, got 5.0"),
        ((("a", 1e4), (5.0, 4.0)), r"token_counts must be finite and > 0, got 'a'"),
        (((1e3, 1e4), ("b", 4.0)), r"losses must be finite, got 'b'"),
        (((1e3, 1e4), (2.0, 1.0), 0), r"batch must be an integer of at least 1, got 0"),
    ],
)
def test_a_curve_that_is_none_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LossCurve(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [5.0]}, r"loss must be at most 2.04755, the curve's first sample, got 5.0"),
        ({"targets": ["low"]}, r"loss must be at most 2.04755, the curve's first sample, got 'low'"),
        ({"targets": [math.nan]}, r"loss must be at most 2.04755, the curve's first sample, got nan"),
        ({"budgets": [1.0, -1.0]}, r"budgets\[1\] must be finite and > 0, got -1.0"),
        ({}, r"budgets or targets must hold one or more, got none of either"),
        ({"targets": [2.01], "rows": []}, r"rows must hold one or more, got none"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        loss_per_dollar(CURVE, **({"rows": grid()} | changes))


def test_no_price_is_said():
    row = cost(MODEL, batch=64, device=CARD, step_time=(0.3, 0.05))
    with pytest.raises(InputError, match=r"loss per dollar needs a price, got none for card"):
        loss_per_dollar(CURVE, [row], targets=[2.01])
