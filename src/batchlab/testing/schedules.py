"""What every schedule of learning rates or weight decays must keep: call each check with a function that makes yours.

    from batchlab.testing import schedules
    for check in schedules.CHECKS:
        check(partial(MySchedule, batch=8, total=80))

A check raises `AssertionError` that says what was broken. `make` takes an optimizer, and the units of an update by the
name of `batch`; what it makes counts them as `batchlab.schedule.Counted` does. It should move within some ten updates
of the batch given. Everything that it writes into parameter groups is compared, bit for bit.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.testing.optimizers import refused

Make = Callable[..., Any]
UPDATES = 10
RATES = (0.02, 0.005)


def small_optimizer(rates: Iterable[float] = RATES) -> torch.optim.Optimizer:
    """AdamW with a group for each rate; the last has no weight decay, as biases have none."""
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate, "weight_decay": 0.1} for rate in rates]
    groups[-1]["weight_decay"] = 0.0 if len(groups) > 1 else 0.1
    return torch.optim.AdamW(groups)


def numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the groups hold beside their parameters, tensors as numbers."""
    return [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def run(schedule: Any, counts: Iterable[int | None]) -> list[list[dict[str, Any]]]:
    """An update and a step for each count; what the groups held during each, and after the last."""
    optimizer, found = schedule.optimizer, []
    for count in counts:
        found.append(numbers(optimizer))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one that has ended may say so
            schedule.step() if count is None else schedule.step(count)
    return [*found, numbers(optimizer)]


def same(ours: Any, theirs: Any, what: str) -> None:
    """Raises where two are not equal."""
    assert ours == theirs, f"{what}: {ours} against {theirs}"


def it_moves(make: Make) -> None:
    """Something in the groups changes within the updates, and two runs are equal."""
    found = run(make(small_optimizer()), [None] * UPDATES)
    same(found, run(make(small_optimizer()), [None] * UPDATES), "two runs")
    assert any(each != found[0] for each in found), f"nothing moved in {UPDATES} updates"
    rates = [group["lr"] for each in found for group in each]
    assert all(0 <= rate < float("inf") for rate in rates), f"rates must be finite and >= 0: {rates}"


def any_split_is_equal(make: Make) -> None:
    """At equal `seen` it is the same, whatever the updates that led there, ragged ones too."""
    whole = make(small_optimizer())
    units = whole.units
    at = dict(zip(itertools.count(0, units), run(whole, [None] * UPDATES), strict=False))
    for split in ([2 * units] * (UPDATES // 2), [units - 1, 1] * UPDATES, [1, 3 * units - 1, units + 1, units - 1]):
        schedule = make(small_optimizer())
        for count in (count for count in split if count):
            run(schedule, [count])
            if schedule.seen in at:
                same(numbers(schedule.optimizer), at[schedule.seen], f"at {schedule.seen} by {split}")
    same(whole.seen, UPDATES * units, "seen")


def state_goes_round(make: Make) -> None:
    """Saved in the middle as JSON and loaded into a fresh one, it goes on equal; after a change of batch too."""
    for middle in range(UPDATES):
        schedule = make(small_optimizer())
        run(schedule, [None] * middle)
        schedule.batch = 2 * schedule.batch
        run(schedule, [None, 3])
        saved = json.loads(json.dumps(schedule.state_dict())), schedule.optimizer.state_dict()
        fresh = make(small_optimizer())
        fresh.optimizer.load_state_dict(saved[1])
        fresh.load_state_dict(saved[0])
        same(json.loads(json.dumps(fresh.state_dict())), saved[0], "the state of what was loaded")
        same(run(fresh, [None] * UPDATES), run(schedule, [None] * UPDATES), f"the rest after {middle} updates")


def resuming_writes_nothing_else(make: Make) -> None:
    """Made before or after the optimizer is loaded, the groups hold what was saved; a rate set by hand stays."""
    for middle in (0, 1, UPDATES // 2):
        schedule = make(small_optimizer())
        run(schedule, [None] * middle)
        saved, groups = schedule.state_dict(), schedule.optimizer.state_dict()
        before = numbers(schedule.optimizer)
        first, then = small_optimizer(), small_optimizer()
        first.load_state_dict(groups)
        make(first).load_state_dict(saved)
        same(numbers(first), before, "made after the optimizer was loaded")
        late = make(then)
        then.load_state_dict(groups)
        late.load_state_dict(saved)
        same(numbers(then), before, "made before the optimizer was loaded")
    optimizer = small_optimizer()
    again = make(optimizer)
    optimizer.param_groups[0]["lr"] = 0.123
    again.load_state_dict(saved)
    same(optimizer.param_groups[0]["lr"], 0.123, "a rate set by hand before loading")


def batch_may_change(make: Make) -> None:
    """Twice or half the batch from the middle on counts so, and depends on nothing but where it changed."""
    for factor in (2.0, 0.5):
        ends = []
        for small in ([], [1, 2, 1]):
            schedule = make(small_optimizer())
            units = schedule.units
            run(schedule, [*small, units - sum(small), 2 * units])
            schedule.batch = int(schedule.batch * factor)
            same(schedule.units, int(units * factor), "the units of an update")
            run(schedule, [None, None, 3])
            same(schedule.seen, 3 * units + 2 * int(units * factor) + 3, "seen")
            ends.append(run(schedule, [None] * 3)[-1])
        same(ends[0], ends[1], f"after the batch changed by {factor}")


def groups_keep_their_ratios(make: Make) -> None:
    """Every group's rate is the same share of its own, and a group that is added later joins."""
    optimizer = small_optimizer()
    schedule = make(optimizer)
    for update in range(UPDATES):
        if update == UPDATES // 2:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
            same(optimizer.param_groups[2]["lr"], 0.1, "the rate of a group before its first step")
        run(schedule, [None])
        rates = [group["lr"] for group in optimizer.param_groups]
        expected = [rates[0] / RATES[0] * base for base in (*RATES, 0.1)][: len(rates)]
        gaps = [abs(rate - other) for rate, other in zip(rates, expected, strict=True)]
        assert all(gap <= 1e-12 for gap in gaps), f"rates {rates} are not in the ratio of their groups' {expected}"
    alone = make(small_optimizer())
    same(numbers(optimizer)[:2], run(alone, [None] * UPDATES)[-1], "the first groups beside a later one")
    if hasattr(schedule, "get_last_lr"):
        same(schedule.get_last_lr(), rates, "get_last_lr")


def tensors_are_filled(make: Make) -> None:
    """A rate that is a tensor stays the same tensor."""
    parameters = [nn.Parameter(torch.ones(2))]
    rate = torch.tensor(RATES[0], dtype=torch.float64)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1, foreach=False)
    schedule, plain = make(optimizer), make(small_optimizer(RATES[:1]))
    for _ in range(UPDATES):
        run(schedule, [None])
        run(plain, [None])
        assert optimizer.param_groups[0]["lr"] is rate, "the tensor was replaced"
        same(rate.item(), plain.optimizer.param_groups[0]["lr"], "the tensor's value")
        json.dumps(schedule.state_dict())


def it_warns_of_nothing(make: Make) -> None:
    """Neither stepping, in either order, nor closures, nor saving and loading give a warning."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        schedule = make(small_optimizer())
        schedule.step()
        assert schedule.optimizer.step(lambda: 1.5) == 1.5, "the closure's loss is lost"
        schedule.step(1)
        schedule.load_state_dict(schedule.state_dict())
        if hasattr(schedule, "get_lr"):
            same(schedule.get_lr(), schedule.get_last_lr(), "get_lr")
    assert not found, f"it warns: {[str(each.message) for each in found]}"


def refusals(make: Make) -> None:
    """Batches and counts that are no positive integers, and states of something else, are refused; nothing moves."""
    for wrong in (0, -8, 1.5, float("nan"), True, "8"):
        refused(lambda wrong=wrong: make(small_optimizer(), batch=wrong), "batch")  # type: ignore[misc]
        schedule = make(small_optimizer())
        before = numbers(schedule.optimizer), schedule.state_dict()
        refused(lambda schedule=schedule, wrong=wrong: schedule.step(wrong), "count")  # type: ignore[misc]
        refused(lambda schedule=schedule, wrong=wrong: setattr(schedule, "batch", wrong), "batch")  # type: ignore[misc]
        same((numbers(schedule.optimizer), schedule.state_dict()), before, f"after {wrong!r} was refused")
    refused(lambda: make(small_optimizer()).load_state_dict({"last_epoch": 3}), "state")
    damaged = {**make(small_optimizer()).state_dict(), "seen": -1}
    refused(lambda: make(small_optimizer()).load_state_dict(damaged), "seen")


CHECKS: tuple[Callable[[Make], None], ...] = (
    it_moves,
    any_split_is_equal,
    state_goes_round,
    resuming_writes_nothing_else,
    batch_may_change,
    groups_keep_their_ratios,
    tensors_are_filled,
    it_warns_of_nothing,
    refusals,
)
