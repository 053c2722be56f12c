"""Warm-up, stable, decay: closed forms, the decision to cool down in mid-run, and transformers' schedule."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.rates.cooled import cool_down
from batchlab.schedule.rates.wsd import WSD, wsd_share
from batchlab.testing.schedules import run, small_optimizer

FORMS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "1-sqrt": lambda x: 1 - x**0.5,
    "exponential": lambda x: (math.exp(1 - x) - 1) / (math.e - 1),
}


@given(x=st.floats(0, 1), floor=st.floats(0, 0.99))
def test_each_shape_is_its_closed_form(x, floor):
    for shape, form in FORMS.items():
        assert cool_down(x, shape, floor) == pytest.approx(floor + (1 - floor) * form(x), abs=1e-12)
    if floor > 1e-300:
        assert cool_down(x, "geometric", floor) == pytest.approx(math.exp(x * math.log(floor)), rel=1e-9)


@given(floor=st.floats(0.001, 0.99), xs=st.lists(st.floats(0, 2), min_size=2, max_size=20))
def test_every_shape_falls_from_1_to_the_floor_and_stays(floor, xs):
    for shape in (*FORMS, "geometric"):
        found = [cool_down(x, shape, floor) for x in sorted(xs)]
        assert found == sorted(found, reverse=True) and floor <= found[-1]
        assert [cool_down(x, shape, floor) for x in (0, 1, 2)] == [1, floor, floor]


def test_the_exponential_is_that_of_the_released_code_and_the_geometric_that_of_minicpm():
    """lm-engine: a·e^-x + b with a = (1 - d)e/(e - 1), b = (de - 1)/(e - 1). MiniCPM: 0.5^(s/T)."""
    for d in (0.0, 0.1):
        for x in (0.0, 0.3, 0.9):
            a, b = (1 - d) * math.e / (math.e - 1), (d * math.e - 1) / (math.e - 1)
            assert cool_down(x, "exponential", d) == pytest.approx(a * math.exp(-x) + b, abs=1e-15)
    assert cool_down(500 / 20000, "geometric", 0.5 ** (20000 / 5000)) == pytest.approx(0.5 ** (500 / 5000))


@given(
    warmup=st.integers(0, 1000),
    stable=st.integers(0, 1000),
    decay=st.integers(1, 1000),
    unit=st.integers(1, 10**9),
    share=st.floats(0, 1),
)
def test_it_knows_no_unit_and_its_pieces_meet(warmup, stable, decay, unit, share):
    total = warmup + stable + decay
    plain = wsd_share(share * total, warmup=warmup, total=total, decay=decay, shape="linear")
    times = {"warmup": warmup * unit, "total": total * unit, "decay": decay * unit, "shape": "linear"}
    assert wsd_share(share * total * unit, **times) == pytest.approx(plain, abs=1e-9)
    assert wsd_share((warmup + stable) * unit, **times) == 1.0
    assert wsd_share(total * unit, **times) == 0.0
    assert wsd_share(warmup * unit, **times) == 1.0


def test_a_cool_down_decided_in_mid_run_is_the_planned_one():
    planned = WSD(small_optimizer(), batch=10, warmup=20, total=130, decay=60)
    decided = WSD(small_optimizer(), batch=10, warmup=20)
    run(decided, [None] * 7)
    run(planned, [None] * 7)
    decided.start_decay(over=60)
    assert run(decided, [None] * 6) == run(planned, [None] * 6)
    assert decided.ends == 130 and decided.decaying


def test_a_decision_is_saved_and_a_state_of_before_takes_it_back():
    schedule = WSD(small_optimizer(), batch=10)
    run(schedule, [None] * 3)
    before = schedule.state_dict()
    schedule.start_decay(over=40)
    run(schedule, [None])
    after = json.loads(json.dumps(schedule.state_dict()))
    fresh = WSD(small_optimizer(), batch=10)
    fresh.load_state_dict(after)
    assert (fresh.total, fresh.decay) == (70, 40)
    assert run(fresh, [None] * 4) == run(schedule, [None] * 4)
    schedule.load_state_dict(before)
    schedule.start_decay(over=20)
    run(schedule, [None] * 2)
    assert schedule.total == 50 and schedule.get_last_lr() == [0.0, 0.0]


def test_an_earlier_end_may_be_decided_than_was_planned_but_only_once():
    schedule = WSD(small_optimizer(), batch=10, warmup=15, total=1000, decay=100)
    with pytest.raises(InputError, match="start_decay must wait for the end of the warm-up at 15, got 0"):
        schedule.start_decay(over=20)
    run(schedule, [None] * 2)
    schedule.start_decay(over=20)
    run(schedule, [None])
    with pytest.raises(InputError, match="start_decay must come before any cool-down, got one that ends at 40"):
        schedule.start_decay(over=20)
    for wrong in (0, 2.5, -1):
        with pytest.raises(InputError, match=f"over must be an integer of at least 1, got {wrong}"):
            WSD(small_optimizer(), batch=10).start_decay(over=wrong)


def test_a_run_may_be_prolonged_when_it_is_resumed():
    """Settings are the constructor's: a longer plan holds for a state of a shorter one."""
    short = WSD(small_optimizer(), batch=10, total=100, decay=20)
    run(short, [None] * 5)
    longer = WSD(small_optimizer(), batch=10, total=200, decay=20)
    longer.load_state_dict(short.state_dict())
    run(longer, [None] * 5)
    assert longer.get_last_lr() == [0.02, 0.005]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"total": 100}, "decay is missing"),
        ({"decay": 100}, "total is missing"),
        ({"total": 100, "decay": 101}, "decay must be > 0 and at most total - warmup, 100 - 0, got 101"),
        ({"total": 100, "decay": 0}, "decay must be an integer of at least 1, got 0"),
        ({"shape": "sqrt"}, r"shape must be one of \['linear', 'cosine', '1-sqrt', 'exponential', 'geometric'\]"),
        ({"floor": -0.1}, r"floor must lie in \[0, 1\), got -0.1"),
        ({"shape": "geometric"}, 'floor must be > 0 for shape "geometric", which never reaches 0, got 0'),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(InputError, match=message):
        WSD(small_optimizer(), batch=10, **wrong)


