"""Claim: DiLoCo with one replica bears a larger batch than plain training: at fixed tokens its loss rises less from
the best batch to 16 times the smallest (Charles et al. 2025, H = 30 and runs of 20 tokens a weight). On this miniature
it does not hold: the loss rises more on each of three seeds.

A byte transformer of two layers, width 32, context 64, on the sources of Python's standard library; 200,000 tokens in
one order whatever the batch. AdamW(0.9, 0.99), gradient clipped to norm 1, 10 % warm-up, cosine to 5 % of the peak,
weight decay 1/T, as the source has them. Both sides take the best inner rate of a grid of factors of two around
0.003·√(B/2); DiLoCo (H = 10, Nesterov 0.9, a tail is made an outer step) also the best outer rate of 0.4, 0.6, 0.8.
Both grids are extended by factors of two, the others' best held, until the best is inside. The penalty is the held-out
loss at the largest batch, nats a byte, less the least over the batches. The largest has 97 updates: ten outer steps.
"""

import argparse
import json
import math
import statistics
from typing import Any

import torch
from _paired import RESULTS, report

from batchlab.optim.diloco.diloco import DiLoCo
from batchlab.workloads.examples import collate
from batchlab.workloads.pystdlib import pystdlib

CONTEXT, WARMUP, FLOOR, INNER_STEPS = 64, 0.1, 0.05, 10
FACTORS, OUTER_RATES = (0.5, 1.0, 2.0), (0.4, 0.6, 0.8)
NAMES = ("AdamW", "DiLoCo, M = 1")

Losses = dict[tuple[float, float | None], float]


def rate_at(done: float) -> float:
    """The share of the peak rate after a share of the run: linear to one, then a half cosine to the floor."""
    if done < WARMUP:
        return done / WARMUP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def final_loss(job: Any, order: list[int], batch: int, rate: float, outer: float | None, seed: int) -> float:
    """The held-out loss, nats a byte, after one pass over the windows of `order`. outer: η; None for plain AdamW."""
    torch.manual_seed(seed)
    model = job.model()
    steps = len(order) // batch
    inner = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1 / steps)
    optimizer = inner if outer is None else DiLoCo(inner, inner_steps=INNER_STEPS, outer_lr=outer)
    for step in range(steps):
        for group in inner.param_groups:
            group["lr"] = rate * rate_at((step + 1) / steps)
        optimizer.zero_grad()
        job.loss(model, collate([job.train[i] for i in order[step * batch : (step + 1) * batch]])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if isinstance(optimizer, DiLoCo):
        optimizer.synchronize()
    model.eval()
    with torch.no_grad():
        return float(job.loss(model, collate([job.valid[i] for i in range(len(job.valid))])))


def best(job: Any, order: list[int], batch: int, seed: int, *, diloco: bool, known: Losses) -> dict[str, Any]:
    """The least loss at one batch, and the rates that gave it. known: trials that need not be made again."""
    middle = 3e-3 * (batch / 2) ** 0.5
    trials = [(middle * factor, outer) for factor in FACTORS for outer in (OUTER_RATES if diloco else (None,))]
    losses = dict(known)
    while trials:
        losses |= {(r, o): final_loss(job, order, batch, r, o, seed) for r, o in trials if (r, o) not in losses}
        rate, outer = min(losses, key=lambda pair: losses[pair])
        tried = [r for r, _ in losses]
        trials = [(2 * rate, outer)] * (rate == max(tried)) + [(rate / 2, outer)] * (rate == min(tried))
        if outer is not None and not trials:
            tried = [o for _, o in losses if o is not None]
            trials = [(rate, 2 * outer)] * (outer == max(tried)) + [(rate, outer / 2)] * (outer == min(tried))
    return {
        "seed": seed,
        "algorithm": NAMES[diloco],
        "batch_sequences": batch,
        "updates": len(order) // batch,
        "loss": losses[rate, outer],
        "rate": rate,
        "outer_rate": outer,
        "losses": [[r, o, loss] for (r, o), loss in losses.items()],
    }


def penalties(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By seed: how far the largest batch is above the best one, for both; and over the seeds."""
    found = []
    largest = max(row["batch_sequences"] for row in rows)
    for seed in sorted({row["seed"] for row in rows}):
        penalty = {}
        for name in NAMES:
            mine = {r["batch_sequences"]: r["loss"] for r in rows if (r["seed"], r["algorithm"]) == (seed, name)}
            penalty[name] = mine[largest] - min(mine.values())
        plain, diloco = (penalty[name] for name in NAMES)
        apart = {"penalty_adamw": plain, "penalty_diloco": diloco, "diloco_less_adamw": diloco - plain}
        found.append({"seed": seed, **apart})
    each = [row["diloco_less_adamw"] for row in found]
    spread = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return [*found, {"seeds": len(each), "mean_diloco_less_adamw": statistics.mean(each), "standard_error": spread}]


def main() -> None:
    """Each batch and side, printed as it ends, and the penalties."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32], help="sequences")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--resume", action="store_true", help="keep the trials that the saved result holds")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    job = pystdlib(context=CONTEXT, width=32, layers=2, heads=2)
    saved = json.loads((RESULTS / "diloco_batch.json").read_text())["rows"] if given.resume else []
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        windows = given.tokens // CONTEXT
        order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(seed))[:windows].tolist()
        for batch in sorted(given.batches, reverse=True):
            for diloco in (False, True):
                name = NAMES[diloco]
                known = [r for r in saved if (r.get("seed"), r.get("batch_sequences")) == (seed, batch)]
                losses = {(r, o): loss for row in known if row["algorithm"] == name for r, o, loss in row["losses"]}
                rows.append(best(job, order, batch, seed, diloco=diloco, known=losses))
                print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
        claim = " ".join((__doc__ or "").split("\n\n")[0].split())
        report("diloco_batch", claim, [*rows, *penalties(rows)], save=given.save)  # what there is, after each seed


if __name__ == "__main__":
    main()
