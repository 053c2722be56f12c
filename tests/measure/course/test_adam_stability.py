"""The monitor on gradients whose updates are known: what it reads, and when it alarms."""

import functools
import itertools
import math

import diptest
import numpy as np
import pytest
import torch
from torch import nn

from batchlab.measure.course.adam_stability import AdamStability
from batchlab.measure.course.adam_update import expected_variance
from tests.measure.course.adam_runs import STEPS, N, autoregressive, last, run, white


@pytest.mark.parametrize(
    ("betas", "variance", "low", "high"),
    [((0.9, 0.999), 0.0526, 2.9, 3.05), ((0.9, 0.95), 0.0512, 2.6, 2.8), ((0.95, 0.99), 0.0256, 2.7, 3.05)],
)
def test_independent_gradients_make_the_narrow_bell(betas, variance, low, high):
    """var u has a standard error of 2.2 % at a reading, 4000 coordinates: the mean of twenty readings, of 0.5 %."""
    readings, _ = run(white(), betas=betas, steps=STEPS if betas[1] == 0.999 else 1200)
    tail = [reading.layers[0] for reading in readings[-20:]]
    reference = (1 - betas[0]) / (1 + betas[0])
    assert np.mean([each.variance_ratio for each in tail]) * reference == pytest.approx(variance, rel=0.02)
    kurtoses = [(1 + 0.0) / each.sarle for each in tail]  # skewness is about 0
    assert low < np.mean(kurtoses) < high
    assert all(each.high_share < 0.003 and abs(each.lag1) < 0.02 and each.alarms == () for each in tail)
    assert np.mean([each.cosine for each in tail]) == pytest.approx(math.sqrt(1 - betas[0] ** 2), abs=0.02)


@pytest.mark.parametrize(
    ("r", "variance", "share", "kurtosis", "tolerance"),
    [
        (0.5, 0.139, None, None, 0.006),
        (0.9, 0.487, None, None, 0.02),
        (0.99, 0.90, None, None, 0.03),
        (0.999, 1.03, 0.51, 2.2, 0.08),
    ],
)
def test_correlated_gradients_widen_it_as_published(r, variance, share, kurtosis, tolerance):
    """The values of the specification, from a run of its own: 5 standard errors of one run's readings."""
    readings, _ = run(autoregressive(r))
    tail = [reading.layers[0] for reading in readings[-20:]]
    assert np.mean([each.variance_ratio for each in tail]) / 19 == pytest.approx(variance, abs=tolerance)
    assert tail[-1].lag1 == pytest.approx(r, abs=0.01)
    if share is not None:
        assert np.mean([each.high_share for each in tail]) == pytest.approx(share, abs=0.06)
        assert np.mean([1 / each.sarle for each in tail]) == pytest.approx(kurtosis, abs=0.1)


def test_gradients_of_the_order_of_epsilon_freeze_the_layer():
    expected = {1e-7: 0.043, 1e-8: 0.013, 1e-9: 0.0004}
    shares, roots = [], []
    for scale, variance in expected.items():
        readings, _ = run(white(scale=scale), steps=400, betas=(0.9, 0.99))
        layer = last(readings)
        assert layer.variance_ratio / 19 == pytest.approx(variance, rel=0.1)
        shares.append(layer.eps_share)
        roots.append(layer.root_over_eps)
        assert ("frozen" in layer.alarms) == (scale == 1e-9 or layer.eps_share > 0.5)
        mended, _ = run(white(scale=scale), steps=400, betas=(0.9, 0.99), eps=1e-15)
        assert last(mended).variance_ratio == pytest.approx(1, rel=0.08)
    assert shares[0] == 0.0 and shares[-1] == 1.0 and shares == sorted(shares)
    assert roots == pytest.approx([10, 1, 0.1], rel=0.05)


def test_a_constant_gradient_is_a_sign_update_and_alarms_at_the_second_reading():
    signs = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)
    readings, stability = run(lambda step: signs * 0.3, steps=300, betas=(0.9, 0.95), every=10)
    layer = last(readings)
    assert stability.updates(layer.name).abs().sub(1).abs().max() < 1e-6
    assert layer.sarle == pytest.approx(1, abs=1e-6) and layer.variance_ratio == pytest.approx(19, rel=1e-5)
    assert layer.rms == pytest.approx(1, abs=1e-6) and layer.cosine == pytest.approx(1, abs=1e-6)
    warm = [reading.step for reading in readings if reading.step > 3 / 0.05]
    alarmed = [reading.step for reading in readings if reading.alarms]
    assert alarmed == warm[1:] and warm[0] == 70
    assert readings[-1].alarms == (("group0.0", "bimodal"),)


@pytest.mark.parametrize("beta1", [0.0, 0.2])
def test_a_wide_bell_without_momentum_is_no_alarm(beta1):
    """At β1 = 0 independent gradients alone have |u| > 0.8 in 0.42 of the coordinates; constant ones in all."""
    calm, _ = run(white(), steps=100, betas=(beta1, 0.9), every=10)
    assert last(calm).high_share > 0.3 and not any(reading.alarms for reading in calm)
    signs = torch.where(torch.arange(N) % 4 == 0, 1.0, -1.0)
    held, _ = run(lambda step: signs, steps=100, betas=(beta1, 0.9), every=10)
    assert last(held).alarms == ("bimodal",)


