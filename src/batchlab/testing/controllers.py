"""What every batch controller must keep: call each check with a function that makes yours, a fresh one each time.

    from batchlab.testing import controllers
    for check in controllers.CHECKS:
        check(lambda: MyBatch(64, maximum=512, patience=3))

A check raises `AssertionError` that says what was broken. Those in `RANKS` are to be called in every rank of a process
group. The facts are those of an imagined run of 200 updates whose noise scale, gradients' spread and seconds wander
over many orders of magnitude, so that a rule has reason to move; `it_moves` says whether it did.
"""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.noise.coordinate_test import CoordinateMoments
from batchlab.parallel.agree import agree_min
from batchlab.schedule.batches.controller import BatchController, StepFacts

Make = Callable[[], BatchController]
UPDATES = 200
_NOT_FINITE = (math.nan, math.inf, -math.inf)


def imagined(size: int, seen: int, step: int, seed: int = 0) -> StepFacts:
    """The facts after update `step` at `size`, a function of these numbers alone."""
    rng = random.Random(f"{seed} {step}")
    drift = math.exp(4 * math.sin((step + 37 * seed) / 25) + rng.gauss(0, 0.3))
    noise = 100 * drift
    trace = noise * rng.uniform(0.8, 1.2)
    grad_sq = 1 + trace / size
    along = grad_sq * trace / 2
    moments = CoordinateMoments(size, grad_sq, trace, along, trace - along / grad_sq, 3 * trace / grad_sq)
    seconds = (0.05 + 0.001 * size) * math.exp(abs(rng.gauss(0, 0.05)))
    estimate = Estimate(noise, noise / 2, noise * 2, "imagined")
    return StepFacts(seen, size, rng.uniform(1.0, 2.0), estimate, moments, seconds)


def run(control: BatchController, updates: int = UPDATES, seed: int = 0) -> Iterator[tuple[int, StepFacts, int]]:
    """(size, facts, next size) of each update of the imagined run."""
    seen = 0
    for step in range(1, updates + 1):
        size = control.batch_size
        seen += size
        facts = imagined(size, seen, step, seed)
        yield size, facts, control.next_batch(step, facts)


def it_moves(make: Make) -> None:
    """The imagined run moves it at least once: the other checks would tell little else."""
    assert any(size != after for size, _, after in run(make())), "no imagined fact moved it"


def sizes_keep_the_limits(make: Make) -> None:
    """Whole numbers within the bounds, multiples of `multiple_of`, changed by at most `growth` or one multiple."""
    for seed in range(3):
        control = make()
        for size, _, after in run(control, seed=seed):
            assert type(after) is int, f"a size is a {type(after).__name__}"
            assert after == control.batch_size, "batch_size is not what next_batch returned"
            assert control.minimum <= after <= control.maximum, f"{after} is out of bounds"
            assert after % control.multiple_of == 0, f"{after} is no multiple of {control.multiple_of}"
            step = abs(after - size)
            ratio = max(after / size, size / after)
            assert ratio <= control.growth * (1 + 1e-9) or step <= control.multiple_of, f"{size} to {after}"


def changes_are_patient(make: Make) -> None:
    """At least `patience` updates from the start to a change and from one change to the next; none where not due."""
    control = make()
    last = 0
    for step, (size, _, after) in enumerate(_with_due(control), 1):
        if size != after:
            assert step - last >= control.patience, f"changed {step - last} updates after the last change"
            last = step


def _with_due(control: BatchController) -> Iterator[tuple[int, StepFacts, int]]:
    due = control.due
    for size, facts, after in run(control):
        assert due or size == after, "changed where it was not due"
        yield size, facts, after
        due = control.due


