"""The range test against a quadratic, a naive moving average and torch's own optimizers; the search against parabolas.

Gradient descent on ½hw² multiplies w by 1 - ηh: the loss is least when η first passes 2/h, its limit of stability.
"""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.stream import SampleStream
from batchlab.measure.course.learning_rate import RangeTest, choose, lr_range, ramp, range_test, set_momentum
from tests.spine.jobs import toy_job


@given(low=st.floats(1e-9, 1e3), factor=st.floats(1.1, 1e9), steps=st.integers(4, 300))
def test_the_ramp_is_geometric_between_its_ends(low, factor, steps):
    rates = ramp(low, low * factor, steps)
    assert len(rates) == steps and rates[0] == low
    assert rates[-1] == pytest.approx(low * factor, rel=1e-12)
    assert np.diff(np.log(rates)) == pytest.approx(math.log(factor) / (steps - 1), rel=1e-6)


def descent(h, w=1.0):
    """One step of gradient descent on ½hw² at each call; returns the loss before it."""

    def update(rate):
        nonlocal w
        loss = 0.5 * h * w * w
        w -= rate * h * w
        return loss

    return update


@given(
    h=st.floats(1e-3, 1e3), ramped=st.one_of(st.tuples(st.just(0.13), st.integers(20, 400)), st.just((1.99, 10_000)))
)
def test_a_quadratic_is_least_and_diverges_at_its_limit_of_stability(h, ramped):
    """With y = ηh/2 each step multiplies |w| by 2y - 1, between y and y² above the limit; y grows by q a step.

    So |w| doubles, and the loss grows 4 times, D steps after its least where D(D + 1)·ln q > ln 2 at the earliest and
    (D - 1)(D - 2)/2·ln q <= ln 2 at the latest: at 2/h itself for a slow ramp.
    """
    start, steps = ramped
    found = range_test(descent(h), low=start / h, high=9 / h, steps=steps, smoothing=1.0, stop_factor=4.0)
    log_q = math.log(9 / start) / (steps - 1)
    assert 2 / h < found.minimum <= 2 / h * math.exp(log_q) * (1 + 1e-9)
    after = round(math.log(found.divergence / found.minimum) / log_q)
    assert (after - 1) * (after - 2) / 2 * log_q <= math.log(2) < after * (after + 1) * log_q
    assert steps < 10_000 or found.divergence < 1.02 * 2 / h


LOSSES = st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=60)


def naive_average(losses, weight, debias):
    """Each moving average written out as one weighted mean of the losses so far."""
    averages = []
    for t in range(1, len(losses) + 1):
        weights = weight * (1 - weight) ** np.arange(t)[::-1]
        if not debias:
            weights[0] /= weight
        averages.append((weights * losses[:t]).sum() / weights.sum())
    return np.array(averages)


