"""The timescale's law and the critical batch's, from simulated runs that follow them."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.rules.fit import CriticalBatchLaw, RunTable, TimescaleLaw, critical_batch_law, loss_curves, timescale
from batchlab.rules.weight_decay import from_timescale

C, M = 1.084, -0.527


DECAYS = 2.0 ** np.arange(-4, 5)


def sweeps(per_parameter, *, batch=2.0**19, noise=0.0, seed=0):
    """At each D/N a bowl in ln τ about c·(D/N)^m, λ in steps of two about the best, 100M parameters."""
    rng, rows = np.random.default_rng(seed), []
    for per in per_parameter:
        tokens, tau = 1e8 * per, C * per**M
        best = from_timescale(tau, batch_size=batch, learning_rate=2e-3, total_examples=tokens)
        for factor in DECAYS:
            lost = 0.02 * math.log(factor * 1.2) ** 2 + noise * rng.standard_normal()
            rows.append((1e8, tokens, batch, 2e-3, best * factor * 1.2, 2.5 + lost))
    names = ("params", "tokens", "batch_tokens", "learning_rate", "weight_decay", "loss")
    return RunTable.of(dict(zip(names, zip(*rows, strict=True), strict=True)))


def test_the_published_law_comes_back():
    found = timescale(sweeps([20, 80, 200, 500, 1280]))
    assert found.law.a.value == pytest.approx(C, rel=1e-9) and found.law.exponent.value == pytest.approx(M, abs=1e-9)
    assert found.law.value(200) / found.law.value(20) == pytest.approx(0.297, abs=5e-4)
    assert found.note == "" and len(found.sweeps) == 5
    assert TimescaleLaw.from_json(found.to_json()) == found


def test_at_fixed_n_and_d_the_best_timescale_does_not_move_with_the_batch():
    """Three batches of one (N, D) give one τ and λ in their ratio: λ_opt ∝ B."""
    tables = [sweeps([20, 80, 200], batch=2.0**k) for k in (17, 19, 21)]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0].columns}
    found = timescale(RunTable.of(columns))
    assert len(found.sweeps) == 9 and found.law.exponent.value == pytest.approx(M, abs=1e-9)


def test_the_exponent_covers_at_its_rate():
    """300 tables of seven sweeps at 90 %: four standard errors are 0.07."""
    inside = 0
    for seed in range(300):
        found = timescale(sweeps([20, 40, 80, 160, 320, 640, 1280], noise=0.003, seed=seed), coverage=0.9)
        inside += found.law.exponent.low <= M <= found.law.exponent.high
    assert abs(inside / 300 - 0.9) < 0.07, inside / 300


def test_sweeps_that_are_not_bracketed_are_left_out_and_said():
    table = sweeps([20, 80, 200, 500])
    tau = table["batch_tokens"] / (table["learning_rate"] * table["weight_decay"] * table["tokens"])
    kept = np.flatnonzero((table["tokens"] < 4e10) | (tau > C * 500**M))
    found = timescale(table.take(kept))
    assert len(found.law.x) == 3
    assert "tokens 5e+10, batch_tokens 5.243e+05, learning_rate 0.002 was left out: not bracketed: the l" in found.note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": 0.0}, "weight_decay must be > 0 in every row, got 0: its timescale is infinite"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0, got 0 in row 1"),
        ({"batch_tokens": 1e12}, "tokens must be those of the whole run, at least one batch of 1e.12, got 2e.09"),
        ({"optimizer": "Adam"}, "optimizer must decay its weights apart from the gradient, as adamw does, got 'Adam'"),
        ({"tokens": 2e9}, "the timescale law needs at least 3 sweeps of weight decay, got 1 usable ones"),
    ],
)
def test_what_has_no_timescale_is_refused(change, message):
    table = sweeps([20, 80, 200])
    columns = {name: list(values) for name, values in table.columns.items() if name != "steps"}
    columns |= {name: [value] * len(table) for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        timescale(RunTable.of(columns))


def runs_over_batches(models=((1e8, 2.2), (3e8, 2.0), (1e9, 1.8)), *, noise=0.0, seed=0):
    """L = E_N + 60·D_min^-0.2 with D = D_min(1 + B/B_crit), B_crit = 0.0471·2048·D_min^0.462; no learning rate."""
    rng, rows = np.random.default_rng(seed), []
    for params, floor in models:
        for batch in 2.0 ** np.arange(16, 24):
            for least in np.geomspace(5, 80, 6) * params:
                tokens = least * (1 + batch / (0.0471 * 2048 * least**0.462))
                rows.append(
                    (params, tokens, batch, (floor + 60 * least**-0.2) * math.exp(noise * rng.standard_normal()))
                )
    return RunTable.of(dict(zip(("params", "tokens", "batch_tokens", "loss"), zip(*rows, strict=True), strict=True)))


def test_the_critical_batch_comes_back_from_runs_of_any_schedule():
    """Along a run of one batch B_crit grows, so that L_B(D) is no exact power of D: within 5 % at each target loss."""
    found = critical_batch_law(runs_over_batches())
    assert found.law is not None and len(found.tradeoffs) == 9
    assert found.law.exponent.value == pytest.approx(0.462, abs=0.01)
    assert found.law.value(1.22e10) == pytest.approx(2150 * 2048, rel=0.03)
    for fit in found.tradeoffs:
        assert fit.b_crit.value == pytest.approx(0.0471 * 2048 * fit.e_min.value**0.462, rel=0.05)
        assert fit.e_min.value == pytest.approx(fit.s_min.value * fit.b_crit.value, rel=1e-9)
    assert CriticalBatchLaw.from_json(found.to_json()) == found


def test_noise_leaves_the_law_about_right():
    """0.1 % noise in the loss: the exponent within 0.05, about four times the spread over seeds (0.012)."""
    for seed in range(5):
        found = critical_batch_law(runs_over_batches(noise=0.001, seed=seed))
        assert found.law is not None and found.law.exponent.value == pytest.approx(0.462, abs=0.05)


def test_nothing_is_carried_beyond_its_runs():
    """A target below the losses of a batch leaves that batch out; below all of them it is refused."""
    table = runs_over_batches()
    longest = (table["batch_tokens"] == 2**16) & (table["loss"] <= 1.001 * table["loss"].min())
    curves = critical_batch_law(table.take(np.flatnonzero(~longest))).curves[2]
    assert len(curves.tokens(max(curves.low) * 1.001)) == 8
    assert [batch for batch, _ in curves.tokens(min(curves.low) * 1.0001)] == [2.0**k for k in range(17, 24)]
    assert curves.tokens(min(curves.low) * 0.999) == ()
    with pytest.raises(InputError, match="no target loss has runs on both sides at 3 batch sizes: loss 1 at params 1e"):
        critical_batch_law(runs_over_batches(), target_losses=[1.0])
    with pytest.raises(InputError, match="target_losses must be finite and > 0, got -1"):
        critical_batch_law(runs_over_batches(), target_losses=[-1])


def test_a_curve_of_known_constants_comes_back():
    batches, tokens = np.repeat([1e5, 2e5], 5), np.tile(np.geomspace(1e9, 1e11, 5), 2)
    losses = 1.9 + np.repeat([30.0, 40.0], 5) * tokens ** -np.repeat([0.2, 0.21], 5)
    curves = loss_curves(1e8, batches, tokens, losses)
    assert pytest.approx(1.9, abs=1e-6) == curves.E
    assert curves.k == pytest.approx((30, 40), rel=1e-4) and curves.beta == pytest.approx((0.2, 0.21), rel=1e-5)
    wanted = tuple((k / 0.4) ** (1 / beta) for k, beta in ((30, 0.2), (40, 0.21)))
    at = curves.tokens(2.3)
    assert [batch for batch, _ in at] == [1e5, 2e5]
    for (_, found), value in zip(at, wanted, strict=True):
        assert found == pytest.approx(value, rel=1e-4)


def test_curves_that_cannot_be_drawn_are_refused():
    with pytest.raises(InputError, match="tokens must hold at least 3 different lengths for one batch at params 1e.08"):
        loss_curves(1e8, [1e5] * 4, [1e9, 2e9, 1e9, 2e9], [3.0, 2.9, 3.0, 2.9])
    with pytest.raises(InputError, match="loss must fall with tokens at every batch size"):
        loss_curves(1e8, [1e5] * 3, [1e9, 2e9, 4e9], [2.7, 2.8, 2.9])
    with pytest.raises(InputError, match="loss must be finite and > 0, got nan"):
        loss_curves(1e8, [1e5] * 3, [1e9, 2e9, 4e9], [2.9, math.nan, 2.7])
    with pytest.raises(InputError, match="batch_tokens and tokens must be of one length, got 3 and 2"):
        loss_curves(1e8, [1e5] * 3, [1e9, 2e9], [2.9, 2.8, 2.7])
