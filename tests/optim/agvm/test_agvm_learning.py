"""A head on wrong labels is AGVM's noisiest and gets the smallest rate."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from batchlab.optim.agvm.agvm import AGVM


class NoisyHead(nn.Module):
    """64-64-32 and two heads 32-32-10."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.clean = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        self.noisy = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.slow
@pytest.mark.parametrize("half", [256, 64])
@pytest.mark.parametrize("seed", range(5))
def test_a_head_on_wrong_labels_is_the_noisiest_and_gets_the_smallest_rate(seed, half):
    """Digits, one head's labels replaced at random with probability 0.5, once for all (sheet 29, 8).

    Measured, mean φ and last factor over seeds 0 to 4, halves of 256: trunk 0.55-0.65, clean 0.49-0.68 (factor
    1.02-1.10), noisy 0.78-0.86 (0.85-0.91); halves of 64: 0.70-0.77, 0.66-0.77 (1.03-1.09), 0.84-0.93 (0.92-0.96).
    With labels drawn anew for each batch the noisy head's φ is still the largest in 10 of 10 runs, but its factor is
    below 0.97 in 8 alone (halves of 64: 0.93-0.98).
    """
    torch.manual_seed(seed)
    model, generator = NoisyHead(), torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    replaced = torch.rand(len(labels), generator=generator) < 0.5
    wrong = torch.where(replaced, torch.randint(10, labels.shape, generator=generator), labels)
    groups = [{"params": list(part.parameters())} for part in (model.trunk, model.clean, model.noisy)]
    agvm, phis = AGVM(torch.optim.SGD(groups, lr=0.1, momentum=0.9), start=100), []
    for _ in range(400):
        agvm.zero_grad()
        chosen, measures = torch.randperm(len(labels), generator=generator)[: 2 * half], agvm.due()
        for name, rows in zip("AB", chosen.split(half), strict=True):
            with agvm.half(name):
                found = model.trunk(images[rows])
                noisy = F.cross_entropy(model.noisy(found), wrong[rows])
                (F.cross_entropy(model.clean(found), labels[rows]) + noisy).backward()
        agvm.step()
        phis += [agvm.phis] if measures else []
    trunk, clean, noisy = torch.tensor(phis).mean(0).tolist()
    assert len(phis) == 60 and noisy > max(trunk, clean)
    assert agvm.factors[2] < 0.97
