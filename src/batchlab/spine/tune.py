"""`tune`: probe, plan, train, report; with `verify`, also the sweep that the plan is held against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import torch.distributed as dist

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError, Interrupted
from batchlab.core.facts import Facts
from batchlab.core.files import write_atomic
from batchlab.core.job import Job
from batchlab.core.jsonl import append_line
from batchlab.core.plan import Plan
from batchlab.core.random import derive_seed
from batchlab.core.run import RUN_FILE, Run
from batchlab.core.store import check_folder
from batchlab.core.study import PLAN_TRIALS_FILE
from batchlab.parallel.torchrun import is_main
from batchlab.planner.batch import check_goal
from batchlab.spine.folder import reserved_on_first_rank
from batchlab.spine.plan import plan as make_plan
from batchlab.spine.probe import probe
from batchlab.spine.report import report
from batchlab.spine.signals import StopSignals
from batchlab.spine.sweep import sweep
from batchlab.spine.train import train
from batchlab.spine.trial import run_trial

PROBE_SHARE, FRESH_SEEDS = 1 / 3, 3
REPORT_FILE, FACTS_FILE, PLAN_FILE, STUDY_FOLDER = "report.html", "facts.json", "plan.json", "sweep"

Progress = Callable[[str, float], None]


def tune(
    job: Job,
    *,
    goal: str = "balanced",
    out: str | Path,
    budget: float = 60.0,
    seed: int = 0,
    verify: bool = False,
    device: str | None = None,
    max_steps: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Measures `job`, plans its run, trains it, and writes the report, all into the folder `out`.

    goal: "time", "cost" or "balanced". budget: seconds in all that it aims at; a third goes to probing.
    verify: afterwards sweeps batch sizes around the plan's, tuned for each, runs each winner and the plan itself with
    three fresh seeds, and shows prediction against truth; that takes several budgets, and one process.
    max_steps: the most updates to train, in place of the plan's own number.
    progress: called as `progress(phase, fraction done)`.

    Raises `InputError` before anything is measured if `out` already holds a run.
    """
    folder = Path(out)
    check_goal(goal)
    check_folder(folder)
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder} already holds a run: resume it with train, or name another folder")
    if not holds(lambda value: 0 < value < math.inf, budget):
        raise InputError(f"budget must be finite and > 0 seconds, got {budget!r}")
    if max_steps is not None:
        check_count(max_steps=max_steps)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if verify and world > 1:
        raise InputError(f"verify sweeps in a single process, these are {world} ranks: sweep by itself, one a device")
    with reserved_on_first_rank(folder):
        facts = probe(job, budget=budget * PROBE_SHARE, seed=seed, device=device, progress=progress)
        plan = make_plan(job, facts, goal=goal, devices=world, all_devices=True)
        if max_steps is not None:
            plan = dataclasses.replace(plan, steps=max_steps)
        callbacks = (
            [] if progress is None else [lambda line: progress("train", min(1.0, line["position"] / plan.examples))]
        )
        run = train(job, plan, out=folder, seed=seed, device=device, facts=facts, callbacks=callbacks)
    if is_main():
        write_atomic(folder / FACTS_FILE, facts.to_json())
        write_atomic(folder / PLAN_FILE, plan.to_json())
        report(run, folder / REPORT_FILE)
    if verify:
        _verify(job, facts, plan, folder / STUDY_FOLDER, seed=seed, device=device, progress=progress)
        report(run, folder / REPORT_FILE)
    return run


def _verify(
    job: Job, facts: Facts, plan: Plan, out: Path, *, seed: int, device: str | None, progress: Progress | None
) -> None:
    """The sweep, and after it the plan's own runs, under the same conditions: the one run of `train` began cold."""
    sizes, aimed = around(plan.batch_size, len(job.train)), dataclasses.replace(job, target=facts.target)
    sweep(
        aimed, batch_sizes=sizes, out=out, seeds=FRESH_SEEDS, seed=seed, facts=facts, device=device, progress=progress
    )
    expected = plan.predicted_steps.value if plan.predicted_steps else 1.0
    with StopSignals() as signals:
        for k in range(FRESH_SEEDS):
            own = derive_seed(seed, "verify", k) % 2**31
            stop = lambda: bool(signals.requested)  # noqa: E731
            outcome = run_trial(
                aimed, plan, seed=own, expected_steps=expected, device=device, stop=stop, untrained=False
            )
            if signals.requested:
                raise Interrupted(f"stopped by {Signals(signals.requested).name} while verifying", signals.requested)
            append_line(out / PLAN_TRIALS_FILE, {"seed": own, "batch_size": plan.batch_size} | outcome)
            if progress is not None:
                progress("the plan again", (k + 1) / FRESH_SEEDS)


def around(batch_size: int, examples: int) -> list[int]:
    """Powers of two from an eighth of a batch size to sixteen times it, within the data set.

    >>> around(100, 1437)
    [16, 32, 64, 128, 256, 512, 1024]
    """
    lowest, highest = max(batch_size / 8, 1), min(batch_size * 16, examples)
    exponents = range(round_log2(lowest), highest.bit_length())
    return [2**e for e in exponents if lowest / 1.5 <= 2**e <= highest]


def round_log2(value: float) -> int:
    """The exponent of the nearest power of two, by ratio."""
    return max(0, round(value).bit_length() - 1) if value >= 1 else 0
