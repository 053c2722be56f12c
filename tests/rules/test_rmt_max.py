"""The ceiling by the spike law against random matrices and descent on them, its limits, and its adaptive form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import eigh

from batchlab.core.errors import InputError
from batchlab.measure.hessian.stability_limit import rate_ceiling
from batchlab.rules.learning_rate import rmt_max, rmt_max_adaptive

P = 800


def symmetric_noise(random, size=P):
    """Entries of variance 1/size off the diagonal: κ = 1."""
    a = random.standard_normal((size, size)) / math.sqrt(size)
    return (a + a.T) / math.sqrt(2)


def edge(eigenvalue, kappa_sq=1.0, effective=1.0):
    """λ' as the ceiling on one fixed batch has it."""
    return 2 / rmt_max(effective, eigenvalue=eigenvalue, kappa_sq=kappa_sq, batches="fixed")


def test_the_law_holds_for_random_matrices_on_both_branches():
    """Mean of 8 draws. One draw's top eigenvalue scatters by √(2(1 - 1/λ²)/P), at most 2 %: 2 % is three errors."""
    random, eigenvalues = np.random.default_rng(0), (0.5, 1.0, 2.0, 4.0)
    tops = np.zeros((8, 4))
    for draw in range(8):
        noise, v = symmetric_noise(random), random.standard_normal(P)
        spike = np.outer(v, v) / (v @ v)
        for i, value in enumerate(eigenvalues):
            tops[draw, i] = eigh(value * spike + noise, eigvals_only=True, subset_by_index=[P - 1, P - 1])[0]
    law = [edge(value) for value in eigenvalues]
    assert law == pytest.approx([2, 2, 2.5, 4.25], rel=1e-12)
    assert tops.mean(axis=0) == pytest.approx(law, rel=0.02)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_on_one_fixed_batch_ends_where_the_law_says(momentum):
    """H = λvvᵀ + noise, λ = 4: only λ and κ² are given to the rule. Along its positive eigenvalues, 2000 steps."""
    random = np.random.default_rng(1)
    v = random.standard_normal(P)
    H = 4 * np.outer(v, v) / (v @ v) + symmetric_noise(random)
    values = torch.tensor(np.linalg.eigvalsh(H))
    values = values[values > 0]
    ceiling, ratios = rmt_max(1.0, eigenvalue=4.0, kappa_sq=1.0, momentum=momentum, batches="fixed"), []
    for share in (0.95, 1.05):
        w = torch.nn.Parameter(torch.ones_like(values))
        optimizer = torch.optim.SGD([w], lr=share * ceiling, momentum=momentum)
        for _ in range(2000):
            w.grad = values * w.detach()
            optimizer.step()
        ratios.append(float((values * w.detach() ** 2).sum() / values.sum()))
    assert ratios[0] < 1e-4
    assert not ratios[1] < 1e10


def test_descent_on_fresh_batches_ends_where_the_law_says():
    """A direction of mean curvature 2 and variance κ²/b: E[w²] over 200 steps, against its exact factor a step."""
    ceiling = rmt_max(4, eigenvalue=2.0, kappa_sq=48.0)
    for share, grows in ((0.95, False), (1.05, True)):
        factor = (1 - share * ceiling * 2.0) ** 2 + (share * ceiling) ** 2 * 48.0 / 4
        assert (factor > 1) == grows
        random = np.random.default_rng(2)
        h = 2.0 + math.sqrt(48.0 / 4) * random.standard_normal((100_000, 4))
        squares = (np.prod(1 - share * ceiling * h, axis=1)) ** 2
        error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - factor**4) < 4 * error < 0.2 * factor**4


@pytest.mark.parametrize(("knees", "ratio"), [(1e-3, 1.998), (1e-2, 1.980), (1e2, 1.005), (1e3, 1.0005)])
def test_limits_in_units_of_the_knee(knees, ratio):
    knee = 5.0 / 3.0**2
    found = [rmt_max(size, eigenvalue=3.0, kappa_sq=5.0) for size in (knees * knee, 2 * knees * knee)]
    assert found[1] / found[0] == pytest.approx(ratio, abs=6e-4)


