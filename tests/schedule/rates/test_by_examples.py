"""The learning rate's share over examples: pieces that meet, in any unit, whatever the batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.rates.by_examples import lr_factor, momentum_at
from batchlab.schedule.rates.one_cycle import OneCycle
from batchlab.schedule.rates.power import Power
from batchlab.schedule.rates.wsd import WSD

SCHEDULES = st.sampled_from(["constant", "linear", "cosine"])
SHARES = st.floats(0.0, 1.0)
TOTALS = st.floats(10.0, 1e9)


@given(total=TOTALS, warmup=st.floats(0.0, 0.9), share=SHARES, schedule=SCHEDULES)
def test_each_piece_is_its_closed_form(total, warmup, share, schedule):
    """`share` of the way through the warm-up, and through what comes after."""
    at = {"total_examples": total, "warmup_examples": warmup * total, "schedule": schedule}
    if share < 1 and warmup > 0:
        assert lr_factor(share * warmup * total, **at) == pytest.approx(share, rel=1e-9)
    after = {"constant": 1.0, "linear": 1 - share, "cosine": math.cos(math.pi * share / 2) ** 2}[schedule]
    assert lr_factor((warmup + share * (1 - warmup)) * total, **at) == pytest.approx(after, abs=1e-7)


@given(
    total=TOTALS, warmup=st.floats(0.01, 0.9), schedule=SCHEDULES, unit=st.floats(1e-3, 1e3), share=st.floats(0, 1.5)
)
def test_it_knows_no_unit(total, warmup, schedule, unit, share):
    """Examples or tokens: only the shares of the whole run count, where what follows the warm-up is longer than 1."""
    plain = lr_factor(share * total, total_examples=total, warmup_examples=warmup * total, schedule=schedule)
    total *= unit * 1e3
    other = lr_factor(share * total, total_examples=total, warmup_examples=warmup * total, schedule=schedule)
    assert other == pytest.approx(plain, abs=1e-6)


@given(positions=st.lists(st.floats(0.0, 2e6), min_size=2, max_size=20), schedule=SCHEDULES)
def test_it_rises_in_the_warm_up_and_never_again(positions, schedule):
    at = {"total_examples": 1e6, "warmup_examples": 2e5, "schedule": schedule}
    warm = [lr_factor(x, **at) for x in sorted(positions) if x <= 2e5]
    rest = [lr_factor(x, **at) for x in sorted(positions) if x >= 2e5]
    assert warm == sorted(warm) and rest == sorted(rest, reverse=True)
    assert {lr_factor(x, **at) for x in positions if x >= 1e6} <= {float(schedule == "constant")}


def test_without_a_warm_up_it_starts_at_the_peak_and_one_as_long_as_the_run_ends_there():
    assert [lr_factor(0, total_examples=10, schedule=each) for each in ("constant", "linear", "cosine")] == [1, 1, 1]
    assert [lr_factor(x, total_examples=8, warmup_examples=8, schedule="linear") for x in (0, 4, 8, 9)] == [
        0,
        0.5,
        1,
        0,
    ]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("examples", math.nan), ("examples", -1), ("examples", "5"), ("warmup_examples", math.nan)]
    + [("total_examples", value) for value in (0, -10, math.nan, math.inf)],
)
def test_a_number_that_is_none_is_named(schedule, name, value):
    with pytest.raises(InputError, match=f"^{name} must be "):
        lr_factor(**({"examples": 5, "total_examples": 10, "schedule": schedule} | {name: value}))


def test_an_unknown_schedule_is_named():
    with pytest.raises(InputError, match=r"schedule must be one of \['constant', 'linear', .*\], got 'step'"):
        lr_factor(5, total_examples=10, schedule="step")


def test_a_wrong_name_is_refused_in_warm_up_too():
    with pytest.raises(InputError, match=r"schedule must be one of .*, got 'foo'"):
        lr_factor(50, total_examples=100, warmup_examples=60, schedule="foo")


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ("linear", {"floor": 0.1}, r"schedule_settings of 'linear' must be of \[\], got 'floor'"),
        ("wsd", {"decay": 0.1}, r"schedule_settings of 'wsd' must be of \['decay_share', .*\], got 'decay'"),
        ("wsd", {"decay_share": 1.5}, r"decay_share must lie in \[0, 1\], got 1.5"),
        ("wsd", {"shape": "stairs"}, r"shape must be one of .*, got 'stairs'"),
        ("wsd", {"shape": "root"}, r"shape must be one of \['linear', .*\], got 'root'"),
        ("power", {"knee_share": 0.1, "floor": 2}, r"floor must lie in \[0, 1\), got 2"),
        ("power", {"knee_share": 0.1, "exponent": "-0.5"}, "exponent must be finite, got '-0.5'"),
        ("power", {}, r'the schedule "power" needs schedule_settings\["knee_share"\]'),
        ("power", {"knee_share": 0.0}, r"knee_share must be finite and > 0, got 0"),
        ("one_cycle", {"half_share": "0.45"}, r"half_share must lie in \(0, 1\), got '0.45'"),
        ("one_cycle", {"momentum": "x"}, r"momentum must be \(high, low\) with 0 <= low <= high < 1, got 'x'"),
        ("one_cycle", {"ratio": 1.0}, r"ratio, the peak over the base, must be > 1, got 1.0"),
    ],
)
def test_settings_that_it_has_not_are_named(schedule, settings, message):
    with pytest.raises(InputError, match=message):  # at the start already, where a run has written nothing yet
        lr_factor(0, total_examples=10, schedule=schedule, settings=settings)


@pytest.mark.parametrize("momentum", [0.9, [0.9], [0.8, 0.9], ["a", "b"]])
def test_a_momentum_that_is_no_pair_is_named(momentum):
    with pytest.raises(InputError, match=r"momentum must be \(high, low\) with 0 <= low <= high < 1, got"):
        momentum_at(0, total_examples=10, schedule="one_cycle", settings={"momentum": momentum})


def test_one_cycle_warms_up_by_itself():
    with pytest.raises(InputError, match=r'"one_cycle" warms up by itself: warmup_examples must be 0, got 5'):
        lr_factor(9, total_examples=10, warmup_examples=5, schedule="one_cycle")


SPAN = {"batch": 10, "warmup": 100, "total": 1000}
LAW = {"a": 0.5 / 10 * 200**0.51, "lr_max": 0.5, "tokens_per_sequence": 1}  # leaves its cap after 200
OTHERS = [
    ("wsd", {}, lambda o: WSD(o, **SPAN, decay=200)),
    ("wsd", {"shape": "cosine", "floor": 0.1}, lambda o: WSD(o, **SPAN, decay=200, shape="cosine", floor=0.1)),
    ("power", {"knee_share": 0.2, "decay_share": 0.1}, lambda o: Power(o, **SPAN, **LAW, decay=100)),
    ("one_cycle", {}, lambda o: OneCycle(o, batch=10, total=1000)),
]


@pytest.mark.parametrize(("schedule", "settings", "make"), OTHERS)
def test_a_plans_schedule_is_the_scheduler_of_that_name(schedule, settings, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
    scheduler = make(optimizer)
    warmup = 0 if schedule == "one_cycle" else 100
    for update in range(100):
        share = lr_factor(
            10 * update, total_examples=1000, warmup_examples=warmup, schedule=schedule, settings=settings
        )
        assert 0.5 * share == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), update
        momentum = momentum_at(10 * update, total_examples=1000, schedule=schedule, settings=settings)
        assert momentum is None or momentum == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-12)
        assert (momentum is None) == (schedule != "one_cycle")
        scheduler.step()


@pytest.mark.parametrize(("schedule", "given"), [("wsd", {}), ("power", {"knee_share": 0.1})])
def test_a_warm_up_that_reaches_into_the_cool_down_makes_no_jump(schedule, given):
    """1-sqrt falls fastest at first: by sqrt(1/200) in one of its 200 steps."""
    given = given | {"decay_share": 0.2, "shape": "1-sqrt"}
    at = {"total_examples": 1000, "warmup_examples": 900, "schedule": schedule, "settings": given}
    rates = [lr_factor(examples, **at) for examples in range(1001)]
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 200**-0.5
    assert rates[0] == rates[-1] == 0 and max(rates) == rates[800] > 0.8


def test_a_warm_up_without_end_is_refused():
    with pytest.raises(InputError, match="warmup_examples must be finite, or the rate never rises, got inf"):
        lr_factor(5, total_examples=100, warmup_examples=math.inf)