@given(losses=LOSSES, smoothing=st.floats(0.01, 1.0), debias=st.booleans())
@example(losses=[5.0, 4.0, 3.0, 2.0, 100.0, 60.0, 3.0], smoothing=1.0, debias=True)  # falls most after its least
def test_the_readings_are_those_of_a_naive_moving_average(losses, smoothing, debias):
    feed = iter(losses)
    found = range_test(
        lambda _: next(feed), steps=len(losses), smoothing=smoothing, debias=debias, stop_factor=math.inf
    )
    expected = naive_average(np.array(losses), smoothing, debias)
    assert found.losses == tuple(losses) and found.learning_rates == tuple(ramp(1e-6, 10.0, len(losses)))
    assert found.smoothed == pytest.approx(expected.tolist(), rel=1e-9)
    warm = math.ceil(1 / smoothing) - 1
    first = warm if warm <= len(losses) - 3 else 0
    least = first + int(np.argmin(found.smoothed[first:]))
    assert found.minimum == found.learning_rates[least] and found.divergence is None and found.read_from == first
    if least >= first + 2:
        reach = min(max(1, round(0.5 / smoothing)), (least - first) // 2)
        slopes = [
            found.smoothed[i + reach] - found.smoothed[i - reach] for i in range(first + reach, least - reach + 1)
        ]
        place = found.learning_rates.index(found.steepest) - first - reach
        assert slopes[place] == pytest.approx(min(slopes), rel=1e-9, abs=1e-12) and found.steepest < found.minimum
    assert RangeTest.from_json(found.to_json()) == found


@given(losses=LOSSES, power=st.integers(-20, 20))
def test_the_unit_of_the_loss_changes_no_reading(losses, power):
    feeds = [iter([unit * loss for loss in losses]) for unit in (1.0, 2.0**power)]
    found = [range_test(lambda _, feed=feed: next(feed), steps=len(losses)) for feed in feeds]
    assert found[0].reason == found[1].reason and found[0].learning_rates == found[1].learning_rates


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 1.0, 4.0, 4.5, 1.0], 3),
        ([3.0, 1.0, math.nan, 1.0], 2),
        ([3.0, 1.0, math.inf, 1.0], 2),
        ([1.0, -1.0, 2.0, 2.5, 1.0], 3),
        ([3.0, 1.0, 4.0, 3.9, 4.0], 5),
    ],
)
def test_it_diverges_past_its_factor_of_the_least_or_where_it_is_not_finite(losses, kept):
    """Without smoothing and at a factor of 4: past 4 times a positive least; past 3 sizes above a negative one."""
    feed = iter(losses)
    found = range_test(lambda _: next(feed), low=1e-3, high=1e1, steps=len(losses), smoothing=1.0)
    ended = kept < len(losses)
    assert found.divergence == (ramp(1e-3, 1e1, len(losses))[kept] if ended else None)
    assert len(found.losses) == kept + (ended and math.isfinite(losses[kept]))
    assert found.minimum == found.learning_rates[1]


def test_what_was_read_in_words():
    feed = iter([4.0, 3.9, 3.0, 1.0, 0.9, 99.0])
    found = range_test(lambda _: next(feed), low=1e-3, high=1e2, steps=6, smoothing=1.0)
    assert found.suggestion == pytest.approx(math.sqrt(0.1 * 10), rel=1e-9)
    assert found.reason == "range test: falls fastest at 0.1, least at 10, diverged at 100"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 0.0}, r"smoothing must lie in \(0, 1\], got 0.0"),
        ({"smoothing": 1.1}, r"smoothing must lie in \(0, 1\], got 1.1"),
        ({"stop_factor": 1.0}, "stop_factor must be > 1, got 1.0"),
        ({"low": 0.0}, "low and high must satisfy 0 < low < high, got low=0.0, high=10.0"),
        ({"low": 1.0, "high": math.inf}, "low and high must satisfy 0 < low < high, got low=1.0, high=inf"),
        ({"steps": 3}, "steps must be an integer of at least 4, got 3"),
        ({"steps": True}, "steps must be an integer of at least 4, got True"),
    ],
)
def test_a_bad_range_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        range_test(lambda _: 1.0, **changes)


def test_a_loss_that_is_not_finite_at_once_is_refused():
    with pytest.raises(InputError, match="the loss is nan at the first step of the range test, learning rate 1e-06"):
        range_test(lambda _: math.nan)


def line_job(optimizer):
    """Six weights without a bias, all 0.1 at first, so that torch's own optimizer needs no parameter groups."""

    def model():
        made = nn.Linear(6, 1, bias=False).double()
        nn.init.constant_(made.weight, 0.1)
        return made

    return dataclasses.replace(toy_job(optimizer=optimizer, n=32), model=model)


NAIVE = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01),
}


