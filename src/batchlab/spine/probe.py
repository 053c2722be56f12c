"""`probe`: measures memory, speed, a good learning rate and the gradient noise scale of a job, on fresh models."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
import torch.distributed as dist

from batchlab.core.checks import holds, is_whole
from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts
from batchlab.core.job import Job, Target
from batchlab.core.jsonio import from_plain
from batchlab.core.model import check_fresh, least_examples, make_model
from batchlab.core.plan import Plan
from batchlab.core.random import derive_seed, preserved_generators
from batchlab.measure.course.learning_rate import Choice
from batchlab.measure.memory.micro_batch import MicroBatch, find_micro_batch
from batchlab.measure.order import median_interval
from batchlab.measure.speed.step_time import Throughput, throughput
from batchlab.optim.by_name import check_name, first_step
from batchlab.parallel.agree import from_first_rank
from batchlab.spine.base_rate import Spread, base_rate, check_first_loss
from batchlab.spine.gather import gather
from batchlab.spine.reference import Course, derived_target, run_reference, run_restart, time_updates
from batchlab.spine.stopwatch import Progress, Stopwatch

if TYPE_CHECKING:
    from batchlab.core.run import Run
    from batchlab.measure.findings import Findings

MEMORY_UNTIL, SPEED_UNTIL, RATE_UNTIL, REFERENCE_UNTIL = 0.08, 0.18, 0.5, 0.85
BASE_BATCH, LEAST_BASE_BATCH, DATA_SHARE = 64, 8, 10
PIECES, WARMUP_UPDATES, AVERAGE_POWER = 8, 8, 4.0
WANTED_UPDATES = 300
TIMED_UPDATES, FEWEST_TIMED, UPDATE_SHARE = 20, 6, 0.03
# A run held too hot has too small a noise scale (McCandlish et al. 2018, temperature). On digits to a loss of 0.22,
# seeds 0 to 4, at half the best rate of short runs: 51, 54, 49, 52, 40 and a mean of 17.0 updates; at that rate
# itself: 36, 39, 34, 38, 42 and 17.8. Sweeps with these seeds measure a critical batch size of 59, 64, 77, 56, 77.
RATE_SHARE = 0.5
EVALUATION_SHARE, FORWARD_SHARE = 0.003, 0.4
MOST_RUNS, RESTART_FACTOR = 5, 3


@overload
def probe(
    job: Job,
    *,
    budget: float = 20.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    only: None = None,
    at: None = None,
) -> Facts: ...


@overload
def probe(
    job: Job,
    *,
    budget: float = 20.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    only: Sequence[str],
    at: Run | None = None,
) -> Findings: ...


def probe(
    job: Job,
    *,
    budget: float = 20.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    only: Sequence[str] | None = None,
    at: Run | None = None,
) -> Facts | Findings:
    """Measures what `plan` needs to know of `job` on this machine, in about `budget` seconds.

    In turn, each on fresh models: the largest micro-batch and the time of steps (18 % of the budget); a learning rate
    at the base batch size (to 50 %); the reference run there, along which the noise scale is measured, until the loss
    has flattened (to 85 %); the same again with other seeds, which pools the noise and the steps (the rest).
    What a phase leaves over the next may use. At least one of each step is run, however long it takes.

    seed: of weights, examples and all else random; `train` with the same seed draws others, so that a run tells
    something new. device: the first GPU if there is one. progress: called as
    `progress(phase, fraction done)`. The caller's random generators are kept. Sizes depend on the clock: with another
    budget or load the runs may be shorter, and `facts.warnings` says what was cut.

    only: in place of all that, single facts, as `Findings`: some of "noise", "memory", "curvature", "energy" and
    "landscape", the budget shared out evenly. at: a run of the job at whose weights they are measured, instead of
    fresh ones.

    Under an initialised process group every rank calls it; all get the first rank's facts, bit for bit.
    Raises `InputError` for what cannot be measured: a loss that is not finite, a metric that is not there.
    """
    where, seed = _check(job, budget, seed, device), operator.index(seed)
    if only is not None:
        from batchlab.spine.findings import findings

        return findings(job, only, at=at, budget=budget, seed=seed, device=where, progress=progress)
    if at is not None:
        raise InputError("at is for only=...: all that a plan needs is measured on fresh weights")
    own = derive_seed(seed, "probe") >> 1
    with preserved_generators():
        check_fresh(job)
        first_step(job.optimizer)
        watch = Stopwatch(budget, progress)
        least = least_examples(make_model(job))
        found, speed = _speed(job, watch, least=least, seed=own, device=where)
        base, notes = _base_batch(job, speed, budget)
        plan = _plan(job, base, speed, least=least, largest=found.size)
        check_first_loss(job, plan, seed=own, device=where)
        choice, said, warned = _learning_rate(job, plan, speed, found.size, watch, seed=own, device=where)
        plan = dataclasses.replace(plan, learning_rate=choice.learning_rate)
        update, noise_seconds = _other_seconds(job, plan, speed, watch, seed=own, device=where)
        courses, target = _reference(job, plan, speed, watch, seed=own, device=where)
        speed = dataclasses.replace(speed, update=update)
        facts = gather(job, plan, found, speed, choice, courses, target, notes + said, warned, seed=seed, device=where)
        facts = dataclasses.replace(facts, noise_seconds=noise_seconds, batch_norm=least > 1)
        return from_plain(Facts, from_first_rank(facts))


def _check(job: Job, budget: float, seed: int, device: str | torch.device | None) -> torch.device:
    if not isinstance(job, Job):
        raise InputError(f"job must be a batchlab.Job, got {type(job).__name__}")
    if not holds(lambda value: 0 < value < math.inf, budget):
        raise InputError(f"budget must be finite and > 0 seconds, got {budget!r}")
    if not is_whole(seed):
        raise InputError(f"seed must be an integer, got {seed!r}")
    check_name(job.optimizer)
    if len(job.train) < 2 * _world():
        raise InputError(
            f"job train has {len(job.train)} examples: the noise scale needs at least {2 * _world()}, two a device"
        )
    return pick_device(device)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _speed(job: Job, watch: Stopwatch, *, least: int, seed: int, device: torch.device) -> tuple[MicroBatch, Throughput]:
    """The largest micro-batch to use, and the time of powers of two up to it, from the least that can be trained on."""
    watch.report("memory and speed", 0.0)
    found = find_micro_batch(job, device=device, seconds=MEMORY_UNTIL * watch.budget, seed=seed)
    watch.report("memory and speed", 0.5)
    sizes = {2**k for k in range(least - 1, found.size.bit_length())} | {found.size}
    seconds = max(watch.left(SPEED_UNTIL), 0.02 * watch.budget)
    peaks = {each.size: each.peak_bytes for each in found.tries if each.fits}
    local = throughput(job, sorted(sizes), seconds=seconds, device=device, seed=seed, memory_bytes=peaks)
    watch.report("memory and speed", 1.0)
    return found, from_plain(Throughput, from_first_rank(local))


def _base_batch(job: Job, speed: Throughput, budget: float) -> tuple[int, list[str]]:
    """The base batch size: 64, or the power of two below a tenth of the data, but no less than 8 or two a device.

    Halved while updates are too slow.
    """
    least = max(LEAST_BASE_BATCH, 2 * _world())
    base = min(BASE_BATCH, _power_of_two(len(job.train) / DATA_SHARE))
    base = min(max(base, least), len(job.train))
    wished = base
    while base >= 2 * least and WANTED_UPDATES * _update_seconds(speed, base, base) > budget:
        base //= 2
    why = f"64, or the power of two below a tenth of the training data if that is less, but no less than {least}"
    if base < wished:
        why = f"halved from {wished} until {WANTED_UPDATES} updates fit in the budget, or to {least}"
    return base, [f"base batch size {base}: {why}"]


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def _update_seconds(speed: Throughput, batch: int, micro_batch: int) -> float:
    """Seconds of an update with micro-batches of about `micro_batch`, by the nearest measured size below."""
    points = sorted(speed.micro_batches, key=lambda p: p.examples)
    point = max((p for p in points if p.examples <= micro_batch), key=lambda p: p.examples, default=points[0])
    share = math.ceil(batch / _world())
    return share / point.examples * point.seconds.value + speed.update.value


def _plan(job: Job, base: int, speed: Throughput, *, least: int, largest: int) -> Plan:
    """How the short runs and the reference run train; `plan` makes the user's own run alike."""
    pieces = PIECES if least == 1 else 2  # batch normalisation is over a piece: as few as tell the noise
    micro = min(max(least, base // max(pieces, 2 * _world())), largest)
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
) -> tuple[Choice, list[str], list[str]]:
    """Choice, notes, warnings: short runs in whole micro-batches, on as much validation data as their time allows."""
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
    choice, warnings = base_rate(job, bare, watch, until=RATE_UNTIL, update_seconds=seconds, seed=seed, device=device)
    if not math.isnan(choice.trials[0].loss):
        choice = dataclasses.replace(choice, learning_rate=RATE_SHARE * choice.learning_rate)
        notes.append(
            f"base learning rate {choice.learning_rate:.3g}: half of what short runs found best ({choice.why}): at "
            "the best rate itself the noise scale comes out too small"
        )
    return choice, notes, warnings


def _reference(
    job: Job, plan: Plan, speed: Throughput, watch: Stopwatch, *, seed: int, device: torch.device
) -> tuple[list[Course], Target]:
    """The reference run, as many more like it with other seeds as the budget allows, and the target."""
    every = max(1, round(_evaluation_seconds(job, speed) / _update_seconds(speed, plan.batch_size, plan.micro_batch)))
    before = watch.left()
    first = run_reference(job, plan, watch, until=REFERENCE_UNTIL, seed=seed, device=device, every=every)
    courses, took = [first], before - watch.left()
    length, steps = first.evaluations[-1][0], None if job.target is None else first.steps_to(job.target)
    most = length if steps is None else math.ceil(RESTART_FACTOR * steps)
    cost = took * min(1.0, (length if steps is None else steps) / length)
    while len(courses) < MOST_RUNS and watch.left() > 1.1 * cost:
        again = derive_seed(seed, "restart", len(courses)) >> 1
        course = run_restart(job, plan, watch, most=most, seed=again, device=device, every=every)
        watch.report("more runs", len(courses) / (MOST_RUNS - 1))
        if course.stopped == "budget":
            break
        courses.append(course)
    watch.report("more runs", 1.0)
    target = job.target or derived_target([course.evaluations for course in courses])
    if first.steps_to(target) == 0:
        raise InputError(
            f"the target {target.metric} of {target.value:g} is met before any update: choose a harder target"
        )
    return courses, target


def _other_seconds(
    job: Job, plan: Plan, speed: Throughput, watch: Stopwatch, *, seed: int, device: torch.device
) -> tuple[Estimate, Estimate | None]:
    """What an update takes beside its passes, and what measuring the noise adds to each pass.

    From updates of two passes as `train` does them, with and without the noise; where there was time for too few, the
    optimizer's step alone, and None.
    """
    by_size = {point.examples: point.seconds.value for point in speed.micro_batches}
    half = plan.batch_size // (2 * _world())
    size = max((size for size in by_size if size <= half), default=min(by_size))
    bare = dataclasses.replace(
        plan, batch_size=2 * size * _world(), micro_batch=size, accumulation=2, measure_noise=False
    )
    plans = [bare, dataclasses.replace(bare, measure_noise=True)]
    until = 1.0 - watch.left() / watch.budget + UPDATE_SHARE
    rounds = time_updates(job, plans, watch, until=until, count=TIMED_UPDATES, seed=seed, device=device)
    estimate, noise = speed.update, None
    if len(rounds) >= FEWEST_TIMED:
        rest = [plain - 2 * by_size[size] for plain, _ in rounds]
        whole_less_passes = median_interval(rest, method="whole updates less their passes")
        estimate = whole_less_passes if whole_less_passes.low > 0 else speed.update
        noise = median_interval(
            [(measured - plain) / 2 for plain, measured in rounds], method="updates with and without, per pass"
        )
    return estimate, noise
