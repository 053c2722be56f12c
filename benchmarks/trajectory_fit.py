"""Claim: fitted to four models of 6k to 99k parameters, the loss-trajectory law predicts the loss curves of one of 231k
within 5 % on average after its warm-up, at every batch size (the median over three seeds).

Byte transformers of two layers on the sources of Python's standard library, one epoch at most, context 64, AdamW at a
constant rate after a warm-up of 10 updates, batches of 512 to 32,768 tokens. The rate of each model and batch is the
best of three about √B, by the held-out loss of a quarter epoch of seed 0. No curve has flattened, so the final losses
are extrapolated from the other models' curves. The largest model's last loss at each batch is given beside the one
predicted, with its 95 % interval. Beside the law, fitted to the same points: L = E + A/N^α + B/D^β, which does
not know the batch, and the curve of the next smaller model taken as it is. Hours long: with --curves FILE every curve
is kept there as it ends, and a second call goes on from them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _paired import report
from torch import nn

from batchlab.core.job import Job
from batchlab.rules import loss as laws
from batchlab.rules.fit import LossRun, chinchilla_constants, trajectory
from batchlab.workloads.pystdlib import pystdlib

CONTEXT, WARMUP, FIRST, CHECKPOINTS = 64, 10, 12, 60
SHAPES = ((16, 2), (28, 2), (42, 3), (64, 4), (98, 7))  # width, heads
WINDOWS = (8, 32, 128, 512)
RATE, AT_TOKENS, TIMES = 6e-3, 2048, (0.4, 1.0, 2.5)
PEERS = ("loss of tokens", "next smaller model")


@dataclass(frozen=True)
class Setting:
    """A model, a batch in windows, a learning rate and a seed."""

    width: int
    heads: int
    windows: int
    rate: float
    seed: int


def job_of(width: int, heads: int) -> Job:
    """The job of one size, all on the same bytes."""
    return pystdlib(context=CONTEXT, width=width, layers=2, heads=heads, valid_windows=128)


def parameters(width: int, heads: int) -> int:
    """Without embeddings, positions and the output matrix."""
    model = job_of(width, heads).model()
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ("blocks", "norm"))


def held_out(model: nn.Module, job: Job) -> float:
    """Nats a byte over the fixed held-out windows."""
    with torch.no_grad():
        return float(job.loss(model, job.valid.__getitems__(list(range(len(job.valid))))))  # type: ignore[attr-defined]


class Curves:
    """The curves that were trained, in a file of one JSON object a line where one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, {}
        lines = path.read_text().splitlines() if path and path.exists() else []
        for each in map(json.loads, lines):
            self.known[tuple(each["setting"]), each["share"]] = each["steps"], each["losses"]

    def __call__(self, setting: Setting, share: float) -> tuple[list[int], list[float]]:
        """The curve of one run, trained where it is not known."""
        key = astuple(setting), share
        if key not in self.known:
            steps, losses = self.known[key] = curve(setting, share)
            if self.path:
                with self.path.open("a") as file:
                    line = {"setting": astuple(setting), "share": share, "steps": steps, "losses": losses}
                    print(json.dumps(line), file=file)
        return self.known[key]


def curve(setting: Setting, share: float) -> tuple[list[int], list[float]]:
    """Updates and held-out losses of one run over a share of an epoch, each window once at most."""
    job = job_of(setting.width, setting.heads)
    torch.manual_seed(setting.seed)
    model = job.model()
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(setting.seed)).tolist()
    updates = int(share * len(order)) // setting.windows
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm: Callable[[int], float] = lambda step: min(1.0, (step + 1) / WARMUP)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm)
    looked_at = {int(step) for step in np.geomspace(FIRST, updates, CHECKPOINTS)} if updates > FIRST else {updates}
    steps, losses = [], []
    for step in range(1, updates + 1):
        rows = order[(step - 1) * setting.windows : step * setting.windows]
        optimizer.zero_grad()
        job.loss(model, job.train.__getitems__(rows)).backward()  # type: ignore[attr-defined]
        optimizer.step()
        schedule.step()
        if step in looked_at:
            steps.append(step)
            losses.append(held_out(model, job))
    return steps, losses


def tuned(width: int, heads: int, windows: int, share: float, trained: Curves) -> dict[str, Any]:
    """The best of three rates, and whether it lies at the edge of them."""
    base = RATE * (windows * CONTEXT / AT_TOKENS) ** 0.5
    losses = {k: trained(Setting(width, heads, windows, base * k, 0), share / 4)[1][-1] for k in TIMES}
    best = min(losses, key=lambda times: losses[times] if losses[times] == losses[times] else float("inf"))
    return {"width": width, "windows": windows, "rate": base * best, "edge": best != TIMES[1], "losses": losses}


