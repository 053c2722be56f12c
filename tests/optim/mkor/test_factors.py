"""MKOR's rank-one updates against dense inverses, in every dtype; its knee against a closed form."""

import math

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.optim.mkor.factors import Knee, precondition, update_inverse_, update_released_
from tests.optim.mkor.small_mlp import DOUBLE, close, drawn


def test_a_chain_of_updates_is_the_inverse_of_the_average():
    gamma, A, P = 0.95, torch.eye(10, dtype=DOUBLE), torch.eye(10, dtype=DOUBLE)
    for step in range(200):
        v = drawn(10, seed=step)
        A = gamma * A + (1 - gamma) * torch.outer(v, v)
        update_inverse_(P, v, gamma=gamma)
        close(P, torch.linalg.inv(A))
        assert torch.equal(P, P.T)
        assert torch.linalg.eigvalsh(P).min() > 0


def test_no_weight_or_no_vector_changes_only_the_scale():
    P = torch.linalg.inv(torch.eye(4, dtype=DOUBLE) + torch.ones(4, 4, dtype=DOUBLE))
    before = P.clone()
    update_inverse_(P, drawn(4), gamma=1.0)
    assert torch.equal(P, before)
    update_inverse_(P, torch.zeros(4, dtype=DOUBLE), gamma=0.5)
    assert torch.equal(P, before * 2)
    for gamma in (0.0, 1.5, math.nan):
        with pytest.raises(InputError, match=r"gamma must lie in \(0, 1\), got"):
            update_inverse_(P, drawn(4), gamma=gamma)


def same_vector(eps, zeta, steps, dtype=DOUBLE, d=10):
    """The largest entry over updates with one vector."""
    P, v, largest = torch.eye(d, dtype=dtype), drawn(d, dtype=torch.float32), 0.0
    for _ in range(steps):
        update_inverse_(P, v, gamma=0.95, eps=eps, zeta=zeta)
        largest = max(largest, float(P.abs().max()))
    return largest, P


def test_one_vector_alone_lets_the_factor_grow_unless_it_is_stabilised():
    v = drawn(10, dtype=torch.float32)
    orthogonal = torch.eye(10, dtype=DOUBLE)[0] - v[0] / v.square().sum() * v
    for steps in (50, 200):
        _, P = same_vector(math.inf, 0.9, steps)
        close(P @ orthogonal, orthogonal / 0.95**steps, 1e-5)
    assert same_vector(10.0, 0.9, 500)[0] <= 10 / 0.95 * 1.01
    assert same_vector(2.0, 0.9, 500)[0] <= 2 / 0.95 * 1.01
    for dtype in (torch.float16, torch.bfloat16):
        largest, P = same_vector(10.0, 0.9, 500, dtype)
        assert largest <= 10 / 0.95 * 1.02 and torch.linalg.eigvalsh(P.double()).min() > 0


def test_rounding_does_not_add_up():
    """In float32, of 2,000 updates: what is skew would grow as 0.95^-t."""
    P, exact = torch.eye(11), torch.eye(11, dtype=DOUBLE)
    for step in range(2000):
        v = drawn(11, seed=step).float()
        for each in (P, exact):
            update_inverse_(each, v.to(each.dtype), gamma=0.95)
    close(P.double(), exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1.0, 30.0, 1e4, 1e8])
def test_a_factor_stays_positive_definite_however_long_the_vectors(dtype, length):
    """Also where the dtype cannot hold 1/|v|² beside ε: plain Sherman-Morrison gave eigenvalues of -6,000 here."""
    P, u, changed = torch.eye(100, dtype=dtype), drawn(100), 0
    for step in range(150):
        v = u + 0.01 * drawn(100, seed=step)
        changed += int(update_inverse_(P, v / v.norm() * length, gamma=0.95, eps=10.0, zeta=0.9))
        assert torch.equal(P, P.T)
        if step % 15 == 0:
            eigenvalues = torch.linalg.eigvalsh(P.double())
            assert eigenvalues.min() > 0 and P.max() <= 10 / 0.95 * 1.01
    limit = 1 / (torch.finfo(dtype).eps * 10 / 0.95)
    assert (changed > 75) == (length**2 > limit)


