"""Run costs over a grid of devices, counts, batches and strategies: all cells, and those that no other one beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from batchlab.core.checks import check_inside
from batchlab.core.errors import InputError
from batchlab.core.jsonio import JsonNoun
from batchlab.measure.speed.step_time_law import TOLERANCE, StepTimeLaw
from batchlab.planner.costs.price import find_device
from batchlab.planner.costs.run_cost import ENERGY_NOTE, RunCost, cost
from batchlab.planner.costs.training import Training
from batchlab.planner.costs.update_time import Infeasible
from batchlab.planner.hardware import Cluster, Device
from batchlab.planner.text_table import text_table

T = TypeVar("T")
Variant = tuple[str, int, str]
_HEAD = (
    "device",
    "count",
    "strategy",
    "batch",
    "micro",
    "passes",
    "step s",
    "tokens/s",
    "hours",
    "USD",
    "tokens/USD",
    "kWh",
    "kg CO2e",
    "GB",
    "bound by",
    "",
)
_CARBON = _HEAD.index("kg CO2e")
_FRONT = "front: at its batch no other row is as fast for less or as cheap and faster"
_BATCHES = "tokens/s and USD are of the same tokens at every batch; how many a loss takes moves with the batch"


@dataclass(frozen=True)
class Pruned(JsonNoun):
    """A cell that cannot be, and why."""

    device: str
    devices: int
    strategy: str
    batch: int
    reason: str


@dataclass(frozen=True)
class CostTable(JsonNoun):
    """rows: the cells that can be, in the order of the grid. pruned: those that cannot."""

    rows: tuple[RunCost, ...]
    pruned: tuple[Pruned, ...]

    @property
    def front(self) -> tuple[RunCost, ...]:
        """The rows that no other one of the same batch beats in tokens/s and in dollars; of those with a price.

        By batch, then cheapest first. Rows of several batches are not set against each other: the tokens that a loss
        takes move with the batch, so the largest one would win for no reason of its own.
        """
        batches = sorted({row.batch for row in self.rows})
        return tuple(row for batch in batches for row in pareto([row for row in self.rows if row.batch == batch]))

    @property
    def cheapest(self) -> RunCost:
        """Least dollars, over all batches; of equals the fastest. `InputError` where no row has a price."""
        if not (best := pareto(self.rows)):
            raise InputError("dollars need a price: give prices, for no device of the table has one")
        return best[0]

    @property
    def fastest(self) -> RunCost:
        """Most tokens a second; of equals the cheapest."""
        return max(self.rows, key=lambda row: (row.tokens_per_second, -(row.dollars or 0.0)))

    def saturation(self, tolerance: float = TOLERANCE) -> dict[Variant, int]:
        """b*: for each (device, count, strategy) the smallest batch with 1 - tolerance of that variant's most tokens/s.

        In sequences over all devices, among the batches that were asked for.
        """
        check_inside(tolerance=tolerance)
        groups: dict[Variant, list[RunCost]] = {}
        for row in self.rows:
            groups.setdefault((row.device, row.devices, row.strategy), []).append(row)
        return {
            variant: min(
                row.batch
                for row in group
                if row.tokens_per_second >= (1 - tolerance) * max(other.tokens_per_second for other in group)
            )
            for variant, group in groups.items()
        }

    def table(self) -> str:
        """Plain text, one line a row, those on the front marked; then the cells that cannot be. GB are 1e9 bytes.

        micro: sequences of a pass. kWh: of the devices alone; kg CO2e, only where the grid's is given: with `pue`.
        """
        front = {id(row) for row in self.front}
        lines = [_line(row, "front" if id(row) in front else "") for row in self.rows]
        kept = [place for place in range(len(_HEAD)) if place != _CARBON or any(line[_CARBON] != "-" for line in lines)]
        text = text_table([_HEAD[place] for place in kept], [[line[place] for place in kept] for line in lines])
        text += f"\n{_FRONT}" if front else ""
        text += f"\n{_BATCHES}" if len({row.batch for row in self.rows}) > 1 else ""
        text += f"\nkWh: {ENERGY_NOTE}"
        prices = {f"{row.device} {row.price}" for row in self.rows if row.price is not None}
        text += "".join(f"\nprice: {each}" for each in sorted(prices))
        return text + "".join(
            f"\nnot: {cell.device} x {cell.devices}, {cell.strategy}, batch {cell.batch}: {cell.reason}"
            for cell in self.pruned
        )


def cost_table(
    training: Training,
    *,
    batches: Sequence[int],
    devices: Sequence[Device | str],
    counts: Sequence[int] = (1,),
    strategies: Sequence[str] = ("ddp",),
    step_time: StepTimeLaw | Sequence[float] | Mapping[str, StepTimeLaw | Sequence[float]] | None = None,
    mfu: float | Mapping[str, float] | None = None,
    prices: Mapping[str, float] | None = None,
    micro_batch: int | None = None,
    overlap: float = 0.0,
    utilisation: float = 1.0,
    g_per_kwh: float | None = None,
    pue: float = 1.0,
    inter_node_bandwidth: float = Cluster.inter_node_bandwidth,
    reserve: float = 0.0,
) -> CostTable:
    """`cost` of every device, count, strategy and batch; a cell that cannot be keeps its reason.

    step_time, mfu: of all devices, or by the device's name. prices: USD an hour by the device's name; a device that is
    not in it takes its dated price, or none. The other arguments are those of `cost`.

    Raises `InputError` where the grid is empty or nothing of it can be, with the first reason.

    >>> model = Training(1e9, 2e10, 2048, activation_bytes=6e9)
    >>> grid = cost_table(model, batches=[8, 64], devices=["A100-80"], counts=[8], mfu=0.4, prices={"A100-80": 2.0})
    >>> [row.batch for row in grid.rows], [row.batch for row in grid.front], [cell.batch for cell in grid.pruned]
    ([8, 64], [8, 64], [])
    """
    kinds = [find_device(device) for device in _axis("devices", devices)]
    sizes, ranks, names = _axis("batches", batches), _axis("counts", counts), _axis("strategies", strategies)
    _check_names({kind.name for kind in kinds}, step_time=step_time, mfu=mfu, prices=prices)
    rows: list[RunCost] = []
    pruned: list[Pruned] = []
    for kind, count, strategy, batch in product(kinds, ranks, names, sizes):
        try:
            row = cost(
                training,
                batch=batch,
                device=kind,
                devices=count,
                step_time=_of(step_time, kind.name),
                mfu=_of(mfu, kind.name),
                strategy=strategy,
                micro_batch=micro_batch,
                overlap=overlap,
                price_per_hour=(prices or {}).get(kind.name),
                utilisation=utilisation,
                g_per_kwh=g_per_kwh,
                pue=pue,
                inter_node_bandwidth=inter_node_bandwidth,
                reserve=reserve,
            )
            rows.append(row)
        except Infeasible as error:
            pruned.append(Pruned(kind.name, int(count), strategy, int(batch), str(error)))
    if not rows:
        raise InputError(f"no cell of the grid can be; the first: {pruned[0].reason}")
    return CostTable(tuple(rows), tuple(pruned))


def pareto(rows: Sequence[RunCost]) -> tuple[RunCost, ...]:
    """Those with a price that no other one beats: none has more tokens/s for no more dollars, or as many for fewer."""
    priced = [(row.dollars, -row.tokens_per_second, row) for row in rows if row.dollars is not None]
    front: list[tuple[float, float, RunCost]] = []
    for dollars, slowness, row in sorted(priced, key=lambda each: each[:2]):
        if not front or slowness < front[-1][1] or (dollars, slowness) == front[-1][:2]:
            front.append((dollars, slowness, row))
    return tuple(row for _, _, row in front)


def _axis(name: str, values: Iterable[T]) -> list[T]:
    found = [] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
    if not found:
        raise InputError(f"{name} must hold one or more, got {values!r}")
    return found


def _of(value: T | Mapping[str, T], name: str) -> T:
    return value[name] if isinstance(value, Mapping) else value


def _check_names(known: set[str], **by_name: object) -> None:
    for argument, value in by_name.items():
        if not isinstance(value, Mapping):
            continue
        if strangers := sorted(set(value) - known):
            raise InputError(f"{argument} must be by names of the devices {sorted(known)}, got {strangers[0]!r}")
        if argument != "prices" and (missing := sorted(known - set(value))):
            raise InputError(f"{argument} must be given for every device, got none for {missing[0]!r}")


def _line(row: RunCost, mark: str) -> tuple[str, ...]:
    return (
        row.device,
        str(row.devices),
        row.strategy,
        str(row.batch),
        str(row.micro_batch),
        str(row.passes),
        f"{row.step_seconds:.4g}",
        f"{row.tokens_per_second:.4g}",
        f"{row.seconds / 3600:.4g}",
        "-" if row.dollars is None else f"{row.dollars:.4g}",
        "-" if row.tokens_per_dollar is None else f"{row.tokens_per_dollar:.3g}",
        f"{row.energy.kwh:.4g}",
        "-" if row.energy.kg_co2e is None else f"{row.energy.kg_co2e:.4g}",
        f"{row.memory_bytes / 1e9:.3g}",
        row.bottleneck,
        mark,
    )
