"""Claim: SGD leaves the weights it starts from at 0.5 to 2 times the learning rate ceiling measured there, at any b.

Digits, MLP 64-32-10 with tanh in float64, trained by 300 steps of SGD at 0.1 and batch size 64: there `curvature` is
measured. From that same point constant-rate SGD runs 200 steps, without replacement within a batch, with momentum 0
and 0.9. Two edges are found by bisection to 10 %, each the median over runs with independent batches:
  rises: above it the loss over all examples is at some time more than twice what it was at the start;
  worse: above it that loss, averaged over the last steps, is higher than at the start.
The claim is about `rises`. Beside it stands 2(1 + μ)/λ'₁(b), the ceiling as published, which leaves out that momentum
adds up the noise, and 2(1 + μ)/λ₁ of the full Hessian, which leaves out the batch. There is no peer: PyHessian and
curvlinops give eigenvalues only.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _paired import report
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.measure.hessian.curvature import curvature
from batchlab.measure.hessian.stability_limit import stable_rate

SIZES = (8, 32, 128, 512, 1797)
STEPS, EVERY, LAST = 200, 5, 10
FINE = 1.1


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """-log p(label), mean over the batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model after 300 steps, and all 1797 digits, pixels in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels / 16), torch.as_tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        rows = torch.randperm(len(x))[:64]
        optimizer.zero_grad()
        cross_entropy(model, (x[rows], y[rows])).backward()
        optimizer.step()
    return model, (x, y)


def losses(
    model: nn.Module, data: tuple[Tensor, Tensor], batch_size: int, rate: float, momentum: float, seed: int
) -> tuple[float, float]:
    """The highest loss along the run and the mean at its end, both over the loss at its start."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    seen = []
    for step in range(STEPS):
        if step % EVERY == 0 or step >= STEPS - LAST:
            with torch.no_grad():
                seen.append(float(cross_entropy(model, data)))
        rows = torch.randperm(len(data[0]), generator=generator)[:batch_size]
        optimizer.zero_grad()
        cross_entropy(model, (data[0][rows], data[1][rows])).backward()
        optimizer.step()
    seen = [value if value < float("inf") else float("inf") for value in seen]
    return max(seen) / seen[0], statistics.fmean(seen[-LAST:]) / seen[0]


def bisected(holds: Callable[[float], bool], start: float) -> float:
    """The largest rate at which `holds`, to 10 %, searched from `start` by doubling or halving and then bisection."""
    low = high = start
    while not holds(low):
        high, low = low, low / 2
    while high == low or holds(high):
        low, high = high, high * 2
    while high > FINE * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return (low * high) ** 0.5


def rows(seed: int, momentum: float, runs: int) -> list[dict[str, Any]]:
    """One row for each batch size."""
    model, data = trained(seed)
    found = curvature(model, cross_entropy, [data], batch_sizes=SIZES[:-1], repeats=12, probes=1)
    full = stable_rate(found.largest[0].value, momentum)
    assert found.spike is not None
    result = []
    for size in SIZES:
        ceiling = found.max_learning_rate(size, momentum)
        number = runs if size < SIZES[-1] else 1
        row: dict[str, Any] = {"seed": seed, "momentum": momentum, "batch_size": size, "ceiling": ceiling.value}
        row |= {"ceiling_low": ceiling.low, "ceiling_high": ceiling.high, "full_batch_ceiling": full}
        row["published_ceiling"] = stable_rate(found.spike.edge(size).value, momentum)
        for name, place, limit in (("rises", 0, 2.0), ("worse", 1, 1.0)):
            edges = [
                bisected(lambda rate: losses(model, data, size, rate, momentum, run)[place] <= limit, ceiling.value)  # noqa: B023
                for run in range(number)
            ]
            row[name] = statistics.median(edges)
            row |= {f"{name}_range": [min(edges), max(edges)], f"{name}_over_ceiling": row[name] / ceiling.value}
        row["rises_over_published"] = row["rises"] / row["published_ceiling"]
        row["holds"] = 0.5 <= row["rises_over_ceiling"] <= 2
        result.append(row)
        print(row, flush=True)
    return result


def main() -> None:
    """Prints a row for each seed, momentum and batch size, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/learning_rate_ceiling.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    every = [row for m in (0.0, 0.9) for seed in range(given.seeds) for row in rows(seed, m, given.runs)]
    report("learning_rate_ceiling", (__doc__ or "").splitlines()[0], every, save=given.save)


if __name__ == "__main__":
    main()
