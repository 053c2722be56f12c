"""What ConAdv does for a network: robust without a loss of accuracy, and with stale weights as well as with new ones.

Measured, means of 5 seeds, accuracy clean / at FGSM(0.1): clean training 0.988 / 0.515, τ = 0 0.988 / 0.802, τ = 1
0.987 / 0.775. No gain in clean accuracy is claimed: the paper's is at batch 96K on ImageNet.
"""

import statistics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.dual_batchnorm import convert_dual_batchnorm
from batchlab.optim.adversarial.input import adversarial_input
from batchlab.optim.lars import LARS
from batchlab.workloads.split import hold_out

EPOCHS, BATCH, WARM_UP, GAMMA = 40, 700, 8, 10.0
SEEDS = range(5)


def pictures():
    """1437 training and 360 test digits, pixels in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.as_tensor(y)
    train, test = hold_out([str(i) for i in range(len(y))], 360 / 1797, strata=y.tolist())
    return (x[train], y[train]), (x[test], y[test])


def network():
    first, second = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
    layers = [first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
    return convert_dual_batchnorm(nn.Sequential(*layers, nn.Linear(512, 10)))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(x, y, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for part in order.split(BATCH)[:2]:
            yield x[part], y[part]


def rate(step):
    """Of γ: a warm-up, then (1 - t)²."""
    steps = 2 * EPOCHS
    return (step + 1) / WARM_UP if step < WARM_UP else (1 - (step - WARM_UP) / (steps - WARM_UP)) ** 2


def accuracies(tau, seed):
    """Test accuracy, clean and at FGSM(0.1), by the main BatchNorms; tau None: clean training."""
    (x, y), (x_test, y_test) = pictures()
    torch.manual_seed(seed)
    model = network()
    optimizer = LARS(model.parameters(), lr=GAMMA, momentum=0.9, weight_decay=5e-4, trust=1e-3, exclude_vectors=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    adversarial = ConcurrentAdversarial(model, loss_fn, rho=0.1, tau=tau or 0)
    data = batches(x, y, seed)
    for batch in data if tau is None else adversarial.batches(data):
        optimizer.zero_grad()
        if tau is None:
            loss_fn(model, batch).backward()
        else:
            adversarial.backward(batch)
        optimizer.step()
        scheduler.step()
    model.eval()
    attacked = adversarial_input(model, loss_fn, (x_test, y_test), rho=0.1, branch="main")
    with torch.no_grad():
        return [(model(inputs).argmax(1) == y_test).double().mean().item() for inputs in (x_test, attacked)]


@pytest.mark.slow
def test_digits_at_half_the_data_a_batch():
    found = {tau: [accuracies(tau, seed) for seed in SEEDS] for tau in (None, 0, 1)}
    clean, robust = ({tau: statistics.mean(row[i] for row in rows) for tau, rows in found.items()} for i in (0, 1))
    print(found)
    assert clean[None] > 0.97, found  # else nothing was learned that could be compared
    assert min(clean[0], clean[1]) >= clean[None] - 0.005, found
    assert abs(clean[1] - clean[0]) <= 0.01, found
    assert min(robust[0], robust[1]) >= robust[None] + 0.12, found
