"""Each loss's residuals and curvature, soft targets, and losses of one's own."""

import pytest
import torch
from torch.func import hessian, jacrev
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.optim.egn.egn import EGN
from batchlab.optim.egn.loss import LOSSES
from tests.optim.egn.problems import TORCH_LOSS, batch, flat, naive, network, primal, relative, taken


def test_soft_targets_are_probabilities():
    hard, soft, (x, y) = network(), network(), batch("cross_entropy")
    EGN(hard, "cross_entropy").step(x, y)
    EGN(soft, "cross_entropy").step(x, F.one_hot(y, 3).double())
    torch.testing.assert_close(flat(hard), flat(soft), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", ["lu", "cholesky"])
def test_a_loss_of_ones_own(solver):
    """Poisson's, with its curvature given: the step is that of its own damped system."""

    def poisson(f, y):
        return (f.exp() - y * f).sum(1), f.exp() - y, f.exp()

    model, (x, _) = network(), batch("mse")
    y = torch.arange(15, dtype=torch.float64).view(5, 3)
    TORCH_LOSS["poisson"] = lambda f, y: F.poisson_nll_loss(f, y, reduction="none").sum(1).mean()
    value, g, H = naive(model, "poisson", x, y)
    delta, loss = taken(model, EGN(model, poisson, solver=solver), x, y)
    assert relative(delta, primal(g, H, 1.0)) < (1e-12 if solver == "lu" else 1e-5)
    assert loss == pytest.approx(value.item())


def test_a_full_curvature_of_ones_own_is_factored():
    def rounded(f, y):
        return LOSSES["cross_entropy"](f, y)[:3]

    one, two, (x, y) = network(), network(), batch("cross_entropy")
    before = flat(one).clone()
    EGN(one, rounded, solver="cholesky").step(x, y)
    EGN(two, "cross_entropy", solver="lu").step(x, y)
    assert 0 < relative(flat(one) - before, flat(two) - before) < 1e-5  # it solves with Q + 1e-6·I
    with pytest.raises(InputError, match='solver="cholesky" needs a positive semi-definite Q'):
        EGN(one, lambda f, y: (f[:, 0], f, -f.square().diag_embed()), solver="cholesky").step(x, y)


def test_terms_of_every_loss_are_its_derivatives():
    """r and Q by automatic differentiation of each example's own loss, and S Sᵀ = Q, S u = r."""
    for loss, function in LOSSES.items():
        f, y = torch.randn(4, 3, dtype=torch.float64), batch(loss, b=4)[1]
        terms = function(f, y)
        assert terms.losses.mean().item() == pytest.approx(TORCH_LOSS[loss](f, y).item(), rel=1e-14)
        for i in range(4):

            def own(f, y=y[i : i + 1], loss=loss):
                return TORCH_LOSS[loss](f[None], y)

            Q, S = (m[i].diag() if m.ndim == 2 else m[i] for m in (terms.Q, terms.root))
            torch.testing.assert_close(terms.r[i], jacrev(own)(f[i]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(Q, hessian(own)(f[i]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(S @ S.T, Q, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(S @ terms.u[i], terms.r[i], rtol=1e-12, atol=1e-12)
