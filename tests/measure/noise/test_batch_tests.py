"""The batch tests against their definitions, closed forms and the many ways to cut a batch."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import (
    augmented_inner_product_test,
    batch_moments,
    inner_product_test,
    inner_product_test_per_tensor,
    next_batch,
    norm_test,
    orthogonality_test,
    orthogonality_test_per_tensor,
    place_batch,
    pooled_variance,
)
from tests.spine.forked import in_ranks

F64 = torch.float64


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def conv():
    layers = [nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Conv2d(2, 2, 2, stride=2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).double()


def images(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=F64)
    return x, torch.randint(3, (count,), generator=generator)


def by_vmap(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p, one, label: F.cross_entropy(functional_call(model, p, (one[None],)), label[None])  # noqa: E731
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)


def by_loop(model, x, y):
    """[B, parameters]: one backward pass an example."""
    rows = []
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(one[None]), label[None]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def naive(rows, eta, theta, nu):
    """The three numbers by their formulas, written out."""
    mean = sum(rows) / len(rows)
    q = float(mean @ mean)
    inner = [float(row @ mean) for row in rows]
    rests = [row - (i / q) * mean for row, i in zip(rows, inner, strict=True)]
    return (
        variance(rows) / (eta**2 * q),
        variance([torch.tensor([i], dtype=F64) for i in inner]) / (theta**2 * q**2),
        variance(rests) / (nu**2 * q),
    )


def variance(vectors):
    mean = sum(vectors) / len(vectors)
    return sum(float((v - mean) @ (v - mean)) for v in vectors) / (len(vectors) - 1)


@pytest.mark.parametrize("make", [mlp, conv])
def test_vmapped_gradients_give_what_a_loop_of_backward_passes_gives(make):
    torch.manual_seed(0)
    model, (x, y) = make(), images(11)
    stacks = by_vmap(model, x, y)
    norm, inner, across = naive(by_loop(model, x, y), 0.3, 0.4, 0.9)
    found = batch_moments(stacks)
    assert found.trace / (0.3**2 * found.grad_sq) == pytest.approx(norm, rel=1e-10)
    assert found.along / (0.4**2 * found.grad_sq**2) == pytest.approx(inner, rel=1e-10)
    assert found.across / (0.9**2 * found.grad_sq) == pytest.approx(across, rel=1e-10)
    assert norm_test(stacks, eta=0.3).proposed == math.ceil(norm)
    assert inner_product_test(stacks, theta=0.4).proposed == math.ceil(inner)
    assert orthogonality_test(list(stacks.values()), nu=0.9).proposed == math.ceil(across)
    assert augmented_inner_product_test(stacks, theta=0.4, nu=0.9).proposed == max(math.ceil(inner), math.ceil(across))
    assert norm_test(stacks, eta=0.3).batch == 11


def test_the_norm_test_proposes_what_its_closed_form_says():
    """g_i = μ + N(0, I) in 100 dimensions, |μ| = 1, B = 16, η = 0.5: about d/(η²(1 + d/B)) = 55.2, not d/η² = 400.

    16|ḡ|² is noncentral χ² with λ = 16, whose E[1/x] = Σ_j Poisson(j; λ/2)/(d + 2j - 2), so that the mean is 56.2.
    """
    generator, mean = torch.Generator().manual_seed(0), torch.zeros(100, dtype=F64)
    mean[0] = 1.0
    found = []
    for _ in range(2000):
        m = batch_moments([mean + torch.randn(16, 100, generator=generator, dtype=F64)])
        found.append(m.trace / (0.25 * m.grad_sq))
    proposals, formula = torch.tensor(found), 100 / (0.25 * (1 + 100 / 16))
    inverse = sum(math.exp(-8 + j * math.log(8) - math.lgamma(j + 1)) / (98 + 2 * j) for j in range(100))
    truth, error = 100 / 0.25 * 16 * inverse, proposals.std().item() / 2000**0.5
    assert abs(proposals.mean().item() - truth) < 4 * error < 0.02 * truth
    assert formula == pytest.approx(55.2, abs=0.05) and truth == pytest.approx(56.2, abs=0.1)


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.9])
def test_one_test_of_pure_noise_asks_for_b_over_eta_squared(eta):
    """In 5,000 dimensions |ḡ|² is within 6 % of its mean (3 standard errors), Σ Var within less."""
    g = torch.randn(16, 5000, generator=torch.Generator().manual_seed(0), dtype=F64)
    growth = norm_test([g], eta=eta).proposed / 16
    assert 0.9 / eta**2 < growth < 1.1 / eta**2 + 1 / 16


def every(*micro_batches, **options):
    tests = (norm_test, inner_product_test, orthogonality_test, augmented_inner_product_test)
    return [test(*micro_batches, **options) for test in tests]


def test_no_noise_leaves_the_batch_and_no_signal_takes_it_to_the_cap():
    row = torch.randn(7, generator=torch.Generator().manual_seed(0))
    for test in every([row.expand(9, 7)]):
        assert test.passed and next_batch(9, test.proposed, 512) == 9
    opposite = torch.stack([row, -row])
    for test in every([opposite]):
        assert test.proposed == math.inf and next_batch(2, test.proposed, 512) == 512 and not test.passed
    for test in every([torch.zeros(4, 3)]):
        assert test.proposed == 0 and next_batch(4, test.proposed, 512) == 4


def stacks(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,), ()]
    return [torch.randn(rows, *shape, generator=generator, dtype=F64) + 0.3 for shape in shapes]


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_micro_batches_of_any_sizes_give_one_decision(sizes):
    whole = stacks(sum(sizes))
    pieces = list(zip(*(stack.split(sizes) for stack in whole), strict=True))
    one, many = batch_moments(whole), batch_moments(*pieces)
    assert many == pytest.approx(one, rel=1e-9)
    means, variances = (
        torch.stack([f(torch.cat([s.reshape(len(s), -1) for s in piece], 1)) for piece in pieces])
        for f in (lambda rows: rows.mean(0), _variance)
    )
    pooled = pooled_variance(means, variances, sizes)
    torch.testing.assert_close(pooled, torch.cat([s.reshape(len(s), -1) for s in whole], 1).var(0), rtol=1e-9, atol=0)
    assert pooled.sum().item() == pytest.approx(one.trace, rel=1e-9)


def test_tensors_are_matched_by_name():
    a, b = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    whole = norm_test({"a": a, "b": b})
    assert norm_test({"a": a[:2], "b": b[:2]}, {"b": b[2:], "a": a[2:]}) == pytest.approx(whole)
    with pytest.raises(InputError, match=r"micro_batches must name the same tensors, got \['a'\] and \['a', 'b'\]"):
        norm_test({"a": a, "b": b}, {"a": a})


def _variance(rows):
    return rows.var(0) if len(rows) > 1 else torch.full_like(rows[0], math.nan)


def test_the_released_way_to_pool_differs():
    """A mean of unbiased variances and a biased variance of means, four micro-batches of 16: 4.6 % too large here."""
    g = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=F64)
    pieces = g.split(16)
    means, variances = torch.stack([p.mean(0) for p in pieces]), torch.stack([p.var(0) for p in pieces])
    released = (variances.mean(0) + means.square().mean(0) - means.mean(0).square()).sum()
    assert pooled_variance(means, variances, [16] * 4).sum() == pytest.approx(g.var(0).sum().item(), rel=1e-12)
    assert released / g.var(0).sum() - 1 == pytest.approx(0.046, abs=2e-3)


def _on_a_rank(folder, sizes):
    rank = dist.get_rank()
    mine = [stack.split(sizes)[rank] for stack in stacks(sum(sizes))]
    pieces = list(zip(*(stack.split(2) for stack in mine), strict=True))
    found = [*batch_moments(*pieces, process_group=dist.group.WORLD)]
    found += [test.proposed for test in every(*pieces, process_group=dist.group.WORLD)]
    torch.save(torch.tensor(found, dtype=F64), folder / f"{rank}.pt")


def test_ranks_with_batches_of_their_own_give_one_decision(tmp_path):
    sizes = [5, 1, 4]
    assert in_ranks(3, tmp_path, _on_a_rank, tmp_path, sizes) == [0] * 3
    expected = [*batch_moments(stacks(10)), *(test.proposed for test in every(stacks(10)))]
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0)


def test_the_inner_product_test_is_blind_to_noise_across_the_mean():
    g = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=F64) + 1.0
    noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=F64) * 3
    mean = g.mean(0)
    noise -= noise.mean(0)
    noise -= torch.outer(noise @ mean, mean) / (mean @ mean)
    plain, noisy = batch_moments([g]), batch_moments([g + noise])
    assert noisy.along == pytest.approx(plain.along, rel=1e-10) and noisy.grad_sq == pytest.approx(plain.grad_sq)
    assert noisy.trace > 2 * plain.trace and noisy.across > 2 * plain.across
    assert noisy.trace == pytest.approx(noisy.across + noisy.along / noisy.grad_sq, rel=1e-10)


def test_group_gradients_stand_for_their_examples():
    """Means of 8 of 4,096 examples, times 8: the same variance within three of its standard errors, √(2/511·100)."""
    g = torch.randn(4096, 100, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.2
    one, grouped = batch_moments([g]), batch_moments([g.view(512, 8, 100).mean(1)], examples=8)
    assert grouped.examples == one.examples == 4096
    assert grouped.grad_sq == pytest.approx(one.grad_sq, rel=1e-12)
    assert grouped.trace == pytest.approx(one.trace, rel=3 * (2 / (511 * 100)) ** 0.5)


def test_tensor_by_tensor_forms_leave_out_what_tensors_have_in_common():
    g = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=F64) + 1.0
    twice = [g, 2 * g]
    whole, each = inner_product_test(twice, theta=0.1), inner_product_test_per_tensor(twice, theta=0.1)
    assert (whole.grad_sq, whole.batch) == (each.grad_sq, each.batch)
    # of one tensor v, of the other 16v, and their covariance 4v twice: 25v against 17v
    assert each.variance / whole.variance == pytest.approx(17 / 25, rel=1e-10)
    assert orthogonality_test_per_tensor(twice).variance == pytest.approx(orthogonality_test(twice).variance, rel=1e-9)
    single = (inner_product_test([g]), orthogonality_test([g]))
    assert (inner_product_test_per_tensor([g]), orthogonality_test_per_tensor([g])) == single
    apart = [g, torch.randn(16, 2, generator=torch.Generator().manual_seed(2), dtype=F64)]
    assert orthogonality_test_per_tensor(apart).variance < orthogonality_test(apart).variance


@pytest.mark.parametrize(("workers", "max_micro", "accumulation"), [(1, None, 1), (4, 16, 1), (3, 7, 2), (8, 5, 1)])
def test_two_hundred_decisions_never_shrink_and_stay_under_the_cap(workers, max_micro, accumulation):
    generator = torch.Generator().manual_seed(0)
    how = {"workers": workers, "max_micro_batch": max_micro, "accumulation": accumulation}
    batch, sizes = place_batch(8, 1000, **how).batch, []
    for _ in range(200):
        g = torch.randn(8, 4, generator=generator) + torch.rand((), generator=generator)
        proposed = norm_test([g], eta=0.5).proposed * batch / 64
        placed = place_batch(next_batch(batch, proposed, 1000), 1000, **how)
        assert placed.batch == placed.micro_batch * workers * placed.accumulation <= 1000
        assert placed.micro_batch <= (max_micro or 1000)
        sizes.append(placed.batch)
        assert placed.batch >= batch
        batch = placed.batch
    assert len(set(sizes)) > 3


@given(
    workers=st.integers(1, 9),
    largest=st.integers(1, 40),
    accumulation=st.integers(1, 5),
    max_batch=st.integers(45, 2000),
    data=st.data(),
)
def test_a_larger_batch_is_placed_larger_and_as_near_as_can_be(workers, largest, accumulation, max_batch, data):
    a, b = sorted(data.draw(st.lists(st.integers(1, max_batch), min_size=2, max_size=2)))
    how = {"workers": workers, "max_micro_batch": largest, "accumulation": accumulation}
    first, second = place_batch(a, max_batch, **how), place_batch(b, max_batch, **how)
    assert first.batch <= second.batch <= max_batch
    assert place_batch(first.batch, max_batch, **how) == first
    assert abs(first.batch - a) < workers * max(accumulation, largest)


def test_what_is_not_finite_stays_so():
    g = torch.randn(4, 3)
    g[1, 2] = math.nan
    for test in every([g]):
        assert math.isnan(test.proposed) and not test.passed
    with pytest.raises(InputError, match="proposed must be a number of examples, got nan: a gradient was not finite"):
        next_batch(4, math.nan, 8)
    g[1, 2] = math.inf
    assert all(math.isnan(test.proposed) for test in every([g]))


def test_half_precision_gradients_are_summed_in_float64():
    g = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).bfloat16() * 1e-20
    assert norm_test([g]).variance == pytest.approx(g.double().var(0).sum().item(), rel=1e-12)


def test_ragged_groups_are_weighed_by_their_examples():
    """Unbiased for the variance of an example however the batch was cut: 4,000 batches, 4 of their errors, and 5 %."""
    generator = torch.Generator().manual_seed(0)
    sizes, d = [1, 2, 5, 8], 6
    groups = [torch.randn(4000, size, d, generator=generator, dtype=F64).mean(1) for size in sizes]
    rows = torch.stack(groups, 1) + 1.0
    found = [batch_moments([batch], examples=sizes) for batch in rows]
    traces = torch.tensor([moments.trace for moments in found], dtype=F64)
    assert {moments.examples for moments in found} == {16}
    assert abs(float(traces.mean()) - d) < 4 * float(traces.std()) / 4000**0.5 < 0.05 * d
    mean = (rows[0] * torch.tensor(sizes, dtype=F64)[:, None]).sum(0) / 16
    torch.testing.assert_close(found[0].grad_sq, float(mean @ mean), rtol=1e-12, atol=0)
    assert batch_moments([rows[0]], examples=[3] * 4) == pytest.approx(batch_moments([rows[0]], examples=3), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm_test(stacks(3), eta=0.0), r"eta must lie in \(0, 1\), got 0.0"),
        (lambda: norm_test(stacks(3), eta=1.0), r"eta must lie in \(0, 1\), got 1.0"),
        (lambda: inner_product_test(stacks(3), theta=-1), r"theta must lie in \(0, 1\), got -1"),
        (lambda: orthogonality_test(stacks(3), nu=0), "nu must be finite and > 0, got 0"),
        (lambda: norm_test(stacks(1)), "a variance needs two examples or more, got 1: test a larger batch"),
        (lambda: norm_test(), "micro_batches must hold at least one stack of gradients, got none"),
        (lambda: norm_test({}), "micro_batches must hold at least one stack of gradients, got none"),
        (
            lambda: norm_test([torch.ones(2, 3), torch.ones(3, 3)]),
            r"of the same tensors, got shapes \[\(2, 3\), \(3, 3\)",
        ),
        (lambda: norm_test([torch.ones(2, 3)], [torch.ones(2, 4)]), r"of the same tensors, got shapes \[\(2, 4\)\]"),
        (lambda: norm_test([torch.ones(())]), r"got shapes \[\(\)\]"),
        (
            lambda: norm_test([torch.ones(2, 3).long()]),
            "gradients must be dense real floating-point stacks, got torch.i",
        ),
        (lambda: norm_test(stacks(3), examples=0), "at least 1, or one for each of the 3 rows, got 0"),
        (lambda: batch_moments(stacks(3), examples=[1, 2]), r"one for each of the 3 rows, got \[1, 2\]"),
        (lambda: pooled_variance(torch.ones(2), torch.ones(3), [1, 1]), r"got \(2,\) and \(3,\)"),
        (
            lambda: pooled_variance(torch.ones(1), torch.ones(1), [1]),
            "examples must be an integer of at least 2, got 1",
        ),
        (lambda: next_batch(9, 3.0, 8), "max_batch must be an integer of at least 9, got 8"),
        (lambda: place_batch(9, 8), "max_batch must be an integer of at least 9, got 8"),
        (lambda: place_batch(1, 7, workers=8), "max_batch must be an integer of at least 8, got 7"),
        (lambda: place_batch(1, 8, max_micro_batch=0), "max_micro_batch must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