def theirs(step, *, warmup, stable, decay, shape):
    """`transformers.get_wsd_schedule` with a linear warm-up and min_lr_ratio 0, in steps."""
    if step < warmup:
        return step / warmup
    if step < warmup + stable:
        return 1.0
    x = (step - warmup - stable) / decay
    return FORMS[shape](x) if x < 1 else 0.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_at_one_batch_it_is_the_schedule_in_steps(shape):
    schedule = WSD(small_optimizer([1.0]), batch=32, warmup=10 * 32, total=60 * 32, decay=20 * 32, shape=shape)
    found = [each[0]["lr"] for each in run(schedule, [None] * 60)]
    expected = [theirs(step, warmup=10, stable=30, decay=20, shape=shape) for step in range(61)]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_it_equals_transformers(shape):
    """Its min_lr_ratio is our floor in the cool-down; its warm-up starts there too, and ours at 0."""
    optimization = pytest.importorskip("transformers.optimization")
    for floor in (0.0, 0.1):
        optimizer = small_optimizer()
        peer = optimization.get_wsd_schedule(
            optimizer, 10, 20, num_stable_steps=30, decay_type=shape, min_lr_ratio=floor
        )
        ours = WSD(small_optimizer(), batch=8, warmup=80, total=480, decay=160, shape=shape, floor=floor)
        for step in range(70):
            if step >= 10 or floor == 0:
                assert ours.get_last_lr() == pytest.approx(peer.get_last_lr(), rel=1e-12, abs=1e-18)
            optimizer.step()
            peer.step()
            run(ours, [None])


def test_a_state_that_is_refused_changes_nothing():
    schedule = WSD(small_optimizer(), batch=10)
    for wrong in ({"decided": [100, 50], "updates": None}, {"lr": None}):
        with pytest.raises(InputError):
            schedule.load_state_dict(schedule.state_dict() | wrong)
    assert schedule.total is None
