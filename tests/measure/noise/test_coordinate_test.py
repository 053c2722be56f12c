"""The coordinate-wise norm test against its definition, however a batch is cut; over ranks in test_norm_test_batch."""

import math

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import batch_moments, norm_test
from batchlab.measure.noise.coordinate_test import coordinate_moments, coordinate_norm_test

F64 = torch.float64


def stacks(rows, seed=0, signal=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *shape, generator=generator, dtype=F64) + signal for shape in [(3, 2), (4,), ()]]


def test_the_coordinate_wise_test_by_its_definition_and_however_the_batch_is_cut():
    g = stacks(10)
    rows = torch.cat([stack.reshape(10, -1) for stack in g], 1)
    worst = (rows.var(0) / rows.mean(0).square()).max().item()
    assert coordinate_moments(g).worst == pytest.approx(worst, rel=1e-12)
    pieces = list(zip(*(stack.split([3, 1, 6]) for stack in g), strict=True))
    assert coordinate_moments(*pieces) == pytest.approx(coordinate_moments(g), rel=1e-9)
    named = [{"a": a, "b": b, "c": c} if turn else {"c": c, "a": a, "b": b} for turn, (a, b, c) in enumerate(pieces)]
    assert coordinate_moments(*named).worst == pytest.approx(worst, rel=1e-9)
    assert coordinate_moments(g, examples=4).worst == pytest.approx(4 * worst, rel=1e-12)
    assert coordinate_norm_test(g, eta=0.5).proposed == math.ceil(worst / 0.25)
    assert coordinate_norm_test(g, eta=0.5).proposed >= norm_test(g, eta=0.5).proposed  # the largest of ratios
    assert coordinate_moments(g)[:5] == batch_moments(g)


def test_what_is_zero_and_what_is_not_finite():
    g = torch.ones(8, 3, dtype=F64)
    g[:, 0] = torch.tensor([1.0, -1.0] * 4)
    assert coordinate_norm_test([g]).proposed == math.inf and not coordinate_norm_test([g]).passed
    g[:, 0] = 0.0  # both 0: it asks for nothing
    assert coordinate_norm_test([g]).proposed == 0.0
    for bad in (math.nan, math.inf):
        g[2, 1] = bad
        assert math.isnan(coordinate_moments([g]).worst) and math.isnan(coordinate_norm_test([g]).proposed)
    assert coordinate_moments([torch.ones(4, 2), torch.ones(4, 0)]).worst == 0.0


def test_pure_noise_asks_for_far_more_than_the_norm_test():
    """Of 1,000 coordinates of noise alone the least |ḡ_c| decides: why no network should be given to it."""
    g = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert coordinate_norm_test([g], eta=0.5).proposed > 1000 * norm_test([g], eta=0.5).proposed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coordinate_norm_test(stacks(3), eta=1.0), r"eta must lie in \(0, 1\), got 1.0"),
        (lambda: coordinate_norm_test(stacks(1)), "a variance needs two examples or more, got 1"),
        (lambda: coordinate_moments(stacks(3), examples=[1, 2, 2]), r"at least 1, got \[1, 2, 2\]"),
        (lambda: coordinate_moments(), "micro_batches must hold at least one stack of gradients, got none"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
