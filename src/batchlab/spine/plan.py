"""`plan`: from facts to what to run. Every number is chosen by a rule, and says by which."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts
from batchlab.core.job import Job
from batchlab.core.plan import FrontierRow, Plan, Reason
from batchlab.optim.create import defaults
from batchlab.planner import batch as goals
from batchlab.planner import cadence
from batchlab.planner.frontier import device_grid, frontier, size_grid, size_range
from batchlab.rules import learning_rate as lr_rules
from batchlab.rules import weight_decay as decay_rules
from batchlab.rules.tradeoff import steps_ratio

MCCANDLISH = "McCandlish et al. 2018, arXiv 1812.06162"
POWER_LINES = "Bergsma et al. 2025, arXiv 2505.13738"
MEASURED, OURS, USER, TORCH = "measured", "batchlab", "user", "torch default"
SPLIT_COST = 1.05


def plan(
    job: Job,
    facts: Facts,
    *,
    goal: str = "balanced",
    devices: int = 1,
    batch_size: int | None = None,
) -> Plan:
    """Chooses the batch size for `goal`, and all that moves with it, from what was measured of `job`.

    goal: "time" for the least predicted time to the target, "cost" for the least device-seconds, "balanced" for the
    least product of the two, the knee at the critical batch size where there are devices enough (`planner.batch`).
    devices: the most devices, like the one that was measured, that may be used; the plan says how many it takes.
    batch_size: in examples over all devices; given, it is taken, on all `devices`, whatever the goal.

    Depends on nothing but its arguments. A noise scale that is not known leaves the batch at the measured base.
    Raises `InputError` for an unknown goal, facts of another job, a batch larger than the data set or smaller than
    the devices.
    """
    goals.check_goal(goal)
    _check(job, facts, devices, batch_size)
    known = _Known.of(facts)
    rows = _rows(facts, known, devices, batch_size)
    if batch_size is None:
        chosen = goals.pick(rows, goal, b_crit=known.b_crit)
    else:
        chosen = next(row for row in rows if (row.batch_size, row.devices) == (batch_size, devices))
    why = _Reasons()
    size = _batch(why, facts, known, rows, chosen, goal=goal, given=batch_size is not None)
    layout = _layout(why, facts, chosen)
    steps = _steps(why, facts, known, chosen, layout)
    optimizer = _optimizer(why, facts, known, chosen)
    why.keep("frontier", len(rows), "S(B)·t(B, n) and n times it, of each batch size and number of devices", OURS)
    return Plan(
        job=job.name,
        goal=goal,
        optimizer=facts.optimizer,
        target=facts.target,
        frontier=tuple(dataclasses.replace(row, picked=row is chosen) for row in rows),
        notes=_notes(facts, known, chosen, devices, batch_size),
        reasons=why.reasons,
        **(size | layout | steps | optimizer),
    )


class _Known(NamedTuple):
    """What the facts say of steps against batch size. b_crit: infinite where the noise scale is not known."""

    noise_known: bool
    b_crit: float
    b_crit_range: tuple[float, float]
    base_steps: float
    base_steps_low: float
    reached: bool

    @classmethod
    def of(cls, facts: Facts) -> _Known:
        noise, run = facts.noise_scale, facts.reference
        noise_known = noise.defined and noise.value > 0
        low = noise.low if noise.low > 0 else 0.0  # NaN also: not bounded from below
        high = noise.high if noise.high > 0 else math.inf
        reached = run.steps_to_target is not None
        at_reference = run.steps if run.steps_to_target is None else run.steps_to_target
        before = max((step for step, _ in run.evaluations if step < at_reference), default=0) if reached else run.steps
        b_crit = noise.value if noise_known else math.inf
        to_base = steps_ratio(facts.base_batch_size, run.batch_size, b_crit=b_crit)
        return cls(noise_known, b_crit, (low, high), at_reference * to_base, (before + 1) * to_base, reached)


class _Reasons:
    """Keeps each number with its reason, and hands the number on."""

    def __init__(self) -> None:
        self.reasons: dict[str, Reason] = {}

    def keep(self, name: str, value: Any, rule: str, source: str, **inputs: Any) -> Any:
        plain = list(value) if isinstance(value, tuple) else value.value if isinstance(value, Estimate) else value
        self.reasons[name] = Reason(rule, source, inputs, plain)
        return value


def _rows(facts: Facts, known: _Known, devices: int, batch_size: int | None) -> tuple[FrontierRow, ...]:
    base = min(facts.base_batch_size, facts.train_examples)
    sizes = {base, batch_size or base}
    if known.noise_known:
        sizes |= set(size_grid(*size_range(known.b_crit, facts.train_examples)))
    largest = max(sizes)
    counts = device_grid(devices) if devices <= largest else [n for n in device_grid(devices) if n <= largest]
    b_crit = known.b_crit
    return frontier(facts, b_crit=b_crit, base_steps=known.base_steps, batch_sizes=sorted(sizes), devices=counts)


def _batch(
    why: _Reasons,
    facts: Facts,
    known: _Known,
    rows: Sequence[FrontierRow],
    chosen: FrontierRow,
    *,
    goal: str,
    given: bool,
) -> dict[str, Any]:
    if given:
        rule, source, inputs = "given by the user", USER, {}
    elif not known.noise_known:
        rule, source = "the base batch size: no noise scale to move it by", MEASURED
        inputs = {"base_batch_size": facts.base_batch_size, "noise_scale": str(facts.noise_scale.value)}
    else:
        rule, source = goals.RULES[goals.check_goal(goal)], MCCANDLISH
        inputs = {"goal": goal, "b_crit": known.b_crit, "predicted_seconds": chosen.time, "choices": len(rows)}
    sizes = [row.batch_size for row in rows if row.devices == chosen.devices]
    bound = "B_crit/8 to 4·B_crit within the data set, and what was chosen" if known.noise_known else "as planned"
    result = {
        "batch_size": why.keep("batch_size", chosen.batch_size, rule, source, **inputs),
        "min_batch_size": why.keep(
            "min_batch_size", min(sizes), bound, MCCANDLISH, train_examples=facts.train_examples
        ),
        "max_batch_size": why.keep(
            "max_batch_size", max(sizes), bound, MCCANDLISH, train_examples=facts.train_examples
        ),
        "world_size": why.keep("world_size", chosen.devices, rule, source, **inputs),
    }
    if known.noise_known:
        noise = facts.noise_scale
        inputs = {"low": noise.low, "high": noise.high} if math.isfinite(noise.low + noise.high) else {}
        result["noise_scale"] = why.keep("noise_scale", noise, noise.method, MEASURED, **inputs)
    return result


def _layout(why: _Reasons, facts: Facts, chosen: FrontierRow) -> dict[str, Any]:
    """Micro-batches: the fastest measured; halved where that hardly costs time and lets the noise be measured."""
    share = math.ceil(chosen.batch_size / chosen.devices)
    micro, rule = (
        facts.best_micro_batch(share),
        "the measured size that works through a device's share in the least time",
    )
    if chosen.devices == 1 and micro == share > 1:
        half = math.ceil(share / 2)
        if facts.step_time(share, 1, half) <= SPLIT_COST * facts.step_time(share, 1, micro):
            micro, rule = half, "half the batch, so that the noise can be measured: under 5 % slower than whole"
    passes = math.ceil(share / micro)
    seconds = facts.step_time(chosen.batch_size, chosen.devices, micro)
    widest = min(facts.micro_batches, key=lambda point: point.seconds.value / point.examples).examples
    evaluation = min(widest, facts.max_micro_batch)
    inputs = {"share": share, "max_micro_batch": facts.max_micro_batch}
    return {
        "micro_batch": why.keep("micro_batch", micro, rule, MEASURED, **inputs),
        "accumulation": why.keep(
            "accumulation", passes, "ceil(share / micro_batch)", "arithmetic", share=share, micro_batch=micro
        ),
        "measure_noise": passes * chosen.devices > 1,
        "predicted_step_seconds": why.keep(
            "predicted_step_seconds",
            seconds,
            "passes of the slowest device and one optimizer step; no communication",
            MEASURED,
            update_seconds=facts.update_seconds.value,
            accumulation=passes,
        ),
        "evaluation_batch": why.keep(
            "evaluation_batch", evaluation, "the measured micro-batch with the most examples a second", MEASURED
        ),
    }


def _steps(why: _Reasons, facts: Facts, known: _Known, chosen: FrontierRow, layout: dict[str, Any]) -> dict[str, Any]:
    seconds = layout["predicted_step_seconds"]
    predicted = _predicted_steps(facts, known, chosen)
    result: dict[str, Any] = {}
    if known.reached:
        rule = "S(B) = S(B₀)·(1 + B_crit/B)/(1 + B_crit/B₀)"
        inputs = {"base_steps": known.base_steps, "base_batch_size": facts.base_batch_size}
        if known.noise_known:
            inputs["b_crit"] = known.b_crit
        result["predicted_steps"] = why.keep("predicted_steps", predicted, rule, MCCANDLISH, **inputs)
    steps = predicted.value
    every = cadence.evaluate_every(steps, step_seconds=seconds, evaluation_seconds=facts.evaluation_seconds)
    save = cadence.checkpoint_every(steps, step_seconds=seconds, evaluate_every=every)
    basis = {"predicted_steps" if known.reached else "steps_at_least": steps}
    result["steps"] = why.keep("steps", cadence.most_steps(steps), "4 x the predicted steps", OURS, **basis)
    result["evaluate_every"] = why.keep(
        "evaluate_every",
        every,
        "30 evaluations in the predicted steps; down to 10 where evaluating takes over half the time",
        OURS,
        evaluation_seconds=facts.evaluation_seconds,
        **basis,
    )
    result["checkpoint_every"] = why.keep(
        "checkpoint_every", save, "a fifth of the predicted steps or ten minutes, the lesser", OURS, **basis
    )
    return result


def _predicted_steps(facts: Facts, known: _Known, chosen: FrontierRow) -> Estimate:
    """Steps to the target, its interval carried over from the noise scale's and the reference's evaluations."""
    ends = [steps_ratio(chosen.batch_size, facts.base_batch_size, b_crit=end) for end in known.b_crit_range]
    value = chosen.steps
    low, high = min(known.base_steps_low * min(ends), value), max(known.base_steps * max(ends), value)
    method = (
        "trade-off law from one reference run; the interval carries the noise scale's own and the spacing of the "
        "reference's evaluations, not the spread between seeds"
    )
    return Estimate(value, low, high, method, facts.noise_scale.coverage)


def _optimizer(why: _Reasons, facts: Facts, known: _Known, chosen: FrontierRow) -> dict[str, Any]:
    base, size, rate = facts.base_batch_size, chosen.batch_size, facts.base_learning_rate
    noise = known.b_crit if known.noise_known else None
    choice = lr_rules.for_optimizer(facts.optimizer, rate, base, size, noise_scale=noise)
    inputs = {"base_learning_rate": rate, "base_batch_size": base, "batch_size": size}
    why.keep(
        "learning_rate",
        choice.learning_rate,
        f"{choice.rule}: {choice.formula}",
        choice.source,
        **(inputs if noise is None else inputs | {"noise_scale": noise}),
    )
    warmup, power = facts.reference.warmup_examples, facts.reference.average_power
    why.keep("warmup_examples", warmup, "as many examples as in the reference run", OURS)
    if power is not None:
        why.keep("average_power", power, "the weights' average of the reference run, the same at any batch size", OURS)
    return {
        "learning_rate": choice.learning_rate,
        "learning_rate_rule": choice.rule,
        "warmup_examples": warmup,
        "average_power": power,
        "hyperparameters": _hyperparameters(why, facts, known, chosen, choice.learning_rate),
    }


def _hyperparameters(
    why: _Reasons, facts: Facts, known: _Known, chosen: FrontierRow, learning_rate: float
) -> dict[str, Any]:
    """torch's defaults, with which the reference ran; AdamW's weight decay moved to keep its timescale."""
    settings = defaults(facts.optimizer)
    for name, value in settings.items():
        why.keep(name, value, "kept as in the reference run", TORCH)
    if facts.optimizer == "adamw" and settings["weight_decay"] > 0:
        base, size = facts.base_batch_size, chosen.batch_size
        base_run, run = known.base_steps * base, chosen.steps * size
        tau = decay_rules.timescale(
            batch_size=base,
            learning_rate=facts.base_learning_rate,
            weight_decay=settings["weight_decay"],
            total_examples=max(base_run, base),
        )
        moved = decay_rules.from_timescale(
            tau, batch_size=size, learning_rate=learning_rate, total_examples=max(run, size)
        )
        settings["weight_decay"] = why.keep(
            "weight_decay",
            moved,
            "λ = B/(η·D·τ), τ = B₀/(η₀·λ₀·D₀) held",
            POWER_LINES,
            tau=tau,
            base_weight_decay=settings["weight_decay"],
            total_examples=run,
        )
    return settings


def _notes(facts: Facts, known: _Known, chosen: FrontierRow, devices: int, batch_size: int | None) -> tuple[str, ...]:
    notes = []
    if not known.noise_known:
        notes.append(
            f"the noise scale is not known ({facts.noise_scale.method}): the batch size stays at the base, "
            "and the learning rate moves by the rule for batches far below it"
        )
    elif math.isinf(facts.noise_scale.high):
        notes.append("the data do not bound the noise scale from above: larger batches may pay more than predicted")
    if not known.reached:
        notes.append(
            f"the reference run did not reach the target in {facts.reference.steps} updates: "
            "steps and times of the frontier are lower bounds, good only for comparing batch sizes"
        )
    if chosen.devices < devices:
        notes.append(f"{chosen.devices} of {devices} devices serve this goal best; communication was not measured")
    elif devices > 1:
        notes.append("communication between devices was not measured and is not in the times")
    if batch_size is not None and known.noise_known:
        lowest, highest = size_range(known.b_crit, facts.train_examples)
        if not lowest <= batch_size <= highest:
            notes.append(f"batch size {batch_size} lies outside {lowest}..{highest}, where the rules are trusted")
    return tuple(notes)


def _check(job: Job, facts: Facts, devices: int, batch_size: int | None) -> None:
    for name, mine, theirs in (
        ("name", job.name, facts.job),
        ("optimizer", job.optimizer, facts.optimizer),
        ("train examples", len(job.train), facts.train_examples),
        ("target", job.target or facts.target, facts.target),
    ):
        if mine != theirs:
            raise InputError(f"facts were measured for the {name} {theirs!r}, this job has {mine!r}: probe it again")
    lr_rules.family(facts.optimizer)
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise InputError(f"devices must be an integer of at least 1, got {devices!r}")
    if batch_size is not None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if batch_size > facts.train_examples:
            raise InputError(
                f"batch_size must be at most the data set's {facts.train_examples} examples, got {batch_size}"
            )
        if batch_size < devices:
            raise InputError(f"batch_size must give each of {devices} devices an example, got {batch_size}")
    if facts.reference.steps_to_target is not None and facts.reference.steps_to_target < 1:
        raise InputError("the target is met before any training: choose a harder target")
