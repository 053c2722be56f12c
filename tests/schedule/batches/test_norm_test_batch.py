"""The test-driven batches: decisions against the tests themselves, what ranks decide, the miniature of the paper."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import (
    Moments,
    augmented_inner_product_test,
    batch_moments,
    inner_product_test,
    next_batch,
    norm_test,
)
from batchlab.measure.noise.coordinate_test import coordinate_moments, coordinate_norm_test
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.batches.inner_product_test_batch import InnerProductTestBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch, asked_for, check_no_batch_norm
from tests.spine.forked import in_ranks

F64 = torch.float64


def stacks(rows, seed=0, signal=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *shape, generator=generator, dtype=F64) + signal for shape in [(3, 2), (4,), ()]]


def decided(control, moments):
    return control.next_batch(1, StepFacts(control.batch_size, control.batch_size, batch_test=moments))


@pytest.mark.parametrize("seed", range(10))
def test_decisions_are_the_tests_own(seed):
    g, m = stacks(12, seed), coordinate_moments(stacks(12, seed))
    for control, test in (
        (NormTestBatch(12, eta=0.5, maximum=500), norm_test(g, eta=0.5)),
        (NormTestBatch(12, eta=0.5, maximum=500, coordinate_wise=True), coordinate_norm_test(g, eta=0.5)),
        (InnerProductTestBatch(12, theta=0.3, maximum=500), inner_product_test(g, theta=0.3)),
        (
            InnerProductTestBatch(12, theta=0.3, nu=0.5, maximum=500),
            augmented_inner_product_test(g, theta=0.3, nu=0.5),
        ),
    ):
        assert decided(control, m) == next_batch(12, test.proposed, 500)


def test_one_coordinate_of_noise_takes_the_coordinate_wise_test_to_the_cap():
    g = torch.ones(8, 3, dtype=F64)
    g[:, 0] = torch.tensor([1.0, -1.0] * 4)
    m = coordinate_moments([g])
    assert m.worst == math.inf and m.trace == pytest.approx(8 / 7)
    assert decided(NormTestBatch(8, eta=0.9, maximum=64, coordinate_wise=True), m) == 64
    assert decided(NormTestBatch(8, eta=0.9, maximum=64), m) == 8
    g[:, 1] = 0.0  # both 0: it asks for nothing
    g[:, 0] = 1.0
    assert coordinate_moments([g]).worst == 0.0
    g[2, 2] = math.nan
    assert math.isnan(coordinate_moments([g]).worst)


def test_no_noise_keeps_the_batch_no_signal_takes_it_to_the_maximum_and_growth_limits_that():
    keep, top = Moments(8, 1.0, 0.0, 0.0, 0.0), Moments(8, 0.0, 2.0, 0.0, 2.0)
    for control in (
        NormTestBatch(8, maximum=64),
        InnerProductTestBatch(8, maximum=64),
        InnerProductTestBatch(8, nu=1.0, maximum=64),
    ):
        assert decided(control, keep) == 8 and decided(control, Moments(8, 0.0, 0.0, 0.0, 0.0)) == 8
        assert decided(control, top) == 64
    assert decided(NormTestBatch(8, maximum=64, growth=2.0), top) == 16
    assert asked_for(math.nan, 1.0, 0.5) != asked_for(math.nan, 1.0, 0.5)
    assert asked_for(1.0, math.inf, 0.5) != asked_for(1.0, math.inf, 0.5)


def test_two_hundred_decisions_never_shrink_stay_under_the_cap_and_are_placed_whole():
    generator = torch.Generator().manual_seed(0)
    control = NormTestBatch(8, eta=0.5, maximum=1000)
    sizes = []
    for _ in range(200):
        before = control.batch_size
        g = torch.randn(8, 4, generator=generator) + torch.rand((), generator=generator)
        m = batch_moments([g])
        decided(control, m._replace(examples=before, trace=m.trace * before / 64))
        placed = control.place(workers=4, max_micro_batch=16)
        assert placed.batch == placed.micro_batch * 4 * placed.accumulation == control.batch_size
        assert before <= control.batch_size <= 1000 and placed.micro_batch <= 16
        sizes.append(control.batch_size)
    assert len(set(sizes)) > 3
    assert control.due == (control.batch_size < 1000)


def test_a_test_of_pure_noise_grows_the_batch_by_no_more_than_one_over_eta_squared():
    """5,000 dimensions, where |ḡ|² is within 6 % of its mean: so growth is gradual by construction."""
    generator, control, sizes = torch.Generator().manual_seed(0), NormTestBatch(4, eta=0.5, maximum=256), [4]
    while sizes[-1] < 256:
        g = torch.randn(sizes[-1], 5000, generator=generator)
        sizes.append(decided(control, batch_moments([g])))
        assert sizes[-1] / sizes[-2] < 4 * 1.1 + 0.3
    assert len(sizes) == 4  # 4, about 16, 64, then the cap


def _on_a_rank(folder):
    rank = dist.get_rank()
    sizes = [5, 1, 6]
    mine = [stack.split(sizes)[rank] for stack in stacks(12)]
    pieces = list(zip(*(stack.split(2) for stack in mine), strict=True))
    m = coordinate_moments(*pieces, process_group=dist.group.WORLD)
    makes = (
        NormTestBatch(12, eta=0.5, maximum=500),
        NormTestBatch(12, eta=0.5, maximum=500, coordinate_wise=True),
        InnerProductTestBatch(12, theta=0.3, nu=0.5, maximum=500),
    )
    torch.save(torch.tensor([decided(control, m) for control in makes] + [m.worst], dtype=F64), folder / f"{rank}.pt")


def test_ranks_with_batches_of_their_own_decide_as_one_process_does(tmp_path):
    assert in_ranks(3, tmp_path, _on_a_rank, tmp_path) == [0] * 3
    m = coordinate_moments(stacks(12))
    expected = [
        decided(NormTestBatch(12, eta=0.5, maximum=500), m),
        decided(NormTestBatch(12, eta=0.5, maximum=500, coordinate_wise=True), m),
        decided(InnerProductTestBatch(12, theta=0.3, nu=0.5, maximum=500), m),
        m.worst,
    ]
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0)


def test_batch_normalisation_is_refused_unless_rows_are_groups():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(
        InputError, match="model must not normalise over the batch, but 1 does: there an example has no"
    ):
        check_no_batch_norm(model)
    check_no_batch_norm(model, examples=8)
    check_no_batch_norm(model.eval())
    with pytest.raises(InputError, match="BatchNorm1d does"):
        check_no_batch_norm(nn.BatchNorm1d(2, track_running_stats=False).eval())
    check_no_batch_norm(nn.GroupNorm(1, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NormTestBatch(8, maximum=64, eta=0.0), r"eta must lie in \(0, 1\), got 0.0"),
        (lambda: NormTestBatch(1, maximum=64), "batch_size must be an integer of at least 2, got 1"),
        (
            lambda: decided(NormTestBatch(8, maximum=64, coordinate_wise=True), Moments(8, 1.0, 1.0, 1.0, 1.0)),
            "batch_test must be of coordinate_moments where coordinate_wise, got Moments",
        ),
        (lambda: check_no_batch_norm(nn.ReLU(), examples=0), "examples must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def digits(seed):
    """Another split of the 1,797 for each seed: 1,437 to train on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))
    x, y = torch.as_tensor(x / 16, dtype=torch.float32)[order], torch.as_tensor(y)[order]
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def softmax_regression(seed, control, *, lr=0.3, epochs=60, start=8):
    """AdaGrad on digits until `epochs` epochs of examples are seen; returns (updates, test accuracy, sizes)."""
    x, y, x_test, y_test = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.randn(65, 10, generator=generator) * 0.01)
    optimizer = torch.optim.Adagrad([w], lr=lr)
    size, seen, sizes, order = start, 0, [], torch.empty(0, dtype=torch.long)
    while seen < epochs * len(x):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        rows, order = order[:size], order[size:]
        error = F.softmax(x[rows] @ w.detach(), 1) - F.one_hot(y[rows], 10)
        w.grad = x[rows].T @ error / size
        optimizer.step()
        seen += size
        sizes.append(size)
        if control is not None:
            m = batch_moments([x[rows][:, :, None] * error[:, None]]) if control.due else None
            size = control.next_batch(len(sizes), StepFacts(seen, size, batch_test=m))
    return len(sizes), ((x_test @ w).argmax(1) == y_test).float().mean().item(), sizes


