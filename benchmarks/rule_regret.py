"""Claim: of the rules that move a learning rate with the batch, the one that `rules.learning_rate.for_optimizer` picks
has the lowest median regret over all cells: both optimizers, the weights evaluated as they are and averaged. Regret:
the updates to the target with the rate that a rule gives, tuned at B0 alone, over those with the best rate known at the
larger batch, less one.

For each job and optimizer: the noise scale of a probe, and its target where none is set; at B0 and at 4, 16 and 64
times B0 the learning rate is searched by factors of two until the best lies inside, over seeds; the best rate, and each
rule's, then run again with fresh seeds, the same for all, and the least median of them counts as the best. What is not
there in four times the updates of the rate that was searched counts as four times. "loss" is how far the validation
loss lies above the target when the best run meets it, as a share of the target.
`+β₂` moves β₂ to β₂^κ as well, `+β` both betas and ε (Zhao et al. 2024). The weights are evaluated as they are; with
--averages their average, as batchlab's own plans do.
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _paired import report, result, write

import batchlab as bl
from batchlab.core.facts import Facts
from batchlab.core.plan import Plan
from batchlab.core.study import REACHED
from batchlab.rules.adam import scale_beta, scale_eps
from batchlab.rules.learning_rate import family, for_optimizer, rescale
from batchlab.spine.sweep_search import trial_plan
from batchlab.spine.trial import run_trial
from batchlab.workloads import autoencoder, diabetes, digits

JOBS: dict[str, tuple[Callable[..., bl.Job], int, bl.Target | None]] = {
    "digits": (digits, 16, bl.Target("loss", 0.1)),  # the probe's own, 0.2, is met in six updates at 1024
    "diabetes": (diabetes, 4, bl.Target("loss", 0.6)),
    "autoencoder": (autoencoder, 16, None),
}
OPTIMIZERS, FACTORS = ("adamw", "sgd"), (4, 16, 64)
RULES = ("none", "sqrt", "linear", "surge", "saturating", "saturating_sqrt")
BETAS = ("sqrt+β₂", "sqrt+β")
CAP = 4.0


def main() -> None:
    """Prints a row for each cell, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", default=list(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--search", type=int, default=7, help="seeds of each rate in the search")
    parser.add_argument("--fresh", type=int, default=9, help="seeds with which the tuned rate and the rules' run again")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of a probe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--averages", action="store_true", help="evaluate the average of the weights")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    benchmark = "rule_regret_averages" if given.averages else "rule_regret"
    claim = " ".join((__doc__ or "").split("\n\n")[0].split())
    for name in given.jobs:
        make, base, target = JOBS[name]
        for optimizer in OPTIMIZERS:
            for row in cells(make(optimizer=optimizer, target=target), base, given):
                rows.append(row)
                print(_sentence(row), flush=True)
            if given.save:
                write(result(benchmark, claim, [*rows, *medians(rows)]))
    for row in medians(rows):
        print(
            row["optimizer"],
            {rule: round(value, 3) for rule, value in row["median_regret"].items()},
            "picked",
            row["picked"],
        )
    report(benchmark, claim, [*rows, *medians(rows)], save=given.save)


