"""`probe`: measures memory, speed, a good learning rate and the gradient noise scale of a job, on fresh models."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts, LearningRateTrial, NoisePoint, Reference
from batchlab.core.job import Job, Target
from batchlab.core.jsonio import from_plain
from batchlab.core.plan import Plan
from batchlab.core.provenance import machine
from batchlab.core.random import derive_seed, preserved_generators
from batchlab.measure.learning_rate import Choice
from batchlab.measure.memory import MicroBatch, find_micro_batch
from batchlab.measure.order import median_interval
from batchlab.measure.run_noise import run_noise_scale
from batchlab.measure.throughput import Throughput, throughput
from batchlab.optim.create import check_name
from batchlab.parallel.agree import from_first_rank
from batchlab.spine.base_rate import Spread, base_rate, check_first_loss
from batchlab.spine.reference import Course, derived_target, run_reference, run_restart
from batchlab.spine.stopwatch import Progress, Stopwatch

MEMORY_UNTIL, SPEED_UNTIL, RATE_UNTIL, REFERENCE_UNTIL = 0.08, 0.18, 0.5, 0.85
BASE_BATCH, LEAST_BASE_BATCH, DATA_SHARE = 64, 8, 10
PIECES, WARMUP_UPDATES, AVERAGE_POWER = 8, 8, 4.0
WANTED_UPDATES = 300
EVALUATION_SHARE, FORWARD_SHARE = 0.003, 0.4
MOST_RUNS, RESTART_FACTOR, MOST_POINTS = 5, 1.5, 60


def probe(
    job: Job,
    *,
    budget: float = 20.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Measures what `plan` needs to know of `job` on this machine, in about `budget` seconds.

    In turn, each on fresh models: the largest micro-batch and the time of steps (18 % of the budget); a learning rate
    at the base batch size (to 50 %); the reference run there, along which the noise scale is measured, until the loss
    has flattened (to 85 %); the same again with other seeds up to the target, for the noise and the steps (the rest).
    What a phase leaves over the next may use. At least one of each step is run, however long it takes.

    seed: of weights, examples and all else random. device: the first GPU if there is one. progress: called as
    `progress(phase, fraction done)`. The caller's random generators are kept. Sizes depend on the clock: with another
    budget or load the runs may be shorter, and `facts.notes` says what was cut.

    Under an initialised process group every rank calls it; all get the first rank's facts, bit for bit.
    Raises `InputError` for what cannot be measured: a loss that is not finite, a metric that is not there.
    """
    where = _check(job, budget, seed, device)
    watch = Stopwatch(budget, progress)
    with preserved_generators():
        found, speed = _speed(job, watch, seed=seed, device=where)
        base, notes = _base_batch(job, speed, budget)
        plan = _plan(job, base, speed, found.size)
        check_first_loss(job, plan, seed=seed, device=where)
        choice, said = _learning_rate(job, plan, speed, found.size, watch, seed=seed, device=where)
        plan = dataclasses.replace(plan, learning_rate=choice.learning_rate)
        courses, target = _reference(job, plan, speed, watch, seed=seed, device=where)
        facts = _facts(job, plan, found, speed, choice, courses, target, notes + said, seed=seed, device=where)
        return from_plain(Facts, from_first_rank(facts))


def _check(job: Job, budget: float, seed: int, device: str | torch.device | None) -> torch.device:
    if not isinstance(job, Job):
        raise InputError(f"job must be a batchlab.Job, got {type(job).__name__}")
    if not 0 < budget < math.inf:
        raise InputError(f"budget must be finite and > 0 seconds, got {budget!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, got {seed!r}")
    check_name(job.optimizer)
    if len(job.train) < 2 * _world():
        raise InputError(
            f"job train has {len(job.train)} examples: the noise scale needs at least {2 * _world()}, two a device"
        )
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _speed(job: Job, watch: Stopwatch, *, seed: int, device: torch.device) -> tuple[MicroBatch, Throughput]:
    """The largest micro-batch to use, and the time of powers of two up to it."""
    watch.report("memory and speed", 0.0)
    found = find_micro_batch(job, device=device, seconds=MEMORY_UNTIL * watch.budget, seed=seed)
    watch.report("memory and speed", 0.5)
    sizes = {2**k for k in range(found.size.bit_length())} | {found.size}
    seconds = max(watch.left(SPEED_UNTIL), 0.02 * watch.budget)
    peaks = {each.size: each.peak_bytes for each in found.tries if each.fits}
    local = throughput(job, sorted(sizes), seconds=seconds, device=device, seed=seed, memory_bytes=peaks)
    watch.report("memory and speed", 1.0)
    return found, from_plain(Throughput, from_first_rank(local))


