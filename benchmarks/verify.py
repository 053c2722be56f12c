"""Claim: a plan is right. The sweep's critical batch size is within a factor of 2 of the one that the noise scale
predicts, and the plan's time to target within 1.25 times that of the best batch size in the sweep.

For each seed, all anew: a probe of 20 s (a slow job needs more to know its noise scale), the balanced plan, a sweep
over batch sizes around it with the learning rate searched at each (8 rates, more where the best lies at their edge)
and the best run again with fresh seeds, and the plan itself run with as many. Times are the medians of training seconds
over the fresh seeds. Every seed is reported, and none is chosen.

With --plain-weights the sweep's and the plan's runs evaluate their weights as they are, not averages of them, to the
same target; the prediction stays what it was. So it shows what averaging does to the measured critical batch size.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _paired import report, result, write

import batchlab as bl
from batchlab.core.facts import Facts
from batchlab.core.jsonio import to_plain
from batchlab.core.plan import Plan
from batchlab.core.study import REACHED, Study
from batchlab.spine.trial import run_trial
from batchlab.spine.tune import around
from batchlab.workloads import autoencoder, diabetes, digits, pystdlib, syntax

FACTOR, SLOWER = 2.0, 1.25
JOBS: dict[str, Callable[..., bl.Job]] = {
    "digits": digits,
    "pystdlib": partial(pystdlib, context=64, valid_windows=64),  # else evaluating takes longer than training
    "diabetes": diabetes,
    "syntax": syntax,
    "autoencoder": autoencoder,
}


def main() -> None:
    """Prints a row a seed, and one JSON object a job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", default=["digits"], help=f"of {', '.join(JOBS)}")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--fresh", type=int, default=5, help="seeds with which each winner and the plan run again")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of a probe")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--target", help="METRIC>=VALUE or METRIC<=VALUE, in place of the job's own")
    parser.add_argument("--keep", help="a folder for the sweeps: interrupted ones go on from there")
    parser.add_argument("--plain-weights", action="store_true", help="evaluate the weights, not their average")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/verify_JOB[_plain].json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.jobs:
        rows, claim = [], " ".join((__doc__ or "").split("\n\n")[0].split())
        benchmark = f"verify_{name}_plain" if given.plain_weights else f"verify_{name}"
        for seed in range(given.seeds):
            rows.append({"job": name} | verify(JOBS[name](target=_target(given.target)), seed, given))
            print(_sentence(rows[-1]), flush=True)
            if given.save:  # a seed takes minutes to an hour: what is done is kept
                write(result(benchmark, claim, to_plain(rows)))
        report(benchmark, claim, to_plain(rows), save=given.save)


def verify(job: bl.Job, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Probe, plan, sweep, and the plan's own runs."""
    with contextlib.ExitStack() as stack:
        folder = Path(given.keep or stack.enter_context(tempfile.TemporaryDirectory())) / f"{job.name}-{seed}"
        facts = _facts(job, folder / "facts.json", seed, given.budget)
        if given.plain_weights:
            facts = dataclasses.replace(facts, reference=dataclasses.replace(facts.reference, average_power=None))
        plan = bl.plan(job, facts)
        if plan.predicted_steps is None:  # a sweep would be for nothing
            raise SystemExit(f"{job.name}: {facts.warnings[-1]}; give a larger --budget")
        sizes = around(plan.batch_size, len(job.train))
        study = bl.sweep(job, batch_sizes=sizes, out=folder, seeds=given.fresh, seed=seed, facts=facts)
        return _compared(job, facts, plan, study, seed, given.fresh)


def _facts(job: bl.Job, kept: Path, seed: int, budget: float) -> Facts:
    """What the probe found, or had found before this was interrupted."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(bl.probe(job, budget=budget, seed=seed).to_json(), "utf-8")
    return Facts.from_json(kept.read_text("utf-8"))


def _compared(job: bl.Job, facts: Facts, plan: Plan, study: Study, seed: int, fresh: int) -> dict[str, Any]:
    aimed, predicted = dataclasses.replace(job, target=facts.target), plan.predicted_steps
    assert predicted is not None
    own = [
        run_trial(aimed, plan, seed=1000 * (seed + 1) + k, expected_steps=predicted.value, device=facts.device)
        for k in range(fresh)
    ]
    seconds = statistics.median(run["seconds"] if run["status"] == REACHED else math.inf for run in own)
    steps = [run["steps_to_target"] for run in own]
    measured = [row for row in study.rows() if row["seconds"] is not None and row["median"] is not None]
    best = min(measured, key=lambda row: float(row["seconds"]))
    fit, ratio = study.summary["tradeoff"], study.summary["ratio"]
    return {
        "seed": seed,
        "metric": facts.target.metric,
        "target": facts.target.value,
        "predicted_b_crit": to_plain(facts.noise_scale),
        "measured_b_crit": fit and fit["b_crit"],
        "ratio": ratio,
        "within_factor_2": bool(ratio and 1 / FACTOR <= ratio <= FACTOR),
        "plan_batch_size": plan.batch_size,
        "plan_learning_rate": plan.learning_rate,
        "plan_steps": steps,
        "predicted_steps": to_plain(predicted),
        "in_interval": sum(predicted.low <= count <= predicted.high for count in steps if count is not None),
        "plan_seconds": seconds,
        "best_batch_size": best["batch_size"],
        "best_seconds": best["seconds"],
        "time_ratio": seconds / best["seconds"],
        "within_1_25": seconds / best["seconds"] <= SLOWER,
        "rows": study.rows(),
    }


def _target(text: str | None) -> bl.Target | None:
    if text is None:
        return None
    sign = ">=" if ">=" in text else "<="
    metric, value = text.split(sign)
    return bl.Target(metric, float(value), "max" if sign == ">=" else "min")


def _sentence(row: dict[str, Any]) -> str:
    predicted, measured = row["predicted_b_crit"]["value"], (row["measured_b_crit"] or {}).get("value", math.nan)
    return (
        f"{row['job']} seed {row['seed']}: B_crit predicted {predicted:.3g}, measured {measured:.3g}, ratio "
        f"{row['ratio'] or math.nan:.2f}; plan {row['plan_batch_size']} takes {row['plan_steps']} steps, predicted "
        f"{row['predicted_steps']['value']:.3g} ({row['in_interval']} inside); time over best "
        f"({row['best_batch_size']}) {row['time_ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