def cells(job: bl.Job, base: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each factor."""
    facts = bl.probe(job, budget=given.budget, seed=0)
    if not given.averages:
        facts = dataclasses.replace(facts, reference=dataclasses.replace(facts.reference, average_power=None))
    aimed = dataclasses.replace(job, target=facts.target)
    noise = facts.noise_scale.value
    at_base = Runs(aimed, facts, base)
    tuned, _ = at_base.search(range(given.search))
    rows = []
    for factor in FACTORS:
        runs = Runs(aimed, facts, base * factor)
        best, tried = runs.search(range(given.search))
        fresh = range(1000, 1000 + given.fresh)
        reference = runs.trained(best, fresh)
        median = statistics.median(reference.steps)
        moved = {rule: rescale(tuned, base, base * factor, rule=rule, noise_scale=noise) for rule in RULES}
        plans = {rule: (rate, {}) for rule, rate in moved.items()}
        if family(job.optimizer) == "adam":
            plans |= {rule: (moved["sqrt"], _betas(runs.plan, factor, rule)) for rule in BETAS}
        found = {r: runs.trained(rate, fresh, most=CAP * median, **changes) for r, (rate, changes) in plans.items()}
        least = min(median, *(statistics.median(got.steps) for got in found.values()))
        cell = {
            rule: {
                "learning_rate": plans[rule][0],
                "steps": got.steps,
                "regret": statistics.median(got.steps) / least - 1,
                "loss": statistics.median(got.value_at(least)) / facts.target.value - 1,
                "reached": got.reached,
            }
            for rule, got in found.items()
        }
        rows.append(
            {
                "job": job.name,
                "optimizer": job.optimizer,
                "base_batch_size": base,
                "base_learning_rate": tuned,
                "batch_size": base * factor,
                "noise_scale": noise,
                "target": facts.target.value,
                "tuned_learning_rate": best,
                "tuned_steps": reference.steps,
                "tuned_regret": median / least - 1,
                "searched": tried,
                "rules": cell,
            }
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Trained:
    """steps: to the target, or the cap. reached: how many seeds met it. evaluations: (step, metric), a list a seed."""

    steps: list[float]
    reached: int
    evaluations: list[list[tuple[int, float]]]

    def value_at(self, step: float) -> list[float]:
        """The metric at the last evaluation up to `step`, of each seed; infinite where it diverged before."""
        return [next((v for s, v in reversed(run) if s <= step), math.inf) for run in self.evaluations]


class Runs:
    """Runs of a job at one batch size, by learning rate."""

    def __init__(self, job: bl.Job, facts: Facts, batch_size: int) -> None:
        self.job, self.plan, self.device = job, trial_plan(job, facts, batch_size), facts.device
        self.expected = self.plan.predicted_steps.value if self.plan.predicted_steps else self.plan.steps / 4

    def trained(self, rate: float, seeds: Sequence[int], *, most: float = math.inf, **hyperparameters: Any) -> Trained:
        settings = dict(self.plan.hyperparameters) | hyperparameters
        steps = self.plan.steps if most == math.inf else min(self.plan.steps, math.ceil(most))
        plan = dataclasses.replace(self.plan, learning_rate=rate, hyperparameters=settings, steps=steps)
        runs = [run_trial(self.job, plan, seed=s, expected_steps=self.expected, device=self.device) for s in seeds]
        counted = [float(r["steps_to_target"]) if r["status"] == REACHED else float(steps) for r in runs]
        reached = sum(r["status"] == REACHED for r in runs)
        return Trained(counted, reached, [r["evaluations"] for r in runs])

    def search(self, seeds: Sequence[int]) -> tuple[float, dict[str, float]]:
        """The rate of the least median steps, by factors of two, widened until it has two neighbours on each side."""
        found: dict[int, float] = {}
        wanted = [-2, -1, 0, 1, 2]
        while new := [k for k in wanted if k not in found]:
            for k in new:
                limit = 2 * min(found.values(), default=math.inf)
                got = self.trained(self.plan.learning_rate * 2.0**k, seeds, most=limit)
                found[k] = statistics.median(got.steps) if 2 * got.reached > len(seeds) else math.inf
            best = min(found, key=lambda k: (found[k], abs(k)))
            wanted = range(best - 2, best + 3)
        rates = {f"{self.plan.learning_rate * 2.0**k:.6g}": steps for k, steps in sorted(found.items())}
        return self.plan.learning_rate * 2.0**best, rates


def _betas(plan: Plan, factor: int, rule: str) -> dict[str, Any]:
    first, second = plan.hyperparameters["betas"]
    if rule == "sqrt+β₂":
        return {"betas": (first, scale_beta(second, factor))}
    eps = scale_eps(plan.hyperparameters["eps"], factor)
    return {"betas": (scale_beta(first, factor), scale_beta(second, factor)), "eps": eps}


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each optimizer, each rule's median regret over all cells, the rule that is picked, and the best."""
    result = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row["rules"] for row in rows if row["optimizer"] == optimizer]
        regret = {rule: statistics.median(cell[rule]["regret"] for cell in mine) for rule in mine[0]}
        loss = {rule: statistics.median(cell[rule]["loss"] for cell in mine) for rule in mine[0]}
        picked = for_optimizer(optimizer, 1.0, 1, 2, noise_scale=10.0).rule
        unknown = for_optimizer(optimizer, 1.0, 1, 2).rule
        best = min(regret, key=lambda rule: regret[rule])
        result.append(
            {
                "optimizer": optimizer,
                "median_regret": regret,
                "median_loss": loss,
                "picked": picked,
                "without_noise_scale": unknown,
                "best": best,
            }
        )
    return result


def _sentence(row: dict[str, Any]) -> str:
    regrets = ", ".join(f"{rule} {cell['regret']:+.0%}" for rule, cell in row["rules"].items())
    steps = statistics.median(row["tuned_steps"])
    return (
        f"{row['job']} {row['optimizer']} {row['base_batch_size']} to {row['batch_size']}: tuned "
        f"{row['base_learning_rate']:.3g} to {row['tuned_learning_rate']:.3g} in {steps:g} "
        f"updates; {regrets}"
    )


if __name__ == "__main__":
    main()
