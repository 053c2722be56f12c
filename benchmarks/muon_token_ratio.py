"""Claim: Muon needs fewer tokens than AdamW for one loss, and the more so the larger the batch (Shah et al. 2025).

A byte-level transformer of width 64 and 2 layers on the sources of Python's standard library; every run has the same
number of tokens, at three batch sizes. The rate of each optimizer is tuned at the smallest batch, with a seed of its
own, and goes with the square root of the batch; cosine to a tenth after a tenth of warm-up. The loss is that of fresh
batches, averaged over equal windows of tokens. Losses: 0.3, 0.15 and 0.03 above the highest last loss of any run.
"""

import argparse
import json
import math
import time

import torch
from _paired import result, write

from batchlab.data.fetch import fetch
from batchlab.measure.runs.token_ratio import advantage_lasts, smoothed, token_ratio
from batchlab.optim.muon import Muon, muon_groups
from batchlab.workloads import pystdlib

CONTEXT = 64
BATCHES = (1024, 4096, 16384)  # tokens
RATES = {"adamw": (4e-3, 8e-3, 16e-3, 32e-3), "muon": (4e-3, 8e-3, 16e-3, 32e-3)}
TUNING_SEED, SEEDS = 100, (0, 1, 2)
ABOVE = (0.3, 0.15, 0.03)  # nats


def optimizer_for(name, model, lr):
    groups = muon_groups(model, weight_decay=0.1)
    if name == "muon":
        return Muon(groups, lr=lr)
    for group in groups:
        group.pop("use_muon")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.95, 0.95))


def rate_at(step, steps):
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def curve(job, name, lr, batch, tokens, seed):
    """(tokens, loss) after every update, smoothed over the tokens of the largest batch."""
    torch.manual_seed(seed)
    model = job.model()
    optimizer = optimizer_for(name, model, lr)
    steps, windows = tokens // batch, batch // CONTEXT
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(seed)).tolist()
    points = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = 0.0
        indices = order[step * windows : (step + 1) * windows]
        for at in range(0, windows, 32):
            part = indices[at : at + 32]
            each = job.loss(model, fetch(job.train, part, job.collate)) * (len(part) / windows)
            each.backward()
            loss += float(each.detach())
        optimizer.step()
        schedule.step()
        points.append((float((step + 1) * batch), loss))
    return smoothed(points, max(BATCHES) // batch)


def tuned(job, name, tokens):
    ends = {lr: curve(job, name, lr, BATCHES[0], tokens, TUNING_SEED)[-1][1] for lr in RATES[name]}
    return min(ends, key=lambda lr: ends[lr] if math.isfinite(ends[lr]) else math.inf), ends


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**19)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/muon_token_ratio.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = pystdlib(context=CONTEXT, width=64, layers=2, heads=2)
    start, curves, rates = time.process_time(), {}, {}
    for name in RATES:
        lr, ends = tuned(job, name, given.tokens)
        rates[name] = {"lr": lr, "ends": {f"{each:g}": round(end, 4) for each, end in ends.items()}}
        rates[name]["at_the_edge"] = lr in (min(RATES[name]), max(RATES[name]))
        scaled = {batch: lr * math.sqrt(batch / BATCHES[0]) for batch in BATCHES}
        curves[name] = {b: [curve(job, name, scaled[b], b, given.tokens, seed) for seed in SEEDS] for b in BATCHES}
        print(name, rates[name], f"{time.process_time() - start:.0f} s", flush=True)
    ends = {n: {b: [round(c[-1][1], 4) for c in cs] for b, cs in by.items()} for n, by in curves.items()}
    print(ends, flush=True)
    highest = max(end for by in ends.values() for each in by.values() for end in each)
    losses = [highest + above for above in ABOVE]
    rows = []
    for loss in losses:
        found = token_ratio(curves["adamw"], curves["muon"], [loss])
        each = [
            {"batch": r.batch_size, "ratio": r.ratio.value, "low": r.ratio.low, "high": r.ratio.high} for r in found
        ]
        rows.append({"loss": loss, "ratios": each, "lasts": advantage_lasts(found)})
    rows.append({"rates": rates, "last_losses": ends, "tokens": given.tokens, "seeds": SEEDS})
    outcome = result("muon_token_ratio", __doc__.split("\n")[0], rows)
    if given.save:
        write(outcome)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
