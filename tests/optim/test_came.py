"""CAME equals plain loops, is exact for squares of rank one, and starts with steps of eleven rates."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.came import CAME, first_step_rms
from batchlab.testing.optimizers import compiled_equals_the_loop
from batchlab.testing.optimizers_spread import model_to_spread, spread, take_steps
from tests.optim.problem import RATES, after, close, gradients, weights
from tests.spine.forked import in_ranks

BETAS, EPS = (0.8, 0.95, 0.99), (1e-30, 1e-16)


def factored(x, state, beta, eps, *, sums):
    """The average of x + eps as rows and columns, and what they stand for together: with means, or the paper's sums."""
    reduce = np.sum if sums else np.mean
    r, c = state
    r = beta * r + (1 - beta) * reduce(x + eps, axis=-1)
    c = beta * c + (1 - beta) * reduce(x + eps, axis=-2)
    full = r[..., :, None] * c[..., None, :] / reduce(r, axis=-1)[..., None, None]
    return (r, c), full


def loop(*, decay=0.1, clip=1.0, confidence=True, sums=False):
    """The module's formulas on NumPy arrays."""
    (b1, b2, b3), ws = BETAS, weights()
    state = [{"m": 0 * w, "v": 0 * w, "sq": (0.0, 0.0), "res": (0.0, 0.0)} for w in ws]
    for t, rate in enumerate(RATES):
        for i, g in enumerate(gradients(ws, t)):
            s = state[i]
            if g.ndim > 1:
                s["sq"], v = factored(g * g, s["sq"], b2, EPS[0], sums=sums)
            else:
                v = s["v"] = b2 * s["v"] + (1 - b2) * (g * g + EPS[0])
            u = g / np.sqrt(v)
            u = u / max(1.0, math.sqrt((u * u).mean()) / clip)
            m = s["m"] = b1 * s["m"] + (1 - b1) * u
            step = m
            if g.ndim > 1 and confidence:
                s["res"], instability = factored((u - m) ** 2, s["res"], b3, EPS[1], sums=sums)
                step = m / np.sqrt(instability)
            ws[i] = (1 - rate * decay) * ws[i] - rate * step
    return ws


@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"confidence": False}], ids=["paper", "clip", "adafactor"])
def test_a_hundred_steps_are_the_formulas(options):
    close(after(partial(CAME, lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.1, **options)), loop(**options))


def test_sums_and_means_are_the_same_method():
    close(loop(sums=True), loop())


def test_squares_of_rank_one_are_kept_whole():
    """For g = abᵀ, V is the full average of g²: the step is that of full squares, up to the clip that both have."""
    a, b = torch.rand(7, 1, dtype=torch.float64) + 0.5, torch.rand(1, 5, dtype=torch.float64) + 0.5
    w, full, scales = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64)), torch.zeros(7, 5).double(), (1.0, 0.3, 2.0)
    optimizer = CAME([w], lr=1.0, betas=(0.0, 0.9, 0.99), clip=1e9, confidence=False)
    for scale in scales:
        before, w.grad = w.detach().clone(), scale * a @ b
        optimizer.step()
        full = 0.9 * full + 0.1 * w.grad.square()
        torch.testing.assert_close(before - w.detach(), w.grad / full.sqrt(), rtol=1e-12, atol=0)


def test_the_first_steps_are_long():
    """11.11 rates for |g| constant; of fresh Gaussian gradients those of came-pytorch 0.1.3, measured at this size."""
    w, generator = nn.Parameter(torch.zeros(256, 256)), torch.Generator().manual_seed(0)
    w.grad = torch.randn(256, 256, generator=generator).sign()
    CAME([w], lr=1.0).step()
    assert w.detach().square().mean().sqrt().item() == pytest.approx(first_step_rms(), rel=1e-4)
    assert first_step_rms() == pytest.approx(0.1 / (0.9 * 0.01))
    w, found = nn.Parameter(torch.zeros(256, 256)), []
    optimizer = CAME([w], lr=1.0)
    for _ in range(5):
        before, w.grad = w.detach().clone(), torch.randn(256, 256, generator=generator)
        optimizer.step()
        found.append((w.detach() - before).square().mean().sqrt().item())
    assert found == pytest.approx([11.11, 10.56, 10.05, 9.58, 9.16], abs=0.06)


def test_a_gradient_that_stays_lengthens_the_steps():
    w = nn.Parameter(torch.zeros(64, 64))
    w.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer, found = CAME([w], lr=1.0), []
    for _ in range(100):
        before = w.detach().clone()
        optimizer.step()
        found.append((w.detach() - before).square().mean().sqrt().item())
    assert found[9] == pytest.approx(34, abs=4)
    assert found[99] == pytest.approx(50, abs=6)


