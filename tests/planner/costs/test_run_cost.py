"""A run's time, dollars, joules and bytes against closed forms, naive sums, and scales that must come through."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.measure.speed.step_time_law import fit_step_time
from batchlab.planner.costs.attention import Attention
from batchlab.planner.costs.price import tokens_per_dollar
from batchlab.planner.costs.run_cost import RunCost, cost
from batchlab.planner.costs.sharding import StateBytes
from batchlab.planner.costs.training import Training
from batchlab.planner.costs.update_time import Infeasible
from batchlab.planner.hardware import Device, hardware

CARD = Device("card", 80e9, 100e12, 2e12, 100e9, 8, 500.0, "by hand", "2026-01-01")
MODEL = Training(parameters=1e9, tokens=1e9, sequence_length=1000, activation_bytes=1e9)
LINE = (0.2, 0.1)


def run(**changes):
    settings = {"batch": 8, "device": CARD, "step_time": LINE, "price_per_hour": 2.0} | changes
    return cost(settings.pop("training", MODEL), **settings)


def test_tokens_for_a_dollar():
    """arXiv 2410.19456 by the sheet: 8 GPUs at 2 USD/h and 1e5 tokens/s; linear in price, inverse in count."""
    assert tokens_per_dollar(1e5, price_per_hour=2.0, devices=8) == 22.5e6
    assert tokens_per_dollar(1e5, price_per_hour=4.0, devices=8) == 22.5e6 / 2
    assert tokens_per_dollar(1e5, price_per_hour=2.0, devices=16) == 22.5e6 / 2


def test_one_device_is_the_line():
    """t = 0.2 + 0.1·8 = 1 s for 8000 tokens: 125,000 updates, 69.4 USD, 500 W; half the speed at 2 sequences."""
    found = run(g_per_kwh=400.0, pue=1.5, utilisation=0.5)
    assert (found.step_seconds, found.steps, found.passes, found.micro_batch) == (pytest.approx(1.0), 125_000, 1, 8)
    assert found.tokens_per_second == pytest.approx(8000) and found.seconds == pytest.approx(125_000)
    assert found.dollars == pytest.approx(2 * 125_000 / 3600) and found.device_hours == pytest.approx(125_000 / 3600)
    assert found.tokens_per_dollar == pytest.approx(1e9 / found.dollars)
    assert found.energy.joules == pytest.approx(0.5 * 500 * 125_000)
    assert found.energy.kg_co2e == pytest.approx(0.5 * 500 * 125_000 / 3.6e6 * 0.4 * 1.5)
    assert found.energy.source == "estimated" and "estimated" in found.energy.note
    assert (found.half_batch, found.saturated_at) == (pytest.approx(2.0), pytest.approx(38.0))
    assert found.memory_bytes == 16e9 + 8e9 and found.communication_bytes == 0.0
    assert RunCost.from_json(found.to_json()) == found


def test_several_devices_pay_for_communication():
    """DDP on 4: 2·3/4·1e9·2 B over 100 GB/s is 0.03 s, of which overlap hides a part. Two nodes use the slower link."""
    slow = run(devices=4)
    assert slow.communication_bytes == 3e9 and slow.communication_seconds == pytest.approx(0.03)
    assert slow.step_seconds == pytest.approx(0.2 + 0.2 + 0.03)
    assert run(devices=4, overlap=0.5).step_seconds == pytest.approx(0.4 + 0.015)
    assert run(devices=4, overlap=1.0).step_seconds == pytest.approx(0.4)
    across = run(devices=16, batch=16, inter_node_bandwidth=10e9)
    assert across.communication_seconds == pytest.approx(2 * 15 / 16 * 2e9 / 10e9)
    assert across.dollars == pytest.approx(16 * 2.0 * across.seconds / 3600)


def test_no_more_is_hidden_than_passes_last():
    """A tenth of a second of passes hides no more of 3 s than that."""
    long = run(
        devices=4,
        batch=4,
        step_time=(0.0, 0.1),
        training=replace(MODEL, parameters=4e9, state=StateBytes(2, 50, 2)),
        overlap=1.0,
        strategy="full",
        device=replace(CARD, memory_bytes=1e15),
    )
    assert long.communication_seconds > 1.0
    assert long.step_seconds == pytest.approx(long.communication_seconds)


def test_accumulation_is_the_sum_of_its_passes():
    """A share of 10 in passes of 4: 4 + 4 + 2; gathers at each of three."""
    found = run(batch=40, devices=4, micro_batch=4, strategy="full")
    assert (found.passes, found.micro_batch) == (3, 4)
    assert found.compute_seconds == pytest.approx(3 * 0.2 + 10 * 0.1)
    assert found.communication_bytes == pytest.approx(3 * 3 * 3 / 4 * 2e9)
    assert found.memory_bytes == 16e9 / 4 + 4e9
    assert run(batch=41, devices=4).compute_seconds == pytest.approx(0.2 + 11 * 0.1)  # the slowest device's share
    assert run(batch=4, devices=4, micro_batch=64).micro_batch == 1


@given(
    batch=st.integers(1, 4096),
    devices=st.sampled_from([1, 2, 4, 8, 16, 64]),
    micro=st.integers(1, 64),
    overlap=st.floats(0, 1),
    fixed=st.floats(0, 10),
    each=st.floats(1e-4, 10),
    strategy=st.sampled_from(["ddp", "grad_optimizer", "full"]),
)
def test_an_update_is_a_naive_sum(batch, devices, micro, overlap, fixed, each, strategy):
    batch = max(batch, devices)
    found = run(
        batch=batch, devices=devices, micro_batch=micro, overlap=overlap, step_time=(fixed, each), strategy=strategy
    )
    left, passes = -(-batch // devices), []
    while left > 0:
        passes.append(min(left, micro))
        left -= passes[-1]
    compute = sum(fixed + each * b for b in passes)
    rounds = {"ddp": 2, "grad_optimizer": 2 * len(passes), "full": 3 * len(passes)}[strategy]
    talk = rounds * (devices - 1) / devices * 2e9 / (100e9 if devices <= 8 else 25e9)
    step = compute + max(talk * (1 - overlap), talk - compute)
    assert found.passes == len(passes) and found.step_seconds == pytest.approx(step, rel=1e-9)
    steps = math.ceil(1e9 / (batch * 1000))
    assert found.steps == steps and found.dollars == pytest.approx(2 * devices * steps * step / 3600, rel=1e-9)


@given(scale=st.floats(0.01, 100), tokens=st.integers(1, 10**6))
def test_scales_come_through(scale, tokens):
    """Times s: seconds and dollars s times. Price s times: dollars. Twice the updates: twice of all."""
    base = run(training=replace(MODEL, tokens=8000 * tokens))
    slower = run(training=replace(MODEL, tokens=8000 * tokens), step_time=(0.2 * scale, 0.1 * scale))
    dearer = run(training=replace(MODEL, tokens=8000 * tokens), price_per_hour=2 * scale)
    longer = run(training=replace(MODEL, tokens=16000 * tokens))
    for name in ("seconds", "dollars"):
        assert getattr(slower, name) == pytest.approx(scale * getattr(base, name), rel=1e-9)
        assert getattr(longer, name) == pytest.approx(2 * getattr(base, name), rel=1e-9)
    assert dearer.dollars == pytest.approx(scale * base.dollars) and dearer.seconds == base.seconds
    assert longer.energy.joules == pytest.approx(2 * base.energy.joules)


def test_mfu_is_the_flops_over_the_peak():
    """6e9 FLOP a token at 40 % of 100 TFLOP/s: 150 µs a token on a device, whatever the batch."""
    found = run(step_time=None, mfu=0.4)
    assert found.tokens_per_second == pytest.approx(1e14 * 0.4 / 6e9) and found.half_batch == 0.0
    dense = run(step_time=None, mfu=0.4, training=replace(MODEL, flops_per_token=12e9))
    assert dense.tokens_per_second == pytest.approx(found.tokens_per_second / 2)


def fake_clock(sizes, overhead):
    """Seconds of sleeps of 5 ms + 1 ms·b, each late by `overhead` seconds."""
    return [MicroBatchTime(b, Estimate(t, t, t, "slept")) for b in sizes for t in [0.005 + 0.001 * b + overhead]]


def test_a_fitted_law_gives_half_batch_and_saturation():
    """The sheet's fake clock: t0 and t1 within 5 %, b_half = 5, and b* of a fine grid at its closed form.

    Sleeps were late by 3 % of t0 there (b_half 5.15). (1 - 0.05)/0.05·5 = 95 for the asymptote; of the best of 1..1000,
    b/(b + 5) >= 0.95·1000/1005 from b = 86.4.
    """
    law = fit_step_time(fake_clock(range(1, 65), 0.03 * 0.005))
    found = run(step_time=law)
    assert law.fixed.value == pytest.approx(0.005, rel=0.05) and law.per_example.value == pytest.approx(0.001, rel=0.05)
    assert found.half_batch == pytest.approx(5.15, abs=0.005)
    exact = run(step_time=fit_step_time(fake_clock(range(1, 65), 0.0)))
    assert exact.half_batch == pytest.approx(5.0) and exact.saturated_at == pytest.approx(95.0)


def test_flash_fits_where_vanilla_does_not():
    """Scores of s²: at 16,384 tokens, 32 heads and 24 layers, 412 GB a sequence; without them 5.0 GB."""
    long = {"parameters": 1e9, "tokens": 1e9, "sequence_length": 16_384, "activation_bytes": 1e9}
    kinds = {kind: Attention(kind, layers=24, hidden=2048, heads=32) for kind in ("vanilla", "flash")}
    assert run(training=Training(**long, attention=kinds["flash"]), batch=1).memory_bytes == pytest.approx(
        23.49e9, rel=1e-3
    )
    with pytest.raises(Infeasible, match=r"does not fit: ddp on 1 card at micro-batch 1 takes 434.1 GB"):
        run(training=Training(**long, attention=kinds["vanilla"]), batch=1)


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"step_time": (1.0, 0.1)}, "launch/overhead"),
        ({"step_time": (0.0, 0.001), "devices": 4}, "communication"),
        ({"step_time": (0.9, 0.1), "batch": 32, "training": replace(MODEL, activation_bytes=1.2e9)}, "memory capacity"),
        ({"step_time": (0.9, 0.1), "batch": 32}, "compute"),
        ({"step_time": (0.09, 0.1), "batch": 32, "training": replace(MODEL, activation_bytes=1.2e9)}, "compute"),
    ],
)
def test_the_bottleneck(changes, label):
    """Memory binds where twice the micro-batch does not fit in 80 GB and would be over 5 % faster."""
    assert run(**changes).bottleneck == label


def test_the_price_says_where_it_is_from():
    """A given price is said to be given; the table's carries its date and source; no price leaves dollars unknown."""
    assert str(run().price) == "2 USD/h, given"
    dated = run(device="A100-40", price_per_hour=None)
    known = hardware()["A100-40"]
    assert (dated.price.origin, dated.price.as_of, dated.price.source) == (
        "table",
        known.price_as_of,
        known.price_source,
    )
    assert known.price_as_of in str(dated.price) and dated.reasons["dollars"].inputs["price"] == str(dated.price)
    free = run(price_per_hour=None)
    assert (free.price, free.dollars, free.tokens_per_dollar) == (None, None, None)
    assert RunCost.from_json(free.to_json()) == free