def test_a_vector_is_shortened_to_what_the_factor_can_hold():
    P, wanted = torch.eye(3, dtype=torch.float16), torch.eye(3, dtype=torch.float32)
    v = torch.tensor([0.0, 100.0, 0.0])
    assert update_inverse_(P, v, gamma=0.5)
    assert not update_inverse_(wanted, v / 100 * 32, gamma=0.5)
    close(P.float(), wanted, 1e-3)
    for bad in (math.inf, math.nan):
        P = torch.eye(3)
        update_inverse_(P, v * bad, gamma=0.5)
        assert P.isnan().any()


def test_the_printed_formula_is_not_the_inverse_and_blows_up():
    P = torch.eye(10, dtype=DOUBLE)
    for step in range(200):
        update_inverse_(P, drawn(10, seed=step), gamma=0.95, printed=True)
    assert P.abs().max() > 1e20
    P, v, gamma = torch.eye(3, dtype=DOUBLE), drawn(3), 0.9
    update_inverse_(P, v, gamma=gamma, printed=True)
    scale = (1 - gamma) / (gamma**2 * (1 + gamma * (1 - gamma) * v @ v))
    close(P, gamma * torch.eye(3, dtype=DOUBLE) + scale * torch.outer(v, v))


def test_the_released_formula_is_the_inverse_of_a_sum():
    P = torch.linalg.inv(torch.eye(4, dtype=DOUBLE) + torch.ones(4, 4, dtype=DOUBLE))
    v = drawn(4)
    drawn_in = 0.95 * P + 0.05 * torch.eye(4, dtype=DOUBLE)
    wanted = torch.linalg.inv(torch.linalg.inv(drawn_in) + torch.outer(v, v))
    assert not update_released_(P, v, gamma=0.95)
    close(P, wanted)
    assert update_released_(torch.eye(2) * 3, torch.zeros(2), gamma=0.95)


def test_a_preconditioned_gradient_has_its_norm_and_zero_stays_zero():
    A, G = (torch.linalg.inv(x @ x.T + torch.eye(len(x))) for x in (drawn(6, 6).float(), drawn(4, 4).float()))
    for step in range(20):
        grad = drawn(4, 6, seed=step).float() * 10.0 ** (step - 10)
        D = precondition(grad, A, G)
        assert D.norm().item() == pytest.approx(grad.norm().item(), rel=1e-6)
        close(D / D.norm(), (G @ grad @ A) / (G @ grad @ A).norm(), 1e-5)
    assert torch.equal(precondition(torch.zeros(4, 6), A, G), torch.zeros(4, 6))
    assert precondition(torch.full((4, 6), math.nan), A, G).isnan().all()
    assert torch.equal(precondition(grad, torch.eye(6), torch.eye(4)), grad)


def test_the_knee_is_found_where_the_loss_stops_falling():
    """By 0.05 a step for 100 steps, then not: the running mean is 0.05·(0.98^(t - 100) - 0.98^t)/(1 - 0.98^t)."""
    knee = Knee()
    answers = [knee.take(10.0 - 0.05 * min(t, 100)) for t in range(400)]
    recent = [0.05 * (0.98 ** (t - 100) - 0.98**t) / (1 - 0.98**t) for t in range(101, 400)]
    wanted = 101 + next(k for k, mean in enumerate(recent) if mean < 0.1 * 5.0 / (101 + k))
    assert answers.index(True) == wanted == 254


def test_the_knee_waits_and_leaves_out_what_is_not_finite():
    def answers(**settings):
        knee = Knee(**settings)
        return [knee.take(loss) for loss in (3.0, math.nan, 2.0, 2.0, math.inf, 2.0)]

    assert not any(answers())
    assert answers(warm_up=1, decay=0.1, share=0.9) == [False, False, False, True, False, True]
