"""A few points to laws: both errors beside each other, by hand and from the project's own measurements."""

import math
from dataclasses import replace

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, MicroBatchTime
from batchlab.measure.speed.step_time import throughput
from batchlab.planner.costs.run_cost import cost
from batchlab.planner.costs.training import Training
from batchlab.planner.fine_tune.calibration import Calibration, calibrate
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch
from tests.planner.fine_tune import published
from tests.planner.fine_tune.published import points
from tests.spine.facts_fixture import hand_facts, hand_job

LINE = [(b, 0.5 + 0.1 * b) for b in (1, 2, 4, 8, 16)]


def test_a_fake_clock_is_read():
    """Sleeps of 5 ms + 1 ms·b, 3 % late: t0 and t1 within 5 %, half the speed at 5.15, and nothing left to explain."""
    found = calibrate([(b, 1.03 * 0.005 + 0.001 * b) for b in (1, 2, 4, 8, 16, 32, 64)])
    law = found.linear_time.law()
    assert law.fixed.value == pytest.approx(0.005, rel=0.05) and law.per_example.value == pytest.approx(0.001, rel=0.05)
    assert law.half.value == pytest.approx(5.15) and found.errors["linear time"].left_out < 1e-9
    assert found.best is found.linear_time and found.memory is None
    assert Calibration.from_json(found.to_json()) == found


def test_left_out_errors_are_naive_refits():
    """numpy's line by 1/t and numpy's logarithm, each point left out in turn; those that every law can do without."""
    some = points(published.MIXTRAL_A100_80)
    found = calibrate(some, c3=1.8).errors
    b, s, q = np.array([(p.batch, p.active, p.speed) for p in some]).T
    misses = {"linear time": [], "code": []}
    for place in range(len(some)):
        keep = np.arange(len(some)) != place
        x = np.log(b) / s
        c = np.linalg.lstsq(np.stack([np.ones(keep.sum()), x[keep]], 1), q[keep], rcond=None)[0]
        misses["code"].append(c[0] + c[1] * x[place] - q[place])
        design, root = np.stack([np.ones_like(b), b, b * s], 1), np.sqrt(q / b)
        t = np.linalg.lstsq((design * root[:, None])[keep], (b / q * root)[keep], rcond=None)[0]
        misses["linear time"].append(b[place] / (design[place] @ t) - q[place])
    for name, errors in misses.items():
        assert found[name].left_out == pytest.approx(math.sqrt(np.square(errors).mean()), rel=1e-9)
        assert found[name].relative == pytest.approx(math.sqrt(np.square(np.array(errors) / q).mean()), rel=1e-9)
        assert found[name].predicted == len(some)


def test_laws_are_judged_on_the_same_points():
    """Without the dense batch of 2 no exponent is identified: nine of ten points count, for every law."""
    assert {error.predicted for error in calibrate(points(published.MIXTRAL_A40)).errors.values()} == {9}


def test_the_better_law_is_taken():
    """A logarithm where the points are one, a line where they are."""
    curved = calibrate([(b, b / (1 + 0.5 * math.log(b))) for b in (1, 2, 4, 8, 16)])
    assert curved.best is curved.logarithm and curved.errors["code"].left_out < 1e-9
    line = calibrate(LINE)
    assert line.best is line.linear_time


def test_two_points_give_a_line_without_errors():
    found = calibrate([(1, 0.6), (4, 0.9)])
    assert found.linear_time.law().per_example.value == pytest.approx(0.1)
    assert math.isnan(found.errors["linear time"].left_out) and found.best is found.linear_time
    assert "nan" in found.table()


def test_points_of_memory():
    """Peaks beside seconds: M_model 2 GB, 1e7 bytes a token; speed is of the length that was asked for."""
    rows = [(b, 0.5 + 0.001 * b * length, 2e9 + 1e7 * b * length, length) for b in (1, 2, 4) for length in (64, 128)]
    with pytest.raises(
        InputError, match=r"sequence_length must be given, for speed is counted at one: seconds are of \[64"
    ):
        calibrate(rows)
    with pytest.raises(InputError, match=r"sequence_length must be one of \[64.0, 128.0\], got 100"):
        calibrate(rows, sequence_length=100)
    found = calibrate(rows, sequence_length=128)
    assert found.linear_time.law().per_example.value == pytest.approx(0.128)
    assert found.memory.bytes(3, 100) == pytest.approx(5e9) and len(found.points) == 3
    untimed = [MeasuredBatch(8, None, 2e9 + 8e7 * 64, 64)]
    assert calibrate([*rows, *untimed], sequence_length=64).memory.largest_batch == 8


