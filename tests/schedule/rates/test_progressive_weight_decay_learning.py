"""PTWD on digits with a tenth of the labels wrong, against constant weight decays (Shen et al. 2023).

MLP 64-128-10, AdamW at 3e-3, batch 512 of 1,297 examples, 5 seeds. Test accuracy on clean labels, and the gap: training
accuracy on the labels as given less test accuracy, which is negative where the wrong labels are not learned. In %:

  updates   λ = 0          0.1            0.5            PTWD in thirds   PTWD seed by seed
  300       96.8, -7.8     96.9, -7.9     97.1, -8.2     97.0, -8.0       96.4 97.0 96.6 98.0 96.8
  1500      92.3, 7.3      93.8, 4.5      96.9, -4.4     94.4, 2.6        93.8 94.8 94.4 94.8 94.0

PTWD narrows the gap against no decay, in every seed at 1500. It is within 1 point of the best constant decay only at
300 updates, where nothing overfits yet; at 1500 a constant 0.5 is 2.6 points better, and PTWD is better than 0.1.
"""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlab.schedule.rates.progressive_weight_decay import ProgressiveWeightDecay, equal_phases

BATCH, TRAIN, RATE = 512, 1297, 3e-3
SEEDS = range(5)


def run(seed, phases, updates):
    """(test accuracy, train accuracy on the labels given less test accuracy)."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:TRAIN], order[TRAIN:]
    labels = y[train].clone()
    wrong = torch.randperm(TRAIN, generator=generator)[: TRAIN // 10]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "wd_scale": 0.0}], lr=RATE)
    schedule = ProgressiveWeightDecay(optimizer, phases, batch=BATCH)
    for _ in range(updates):
        chosen = torch.randint(TRAIN, (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[train[chosen]]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).double().mean().item()
        fitted = (model(x[train]).argmax(1) == labels).double().mean().item()
    return accuracy, fitted - accuracy


@pytest.mark.slow
@pytest.mark.parametrize("updates", [300, 1500])
def test_it_narrows_the_gap_but_keeps_up_with_the_best_constant_decay_only_in_the_shorter_run(updates):
    tokens = BATCH * updates
    arms = {f"{value}": [(tokens, value)] for value in (0.0, 0.1, 0.5)} | {"ptwd": equal_phases(tokens)}
    found = {name: [run(seed, phases, updates) for seed in SEEDS] for name, phases in arms.items()}
    mean = {name: [sum(column) / len(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, rows in found.items():
        print(name, [tuple(round(100 * v, 1) for v in row) for row in rows], [round(100 * v, 2) for v in mean[name]])
    best = max(mean[name][0] for name in ("0.0", "0.1", "0.5"))
    assert mean["ptwd"][1] < mean["0.0"][1]
    assert (mean["ptwd"][0] >= best - 0.01) == (updates == 300)
    if updates == 1500:
        assert all(ptwd[1] < none[1] for ptwd, none in zip(found["ptwd"], found["0.0"], strict=True))
        assert mean["ptwd"][0] > mean["0.1"][0] > mean["0.0"][0]
