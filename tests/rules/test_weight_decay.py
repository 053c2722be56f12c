"""The weights as an average of the updates, and the timescale that weight decay gives them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules import weight_decay

numbers = st.floats(1e-6, 1e3)


@pytest.mark.parametrize("scheduled", [False, True])
def test_adamw_averages_its_updates(scheduled):
    """Sheet check 1: θ_T = Π(1 - η_iλ)·θ₀ - Σ η_i·Π_{j>i}(1 - η_jλ)·u_i with torch's AdamW, float64."""
    lam, steps = 0.3, 25
    rates = [0.05 * (1 - i / 40) if scheduled else 0.05 for i in range(steps)]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    gradients = torch.randn(steps, 7, generator=generator, dtype=torch.float64)
    decayed = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([decayed], lr=0.05, weight_decay=lam)
    closed = start.clone()
    updates = []
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        decayed.grad = gradient
        before = decayed.detach().clone()
        optimizer.step()
        updates.append(((1 - rate * lam) * before - decayed.detach()) / rate)
    for i in range(steps):
        closed = closed * (1 - rates[i] * lam)
    for i in range(steps):
        kept = math.prod(1 - rate * lam for rate in rates[i + 1 :])
        closed = closed - rates[i] * kept * updates[i]
    torch.testing.assert_close(decayed.detach(), closed, rtol=1e-12, atol=1e-12)


@given(numbers, numbers, numbers, st.floats(1.0, 1e6))
def test_inversion(tau, batch, rate, updates):
    """Sheet check 2, the part that needs no power law."""
    run = {"batch_size": batch, "learning_rate": rate, "total_examples": batch * updates}
    decay = weight_decay.from_timescale(tau, **run)
    assert weight_decay.timescale(weight_decay=decay, **run) == pytest.approx(tau, rel=1e-12)


@given(numbers, numbers, numbers, st.floats(2.0, 1e6))
def test_doubling(tau, batch, rate, updates):
    run = {"learning_rate": rate, "total_examples": batch * updates}
    decay = weight_decay.from_timescale(tau, batch_size=batch, **run)
    assert weight_decay.from_timescale(tau, batch_size=2 * batch, **run) == pytest.approx(2 * decay, rel=1e-12)
    longer = run | {"total_examples": 2 * batch * updates}
    assert weight_decay.from_timescale(tau, batch_size=batch, **longer) == pytest.approx(decay / 2, rel=1e-12)


def test_published_setting():
    """610M at 20 tokens a parameter: η 0.016 scaled by width 8, λ 0.1, B 252 of 2048 tokens, D 1.22e10: τ = 0.21."""
    tau = weight_decay.timescale(
        batch_size=252 * 2048, learning_rate=0.016 / 8, weight_decay=0.1, total_examples=1.22e10
    )
    assert tau == pytest.approx(0.21, abs=0.005)


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "weight_decay", "total_examples"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers(name, bad):
    good = {"batch_size": 1.0, "learning_rate": 0.1, "weight_decay": 0.1, "total_examples": 10.0}
    with pytest.raises(InputError, match=f"{name} must be finite and > 0, got "):
        weight_decay.timescale(**(good | {name: bad}))


def test_run_shorter_than_an_update():
    with pytest.raises(InputError, match=r"total_examples must be at least batch_size: a run of 10 is less than"):
        weight_decay.from_timescale(0.2, batch_size=11, learning_rate=0.1, total_examples=10)


rates = st.floats(1e-7, 10.0)


@given(decay=numbers, rate=rates, new_rate=rates, batch=st.floats(1.0, 1e5), kappa=st.floats(1e-3, 1e3))
def test_scaling_keeps_the_timescale(decay, rate, new_rate, batch, kappa):
    run = {"total_examples": 1e9}
    tau = weight_decay.timescale(batch_size=batch, learning_rate=rate, weight_decay=decay, **run)
    moved = weight_decay.scale_weight_decay(decay, kappa, learning_rate=rate, new_learning_rate=new_rate)
    found = weight_decay.timescale(batch_size=kappa * batch, learning_rate=new_rate, weight_decay=moved, **run)
    assert found == pytest.approx(tau, rel=1e-12)
    assert moved == pytest.approx(
        weight_decay.from_timescale(tau, batch_size=kappa * batch, learning_rate=new_rate, **run), rel=1e-12
    )


@given(st.floats(0.0, 10.0), st.floats(1e-3, 1e3), rates)
def test_the_three_rules_of_the_sheets(decay, kappa, rate):
    """κλ where η stays (sheet 17), √κ·λ with the square-root rule (sheet 53), λ with the linear rule."""

    def moved(new_rate):
        return weight_decay.scale_weight_decay(decay, kappa, learning_rate=rate, new_learning_rate=new_rate)

    assert moved(rate) == decay * kappa
    assert moved(rate * math.sqrt(kappa)) == pytest.approx(decay * math.sqrt(kappa), rel=1e-12)
    assert moved(rate * kappa) == pytest.approx(decay, rel=1e-12)