def wishes_within_the_deadband_change_nothing(make: Make) -> None:
    """A wish, brought into the bounds, that is within `deadband` of the present size leaves it."""
    control, seen = make(), 0
    for step in range(1, UPDATES + 1):
        size = control.batch_size
        seen += size
        facts = imagined(size, seen, step)
        twin = copy.deepcopy(control)
        twin.note(step, facts)
        wish = twin.wanted(step, facts)
        after = control.next_batch(step, facts)
        if wish is not None and 0 < wish < math.inf:
            ratio = min(max(wish, control.minimum), control.maximum) / size
            inside = 1 / control.deadband < ratio < control.deadband
            assert not inside or after == size, f"{wish:g} is within the deadband of {size}, and it went to {after}"


def other_libraries_numbers_are_numbers(make: Make) -> None:
    """NumPy's and torch's facts, whose integers overflow, give the sizes that Python's give, and a state of JSON."""
    control, twin = make(), make()
    for step, (_, facts, after) in enumerate(run(control), 1):
        seen, batch = np.int32(facts.seen), np.int16(facts.batch)
        loss, seconds = torch.tensor(facts.loss), np.float64(facts.seconds or 0.0)
        told = replace(facts, seen=seen, batch=batch, loss=loss, seconds=seconds)  # type: ignore[arg-type]
        assert twin.next_batch(step, told) == after, f"update {step}: another size"
        json.dumps(twin.state_dict())


def skipped_updates_change_nothing(make: Make) -> None:
    """Neither the size nor the state, where the update was skipped or its loss is not finite."""
    control = make()
    for size, facts, after in run(control):
        state = control.state_dict()
        for spoilt in [replace(facts, skipped=True), *(replace(facts, loss=value) for value in _NOT_FINITE)]:
            assert control.next_batch(1, spoilt) == after, f"{size}: moved by a skipped update"
            assert control.state_dict() == state, "a skipped update left a trace in the state"


def unknown_facts_change_nothing(make: Make) -> None:
    """A fact that the rule needs and that is missing, NaN, infinite or undefined leaves the size."""
    control, seen = make(), 0
    for step in range(1, UPDATES + 1):
        size = control.batch_size
        seen += size
        facts = imagined(size, seen, step)
        for name in sorted(control.needs):
            for spoilt in _spoilt(facts, name):
                twin = copy.deepcopy(control)
                assert twin.next_batch(step, spoilt) == size, f"moved by {name} = {getattr(spoilt, name)!r}"
        control.next_batch(step, facts)


def _spoilt(facts: StepFacts, name: str) -> list[StepFacts]:
    if name == "noise_scale":
        values: list[Any] = [Estimate(value, -math.inf, math.inf, "spoilt") for value in (*_NOT_FINITE, 0.0, -5.0)]
    elif name == "batch_test":
        assert isinstance(facts.batch_test, CoordinateMoments)
        parts = ("grad_sq", "trace", "along", "across", "worst")
        values = [facts.batch_test._replace(**_all(parts, value)) for value in (math.nan, math.inf)]
    elif name == "seconds":
        return []  # a time may be missing: earlier ones stand
    else:
        values = []
    return [replace(facts, **{name: value}) for value in [None, *values]]


def _all(names: Iterable[str], value: Any) -> dict[str, Any]:
    return dict.fromkeys(names, value)


def other_facts_are_not_read(make: Make) -> None:
    """Facts that `needs` does not name may be None: the decisions stay."""
    whole, bare, seen = make(), make(), 0
    unneeded = {"loss", "noise_scale", "batch_test", "seconds"} - set(whole.needs)
    for step in range(1, UPDATES + 1):
        seen += whole.batch_size
        facts = imagined(whole.batch_size, seen, step)
        without = replace(facts, **_all(unneeded, None))
        assert whole.next_batch(step, facts) == bare.next_batch(step, without), f"it read one of {sorted(unneeded)}"


