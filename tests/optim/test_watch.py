"""What a watched step notes, of torch's optimizers and of batchlab's; the step itself is the same."""

import math

import pytest
import torch
from torch import nn

from batchlab.optim.by_name import create, names
from batchlab.optim.watch import watched_step
from batchlab.testing.optimizers import gradients_for, small_model


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon"])
def test_it_is_the_step_with_its_ratios(name):
    watched, plain = small_model(), small_model()
    ours, theirs = create(name, watched, lr=0.01), create(name, plain, lr=0.01)
    for step in range(2):
        gradients_for(watched, step)
        gradients_for(plain, step)
        before = {n: p.detach().clone() for n, p in watched.named_parameters()}
        found = watched_step(ours.step, ours, dict(watched.named_parameters()))
        theirs.step()
        for (n, p), q in zip(watched.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)
            expected = (p.detach() - before[n]).norm() / before[n].norm()
            assert found[n]["update_ratio"] == pytest.approx(float(expected), rel=1e-5)
    if name == "lamb":
        assert found["3.weight"]["trust_ratio"] > 0 and "trust_ratio" not in found["3.bias"]
    if name == "muon":
        assert found["0.weight"]["orthogonality_error"] >= 0


def test_every_optimizer_of_ours_names_its_tensors_as_the_model_does():
    for name in names():
        model = small_model()
        optimizer = create(name, model, lr=0.01)
        if hasattr(optimizer, "add_group"):
            continue
        gradients_for(model, 0)
        found = watched_step(optimizer.step, optimizer, dict(model.named_parameters()))
        assert set(found) == {n for n, _ in model.named_parameters()}


def test_complex_numbers_count_with_both_parts():
    w = nn.Parameter(torch.tensor([3 + 4j]))
    w.grad = torch.tensor([5j])
    sgd = torch.optim.SGD([w], lr=0.1)
    assert watched_step(sgd.step, sgd, {"w": w}) == {"w": {"update_ratio": pytest.approx(0.1)}}


def test_only_the_largest_are_watched_and_zeros_are_told_apart():
    a, b, c = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1))
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    b.grad.zero_()
    sgd = torch.optim.SGD([a, b, c], lr=0.1)
    found = watched_step(sgd.step, sgd, {"a": a, "b": b, "c": c}, most=2)
    assert found == {"a": {"update_ratio": math.inf}, "b": {"update_ratio": 0.0}}