def test_scaling_is_the_first_order_of_the_exact_form():
    """(1 - ηλ)^κ = 1 - η̂λ̂ (sheet 53): they part by (ηλ·κ)²/2 at most."""
    rate, new_rate, decay, kappa = 1e-3, 4e-3, 0.1, 16
    exact = (1 - (1 - rate * decay) ** kappa) / new_rate
    moved = weight_decay.scale_weight_decay(decay, kappa, learning_rate=rate, new_learning_rate=new_rate)
    assert 0 < moved - exact < (rate * decay * kappa) ** 2 / 2 / new_rate


def test_scaling_refuses():
    with pytest.raises(InputError, match="weight_decay must be >= 0, got -1"):
        weight_decay.scale_weight_decay(-1, 2, learning_rate=1, new_learning_rate=1)
    with pytest.raises(InputError, match="new_learning_rate must be finite and > 0, got 0"):
        weight_decay.scale_weight_decay(1, 2, learning_rate=1, new_learning_rate=0)


BASE = weight_decay.DecayBase(weight_decay=0.1, learning_rate=2e-3, batch_tokens=2**19, tokens=1.22e10, params=6.1e8)
wide = st.floats(0.01, 100.0)


def _run(params, tokens, batch, rate):
    return {
        "params": BASE.params * params,
        "tokens": BASE.tokens * tokens,
        "batch_tokens": BASE.batch_tokens * batch,
        "learning_rate": BASE.learning_rate * rate,
    }


@given(st.floats(0.1, 10.0), st.floats(0.1, 10.0), wide, wide)
def test_power_lines_inverts_the_timescale(params, tokens, batch, rate):
    """Sheet check 2: τ(λ_opt) = c·TPP^m to 1e-12, by the absolute form and from a base."""
    run = _run(params, tokens, batch, rate)
    for form in ({"absolute": True}, {"base": BASE}):
        found = weight_decay.power_lines(**run, **form)
        tau = weight_decay.timescale(
            batch_size=run["batch_tokens"],
            learning_rate=run["learning_rate"],
            weight_decay=found.weight_decay,
            total_examples=run["tokens"],
        )
        assert tau == pytest.approx(found.timescale, rel=1e-12)
        c = 1.084 if "absolute" in form else 524288 / (2e-3 * 0.1 * 1.22e10) * 20**0.527
        assert tau == pytest.approx(c * (run["tokens"] / run["params"]) ** -0.527, rel=1e-12)


@given(wide, wide)
def test_power_lines_relative_form_is_the_planner_rule(batch, rate):
    """λ = λ₀·(B/B₀)(η₀/η)(D₀/D)(TPP₀/TPP)^m, and at the base itself λ₀."""
    run = _run(2.0, 7.0, batch, rate)
    expected = 0.1 * batch / rate / 7 * (2 / 7) ** -0.527
    assert weight_decay.power_lines(**run, base=BASE).weight_decay == pytest.approx(expected, rel=1e-12)
    assert weight_decay.power_lines(**_run(1, 1, 1, 1), base=BASE).weight_decay == pytest.approx(0.1, rel=1e-12)


def test_power_lines_doublings():
    """Sheet check 2: B×2 doubles λ; D×2 at fixed tokens a parameter and B halves it."""
    one = weight_decay.power_lines(**_run(1, 1, 1, 1), absolute=True).weight_decay
    twice = weight_decay.power_lines(**_run(1, 1, 2, 1), absolute=True).weight_decay
    longer = weight_decay.power_lines(**_run(2, 2, 1, 1), absolute=True).weight_decay
    assert (twice, longer) == pytest.approx((2 * one, one / 2), rel=1e-12)


def test_power_lines_published_timescales():
    """Sheet check 3: τ(200)/τ(20) = 0.297; the paper reports about 0.21 at 20, its law gives 0.224."""
    at = {
        per: weight_decay.power_lines(
            params=6.1e8, tokens=6.1e8 * per, batch_tokens=5e5, learning_rate=2e-3, absolute=True
        ).timescale
        for per in (20, 200)
    }
    assert at[200] / at[20] == pytest.approx(0.297, abs=5e-4)
    assert at[20] == pytest.approx(0.224, abs=5e-4) and at[20] == pytest.approx(0.21, rel=0.08)