@pytest.mark.slow
def test_softmax_regression_on_digits_without_a_cap_and_with_one():
    """Five seeds, η = 0.5, rate 0.3, from 8 examples: few updates, at a price in accuracy that a cap avoids.

    Measured, the mean of five splits: fixed at 8 10,778 updates and 0.968; without a cap 76 to 80 and 0.938; with one
    of 128 about 682 and 0.963, as a constant 128 has (674, 0.965). On one other split alone the cap lost 1.6 points.
    """
    rows = []
    for seed in range(5):
        fixed = softmax_regression(seed, None)
        free = softmax_regression(seed, NormTestBatch(8, eta=0.5, maximum=1437))
        capped = softmax_regression(seed, NormTestBatch(8, eta=0.5, maximum=128))
        rows.append((fixed[:2], free[:2], capped[:2]))
        for sizes in (free[2], capped[2]):
            assert sizes == sorted(sizes)
    share = [[run[0] / row[0][0] for run in row] for row in rows]
    lost = [[row[0][1] - run[1] for run in row] for row in rows]
    assert all(each[1] < 0.03 and each[2] < 0.10 for each in share), rows
    assert 0.01 <= sum(each[1] for each in lost) / 5 <= 0.04, rows
    assert abs(sum(each[2] for each in lost) / 5) <= 0.01, rows
