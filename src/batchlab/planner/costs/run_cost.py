"""Time, dollars, joules and carbon of a training run on devices of one kind (after arXiv 2410.19456).

An update of B sequences of s tokens on n devices lasts `step` seconds (see `update_time`):

  tokens/s = B·s/step        dollars = price·n·hours        joules = watts·utilisation·n·seconds

half_batch = t₀/t₁ sequences a device make half of its limiting speed, half_batch·(1 - ε)/ε make 1 - ε of it. That the
largest batch that fits need not be the cheapest is the paper's result: at `saturated_at` there is 5 % left to gain.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from batchlab.core.checks import check_share, holds
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.core.plan import Reason
from batchlab.measure.energy.energy_use import ComponentEnergy, EnergyUse, check_carbon
from batchlab.measure.speed.step_time_law import TOLERANCE, StepTimeLaw, bottleneck
from batchlab.planner.costs.price import SECONDS_PER_HOUR, Price, find_device, price_of, tokens_per_dollar
from batchlab.planner.costs.sharding import check_strategy
from batchlab.planner.costs.training import Training, check_training
from batchlab.planner.costs.update_time import Infeasible, check_spread, line_of, update_time
from batchlab.planner.hardware import Cluster, Device

SOURCE = "arXiv 2410.19456"
ENERGY_NOTE = "estimated: the devices' maximum board power times the utilisation; hosts and network are not in it"
ONE_PASS = (
    "micro_batch is not given: each device's share is taken in one pass, which is not known to fit; the sharded "
    "strategies send at each pass, so that more passes take longer"
)
FEW_PARAMETERS, MANY_TOKENS = 1e3, 1e8


@dataclass(frozen=True)
class RunCost(JsonNoun):
    """What a run takes. Seconds, bytes, USD; batches in sequences; speeds over all devices.

    batch: sequences of an update. micro_batch: the most of one pass on one device. passes: such passes, the last one
    possibly smaller. steps: updates, the last one whole.
    compute_seconds, communication_seconds: of an update; step_seconds: the update, with what is hidden taken off.
    communication_bytes: sent by each rank in an update. memory_bytes: on each; see `Training.memory_bytes`.
    dollars, tokens_per_dollar, price: None where no price is known. energy: estimated, never measured.
    half_batch: sequences a device at which half of its limiting speed is reached; saturated_at: at which 95 % are.
    bottleneck: "launch/overhead", "communication", "memory capacity" (twice the micro-batch does not fit, though it
    would be over 5 % faster) or "compute".
    """

    device: str
    devices: int
    strategy: str
    batch: int
    micro_batch: int
    passes: int
    steps: int
    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    communication_bytes: float
    memory_bytes: float
    tokens_per_second: float
    seconds: float
    dollars: float | None
    tokens_per_dollar: float | None
    price: Price | None
    energy: EnergyUse
    half_batch: float
    saturated_at: float
    bottleneck: str
    notes: tuple[str, ...] = ()

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.devices * self.seconds / SECONDS_PER_HOUR

    @property
    def reasons(self) -> Mapping[str, Reason]:
        """Where the main numbers come from, by name."""
        cost = {"device_hours": self.device_hours, "price": str(self.price)}
        step = {"passes": self.passes, "compute": self.compute_seconds, "communication": self.communication_seconds}
        sent = {"strategy": self.strategy, "devices": self.devices}
        power = {"joules": self.energy.joules, "g_per_kwh": self.energy.g_per_kwh, "pue": self.energy.pue}
        return {
            "step_seconds": Reason("passes' t0 + t1*b, and communication not hidden", SOURCE, step, self.step_seconds),
            "communication_bytes": Reason("ring collectives", "standard practice", sent, self.communication_bytes),
            "dollars": Reason("price * device-hours", SOURCE, cost, self.dollars),
            "energy": Reason(ENERGY_NOTE, "maker's figure", power, self.energy.kg_co2e),
        }


def cost(
    training: Training,
    *,
    batch: int,
    device: Device | str,
    devices: int = 1,
    step_time: StepTimeLaw | Sequence[float] | None = None,
    mfu: float | None = None,
    strategy: str = "ddp",
    micro_batch: int | None = None,
    overlap: float = 0.0,
    price_per_hour: float | None = None,
    utilisation: float = 1.0,
    g_per_kwh: float | None = None,
    pue: float = 1.0,
    inter_node_bandwidth: float = Cluster.inter_node_bandwidth,
    reserve: float = 0.0,
) -> RunCost:
    """What `training` takes at `batch` sequences an update on so many devices.

    step_time: one device's t₀ + t₁·b for b sequences, with the update and without communication; a pair of seconds, or
    a `StepTimeLaw` measured on this device at this sequence length. Accumulation pays t₀, the update's share with it,
    at each pass: an upper bound. mfu: in its place, the share of the device's peak that its passes reach, communication
    not counted in; it knows no t₀, so it must be of a like micro-batch.
    micro_batch: the most sequences of a pass; None for a device's whole share, which a note says where it is not known
    to fit. Sharded strategies send at each pass, so what they take hangs on it. strategy: see `costs.sharding`.
    overlap: the share of communication that is hidden behind the passes, 0 to 1; 0 unless you measured it.
    price_per_hour: USD for one device; None takes the dated price of the device's table.
    utilisation: of the maximum power; 1 is an upper bound. g_per_kwh: grams of CO2e of a kWh of the grid, None leaves
    carbon unknown. pue: the building's power for one watt of a device.
    inter_node_bandwidth: bytes/s a device where there are several nodes. reserve: the share of memory to leave free.

    Raises `Infeasible` where the memory that is known of does not fit, `batch` is smaller than `devices`, or one batch
    holds more tokens than the run.

    It compares machines at one batch: time to a loss moves with the batch too (`loss_per_dollar`, `planner.frontier`).

    >>> run = cost(Training(1e9, 2e10, 2048), batch=512, device="A100-80", devices=8, mfu=0.4, price_per_hour=2.0)
    >>> round(run.tokens_per_second), round(run.dollars)
    (166092, 535)
    """
    check_training(training)
    kind = find_device(device)
    check_spread(kind, batch, devices, micro_batch)
    check_share(overlap=overlap)
    line = line_of(step_time, mfu, training, kind)
    batch, devices = operator.index(batch), operator.index(devices)
    _check_run(training, batch)
    timed = partial(
        update_time,
        training,
        line,
        kind,
        devices=devices,
        strategy=check_strategy(strategy),
        overlap=overlap,
        inter_node_bandwidth=inter_node_bandwidth,
    )
    update = timed(batch=batch, micro_batch=micro_batch)
    memory = _fitting_memory(training, kind, strategy, devices, update.most, reserve)
    twice = timed(batch=2 * batch, micro_batch=2 * update.most)
    tight = training.memory_bytes(2 * update.most, strategy, devices) > (1 - reserve) * kind.memory_bytes
    gain = 2 * update.step / twice.step - 1
    steps = math.ceil(training.tokens / (batch * training.sequence_length))
    speed, seconds = batch * training.sequence_length / update.step, steps * update.step
    price = price_of(kind, price_per_hour)
    dollars, per_dollar = _money(price, devices, seconds, speed)
    return RunCost(
        device=kind.name,
        devices=devices,
        strategy=strategy,
        batch=batch,
        micro_batch=update.most,
        passes=update.passes,
        steps=steps,
        step_seconds=update.step,
        compute_seconds=update.compute,
        communication_seconds=update.communication,
        communication_bytes=update.sent,
        memory_bytes=memory,
        tokens_per_second=speed,
        seconds=seconds,
        dollars=dollars,
        tokens_per_dollar=per_dollar,
        price=price,
        energy=_energy(kind.watts * devices * seconds, seconds, utilisation, g_per_kwh, pue),
        half_batch=line.half,
        saturated_at=line.size_for(),
        bottleneck=bottleneck(
            overhead=update.overhead, communication=update.waiting, memory=tight and gain > TOLERANCE
        ),
        notes=_notes(training, batch, micro_batch, update.most),
    )


def _check_run(training: Training, batch: int) -> None:
    """Refuses an update of more tokens than there are."""
    if batch * training.sequence_length > training.tokens:
        raise Infeasible(
            f"batch x sequence_length must be at most tokens {training.tokens:g}, got {batch} x "
            f"{training.sequence_length}; batch counts sequences, tokens is a plain count"
        )


def _fitting_memory(
    training: Training, kind: Device, strategy: str, devices: int, micro_batch: int, reserve: float
) -> float:
    if not holds(lambda share: 0 <= share < 1, reserve):
        raise InputError(f"reserve must lie in [0, 1), got {reserve!r}")
    needed, room = training.memory_bytes(micro_batch, strategy, devices), (1 - reserve) * kind.memory_bytes
    if needed > room:
        raise Infeasible(
            f"does not fit: {strategy} on {devices} {kind.name} at micro-batch {micro_batch} takes "
            f"{needed / 1e9:.4g} GB (of 1e9 bytes) a device, {(needed - room) / 1e9:.3g} GB more than there is"
        )
    return needed


def _money(price: Price | None, devices: int, seconds: float, speed: float) -> tuple[float | None, float | None]:
    """Dollars of the run, and tokens for one of them."""
    if price is None:
        return None, None
    dollars = price.per_hour * devices * seconds / SECONDS_PER_HOUR
    return dollars, tokens_per_dollar(speed, price_per_hour=price.per_hour, devices=devices)


def _energy(full_joules: float, seconds: float, utilisation: float, g_per_kwh: float | None, pue: float) -> EnergyUse:
    check_carbon(g_per_kwh, pue)
    check_share(utilisation=utilisation)
    used = ComponentEnergy("accelerators", full_joules * utilisation, "estimated")
    return EnergyUse(seconds, (used,), samples=0, g_per_kwh=g_per_kwh, pue=pue, note=ENERGY_NOTE)


def _notes(training: Training, batch: int, micro_batch: int | None, most: int) -> tuple[str, ...]:
    """What of the answer rests on something that was not given, or on a count that may be in another unit."""
    notes = []
    if training.activation_bytes is None:
        counted = "the states" if training.attention is None else "the states and attention"
        notes.append(f"activation_bytes is not known: memory is that of {counted} alone")
        if micro_batch is None and most > 1:
            notes.append(ONE_PASS)
    if training.parameters < FEW_PARAMETERS:
        notes.append(f"{training.parameters:g} parameters: the count is plain, 7e9 for 7 billion")
    if (size := batch * training.sequence_length) > MANY_TOKENS:
        notes.append(f"batch counts sequences: {batch} of {training.sequence_length} are {size:.3g} tokens an update")
    return tuple(notes)
