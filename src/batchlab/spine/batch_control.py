"""From a plan's batch schedule to the controller that moves the batch."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.plan import Plan
from batchlab.rules.learning_rate import rescale
from batchlab.schedule.batches.batch_ramp import BatchRamp
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.decay_by_batch import DecayByBatch
from batchlab.schedule.batches.goodput_batch import FEWEST, GoodputBatch
from batchlab.schedule.batches.inner_product_test_batch import InnerProductTestBatch
from batchlab.schedule.batches.milestones import Milestones
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.batches.scheduled_batch import as_points
from batchlab.schedule.rates.by_examples import lr_factor

_EXPONENTS = {"linear": 1.0, "saturating": 1.0, "sqrt": 2.0, "saturating_sqrt": 2.0}
_MEASURED = ("adaptive", "goodput", "decay_by_batch")
_WAITS: dict[str, type[BatchController]]
_WAITS = {"adaptive": NoiseScaleBatch, "goodput": GoodputBatch, "decay_by_batch": DecayByBatch}
_RUN_SHARE = 1 / 3  # of the updates, the longest patience: two changes at least can be made
_GROWS = ("decay_by_batch", "norm_test", "inner_product_test")
_THE_PLANS = {
    "start": "batch_size",
    "batch_size": "batch_size",
    "minimum": "min_batch_size",
    "maximum": "max_batch_size",
    "exchange_rate": "batch_size and noise_scale",
    "share": "schedule",
    "lr_rule": "learning_rate_rule",
    "lr_batch": "batch_size",
}


def make_controller(plan: Plan, examples: int, world: int) -> BatchController | None:
    """The controller that `plan.batch_schedule` names; None for "fixed". Sizes are examples over all ranks.

    examples: in the training data, the most a batch may have. Raises `InputError` for settings that it has not.
    """
    name, given = plan.batch_schedule, dict(plan.batch_settings)
    if name == "fixed":
        if given:
            raise InputError(f'batch_settings are of a batch that moves, and batch_schedule is "fixed", got {given!r}')
        return None
    _check_given(given)
    given |= {} if (fitted := fitted_patience(plan)) is None else {"patience": fitted}
    bounds = _bounds(plan, examples, world)
    _check_rate_rule(plan)
    try:
        if name == "adaptive":
            return NoiseScaleBatch(plan.batch_size, exchange_rate=_exchange_rate(plan), **bounds, **given)
        if name == "goodput":
            return GoodputBatch(plan.batch_size, **bounds, **given)
        if name == "decay_by_batch":
            return _decaying(plan, bounds, given)
        if name == "norm_test":
            return NormTestBatch(plan.batch_size, **bounds, **given)
        if name == "inner_product_test":
            return InnerProductTestBatch(plan.batch_size, **bounds, **given)
        planned = _ramp(plan, given) if name == "ramp" else _milestones(plan, given)
    except TypeError as error:
        raise InputError(f"batch_settings do not fit batch_schedule {name!r}: {_named(error)}") from None
    if planned.minimum < bounds["minimum"] or planned.maximum > bounds["maximum"]:
        raise InputError(
            f"the sizes of batch_schedule {name!r} must lie in {bounds['minimum']}..{bounds['maximum']}, got "
            f"{planned.minimum}..{planned.maximum}"
        )
    if planned.minimum == planned.maximum:
        raise InputError(f"the sizes of batch_schedule {name!r} must differ, got {planned.minimum} alone")
    _check_points_come(plan, planned)
    return planned


def expected_updates(plan: Plan) -> int:
    """Of the run: those to the target where they are predicted, and no more than the plan's steps."""
    predicted = plan.predicted_steps
    if plan.target is None or predicted is None or not predicted.defined:
        return plan.steps
    return min(plan.steps, max(1, round(predicted.value)))


def usual_patience(plan: Plan) -> int:
    """Updates from one change of the batch to the next, where the run is long."""
    kind = _WAITS.get(plan.batch_schedule, BatchController)
    return int(signature(kind).parameters["patience"].default)


def fitted_patience(plan: Plan) -> int | None:
    """A third of the run's updates, where the controller would wait longer and nothing was given; else None."""
    if plan.batch_schedule not in _WAITS or "patience" in plan.batch_settings:
        return None
    least = FEWEST + 1 if plan.batch_schedule == "goodput" else 1
    fitted = max(least, math.floor(_RUN_SHARE * expected_updates(plan)))
    return fitted if fitted < usual_patience(plan) else None


