"""Hours and dollars of fine-tuning at the largest batch that fits (arXiv 2408.04693).

  hours = epochs·queries/(3600·Q(B, S))        dollars = hours·price

Q is per query at the padded length of the data; the price is of the machine that has this speed. The authors' own
example, "2M queries" for 3460 USD on an H100, is of 2.91 M queries (OpenOrca's size); exactly 2.0 M take 2381 USD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from batchlab.core.checks import check_positive, holds
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.jsonio import JsonNoun
from batchlab.core.plan import Reason
from batchlab.planner.costs.price import SECONDS_PER_HOUR, Price, find_device, price_of
from batchlab.planner.fine_tune.calibration import Calibration
from batchlab.planner.fine_tune.linear_time import LinearTimeModel
from batchlab.planner.fine_tune.measured_batch import check_sparsity
from batchlab.planner.fine_tune.memory_model import GB, GIB, BatchMemoryModel
from batchlab.planner.fine_tune.throughput_model import REACH, ThroughputModel
from batchlab.planner.hardware import Device

SOURCE = "arXiv 2408.04693"


@dataclass(frozen=True)
class FineTuneCost(JsonNoun):
    """What fine-tuning takes. hours, dollars: with the interval of the fitted speed; USD, None where no price is known.

    batch: queries of a step, None where only a speed was given. max_batch: B_max, None where memory is not known.
    law: of the speed, "given" if it is none. errors: each law's error in queries/s on points left out, by name.
    """

    queries: float
    epochs: float
    batch: float | None
    max_batch: int | None
    sparsity: float
    law: str
    queries_per_second: Estimate
    hours: Estimate
    dollars: Estimate | None
    price: Price | None
    errors: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> Mapping[str, Reason]:
        """Where the main numbers come from, by name."""
        speed = {"batch": self.batch, "sparsity": self.sparsity}
        hours = {"queries": self.queries, "epochs": self.epochs, "queries_per_second": self.queries_per_second.value}
        dollars = None if self.dollars is None else self.dollars.value
        return {
            "max_batch": Reason("floor((M_gpu - M_model)/query bytes)", f"{SOURCE}, equation 1", {}, self.max_batch),
            "queries_per_second": Reason(self.law, SOURCE, speed, self.queries_per_second.value),
            "hours": Reason("epochs*queries/(3600*Q)", SOURCE, hours, self.hours.value),
            "dollars": Reason("hours*price", SOURCE, {"price": str(self.price)}, dollars),
        }


def fine_tune_cost(
    speed: Calibration | LinearTimeModel | ThroughputModel | float,
    *,
    queries: float,
    epochs: float,
    batch: float | None = None,
    sparsity: float | None = None,
    sequence_length: float | None = None,
    memory: BatchMemoryModel | None = None,
    device: Device | str | None = None,
    gpu_bytes: float | None = None,
    reserve: float = 0.0,
    price_per_hour: float | None = None,
) -> FineTuneCost:
    """Hours and dollars of `epochs` over `queries` queries.

    speed: a fitted law, queries/s as a number, or a `Calibration`: its better law, with its memory.
    batch: None takes B_max, so memory must be known. The logarithm is asked for at most twice the largest fitted batch:
    a larger B_max is not taken, which a note says, as it does where the line is taken beyond it.
    sparsity: None takes the only one that was measured. sequence_length: L, padded, in the unit of the memory's points;
    None takes the calibration's own, or that of the memory's points where they have one alone.
    memory, gpu_bytes, reserve: see `BatchMemoryModel.max_batch`. device: gives gpu_bytes and a dated price, where those
    are not given. price_per_hour: USD of the machine that has this speed.

    Raises `InputError` where not one query fits, with the missing bytes, and for a batch above B_max.

    >>> found = fine_tune_cost(2.74, queries=15_000, epochs=10, price_per_hour=1.67)
    >>> round(found.hours.value, 2), round(found.dollars.value, 2)
    (15.21, 25.4)
    """
    check_positive(queries=queries, epochs=epochs)
    kind = None if device is None else find_device(device)
    law, errors, notes = _law(speed)
    active = _sparsity(law, sparsity)
    room = kind.memory_bytes if gpu_bytes is None and kind is not None else gpu_bytes
    if memory is not None and room is None:
        raise InputError("memory needs gpu_bytes or a device to say what fits, got neither")
    if isinstance(speed, Calibration) and memory is None:
        memory = speed.memory
    if gpu_bytes is not None and memory is None:
        raise InputError(f"gpu_bytes needs a memory model to say what fits, got gpu_bytes={gpu_bytes!r} alone")
    if sequence_length is not None:
        check_positive(sequence_length=sequence_length)
    length = speed.sequence_length if isinstance(speed, Calibration) and sequence_length is None else sequence_length
    most = _max_batch(memory, room, length, active, reserve)
    notes = (*notes, *_doubts(speed, length, memory, room if gpu_bytes is None else None))
    if batch is None and most is not None:
        batch, notes = _largest(law, most, notes)
    elif batch is not None:
        notes = (*notes, *_extrapolated(law, batch))
    rate = _rate(law, batch, active, most)
    price = price_of(kind, price_per_hour) if kind is not None else _given_price(price_per_hour)
    hours = _hours(queries * epochs, rate)
    return FineTuneCost(
        queries=float(queries),
        epochs=float(epochs),
        batch=None if batch is None else float(batch),
        max_batch=most,
        sparsity=active,
        law=_name(law),
        queries_per_second=rate,
        hours=hours,
        dollars=None if price is None else _times(hours, price.per_hour),
        price=price,
        errors=errors,
        notes=notes,
    )


Law = LinearTimeModel | ThroughputModel | float


def _law(speed: Calibration | Law) -> tuple[Law, dict[str, float], tuple[str, ...]]:
    """The law itself, the errors of all that were fitted beside it, and what must be noted."""
    if isinstance(speed, Calibration):
        return speed.best, {name: error.left_out for name, error in speed.errors.items()}, speed.notes
    if isinstance(speed, LinearTimeModel | ThroughputModel):
        return speed, {}, ()
    check_positive(speed=speed)
    return float(speed), {}, ()


def _name(law: Law) -> str:
    if isinstance(law, LinearTimeModel):
        return "B/(t0 + t1*B)"
    return f"logarithm, form {law.form}" if isinstance(law, ThroughputModel) else "given"


def _sparsity(law: Law, sparsity: float | None) -> float:
    if sparsity is not None:
        check_sparsity(sparsity)
        return float(sparsity)
    known = (1.0,) if isinstance(law, float) else law.sparsities
    if len(known) > 1:
        raise InputError(f"sparsity must be given: the points have {list(known)}")
    return known[0]


def _max_batch(
    memory: BatchMemoryModel | None, room: float | None, length: float | None, sparsity: float, reserve: float
) -> int | None:
    """B_max, at least 1; None where memory is not known."""
    if memory is None or room is None:
        return None
    most = memory.max_batch(room, length, sparsity, reserve=reserve)
    if most < 1:
        missing = memory.missing_bytes(room, length, sparsity, reserve=reserve)
        raise InputError(
            f"does not fit: one query of length {memory.length(length):g} lacks {missing / GB:.3g} GB (of 1e9 "
            f"bytes) beside the {room * (1 - reserve) / GB:.4g} GB there are"
        )
    return most


def _doubts(
    speed: Calibration | Law, length: float | None, memory: BatchMemoryModel | None, table_room: float | None
) -> list[str]:
    """Where the speed is of another length, and where constants per GB meet a card's GiB."""
    notes = []
    if isinstance(speed, Calibration) and length != speed.sequence_length:
        notes.append(f"queries/s are of length {speed.sequence_length:g}, and are taken for length {length:g}")
    if memory is not None and memory.largest_batch is None and memory.gb == GB and table_room is not None:
        notes.append(
            f"the device has {table_room / GIB:g} GiB, {table_room / GB:.4g} GB of 1e9 bytes: where C0 and M_model "
            "were published for a card's GB, give both in BatchMemoryModel.of with gb=2**30"
        )
    return notes


