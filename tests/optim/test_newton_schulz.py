"""Newton-Schulz is its polynomial in the singular values, and takes ill-scaled matrices near orthogonal ones."""

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.newton_schulz import JORDAN, NewtonSchulz, orthogonalised, orthogonality_error

F64 = NewtonSchulz(dtype=torch.float64)
F32 = NewtonSchulz(dtype=torch.float32)
BF16 = NewtonSchulz()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(rows, columns):
    """U, s and V of a matrix of Frobenius norm 1 whose singular values go from one to 36 times it."""
    n = min(rows, columns)
    u, v = torch.linalg.qr(normal(rows, n))[0], torch.linalg.qr(normal(columns, n, seed=1))[0]
    s = torch.logspace(0, 1, n, base=36, dtype=torch.float64)
    return u, s / s.norm(), v


def polynomial(s, steps=5):
    a, b, c = JORDAN
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)])
def test_it_is_the_polynomial_of_the_singular_values(shape):
    g = normal(*shape)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    expected = u @ torch.diag(polynomial(s / s.norm())) @ vt
    torch.testing.assert_close(orthogonalised(g, F64), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_controlled_spectrum_lands_near_one(how):
    u, s, v = with_spectrum(34, 96)
    assert 0.012 <= s.min() < s.max() <= 0.45
    o = orthogonalised((u @ torch.diag(s) @ v.T).float() * 7, how).double()
    found = torch.linalg.svdvals(o)
    assert found.min() > 0.65 and found.max() < 1.25
    assert (o * (u @ v.T)).sum() / (o.norm() * (u @ v.T).norm()) > 0.97


def test_small_singular_values_stay_small():
    """It does not converge to 1 from below a thousandth: 3.4445⁵ is all that five steps can raise."""
    s = torch.tensor([1e-4, 0.01, 0.1, 1.0], dtype=torch.float64)
    ends = polynomial(s)
    assert ends[0] < 3.4445**5 * 1e-4 < 0.05
    assert ((ends[1:] > 0.68) & (ends[1:] < 1.21)).all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    g = normal(24, 40).float()
    torch.testing.assert_close(orthogonalised(g * scale, F32), orthogonalised(g, F32), rtol=0, atol=1e-3)
    assert torch.equal(orthogonalised(g * 2.0**12, BF16), orthogonalised(g, BF16))


@pytest.mark.parametrize("how", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
def test_transposes_agree_bit_for_bit(how):
    g = normal(24, 40)
    assert torch.equal(orthogonalised(g.mT, how), orthogonalised(g, how).mT)


def test_a_stack_is_each_matrix_by_itself():
    g = normal(2, 3, 6, 4)
    stack = orthogonalised(g, F64)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(stack[i, j], orthogonalised(g[i, j], F64), rtol=0, atol=1e-13)


def test_zeros_stay_and_the_argument_is_not_changed():
    g = normal(4, 6)
    before = g.clone()
    orthogonalised(g, F64)
    assert torch.equal(g, before)
    assert not orthogonalised(torch.zeros(4, 6)).any()
    assert orthogonalised(torch.zeros(0, 6)).shape == (0, 6)


def test_the_error_is_the_distance_of_the_squared_singular_values():
    u, s, v = with_spectrum(5, 8)
    o = u @ torch.diag(3 * s) @ v.T
    expected = ((3 * s) ** 2 - 1).square().mean().sqrt()
    for each in (o, o.mT):
        torch.testing.assert_close(orthogonality_error(each), expected, rtol=1e-12, atol=0)
    assert orthogonality_error(torch.stack([o, torch.eye(5, 8, dtype=torch.float64)]))[1] == 0


def test_a_vector_is_refused():
    with pytest.raises(InputError, match=r"g must have rows and columns, got shape \(3,\)"):
        orthogonalised(torch.ones(3))
