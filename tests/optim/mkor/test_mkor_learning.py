"""On digits MKOR halves the loss of SGD."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.optim.mkor.mkor import MKOR


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def digits_loss(digits, seed, rate, make):
    """The training loss after 100 steps of 512 of an MLP 64-128-64-10, momentum 0.9."""
    x, y = digits
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(100):
        rows = torch.randint(len(x), (512,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_on_digits_it_halves_the_loss_of_its_base(digits, rate):
    ours = sorted(digits_loss(digits, seed, rate, MKOR) for seed in range(3))
    plain = sorted(digits_loss(digits, seed, rate, lambda _, base: base) for seed in range(3))
    assert ours[1] <= 0.5 * plain[1], (ours, plain)
