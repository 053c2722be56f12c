"""Evaluation mode that leaves a model as it was: its flags, and the weights of layers that merge when told to."""

import dataclasses

import pytest
import torch
from torch import nn

from batchlab.core.modes import evaluating
from batchlab.measure.course.learning_rate import lr_range
from batchlab.measure.hessian.curvature import curvature
from batchlab.measure.surface.convexity import hessian_map
from batchlab.spine.evaluate import evaluate
from tests.spine.jobs import toy_job


class Adapter(nn.Linear):
    """Adds B·A to its weights, which evaluation mode puts into them, as loralib's does."""

    def __init__(self):
        super().__init__(6, 1, dtype=torch.float64)
        self.a = nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(1, 2, dtype=torch.float64))
        self.merged = False
        self.requires_grad_(False)
        self.a.requires_grad_()
        self.b.requires_grad_()

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.b @ self.a
        return nn.functional.linear(x, weight, self.bias)


def test_flags_come_back_part_by_part_and_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)))
    model[1][0].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == [True, True, True, False, True]


@pytest.mark.parametrize("measure", [curvature, hessian_map])
def test_adapters_have_a_curvature_and_stay_unmerged(measure):
    model, x = Adapter(), torch.randn(12, 6, dtype=torch.float64)
    before = model.weight.detach().clone()
    settings = {"batch_sizes": (), "steps": 5} if measure is curvature else {"coordinates": ([0.0], [0.0])}
    found = measure(model, lambda m, x: m(x).square().mean(), [x], **settings)
    largest = found.largest[0].value if measure is curvature else found.largest[0][0]
    assert largest > 0.1 and torch.equal(model.weight, before) and not model.merged and model.training


def test_validation_in_a_range_test_leaves_adapters_to_train():
    job = dataclasses.replace(toy_job(optimizer="sgd", n=32), model=Adapter)
    settings = {"low": 1e-3, "high": 0.01, "steps": 5, "batch_size": 8, "device": "cpu"}
    assert lr_range(job, validation=4, **settings).losses == lr_range(job, **settings).losses


def test_evaluation_leaves_adapters_to_train():
    model = Adapter()
    before = model.weight.detach().clone()
    evaluate(dataclasses.replace(toy_job(), model=Adapter), model, batch_size=8, device=torch.device("cpu"))
    assert torch.equal(model.weight, before) and not model.merged and model.training