@given(st.floats(0.1, 50.0), st.floats(0.1, 50.0))
def test_power_lines_gives_the_timescale_of_the_trainer_that_uses_it(batch, tokens):
    """Sheet check 4: at equal tokens a parameter η ∝ √B with λ = λ₀·√(B/B₀)·D₀/D has the same τ."""
    rate = 2e-3 * math.sqrt(batch)
    theirs = 0.1 * math.sqrt(batch) / tokens
    run = {"params": 6.1e8 * tokens, "tokens": 1.22e10 * tokens, "batch_tokens": 2**19 * batch, "learning_rate": rate}
    ours = weight_decay.power_lines(**run, base=BASE)
    tau = weight_decay.timescale(
        batch_size=run["batch_tokens"], learning_rate=rate, weight_decay=theirs, total_examples=run["tokens"]
    )
    assert ours.timescale == pytest.approx(tau, rel=1e-12)
    assert ours.weight_decay == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0, got 0.0"),
        ({"base": BASE._replace(weight_decay=0.0)}, "weight_decay must be finite and > 0, got 0.0"),
        ({"base": BASE._replace(params=math.nan)}, "base_params must be finite and > 0, got nan"),
        ({"tokens": 1e5}, "total_examples must be at least batch_size: a run of 100000.0 is less than one update"),
        ({"optimizer": "adam"}, "optimizer must decay its weights apart from the gradient, as adamw does, got 'adam'"),
        ({"base": None}, "base must be a run whose weight decay was tuned, or absolute=True takes the paper's own"),
        ({"absolute": True}, "give one of them, got base=DecayBase"),
        ({"base": None, "absolute": True, "params": 6.1e2}, "tokens_per_parameter must be within a thousandfold"),
        ({"params": 6.1e2}, "tokens_per_parameter must be within a thousandfold for power_lines_timescale"),
        ({"base": BASE._replace(params=6.1e2)}, "base_tokens_per_parameter must be within a thousandfold"),
        ({"base": tuple(BASE)}, r"base must be a rules.weight_decay.DecayBase, got \(0.1, "),
        ({"optimizer": "lars"}, "got 'lars': its weight_decay joins before the step is rescaled"),
        ({"optimizer": "LAMB"}, "got 'LAMB': its weight_decay joins before the step is rescaled"),
        ({"optimizer": "nag"}, "got 'nag': its weight_decay is an L2 penalty in the gradient"),
        ({"optimizer": "yogi"}, "got 'yogi': how its weight_decay enters is not known here"),
        ({"optimizer": "garbage"}, "optimizer must be one of .*got 'garbage'"),
    ],
)
def test_power_lines_refuses(change, message):
    """Sheet check 7."""
    with pytest.raises(InputError, match=message):
        weight_decay.power_lines(**(_run(1, 1, 1, 1) | {"base": BASE} | change))


def test_power_lines_says_where_it_extrapolates_and_reads_back():
    far = weight_decay.power_lines(params=1e8, tokens=3e11, batch_tokens=1e6, learning_rate=1e-3, absolute=True)
    assert "tokens_per_parameter of 3e+03 lie beyond 10 to 1.3e+03" in far.outside and far.form == "absolute"
    assert weight_decay.DecayChoice.from_json(far.to_json()) == far


@pytest.mark.parametrize("name", ["AdamW", "sgdw", "came", "adafactor", "lion", "muon"])
def test_power_lines_takes_every_decoupled_decay(name):
    run = _run(1, 1, 2, 1)
    assert weight_decay.power_lines(**run, base=BASE, optimizer=name) == weight_decay.power_lines(**run, base=BASE)


def test_power_lines_from_a_base_says_where_either_run_extrapolates():
    assert weight_decay.power_lines(**_run(1, 1, 1, 1), base=BASE).outside == ""
    far = weight_decay.power_lines(**_run(1, 100, 1, 1), base=BASE)
    assert (
        far.outside == "tokens_per_parameter of 2e+03 lie beyond 10 to 1.3e+03, which power_lines_timescale was "
        "fitted over"
    )
    short = BASE._replace(params=BASE.params * 10)
    assert "base_tokens_per_parameter of 2 lie" in weight_decay.power_lines(**_run(1, 1, 1, 1), base=short).outside


def test_products_beyond_floats_are_refused():
    run = {"batch_size": 256, "learning_rate": 1e-200, "total_examples": 1e6}
    with pytest.raises(InputError, match=r"learning_rate\*weight_decay\*total_examples must be within the range"):
        weight_decay.timescale(weight_decay=1e-200, **run)
    with pytest.raises(InputError, match=r"learning_rate\*total_examples\*tau must be within the range of floats"):
        weight_decay.from_timescale(1e-200, **run)
    with pytest.raises(InputError, match=r"learning_rate\*weight_decay\*total_examples must be within the range"):
        weight_decay.timescale(batch_size=1e300, learning_rate=1e-160, weight_decay=1e-160, total_examples=1e302)
