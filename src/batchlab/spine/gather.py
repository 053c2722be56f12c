"""From what a probe measured to its `Facts`, with the notes that say what was chosen and what was cut."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from batchlab.core.facts import Estimate, Facts, LearningRateTrial, NoisePoint, Reference
from batchlab.core.job import Job, Target
from batchlab.core.plan import Plan
from batchlab.core.provenance import machine
from batchlab.data.fetch import fetch
from batchlab.measure.course.learning_rate import Choice
from batchlab.measure.memory.micro_batch import MicroBatch
from batchlab.measure.noise.run_level import run_level
from batchlab.measure.speed.step_time import Throughput
from batchlab.spine.evaluate import units_of
from batchlab.spine.reference import FEWEST_STEPS, Course

MOST_POINTS = 60
WIDE = 3.0


def gather(
    job: Job,
    plan: Plan,
    found: MicroBatch,
    speed: Throughput,
    choice: Choice,
    courses: Sequence[Course],
    target: Target,
    notes: list[str],
    warnings: list[str],
    *,
    seed: int,
    device: torch.device,
) -> Facts:
    """The facts of a probe. courses: the reference run, then runs like it up to the target with other seeds."""
    first = courses[0]
    reached = [course.steps_to(target) for course in courses]
    known = [steps for steps in reached if steps is not None]
    telling = job.target is not None or first.evaluations[-1][0] >= FEWEST_STEPS
    steps = statistics.median_high(known) if telling and 2 * len(known) > len(reached) else None
    noise = run_level([c.pairs[: c.steps_to(target)] for c in courses], plan.batch_size)
    origin = "job" if job.target else "reference run"
    return Facts(
        job=job.name,
        unit=job.unit,
        units_per_example=_units(job),
        train_examples=len(job.train),
        optimizer=job.optimizer,
        device=str(device),
        machine=machine(),
        noise_scale=noise,
        noise=_thinned(first.points),
        micro_batches=speed.micro_batches,
        max_micro_batch=max(point.examples for point in speed.micro_batches),
        update_seconds=speed.update,
        base_batch_size=plan.batch_size,
        base_learning_rate=plan.learning_rate,
        learning_rate_trials=tuple(LearningRateTrial(t.learning_rate, t.loss) for t in choice.trials),
        reference=Reference(
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            steps=first.evaluations[-1][0],
            seconds=first.seconds,
            steps_to_target=steps,
            evaluations=tuple(first.evaluations),
            warmup_examples=plan.warmup_examples,
            average_power=plan.average_power,
            steps_by_seed=tuple(reached),
        ),
        target=target,
        target_origin=origin,
        evaluation_seconds=statistics.median(first.evaluation_seconds),
        warnings=(*warnings, *_warned(first, origin, reached, steps), *_unsure(noise)),
        notes=(*_of_data(job), *notes, *_said(courses, target, origin, reached, found)),
        seed=seed,
    )


def _of_data(job: Job) -> list[str]:
    """What the ready jobs say of the user's files: rows and files left out, and the like."""
    notes = [*getattr(job.train, "notes", ()), *getattr(job.valid, "notes", ())]
    return list(dict.fromkeys(note for note in notes if isinstance(note, str)))


def _units(job: Job) -> float:
    if not callable(job.units_per_example):
        return float(job.units_per_example)
    count = min(64, len(job.train))
    return units_of(job, fetch(job.train, list(range(count)), job.collate), count) / count


def _thinned(points: Sequence[NoisePoint]) -> tuple[NoisePoint, ...]:
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return tuple(points[every - 1 :: every])


def _said(
    courses: Sequence[Course], target: Target, origin: str, reached: Sequence[int | None], found: MicroBatch
) -> list[str]:
    """How the target, the steps and the largest micro-batch came about."""
    notes = [f"micro-batches up to {found.size}: {found.why}"]
    if origin != "job":
        initial, count = min(course.evaluations[0][1] for course in courses), len(courses)
        runs = "the reference run" if count == 1 else f"of {count} reference runs the one that came least far"
        notes.append(
            f"the job has no target: validation loss {target.value:.4g} is taken, at which {runs} had made 95 % of its "
            f"improvement from {initial:.4g}, where the best of them began"
        )
    if len(reached) > 1 and any(reached):
        steps = ", ".join("not" if each is None else str(each) for each in reached)
        notes.append(
            f"updates to the target at the base batch size with {len(reached)} seeds: {steps}; the median counts"
        )
    return notes


def _unsure(noise: Estimate) -> list[str]:
    """Where the plan's batch size rests on little: an end of the interval more than three times away."""
    if not noise.defined or (noise.low * WIDE >= noise.value and noise.high <= WIDE * noise.value):
        return []
    return [
        f"the noise scale is known no closer than {noise.low:.3g} to {noise.high:.3g} examples: a larger budget fits "
        "more runs, and narrows it"
    ]


def _warned(first: Course, origin: str, reached: Sequence[int | None], to_target: int | None) -> list[str]:
    """What the budget cut short, and what came out otherwise than it should."""
    steps, warnings = first.evaluations[-1][0], []
    short = origin != "job" and steps < FEWEST_STEPS
    if first.stopped == "budget" and origin != "job":
        warnings.append(
            f"the budget ended the reference run after {steps} updates, before it had flattened: a larger budget may "
            "set a harder target and find a larger noise scale"
        )
    if short:
        warnings.append(f"{steps} updates set no target that is worth the name: steps are not predicted from them")
    elif to_target is None:
        met = sum(each is not None for each in reached)
        warnings.append(f"{met} of {len(reached)} reference runs met the target in {steps} updates: steps are unknown")
    return warnings
