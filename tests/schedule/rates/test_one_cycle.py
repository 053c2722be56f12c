"""1cycle against the author's logs, torch's OneCycleLR, and itself after a resume."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.schedule.rates.one_cycle import OneCycle, cycle_momentum, cycle_rate
from batchlab.testing.schedules import run, small_optimizer


def sgd(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr, momentum=0.9, nesterov=True)


def digits(value):
    return float(f"{value:.6g}")


def test_it_is_what_the_first_log_says():
    at = {"peak": 1.2, "ratio": 12, "half": 3417, "total": 7080, "shape": "log"}
    steps = (0, 100, 1000, 3000, 3400, 3500, 5000, 6800, 6900)
    logged = (0.1, 0.132192, 0.42192, 1.06576, 1.19453, 1.17085, 0.644074, 0.0119403, 0.0001)
    assert [digits(cycle_rate(step, **at)) for step in steps] == pytest.approx(logged, rel=5e-6)
    steps = (100, 3400, 3500, 6800)
    momenta = (0.947073, 0.850498, 0.852429, 0.949005)
    assert [cycle_momentum(step, half=3417) for step in steps] == pytest.approx(momenta, abs=5e-7)
    artefact = [cycle_momentum(step, half=3417, artefact=True) for step in (*steps, 6900, 7000)]
    assert artefact == pytest.approx((*momenta, 0.949034, 0.947571), abs=5e-7)
    assert cycle_momentum(6900, half=3417) == 0.95


def test_it_is_what_the_other_logs_say():
    second = {"peak": 0.02, "ratio": 10, "half": 2246, "total": 4882, "shape": "log"}
    assert [cycle_rate(s, **second) for s in (4400, 4600)] == pytest.approx([0.000819235, 2e-6], rel=1e-6)
    third = {"peak": 0.8, "ratio": 10, "half": 4003, "total": 9277, "shape": "log"}
    single = 2**-23 * 0.8  # his solver computed 1 - x in float32: 0.00119905 for 0.8·6/4003 = 0.00119910
    assert [cycle_rate(s, **third) for s in (8000, 8200)] == pytest.approx([0.00119905, 8e-5], abs=single)


@pytest.mark.parametrize("make", [sgd, lambda lr: torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=lr)])
@pytest.mark.parametrize(("share", "ratio", "final"), [(0.45, 10.0, 1e3), (0.25, 25.0, 1e4), (0.4, 12.0, 1.0)])
def test_the_papers_shape_is_torchs_with_three_phases(make, share, ratio, final):
    """torch peaks at index share·T - 1 and ends at T - 1: half a cycle of share·T - 1 updates, T - 1 in all."""
    steps, batch = 200, 7
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        make(lr=0.7),
        max_lr=0.7,
        total_steps=steps,
        pct_start=share,
        anneal_strategy="linear",
        three_phase=True,
        div_factor=ratio,
        final_div_factor=final,
    )
    half = round(share * steps) - 1
    ours = OneCycle(
        make(lr=0.7), batch=batch, total=(steps - 1) * batch, half=half * batch, ratio=ratio, final_ratio=final
    )
    for step in range(steps):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), rel=1e-9, abs=1e-15)
        mine, other = ours.optimizer.param_groups[0], theirs.optimizer.param_groups[0]
        key = "betas" if "betas" in mine else "momentum"
        assert mine[key] == pytest.approx(other[key], abs=1e-9)
        if step < steps - 1:
            theirs.optimizer.step()
            theirs.step()
            run(ours, [None])


@given(
    half=st.integers(1, 10**6),
    rest=st.integers(0, 10**6),
    ratio=st.floats(1.01, 100),
    final=st.floats(1, 1e6),
    unit=st.integers(1, 1000),
    share=st.floats(0, 1.2),
)
def test_it_knows_no_unit_and_stays_between_its_ends(half, rest, ratio, final, unit, share):
    total = 2 * half + rest
    for shape in ("paper", "log"):
        at = {"peak": 1.0, "ratio": ratio, "final_ratio": final, "shape": shape}
        here = cycle_rate(share * total, half=half, total=total, **at)
        there = cycle_rate(share * total * unit, half=half * unit, total=total * unit, **at)
        assert there == pytest.approx(here, abs=1e-9)
        assert 1 / ratio / final * (1 - 1e-12) <= here <= 1
        assert cycle_rate(half, half=half, total=total, **at) == 1.0
        assert cycle_rate(0, half=half, total=total, **at) == pytest.approx(1 / ratio)
    momentum = cycle_momentum(share * total, half=half, artefact=True)
    assert 0.85 - 1e-12 <= momentum <= 0.95
    assert cycle_momentum(half, half=half) == 0.85 and cycle_momentum(2 * half, half=half) == 0.95


def test_momentum_and_rate_are_resumed_at_any_update_bit_for_bit():
    for middle in range(12):
        whole = OneCycle(small_optimizer(), batch=16, total=192)
        run(whole, [None] * middle)
        optimizer = small_optimizer()
        optimizer.load_state_dict(whole.optimizer.state_dict())
        resumed = OneCycle(optimizer, batch=16, total=192)
        resumed.load_state_dict(whole.state_dict())
        assert run(resumed, [None] * (12 - middle)) == run(whole, [None] * (12 - middle))


def test_a_change_of_batch_keeps_the_shape_in_examples():
    few, many = (OneCycle(sgd(), batch=batch, total=960) for batch in (16, 64))
    for _ in range(15):
        run(few, [None] * 4)
        run(many, [None])
        assert few.optimizer.param_groups[0]["lr"] == many.optimizer.param_groups[0]["lr"]
        assert few.optimizer.param_groups[0]["momentum"] == many.optimizer.param_groups[0]["momentum"]


def test_without_a_last_phase_the_paper_ends_at_the_base_and_the_log_at_the_floor():
    ends = [cycle_rate(200, peak=1.0, half=100, total=200, shape=shape) for shape in ("paper", "log")]
    assert ends == pytest.approx([0.1, 1e-4])


def test_past_the_end_it_holds_and_warns_once():
    schedule = OneCycle(sgd(), batch=10, total=30)
    for _ in range(3):
        schedule.step()
    held = schedule.get_last_lr()
    with pytest.warns(UserWarning, match="OneCycle ended at 30, and the run goes on at its last learning rate"):
        schedule.step()
    schedule.step()
    assert schedule.get_last_lr() == held == pytest.approx([1e-4])
    assert schedule.optimizer.param_groups[0]["momentum"] == 0.95


def test_the_defaults_are_the_authors():
    schedule = OneCycle(sgd(), batch=10, total=1000)
    assert (schedule.half, schedule.ratio, schedule.final_ratio, schedule.momentum) == (450, 10, 1000, (0.95, 0.85))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"half": 60}, "total must be at least twice half, 2 x 60, got 100"),
        ({"half": 0}, "half must be an integer of at least 1, got 0"),
        ({"total": 0}, "total must be an integer of at least 2, got 0"),
        ({"ratio": 1.0}, "ratio, the peak over the base, must be > 1, got 1.0"),
        ({"ratio": 0.5}, "ratio, the peak over the base, must be > 1, got 0.5"),
        ({"final_ratio": 0.5}, "final_ratio must be at least 1, got 0.5"),
        ({"momentum": (0.85, 0.95)}, r"momentum must be \(high, low\) with 0 <= low <= high < 1, got \(0.85, 0.95\)"),
        ({"momentum": (1.0, 0.9)}, "momentum must be"),
        ({"momentum": 0.9}, "momentum must be"),
        ({"shape": "cos"}, r"shape must be one of \['paper', 'log'\], got 'cos'"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(wrong, message):
    optimizer = sgd()
    with pytest.raises(InputError, match=message):
        OneCycle(optimizer, **({"batch": 10, "total": 100} | wrong))
    assert optimizer.param_groups[0]["lr"] == 1.0 and optimizer.param_groups[0]["momentum"] == 0.9


def test_an_optimizer_without_momentum_is_refused_unless_it_is_left_alone():
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(InputError, match="momentum must be None for Adagrad, which has no momentum and no betas"):
        OneCycle(optimizer, batch=10, total=100)
    assert OneCycle(optimizer, batch=10, total=100, momentum=None).get_last_lr() == [0.1]
    tensors = torch.optim.Adam(
        [torch.nn.Parameter(torch.ones(1))],
        betas=(torch.tensor(0.9), torch.tensor(0.99)),
        foreach=False,
        capturable=True,
    )
    with pytest.raises(InputError, match="betas must be floats for their first to be cycled"):
        OneCycle(tensors, batch=10, total=100)
