"""The small dual system against the large one that it stands for."""

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.egn.kernel import dual_solve, times
from batchlab.optim.egn.loss import LOSSES
from tests.optim.egn.problems import primal, relative


@pytest.mark.parametrize("solver", ["lu", "cholesky"])
def test_the_small_system_has_the_large_ones_solution(solver):
    """The identity itself: random J, Q of a softmax, λ = 1e-2."""
    b, c, d = 8, 5, 300
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        J = torch.randn(b * c, d, generator=g, dtype=torch.float64)
        f = torch.randn(b, c, generator=g, dtype=torch.float64)
        terms = LOSSES["cross_entropy"](f, torch.randint(0, c, (b,), generator=g))
        z = dual_solve(J @ J.T, terms, 1e-2, solver)
        QJ = times(terms.Q, J.view(b, c, d)).reshape(b * c, d)
        want = primal(J.T @ terms.r.flatten() / b, J.T @ QJ / b, 1e-2)
        assert relative(-J.T @ z, want) < 1e-12
    with pytest.raises(InputError, match='solver must be "lu" or "cholesky", got \'qr\''):
        dual_solve(J @ J.T, terms, 1e-2, "qr")


def test_a_symmetric_solver_of_the_matrix_of_cross_entropy_would_be_wrong():
    """Why "lu" is what cross-entropy has: QK + bλI is not symmetric, and its lower triangle says something else."""
    g = torch.Generator().manual_seed(0)
    J = torch.randn(40, 300, generator=g, dtype=torch.float64)
    f = torch.randn(8, 5, generator=g, dtype=torch.float64)
    terms = LOSSES["cross_entropy"](f, torch.randint(0, 5, (8,), generator=g))
    A = torch.block_diag(*terms.Q) @ J @ J.T + 8e-2 * torch.eye(40, dtype=torch.float64)
    mirrored = A.tril() + A.tril(-1).T
    wrong = -J.T @ torch.linalg.solve(mirrored, terms.r.flatten())
    assert relative(wrong, -J.T @ dual_solve(J @ J.T, terms, 1e-2, "lu")) > 0.5
