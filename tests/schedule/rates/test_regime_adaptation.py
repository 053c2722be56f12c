"""Regime adaptation: closed forms, the updates of the reference run, and a batch that changes on the way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.rates.regime_adaptation import RegimeAdaptation, adapt_regime
from batchlab.testing.schedules import run, small_optimizer

RESNET = {"learning_rate": 0.1, "epochs": 200, "milestones": (81, 122, 164)}


def test_the_papers_resnet_at_2048():
    found = adapt_regime(**RESNET, batch=2048)
    assert found.learning_rate == pytest.approx(0.4, rel=1e-15)
    assert found.milestones == (1296, 1952, 2624) and found.epochs == 3200 and found.cost == 16.0
    assert found.updates(50_000) == adapt_regime(**RESNET, batch=128).updates(50_000) == 78125
    assert found.reason == "η·4 by the sqrt rule, epochs·16 to keep the updates of batch 128: 16 times the examples"


def test_ragged_ends_of_epochs_break_the_count():
    """With a last batch of its own in each epoch the larger batch makes 2.3 % more updates: 5 reference epochs."""
    few, many = (epochs * math.ceil(50_000 / batch) for epochs, batch in ((200, 128), (3200, 2048)))
    assert many / few == pytest.approx(1.023, abs=1e-3)


def test_a_smaller_batch_shrinks_all():
    found = adapt_regime(**RESNET, batch=32)
    assert (found.learning_rate, found.epochs, found.milestones) == (0.05, 50, (20.25, 30.5, 41))
    assert found.cost == 0.25 and "0.25 times the examples" in found.reason


@pytest.mark.parametrize(("rule", "factor"), [("sqrt", 4.0), ("linear", 16.0), ("none", 1.0)])
def test_the_rules_of_the_rate(rule, factor):
    found = adapt_regime(**RESNET, batch=2048, lr_rule=rule, keep_updates=False)
    assert found.learning_rate == pytest.approx(0.1 * factor) and found.milestones == (81, 122, 164)
    assert found.cost == 1.0 and "in 0.0625 times the updates of batch 128" in found.reason


@given(
    batch=st.integers(1, 10**5),
    ref=st.integers(1, 10**5),
    epochs=st.integers(1, 1000),
    examples=st.integers(1, 10**7),
    rule=st.sampled_from(["sqrt", "linear", "none"]),
)
def test_there_and_back_changes_nothing_and_the_updates_stay(batch, ref, epochs, examples, rule):
    there = adapt_regime(learning_rate=0.1, batch=batch, epochs=epochs, ref_batch=ref, lr_rule=rule)
    assert there.updates(examples) == pytest.approx(epochs * examples / ref, rel=1e-12)
    back = adapt_regime(
        learning_rate=there.learning_rate, batch=ref, epochs=there.epochs, ref_batch=batch, lr_rule=rule
    )
    assert back.learning_rate == pytest.approx(0.1, rel=1e-12) and back.epochs == pytest.approx(epochs, rel=1e-12)
    assert there.cost * back.cost == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("batch", [4, 8, 12, 64])
def test_each_update_has_the_rate_that_the_reference_run_has_there(batch):
    """MultiStepLR at the reference batch of 8, by updates: 100 examples are 12.5 updates an epoch."""
    optimizer = small_optimizer()
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [25, 38], gamma=0.1)
    ours = RegimeAdaptation(
        small_optimizer(), batch=batch, examples=100, epochs=4, milestones=(2, 3), ref_batch=8, lr_rule="none"
    )
    for _ in range(50):
        assert ours.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=1e-12)
        optimizer.step()
        reference.step()
        run(ours, [None])
    assert ours.seen == ours.ends == 50 * batch


def test_updates_go_on_to_count_as_the_references_when_the_batch_changes():
    ours = RegimeAdaptation(
        small_optimizer([0.1]), batch=8, examples=80, epochs=4, milestones=(2,), ref_batch=8, lr_rule="sqrt"
    )
    run(ours, [None] * 10)
    ours.batch = 32
    assert ours.get_last_lr() == [0.2] == [ours.optimizer.param_groups[0]["lr"]]
    rates = [each[0]["lr"] for each in run(ours, [None] * 11)]
    assert rates == pytest.approx([0.2] * 10 + [0.02] * 2)
    assert ours.ends == 10 * 8 + 30 * 32 and ours.regime.cost == 4.0


def test_a_place_that_is_no_fraction_is_named():
    ours = RegimeAdaptation(small_optimizer(), batch=8, examples=80, milestones=(2,))
    for place in ([0.5, 1], [1, 0], [1], None):
        with pytest.raises(InputError, match="place must be a numerator and a denominator, got"):
            ours.load_state_dict({**ours.state_dict(), "place": place})


def test_other_factors_at_each_milestone():
    """WResNet16-4: 0.1, then 0.02, 0.004 and 1e-4."""
    ours = RegimeAdaptation(
        small_optimizer([0.1]), batch=128, examples=1280, milestones=(6, 12, 14), gamma=(0.2, 0.2, 0.025)
    )
    rates = [each[0]["lr"] for each in run(ours, [1280] * 15)]
    assert rates == pytest.approx([0.1] * 6 + [0.02] * 6 + [0.004] * 2 + [1e-4] * 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"ref_batch": 1.5}, "ref_batch must be an integer of at least 1, got 1.5"),
        ({"learning_rate": 0}, "learning_rate must be finite and > 0, got 0"),
        ({"epochs": -1}, "epochs must be finite and > 0, got -1"),
        ({"milestones": (5, 3)}, r"milestones must be finite, > 0 and rising, got \(5, 3\)"),
        ({"milestones": (0, 3)}, "milestones must be"),
        ({"milestones": 3}, "milestones must be"),
        ({"milestones": (math.nan,)}, "milestones must be"),
        ({"milestones": (3, 300)}, r"milestones must not lie beyond the 200 epochs, got \(3, 300\)"),
        ({"lr_rule": "cube"}, r"lr_rule must be one of \['sqrt', 'linear', 'none'\], got 'cube'"),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(InputError, match=message):
        adapt_regime(**({**RESNET, "batch": 256} | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"examples": 0}, "examples must be an integer of at least 1, got 0"),
        ({"gamma": 0}, "gamma must be > 0, one number or one for each of 2, got 0"),
        ({"gamma": (0.1,)}, "gamma must be > 0, one number or one for each of 2"),
        ({"gamma": "ab"}, "gamma must be > 0, one number or one for each of 2, got 'ab'"),
        ({"gamma": None}, "gamma must be > 0, one number or one for each of 2, got None"),
        ({"epochs": 2}, "milestones must not lie beyond the 2 epochs"),
        ({"lr_rule": "cube"}, "lr_rule must be one of"),
    ],
)
def test_bad_settings_of_the_class_are_named_and_nothing_is_written(wrong, message):
    optimizer = small_optimizer()
    with pytest.raises(InputError, match=message):
        RegimeAdaptation(optimizer, **({"batch": 8, "examples": 10, "milestones": (1, 3)} | wrong))
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_fractions_are_the_decimals_that_were_written():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    settings = {"batch": 100, "examples": 1000, "ref_batch": 100, "lr_rule": "none"}
    schedule = RegimeAdaptation(optimizer, epochs=1.1, milestones=(0.1,), **settings)
    assert schedule.ends == 1100
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    for tenths in range(1, 1000):
        made = RegimeAdaptation(optimizer, epochs=tenths / 10, milestones=(), **settings)
        assert made.ends == 100 * tenths


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_milestones_and_gammas_of_any_kind(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    made = RegimeAdaptation(optimizer, batch=8, examples=80, milestones=kind([1.0, 2.0]), gamma=kind([0.5, 0.25]))
    assert made.milestones == (1.0, 2.0) and list(map(float, made.gammas)) == [0.5, 0.25]
    with pytest.raises(InputError, match="^keep_updates must be True or False, got 'no'$"):
        RegimeAdaptation(optimizer, batch=8, examples=80, milestones=(), keep_updates="no")