def runs_of(seed: int, rates: dict[tuple[int, int], float], share: float, trained: Curves) -> list[LossRun]:
    """Every model at every batch."""
    found = []
    for width, heads in SHAPES:
        for windows in WINDOWS:
            steps, losses = trained(Setting(width, heads, windows, rates[width, windows], seed), share)
            size, batch = parameters(width, heads), windows * CONTEXT
            found.append(LossRun(size, batch, tuple(steps), tuple(losses), warmup_steps=WARMUP))
            print(f"seed {seed}, {size} parameters, {batch} tokens: {losses[-1]:.4f} after {steps[-1]}", flush=True)
    return found


def after_warm_up(run: LossRun, times: float) -> tuple[np.ndarray, np.ndarray]:
    """The points that the fit keeps."""
    steps, losses = np.array(run.steps), np.array(run.losses)
    kept = steps > times * run.warmup_steps
    return steps[kept], losses[kept]


def row(seed: int, runs: list[LossRun], times: float) -> dict[str, Any]:
    """What each predicts of the largest model's curves: the mean of |predicted/measured - 1| by batch, and over all."""
    largest = max(run.params for run in runs)
    rest, mine = [r for r in runs if r.params < largest], [r for r in runs if r.params == largest]
    law = trajectory(rest, extrapolate=True, after_warmups=times)
    columns: list[list[float]] = [[], [], []]
    for run in rest:
        for step, measured in zip(*after_warm_up(run, times), strict=True):
            columns = [c + [v] for c, v in zip(columns, (run.params, step * run.batch_tokens, measured), strict=True)]
    of_tokens = chinchilla_constants(*columns)
    next_size = max(run.params for run in rest)
    errors: dict[str, list[float]] = {name: [] for name in ("law", *PEERS)}
    for run in mine:
        steps, measured = after_warm_up(run, times)
        at = {"params": run.params, "steps": steps, "batch_tokens": run.batch_tokens}
        smaller = next(r for r in rest if (r.params, r.batch_tokens) == (next_size, run.batch_tokens))
        said = {
            "law": np.array(law.curve(**at).losses),
            PEERS[0]: np.array(
                [
                    laws.chinchilla(params=run.params, tokens=s * run.batch_tokens, constants=of_tokens).nats
                    for s in steps
                ]
            ),
            PEERS[1]: np.exp(np.interp(np.log(steps), np.log(smaller.steps), np.log(smaller.losses))),
        }
        for name, predicted in said.items():
            errors[name].append(float(np.abs(predicted / measured - 1).mean()))
    last = [law.loss(params=run.params, steps=run.steps[-1], batch_tokens=run.batch_tokens) for run in mine]
    whole = trajectory(runs, extrapolate=True, after_warmups=times)
    found = {"seed": seed, "constants": vars(law.constants), "deviation": law.deviation, "fit_note": law.note}
    found |= {"with_the_largest": vars(whole.constants), "batch_tokens": [run.batch_tokens for run in mine]}
    found |= {
        "last_losses": [run.losses[-1] for run in mine],
        "predicted": [[each.value, each.low, each.high] for each in last],
    }
    found |= {f"{name} by batch": each for name, each in errors.items()}
    return found | {name: statistics.fmean(each) for name, each in errors.items()} | {"runs": [vars(r) for r in runs]}


def main() -> None:
    """Prints the rates, the errors of each seed with their median, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of an epoch; less for a quick look")
    parser.add_argument("--after-warmups", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--curves", type=Path, help="a file that keeps the curves and is read again")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/trajectory_fit.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    trained = Curves(given.curves)
    found = [tuned(*shape, windows, given.share, trained) for shape in SHAPES for windows in WINDOWS]
    for each in found:
        print({key: f"{value:.3g}" if isinstance(value, float) else value for key, value in each.items()}, flush=True)
    rates = {(each["width"], each["windows"]): each["rate"] for each in found}
    rows = [row(seed, runs_of(seed, rates, given.share, trained), given.after_warmups) for seed in range(given.seeds)]
    for name in ("law", *PEERS):
        errors = [each[name] for each in rows]
        print(f"{name}: median {100 * statistics.median(errors):.2f} %, seeds {[f'{100 * e:.2f}' for e in errors]}")
    claim = " ".join((__doc__ or "").split("\n\n")[0].split())
    report("trajectory_fit", claim, [*rows, {"rates": found, "share": given.share}], save=given.save)


if __name__ == "__main__":
    main()
