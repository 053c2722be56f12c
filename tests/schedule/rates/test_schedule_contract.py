"""Every schedule keeps the contract of `batchlab.testing.schedules`, and the contract notices what breaks it."""

import copy

import pytest
import torch

from batchlab.schedule.rates.counted import Counted
from batchlab.schedule.rates.wsd import WSD
from batchlab.testing import schedules
from tests.schedule.rates.cases import CASES


@pytest.mark.parametrize("check", schedules.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, check):
    check(CASES[name])


class Plain(Counted):
    """Half the rate every 64 units."""

    def __init__(self, optimizer, batch=8):
        super().__init__(optimizer, batch=batch)

    def rate(self, seen, base_lr):
        return base_lr * 0.5 ** (seen / 64)


class CountsSteps(Plain):
    def rate(self, seen, base_lr):
        return base_lr * 0.5**self.last_epoch


class ForgetsBatch(Plain):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "batch": 8})


class StandsStill(Plain):
    def rate(self, seen, base_lr):
        return base_lr


class OneRateForAll(Plain):
    def rate(self, seen, base_lr):
        return 0.01 * 0.5 ** (seen / 64)


class ReplacesTensors(Plain):
    def _write(self):
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])
        super()._write()


class Overwrites(Plain):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._write()


class Warns(Plain):
    def step(self, count=None):
        torch.optim.lr_scheduler.LRScheduler.step(self, None)
        super().step(count)


class TakesAnything(Plain):
    def _add(self, count):
        self._seen += int(count or self.units)


BROKEN = {
    "it_moves": StandsStill,
    "any_split_is_equal": CountsSteps,
    "state_goes_round": ForgetsBatch,
    "resuming_writes_nothing_else": Overwrites,
    "groups_keep_their_ratios": OneRateForAll,
    "tensors_are_filled": ReplacesTensors,
    "it_warns_of_nothing": Warns,
    "refusals": TakesAnything,
}


@pytest.mark.parametrize("check", schedules.CHECKS, ids=lambda check: check.__name__)
def test_the_contract_fails_where_it_is_broken(check):
    check(Plain)
    with pytest.raises(AssertionError):
        check(BROKEN.get(check.__name__, CountsSteps))


def make_two(schedules_of):
    optimizer = schedules.small_optimizer()
    parts = [make(optimizer) for make in schedules_of]
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def test_it_takes_its_turn_in_torchs_sequence():
    """Each begins its own count at its milestone, as torch's do."""
    pair = [lambda o: WSD(o, batch=8, warmup=32), lambda o: Plain(o)]
    optimizer, sequence = make_two(pair)
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        sequence.step()
    assert found == pytest.approx([0.02 * x for x in (0, 0.25, 0.5, 1, 0.5**0.125, 0.5**0.25)], rel=1e-15)


@pytest.mark.parametrize("taken", [1, 5])
def test_it_is_resumed_in_torchs_sequence(taken):
    pair = [lambda o: WSD(o, batch=8, warmup=32), lambda o: Plain(o)]
    both = optimizer, sequence = make_two(pair)
    for _ in range(taken):
        optimizer.step()
        sequence.step()
    for order in (0, 1):
        again, resumed = make_two(pair)
        for each, its in (((again, optimizer), (resumed, sequence)), ((resumed, sequence), (again, optimizer)))[order]:
            each.load_state_dict(copy.deepcopy(its.state_dict()))
        assert schedules.numbers(again) == schedules.numbers(optimizer)
    for _ in range(4):
        for each, its in (both, (again, resumed)):
            each.step()
            its.step()
        assert schedules.numbers(again) == schedules.numbers(optimizer)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("wsd", {"decided": [5]}, "decided must be the end and the length of a cool-down or None"),
        ("wsd", {"lr": [0.1, float("nan")]}, "base_lrs and lr must be one finite rate >= 0 a group"),
        ("wsd", {"base_lrs": [0.1]}, "base_lrs and lr must be one finite rate >= 0 a group"),
        ("wsd", {"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ("regime", {"place": [1, 0]}, "place must be a numerator and a denominator"),
    ],
)
def test_a_damaged_state_is_refused(name, damage, message):
    schedule = CASES[name](schedules.small_optimizer())
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict({**schedule.state_dict(), **damage})


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.Adadelta(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1),
        lambda p: torch.optim.LBFGS(p, lr=0.1),
    ],
)
def test_any_optimizer_of_torch_is_scheduled(make):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make([parameter])
    schedule = Plain(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="not an Optimizer"):
        Plain([torch.nn.Parameter(torch.ones(1))])


def test_a_state_of_more_groups_is_refused():
    state = Plain(schedules.small_optimizer()).state_dict()
    with pytest.raises(ValueError, match="the optimizer must have the 2 parameter groups of the state, got 1"):
        Plain(schedules.small_optimizer([0.1])).load_state_dict(state)


def test_a_rate_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="lr of parameter groups must be finite and >= 0, got inf"):
        Plain(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=float("inf")))


def test_base_rates_may_be_moved_in_mid_run():
    optimizer = schedules.small_optimizer()
    schedule = Plain(optimizer)
    schedule.base_lrs[0] *= 2
    schedule.step(64)
    assert schedule.get_last_lr() == [0.02, 0.0025]


def test_past_the_end_it_holds_and_says_so_once():
    schedule = WSD(schedules.small_optimizer(), batch=8, total=16, decay=8)
    schedule.step()
    schedule.step(10)
    with pytest.warns(
        UserWarning, match=r"WSD ended at 16, and the run goes on at its last learning rate: \[0.0, 0.0\]"
    ):
        schedule.step()
    schedules.run(schedule, [None] * 2)
    assert schedule.get_last_lr() == [0.0, 0.0]
