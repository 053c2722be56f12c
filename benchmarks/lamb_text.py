"""Claim: tuned at batch 32 and moved to 512 by its recipe without tuning anew, LAMB loses at most 0.05 nats a byte more
than Adam does by linear scaling, and never diverges (You et al. 2020, arXiv 1904.00962).

A byte-level transformer of two layers on the standard library, 16,384 windows of 64 bytes in every run: 512 updates
at batch 32, 32 at 512. The rate of each optimizer is the best of seven at batch 32 with one seed; the rate moves by the
square root (LAMB's recipe; Adam too, for comparison) or linearly (Adam), the warm-up's share by the recipe from 1/80 to
1/5 for all, linear decay to 0, weight decay 0.01. Adam tuned anew at 512 is shown beside them. The gap is the held-out
loss at 512 less that at 32, by seed; None: not finite.
"""

import argparse
import math
import statistics
from typing import Any

import torch
from _paired import report

import batchlab as bl
from batchlab.core.plan import Plan
from batchlab.optim import lamb_schedule
from batchlab.spine.learner import Learner
from batchlab.workloads import pystdlib

WINDOWS, SMALL, LARGE, WARMUP = 16_384, 32, 512, 1 / 80
RATES = {"lamb": 0.01, "adamw": 3e-3}
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


def held_out(job: bl.Job, optimizer: str, rate: float, batch: int, seed: int) -> float:
    """Nats a byte after one run; infinite where it diverged."""
    steps = WINDOWS // batch
    recipe = lamb_schedule(batch, ref_batch=SMALL, ref_lr=rate, ref_warmup=WARMUP)
    plan = Plan(
        job=job.name,
        goal="balanced",
        batch_size=batch,
        micro_batch=min(batch, 64),
        accumulation=max(1, batch // 64),
        world_size=1,
        steps=steps,
        optimizer=optimizer,
        learning_rate=rate,
        hyperparameters={"weight_decay": 0.01},
        warmup_examples=round(recipe.warmup * steps) * batch,
        schedule="linear",
        measure_noise=False,
    )
    learner = Learner(job, plan, seed=seed, device="cpu")
    for _ in range(steps):
        if learner.update().skipped:
            return math.inf
    loss = learner.evaluate()["loss"]
    return loss if math.isfinite(loss) else math.inf


def best_rate(job: bl.Job, optimizer: str, batch: int, usual: float) -> tuple[float, dict[float, float]]:
    """Of seven about the usual one, with one seed."""
    losses = {usual * factor: held_out(job, optimizer, usual * factor, batch, seed=100) for factor in FACTORS}
    return min(losses, key=lambda rate: losses[rate]), losses


def main() -> None:
    """A row for each way of moving, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/lamb_text.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    job, rows = pystdlib(context=64), []
    for optimizer, usual in RATES.items():
        rate, tried = best_rate(job, optimizer, SMALL, usual)
        small = [held_out(job, optimizer, rate, SMALL, seed) for seed in range(given.seeds)]
        moves = {"square root": rate * math.sqrt(LARGE / SMALL)}
        if optimizer == "adamw":
            moves |= {"linear": rate * LARGE / SMALL}
            moves |= {"tuned anew": best_rate(job, optimizer, LARGE, moves["square root"])[0]}
        for how, moved in moves.items():
            large = [held_out(job, optimizer, moved, LARGE, seed) for seed in range(given.seeds)]
            gaps = [there - here for there, here in zip(large, small, strict=True)]
            row: dict[str, Any] = {"optimizer": optimizer, "moved by": how, "rate_small": rate, "rate_large": moved}
            row |= {"losses_small": small, "losses_large": large, "gaps": gaps, "gap": statistics.median(gaps)}
            rows.append(row | {"tried_at_small": [[*pair] for pair in tried.items()]})
            print({key: value for key, value in rows[-1].items() if key != "tried_at_small"}, flush=True)
    gap = {(row["optimizer"], row["moved by"]): row["gap"] for row in rows}
    holds = gap["lamb", "square root"] <= gap["adamw", "linear"] + 0.05
    finite = all(map(math.isfinite, rows[0]["losses_large"]))
    print("the claim holds" if holds and finite else "the claim does not hold")
    report("lamb_text", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
