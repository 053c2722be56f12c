"""1cycle on digits, against the best constant rate (Smith 2018): MLP 64-64-10, 10 epochs of batches of 128, Nesterov.

Accuracy on 500 held-out digits in %, mean of 5 seeds (the test prints each):

                   constant 0.1, 0.3, 1   1cycle at the range test's M, at M/2, at 1   at 1, seed by seed
  whole batches    96.2, 96.8, 36.0       97.1, 97.0, 97.6                             97.6 97.2 97.6 97.6 98.0
  ragged ones too  96.4, 96.4, 29.7       96.8, 96.8, 79.4                             62.2 49.2 97.0 98.0 90.6

M was 0.35 to 1.4. So a cycle does as well as the best constant rate, and bears a peak at which a constant rate fails,
but only where every batch is whole: the last of an epoch here has 17 examples, and its mean gradient at so high a rate
throws the weights out. With its loss weighted by 17/128 the ragged run at 1 has 97.6 again (97.8 96.6 98.2 98.2 97.4).
"""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlab.measure.course.learning_rate import range_test
from batchlab.schedule.rates.one_cycle import OneCycle

BATCH, EPOCHS, TRAIN = 128, 10, 1297
CONSTANT = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = range(5)


class Digits:
    """One split and one start of the weights for each seed."""

    def __init__(self, seed, ragged):
        self.ragged = ragged
        digits = load_digits()
        x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=self.generator)
        self.train = x[order[:TRAIN]], y[order[:TRAIN]]
        self.test = x[order[TRAIN:]], y[order[TRAIN:]]
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def started(self, rate, momentum):
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, nesterov=True, weight_decay=1e-4)
        return model, optimizer

    def batches(self, epochs=EPOCHS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            parts = torch.randperm(TRAIN, generator=generator).split(BATCH)
            yield from parts if self.ragged else parts[:-1]

    def update(self, model, optimizer, chosen):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(self.train[0][chosen]), self.train[1][chosen])
        loss.backward()
        optimizer.step()
        return loss.item()

    def accuracy(self, model):
        with torch.no_grad():
            return (model(self.test[0]).argmax(1) == self.test[1]).double().mean().item()

    def constant(self, rate):
        model, optimizer = self.started(rate, 0.9)
        for chosen in self.batches():
            self.update(model, optimizer, chosen)
        return self.accuracy(model)

    def one_cycle(self, peak):
        model, optimizer = self.started(peak, 0.95)
        schedule = OneCycle(optimizer, batch=BATCH, total=EPOCHS * (TRAIN if self.ragged else TRAIN // BATCH * BATCH))
        for chosen in self.batches():
            self.update(model, optimizer, chosen)
            schedule.step(len(chosen))
        return self.accuracy(model)

    def tested_peak(self):
        """The rate of the least smoothed validation loss in a ramp of 100 updates, momentum 0.95."""
        model, optimizer = self.started(1e-3, 0.95)
        feed = self.batches(epochs=20, seed=1)

        def update(rate):
            optimizer.param_groups[0]["lr"] = rate
            return self.update(model, optimizer, next(feed))

        @torch.no_grad()
        def validate():
            return nn.functional.cross_entropy(model(self.test[0]), self.test[1]).item()

        return range_test(update, low=1e-3, high=10.0, steps=100, validate=validate).minimum


def mean(values):
    return sum(values) / len(values)


def measured(ragged):
    seeds = [Digits(seed, ragged) for seed in SEEDS]
    constant = {rate: [each.constant(rate) for each in seeds] for rate in CONSTANT}
    peaks = [each.tested_peak() for each in seeds]
    cycled = {
        "at M": [each.one_cycle(peak) for each, peak in zip(seeds, peaks, strict=True)],
        "at M/2": [each.one_cycle(peak / 2) for each, peak in zip(seeds, peaks, strict=True)],
        "at 1": [each.one_cycle(1.0) for each in seeds],
    }
    print({"ragged": ragged, "peaks": peaks, **constant, **cycled})
    print({name: round(100 * mean(each), 1) for name, each in {**constant, **cycled}.items()})
    return constant, cycled


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
def test_a_cycle_to_the_rate_of_a_range_test_does_as_well_as_the_best_constant_rate(ragged):
    constant, cycled = measured(ragged)
    assert mean(cycled["at M"]) >= max(map(mean, constant.values())) - 0.005
    assert mean(constant[1.0]) < 0.60
    assert ragged or mean(cycled["at 1"]) >= 0.95
