"""Dollars of fine-tuning: the published rows, scales, what does not fit, and which law was asked."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.planner.fine_tune.calibration import calibrate
from batchlab.planner.fine_tune.fine_tune_cost import FineTuneCost, fine_tune_cost
from batchlab.planner.fine_tune.linear_time import LinearTimeModel
from batchlab.planner.fine_tune.memory_model import BatchMemoryModel
from batchlab.planner.fine_tune.throughput_model import ThroughputModel
from batchlab.planner.hardware import hardware
from tests.planner.fine_tune import published
from tests.planner.fine_tune.published import points

MIXTRAL = BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=23.35e9)
H100 = points(published.MIXTRAL_H100)


@pytest.mark.parametrize(
    ("speed", "price", "dollars", "printed"),
    [(1.01, 0.79, 32.59, 32.7), (2.74, 1.67, 25.40, 25.4), (4.90, 2.1, 17.86, 17.9)],
)
def test_the_published_costs(speed, price, dollars, printed):
    """Mixtral, math, sparse, 10 epochs of 15,000 queries: A40, A100-80, H100. The paper prints 32.7 for the A40."""
    found = fine_tune_cost(speed, queries=15_000, epochs=10, price_per_hour=price)
    assert round(found.dollars.value, 2) == dollars and abs(found.dollars.value - printed) < 0.12
    half = fine_tune_cost(speed, queries=15_000, epochs=10, price_per_hour=price / 2)
    assert half.dollars.value == pytest.approx(found.dollars.value / 2) and half.hours == found.hours


def test_two_million_queries_are_three():
    """The 3460 USD example on an H100: 2,914,896 queries give 3470.11, exactly 2.0 M only 2381."""
    dollars = [
        fine_tune_cost(4.90, queries=queries, epochs=10, price_per_hour=2.1).dollars.value
        for queries in (2_914_896, 2e6)
    ]
    assert (round(dollars[0], 2), round(dollars[1])) == (3470.11, 2381)


def test_the_largest_batch_is_taken():
    """Mixtral at 48 GB, L 512, sparse: B_max 8, and its speed by the fitted law; the interval carries through."""
    law = ThroughputModel.fit(points(published.MIXTRAL_A40), c3=1.8)
    found = fine_tune_cost(
        law,
        queries=15_000,
        epochs=10,
        memory=MIXTRAL,
        gpu_bytes=48e9,
        sequence_length=512,
        sparsity=0.25,
        price_per_hour=0.79,
    )
    assert (found.batch, found.max_batch, found.law) == (8, 8, "logarithm, form code")
    assert found.queries_per_second == law.estimate(8, 0.25)
    assert found.hours.value == pytest.approx(150_000 / 3600 / law.predict(8, 0.25))
    assert found.dollars.low == pytest.approx(0.79 * 150_000 / 3600 / found.queries_per_second.high)
    assert found.dollars.low < found.dollars.value < found.dollars.high
    assert FineTuneCost.from_json(found.to_json()) == found
    assert found.reasons["max_batch"].value == 8 and "price" in found.reasons["dollars"].inputs
    smaller = fine_tune_cost(
        law, queries=15_000, epochs=10, memory=MIXTRAL, gpu_bytes=48e9, sequence_length=512, sparsity=0.25, batch=4
    )
    assert smaller.hours.value > found.hours.value and smaller.dollars is None and smaller.price is None


def test_a_batch_that_does_not_fit_is_refused():
    shared = {"queries": 1e4, "epochs": 1, "memory": MIXTRAL, "sequence_length": 512, "sparsity": 0.25}
    law = LinearTimeModel.fit(points(published.MIXTRAL_A40))
    with pytest.raises(InputError, match=r"batch must be at most 8, the largest that fits, got 9"):
        fine_tune_cost(law, batch=9, gpu_bytes=48e9, **shared)
    with pytest.raises(
        InputError,
        match=r"does not fit: one query of length 512 lacks 10.1 GB \(of 1e9 bytes\) beside the 16 GB there are",
    ):
        fine_tune_cost(law, gpu_bytes=16e9, **shared)
    tight = 23.35e9 + MIXTRAL.query_bytes(512, 0.25)
    assert fine_tune_cost(law, gpu_bytes=tight * 1.0001, **shared).max_batch == 1
    with pytest.raises(InputError, match=r"does not fit"):
        fine_tune_cost(law, gpu_bytes=tight * 1.0001, reserve=0.01, **shared)


def test_beyond_the_points_the_logarithm_stops_and_the_line_says_so():
    """B_max 35 at 120 GB; Mixtral's A40 points end at 8: the logarithm is asked at 16, the line at 35."""
    some = points(published.MIXTRAL_A40)
    shared = {
        "queries": 1e4,
        "epochs": 1,
        "memory": MIXTRAL,
        "gpu_bytes": 120e9,
        "sequence_length": 512,
        "sparsity": 0.25,
    }
    logarithm = fine_tune_cost(ThroughputModel.fit(some), **shared)
    assert (logarithm.batch, logarithm.max_batch) == (16, 35)
    assert logarithm.notes == ("B_max 35 is beyond twice the largest fitted batch: 16 is taken",)
    line = fine_tune_cost(LinearTimeModel.fit(some), **shared)
    assert line.batch == 35 and line.notes == (
        "B_max 35 is beyond twice the largest fitted batch: the line is extrapolated",
    )
    with pytest.raises(InputError, match=r"batch must lie in 1..16, up to twice the largest fitted one, got 20"):
        fine_tune_cost(ThroughputModel.fit(some), batch=20, **shared)