def test_the_table_says_both_errors_and_every_speed():
    text = calibrate(points(published.MIXTRAL_A40), form="power").table()
    lines = text.splitlines()
    assert lines[0].split() == ["law", "rmse", "q/s", "left", "out", "q/s", "left", "out"]
    assert [line.split()[0] for line in lines[1:5]] == ["linear", "code", "shift", "power"]
    assert "g: Estimate(0.4829 [" in text and "t0 at sparsity 0.25, s: Estimate(" in text
    head = next(line for line in lines if line.startswith("batch")).split()
    assert head == ["batch", "sparsity", "measured", "q/s", "linear", "time", "q/s", "power", "q/s"]
    assert lines[-1].split()[:3] == ["8", "0.25", "1.655"] and len([1 for line in lines if line[:1].isdigit()]) == 10


def test_facts_are_points_of_whole_steps():
    """A pass of 2 ms + 1 ms an example and an update of 4 ms: t0 6 ms, t1 1 ms; the law prices a run."""
    facts = hand_facts(pass_seconds=2e-3, example_seconds=1e-3, update_seconds=4e-3)
    found = calibrate(facts)
    law = found.linear_time.law()
    assert (law.fixed.value, law.per_example.value) == pytest.approx((6e-3, 1e-3))
    assert found.notes == ("memory was not measured at every size: no law of memory",) and found.memory is None
    run = cost(Training(1e6, 1e6, 1), batch=32, device="T4", step_time=law)
    assert run.step_seconds == pytest.approx(facts.step_time(32)) == pytest.approx(0.038)


def test_memory_of_facts_is_a_law_or_a_note():
    facts = hand_facts(micro_batches=(1, 2, 4))
    grown = tuple(replace(point, memory_bytes=1_000_000 + 5_000 * point.examples) for point in facts.micro_batches)
    found = calibrate(replace(facts, micro_batches=grown))
    assert found.memory.model_bytes.value == pytest.approx(1e6) and found.memory.bytes(10) == pytest.approx(1.05e6)
    flat = tuple(replace(point, memory_bytes=1_000_000) for point in facts.micro_batches)
    found = calibrate(replace(facts, micro_batches=flat))
    assert found.memory is None and found.notes[0].startswith("no law of memory: M_model is not identified")


def test_noise_of_the_measured_times_widens_the_law():
    facts = hand_facts(micro_batches=(1, 2, 4, 8))
    noisy = tuple(
        MicroBatchTime(p.examples, Estimate(p.seconds.value, 0.7 * p.seconds.value, 1.4 * p.seconds.value, "drawn"))
        for p in facts.micro_batches
    )
    narrow, wide = (calibrate(some).linear_time.law() for some in (facts, replace(facts, micro_batches=noisy)))
    assert wide.per_example.high - wide.per_example.low > narrow.per_example.high - narrow.per_example.low + 1e-4
    assert wide.per_example.low < 1e-3 < wide.per_example.high


def test_throughput_is_read_as_steps():
    """Of a real measurement the points are its passes and updates, with their intervals."""
    found = throughput(hand_job(), (1, 16, 64), seconds=0.2, device="cpu")
    for point, size in zip(calibrate(found).points, found.micro_batches, strict=True):
        assert (point.batch, point.seconds) == (size.examples, size.seconds.value + found.update.value)
        assert (point.low, point.high) == (size.seconds.low + found.update.low, size.seconds.high + found.update.high)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate([(4, 1.0), (4, 1.1)]), r"points must hold two batch sizes or more: one, 4, fits no law"),
        (lambda: calibrate([]), r"points must be one or more, each with its seconds, got 0"),
        (lambda: calibrate("12"), r"a point must be MeasuredBatch or \(batch, seconds.*got '1'"),
        (lambda: calibrate(LINE, form="power"), r"g is not identified: measure batches above 1 at two sparsities"),
        (lambda: calibrate(LINE, c3=None), r"C3 is not identifiable"),
        (lambda: calibrate(LINE, model_bytes=1e9), r"model_bytes and sparse_share are of the memory, but no point has"),
        (
            lambda: calibrate([(b, t, 1e9 * b, 1, 0.25) for b, t in LINE]),
            r"C1 is not identified: all points have the sparsity 0.25",
        ),
        (lambda: calibrate([(b, t, 1e9) for b, t in LINE]), r"M_model is not identified: all points have one memory"),
        (lambda: calibrate(LINE, coverage=0), r"coverage must lie in \(0, 1\), got 0"),
    ],
)
def test_what_identifies_no_law_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