def test_one_sign_for_all_has_no_spread_but_still_alarms():
    readings, _ = run(lambda step: torch.ones(N), steps=100, betas=(0.9, 0.95), every=5)
    layer = last(readings)
    assert math.isnan(layer.sarle) and layer.variance_ratio < 1e-6 and layer.high_share == 1.0
    assert layer.alarms == ("bimodal",)


BATCHES = (1, 16, 64, 256, 400, 1024, 4096)


@functools.cache
def _courses():
    """At each batch size, for |G_i| alike or not: the last reading, its updates, the mean var u of the last twenty.

    All are parameters of one optimizer, with the same noise.
    """
    signs = torch.where(torch.arange(N) % 2 == 0, 0.05, -0.05)
    means = {True: signs, False: 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(1))}
    cases = [(batch, equal) for batch in BATCHES for equal in means]
    parameters, noise, readings = [nn.Parameter(torch.zeros(N)) for _ in cases], white(), []
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)
    with AdamStability(optimizer, lag_memory=1.0, on_reading=readings.append) as stability:
        for step in range(STEPS + 100):
            drawn = noise(step)
            for p, (batch, equal) in zip(parameters, cases, strict=True):
                p.grad = means[equal] + drawn / math.sqrt(batch)
            optimizer.step()
    return {
        case: (
            readings[-1].layers[at],
            stability.updates(f"group0.{at}"),
            np.mean([reading.layers[at].variance_ratio / 19 for reading in readings[-20:]]),
        )
        for at, case in enumerate(cases)
    }


def _at_batch(batch, equal):
    return _courses()[batch, equal]


def test_the_batch_size_predicts_correlation_and_variance():
    """|G_i| = 0.05 and noise 1 make B_simple = 400. 62 pairs of 4000 coordinates: a standard error of 0.002."""
    for batch in BATCHES:
        layer, _, spread = _at_batch(batch, True)
        assert layer.lag1 == pytest.approx(batch / (batch + 400), abs=0.01)
        assert spread == pytest.approx(expected_variance(batch, 400), abs=0.01)


@pytest.mark.parametrize("equal", [True, False])
def test_the_three_detectors_fire_in_their_order_as_the_batch_grows(equal):
    """The dip rejects first, where var u is still small; the alarm's thresholds come with r near a half and beyond."""
    layers = [_at_batch(batch, equal)[0] for batch in BATCHES]
    for column in ("sarle", "high_share", "variance_ratio", "rms", "lag1"):
        values = [getattr(layer, column) for layer in layers]
        assert all(b > a - 0.01 for a, b in itertools.pairwise(values)), (column, values)
    first = lambda fires: next(i for i, layer in enumerate(layers) if fires(layer))  # noqa: E731
    dips = next(i for i, b in enumerate(BATCHES) if diptest.diptest(_at_batch(b, equal)[1].double().numpy())[1] < 1e-3)
    assert dips <= first(lambda layer: layer.high_share > 0.3) <= first(lambda layer: layer.variance_ratio > 10)
    assert dips == BATCHES.index(64 if equal else 400)
    assert first(lambda layer: layer.sarle > 0.8) >= BATCHES.index(400 if equal else 4096)
    assert layers[0].alarms == () and layers[-1].alarms == ("bimodal",)


def test_the_dip_is_that_of_the_updates():
    readings, stability = run(autoregressive(0.97), steps=200, dip=True)
    m, v = (next(iter(stability._state.optimizer.state.values()))[key].double() for key in ("exp_avg", "exp_avg_sq"))
    u = (m / (1 - 0.9**200)) / ((v / (1 - 0.999**200)).sqrt() + 1e-8)
    dip, p = diptest.diptest(u.float().double().numpy())
    assert last(readings).dip == pytest.approx(dip, abs=1e-6) and last(readings).dip_p == pytest.approx(p, abs=1e-3)
    exact = diptest.diptest(stability.updates("group0.0").double().numpy())
    assert (last(readings).dip, last(readings).dip_p) == pytest.approx(exact, abs=1e-12)


def test_disaligned_updates_of_an_unusual_size_alarm():
    """A long calm, then strong gradients one way, then small ones the other way while m still points the first."""
    noise = white(n=500)

    def gradient_at(step):
        if step < 200:
            return noise(step)
        return torch.full((500,), 5.0 if step < 207 else -0.01)

    readings, _ = run(gradient_at, steps=210, n=500, betas=(0.9, 0.95), every=10)
    assert [reading.step for reading in readings if ("group0.0", "disaligned") in reading.alarms] == [210]
    assert last(readings).cosine < 0 and last(readings).rms > 2 * readings[10].layers[0].rms


def test_nothing_alarms_while_v_still_forms():
    readings, _ = run(lambda step: torch.ones(100), steps=3300, every=100, n=100)
    assert [reading.step for reading in readings if reading.alarms] == [3200, 3300]


def test_a_subset_stands_for_the_whole_and_follows_from_the_seed():
    whole, _ = run(autoregressive(0.9, n=40_000), n=40_000, steps=300)
    parts = [run(autoregressive(0.9, n=40_000), n=40_000, steps=300, coordinates=4000, seed=s)[0] for s in (0, 0, 1)]
    assert last(parts[0]) == last(parts[1]) != last(parts[2])
    assert last(parts[0]).coordinates == 4000
    assert last(parts[0]).variance_ratio == pytest.approx(last(whole).variance_ratio, rel=0.12)  # 4 × 2.2 % and tails
