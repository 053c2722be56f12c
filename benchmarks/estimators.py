"""Claim: every estimator of the noise scale is right on average and its interval holds the truth; they differ in cost
and spread.

Five jobs, each at fixed weights after 60 updates of AdamW. The population is 512 training examples, drawn with
replacement, so that tr(Σ)/|G|² is known: from each example's own gradient, in float64. An estimate is of 40 steps of
64 examples; bias, spread and coverage are over repetitions, each with its own draws. The cost is the time of a measured
training step over that of a plain one, in pairs, and the same for two of a step's parts; `norm_layers` is timed over 50
steps with its calibration in it. The last row of each job is what to avoid: the mean over steps of each step's own
ratio.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _paired import kept, median_ratio, paired_seconds, report, result, write
from torch import Tensor, nn

import batchlab as bl
from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch
from batchlab.measure import GradientNoise, noise_scale
from batchlab.workloads import autoencoder, diabetes, digits, pystdlib, syntax

JOBS: dict[str, Callable[[], bl.Job]] = {
    "digits": digits,
    "pystdlib": partial(pystdlib, context=64),
    "diabetes": diabetes,
    "syntax": syntax,
    "autoencoder": autoencoder,
}
POPULATION, BATCH, STEPS, UPDATES = 512, 64, 40, 60
ESTIMATORS = [
    ("micro_batch", 2, 0),
    ("micro_batch", 8, 0),
    ("per_example", 1, 0),
    ("per_example", 1, 8),
    ("norm_layers", 1, 8),
]


class Scene:
    """A job's model at fixed weights, and the examples that it is measured on."""

    def __init__(self, job: bl.Job) -> None:
        self.job = job
        torch.manual_seed(0)
        self.model = job.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        count = min(POPULATION, len(job.train))
        self.examples = torch.randperm(len(job.train))[:count].tolist()
        for _ in range(UPDATES):
            self.optimizer.zero_grad()
            self.loss(torch.randint(len(job.train), (BATCH,)).tolist()).backward()
            self.optimizer.step()
        self.truth = self._truth()

    def loss(self, indices: list[int]) -> Tensor:
        return self.job.loss(self.model, fetch(self.job.train, indices, self.job.collate))

    def _truth(self) -> float:
        parameters = list(self.model.parameters())
        total, squares = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), 0.0
        for index in self.examples:
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(self.loss([index]), parameters)]).double()
            total += gradient
            squares += float(gradient @ gradient)
        mean = total / len(self.examples)
        grad_sq = float(mean @ mean)
        return (squares / len(self.examples) - grad_sq) / grad_sq

    def draw(self, generator: torch.Generator) -> list[int]:
        return [self.examples[i] for i in torch.randint(len(self.examples), (BATCH,), generator=generator)]

    def step(self, indices: list[int], pieces: int, noise: GradientNoise | None) -> None:
        """The gradient of a batch; the weights stay."""
        self.optimizer.zero_grad(set_to_none=True)
        size = BATCH // pieces
        for at in range(0, BATCH, size):
            part = indices[at : at + size]
            if noise is None:
                (self.loss(part) / pieces).backward()
            else:
                with noise.micro_batch(len(part)):
                    (self.loss(part) / pieces).backward()
        if noise is not None:
            noise.step()


def measured(scene: Scene, method: str, pieces: int, projections: int, repeats: int) -> dict[str, Any]:
    """Bias, spread, coverage and cost of one estimator."""
    estimates, of_steps, generator = [], [], torch.Generator().manual_seed(1)
    try:
        for _ in range(repeats):
            noise, own = GradientNoise(scene.model, method, ema=None, projections=projections), []
            for _ in range(STEPS):
                scene.step(scene.draw(generator), pieces, noise)
                if noise.pair is not None:
                    own.append(noise_scale(*noise.pair))
            estimates.append(noise.estimate())
            of_steps.append(statistics.fmean(value for value in own if not math.isnan(value)))
            noise.close()
    except InputError as error:
        return {"method": method, "micro_batches": pieces, "projections": projections, "refused": str(error)}
    ratios = np.array([estimate.value / scene.truth for estimate in estimates])
    logs = np.log(ratios[ratios > 0])
    row = {
        "method": method,
        "micro_batches": pieces,
        "projections": projections,
        "bias": float(np.median(ratios)),
        "spread": float(logs.std(ddof=1)),
        "covered": sum(e.low <= scene.truth <= e.high for e in estimates),
        "repeats": repeats,
        "width": float(np.median([e.high / e.low if e.low > 0 else math.inf for e in estimates])),
        "mean_of_ratios": float(np.median(np.array(of_steps) / scene.truth)),
    }
    return row | {"cost": cost(scene, method, pieces, projections)}


def cost(scene: Scene, method: str, pieces: int, projections: int) -> dict[str, float]:
    """The time of a measured step over a plain one with as many micro-batches."""
    noise, indices = (
        GradientNoise(scene.model, method, projections=projections),
        scene.draw(torch.Generator().manual_seed(2)),
    )
    for _ in range(12):
        scene.step(indices, pieces, noise)

    def plain() -> None:
        scene.step(indices, pieces, None)
        scene.optimizer.step()

    def with_noise() -> None:
        scene.step(indices, pieces, noise)
        scene.optimizer.step()

    state = {name: value.clone() for name, value in scene.model.state_dict().items()}
    before = time.perf_counter()
    plain()
    calls = 50 if method == "norm_layers" else max(1, min(20, round(0.1 / (time.perf_counter() - before))))
    pairs = paired_seconds(with_noise, plain, pairs=8 if method == "norm_layers" else 20, calls=calls)
    noise.close()
    scene.model.load_state_dict(state)
    return median_ratio(pairs)


def main() -> None:
    """Prints a row for each job and estimator, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    claim = " ".join((__doc__ or "").split("\n\n")[0].split())
    rows = kept("estimators", lambda row: row["job"] not in given.jobs)
    for name in given.jobs:
        scene = Scene(JOBS[name]())
        for method, pieces, projections in ESTIMATORS:
            if method == "norm_layers" and not _has_norms(scene.model):
                continue
            row = {"job": name, "truth": scene.truth} | measured(scene, method, pieces, projections, given.repeats)
            rows.append(row)
            print(_sentence(row), flush=True)
        if given.save:
            write(result("estimators", claim, rows))
    report("estimators", claim, rows, save=given.save)


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(module, (nn.LayerNorm, nn.GroupNorm)) for module in model.modules())


def _sentence(row: dict[str, Any]) -> str:
    name = f"{row['job']:12} {row['method']:12} {row['micro_batches']} a step"
    name += f", {row['projections']} projections" if row["projections"] else ""
    if "refused" in row:
        return f"{name}: refused, {row['refused'][:90]}"
    return (
        f"{name}: truth {row['truth']:.4g}, over it {row['bias']:.3f}, spread {row['spread']:.3f}, covered "
        f"{row['covered']} of {row['repeats']}, high/low {row['width']:.2f}, cost {row['cost']['ratio']:.3f} "
        f"[{row['cost']['low']:.3f}, {row['cost']['high']:.3f}]; mean of ratios {row['mean_of_ratios']:.2f}"
    )


if __name__ == "__main__":
    main()
