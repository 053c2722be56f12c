"""Claim: the filter-normalised width of a minimum does not see a rescaling that leaves the function as it is; the plain
width does. Whether small batches end in wider minima and generalise better, as the paper has it, is printed beside.

Digits, an MLP 64-64-64-10 with ReLU and no biases, SGD with momentum 0.9 at one rate, the same epochs, batch 16 against
512, several seeds. Each minimum's width at 0.1 nats above it is the median over 10 random directions, on the training
data. Then the first layer is multiplied by 10 and the second divided by it: the same function, other weights. Large
batches make fewer updates in the same epochs, so they are trained for as many updates too.
"""

import argparse
import copy
import statistics
from typing import Any

import torch
from _paired import report
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.measure import landscape

RATE, LEVEL, TIMES = 0.05, 0.1, 10.0
RUNS = ((16, 5400), (512, 180), (512, 5400))  # batch size, updates: 60 epochs, 60, and as many updates as the first


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and classes: 1,437 and 360."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = torch.as_tensor(x, dtype=torch.float64)[order] / 16, torch.as_tensor(y)[order]
    return x[360:], y[360:], x[:360], y[:360]


def trained(x: Tensor, y: Tensor, batch: int, updates: int, seed: int) -> nn.Sequential:
    """After so many updates on batches drawn epoch by epoch."""
    torch.manual_seed(seed)
    layers = (nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in ((64, 64), (64, 64), (64, 10)))
    first, second, last = layers
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(updates):
        if not len(order):
            order = torch.randperm(len(y))
        picked, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        F.cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
    return model


def rescaled(model: nn.Sequential) -> nn.Sequential:
    """The same function with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(TIMES)
        other[2].weight.div_(TIMES)
    return other


def width(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> float:
    """The median over 10 directions, in units of the directions' own length."""
    span = 1.0
    while True:
        found = landscape(
            model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)], norm=norm, span=span, points=201
        )
        value = found.width(LEVEL).value
        if value == value and value > span / 10:  # the crossings lie inside the curve, and well apart from its points
            return value
        span *= 4 if value != value else 0.25


def main() -> None:
    """Prints a row a seed, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [row(seed, *run) for seed in range(given.seeds) for run in RUNS]
    for batch, updates in RUNS:
        mine = [r for r in rows if (r["batch"], r["updates"]) == (batch, updates)]
        accuracy, widths = (statistics.median(r[column] for r in mine) for column in ("test_accuracy", "normalised"))
        print(f"batch {batch}, {updates} updates: median test accuracy {accuracy:.4f}, normalised width {widths:.3f}")
    report("landscape_width", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


def row(seed: int, batch: int, updates: int) -> dict[str, Any]:
    """One minimum, before and after its weights are rescaled."""
    x, y, test_x, test_y = data(seed)
    model = trained(x, y, batch, updates, seed)
    other = rescaled(model)
    with torch.no_grad():
        loss, right = F.cross_entropy(model(x), y).item(), (model(test_x).argmax(1) == test_y).double().mean().item()
    normalised, plain = ([width(m, x, y, norm) for m in (model, other)] for norm in ("filter", "none"))
    assert abs(normalised[1] / normalised[0] - 1) < 1e-6, "the normalised width saw the scale of the weights"
    print(f"seed {seed}, batch {batch}, {updates} updates: train loss {loss:.2g}, test accuracy {right:.4f};", end=" ")
    print(f"width, normalised {normalised[0]:.3f} (rescaled {normalised[1]:.3f}),", end=" ")
    print(f"plain {plain[0]:.3g} (rescaled {plain[1]:.3g})", flush=True)
    found = {"seed": seed, "batch": batch, "updates": updates, "train_loss": loss, "test_accuracy": right}
    found |= {"normalised": normalised[0], "normalised_rescaled": normalised[1]}
    return found | {"plain": plain[0], "plain_rescaled": plain[1]}


if __name__ == "__main__":
    main()
