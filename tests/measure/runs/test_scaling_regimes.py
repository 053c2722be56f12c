"""The three regimes against the law they are read from, exact recursions, coverage, and a small real study."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.job import Target
from batchlab.measure.runs.data_overhead import critical_batch
from batchlab.measure.runs.scaling_regimes import ScalingRegimes, perfect_scaling_limit
from batchlab.measure.runs.steps_to_result import StepsToTarget, steps_to_target
from batchlab.measure.runs.tradeoff import fit_tradeoff
from tests.core.test_study import study_folder, trial

GRID = [2.0**k for k in range(3, 15)]
SIMULATIONS = 400


def law(b_crit, sizes=GRID, s_min=100.0):
    return {b: s_min * (1 + b_crit / b) for b in sizes}


@pytest.mark.parametrize(("b_crit", "tolerance"), [(50, 0.2), (1000, 0.05), (3000, 1.0)])
def test_the_law_gives_its_closed_form_end_of_perfect_scaling(b_crit, tolerance):
    """Against the line through B_0: steps = (1 + tol)·line at tol·B_crit + (1 + tol)·B_0. Grid of 2 % steps."""
    sizes = np.geomspace(1, 20 * b_crit, int(math.log(20 * b_crit) / 0.02))
    found = perfect_scaling_limit(law(b_crit, sizes), tolerance=tolerance)
    truth = tolerance * b_crit + (1 + tolerance) * 1.0
    assert found.perfect_until.value == pytest.approx(truth, rel=1e-3)
    fit = critical_batch(sizes, list(law(b_crit, sizes).values()), tolerance)
    assert fit.size.value == pytest.approx(truth, rel=1e-6)
    ideal = fit_tradeoff(sizes, list(law(b_crit, sizes).values()))
    assert ideal.b_crit.value == pytest.approx(b_crit, rel=0.01)
    at = tolerance * b_crit
    assert ideal.steps(at) * at / ideal.e_min.value == pytest.approx(1 + tolerance, rel=1e-6)


def test_slopes_lines_and_regimes_of_the_law():
    found = perfect_scaling_limit(law(2048))
    below = [s for b, s in zip(found.batch_sizes, found.slopes) if 2 * b <= 2048 / 32]
    assert len(below) == 3 and all(abs(slope + 1) < 0.03 for slope in below)
    assert found.perfect == tuple(found.steps[0].value * 8 / b for b in GRID)
    assert found.normalised[0] == 1.0 and found.normalised[-1] == pytest.approx(found.steps[-1].value / 25700)
    assert [found.regime(b) for b in (8, 256, 512)] == ["perfect scaling", "perfect scaling", "diminishing returns"]
    assert found.flat_from.value == math.inf and found.base == 8.0
    small = perfect_scaling_limit(law(64))
    slopes = np.array(small.slopes)
    start = GRID.index(small.flat_from.value)
    assert (slopes[start:] >= -0.05).all() and slopes[start - 1] < -0.05
    assert small.regime(GRID[start]) == "maximal data parallelism"


def test_perfect_scaling_to_the_end_has_no_end():
    found = perfect_scaling_limit({b: 1e6 / b for b in GRID})
    assert found.perfect_until.value == math.inf == found.flat_from.value
    assert found.slopes == pytest.approx([-1.0] * (len(GRID) - 1))


def test_any_order_form_and_base():
    rows = law(256)
    found = perfect_scaling_limit(rows)
    assert perfect_scaling_limit(list(rows.items())[::-1]) == found
    assert perfect_scaling_limit([(b, [n, n]) for b, n in rows.items()]).perfect_until.value == pytest.approx(
        found.perfect_until.value
    )
    other = perfect_scaling_limit(rows, base=32)
    assert other.base == 32.0 and other.normalised[2] == 1.0 and other.normalised[0] > 1
    assert other.perfect_until.value > found.perfect_until.value
    assert ScalingRegimes.from_json(found.to_json()) == found


def test_one_seed_bounds_nothing():
    found = perfect_scaling_limit(law(256))
    assert (found.perfect_until.low, found.perfect_until.high) == (8.0, math.inf)
    assert (found.flat_from.low, found.flat_from.high) == (8.0, math.inf)
    assert (found.steps[0].low, found.steps[0].high) == (0.0, math.inf)
    assert "one run a size, which bounds nothing" in found.perfect_until.method


@pytest.mark.parametrize(("b_crit", "noise", "runs"), [(256, 0.05, 3), (256, 0.02, 5), (64, 0.1, 2)])
def test_intervals_cover_at_least_at_their_rate(b_crit, noise, runs):
    random, truth, covered = np.random.default_rng(0), perfect_scaling_limit(law(b_crit)), np.zeros(3)
    for _ in range(SIMULATIONS):
        rows = {b: n * np.exp(noise * random.standard_normal(runs)) for b, n in law(b_crit).items()}
        found = perfect_scaling_limit(rows)
        pairs = [(found.steps[4], law(b_crit)[GRID[4]])]
        pairs += [(getattr(found, name), getattr(truth, name).value) for name in ("perfect_until", "flat_from")]
        covered += [each.low <= value <= each.high for each, value in pairs]
    four_sigma = 4 * math.sqrt(0.95 * 0.05 / SIMULATIONS)  # 0.044
    assert (covered / SIMULATIONS > 0.95 - four_sigma).all(), covered / SIMULATIONS
    assert covered[0] / SIMULATIONS < 0.95 + four_sigma


def test_few_seeds_give_a_finite_interval_where_they_agree():
    random = np.random.default_rng(0)
    found = perfect_scaling_limit({b: n * np.exp(0.01 * random.standard_normal(5)) for b, n in law(256).items()})
    assert 0.8 * 60 < found.perfect_until.low < found.perfect_until.value < found.perfect_until.high < 1.25 * 60


def test_coarse_evaluations_widen_the_intervals_to_hold_the_truth():
    """Exact steps, seen every 10 % only; all seeds end at the same look."""
    truth = perfect_scaling_limit(law(256))
    rows = {}
    for size, steps in law(256).items():
        every = max(1, round(0.1 * steps))
        seen = StepsToTarget(math.ceil(steps / every) * every, every)
        rows[size] = [seen, seen]
    found = perfect_scaling_limit(rows)
    assert found.resolutions == tuple(max(1, round(0.1 * n)) for n in law(256).values())
    assert found.perfect_until.low < truth.perfect_until.value < found.perfect_until.high
    assert found.perfect_until.low < found.perfect_until.value < found.perfect_until.high
    assert found.flat_from.low < truth.flat_from.value <= found.flat_from.high
    for each, exact in zip(found.steps, law(256).values(), strict=True):
        assert each.low - 1e-9 <= exact <= each.high + 1e-9


def test_a_goal_met_at_the_start_is_recorded_and_its_size_left_out():
    rows = law(256) | {4.0: [StepsToTarget(0, 0, reached_at_start=True), 10.0]}
    found = perfect_scaling_limit(rows)
    assert found.met_at_start == (4.0,) and found.batch_sizes[0] == 8.0
    assert "met before the first update at batch size 4: choose a harder one" in found.note


def test_censored_runs_stay_censored():
    rows = law(256) | {16384.0: [None, 101.0], 32768.0: [None, 101.0, 102.0], 4.0: StepsToTarget(None, None)}
    found = perfect_scaling_limit(rows)
    assert found.censored == 3 and found.batch_sizes == (*GRID[:-1], 32768.0)
    assert "batch size 16384 is left out: 1 of 2 runs" in found.note
    assert "batch size 32768 counts by its median" in found.note
    assert found.steps[-1].value == pytest.approx(102.0)


def test_a_study_counts_by_its_fresh_seeds(tmp_path):
    trials = []
    for size, steps in ((16, 1000), (64, 260), (256, 150)):
        trials.append(trial(0, steps=steps - 50, batch_size=size))
        trials += [
            trial(k, steps=steps + k, kind="confirm", rate=1.0, batch_size=size, seed=k, resolution=10) for k in (1, 2)
        ]
    trials += [trial(0, "not reached", batch_size=1024), trial(0, steps=5, batch_size=4096)]
    found = perfect_scaling_limit(study_folder(tmp_path, trials, spec={"batch_sizes": [16]}))
    assert found.batch_sizes == (16.0, 64.0, 256.0) and found.resolutions == (10.0, 10.0, 10.0)
    assert found.steps[0].value == pytest.approx(math.sqrt(1001 * 1002)) and found.censored == 1
    assert "batch size 4096 has no run with a fresh seed yet" in found.note


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([(8, 100), (8, 90), (16, 50)], {}, "batch size 8 has two rows: give the runs of one size as one sequence"),
        ({8: [], 16: 50, 32: 40}, {}, "batch size 8 has no run: leave it out, or give None for one that failed"),
        ({8: 100}, {}, "study must hold at least 2 batch sizes that reached the goal, got 1"),
        ({}, {}, "at least 2 batch sizes that reached the goal, got 0"),
        ({8: 100, 16: None}, {}, "at least 2 batch sizes that reached the goal, got 1"),
        ({8: 100, 16: 50}, {"base": 32}, r"base must be one of the batch sizes .* \(8, 16\), got 32"),
        ("study", {}, "study must be a batchlab.Study, or pairs .batch size, runs., got 'study'"),
        ([8, 16], {}, "study must be a batchlab.Study, or pairs"),
        (3, {}, "study must be a batchlab.Study, or pairs"),
        ({"8": 100, 16: 50}, {}, "batch sizes must be finite and > 0, got '8'"),
        ({8: 100, 0: 50}, {}, "batch sizes must be finite and > 0, got 0"),
        ({8: 100, 16: 0}, {}, "steps must be > 0, or None where the target was not reached, got 0"),
        ({8: 100, 16: math.nan}, {}, "steps must be > 0, or None .* got nan"),
        ({8: 100, 16: 50}, {"tolerance": 0}, "tolerance must be finite and > 0, got 0"),
        ({8: 100, 16: 50}, {"flat": -1}, "flat must be finite and > 0, got -1"),
        ({8: 100, 16: 50}, {"coverage": 0}, "coverage must lie in .0, 1., got 0"),
    ],
)
def test_bad_input_is_named(rows, changes, message):
    with pytest.raises(InputError, match=message):
        perfect_scaling_limit(rows, **changes)


def quadratic_steps(batch_size, momenta, dimensions=100, share=0.05, most=20_000):
    """Updates until the exact expected loss of heavy-ball is 5 % of the first, at the best rate and momentum.

    Curvatures h = 1/k, gradient noise of covariance H/B. v' = m·v - η(hx + ξ), x' = x + v'; E x², E xv, E v².
    """
    h = 1.0 / np.arange(1, dimensions + 1)
    rates, m = (each.reshape(-1, 1) for each in np.meshgrid(np.geomspace(1e-3, 3.9, 60), momenta))
    kept = 1 - rates * h
    noise = rates**2 * h / batch_size
    xx, xv, vv = np.ones((len(m), dimensions)), np.zeros((len(m), dimensions)), np.zeros((len(m), dimensions))
    for step in range(most):
        if np.nanmin(xx @ h) <= share * h.sum():
            return step
        pull = rates * h
        square = pull**2 * xx - 2 * pull * m * xv + m**2 * vv + noise
        new_xx = kept**2 * xx + 2 * kept * m * xv + m**2 * vv + noise
        xv = (square - pull * xx + m * xv).clip(-1e12, 1e12)
        xx, vv = new_xx.clip(0, 1e12), square.clip(0, 1e12)
    return None


def test_momentum_extends_perfect_scaling_and_changes_nothing_at_batch_size_one():
    sizes = [2.0**k for k in range(13)]
    plain = {b: quadratic_steps(b, [0.0]) for b in sizes}
    sgd = perfect_scaling_limit(plain)
    for momenta in ([0.5], [0.8], [0.9], [0.5, 0.8, 0.9, 0.95, 0.98]):  # each alone, so that it could be the slower one
        heavy = {b: quadratic_steps(b, momenta) for b in sizes}
        assert heavy[1.0] == pytest.approx(plain[1.0], rel=0.1)
        assert perfect_scaling_limit(heavy).perfect_until.value >= sgd.perfect_until.value
        assert heavy[4096.0] < 0.8 * plain[4096.0]


def digits_split(seed):
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = torch.as_tensor(x, dtype=torch.float32)[order] / 16, torch.as_tensor(y)[order]
    return x[360:], y[360:], x[:360], y[:360]


def digits_curve(batch_size, rate, momentum, seed, *, most, until=0.0):
    """(updates, validation error) every 4 % or update, the untrained model's first; to `most` updates or the goal."""
    x, y, valid_x, valid_y = digits_split(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    draws, curve, due = torch.Generator().manual_seed(seed), [], 0
    for step in range(most + 1):
        if step >= due:
            with torch.no_grad():
                curve.append((step, (model(valid_x).argmax(1) != valid_y).float().mean().item()))
            due = step + max(1, step // 25)
            if curve[-1][1] <= until:
                break
        picked = torch.randint(len(y), (batch_size,), generator=draws)
        loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
        if not torch.isfinite(loss):
            return [*curve, (step + 1, math.nan)]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


def tuned_digits(batch_size, seed, trials=36):
    """The winner of quasi-random rates, even in ln η, and momenta, even in ln(1 - m): its steps and its settings."""
    best, most = (StepsToTarget(None, None), None), 100_000 // batch_size + 200
    for number in range(trials):
        u, v = (0.5 + number * 0.7548776662466927) % 1, (0.5 + number * 0.5698402909980532) % 1
        setting = (0.02 * 100**u, 1 - 0.5 * 0.04**v)
        curve = digits_curve(batch_size, *setting, seed, most=most, until=0.05)
        found = steps_to_target(curve, Target("error", 0.05))
        if found.reached and (best[1] is None or found.steps < best[0].steps):
            best, most = (found, setting), found.steps
    return best


@pytest.mark.slow
def test_digits_retuned_at_each_batch_size():
    """Medians of three seeds: steps fall or stay, large batches cost examples, and no quality is lost.

    36 trials a size: the winners of 12 differ by more than one evaluation on the plateau.
    """
    sizes, seeds = [8, 16, 32, 64, 128, 256, 512], range(3)
    won = {size: [tuned_digits(size, seed) for seed in seeds] for size in sizes}
    steps = {size: statistics.median(found.steps for found, _ in won[size]) for size in sizes}
    interval = {size: max(found.resolution for found, _ in won[size]) for size in sizes}
    for small, large in itertools.pairwise(sizes):
        assert steps[large] <= steps[small] + interval[small] + interval[large], steps
    assert 512 * steps[512] >= 1.5 * 8 * steps[8], steps
    found = perfect_scaling_limit({size: [each for each, _ in won[size]] for size in sizes})
    assert 8 <= found.perfect_until.value < 512 and found.met_at_start == ()
    worst = {
        size: statistics.median(
            min(error for _, error in digits_curve(size, *won[size][seed][1], seed, most=2000)) for seed in seeds
        )
        for size in (8, 512)
    }
    assert worst[512] <= worst[8] + 0.01, worst
