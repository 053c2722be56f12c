"""State in 8 bits, by torchao: near the full state's steps, a quarter of its memory, and it goes through torch.save."""

import io

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim import LAMB, Lion
from batchlab.optim.state_dtype import check_state_dtype

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


def test_a_rule_that_needs_its_state_says_so():
    with pytest.raises(InputError, match="keeps its state in float32, got state_dtype='8bit': its rule needs it"):
        check_state_dtype("8bit", "Learned", allowed=False)
