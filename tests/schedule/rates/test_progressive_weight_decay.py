"""PTWD: the phases by tokens, AdamW by hand, what decay does per token, and the optimizers that are refused."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.schedule.rates.progressive_weight_decay import (
    PTWD,
    ProgressiveWeightDecay,
    decay_per_token,
    equal_phases,
    phase_at,
)
from batchlab.testing.schedules import run, small_optimizer

PHASES = [(1000, 0.0), (1000, 0.5), (1000, 0.1)]


def test_300_steps_equal_adamw_by_hand_across_both_switches():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    w, b = (nn.Parameter(each.clone()) for each in start)
    groups = [{"params": [w]}, {"params": [b], "wd_scale": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    schedule = ProgressiveWeightDecay(optimizer, PHASES, batch=10)
    theta, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 301):
        g = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        w.grad, b.grad = g[0].clone(), g[1].clone()
        optimizer.step()
        schedule.step()
        decay = torch.tensor([[PTWD[(step - 1) // 100]], [0.0]], dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.95**step)
        theta = theta * (1 - 1e-2 * decay) - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8)
        torch.testing.assert_close(torch.stack([w, b]).detach(), theta, rtol=1e-12, atol=1e-12)


@given(counts=st.lists(st.integers(1, 400), min_size=2, max_size=40))
def test_the_decay_is_a_function_of_the_first_token_whatever_the_batches(counts):
    schedule = ProgressiveWeightDecay(small_optimizer(), PHASES, batch=7)
    for index, count in enumerate(counts):
        if index == len(counts) // 2:
            fresh = ProgressiveWeightDecay(small_optimizer(), PHASES, batch=7)
            fresh.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
            schedule = fresh
        start = sum(counts[:index])
        expected = 0.0 if start < 1000 else 0.5 if start < 2000 else 0.1
        assert [group["weight_decay"] for group in schedule.optimizer.param_groups] == [expected, 0.0]
        assert phase_at(PHASES, start) == schedule.phase
        schedule.step(count)


@pytest.mark.parametrize("batch", [10, 20])
def test_a_weight_that_nothing_drives_shrinks_by_the_closed_form(batch):
    w, frozen = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([{"params": [w]}, {"params": [frozen], "wd_scale": 0.0}], lr=0.01)
    schedule = ProgressiveWeightDecay(optimizer, PHASES, batch=batch)
    for _ in range(3000 // batch):
        w.grad, frozen.grad = torch.zeros_like(w), torch.zeros_like(frozen)
        optimizer.step()
        schedule.step()
    updates = 1000 // batch
    shrunk = (1 - 0.01 * 0.5) ** updates * (1 - 0.01 * 0.1) ** updates
    assert w.tolist() == pytest.approx([shrunk] * 3, rel=1e-12) and frozen.tolist() == [1.0] * 3
    for phase, decay in zip(schedule.report(), PTWD, strict=True):
        assert (phase.tokens, phase.updates, phase.weight_decay) == (1000, updates, decay)
        per_token = decay_per_token(learning_rate=0.01, weight_decay=decay, batch=batch)
        assert phase.per_token == pytest.approx(per_token, rel=1e-12)
        assert phase.log_shrink == pytest.approx((-1000 * per_token, 0.0), rel=1e-12)


@given(rate=st.floats(0, 0.5), decay=st.floats(0, 1), batch=st.integers(1, 10**7))
def test_twice_the_batch_halves_the_shrinking_per_token_exactly(rate, decay, batch):
    one, two = (decay_per_token(learning_rate=rate, weight_decay=decay, batch=b) for b in (batch, 2 * batch))
    assert one == 2 * two


def test_the_report_reads_the_rate_that_the_step_had_and_skips_what_was_skipped():
    optimizer = small_optimizer([0.1])
    schedule = ProgressiveWeightDecay(optimizer, [(100, 0.5)], batch=10)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01  # another schedule's step comes first
    schedule.step()
    schedule.step()  # the update was skipped: no optimizer step
    (phase,) = schedule.report()
    assert (phase.tokens, phase.updates) == (20, 1) and phase.log_shrink == (math.log1p(-0.05),)


def test_scales_are_kept_in_the_groups_and_follow_their_decay_by_default():
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], **extra} for extra in ({}, {"weight_decay": 0.0}, {"wd_scale": 2})
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3)
    schedule = ProgressiveWeightDecay(optimizer, PHASES, batch=1000)
    run(schedule, [None])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 1.0]
    assert [group["wd_scale"] for group in optimizer.param_groups] == [1.0, 0.0, 2]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    run(schedule, [None])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.2, 0.1]


def test_a_resume_within_the_phase_of_no_decay_decays_again_later():
    """The groups' decay is 0 then: what should decay is read from the scale."""
    optimizer = small_optimizer()
    schedule = ProgressiveWeightDecay(optimizer, PHASES, batch=500)
    run(schedule, [None])
    fresh = small_optimizer()
    fresh.load_state_dict(optimizer.state_dict())
    resumed = ProgressiveWeightDecay(fresh, PHASES, batch=500)
    resumed.load_state_dict(schedule.state_dict())
    run(resumed, [None])
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.5, 0.0]


def test_the_last_phase_goes_on():
    schedule = ProgressiveWeightDecay(small_optimizer(), PHASES, batch=500)
    run(schedule, [10_000, None, None])
    assert schedule.optimizer.param_groups[0]["weight_decay"] == 0.1 and schedule.phase == 2
    assert [phase.tokens for phase in schedule.report()] == [10_000, 0, 1000]


