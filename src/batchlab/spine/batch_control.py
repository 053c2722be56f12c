"""From a plan's batch schedule to the controller that moves the batch."""

from __future__ import annotations

import math
from typing import Any

from batchlab.core.errors import InputError
from batchlab.core.plan import Plan
from batchlab.schedule.batches.batch_ramp import BatchRamp
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.decay_by_batch import DecayByBatch
from batchlab.schedule.batches.goodput_batch import GoodputBatch
from batchlab.schedule.batches.inner_product_test_batch import InnerProductTestBatch
from batchlab.schedule.batches.milestones import Milestones
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.rates.by_examples import lr_factor

_EXPONENTS = {"linear": 1.0, "saturating": 1.0, "sqrt": 2.0, "saturating_sqrt": 2.0}


def make_controller(plan: Plan, examples: int, world: int) -> BatchController | None:
    """The controller that `plan.batch_schedule` names; None for "fixed". Sizes are examples over all ranks.

    examples: in the training data, the most a batch may have. Raises `InputError` for settings that it has not.
    """
    name, given = plan.batch_schedule, dict(plan.batch_settings)
    if name == "fixed":
        if given:
            raise InputError(f'batch_settings are of a batch that moves, and batch_schedule is "fixed", got {given!r}')
        return None
    bounds: dict[str, Any] = {
        "minimum": max(plan.min_batch_size, world),
        "maximum": min(plan.max_batch_size or examples, examples),
    }
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
    return planned


def _exchange_rate(plan: Plan) -> float:
    """r = B₀²/𝓑₀, at which the planned batch is the right one for the planned noise scale."""
    if plan.noise_scale is None or not plan.noise_scale.defined or not math.isfinite(plan.noise_scale.value):
        raise InputError("an adaptive batch schedule needs plan.noise_scale, the noise scale that it was planned with")
    return plan.batch_size**2 / plan.noise_scale.value


def _decaying(plan: Plan, bounds: dict[str, Any], given: dict[str, Any]) -> DecayByBatch:
    exponent = _EXPONENTS.get(plan.learning_rate_rule)
    if exponent is None:
        raise InputError(
            f"batch_schedule 'decay_by_batch' needs a learning_rate_rule of {sorted(_EXPONENTS)}, got "
            f"{plan.learning_rate_rule!r}: it is with the batch that the rate stays up"
        )
    if plan.schedule in ("constant", "one_cycle"):
        raise InputError(f"batch_schedule 'decay_by_batch' needs a schedule that falls, got {plan.schedule!r}")

    def share(seen: float) -> float:
        after = max(seen, plan.warmup_examples)
        return lr_factor(
            after,
            total_examples=plan.examples,
            warmup_examples=plan.warmup_examples,
            schedule=plan.schedule,
            settings=plan.schedule_settings,
        )

    return DecayByBatch(plan.batch_size, share=share, **{"exponent": exponent, **bounds, **given})


def _ramp(plan: Plan, given: dict[str, Any]) -> BatchRamp:
    return BatchRamp(plan.batch_size, **given)


def _milestones(plan: Plan, given: dict[str, Any]) -> Milestones:
    sizes = given.pop("sizes", None)
    pairs = isinstance(sizes, (list, tuple)) and all(
        isinstance(each, (list, tuple)) and len(each) == 2 for each in sizes
    )
    if not pairs:
        raise InputError(f'batch_settings["sizes"] must be [[examples, size], ...], got {sizes!r}')
    return Milestones(plan.batch_size, {point: size for point, size in sizes}, **given)


def _named(error: TypeError) -> str:
    return str(error).split("__init__() ")[-1].replace("keyword-only ", "").replace("keyword ", "")