@pytest.mark.parametrize("batch_size", [32, 5])
@pytest.mark.parametrize("optimizer", sorted(NAIVE))
def test_a_job_is_trained_as_by_a_plain_loop(optimizer, batch_size):
    job, ramped = line_job(optimizer), {"low": 1e-3, "high": 3.0, "steps": 40, "smoothing": 0.2, "stop_factor": 3.0}
    found = lr_range(job, batch_size=batch_size, **ramped, device="cpu", seed=4)
    model, stream, position = job.model(), SampleStream(32, derive_seed(4, "stream")), 0
    plain = NAIVE[optimizer](model.parameters())

    def update(rate):
        nonlocal position
        x, y = job.train[stream.indices(position, batch_size)]
        position += batch_size
        plain.param_groups[0]["lr"] = rate
        plain.zero_grad()
        loss = (model(x).squeeze(1) - y).square().mean()
        loss.backward()
        plain.step()
        return loss.item()

    expected = range_test(update, **ramped)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.smoothed == pytest.approx(expected.smoothed, rel=1e-9)
    assert found.reason == expected.reason and len(found.losses) >= 20


def test_a_range_test_is_a_function_of_its_seed_and_keeps_the_callers_generators():
    toy, made = toy_job(dropout=0.3), []
    job = dataclasses.replace(toy, model=lambda: made.append(toy.model()) or made[-1])
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again, other = (lr_range(job, steps=20, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert first == again and first.losses != other.losses
    assert len(made) == 3


@pytest.mark.parametrize("batch_size", [0, 33, math.nan])
def test_a_batch_that_the_data_cannot_fill_is_refused(batch_size):
    with pytest.raises(InputError, match=r"batch_size must lie in 1..32, the training examples, got "):
        lr_range(line_job("sgd"), batch_size=batch_size)


@given(
    vertex=st.floats(-4.0, 4.0),
    bend=st.floats(0.05, 2.0),
    floor=st.sampled_from([None, -100.0]),
    ratio=st.sampled_from([1.5, 2.0, 4.0]),
    start=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_vertex_of_a_parabola_is_found(vertex, bend, floor, ratio, start):
    """Of the loss itself where it is not positive, else of its logarithm."""
    asked = []

    def run(rate):
        asked.append(rate)
        square = bend * (math.log2(rate / start) - vertex) ** 2
        return math.exp(square) if floor is None else square + floor

    found = choose(run, start, ratio=ratio, most=30)
    assert math.log2(found.learning_rate / start) == pytest.approx(vertex, abs=1e-6)
    assert not found.at_edge and found.why == f"least loss of {len(asked)} short runs, by a parabola in log rate"
    assert [trial.learning_rate for trial in found.trials] == sorted(asked) and len(set(asked)) == len(asked)
    assert [trial.loss for trial in found.trials] == [run(rate) for rate in sorted(asked)]
    steps = np.diff(np.log([trial.learning_rate for trial in found.trials]))
    assert steps == pytest.approx(math.log(ratio), rel=1e-6)


def falling(rate):
    return 1 / rate


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ({"most": 5}, [0.5, 1.0, 2.0, 4.0, 8.0]),
        ({"may_go_on": lambda: False}, [1.0]),
        ({}, [2.0**k for k in range(-1, 8)]),
    ],
)
def test_a_best_that_is_not_enclosed_is_said_to_be_at_the_edge(options, tried):
    found = choose(falling, 1.0, **options)
    assert [trial.learning_rate for trial in found.trials] == tried
    assert (found.learning_rate, found.at_edge) == (tried[-1], True)
    assert found.why == f"least loss of {len(tried)} short runs, at the edge of them"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_run_that_diverged_encloses_the_best_but_bends_no_parabola(bad):
    found = choose(lambda rate: bad if rate > 4 else falling(rate), 1.0)
    assert (found.learning_rate, found.at_edge) == (4.0, False)
    assert found.trials[-1].learning_rate == 8.0


def test_it_goes_down_while_everything_diverges():
    found = choose(lambda rate: math.inf if rate > 0.2 else rate, 1.0, most=5)
    assert found.learning_rate == 2.0**-4 and found.at_edge
    with pytest.raises(InputError, match="not finite at any learning rate that was tried: 0.25, 0.5, 1"):
        choose(lambda _: math.nan, 1.0, most=3)


@pytest.mark.parametrize(("start", "ratio"), [(0.0, 2.0), (math.inf, 2.0), (1.0, 1.0)])
def test_a_bad_search_is_named(start, ratio):
    with pytest.raises(InputError, match=f"start must be > 0 and ratio > 1, got start={start}, ratio={ratio}"):
        choose(falling, start, ratio=ratio)


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_moves_no_reading_by_more_than_a_factor(noise):
    """A loss that falls from 1 to 0.3 around a rate of 0.17 and rises beyond 2, of 10 seeds each; all are within 8."""
    without = range_test(_noisy(0.0, 0))
    for seed in range(10):
        found = range_test(_noisy(noise, seed))
        assert found.fell and found.cycle().bracketed and found.read_from == 19
        assert without.suggestion / 8 < found.suggestion < without.suggestion * 8


def test_a_loss_that_is_noise_alone_is_said_to_be():
    """A fall counts from three standard errors on: the least of 80 averages deceives few of 40 seeds."""
    found = [range_test(_noisy(0.2, seed, fall=0.0), high=1.0) for seed in range(40)]
    assert sum(test.fell for test in found) <= 12
    (test, *_) = (t for t in found if not t.fell and t.minimum > t.learning_rates[t.read_from])
    assert "but the loss did not fall above its noise: take more steps" in test.reason
    assert not test.cycle().bracketed and "did not fall above its noise" in test.cycle().reason


def _noisy(noise, seed, fall=0.7):
    draw = np.random.default_rng(seed)

    def loss(rate):
        clean = 1 - fall / (1 + (0.17 / rate) ** 1.5) + 0.2 * max(0.0, rate - 2) ** 2
        return clean * (1 + noise * draw.standard_normal())

    return loss


def test_a_loss_that_only_rises_falls_nowhere():
    found = range_test(lambda rate: 1 + rate, low=1e-3, high=1.0, steps=10)
    assert found.steepest == found.minimum == found.learning_rates[0]


def test_a_linear_ramp_is_even_and_its_steepest_point_is_per_factor_of_the_rate():
    """Loss 2 - ln(rate) falls by the same per factor everywhere; 10 - rate falls fastest per factor at its end."""
    options = {"low": 1.0, "high": 9.0, "steps": 9, "smoothing": 1.0, "spacing": "linear", "stop_factor": math.inf}
    found = range_test(lambda rate: 10 - rate, **options)
    assert found.learning_rates == tuple(float(rate) for rate in range(1, 10))
    assert (found.steepest, found.minimum, found.spacing) == (8.0, 9.0, "linear")
    bent = range_test(lambda rate: -math.log(rate) + 0.3 * (abs(rate - 4) < 0.1), **options)
    assert bent.steepest == 5.0  # from the bump down; per step the fall from 1 to 3 would be the larger one
    with pytest.raises(InputError, match='spacing must be "geometric" or "linear", got \'log\''):
        ramp(1.0, 2.0, 4, "log")


def test_with_validation_the_readings_are_of_that_loss():
    train, valid = iter([5.0, 4.0, 3.0, 2.0, 1.0]), iter([5.0, 1.0, 2.0, 3.0, 9.0])
    options = {"low": 1e-2, "high": 1e2, "steps": 5, "smoothing": 1.0, "stop_factor": 5.0}
    found = range_test(lambda _: next(train), validate=lambda: next(valid), **options)
    assert found.losses == (5.0, 4.0, 3.0, 2.0, 1.0) and found.validation == (5.0, 1.0, 2.0, 3.0, 9.0)
    assert (found.minimum, found.divergence) == (pytest.approx(0.1), 100.0)
    assert RangeTest.from_json(found.to_json()) == found
    with pytest.raises(InputError, match="the loss is nan at the first step of the range test"):
        range_test(lambda _: 1.0, validate=lambda: math.nan, **options)


def test_a_cycle_is_suggested_with_its_reason():
    feed = iter([4.0, 3.0, 1.0, 2.0, 9.0])
    found = range_test(lambda _: next(feed), low=1e-2, high=1e2, steps=5, smoothing=1.0)
    one, several = found.cycle(), found.cycle(3)
    assert (one.max_lr, several.max_lr) == (found.minimum, found.minimum) == (1.0, 1.0) and one.bracketed
    assert one.min_lr == pytest.approx(0.1) and several.min_lr == pytest.approx(0.25)
    assert one.reason == (
        "max: the smoothed training loss turns up after 1; read from training loss alone it is overstated; "
        "min: 1/10 of it, for one cycle"
    )
    assert several.reason.endswith("min: 1/4 of it, for 3 cycles")
    falling_still = range_test(lambda rate: 1 / rate, validate=lambda: 1.0, low=1.0, high=2.0, steps=4)
    assert "the smoothed validation loss" in falling_still.cycle().reason
    open_end = range_test(lambda rate: 1 / rate, low=1.0, high=2.0, steps=4).cycle()
    assert not open_end.bracketed and "still fell at 2, where the ramp ended: test higher rates" in open_end.reason
    rising = range_test(lambda rate: rate, low=1.0, high=2.0, steps=4).cycle()
    assert not rising.bracketed and "only rose from 1, where the ramp began: test lower rates" in rising.reason
    for bad in (0, 1.0, True):
        with pytest.raises(InputError, match="cycles must be an integer of at least 1"):
            found.cycle(bad)


@pytest.mark.parametrize(("optimizer", "key"), [("sgd", "momentum"), ("adamw", "betas")])
def test_momentum_falls_while_the_rate_rises_as_in_a_plain_loop(optimizer, key):
    job = line_job(optimizer)
    options = {"low": 1e-3, "high": 0.5, "steps": 20, "smoothing": 0.2}
    found = lr_range(job, batch_size=8, momentum=(0.95, 0.85), validation=20, device="cpu", seed=4, **options)
    model, stream, step = job.model(), SampleStream(32, derive_seed(4, "stream")), 0
    plain = NAIVE[optimizer](model.parameters())
    x_valid, y_valid = job.valid[[2 * i for i in range(20)]]

    def update(rate):
        nonlocal step
        now = 0.95 - 0.1 * step / 19
        plain.param_groups[0].update({"lr": rate, key: now if key == "momentum" else (now, 0.999)})
        x, y = job.train[stream.indices(8 * step, 8)]
        step += 1
        plain.zero_grad()
        loss = (model(x).squeeze(1) - y).square().mean()
        loss.backward()
        plain.step()
        return loss.item()

    def validate():
        with torch.no_grad():
            return (model(x_valid).squeeze(1) - y_valid).square().mean().item()

    expected = range_test(update, validate=validate, **options)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.validation == pytest.approx(expected.validation, rel=1e-9)
    assert found.momenta == pytest.approx(np.linspace(0.95, 0.85, 20)[: len(found.losses)], rel=1e-12)
    without = lr_range(job, batch_size=8, device="cpu", seed=4, **options)
    assert without.momenta == () and without.losses != found.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": (0.85, 0.95)}, r"momentum must be \(high, low\) with 0 <= low <= high < 1, got \(0.85, 0.95\)"),
        ({"momentum": (1.0, 0.9)}, r"momentum must be \(high, low\) with"),
        ({"momentum": (math.nan, 0.9)}, r"momentum must be \(high, low\) with"),
        ({"momentum": 0.9}, r"momentum must be \(high, low\) with .* got 0.9"),
        ({"momentum": ("a", "b")}, r"momentum must be \(high, low\) with"),
        ({"batch_size": 32.5}, r"batch_size must lie in 1\.\..*, the training examples, got 32.5"),
        ({"validation": 41}, r"validation must lie in 0..40, the validation examples, got 41"),
        ({"validation": -1}, r"validation must lie in 0..40"),
        ({"spacing": "log"}, "spacing must be"),
    ],
)
def test_a_bad_range_test_of_a_job_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        lr_range(line_job("sgd"), **{"batch_size": 8, "device": "cpu"} | changes)


