"""Seconds of one update on devices of one kind: passes, communication, and what of it is hidden.

One device takes t(b) = t₀ + t₁·b for b sequences. An update of B sequences on n devices:

  step = Σ t(bᵢ) + communication - hidden        bᵢ: the passes of the slowest device's share, ⌈B/n⌉ in all
  hidden = min(overlap·communication, Σ t(bᵢ))   communication: a rank's bytes by its slowest link's bytes/s
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from batchlab.core.checks import check_count, check_not_negative, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.measure.speed.step_time_law import TOLERANCE, StepTimeLaw
from batchlab.planner.costs.sharding import communication_bytes
from batchlab.planner.costs.training import Training
from batchlab.planner.hardware import Device


class Infeasible(InputError):
    """This run cannot be: it does not fit, or the batch cannot be spread so. Another batch or device may do."""


class Line(NamedTuple):
    """t₀, seconds, and t₁, seconds a sequence."""

    fixed: float
    each: float

    def seconds(self, sequences: float) -> float:
        """t₀ + t₁·b."""
        return self.fixed + self.each * sequences

    @property
    def half(self) -> float:
        """t₀/t₁: the sequences at which half of the limiting speed is reached."""
        return self.fixed / self.each

    def size_for(self, share: float = 1 - TOLERANCE) -> float:
        """The sequences at which `share` of the limiting speed is reached: half·share/(1 - share)."""
        return self.half * share / (1 - share)


@dataclass(frozen=True)
class UpdateTime:
    """One update. most: sequences of the largest pass. sent: bytes of each rank. Times in seconds."""

    line: Line
    most: int
    passes: int
    compute: float
    communication: float
    sent: float
    step: float

    @property
    def overhead(self) -> float:
        """The share of the passes' t₀ in the update."""
        return self.passes * self.line.fixed / self.step

    @property
    def waiting(self) -> float:
        """The share of communication that is waited for."""
        return (self.step - self.compute) / self.step


def update_time(
    training: Training,
    line: Line,
    kind: Device,
    *,
    batch: int,
    devices: int,
    strategy: str,
    micro_batch: int | None,
    overlap: float,
    inter_node_bandwidth: float,
) -> UpdateTime:
    """See this file's head. micro_batch: the most sequences of a pass; None for a device's whole share."""
    share = math.ceil(batch / devices)
    most = share if micro_batch is None else min(micro_batch, share)
    whole, rest = divmod(share, most)
    passes = whole + (rest > 0)
    compute = whole * line.seconds(most) + (line.seconds(rest) if rest else 0.0)
    sent = communication_bytes(training.parameters, strategy, devices, passes=passes, each=training.state)
    communication = sent / link(kind, devices, inter_node_bandwidth)
    step = compute + communication - min(overlap * communication, compute)
    return UpdateTime(line, most, passes, compute, communication, sent, step)


def link(kind: Device, devices: int, inter_node_bandwidth: float) -> float:
    """Bytes/s of a ring's slowest link for each device: within the node, or between nodes where there are several."""
    check_positive(inter_node_bandwidth=inter_node_bandwidth)
    return kind.link_bandwidth if devices <= kind.devices_per_node else min(kind.link_bandwidth, inter_node_bandwidth)


def check_spread(kind: Device, batch: int, devices: int, micro_batch: int | None) -> None:
    """Refuses devices without a sequence and nodes that are used in part."""
    check_count(batch=batch, devices=devices)
    if micro_batch is not None:
        check_count(micro_batch=micro_batch)
    if batch < devices:
        raise Infeasible(f"batch must be at least devices, a sequence for each, got batch={batch}, devices={devices}")
    if devices > kind.devices_per_node and devices % kind.devices_per_node:
        raise Infeasible(
            f"devices must be at most {kind.devices_per_node} or a multiple of it (whole nodes of {kind.name}), "
            f"got {devices}"
        )


def line_of(
    step_time: StepTimeLaw | Sequence[float] | None, mfu: float | None, training: Training, kind: Device
) -> Line:
    """t₀ and t₁ from a fitted law, from a pair, or from the share `mfu` of the device's peak: exactly one of them.

    A law whose t₀ came out negative does not hold (see `StepTimeLaw`) and is refused.
    """
    if (step_time is None) == (mfu is None):
        raise InputError(f"exactly one of step_time and mfu must be given, got step_time={step_time!r}, mfu={mfu!r}")
    if mfu is not None:
        if not holds(lambda share: 0 < share <= 1, mfu):
            raise InputError(f"mfu must lie in (0, 1], got {mfu!r}")
        flops = training.flops_of_a_token * training.sequence_length
        return Line(0.0, float(flops / (kind.peak_flops * mfu)))
    if isinstance(step_time, StepTimeLaw):
        step_time = (step_time.fixed.value, step_time.per_example.value)
    pair = list(step_time) if isinstance(step_time, Iterable) else []
    if len(pair) != 2 or not all(holds(math.isfinite, value) for value in pair):
        raise InputError(f"step_time must be a StepTimeLaw or finite seconds (t0, t1), got {step_time!r}")
    check_not_negative(**{"step_time's t0": pair[0]})
    check_positive(**{"step_time's t1": pair[1]})
    return Line(float(pair[0]), float(pair[1]))