def _extrapolated(law: Law, batch: float) -> tuple[str, ...]:
    """A batch that was asked for, by the line: the logarithm refuses it."""
    if not isinstance(law, LinearTimeModel) or not holds(lambda value: value > REACH * law.largest_batch, batch):
        return ()
    return (f"batch {batch:g} is beyond twice the largest fitted batch: the line is extrapolated",)


def _largest(law: Law, most: int, notes: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
    """B_max, or the largest batch that the logarithm is asked for."""
    if isinstance(law, float):
        return most, notes
    reach = math.floor(REACH * law.largest_batch)
    if most <= reach:
        return most, notes
    if isinstance(law, ThroughputModel):
        return reach, (*notes, f"B_max {most} is beyond twice the largest fitted batch: {reach} is taken")
    return most, (*notes, f"B_max {most} is beyond twice the largest fitted batch: the line is extrapolated")


def _rate(law: Law, batch: float | None, sparsity: float, most: int | None) -> Estimate:
    """Q at the batch, in queries/s."""
    if batch is not None and not holds(lambda value: 0 < value < math.inf, batch):
        raise InputError(f"batch must be finite and > 0, got {batch!r}")
    if batch is not None and most is not None and batch > most:
        raise InputError(f"batch must be at most {most}, the largest that fits, got {batch!r}")
    if isinstance(law, float):
        return Estimate(law, law, law, "given")
    if batch is None:
        raise InputError("batch must be given, or a memory model with gpu_bytes or a device for the largest that fits")
    rate = law.estimate(batch, sparsity)
    if not rate.value > 0:
        raise InputError(f"batch must be one for which the law gives a speed above 0, got {batch!r}")
    return rate


def _hours(queries: float, rate: Estimate) -> Estimate:
    hours = queries / SECONDS_PER_HOUR
    high = hours / rate.low if rate.low > 0 else math.inf
    return Estimate(hours / rate.value, hours / rate.high, high, rate.method, rate.coverage)


def _times(hours: Estimate, price: float) -> Estimate:
    return Estimate(price * hours.value, price * hours.low, price * hours.high, hours.method, hours.coverage)


def _given_price(price_per_hour: float | None) -> Price | None:
    if price_per_hour is None:
        return None
    check_positive(price_per_hour=price_per_hour)
    return Price(float(price_per_hour), "given")
