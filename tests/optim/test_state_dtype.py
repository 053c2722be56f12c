"""State in 8 bits, by torchao: near the full state's steps, a quarter of its memory, and it goes through torch.save."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.errors import InputError
from batchlab.optim import LAMB, Lion
from batchlab.optim.state_dtype import checked_state_dtype
from batchlab.spine.learner import Learner
from tests.spine.jobs import toy_job, toy_plan

STEPS = 20


def trained(make, state_dtype, shape=(128, 64)):
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = make([w], lr=0.01, state_dtype=state_dtype)
    for _ in range(STEPS):
        w.grad = torch.randn(shape, generator=generator) + 0.5
        optimizer.step()
    return w, optimizer


@pytest.mark.parametrize("make", [LAMB, Lion])
def test_eight_bits_stay_near_the_full_state(make):
    (full, _), (low, optimizer) = trained(make, None), trained(make, "8bit")
    gap = (low - full).norm() / full.norm()
    assert 0 < gap < 0.02
    state = optimizer.state[low]["exp_avg"]
    assert type(state).__name__ == "OptimState8bit"
    assert state.codes.numel() + 4 * state.scale.numel() < 0.3 * 4 * low.numel()


def test_small_tensors_stay_in_float32():
    w, optimizer = trained(LAMB, "8bit", shape=(16, 16))
    assert optimizer.state[w]["exp_avg"].dtype == torch.float32
    assert torch.equal(w, trained(LAMB, None, shape=(16, 16))[0])


def test_eight_bits_go_through_torch_save():
    w, optimizer = trained(LAMB, "8bit")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(w.detach().clone())
    resumed = LAMB([again], lr=0.01, state_dtype="8bit")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for parameter, each in ((w, optimizer), (again, resumed)):
        parameter.grad = torch.ones_like(parameter)
        each.step()
    assert torch.equal(w, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["load", "copy", "copy of the state"])
def test_eight_bits_are_copied_and_loaded_for_any_parameters(dtype, how):
    w = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = LAMB([w], lr=0.01, state_dtype="8bit")
    w.grad = torch.ones_like(w)
    optimizer.step()
    if how == "copy":
        other = copy.deepcopy(optimizer)
    else:
        state = optimizer.state_dict()
        other = LAMB([nn.Parameter(w.detach().clone())], lr=0.01, state_dtype="8bit")
        other.load_state_dict(copy.deepcopy(state) if how == "copy of the state" else state)
    (again,) = other.param_groups[0]["params"]
    before = optimizer.state[w]["exp_avg"].dequantize()
    assert again is not w and torch.equal(other.state[again]["exp_avg"].dequantize(), before)
    again.grad = torch.full_like(w, -2.0)
    other.step()
    assert hasattr(other.state[again]["exp_avg"], "codes") and (other.state[again]["exp_avg"].dequantize() < 0).all()
    if how != "load":  # which as torch's may share what it is given
        assert torch.equal(optimizer.state[w]["exp_avg"].dequantize(), before)


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16", torch.bfloat16])
def test_a_checkpoint_keeps_the_bits(state_dtype, tmp_path):
    w, optimizer = trained(LAMB, state_dtype)
    kept = load_checkpoint(save_checkpoint(tmp_path, 1, optimizer.state_dict()))
    again = nn.Parameter(w.detach().clone())
    resumed = LAMB([again], lr=0.01, state_dtype=state_dtype)
    resumed.load_state_dict(kept)
    assert type(resumed.state[again]["exp_avg"]) is type(optimizer.state[w]["exp_avg"])
    for parameter, each in ((w, optimizer), (again, resumed)):
        parameter.grad = torch.ones_like(parameter)
        each.step()
    assert torch.equal(w, again)


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_a_run_with_few_bits_resumes_bit_by_bit(state_dtype, tmp_path):
    layers = lambda: nn.Sequential(nn.Linear(6, 1024), nn.ReLU(), nn.Linear(1024, 1))  # noqa: E731
    wide = dataclasses.replace(toy_job(dtype=torch.float32), model=layers)
    plan = toy_plan(optimizer="lamb", hyperparameters={"state_dtype": state_dtype})
    assert type(plan).from_json(plan.to_json()) == plan
    learners = [Learner(wide, plan, device="cpu") for _ in range(2)]
    for _ in range(3):
        learners[0].update()
    learners[1].load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 3, learners[0].state_dict())))
    for _ in range(3):
        for learner in learners:
            learner.update()
    for one, other in zip(learners[0].model.parameters(), learners[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_rule_that_needs_its_state_says_so():
    with pytest.raises(InputError, match="keeps its state in float32, got state_dtype='8bit': its rule needs it"):
        checked_state_dtype("8bit", "Learned", allowed=False)
