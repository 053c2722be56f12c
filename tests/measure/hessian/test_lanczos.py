"""Lanczos against dense eigenvalues, and the estimators on it against what is known."""

import math

import numpy as np
import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.measure.hessian.lanczos import density, extremes, lanczos, mean_interval, rademacher, trace


class Matrix:
    """A dense matrix as an operator."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.device, self.dtype = matrix, matrix.shape, matrix.device, matrix.dtype

    def __matmul__(self, vector):
        return self.matrix @ vector


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(size, seed=0, dtype=torch.float64):
    a = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    return Matrix(((a + a.T) / (2 * size) ** 0.5).to(dtype))


def test_a_spike_in_random_noise_shows_where_the_law_says():
    """P = 1500, entry variance 1/P, so that the noise's edge is 2. An outlier's own scatter is √(2/P) = 0.037 at most:
    the mean of four is within 2 % by some three standard errors."""
    laws = {0.5: 2.0, 1.0: 2.0, 2.0: 2.5, 4.0: 4.25}
    found = {spike: [] for spike in laws}
    for seed in range(4):
        matrix = symmetric(1500, seed).matrix
        for spike, edges in found.items():
            matrix[0, 0] += spike
            edges.append(float(lanczos(Matrix(matrix), 40, seeded()).values[-1]))
            matrix[0, 0] -= spike
    for spike, law in laws.items():
        assert np.mean(found[spike]) == pytest.approx(law, rel=0.02)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_both_ends_equal_the_dense_ones_with_true_residuals(dtype, close):
    A = symmetric(200, dtype=dtype)
    dense, vectors = torch.linalg.eigh(A.matrix.double())
    largest, smallest = extremes(A, lanczos(A, 200, seeded()), 5)
    assert [e.value for e in largest] == pytest.approx(dense.flip(0)[:5].tolist(), abs=close)
    assert [e.value for e in smallest] == pytest.approx(dense[:5].tolist(), abs=close)
    assert all(e.converged and e.residual < 10 * close for e in [*largest, *smallest])
    assert len(vectors) == 200


def test_too_few_steps_are_said_and_the_residual_bounds_the_error():
    A = symmetric(400)
    dense = torch.linalg.eigvalsh(A.matrix)
    run = lanczos(A, 12, seeded())
    (top,), (bottom,) = extremes(A, run, 1)
    assert not top.converged and top.residual > 1e-3
    assert top.value < float(dense[-1]) and bottom.value > float(dense[0])
    assert float((dense - top.value).abs().min()) <= top.residual
    assert run.residual(-1) == pytest.approx(top.residual, rel=1e-9)


@pytest.mark.parametrize(
    "spectrum", [[0.0] * 6, [3.0] * 6, [1.0, 1.0, 0.0, 0.0, 0.0, -2.0], [5.0], [1e-100, 2e-100, 3e-100]]
)
def test_repeated_and_zero_eigenvalues_show_as_often_as_there_are(spectrum):
    size = len(spectrum)
    q = torch.linalg.qr(torch.randn(size, size, generator=seeded(), dtype=torch.float64)).Q
    A = Matrix(q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ q.T)
    run = lanczos(A, 50, seeded())
    assert run.values.tolist() == pytest.approx(sorted(spectrum), abs=1e-13 * max(map(abs, spectrum)))
    basis = run.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)


def test_no_eigenvalue_is_found_twice_where_plain_lanczos_finds_copies():
    """Two far outliers converge at once; without re-orthogonalisation they come back within 100 steps."""
    spectrum = torch.cat([torch.linspace(0, 1, 298), torch.tensor([50.0, 100.0])]).double()
    A = Matrix(torch.diag(spectrum))
    assert int((lanczos(A, 100, seeded()).values > 10).sum()) == 2
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    torch.manual_seed(0)
    assert int((fast_lanczos(A, 100)[0] > 10).sum()) > 2


def test_the_first_product_is_kept():
    A = symmetric(50)
    start = rademacher(A, seeded())
    run = lanczos(A, 10, seeded(), start)
    torch.testing.assert_close(run.first_product(), A @ (start / 50**0.5), atol=1e-13, rtol=0)


def _outliers(size=120):
    spectrum = torch.linspace(-0.5, 1, size, dtype=torch.float64)
    spectrum[-3:] = torch.tensor([20.0, 40.0, 80.0])
    q = torch.linalg.qr(torch.randn(size, size, generator=seeded(5), dtype=torch.float64)).Q
    return Matrix(q @ torch.diag(spectrum) @ q.T), float(spectrum.sum())


def test_the_trace_interval_covers_at_its_stated_rate():
    """Binomial(300, 0.05) misses: 99.8 % lie in 5..28. Without the exact part the interval is 20 times wider."""
    A, truth = _outliers()
    run = lanczos(A, 20, seeded())
    found = [trace(A, run, 8, seeded(seed), 0.95) for seed in range(300)]
    assert 5 <= sum(not each.low <= truth <= each.high for each in found) <= 28
    mean, error = np.mean([each.value for each in found]), np.std([each.value for each in found]) / 300**0.5
    assert abs(mean - truth) < 4 * error < 0.02 * truth
    plain = mean_interval([float(v @ (A @ v)) for v in (rademacher(A, seeded(s)) for s in range(8))], 0.95, "")
    assert plain.high - plain.low > 3 * max(each.high - each.low for each in found)


def test_a_whole_spectrum_gives_the_trace_exactly():
    A, truth = _outliers(40)
    found = trace(A, lanczos(A, 40, seeded()), 1, seeded(), 0.95)
    assert found.value == pytest.approx(truth, rel=1e-12) and found.low == found.high == found.value
    assert found.method == "exact: the whole spectrum"


def test_one_probe_bounds_nothing():
    A, _ = _outliers()
    found = trace(A, lanczos(A, 5, seeded()), 1, seeded(), 0.95)
    assert math.isfinite(found.value) and (found.low, found.high) == (-math.inf, math.inf)


def test_the_density_is_that_of_the_semicircle():
    """Its area is 1, and its share below each point that of the true eigenvalues, but for the blur."""
    A = symmetric(600)
    generator = seeded()
    runs = [lanczos(A, 60, generator, rademacher(A, generator)) for _ in range(10)]
    found = density(runs, 400)
    grid, values = np.array(found.grid), np.array(found.values)
    step = grid[1] - grid[0]
    assert values.sum() * step == pytest.approx(1, abs=0.01)
    true = torch.linalg.eigvalsh(A.matrix).numpy()
    share = np.searchsorted(true, grid) / len(true)
    assert np.abs(np.cumsum(values) * step - share).max() < 0.03


def test_a_single_eigenvalue_has_no_density():
    A = Matrix(3 * torch.eye(5, dtype=torch.float64))
    assert density([lanczos(A, 5, seeded())], 100).grid == ()


def test_an_operator_that_is_not_symmetric_is_refused():
    A = Matrix(torch.randn(30, 30, generator=seeded(), dtype=torch.float64))
    with pytest.raises(InputError, match="the products with the Hessian are not symmetric"):
        lanczos(A, 30, seeded())


def test_products_that_are_not_finite_are_refused():
    A = Matrix(torch.full((4, 4), math.nan, dtype=torch.float64))
    with pytest.raises(InputError, match="the Hessian at these weights is not finite"):
        lanczos(A, 3, seeded())
