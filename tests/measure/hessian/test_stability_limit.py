"""The spike law, its fit, and the ceiling against exact second moments and against gradient descent itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.measure.hessian.stability_limit import (
    SpikeFit,
    effective_batch,
    fit_spike,
    rate_ceiling,
    spike_edge,
    stable_rate,
)

N = 1000
SIZES = (4, 16, 64, 256, N)


def law(eigenvalue, kappa_sq, sizes=SIZES):
    return [spike_edge(eigenvalue, kappa_sq, effective_batch(b, N)) for b in sizes]


@given(b=st.floats(1e-3, 1e6), share=st.floats(1e-6, 1.0))
def test_the_effective_batch_makes_the_variance_that_of_draws_without_replacement(b, share):
    """The mean of b of N numbers has the variance s²/b·(1 - b/N), s² with N - 1 in the denominator."""
    examples = max(1.0, b / share)
    effective = effective_batch(min(b, examples), examples)
    assert 1 / effective == pytest.approx(1 / min(b, examples) - 1 / examples, abs=1e-12 / b)


def test_all_examples_have_no_noise():
    assert effective_batch(7, 7) == math.inf
    assert spike_edge(2.0, 30.0, math.inf) == 2.0


@given(eigenvalue=st.floats(1e-3, 1e3), kappa=st.floats(1e-3, 1e3), effective=st.floats(1e-3, 1e3))
def test_the_two_branches_meet_and_noise_only_raises_the_edge(eigenvalue, kappa, effective):
    edge = spike_edge(eigenvalue, kappa**2, effective)
    assert edge >= max(eigenvalue, 2 * kappa / effective**0.5) * (1 - 1e-12)
    assert edge >= spike_edge(eigenvalue, kappa**2, 2 * effective)
    threshold = eigenvalue**2 * effective
    below, above = (spike_edge(eigenvalue, threshold * f, effective) for f in (1 - 1e-9, 1 + 1e-9))
    assert below == pytest.approx(above, rel=1e-8)


@given(eigenvalue=st.floats(0.1, 100), knee=st.floats(0.5, 200))
def test_the_law_itself_is_recovered(eigenvalue, knee):
    edges = law(eigenvalue, knee * eigenvalue**2)
    fit = fit_spike(SIZES, edges, [(0.01 * e) ** 2 for e in edges], N)
    assert fit.eigenvalue.value == pytest.approx(eigenvalue, rel=1e-5)
    assert fit.kappa_sq.value == pytest.approx(knee * eigenvalue**2, rel=1e-4)
    assert fit.misfit < 1e-3 and fit.free == 3


def test_lambda_is_found_without_the_full_hessian():
    sizes = (4, 16, 64, 256)
    fit = fit_spike(sizes, law(2.0, 30.0, sizes), [1e-4] * 4, N)
    assert (fit.eigenvalue.value, fit.kappa_sq.value) == pytest.approx((2.0, 30.0), rel=1e-4)


def test_intervals_cover_under_noise_and_widen_where_the_law_misfits():
    """Known variances and Student's quantile: at least the stated rate. Fewer than 8 of 100 misses has the chance
    87 % at 95 %; a quantile two times too small misses 20 and more."""
    rng, truth = np.random.default_rng(0), law(2.0, 30.0)
    deviations = np.array([0.3, 0.1, 0.05, 0.03, 2e-4])
    missed = np.zeros(2, int)
    for _ in range(100):
        fit = fit_spike(SIZES, truth + deviations * rng.normal(size=5), deviations**2, N)
        ceiling, wanted = fit.max_learning_rate(8, 0.9), rate_ceiling(2.0, 30.0, effective_batch(8, N), 0.9)
        missed += not fit.kappa_sq.low <= 30.0 <= fit.kappa_sq.high, not ceiling.low <= wanted <= ceiling.high
    assert missed.max() < 8
    bent = [*law(2.0, 10.0, (4, 16)), *law(2.0, 40.0, (64, 256, N))]
    wrong, right = fit_spike(SIZES, bent, deviations**2, N), fit_spike(SIZES, truth, deviations**2, N)
    assert wrong.misfit > 2 and right.misfit < 0.1
    assert wrong.variances[1] > 2 * right.variances[1]


def _growth(rate, eigenvalue, variance, momentum):
    """The factor a step of E[x xᵀ], x = (w_t, w_{t-1}), where the curvature has that mean and variance: exact."""
    step = np.array([[1 + momentum - rate * eigenvalue, -momentum], [1.0, 0.0]])
    moments = np.kron(step, step)
    moments[0, 0] += rate**2 * variance
    return np.abs(np.linalg.eigvals(moments)).max()


@given(eigenvalue=st.floats(0.01, 100), noise=st.floats(1e-4, 1e4), momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_the_ceiling_is_where_the_mean_square_begins_to_grow(eigenvalue, noise, momentum):
    variance = noise * eigenvalue**2
    ceiling = rate_ceiling(eigenvalue, variance, 1.0, momentum)
    assert _growth(0.99 * ceiling, eigenvalue, variance, momentum) < 1
    assert _growth(1.01 * ceiling, eigenvalue, variance, momentum) > 1


@pytest.mark.parametrize(("knees", "ratio"), [(1e-3, 1.998), (1e-2, 1.980), (1e2, 1.005), (1e3, 1.0005)])
def test_the_ceiling_doubles_with_small_batches_and_stays_with_large_ones(knees, ratio):
    found = rate_ceiling(3.0, 9.0, 2 * knees) / rate_ceiling(3.0, 9.0, knees)
    assert found == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_on_one_fixed_batch_ends_at_its_own_limit(momentum):
    """A quadratic of 200 parameters, its Hessian a Wishart matrix with a spike: 2000 steps on either side."""
    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = a @ a.T / 200 + 5 * torch.outer(a[0], a[0]) / 200
    top = float(torch.linalg.eigvalsh(H)[-1])
    ratios = []
    for share in (0.95, 1.05):
        w = torch.nn.Parameter(torch.ones(200, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=share * stable_rate(top, momentum), momentum=momentum)
        first = float(w.detach() @ H @ w.detach())
        for _ in range(2000):
            w.grad = H @ w.detach()
            optimizer.step()
        ratios.append(float(w.detach() @ H @ w.detach()) / first)
    assert ratios[0] < 1e-2
    assert not ratios[1] < 1e10


def test_the_knee_halves_the_ceiling():
    fit = fit_spike(SIZES, law(2.0, 30.0), [1e-4] * 5, N)
    for momentum in (0.0, 0.9):
        knee = fit.knee(momentum)
        assert knee.low < knee.value < knee.high
        halved = fit.max_learning_rate(knee.value, momentum).value
        assert halved == pytest.approx(fit.max_learning_rate(N, momentum).value / 2, rel=1e-6)


def test_no_excess_is_no_noise():
    fit = fit_spike(SIZES, [2.0] * 5, [0.01] * 5, N)
    assert fit.kappa_sq.value == pytest.approx(0, abs=1e-3)
    assert fit.max_learning_rate(4).value == pytest.approx(1.0, rel=1e-4)


def test_a_fit_goes_round_as_json():
    fit = fit_spike(SIZES, law(2.0, 30.0), [0.01] * 5, N)
    assert SpikeFit.from_json(fit.to_json()) == fit
    assert fit.edge(16).value == pytest.approx(law(2.0, 30.0)[1], rel=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: effective_batch(11, 10), r"batch_size must lie in \(0, 10\], the number of examples, got 11"),
        (lambda: effective_batch(math.nan, 10), "batch_size must lie in"),
        (lambda: effective_batch(1, 0), "examples must be finite and >= 1, got 0"),
        (lambda: spike_edge(0.0, 1.0, 1.0), "eigenvalue and effective must be > 0"),
        (lambda: rate_ceiling(1.0, -1.0, 1.0), "kappa_sq >= 0"),
        (lambda: rate_ceiling(1.0, 1.0, 1.0, 1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: fit_spike(SIZES, law(2.0, 30.0), [1e-4] * 5, N).knee(1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: stable_rate(-1.0), "eigenvalue must be > 0: no learning rate is too large along it, got -1.0"),
        (lambda: fit_spike([4, 8], [1, 1], [1, 1], N), "at least 3 different sizes"),
        (lambda: fit_spike([4, 8, 16], [1, 1], [1, 1, 1], N), "of one length, got 3, 2 and 3"),
        (lambda: fit_spike([4, 8, 16], [1, -1, 1], [1, 1, 1], N), "edges must be finite and > 0"),
        (lambda: fit_spike([4, 8, 16], [1, 1, 1], [1, math.nan, 1], N), "variances must be finite and >= 0"),
        (lambda: fit_spike([4, 8, 16], [1, 1, 1], [1, 1, 1], N, coverage=1.0), "coverage must lie in"),
        (lambda: fit_spike([4, 8, 2000], [1, 1, 1], [1, 1, 1], N), "batch_size must lie in"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
