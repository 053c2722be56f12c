"""Claim under test: the weights that ship with LearnedOptimizer, untuned, train tasks of their family faster than SGD.

Held-out tasks of the family of `scripts/optimizer_tasks.py` (of the digits other images, kinds and seeds that training
never drew), 100 steps as in training, and beyond it: 400 steps, and networks some ten times larger. Peers: torch's SGD,
SGD with momentum 0.9 and Adam, each with the best fixed rate of five, chosen for each kind and seed by the very losses
that are reported, which favours the peers; LearnedOptimizer has one setting for all. Losses over ln(classes): the mean
over all steps, and over the last tenth. The learned runs are the batched ones of `scripts/meta_train_optimizer.py`,
which a test holds equal to the class. All seeds are printed, whichever way they fall.

Second claim: `batchlab.planner.optimizer_overhead` predicts the optimizer's share of an update within 20 %, from the
times of two micro-batches, on an MLP 64-256-256-10 at batches of 8, 64 and 512.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _paired import report
from torch import Tensor, nn

from batchlab.optim.learned.learned import LearnedOptimizer
from batchlab.optim.learned.weights import OptimizerWeights, load_weights
from batchlab.planner.optimizer_overhead import optimizer_share

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from meta_train_optimizer import Inner, betas, first_weights
from optimizer_tasks import JUDGED_FROM, Kind, Tasks, draw_kind, draw_tasks, gradients

PEERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float], tuple[float, ...]]] = {
    "sgd": (torch.optim.SGD, {}, (0.03, 0.1, 0.3, 1.0, 3.0)),
    "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9}, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "adam": (torch.optim.Adam, {}, (0.003, 0.01, 0.03, 0.1, 0.3)),
}
LARGER = [Kind("digits", 64, 10, (128,), "relu", 64), Kind("teacher", 32, 6, (128, 64), "gelu", 64)]


def by_learned(tasks: Tasks, weights: OptimizerWeights, steps: int) -> Tensor:
    """The losses before each step, (steps, tasks)."""
    count = len(tasks.x)
    layers = [each.expand(count, *each.shape) for each in weights.layers]
    return Inner(tasks, 1).run(layers, betas(weights.deltas.expand(count, -1)), steps)


def by_peer(tasks: Tasks, name: str, rate: float, steps: int) -> Tensor:
    """The losses before each step; these optimizers act on each number alone, so that all tasks share one."""
    make, options, _ = PEERS[name]
    held = [nn.Parameter(w.clone()) for w in tasks.weights]
    optimizer, found = make(held, lr=rate, **options), []
    for step in range(steps):
        loss, grads = gradients(tasks, held, step)
        found.append(loss)
        for p, g in zip(held, grads, strict=True):
            p.grad = g
        optimizer.step()
    return torch.stack(found)


def summed_up(losses: Tensor, classes: int) -> tuple[float, float]:
    """The mean over all steps and over the last tenth, over ln(classes), at most 10 where it diverged."""
    scaled = (losses / math.log(classes)).nan_to_num(nan=10.0).clamp(max=10.0)
    return float(scaled.mean()), float(scaled[-max(1, len(scaled) // 10) :].mean())


def judged(name: str, kinds: list[Kind], steps: int, seed: int, each: int) -> dict[str, Any]:
    """One row: a seed's tasks under every optimizer."""
    found: dict[str, list[tuple[float, float]]] = {}
    rates: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for index, kind in enumerate(kinds):
        tasks = draw_tasks(kind, each, steps, JUDGED_FROM + 10_000 * (seed + 1) + index)
        for learned, weights in (("learned", load_weights(None)), ("start", first_weights(0))):
            found.setdefault(learned, []).append(summed_up(by_learned(tasks, weights, steps), kind.classes))
        for peer, (_, _, grid) in PEERS.items():
            runs = {rate: summed_up(by_peer(tasks, peer, rate, steps), kind.classes) for rate in grid}
            best = min(runs, key=lambda rate: runs[rate][0])
            rates[peer].append(best)
            found.setdefault(peer, []).append(runs[best])
    row: dict[str, Any] = {"tasks": name, "steps": steps, "seed": seed, "best_rates": rates}
    for optimizer, pairs in found.items():
        row[f"{optimizer}_mean"], row[f"{optimizer}_final"] = (statistics.mean(column) for column in zip(*pairs))
    for peer in PEERS:
        row[f"mean_over_{peer}"] = row["learned_mean"] / row[f"{peer}_mean"]
        row[f"final_over_{peer}"] = row["learned_final"] / row[f"{peer}_final"]
        row[f"kinds_won_from_{peer}"] = sum(a[0] < b[0] for a, b in zip(found["learned"], found[peer], strict=True))
    return row


class Update:
    """Updates of an MLP at one batch size, in seconds of this process."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        self.optimizer = LearnedOptimizer(self.model.parameters())
        self.x, self.y = torch.randn(batch, 64), torch.randint(10, (batch,))

    def passes(self) -> None:
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()

    def seconds(self, what: Callable[[], Any], repeats: int = 15) -> float:
        """The median of some calls."""
        found = []
        for _ in range(repeats):
            start = time.process_time()
            what()
            found.append(time.process_time() - start)
        return statistics.median(found[2:])

    def shared(self) -> tuple[float, float, float]:
        """Seconds of the passes and of the step, and the median share of the step in updates of both."""
        shares = []
        for _ in range(15):
            start = time.process_time()
            self.passes()
            middle = time.process_time()
            self.optimizer.step()
            end = time.process_time()
            shares.append((end - middle) / (end - start))
        return self.seconds(self.passes), self.seconds(self.optimizer.step), statistics.median(shares[2:])


def overhead() -> list[dict[str, Any]]:
    """The line through the passes at 32 and 256, the step at 32, and what they say of other batches."""
    small, large = Update(32), Update(256)
    first, step, _ = small.shared()
    each = (large.seconds(large.passes) - first) / (256 - 32)
    rows = []
    for batch in (8, 64, 512):
        measured = Update(batch).shared()[2]
        predicted = optimizer_share(step, batch, fixed_seconds=first - 32 * each, example_seconds=each)
        rows.append({"batch": batch, "measured": measured, "predicted": predicted, "ratio": predicted / measured})
    return rows


def main() -> None:
    """Prints a row for each family and seed, the overheads, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=4, help="of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/learned_optimizer.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for seed in range(given.seeds):
        kinds = [draw_kind(JUDGED_FROM + 10_000 * (seed + 1) + index) for index in range(given.kinds)]
        for name, each, steps in (("family", kinds, 100), ("longer", kinds[:4], 400), ("larger", LARGER, 100)):
            rows.append(judged(name, each, steps, seed, given.tasks))
            print({key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    rows += overhead()
    for row in rows[-3:]:
        print(row)
    report("learned_optimizer", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
