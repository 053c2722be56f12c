"""Squared norms against float64, in every layout and precision; sums that are exactly rounded."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.measure.norms import CHUNK, sq_norm, sq_norm_of_sum, to_floats, total

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}
SHAPES = [(), (1,), (0,), (3, 5), (CHUNK,), (CHUNK + 1,), (2, CHUNK), (3, 7, 9999)]


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(gradient, weight=1.0):
    return (gradient.double().square() * weight).sum().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_sum_of_squares_in_the_wider_precision(shape, dtype):
    gradient, weight = random(shape, dtype), random(shape, dtype, seed=1).abs()
    expected = pytest.approx(naive(gradient), rel=DTYPES[dtype])
    plain = sq_norm(gradient.requires_grad_())
    assert plain.item() == expected and plain.shape == () and not plain.requires_grad
    assert plain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rel = 1e-2 if dtype in (torch.bfloat16, torch.float16) else DTYPES[dtype]  # the weighing itself is in half
    assert sq_norm(gradient, weight).item() == pytest.approx(naive(gradient, weight.double()), rel=rel)


@pytest.mark.parametrize(
    "view", [torch.t, lambda g: g[:, 1::2], lambda g: g.flip(0), lambda g: g[:1].expand(300, -1)], ids=range(4)
)
def test_the_layout_changes_nothing(view):
    """Longer than a chunk; a weight is one of the same place, whatever the strides of the two."""
    gradient = view(random((300, 301), torch.float64))
    assert sq_norm(gradient).item() == pytest.approx(naive(gradient), rel=1e-13)
    weight = random(gradient.shape, torch.float64, seed=1).abs()
    assert sq_norm(gradient, weight).item() == pytest.approx(naive(gradient, weight), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("views", [(torch.clone, torch.clone), (torch.t, torch.t), (torch.t, lambda g: g.t().clone())])
@pytest.mark.parametrize("size", [7, 301])
def test_of_a_sum_it_is_that_of_the_sum_made(size, views, dtype):
    """Also longer than a chunk, and where the two do not lie alike in memory: the first's places are the second's."""
    a, b = (view(random((size, size), dtype, seed=i)) for i, view in enumerate(views))
    assert sq_norm_of_sum(a, b) == pytest.approx(naive(a + b), rel=DTYPES[dtype] / 10)


@given(rows=st.lists(st.integers(0, 5), max_size=20))
def test_a_sparse_gradient_is_its_dense_form(rows):
    """A row that is named twice is the sum of both."""
    values = random((len(rows), 3), torch.float64)
    sparse = torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, (6, 3), check_invariants=True)
    assert sq_norm(sparse).item() == pytest.approx(naive(sparse.to_dense()), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_ten_million_numbers_lose_no_digits(value):
    """To 1e-4. One float32 sum over them is off by 1e-2: what is added is small against what has grown."""
    gradient = torch.full((10**7,), value)
    assert sq_norm(gradient).item() == pytest.approx(naive(gradient), rel=1e-4)
    assert sq_norm(gradient, torch.ones_like(gradient)).item() == pytest.approx(naive(gradient), rel=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e15])
def test_squares_of_bf16_reach_as_far_as_float32(size):
    gradient = torch.full((5,), size, dtype=torch.bfloat16)
    assert sq_norm(gradient).item() == pytest.approx(naive(gradient), rel=1e-6, abs=1e-44)


NUMBERS = st.floats(-1e200, 1e200)
SCALARS = st.one_of(NUMBERS, NUMBERS.map(lambda x: torch.tensor(x, dtype=torch.float64)))


@given(scalars=st.lists(SCALARS, max_size=30), order=st.randoms(use_true_random=False))
def test_the_total_is_exactly_rounded_in_any_order(scalars, order):
    exact = float(sum((Fraction(float(x)) for x in scalars), Fraction()))
    assert total(scalars) == exact
    order.shuffle(scalars)
    assert total(scalars) == exact


@given(scalars=st.lists(st.one_of(SCALARS, st.floats(width=32).map(torch.tensor)), max_size=30))
def test_mixed_scalars_keep_their_places_and_their_precision(scalars):
    found, expected = to_floats(scalars), [float(x) for x in scalars]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_one_that_is_not_finite_makes_the_total_undefined(bad):
    assert math.isnan(total([1.0, bad, torch.tensor(2.0)]))
    assert math.isnan(total([math.inf, -math.inf])) and total([]) == 0.0