def test_below_the_knee_one_fixed_batch_hides_the_outlier_and_the_ceiling_goes_as_a_root():
    """The source's own branch: the linear rise is there only for fresh batches."""
    found = [rmt_max(size, eigenvalue=3.0, kappa_sq=9.0, batches="fixed") for size in (1e-3, 2e-3)]
    assert found[1] / found[0] == pytest.approx(math.sqrt(2), rel=1e-12)
    assert found[0] == pytest.approx(2 / (2 * 3 / math.sqrt(1e-3)), rel=1e-12)


@given(
    share=st.floats(1e-6, 1.0),
    eigenvalue=st.floats(1e-3, 1e3),
    kappa=st.floats(0, 1e3),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_it_never_falls_with_batch_and_ends_at_the_full_batch(share, eigenvalue, kappa, momentum):
    law = {"eigenvalue": eigenvalue, "kappa_sq": kappa**2, "examples": 1000, "momentum": momentum}
    for batches in ("fresh", "fixed"):
        sizes = [1000 * share / 2, 1000 * share, 1000]
        found = [rmt_max(size, batches=batches, **law) for size in sizes]
        assert found[0] <= found[1] * (1 + 1e-12) and found[1] <= found[2] * (1 + 1e-12)
        assert found[2] == pytest.approx(2 * (1 + momentum) / eigenvalue, rel=1e-12)
    assert rmt_max(sizes[1], batches="fresh", **law) <= rmt_max(sizes[1], batches="fixed", **law) * (1 + 1e-12)


def test_it_is_the_ceiling_that_measuring_reports():
    for momentum in (0.0, 0.9):
        found = rmt_max(50, eigenvalue=2.0, kappa_sq=30.0, examples=100, momentum=momentum)
        assert found == rate_ceiling(2.0, 30.0, 100.0, momentum)
    assert rmt_max(np.int64(50), eigenvalue=np.float64(2), kappa_sq=0) == 1.0


def test_the_effective_batch_counts():
    law = {"eigenvalue": 2.0, "kappa_sq": 300.0}
    assert rmt_max(50, examples=100, **law) == rmt_max(100, **law) == rmt_max(100, examples=math.inf, **law)
    assert rmt_max_adaptive(0.01, 50, 75, examples=100) == pytest.approx(0.01 * math.sqrt(300 / 100), rel=1e-12)
    assert rmt_max_adaptive(0.01, 50, 50) == 0.01


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rmt_max(0, eigenvalue=1.0, kappa_sq=1.0), "batch_size must be finite and > 0, got 0"),
        (lambda: rmt_max(8, eigenvalue=-1.0, kappa_sq=1.0), "eigenvalue must be finite and > 0, got -1.0"),
        (lambda: rmt_max(8, eigenvalue=1.0, kappa_sq=math.nan), "kappa_sq >= 0, got .*kappa_sq=nan"),
        (lambda: rmt_max(8, eigenvalue=1.0, kappa_sq=1.0, examples=4), r"batch_size must lie in \(0, 4\]"),
        (lambda: rmt_max(8, eigenvalue=1.0, kappa_sq=1.0, examples=math.nan), "examples must be finite and >= 1"),
        (lambda: rmt_max(8, eigenvalue=1.0, kappa_sq=1.0, momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: rmt_max(8, eigenvalue=1.0, kappa_sq=1.0, batches="new"), 'batches must be "fresh" or "fixed"'),
        (lambda: rmt_max_adaptive(0.0, 8, 16), "max_learning_rate must be finite and > 0, got 0.0"),
        (lambda: rmt_max_adaptive(0.1, 8, 16, examples=16), "batch_size must be below examples, .* got 16 of 16"),
        (lambda: rmt_max_adaptive(0.1, 16, 8, examples=16), "base_batch_size must be below examples"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