def test_an_optimizer_without_momentum_cycles_none():
    with pytest.raises(InputError, match="a cyclical momentum needs momentum or betas, Adagrad has neither"):
        set_momentum(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]), 0.9)


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16.0), torch.tensor(data.target)


def digits_update(seed, momentum=0.0, batch_size=64, **options):
    """An MLP 64-64-10 in float64 on shuffled digits: one SGD step at each call."""
    (x, y), generator = digits(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum, **options)
    order = torch.cat([torch.randperm(1297, generator=generator) for _ in range(11)])
    feed = iter(order.split(batch_size))

    def update(rate):
        optimizer.param_groups[0]["lr"] = rate
        part = next(feed)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        return loss.item()

    def validate():
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x[1297:]), y[1297:]).item()

    return update, validate


@pytest.mark.parametrize("seed", range(3))
def test_it_reads_what_torch_lr_finders_rule_reads(seed):
    """That rule written out: average from the first loss, stop past 5 times the least average, rates lo·(hi/lo)^(i/99).

    benchmarks/range_test_peer.py runs the package itself beside ours.
    """
    update, _ = digits_update(seed, 0.9)
    rates, averages = [1e-3 * 1e4 ** (i / 99) for i in range(100)], []
    for rate in rates:
        loss = update(rate)
        averages.append(0.05 * loss + 0.95 * averages[-1] if averages else loss)
        if averages[-1] > 5 * min(averages):
            break
    update, _ = digits_update(seed, 0.9)
    found = range_test(update, low=1e-3, high=10.0, steps=100, smoothing=0.05, stop_factor=5.0, debias=False)
    assert len(found.losses) == len(averages)
    assert found.smoothed == pytest.approx(averages, rel=1e-12)
    assert found.minimum == pytest.approx(rates[int(np.argmin(averages))], rel=1e-12)


