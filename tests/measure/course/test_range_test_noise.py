"""The range test under noise and on digits: readings that hold, torch-lr-finder's rule, and ramps of other lengths."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlab.measure.course.learning_rate import range_test


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