def test_what_memory_counts_is_said():
    assert run().notes == ()
    unknown = run(training=replace(MODEL, activation_bytes=None))
    alone, one_pass = unknown.notes
    assert alone == "activation_bytes is not known: memory is that of the states alone"
    assert one_pass.startswith("micro_batch is not given: each device's share is taken in one pass")
    assert unknown.memory_bytes == 16e9
    assert run(training=replace(MODEL, activation_bytes=None), micro_batch=8).notes == (alone,)
    assert run(training=replace(MODEL, activation_bytes=None), batch=1).notes == (alone,)


def test_counts_in_other_units_are_said():
    """A batch of more tokens than the run is refused; one in tokens and a model in billions are noted."""
    assert run(training=replace(MODEL, tokens=8000)).steps == 1
    with pytest.raises(Infeasible, match=r"batch x sequence_length must be at most tokens 7999, got 8 x 1000; batch"):
        run(training=replace(MODEL, tokens=7999))
    big = {"batch": 100_001, "micro_batch": 8, "training": replace(MODEL, tokens=1e12)}
    assert run(**big).notes == ("batch counts sequences: 100001 of 1000 are 1e+08 tokens an update",)
    assert run(**big | {"batch": 100_000}).notes == ()
    assert run(training=replace(MODEL, parameters=7)).notes == ("7 parameters: the count is plain, 7e9 for 7 billion",)