def test_the_state_of_a_matrix_is_one_number_a_weight_and_four_a_side():
    w, b = nn.Parameter(torch.zeros(1024, 1024)), nn.Parameter(torch.zeros(8))
    w.grad, b.grad = torch.ones(1024, 1024), torch.ones(8)
    optimizer = CAME([w, b], lr=1e-3)
    optimizer.step()
    sizes = {k: v.numel() for k, v in optimizer.state[w].items() if k != "step"}
    assert sum(sizes.values()) == 1024 * 1024 + 4 * 1024
    assert set(optimizer.state[b]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_confidence_may_be_changed_in_the_run():
    w = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = CAME([w], lr=0.01, confidence=False)
    for step, on in enumerate((False, True, False)):
        optimizer.param_groups[0]["confidence"] = on
        before, w.grad = w.detach().clone(), torch.randn(4, 3, dtype=torch.float64)
        optimizer.step()
        by_momentum = torch.equal(w, before - 0.01 * optimizer.state[w]["exp_avg"])
        assert by_momentum != on, step


def test_no_gradient_moves_nothing():
    for shape in ((3, 4), (5,), (2, 0)):
        w = nn.Parameter(torch.ones(shape))
        optimizer = CAME([w], lr=0.1)
        for _ in range(3):
            w.grad = torch.zeros(shape)
            optimizer.step()
        assert (w == 1).all()
        w.grad = torch.ones(shape)
        optimizer.step()
        assert w.isfinite().all()


def test_accumulated_gradients_are_those_of_the_batch():
    ends = []
    for parts in (1, 8):
        model = model_to_spread(torch.float64)
        optimizer = CAME(model.parameters(), lr=1e-3)
        for step in range(5):
            x = torch.randn(256, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            model.zero_grad()
            for each in x.chunk(parts):
                (model(each).square().mean() / parts).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"])
def test_the_momentum_alone_takes_fewer_bits(state_dtype):
    if state_dtype == "8bit":
        pytest.importorskip("torchao")
    w = nn.Parameter(torch.zeros(64, 64))
    optimizer, fine = CAME([w], lr=1e-3, state_dtype=state_dtype), nn.Parameter(torch.zeros(64, 64))
    whole = CAME([fine], lr=1e-3)
    for step in range(20):
        w.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        fine.grad = w.grad.clone()
        optimizer.step()
        whole.step()
    assert optimizer.state[w]["exp_avg_sq_row"].dtype == torch.float32
    assert hasattr(optimizer.state[w]["exp_avg"], "codes") or optimizer.state[w]["exp_avg"].dtype == torch.bfloat16
    gap = (w - fine).detach().norm() / fine.detach().norm()
    assert 0 < gap < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"betas": (0.9, 0.999)}, r"betas must be 3 numbers in \[0, 1\), got \(0.9, 0.999\)"),
        ({"betas": (0.9, 0.0, 0.9)}, r"beta2 must lie in \(0, 1\), got 0.0"),
        ({"eps": (0.0, 1e-16)}, "eps1 must be finite and > 0, got 0.0"),
        ({"eps": 1e-8}, "eps must be two numbers > 0, for squares and for residues, got 1e-08"),
        ({"clip": 0.0}, "clip must be finite and > 0, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and >= 0, got -1.0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        CAME([nn.Parameter(torch.ones(2, 2))], **({"lr": 1e-3} | options))


def test_a_short_memory_of_the_instability_is_warned_of():
    with pytest.warns(UserWarning, match=r"CAME wants betas\[2\] above betas\[1\], got \(0.9, 0.999, 0.99\)"):
        CAME([nn.Parameter(torch.ones(2, 2))], lr=1e-3, betas=(0.9, 0.999, 0.99))


def _placements():
    model, world, rank = spread("fsdp_tp", model_to_spread(torch.float64))
    optimizer = CAME(model.named_parameters(), lr=1e-3)
    take_steps(model, optimizer.step, range(1), world, rank)
    for name in ("up.weight", "down.weight", "head.weight"):
        w = model.get_parameter(name)
        for side, dim in (("row", 1), ("col", 0)):
            held = optimizer.state[w][f"exp_avg_sq_{side}"]
            assert held.shape == (w.shape[1 - dim],)
            assert held.device_mesh == w.device_mesh
            for of_state, of_weight in zip(held.placements, w.placements, strict=True):
                assert of_state.is_replicate() == (of_weight.is_replicate() or of_weight.dim == dim)


def test_rows_and_columns_are_spread_as_the_weight_is(tmp_path):
    assert in_ranks(4, tmp_path, _placements) == [0] * 4


@pytest.mark.slow
def test_the_compiled_rule_is_the_same():
    compiled_equals_the_loop(partial(CAME, lr=1e-3, weight_decay=0.1))