def _check_given(given: dict[str, Any]) -> None:
    """Refuses what the plan says elsewhere, or what `train` does not measure."""
    for setting in sorted(given.keys() & _THE_PLANS.keys()):
        raise InputError(
            f"batch_settings must leave {setting!r} to the plan's {_THE_PLANS[setting]}, got {given[setting]!r}"
        )
    if given.get("coordinate_wise"):
        raise InputError(
            "batch_settings must leave 'coordinate_wise' out: in a plan the gradients of groups are compared whole"
        )


def _bounds(plan: Plan, examples: int, world: int) -> dict[str, Any]:
    """The least and the most that the batch may be: an example a rank, two where its noise is measured."""
    name, size = plan.batch_schedule, plan.batch_size
    fewest = 2 if name in _MEASURED else 1
    if size < fewest:
        raise InputError(
            f"batch_schedule {name!r} compares parts of a batch: batch_size must be at least 2, got {size}"
        )
    low, high = max(plan.min_batch_size, world, fewest), min(plan.max_batch_size or examples, examples)
    if low == high or (name in _GROWS and size == high):
        only = "only grows the batch" if name in _GROWS else "moves the batch"
        raise InputError(
            f"batch_schedule {name!r} {only}, and batch_size {size} has no room to: min_batch_size and max_batch_size "
            f"leave {low}..{high}, of {examples} examples"
        )
    return {"minimum": low, "maximum": high}


def given_points(controller: BatchController | None) -> dict[str, int]:
    """Where, in examples, a batch that was settled beforehand moves: each point with its name."""
    if isinstance(controller, BatchRamp):
        return {"the ramp's end": controller.over}
    if isinstance(controller, Milestones):
        return {f"milestone {k}": point for k, point in enumerate(controller.points, start=1)}
    return {}


def _check_points_come(plan: Plan, planned: BatchController) -> None:
    """Refuses what lies beyond the end of the run. A ramp may end with it."""
    for name, point in given_points(planned).items():
        if point > plan.examples - isinstance(planned, Milestones):
            raise InputError(
                f"batch_settings must lie within the run of {plan.examples} examples, {plan.steps} steps of "
                f"{plan.batch_size}, got {name} at {point}: it would never come"
            )


def _check_rate_rule(plan: Plan) -> None:
    """Refuses a rule that could not be asked once the batch is another."""
    noise = plan.noise_scale.value if plan.noise_scale else None
    rescale(plan.learning_rate, plan.batch_size, plan.batch_size, rule=plan.learning_rate_rule, noise_scale=noise)


def _exchange_rate(plan: Plan) -> float:
    """r = B₀²/𝓑₀, at which the planned batch is the right one for the planned noise scale."""
    if plan.noise_scale is None or not plan.noise_scale.defined or not math.isfinite(plan.noise_scale.value):
        raise InputError("an adaptive batch schedule needs plan.noise_scale, the noise scale that it was planned with")
    return plan.batch_size**2 / plan.noise_scale.value


def _decaying(plan: Plan, bounds: dict[str, Any], settings: dict[str, Any]) -> DecayByBatch:
    exponent = _EXPONENTS.get(plan.learning_rate_rule)
    if exponent is None:
        raise InputError(
            f"batch_schedule 'decay_by_batch' needs a learning_rate_rule of {sorted(_EXPONENTS)}, got "
            f"{plan.learning_rate_rule!r}: it is with the batch that the rate stays up"
        )
    named: dict[str, Any] = {"total_examples": plan.examples, "schedule": plan.schedule}
    named["settings"] = plan.schedule_settings
    if plan.schedule == "one_cycle" or not lr_factor(plan.examples, **named) < 1:
        given = f" with {dict(plan.schedule_settings)}" if plan.schedule_settings else ""
        raise InputError(f"batch_schedule 'decay_by_batch' needs a schedule that falls, got {plan.schedule!r}{given}")

    def share(seen: float) -> float:
        return lr_factor(max(seen, plan.warmup_examples), warmup_examples=plan.warmup_examples, **named)

    return DecayByBatch(plan.batch_size, share=share, **{"exponent": exponent, **bounds, **settings})


def _ramp(plan: Plan, given: dict[str, Any]) -> BatchRamp:
    return BatchRamp(plan.batch_size, **given)


def _milestones(plan: Plan, given: dict[str, Any]) -> Milestones:
    sizes = given.pop("sizes", None)
    listed = isinstance(sizes, (list, tuple)) and len(sizes) > 0
    if not listed or not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in sizes):
        raise InputError(f'batch_settings["sizes"] must be [[examples, size], ...], got {sizes!r}')
    as_points("sizes' points", [point for point, _ in sizes])
    return Milestones(plan.batch_size, {point: size for point, size in sizes}, **given)


def _named(error: TypeError) -> str:
    return str(error).split("__init__() ")[-1].replace("keyword-only ", "").replace("keyword ", "")