def test_a_calibration_brings_its_better_law_its_memory_and_all_errors():
    rows = [(b, 2.5 + 0.3 * b, 24e9 + 2e9 * b, 512) for b in (1, 2, 4, 8)]
    found = fine_tune_cost(
        calibrate(rows, sequence_length=512),
        queries=3600,
        epochs=2,
        sequence_length=512,
        device="A40",
        price_per_hour=1.0,
    )
    assert found.law == "B/(t0 + t1*B)" and set(found.errors) == {"linear time", "code"}
    room = hardware()["A40"].memory_bytes
    assert found.max_batch == math.floor((room - 24e9) / 2e9)
    assert found.hours.value == pytest.approx(2 * (2.5 + 0.3 * found.batch) / found.batch, rel=1e-9)
    assert found.dollars.value == pytest.approx(found.hours.value)


def test_the_length_is_the_calibrations_own():
    """1e6 bytes a token: 61 queries of 512 beside 20 GB of an A40, and not 31,539 of length 1."""
    known = calibrate([(b, 1 + 0.1 * b, 20e9 + b * 512 * 1e6, 512) for b in (1, 2, 4, 8)])
    shared = {"queries": 1000, "epochs": 1, "device": "A40"}
    found = fine_tune_cost(known, **shared)
    assert found.max_batch == fine_tune_cost(known, sequence_length=512, **shared).max_batch == 61
    shorter = fine_tune_cost(known, sequence_length=128, batch=4, **shared)
    assert shorter.notes == ("queries/s are of length 512, and are taken for length 128",)
    mixed = fine_tune_cost(2.0, memory=known.memory, **shared)
    assert mixed.max_batch == 61
    with pytest.raises(InputError, match=r"sequence_length must be given, .*: no points say it"):
        fine_tune_cost(known.linear_time, memory=MIXTRAL, **shared)