def _base_batch(job: Job, speed: Throughput, budget: float) -> tuple[int, list[str]]:
    """The base batch size: 64, or the power of two below a tenth of the data; halved while updates are too slow."""
    least = max(LEAST_BASE_BATCH, 2 * _world())
    base = min(BASE_BATCH, _power_of_two(len(job.train) / DATA_SHARE))
    base = min(max(base, least), len(job.train))
    wished = base
    while base >= 2 * least and WANTED_UPDATES * _update_seconds(speed, base, base) > budget:
        base //= 2
    why = "64, or the power of two below a tenth of the training data if that is less"
    if base < wished:
        why = f"halved from {wished} until {WANTED_UPDATES} updates fit in the budget, or to {least}"
    return base, [f"base batch size {base}: {why}"]


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def _update_seconds(speed: Throughput, batch: int, micro_batch: int) -> float:
    """Seconds of an update with micro-batches of about `micro_batch`, by the nearest measured size below."""
    point = max((p for p in speed.micro_batches if p.examples <= micro_batch), key=lambda p: p.examples)
    share = math.ceil(batch / _world())
    return share / point.examples * point.seconds.value + speed.update.value


def _plan(job: Job, base: int, speed: Throughput, largest: int) -> Plan:
    """How the short runs and the reference run train; `plan` makes the user's own run alike."""
    micro = min(max(1, base // max(PIECES, 2 * _world())), largest)
    return Plan(
        job=job.name,
        goal="probe",
        batch_size=base,
        micro_batch=micro,
        accumulation=math.ceil(math.ceil(base / _world()) / micro),
        world_size=_world(),
        steps=10**6,
        optimizer=job.optimizer,
        learning_rate=1e-3,
        warmup_examples=WARMUP_UPDATES * base,
        average_power=AVERAGE_POWER,
        evaluation_batch=min(speed.saturates_at, largest),
    )


def _evaluation_seconds(job: Job, speed: Throughput) -> float:
    """What one evaluation is expected to take: a forward pass is about 40 % of a training one."""
    best = min(point.seconds.value / point.examples for point in speed.micro_batches)
    return FORWARD_SHARE * best * len(job.valid) / _world()


def _learning_rate(
    job: Job, plan: Plan, speed: Throughput, largest: int, watch: Stopwatch, *, seed: int, device: torch.device
) -> tuple[Choice, list[str]]:
    """Short runs in whole micro-batches, on as much of the validation data as their time allows."""
    watch.report("learning rate", 0.0)
    micro = min(math.ceil(plan.batch_size / _world()), largest)
    passes = math.ceil(math.ceil(plan.batch_size / _world()) / micro)
    bare = dataclasses.replace(plan, micro_batch=micro, accumulation=passes, measure_noise=False)
    full, allowed, notes = _evaluation_seconds(job, speed), EVALUATION_SHARE * watch.budget, []
    evaluation = min(full, allowed)
    if full > allowed:
        count = max(_world(), min(len(job.valid), math.ceil(len(job.valid) * allowed / full)))
        job = dataclasses.replace(job, valid=Spread(job.valid, count))
        notes = [f"learning rates were compared on {count} of the validation examples, for time"]
    seconds = _update_seconds(speed, plan.batch_size, micro) + evaluation
    choice, said = base_rate(job, bare, watch, until=RATE_UNTIL, update_seconds=seconds, seed=seed, device=device)
    return choice, notes + said


def _reference(
    job: Job, plan: Plan, speed: Throughput, watch: Stopwatch, *, seed: int, device: torch.device
) -> tuple[list[Course], Target]:
    """The reference run, the target it sets, and as many runs to that target as the budget allows."""
    every = max(1, round(_evaluation_seconds(job, speed) / _update_seconds(speed, plan.batch_size, plan.micro_batch)))
    first = run_reference(job, plan, watch, until=REFERENCE_UNTIL, seed=seed, device=device, every=every)
    target = job.target or derived_target(first.evaluations)
    courses, steps = [first], first.steps_to(target)
    if steps == 0:
        raise InputError(
            f"the target {target.metric} of {target.value:g} is met before any update: choose a harder one"
        )
    while steps is not None and len(courses) < MOST_RUNS and watch.left() > 1.1 * _seconds_to(first, steps):
        most = math.ceil(RESTART_FACTOR * steps)
        again = derive_seed(seed, "restart", len(courses)) >> 1
        courses.append(run_restart(job, plan, target, most, watch, until=1.0, seed=again, device=device, every=every))
        watch.report("more runs", len(courses) / MOST_RUNS)
    watch.report("more runs", 1.0)
    return courses, target


def _seconds_to(course: Course, steps: int) -> float:
    return course.seconds * steps / course.evaluations[-1][0]


def _facts(
    job: Job,
    plan: Plan,
    found: MicroBatch,
    speed: Throughput,
    choice: Choice,
    courses: Sequence[Course],
    target: Target,
    notes: list[str],
    *,
    seed: int,
    device: torch.device,
) -> Facts:
    first = courses[0]
    reached = [course.steps_to(target) for course in courses]
    known = [steps for steps in reached if steps is not None]
    steps = statistics.median_high(known) if 2 * len(known) > len(reached) else None
    noise = run_noise_scale([c.pairs[: c.steps_to(target)] for c in courses], plan.batch_size)
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
        update_seconds=_other_seconds(first, plan, speed),
        base_batch_size=plan.batch_size,
        base_learning_rate=choice.learning_rate,
        learning_rate_trials=tuple(LearningRateTrial(t.learning_rate, t.loss) for t in choice.trials),
        reference=Reference(
            batch_size=plan.batch_size,
            learning_rate=choice.learning_rate,
            steps=first.evaluations[-1][0],
            seconds=first.seconds,
            steps_to_target=steps,
            evaluations=tuple(first.evaluations),
            warmup_examples=plan.warmup_examples,
            average_power=plan.average_power,
        ),
        target=target,
        target_origin=origin,
        evaluation_seconds=statistics.median(first.evaluation_seconds),
        notes=(*notes, *_said(first, target, origin, reached, found)),
        seed=seed,
    )


def _units(job: Job) -> float:
    if not callable(job.units_per_example):
        return float(job.units_per_example)
    from batchlab.data.fetch import fetch

    count = min(64, len(job.train))
    return job.units_per_example(fetch(job.train, list(range(count)), job.collate)) / count


def _other_seconds(course: Course, plan: Plan, speed: Throughput) -> Estimate:
    """What an update takes beside its passes, from the reference run; the optimizer's step alone where that is more."""
    by_size = {point.examples: point.seconds.value for point in speed.micro_batches}
    if plan.micro_batch not in by_size or len(course.update_seconds) < 6:
        return speed.update
    passes = plan.accumulation * by_size[plan.micro_batch]
    rest = [seconds - passes for seconds in course.update_seconds[1:]]
    estimate = median_interval(rest, method="updates of the reference run less their passes")
    return estimate if estimate.low > 0 else speed.update


def _thinned(points: Sequence[NoisePoint]) -> tuple[NoisePoint, ...]:
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return tuple(points[every - 1 :: every])


def _said(first: Course, target: Target, origin: str, reached: Sequence[int | None], found: MicroBatch) -> list[str]:
    notes = [f"micro-batches up to {found.size}: {found.why}"]
    if origin != "job":
        initial, best = first.evaluations[0][1], min(value for _, value in first.evaluations)
        notes.append(
            f"the job has no target: validation loss {target.value:.4g} is taken, where the reference run had made "
            f"95 % of its improvement from {initial:.4g} to {best:.4g}"
        )
    if first.stopped == "budget":
        notes.append(
            f"the budget ended the reference run after {first.evaluations[-1][0]} updates, before it had flattened: "
            "a larger budget may set a harder target and find a larger noise scale"
        )
    if len(reached) > 1:
        steps = ", ".join("not" if each is None else str(each) for each in reached)
        notes.append(
            f"updates to the target at the base batch size with {len(reached)} seeds: {steps}; the median counts"
        )
    return notes
