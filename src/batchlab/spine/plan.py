"""`plan`: from facts to what to run. Every number is chosen by a rule, and says by which."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Facts
from batchlab.core.job import Job
from batchlab.core.plan import GIVEN, OURS, USER, FrontierRow, Plan
from batchlab.planner import batch as goals
from batchlab.planner import cadence
from batchlab.planner.frontier_rows import device_grid, frontier, size_grid, size_range
from batchlab.planner.prediction import Prediction
from batchlab.spine.foreseen import foreseen
from batchlab.spine.planned_optimizer import planned_optimizer
from batchlab.spine.reasons import Reasons

MCCANDLISH, MEASURED = "McCandlish et al. 2018, arXiv 1812.06162", "measured"
SPLIT_COST = 1.05


def plan(
    job: Job,
    facts: Facts,
    *,
    goal: str = "balanced",
    devices: int = 1,
    batch_size: int | None = None,
    all_devices: bool = False,
) -> Plan:
    """Chooses the batch size for `goal`, and all that moves with it, from what was measured of `job`.

    goal: "time" for the least predicted time to the target, "cost" for the least device-seconds, "balanced" for the
    least product of the two, the knee at the critical batch size where there are devices enough (`planner.batch`).
    devices: the most devices, like the one that was measured, that may be used; the plan says how many it takes.
    batch_size: in examples over all devices; given, it is taken, on all `devices`, whatever the goal.
    all_devices: no fewer than `devices`, as under torchrun, where the ranks are there already.

    Depends on nothing but its arguments. Where the noise scale is not known the batch stays at the measured base.
    Raises `InputError` for an unknown goal, facts of another job, a batch larger than the data set or smaller than
    the number of devices.
    """
    aim = goals.check_goal(goal)
    for name, value, noun in (("job", job, Job), ("facts", facts, Facts)):
        if not isinstance(value, noun):
            raise InputError(f"{name} must be a batchlab.{noun.__name__}, got {type(value).__name__}")
    _check(job, facts, devices, batch_size)
    fewest = 2 if facts.batch_norm else 1  # examples of a device: see core.model.least_examples
    devices, batch_size = int(devices), None if batch_size is None else int(batch_size)  # NumPy's integers too
    if all_devices and devices > facts.train_examples:
        raise InputError(f"devices must be at most the data set's {facts.train_examples} examples, got {devices}")
    prediction = Prediction.of(facts)
    rows = _rows(facts, prediction, devices, batch_size, fewest=fewest, all_devices=all_devices)
    if batch_size is None:
        choices = [row for row in rows if row.devices == devices] if all_devices else rows
        chosen = goals.pick(choices, aim, b_crit=prediction.b_crit)
    else:
        chosen = next(row for row in rows if (row.batch_size, row.devices) == (batch_size, devices))
    why = Reasons()
    size = _size(why, facts, prediction, rows, chosen, goal=None if batch_size else goal)
    layout = _layout(why, facts, chosen, whole=facts.batch_norm)
    length = _length(why, facts, prediction, chosen, layout)
    _courses(why, chosen, length)
    optimizer = planned_optimizer(why, facts, prediction, chosen, length["steps"])
    what = {name: optimizer[name] for name in ("optimizer", "learning_rate")} | {"target": str(facts.target)}
    why.add("predicted_steps", **what)
    why.keep("frontier", len(rows), "S(B)·t(B, n), and n times it, for each batch size and number of devices", OURS)
    made = Plan(
        job=job.name,
        goal=aim,
        target=facts.target,
        frontier=tuple(dataclasses.replace(row, picked=row is chosen) for row in rows),
        notes=tuple(_notes(facts, prediction, chosen, devices)),
        reasons=why.reasons,
        **(size | layout | length | optimizer),
    )
    return dataclasses.replace(made, notes=(*made.notes, *foreseen(made)))


def _rows(
    facts: Facts, prediction: Prediction, devices: int, batch_size: int | None, *, fewest: int, all_devices: bool
) -> tuple[FrontierRow, ...]:
    """The frontier. fewest: examples of a device. all_devices: so many for each, though the rules would have fewer."""
    base, least = min(facts.base_batch_size, facts.train_examples), fewest * (devices if all_devices else 1)
    sizes = {base, batch_size or base}
    if prediction.noise_known:
        sizes |= set(size_grid(*size_range(prediction.b_crit, facts.train_examples)))
    sizes |= {least} if max(sizes) < least <= facts.train_examples else set()
    counts = [count for count in device_grid(devices) if count <= max(sizes)]
    rows = frontier(facts, prediction, batch_sizes=sorted(sizes), devices=counts)
    given = batch_size, devices
    enough = [r for r in rows if r.batch_size >= fewest * r.devices or (r.batch_size, r.devices) == given]
    return tuple(enough) or rows


def _size(
    why: Reasons,
    facts: Facts,
    prediction: Prediction,
    rows: Sequence[FrontierRow],
    chosen: FrontierRow,
    *,
    goal: str | None,
) -> dict[str, Any]:
    """Batch size, devices and the bounds of an adaptive batch. goal: None where the user gave the batch."""
    inputs: dict[str, Any] = {"predicted_seconds": chosen.time, "choices": len(rows)}
    if goal is None:
        rule, source, inputs = GIVEN, USER, {}
    elif prediction.noise_known:
        rule, source = goals.RULES[goals.check_goal(goal)], MCCANDLISH
        inputs |= {"goal": goal, "b_crit": prediction.b_crit}
    else:
        rule, source = "the base batch size: the noise scale to move it by is not known", MEASURED
    sizes = [row.batch_size for row in rows if row.devices == chosen.devices]
    bounds = "the frontier's range: B_crit/16 to 16·B_crit within the data set, and the base batch size"
    data = {"train_examples": facts.train_examples, "base_batch_size": facts.base_batch_size}
    noise = facts.noise_scale if prediction.noise_known else None
    if noise:
        high = "unbounded" if math.isinf(prediction.b_crit_high) else prediction.b_crit_high
        why.keep("noise_scale", noise, noise.method, MEASURED, low=prediction.b_crit_low, high=high)
    return {
        "batch_size": why.keep("batch_size", chosen.batch_size, rule, source, **inputs),
        "world_size": why.keep("world_size", chosen.devices, rule, source, **inputs),
        "min_batch_size": why.keep("min_batch_size", min(sizes), bounds, MCCANDLISH, **data),
        "max_batch_size": why.keep("max_batch_size", max(sizes), bounds, MCCANDLISH, **data),
        "noise_scale": noise,
    }


def _layout(why: Reasons, facts: Facts, chosen: FrontierRow, *, whole: bool) -> dict[str, Any]:
    """Micro-batches: the fastest measured; halved where that hardly costs time and lets the noise be measured.

    whole: as much of a device's share as fits, for the model normalises over it.
    """
    share = math.ceil(chosen.batch_size / chosen.devices)
    micro, rule = facts.best_micro_batch(share), "the measured size that gets through a device's share soonest"
    if whole:
        passes = math.ceil(share / facts.max_micro_batch)
        micro, rule = math.ceil(share / passes), "as much as fits: batch normalisation is over a micro-batch"
    elif chosen.devices == 1 and micro == share > 1:
        whole_seconds, half_seconds = (facts.step_time(share, 1, size) for size in (share, math.ceil(share / 2)))
        if half_seconds <= SPLIT_COST * whole_seconds:
            micro = math.ceil(share / 2)
            rule = "half the batch, so that the noise can be measured: at most 5 % slower than whole"
    passes = math.ceil(share / micro)
    seconds = facts.step_time(chosen.batch_size, chosen.devices, micro)
    fastest = min(facts.micro_batches, key=lambda point: point.seconds.value / point.examples).examples
    fastest_rule = "the measured micro-batch with the most examples a second"
    step_rule = "passes of the slowest device and one optimizer step, without communication"
    times = {"accumulation": passes, "update_seconds": facts.update_seconds.value}
    pieces = {"share": share, "micro_batch": micro}
    return {
        "micro_batch": why.keep(
            "micro_batch", micro, rule, MEASURED, share=share, max_micro_batch=facts.max_micro_batch
        ),
        "accumulation": why.keep("accumulation", passes, "ceil(share / micro_batch)", OURS, **pieces),
        "measure_noise": why.keep(
            "measure_noise",
            passes * chosen.devices > 1,
            "where an update has two pieces or more, whose gradients are compared",
            OURS,
            accumulation=passes,
            world_size=chosen.devices,
        ),
        "predicted_step_seconds": why.keep("predicted_step_seconds", seconds, step_rule, MEASURED, **times),
        "evaluation_batch": why.keep("evaluation_batch", min(fastest, facts.max_micro_batch), fastest_rule, MEASURED),
    }


def _length(
    why: Reasons, facts: Facts, prediction: Prediction, chosen: FrontierRow, layout: Mapping[str, Any]
) -> dict[str, Any]:
    """How many updates, and how often a run stops to evaluate, to save and to measure the noise scale."""
    steps, evaluation, step_seconds = chosen.steps, facts.evaluation_seconds, layout["predicted_step_seconds"]
    predicted = prediction.estimate(chosen.batch_size) if prediction.reached else None
    basis = {"predicted_steps" if predicted else "at_least": steps}
    if predicted:
        law = {"base_steps": prediction.base_steps, "base_batch_size": prediction.base_batch_size}
        law |= {"b_crit": prediction.b_crit} if prediction.noise_known else {}
        law |= {"batch_size": chosen.batch_size}
        rule = "S(B) = S(B₀)·(1 + B_crit/B)/(1 + B_crit/B₀)"
        why.keep("predicted_steps", predicted, rule, MCCANDLISH, **law)
    every = cadence.evaluate_every(steps, step_seconds=step_seconds, evaluation_seconds=evaluation)
    save = cadence.checkpoint_every(steps, step_seconds=step_seconds, evaluate_every=every)
    rules = {
        "steps": "4 x the predicted steps",
        "evaluate_every": "30 times in the predicted steps; down to 10 where evaluating takes over half the time",
        "checkpoint_every": "a fifth of the predicted steps or ten minutes, the lesser, after an evaluation",
    }
    values = {"steps": cadence.most_steps(steps), "evaluate_every": every, "checkpoint_every": save}
    for name, rule in rules.items():
        why.keep(name, values[name], rule, OURS, **basis, evaluation_seconds=evaluation, step_seconds=step_seconds)
    values["noise_every"] = _noise_every(why, facts, steps, layout)
    return values | {"predicted_steps": predicted}


def _courses(why: Reasons, chosen: FrontierRow, length: Mapping[str, Any]) -> None:
    """Why neither the batch nor the rate moves along the run, but for the warm-up."""
    still = "all that is predicted is of a batch that stays"
    why.keep("batch_schedule", "fixed", still, OURS, batch_size=chosen.batch_size)
    level = (
        "as in the reference run, by which the steps to the target are predicted; one that falls would do so over all "
        "of the steps, 4 x as many, and little in those predicted"
    )
    predicted = {"predicted_steps": length["predicted_steps"].value} if length["predicted_steps"] else {}
    why.keep("schedule", "constant", level, OURS, steps=length["steps"], **predicted)


def _noise_every(why: Reasons, facts: Facts, steps: float, layout: Mapping[str, Any]) -> int:
    """At which share of the updates the noise scale is measured."""
    if facts.noise_seconds is None:
        return int(why.keep("noise_every", 1, "as good as any: what measuring costs was not timed", OURS))
    pieces, step_seconds = max(2, layout["accumulation"]), layout["predicted_step_seconds"]
    extra = pieces * max(0.0, facts.noise_seconds.value)
    every = cadence.noise_every(steps, step_seconds=step_seconds, noise_seconds=extra)
    rule = "so seldom that measuring takes 1 % of the time, but 30 times in the predicted steps"
    rule += "" if layout["measure_noise"] else "; only if the batch is made to follow it"
    return int(why.keep("noise_every", every, rule, OURS, noise_seconds=extra, step_seconds=step_seconds))


def _notes(facts: Facts, prediction: Prediction, chosen: FrontierRow, devices: int) -> list[str]:
    """What the facts warn of, and what is uncertain about the plan itself."""
    notes = list(facts.warnings)
    if not prediction.noise_known:
        notes.append(
            f"the noise scale is not known ({facts.noise_scale.method}): the batch size stays at the base unless "
            "given, and the learning rate moves by the rule for batches far below the noise scale"
        )
    elif math.isinf(prediction.b_crit_high):
        notes.append("the data do not bound the noise scale from above: larger batches may pay more than predicted")
    if not prediction.reached:
        notes.append(
            f"the reference's {facts.reference.steps} updates stand for the steps to the target, which it did not "
            "reach: the frontier's steps and times are lower bounds, good for comparing batch sizes only"
        )
    if chosen.devices < devices:
        notes.append(f"{chosen.devices} of {devices} devices serve this goal best")
    if devices > 1:
        notes.append("communication between devices was not measured and is not in the times")
    if prediction.noise_known:
        lowest, highest = size_range(prediction.b_crit, facts.train_examples)
        if not lowest <= chosen.batch_size <= highest:
            notes.append(
                f"batch size {chosen.batch_size} lies outside {lowest}..{highest}, where the rules are trusted"
            )
    return notes


def _check(job: Job, facts: Facts, devices: int, batch_size: int | None) -> None:
    for name, mine, theirs in (
        ("name", job.name, facts.job),
        ("optimizer", job.optimizer, facts.optimizer),
        ("number of train examples", len(job.train), facts.train_examples),
        ("target", job.target or facts.target, facts.target),
    ):
        if mine != theirs:
            raise InputError(f"facts were measured with the {name} {theirs!r}, this job has {mine!r}: probe it again")
    check_count(devices=devices, batch_size=1 if batch_size is None else batch_size)
    if batch_size is not None and not devices <= batch_size <= facts.train_examples:
        raise InputError(
            f"batch_size must lie in {devices}..{facts.train_examples}, an example for each device and no more than "
            f"the data set holds, got {batch_size}"
        )