def test_published_constants_meet_a_cards_gibibytes():
    """8 and 20 by GB of 2^30 on A40 and H100-80; by 1e9 they are 10 and 22, and a note says why."""
    law = LinearTimeModel.fit(points(published.MIXTRAL_A40))
    shared = {"queries": 1e4, "epochs": 1, "sequence_length": 512, "sparsity": 0.25}
    gib = BatchMemoryModel.of(c0_per_gb=62, sparse_share=0.89, model_bytes=23.35 * 2**30, gb=2**30)
    for device, most, off in (("A40", 8, 10), ("H100-80", 20, 22)):
        right = fine_tune_cost(law, memory=gib, device=device, **shared)
        assert right.max_batch == most and not any("GiB" in note for note in right.notes)
        wrong = fine_tune_cost(law, memory=MIXTRAL, device=device, **shared)
        assert wrong.max_batch == off and "with gb=2**30" in wrong.notes[0]
    assert fine_tune_cost(law, memory=MIXTRAL, gpu_bytes=48e9, device="A40", **shared).notes == ()


def test_a_batch_beyond_the_points_is_said():
    """Asked for by the caller as by B_max: beyond twice the largest fitted batch, 8, the line is extrapolated."""
    known = calibrate([(b, 1 + 0.1 * b) for b in (1, 2, 4, 8)])
    assert known.best is known.linear_time
    assert fine_tune_cost(known, queries=1e4, epochs=1, batch=16).notes == ()
    assert fine_tune_cost(known, queries=1e4, epochs=1, batch=1000).notes == (
        "batch 1000 is beyond twice the largest fitted batch: the line is extrapolated",
    )


def test_the_price_of_a_device_is_dated():
    device = next(device for device in hardware().values() if device.price_per_hour)
    found = fine_tune_cost(2.0, queries=7200, epochs=1, device=device)
    assert found.dollars.value == pytest.approx(device.price_per_hour)
    assert (found.price.origin, found.price.as_of) == ("table", device.price_as_of)


def test_numpy_numbers_are_numbers():
    found = fine_tune_cost(np.float64(2.0), queries=np.int64(7200), epochs=np.int32(2), price_per_hour=np.float32(1.5))
    assert FineTuneCost.from_json(found.to_json()) == found and found.dollars.value == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 0}, r"queries must be finite and > 0, got 0"),
        ({"epochs": math.inf}, r"epochs must be finite and > 0, got inf"),
        ({"speed": -1.0}, r"speed must be finite and > 0, got -1.0"),
        ({"speed": "fast"}, r"speed must be finite and > 0, got 'fast'"),
        ({"price_per_hour": 0.0}, r"price_per_hour must be finite and > 0, got 0.0"),
        ({"batch": math.nan}, r"batch must be finite and > 0, got nan"),
        ({"sparsity": "a"}, r"sparsity must lie in \(0, 1\], the share of experts at work, got 'a'"),
        ({"sparsity": 25}, r"sparsity must lie in \(0, 1\], the share of experts at work, got 25"),
        ({"sequence_length": "long"}, r"sequence_length must be finite and > 0, got 'long'"),
        ({"device": "abacus"}, r"device must be a Device or one of"),
        ({"memory": MIXTRAL}, r"memory needs gpu_bytes or a device to say what fits, got neither"),
        ({"gpu_bytes": 48e9}, r"gpu_bytes needs a memory model to say what fits, got gpu_bytes=48000000000.0 alone"),
        (
            {"speed": LinearTimeModel.fit(H100), "sparsity": 0.25},
            r"batch must be given, or a memory model with gpu_bytes",
        ),
        ({"speed": LinearTimeModel.fit(H100), "batch": 4}, r"sparsity must be given: the points have \[0.25, 1.0\]"),
        (
            {"speed": LinearTimeModel.fit(H100), "batch": 4, "sparsity": 0.1},
            r"sparsity must lie within the fitted 0.25..1",
        ),
        ({"speed": ThroughputModel.fit([(2, 4.0), (4, 4.0)]), "batch": 1}, r"the law gives a speed above 0, got 1"),
    ],
)
def test_bad_input_is_named(changes, message):
    settings = {"speed": 2.0, "queries": 100, "epochs": 1} | changes
    with pytest.raises(InputError, match=message):
        fine_tune_cost(settings.pop("speed"), **settings)
