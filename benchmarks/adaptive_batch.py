"""Claim: to the same final loss a batch that moves takes at most 0.8 times the updates of the planner's fixed batch,
and at most the time of the best fixed batch that a sweep finds, the cost of measuring included.

The planner's batch B0 is that of `plan(job, probe(job), goal="balanced")`. Every run decays its rate linearly to 0 over
its budget of examples, but where its name says another schedule, and has no average. The final loss L* is the median
over seeds of the planner's batch after the full budget; the other budgets are 0.5, 0.71, 1.41 and 2 times that, and
what a method takes to L* is read between them (the median loss against the logarithm of the budget). Each method, and
each fixed batch, has its rate tuned alike: eight rates a factor 2 apart, at the full budget, by the median loss of
three seeds that are not used again.

  fixed B             B0/8 to 4 B0: the sweep; its best is the one that comes to L* first, in seconds
  wsd, power          at B0, with the schedules of those names
  adascale            at 4 B0 the rate times the measured gain, and a clock that runs by it (Johnson et al. 2020)
  adaptive            follows the noise scale from B0 on, the rate by the square root
  goodput             follows the noise scale and the clock, the rate by the square root
  decay B             from B on grows where the decay would lower the rate, up to 8 B0 (Smith et al. 2018)
  decay B, noise      the same, and below twice the noise scale

The noise is measured at one update in eight, but for AdaScale at each. Seconds are the processor's, of updates alone,
one thread; evaluation is left out. By seed: each seed's own losses against L*.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _paired import report

import batchlab as bl
from batchlab.core.plan import Plan
from batchlab.schedule.rates.by_examples import lr_factor
from batchlab.spine.learner import Learner
from batchlab.workloads import autoencoder, digits, pystdlib

JOBS: dict[str, tuple[Callable[[], bl.Job], int]] = {
    "digits": (digits, 6 * 1437),
    "autoencoder": (autoencoder, 10 * 1437),
    "pystdlib": (lambda: pystdlib(context=32, width=48, layers=1, heads=2), 4_096),
}
BUDGETS = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)
RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
FIXED = (0.125, 0.25, 0.5, 1, 2, 4)
TUNING = (100, 101, 102)
WARMUP, GROWTH, EVERY = 0.05, 8, 8


class AdaScale(Learner):
    """At S times the base batch, the rate times r = S(φ + 1)/(φ + S), φ the noise scale over the base batch."""

    base = 1
    gained = 0.0

    def _set_learning_rate(self, size: int) -> float:
        scale = size / self.base
        noise = self._last_noise
        known = noise is not None and 0 < noise.value < math.inf
        phi = noise.value / self.base if noise is not None and known else 0.0
        gain = scale * (phi + 1) / (phi + scale)
        self.gained += gain * self.base
        share = lr_factor(
            min(self.gained, self.plan.examples),
            total_examples=self.plan.examples,
            warmup_examples=self.plan.warmup_examples,
            schedule=self.plan.schedule,
        )
        rate = self.plan.learning_rate * gain * share
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def methods(job: bl.Job, planned: Plan) -> dict[str, dict[str, Any]]:
    """The changes to the plan that make each method."""
    base, most = planned.batch_size, len(job.train)
    sizes = sorted({max(4, min(round(base * factor), most // 2)) for factor in FIXED})
    moving: dict[str, Any]
    moving = {"learning_rate_rule": "sqrt", "max_batch_size": min(most, GROWTH * base), "noise_every": EVERY}
    moving |= {"min_batch_size": max(4, base // GROWTH), "noise_scale": planned.noise_scale}
    found: dict[str, dict[str, Any]]
    found = {f"fixed {size}": {"batch_size": size, "measure_noise": False} for size in sizes}
    found["wsd"] = {"schedule": "wsd", "measure_noise": False}
    found["power"] = {"schedule": "power", "schedule_settings": {"knee_share": 0.1, "decay_share": 0.1}}
    found["power"] |= {"measure_noise": False}
    found["adascale"] = {"batch_size": min(4 * base, most), "measure_noise": True, "noise_every": 1}
    found |= {name: {"batch_schedule": name, **moving} for name in ("adaptive", "goodput")}
    for start in sorted({max(4, round(base * share)) for share in (0.25, 0.5, 1.0)}):
        decay = {"batch_schedule": "decay_by_batch", "batch_size": start, "measure_noise": False, **moving}
        found[f"decay {start}"] = decay | {"batch_settings": {"headroom": None}}
        found[f"decay {start}, noise"] = decay | {"batch_settings": {"headroom": 2.0}}
    return found


def trained(job: bl.Job, plan: Plan, name: str, base: int, examples: int, seed: int) -> dict[str, float]:
    """loss: the last, infinite where training diverged. steps, examples, seconds: of the run."""
    steps = max(1, round(examples / plan.batch_size))
    one = dataclasses.replace(plan, steps=steps, warmup_examples=round(WARMUP * steps * plan.batch_size))
    make = AdaScale if name == "adascale" else Learner
    learner = make(job, one, seed=seed, device="cpu")
    if isinstance(learner, AdaScale):
        learner.base, learner.gained = base, 0.0
    spent, begun = 0.0, time.process_time()
    while (learner.gained if isinstance(learner, AdaScale) else learner.position) < one.examples:
        if learner.update().skipped or learner.position > 20 * one.examples:
            return {"loss": math.inf, "steps": learner.step, "examples": learner.position, "seconds": math.inf}
    spent = time.process_time() - begun
    loss = learner.evaluate()["loss"]
    learner.close()
    found = {"steps": learner.step, "examples": learner.position, "seconds": spent}
    return {"loss": loss if math.isfinite(loss) else math.inf, **found}


def crossing(budgets: tuple[float, ...], losses: list[float], values: list[float], target: float) -> float:
    """The value at the budget where the loss, made to fall, first meets the target; infinite where it never does."""
    falling = np.minimum.accumulate(losses)
    if falling[-1] > target:
        return math.inf
    at = int(np.argmax(falling <= target))
    if at == 0 or falling[at - 1] == falling[at]:
        return values[at]
    part = (falling[at - 1] - target) / (falling[at - 1] - falling[at])
    return float(np.exp((1 - part) * math.log(values[at - 1]) + part * math.log(values[at])))


def row(job: bl.Job, planned: Plan, name: str, changes: dict[str, Any], full: int, seeds: int) -> dict[str, Any]:
    """One method: its rate, and each seed's loss, updates, examples and seconds at each budget."""
    base = planned.batch_size
    plan = dataclasses.replace(planned, **({"schedule": "linear"} | changes))
    pieces = 2 if plan.measure_noise and plan.batch_schedule == "fixed" else 1
    plan = dataclasses.replace(plan, micro_batch=len(job.train) if pieces == 1 else math.ceil(plan.batch_size / 2))
    plan = dataclasses.replace(plan, accumulation=pieces)
    moved = plan.learning_rate * (1.0 if name == "adascale" else math.sqrt(plan.batch_size / base))
    tried = {}
    for factor in RATES:
        one = dataclasses.replace(plan, learning_rate=moved * factor)
        losses = [trained(job, one, name, base, full, seed)["loss"] for seed in TUNING]
        tried[moved * factor] = statistics.median(losses)
    rate = min(tried, key=lambda each: tried[each])
    plan = dataclasses.replace(plan, learning_rate=rate)
    runs = [[trained(job, plan, name, base, round(b * full), seed) for seed in range(seeds)] for b in BUDGETS]
    found: dict[str, Any] = {"job": job.name, "method": name, "batch_size": plan.batch_size, "rate": rate}
    found["edge"] = rate in (moved * RATES[0], moved * RATES[-1])
    for what in ("loss", "steps", "examples", "seconds"):
        found[what] = [[run[what] for run in each] for each in runs]
    return found