def test_what_is_no_training_is_refused():
    with pytest.raises(
        InputError, match=r"training must be a Training\(parameters, tokens, sequence_length\), got 1000000000"
    ):
        cost(1_000_000_000, batch=8, device=CARD, step_time=LINE)


def test_numpy_numbers_are_numbers():
    model = Training(np.int64(10**9), np.float64(1e9), np.int32(1000), activation_bytes=np.float32(1e9))
    found = cost(model, batch=np.int64(8), device=CARD, devices=np.int32(1), step_time=np.array(LINE), price_per_hour=2)
    assert RunCost.from_json(found.to_json()) == found == run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, r"batch must be an integer of at least 1, got 0"),
        ({"batch": 8.0}, r"batch must be an integer of at least 1, got 8.0"),
        ({"batch": 2, "devices": 4}, r"batch must be at least devices, a sequence for each, got batch=2, devices=4"),
        (
            {"devices": 12, "batch": 12},
            r"devices must be at most 8 or a multiple of it \(whole nodes of card\), got 12",
        ),
        ({"device": "abacus"}, r"device must be a Device or one of \['A100-40', .*got 'abacus'"),
        ({"step_time": None}, r"exactly one of step_time and mfu must be given, got step_time=None, mfu=None"),
        ({"mfu": 0.4}, r"exactly one of step_time and mfu must be given"),
        ({"step_time": None, "mfu": 40}, r"mfu must lie in \(0, 1\], got 40"),
        ({"step_time": (0.1,)}, r"step_time must be a StepTimeLaw or finite seconds \(t0, t1\), got \(0.1,\)"),
        ({"step_time": (math.nan, 1)}, r"step_time must be a StepTimeLaw or finite seconds"),
        ({"step_time": 0.5}, r"step_time must be a StepTimeLaw or finite seconds \(t0, t1\), got 0.5"),
        ({"step_time": (-0.1, 1.0)}, r"step_time's t0 must be >= 0, got -0.1"),
        ({"step_time": (0.1, 0.0)}, r"step_time's t1 must be finite and > 0, got 0.0"),
        ({"overlap": 1.1}, r"overlap must lie in \[0, 1\], got 1.1"),
        ({"utilisation": math.nan}, r"utilisation must lie in \[0, 1\], got nan"),
        ({"price_per_hour": -1.0}, r"price_per_hour must be finite and > 0, got -1.0"),
        ({"reserve": 1.0}, r"reserve must lie in \[0, 1\), got 1.0"),
        ({"g_per_kwh": -1}, r"g_per_kwh must be finite and >= 0, or None, got -1"),
        ({"inter_node_bandwidth": 0}, r"inter_node_bandwidth must be finite and > 0, got 0"),
        ({"micro_batch": 0}, r"micro_batch must be an integer of at least 1, got 0"),
        ({"strategy": "zero9"}, r"strategy must be one of"),
        ({"batch": 65}, r"takes 81 GB \(of 1e9 bytes\) a device, 1 GB more than there is"),
        ({"reserve": 0.9}, r"takes 24 GB \(of 1e9 bytes\) a device, 16 GB more than there is"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": 0}, r"parameters must be finite and > 0, got 0"),
        ({"tokens": math.inf}, r"tokens must be finite and > 0, got inf"),
        ({"sequence_length": 10.5}, r"sequence_length must be an integer of at least 1, got 10.5"),
        ({"flops_per_token": -1}, r"flops_per_token must be finite and > 0, got -1"),
        ({"activation_bytes": math.inf}, r"activation_bytes must be finite, got inf"),
        ({"activation_bytes": math.nan}, r"activation_bytes must be >= 0, got nan"),
    ],
)
def test_a_training_that_is_none_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(MODEL, **changes)
