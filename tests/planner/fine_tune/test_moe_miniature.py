"""A real mixture of experts on the CPU: memory by saved tensors, and speed by the process's own time, held out."""

import itertools
import math
import time

import pytest
import torch
from torch import nn

from batchlab.planner.fine_tune.calibration import calibrate
from batchlab.planner.fine_tune.measured_batch import MeasuredBatch
from batchlab.planner.fine_tune.memory_model import BatchMemoryModel

EXPERTS, WIDTH, LENGTH = 8, 32, 16
FITTED, HELD_OUT = (1, 2, 4, 8, 16, 32), (3, 6, 12, 24, 64)
SPARSITIES = {2: 0.25, 8: 1.0}


class Experts(nn.Module):
    """A block of attention-free mixing and of `active` among eight expert MLPs for each token, weighted by a router."""

    def __init__(self, active):
        super().__init__()
        self.active = active
        self.norm, self.mix, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.router(tokens).softmax(-1).topk(self.active, -1)
        parts = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, ranks = (chosen == index).nonzero(as_tuple=True)
            parts = parts.index_add(0, rows, expert(tokens[rows]) * weights[rows, ranks, None])
        return x + parts.reshape(x.shape)


def model_of(active):
    torch.manual_seed(0)
    return nn.Sequential(Experts(active), Experts(active))


def batch_of(size, length=LENGTH):
    return torch.randn(size, length, WIDTH, generator=torch.Generator().manual_seed(size))


def peak_bytes(model, batch):
    """Weights, gradients and two moments in float32, and each storage that the backward pass keeps, once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, held = {}, []

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch).square().mean()
    states = 16 * sum(p.numel() for p in model.parameters())
    return states + sum(size for storage, size in kept.items() if storage not in own)


def test_memory_is_linear_in_batch_length_and_sparsity():
    """Batches 1 to 32 fitted, 3 to 64 held out, top 2 and all of 8 experts: the sheet's 10 %; measured, not a byte off.

    So is a length that was not fitted.
    """
    models = {active: model_of(active) for active in SPARSITIES}

    def points(sizes, length=LENGTH):
        cells = itertools.product(SPARSITIES, sizes)
        return [
            MeasuredBatch(size, None, peak_bytes(models[active], batch_of(size, length)), length, SPARSITIES[active])
            for active, size in cells
        ]

    fit = BatchMemoryModel.fit(points(FITTED))
    held_out = [*points(HELD_OUT), *points([5], length=40)]
    errors = {
        (p.batch, p.sequence_length, p.sparsity): fit.bytes(p.batch, p.sequence_length, p.sparsity) / p.peak_bytes - 1
        for p in held_out
    }
    assert max(map(abs, errors.values())) < 0.01, errors
    assert 0.5 < fit.sparse_share.value < 1  # most of what is kept is the experts'


def step_seconds(model, optimizer, batch):
    """CPU time of this process in one step."""
    started = time.process_time()
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - started


@pytest.mark.slow
def test_the_line_of_time_predicts_batches_held_out():
    """The least CPU time of 40 rounds in turns; the root mean square of relative errors on the batches held out.

    The sheet wants 15 % of the better law. Measured three times on two contended cores: the line 3.7 to 4.5 %, the
    logarithm 55 to 59 % as in the authors' code and 27 to 33 % with its exponent fitted.
    """
    models = {active: model_of(active) for active in SPARSITIES}
    optimizers = {active: torch.optim.SGD(model.parameters(), lr=1e-3) for active, model in models.items()}
    cells = list(itertools.product(SPARSITIES, (*FITTED, *HELD_OUT)))
    least = dict.fromkeys(cells, math.inf)
    for index in range(-2, 40):
        for active, size in cells:
            seconds = step_seconds(models[active], optimizers[active], batch_of(size))
            least[active, size] = min(least[active, size], seconds) if index >= 0 else math.inf

    def points(sizes):
        return [
            MeasuredBatch(size, least[active, size], sparsity=SPARSITIES[active])
            for active in SPARSITIES
            for size in sizes
        ]

    fits = {form: calibrate(points(FITTED), form=form) for form in ("code", "power")}
    laws = {"linear time": fits["code"].linear_time} | {form: fit.logarithm for form, fit in fits.items()}
    errors = {
        name: math.sqrt(
            sum((law.speed(p.batch, p.active) / p.speed - 1) ** 2 for p in points(HELD_OUT)) / len(points(HELD_OUT))
        )
        for name, law in laws.items()
    }
    assert errors["linear time"] < 0.15, errors
    assert errors["linear time"] < min(errors["code"], errors["power"]), errors