def test_equal_phases_hold_all_tokens():
    for tokens in (3, 100, 10**12 + 1):
        phases = equal_phases(tokens)
        assert sum(phase.tokens for phase in phases) == tokens and [p.weight_decay for p in phases] == list(PTWD)
    with pytest.raises(InputError, match="tokens must be an integer of at least 3, got 2"):
        equal_phases(2)


class Own(torch.optim.Optimizer):
    def __init__(self, params, **defaults):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.1, **defaults})

    def step(self, closure=None):
        return None


class MyAdamW(torch.optim.AdamW):
    pass


class MySGD(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), "SGD, whose decay is an L2 penalty"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam, whose decay is an L2 penalty"),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1), "NAdam, whose decay is an L2 penalty"),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), "RMSprop, whose decay is an L2 penalty"),
        (lambda p: MySGD(p, lr=0.1, weight_decay=0.1), "MySGD, whose decay is an L2 penalty"),
        (Own, "Own, whose decay is not known here: decoupled=True vouches for it"),
        (lambda p: torch.optim.LBFGS(p), "optimizer must have a weight_decay in every group, got LBFGS"),
    ],
)
def test_decay_that_is_coupled_to_the_gradient_is_refused(make, why):
    optimizer = make([nn.Parameter(torch.ones(1))])
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(InputError, match=why):
        ProgressiveWeightDecay(optimizer, PHASES, batch=10)
    assert [dict(group) for group in optimizer.param_groups] == before


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
        lambda p: torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], weight_decay=0.1),
        MyAdamW,
    ],
)
def test_decay_apart_from_the_gradient_is_taken(make):
    optimizer = make([nn.Parameter(torch.ones(1))])
    ProgressiveWeightDecay(optimizer, [(10, 0.25)], batch=10)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_an_optimizer_of_ones_own_is_vouched_for():
    optimizer = Own([nn.Parameter(torch.ones(1))])
    ProgressiveWeightDecay(optimizer, [(10, 0.25)], batch=10, decoupled=True)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"phases must hold at least one \(tokens, weight_decay\) and nothing else, got \[\]"),
        ([3], r"phases must hold at least one \(tokens, weight_decay\) and nothing else, got \[3\]"),
        ([(0, 0.1)], "tokens must be an integer of at least 1, got 0"),
        ([(10, -0.1)], "weight_decay of a phase must be finite and >= 0, got -0.1"),
        ([(10, math.nan)], "weight_decay of a phase must be finite and >= 0, got nan"),
    ],
)
def test_bad_phases_are_named(phases, message):
    with pytest.raises(InputError, match=message):
        ProgressiveWeightDecay(small_optimizer(), phases, batch=10)


def test_other_bad_input_is_named():
    with pytest.raises(InputError, match="no parameter group decays: give those that should wd_scale=1.0"):
        ProgressiveWeightDecay(torch.optim.AdamW([nn.Parameter(torch.ones(1))], weight_decay=0.0), PHASES, batch=10)
    with pytest.raises(InputError, match="optimizer must be a torch.optim.Optimizer, got list"):
        ProgressiveWeightDecay([], PHASES, batch=10)
    with pytest.raises(InputError, match="wd_scale of parameter groups must be finite and >= 0, got -1"):
        groups = [{"params": [nn.Parameter(torch.ones(1))], "wd_scale": -1}]
        ProgressiveWeightDecay(torch.optim.AdamW(groups), PHASES, batch=10)
    with pytest.raises(InputError, match="phases must be as many as the state's 1, got 3"):
        state = ProgressiveWeightDecay(small_optimizer(), PHASES[:1], batch=10).state_dict()
        ProgressiveWeightDecay(small_optimizer(), PHASES, batch=10).load_state_dict(state)
    with pytest.raises(InputError, match=r"learning_rate\*weight_decay must be < 1, or a weight changes sign, got 1.5"):
        decay_per_token(learning_rate=1.5, weight_decay=1.0, batch=1)


def test_a_rate_at_which_weights_would_change_sign_is_refused_before_the_update():
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([w], lr=1.0)
    schedule = ProgressiveWeightDecay(optimizer, [(10, 0.5), (10, 1.0)], batch=10)
    w.grad = torch.zeros(1)
    optimizer.step()
    schedule.step()
    with pytest.raises(InputError, match=r"lr\*weight_decay must be < 1.* got 1 of lr 1 and weight_decay 1"):
        optimizer.step()
    assert w.item() == 0.5
    assert json.loads(json.dumps(schedule.state_dict(), allow_nan=False)) == schedule.state_dict()


def test_a_copy_keeps_its_guard_and_its_account():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = ProgressiveWeightDecay(optimizer, [(100, 0.5)], batch=10)
    other = copy.deepcopy(schedule)
    for each in (schedule, other):
        for _ in range(2):
            each.optimizer.step()
            each.step()
    assert other.report() == schedule.report() and other.report()[0].updates == 2
    other.optimizer.param_groups[0]["lr"] = 4.0
    with pytest.raises(InputError):
        other.optimizer.step()


def test_no_phase_is_refused():
    with pytest.raises(InputError, match="^weight_decays must hold one phase's at least, got none$"):
        equal_phases(2, ())
