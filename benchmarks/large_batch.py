"""Claim: none beforehand. The largest batch at which AdamW or SGD with momentum still trains to the target in a fixed
number of examples, and in how many updates the large-batch optimizers reach it there and at twice that batch.

The target of a job: 1.1 times the median last loss of AdamW, tuned at batch 32, in the job's budget of examples.
Batches double from 64 to all the training data. An optimizer trains to the target where at least half of its seeds
are there before the budget ends. Every optimizer has as many Optuna trials in every cell, of the learning rate alone;
trials, warm-up, schedule and looks are those of `optimizers.py`. Every seed is reported; None: not there in the budget.
"""

import argparse
import math
import statistics
from typing import Any

import optuna
import torch
from _paired import report
from optimizers import JOBS, Cell, trained, tuned

import batchlab as bl

ORDINARY = ("adamw", "sgd")
LARGE = ("lamb", "lars", "muon", "vrsgd", "vradam", "vrlars", "vrlamb")
SLACK, REFERENCE = 1.1, 32


def judged(cell: Cell, optimizer: str, given: argparse.Namespace) -> dict[str, Any]:
    """One optimizer in one cell: the updates to the target and the last loss of each fresh seed."""
    found = tuned(cell, optimizer, given.trials)
    runs = [trained(cell, optimizer, found["rate"], 1000 + seed) for seed in range(given.seeds)]
    steps = [run["steps"] for run in runs]
    row = {"job": cell.job.name, "batch_size": cell.batch, "optimizer": optimizer, "target": cell.target, **found}
    median = statistics.median(step if step is not None else math.inf for step in steps)
    row |= {"seed_steps": steps, "losses": [run["loss"] for run in runs], "median_steps": median}
    shown = ("rate", "edge", "seed_steps", "losses")
    told = {key: [round(v, 4) for v in row[key]] if key == "losses" else row[key] for key in shown}
    print(cell.job.name, cell.batch, optimizer, told, flush=True)
    return row


def table(job: bl.Job, examples: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one job."""
    reference = judged(Cell(job, REFERENCE, examples, None), "adamw", given)
    target = SLACK * statistics.median(reference["losses"])
    rows, largest, batch = [reference], REFERENCE, 2 * REFERENCE
    last = len(job.train)
    while batch <= last:
        mine = [judged(Cell(job, batch, examples, target), optimizer, given) for optimizer in ORDINARY]
        rows += mine
        if any(math.isfinite(row["median_steps"]) for row in mine):
            largest = batch
        batch = 2 * batch if 2 * batch <= last or batch == last else last
        if batch == rows[-1]["batch_size"]:
            break
    for size in sorted({largest, min(2 * largest, last)}):
        rows += [judged(Cell(job, size, examples, target), optimizer, given) for optimizer in LARGE]
    print(job.name, "target", round(target, 4), "largest batch of AdamW or SGD:", largest, flush=True)
    return [row | {"largest_ordinary_batch": largest} for row in rows]


def main() -> None:
    """A row for each optimizer and batch, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="*", default=["digits", "diabetes"], choices=list(JOBS))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/large_batch.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    for name in given.jobs:
        make, epochs, _ = JOBS[name]
        job = make()
        rows += table(job, epochs * len(job.train), given)
    report("large_batch", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


if __name__ == "__main__":
    main()
