"""Where VRSGD ends beside SGD: noisy digits, and a regression with an unsquared loss."""

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.optim.vrgd.optimizers import VRSGD

K = 8  # groups


def noisy_digits(seed):
    """Train and test images with a fifth of all labels drawn anew, and the test labels as they were."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(data.data))
    x, y = torch.tensor(data.data[order] / 16, dtype=torch.float32), data.target[order]
    noisy = torch.tensor(np.where(generator.random(len(y)) < 0.2, generator.integers(0, 10, len(y)), y))
    return (x[:1437], noisy[:1437]), (x[1437:], noisy[1437:]), torch.tensor(y[1437:])


def classified(kind, rate, seed):
    """Softmax regression: test accuracy, the gap (noisy test loss - train loss), the train loss."""
    (x, y), (x_test, noisy), clean = noisy_digits(seed)
    batch, epochs = 718, 60
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = kind(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    loss = nn.functional.cross_entropy
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(batch)[: len(x) // batch]:
            for group in rows.tensor_split(K) if kind is VRSGD else (rows,):
                (loss(model(x[group]), y[group]) * (len(group) / len(rows))).backward()
                if kind is VRSGD:
                    optimizer.add_group(examples=len(group))
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        trained, predicted = loss(model(x), y).item(), model(x_test)
        accuracy = (predicted.argmax(1) == clean).float().mean().item()
        return accuracy, loss(predicted, noisy).item() - trained, trained


@pytest.mark.slow
def test_miniature_of_large_batches_of_noisy_digits():
    """Five rates, five seeds. The gap is smaller in all seeds at 1 and 3, and the accuracy higher at 3, past the best.

    At 0.3 the gaps are equal within 0.003, twice the standard error. At 10 and 30 accuracies spread by 0.1 over seeds,
    more than they differ (0.70 against 0.73, 0.75 against 0.71). So no sign is claimed there. The gap is no smaller at
    equal train loss: r acts as a shorter step.
    """
    found = {
        (kind, rate): np.array([classified(kind, rate, seed) for seed in range(5)])
        for kind in (torch.optim.SGD, VRSGD)
        for rate in (0.3, 1.0, 3.0, 10.0, 30.0)
    }
    for (kind, rate), each in found.items():
        print(kind.__name__, rate, each.mean(0).round(3), each.round(3).tolist())
    wider = {rate: found[VRSGD, rate][:, 1] - found[torch.optim.SGD, rate][:, 1] for rate in (0.3, 1.0, 3.0)}
    assert abs(wider[0.3].mean()) < 0.005 and (wider[1.0] < 0).all() and (wider[3.0] < 0).all()
    assert found[VRSGD, 3.0][:, 0].mean() > found[torch.optim.SGD, 3.0][:, 0].mean() + 0.01


def fitted(kind, rate, seed, loss):
    """Regression with the weights 1 to 10 on uniform inputs, from 0: the loss after each step, of the next batch."""
    batch, steps = 2048, 100
    generator, truth = torch.Generator().manual_seed(seed), torch.arange(1.0, 11.0)
    w = nn.Parameter(torch.zeros(10))
    optimizer = kind([w], lr=rate)
    course = []
    for _ in range(steps + 1):
        x = torch.rand(batch, 10, generator=generator)
        with torch.no_grad():
            course.append(loss(x @ (w - truth)).item())
        for group in x.chunk(K) if kind is VRSGD else (x,):
            (loss(group @ (w - truth)) * (len(group) / batch)).backward()
            if kind is VRSGD:
                optimizer.add_group(examples=len(group))
        optimizer.step()
        optimizer.zero_grad()
    return course[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [lambda e: e.square().mean().sqrt(), lambda e: e.abs().mean()], ids=["root", "absolute"]
)
def test_miniature_of_a_regression_with_an_unsquared_loss(loss):
    """Each at the best of nine rates, three seeds: VR-SGD is at SGD's last loss after 58 and 68 of 100 steps.

    With the squared loss all hangs on rates within a fifth of the largest stable one, which r raises: the last losses
    at each one's best are 2.8e-5 (SGD, 0.37) and 1.0e-5 (VR-SGD, 0.45), and at 0.316 1.4e-4 and 8e-4.
    """
    courses = {}
    for kind in (torch.optim.SGD, VRSGD):
        by_rate = [np.mean([fitted(kind, 10 ** (i / 4), seed, loss) for seed in range(3)], 0) for i in range(-6, 3)]
        courses[kind] = min(by_rate, key=lambda course: course[-1])
    reached = np.nonzero(courses[VRSGD] <= courses[torch.optim.SGD][-1])[0]
    print(reached[:1] + 1, courses[torch.optim.SGD][-1], courses[VRSGD][-1])
    assert len(reached) and reached[0] + 1 <= 80
