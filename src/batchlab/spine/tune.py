"""`tune`: probe, plan, train, report; with `verify`, also the sweep that the plan is held against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from batchlab.core.errors import InputError
from batchlab.core.files import write_atomic
from batchlab.core.job import Job
from batchlab.core.run import RUN_FILE, Run
from batchlab.core.store import check_folder
from batchlab.parallel.torchrun import is_main
from batchlab.planner.batch import check_goal
from batchlab.spine.folder import reserved_on_first_rank
from batchlab.spine.plan import plan as make_plan
from batchlab.spine.probe import probe
from batchlab.spine.report import report
from batchlab.spine.sweep import sweep
from batchlab.spine.train import train

PROBE_SHARE = 1 / 3
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
    verify: afterwards sweeps batch sizes around the plan's, tuned for each, and shows prediction against truth;
    that takes several budgets. max_steps: the most updates to train, in place of the plan's own number.
    progress: called as `progress(phase, fraction done)`.

    Raises `InputError` before anything is measured if `out` already holds a run.
    """
    folder = Path(out)
    check_goal(goal)
    check_folder(folder)
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder} already holds a run: resume it with train, or name another folder")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise InputError(f"budget must be finite and > 0 seconds, got {budget!r}")
    if max_steps is not None and max_steps < 1:
        raise InputError(f"max_steps must be at least 1, got {max_steps!r}")
    with reserved_on_first_rank(folder):
        facts = probe(job, budget=budget * PROBE_SHARE, seed=seed, device=device, progress=progress)
        world = dist.get_world_size() if dist.is_initialized() else 1
        plan = make_plan(job, facts, goal=goal, devices=world, all_devices=True)
        if max_steps is not None:
            plan = dataclasses.replace(plan, steps=max_steps)
        callbacks = [] if progress is None else [lambda line: progress("train", line["step"] / plan.steps)]
        run = train(job, plan, out=folder, seed=seed, device=device, facts=facts, callbacks=callbacks)
    if is_main():
        write_atomic(folder / FACTS_FILE, facts.to_json())
        write_atomic(folder / PLAN_FILE, plan.to_json())
        report(run, folder / REPORT_FILE)
    if verify:
        sizes = around(plan.batch_size, len(job.train))
        aimed = dataclasses.replace(job, target=facts.target)
        sweep(aimed, batch_sizes=sizes, out=folder / STUDY_FOLDER, seed=seed, facts=facts, progress=progress)
        report(run, folder / REPORT_FILE)
    return run


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