def compared(rows: list[dict[str, Any]], base: int) -> list[dict[str, Any]]:
    """What each method takes to the final loss of the planner's batch, and how that compares."""
    planned = next(row for row in rows if row["method"] == f"fixed {base}")
    target = statistics.median(planned["loss"][BUDGETS.index(1.0)])
    for row in rows:
        for what in ("steps", "seconds"):
            own = zip(zip(*row["loss"], strict=True), zip(*row[what], strict=True), strict=True)
            row[f"{what}_by_seed"] = [crossing(BUDGETS, list(loss), list(value), target) for loss, value in own]
        losses = [statistics.median(each) for each in row["loss"]]
        for what in ("steps", "examples", "seconds"):
            middle = [statistics.median(each) for each in row[what]]
            row[f"{what}_to_target"] = crossing(BUDGETS, losses, middle, target)
    best = min((row for row in rows if row["method"].startswith("fixed")), key=lambda row: row["seconds_to_target"])
    for row in rows:
        row["target"], row["best_fixed"] = target, best["method"]
        row["steps_ratio"] = row["steps_to_target"] / planned["steps_to_target"]
        row["time_ratio"] = row["seconds_to_target"] / best["seconds_to_target"]
        row["holds"] = row["steps_ratio"] <= 0.8 and row["time_ratio"] <= 1.0
    return rows


def main() -> None:
    """A row for each job and method, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", help="others than all; the planner's fixed batch is always there")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of the probe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/adaptive_batch.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for name in given.jobs:
        make, full = JOBS[name]
        job = make()
        facts = bl.probe(job, budget=given.budget, seed=0, device="cpu")
        chosen = bl.plan(job, facts, goal="balanced")
        planned = dataclasses.replace(chosen, average_power=None, target=None, evaluation_batch=256)
        base = planned.batch_size
        mine = []
        for method, changes in methods(job, planned).items():
            if given.methods is None or method in given.methods or method == f"fixed {base}":
                mine.append(row(job, planned, method, changes, full, given.seeds))
                said = {key: mine[-1][key] for key in ("method", "rate", "edge")}
                said["losses"] = [round(statistics.median(each), 4) for each in mine[-1]["loss"]]
                said["steps"] = [statistics.median(each) for each in mine[-1]["steps"]]
                said["seconds"] = [round(statistics.median(each), 2) for each in mine[-1]["seconds"]]
                print(name, said, flush=True)
        rows += compared(mine, base)
        for each in mine:
            shown = ("method", "steps_ratio", "time_ratio", "holds")
            print(name, {key: each[key] for key in shown}, "best fixed:", each["best_fixed"], flush=True)
    rows = [{name: finite(value) for name, value in row.items()} for row in rows]
    report("adaptive_batch", " ".join((__doc__ or "").split("\n\n")[0].split()), rows, save=given.save)


def finite(value: Any) -> Any:
    """None for what was never reached, as JSON has no infinity."""
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


if __name__ == "__main__":
    main()