def state_goes_round(make: Make) -> None:
    """Through JSON in mid-run into a fresh one, it goes on alike; and what was saved does not move with the run."""
    for stop in (1, 7, 50, UPDATES // 2):
        first = make()
        for _ in run(first, stop):
            pass
        state = first.state_dict()
        text = json.dumps(state)
        second = make()
        second.load_state_dict(json.loads(text))
        assert second.batch_size == first.batch_size, "batch_size did not come back"
        assert second.state_dict() == json.loads(text), "the state is another after a round trip"
        seen = 1000
        for step in range(stop + 1, UPDATES + 1):
            seen += first.batch_size
            facts = imagined(first.batch_size, seen, step)
            pair = first.next_batch(step, facts), second.next_batch(step, facts)
            assert pair[0] == pair[1], f"{pair} at update {step} after a state from update {stop}"
        assert json.dumps(state) == text, "the saved state moved with the run"


def equal_facts_give_equal_sizes(make: Make) -> None:
    """Two of them, and a deep copy in mid-run, decide alike: nothing is drawn, and no clock is read."""
    one, other = make(), make()
    for step, (_, facts, after) in enumerate(run(one), 1):
        if step == UPDATES // 2:
            other = copy.deepcopy(other)
        assert other.next_batch(step, facts) == after, f"decided otherwise at update {step}"


def wrong_states_are_refused(make: Make) -> None:
    """The state of another controller, and one without a size."""
    control = make()
    state = control.state_dict()
    for wrong, word in (
        ({**state, "controller": "Another"}, "Another"),
        ({"controller": state["controller"]}, "batch_size"),
        ({**state, "batch_size": 1.5}, "batch_size"),
    ):
        try:
            make().load_state_dict(wrong)
        except InputError as error:
            assert word in str(error), f"the refusal does not name {word}: {error}"
        else:
            raise AssertionError(f"{wrong!r:.80} was not refused")


def states_of_other_bounds_come_into_them(make: Make) -> None:
    """A size that these bounds do not allow becomes an allowed one, with a warning."""
    control = make()
    for size in (control.maximum * 4 + 1, 10**12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            control.load_state_dict({**control.state_dict(), "batch_size": size})
        assert control.minimum <= control.batch_size <= control.maximum, f"{control.batch_size} is out of bounds"
        assert control.batch_size % control.multiple_of == 0, f"{control.batch_size} is no multiple"
        assert any(str(size) in str(warning.message) for warning in caught), "no warning names the size"


def ranks_decide_alike(make: Make) -> None:
    """In every rank of a group: each has a clock of its own, one skips now and then, has no loss, or no time."""
    control, rank, seen = make(), dist.get_rank(), 0
    sizes = []
    for step in range(1, UPDATES + 1):
        seen += control.batch_size
        facts = imagined(control.batch_size, seen, step)
        assert facts.seconds is not None
        slower = facts.seconds * (1 + 0.5 * ((rank + step) % dist.get_world_size()))
        facts = replace(facts, seconds=slower)
        if rank == 0 and step % 7 == 0:
            ways: list[dict[str, Any]] = [
                {"skipped": True},
                {"loss": math.nan},
                {"seconds": None},
                {"seconds": math.nan},
            ]
            facts = replace(facts, **ways[step % 4])
        sizes.append(control.next_batch(step, facts.agreed()))
    least, most = agree_min(sizes), [-value for value in agree_min([-size for size in sizes])]
    assert least == most == sizes, "ranks went through different sizes"


CHECKS: tuple[Callable[[Make], None], ...] = (
    it_moves,
    sizes_keep_the_limits,
    changes_are_patient,
    wishes_within_the_deadband_change_nothing,
    other_libraries_numbers_are_numbers,
    skipped_updates_change_nothing,
    unknown_facts_change_nothing,
    other_facts_are_not_read,
    state_goes_round,
    equal_facts_give_equal_sizes,
    wrong_states_are_refused,
    states_of_other_bounds_come_into_them,
)
RANKS: tuple[Callable[[Make], None], ...] = (ranks_decide_alike,)
