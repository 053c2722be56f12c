"""Claim: at fixed model and tokens the best weight decay grows with the batch and the best timescale τ = B/(ηλD) does
not: for 16 times the batch λ grows 6 to 40 times, and every best τ is within a factor 2 of their median (sheet 17,
check 6, which held it for one seed).

A byte transformer of two layers, width 48, context 64, on the sources of Python's standard library, 600,000 tokens in
one order whatever the batch; AdamW(0.9, 0.95) at a peak rate of 0.003, decay on matrices and embeddings alone, 10 %
warm-up, then linear to zero. At each batch a sweep of λ in steps of two; the best by the least of a cubic in ln λ, as
the sheet has it, and beside it the vertex of `rules.fit.timescale_optimum`, a parabola in ln τ. The bowl is flat: 0.002
nats over a factor of 8, so a single batch's best is not sharp.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from _paired import report

from batchlab.rules.fit import timescale_optimum
from batchlab.rules.weight_decay import from_timescale, timescale
from batchlab.workloads.examples import collate
from batchlab.workloads.pystdlib import pystdlib

CONTEXT, RATE, WARMUP = 64, 3e-3, 0.1
TIMESCALES = (0.3, 0.6, 1.2, 2.4, 4.8)


def final_loss(job: Any, order: list[int], batch: int, weight_decay: float, seed: int) -> float:
    """The held-out loss, nats a byte, after one pass over the windows of `order`."""
    torch.manual_seed(seed)
    model = job.model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    steps = len(order) // batch
    for step in range(steps):
        done = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(done / WARMUP, (1 - done + 1 / steps) / (1 - WARMUP))
        optimizer.zero_grad()
        job.loss(model, collate([job.train[i] for i in order[step * batch : (step + 1) * batch]])).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(job.loss(model, collate([job.valid[i] for i in range(len(job.valid))])))


def least_of_cubic(x: list[float], y: list[float]) -> float | None:
    """The x of least value of a cubic in ln x through the points, among those tried; None if that is an edge."""
    u = np.log(x)
    grid = np.linspace(u.min(), u.max(), 2001)
    values = np.polyval(np.polyfit(u, y, 3), grid)
    at = int(values.argmin())
    return float(np.exp(grid[at])) if 0 < at < 2000 else None


def sweep(job: Any, batch: int, seed: int, tokens: int) -> dict[str, Any]:
    """One batch and seed: the losses at each timescale and where they are least."""
    windows = tokens // CONTEXT
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(seed))[:windows].tolist()
    run = {"batch_size": batch * CONTEXT, "learning_rate": RATE, "total_examples": windows * CONTEXT}
    decays = [from_timescale(tau, **run) for tau in TIMESCALES]
    start = time.perf_counter()
    losses = [final_loss(job, order, batch, decay, seed) for decay in decays]
    best = least_of_cubic(decays, losses)
    vertex = timescale_optimum(list(TIMESCALES), losses)
    return {
        "seed": seed,
        "batch_sequences": batch,
        "updates": windows // batch,
        "timescales": list(TIMESCALES),
        "weight_decays": decays,
        "losses": losses,
        "best_weight_decay": best,
        "best_timescale": None if best is None else timescale(weight_decay=best, **run),
        "parabola_timescale": vertex.at.value if vertex.bracketed else None,
        "parabola": repr(vertex.at),
        "seconds": time.perf_counter() - start,
    }


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By seed: how λ grew from the least to the largest batch, and how far any best τ is from their median."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed and row["best_timescale"] is not None]
        mine.sort(key=lambda row: row["batch_sequences"])
        if len(mine) < 2:
            continue
        best = [row["best_timescale"] for row in mine]
        middle = statistics.median(best)
        found.append(
            {
                "seed": seed,
                "batches": mine[-1]["batch_sequences"] / mine[0]["batch_sequences"],
                "weight_decay_grew": mine[-1]["best_weight_decay"] / mine[0]["best_weight_decay"],
                "median_timescale": middle,
                "furthest_factor": max(max(tau / middle, middle / tau) for tau in best),
            }
        )
    return found


def main() -> None:
    """Sweeps, printed as they end, and the summary by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 16], help="sequences")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    job = pystdlib(context=CONTEXT, width=48, layers=2, heads=3)
    rows = []
    for seed in given.seeds:
        for batch in sorted(given.batches, reverse=True):
            rows.append(sweep(job, batch, seed, given.tokens))
            said = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in rows[-1].items()}
            said["losses"] = [round(value, 4) for value in rows[-1]["losses"]]
            print({name: said[name] for name in said if name not in ("timescales", "weight_decays")}, flush=True)
    summaries = summarised(rows)
    for each in summaries:
        print(each)
    report(
        "weight_decay_timescale",
        " ".join((__doc__ or "").split("\n\n")[0].split()),
        [*rows, *summaries],
        save=given.save,
    )


if __name__ == "__main__":
    main()