def test_on_digits_the_largest_rate_is_of_the_size_of_the_best_constant_one():
    """The best constant rate at batch 128 is 0.3. Five seeds, momentum 0.95, Nesterov: measured 0.35 to 1.7."""
    for seed in range(5):
        update, validate = digits_update(seed, 0.95, 128, nesterov=True, weight_decay=1e-4)
        found = range_test(update, validate=validate, low=1e-3, high=10.0)
        assert 0.1 < found.cycle().max_lr < 3.0 and found.cycle().bracketed
        assert found.steepest < found.minimum < (found.divergence or math.inf)


def test_a_slower_ramp_never_stops_later_under_noise():
    """½h|x|² in 20 dimensions with gradient noise; ramps of 100, 400 and 1600 steps, means of ln(stop) over 40 seeds.

    The means fall by more than 1.0 from one ramp to the next; their standard errors are below 0.1.
    """
    means = []
    for steps in (100, 400, 1600):
        stops = []
        for seed in range(40):
            rng, x = np.random.default_rng(seed), np.ones(20)

            def update(rate, rng=rng):
                nonlocal x
                loss = 0.5 * float(x @ x)
                x = x - rate * (x + rng.normal(size=20))
                return loss

            found = range_test(update, low=1e-3, high=100.0, steps=steps, smoothing=1.0)
            stops.append(math.log(found.divergence))
        means.append((np.mean(stops), np.std(stops) / math.sqrt(40)))
    for (faster, error), (slower, other) in itertools.pairwise(means):
        assert slower + 4 * math.hypot(error, other) < faster
