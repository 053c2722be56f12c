"""Claim: CAME at 0.5 to 0.9 times AdamW's rate ends within 0.05 nats of AdamW (Luo et al. 2023's tuning advice).

A byte-level transformer of width 64 and 2 layers on the sources of Python's standard library: 300 updates of 32 windows
of 64 bytes, a tenth of them warm-up, cosine to a tenth. AdamW's rate is tuned with a seed of its own, then two seeds
each. Beside it CAME without its confidence term, which is Adafactor with momentum. Loss: the mean of the last 30
updates, on fresh batches.
"""

import argparse
import json
import math
import statistics

import torch
from _paired import result, write
from muon_token_ratio import rate_at

from batchlab.data.fetch import fetch
from batchlab.optim.by_name import groups
from batchlab.optim.came import CAME
from batchlab.workloads import pystdlib

STEPS, WINDOWS, LAST = 300, 32, 30
RATES, TUNING_SEED, SEEDS = (2e-3, 4e-3, 8e-3, 16e-3), 100, (0, 1)
MARGIN = 0.05  # nats


def end(job, make, lr, seed):
    torch.manual_seed(seed)
    model = job.model()
    optimizer = make(groups(model, 0.01), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, STEPS))
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = job.loss(model, fetch(job.train, order[step * WINDOWS : (step + 1) * WINDOWS], job.collate))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return statistics.fmean(losses[-LAST:])


def plain(params, lr):
    return CAME(params, lr=lr, confidence=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/came_against_adamw.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = pystdlib(context=64, width=64, layers=2, heads=2)
    tuning = {lr: end(job, torch.optim.AdamW, lr, TUNING_SEED) for lr in RATES}
    best = min(tuning, key=lambda lr: tuning[lr] if math.isfinite(tuning[lr]) else math.inf)
    row = {"tuning": {f"{lr:g}": loss for lr, loss in tuning.items()}, "adamw_lr": best}
    row["at_the_edge"] = best in (min(RATES), max(RATES))
    print(row, flush=True)
    sides = {"adamw": (torch.optim.AdamW, 1.0), "came_0.5": (CAME, 0.5), "came_0.9": (CAME, 0.9)}
    sides["came_0.7_no_confidence"] = (plain, 0.7)
    for name, (make, share) in sides.items():
        row[name] = [end(job, make, share * best, seed) for seed in SEEDS]
        print(name, row[name], flush=True)
    closest = min(statistics.fmean(row[name]) for name in ("came_0.5", "came_0.9"))
    row["gap"] = closest - statistics.fmean(row["adamw"])
    row["holds"] = row["gap"] <= MARGIN
    if given.save:
        write(result("came_against_adamw", __doc__.split("\n")[0], [row]))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
