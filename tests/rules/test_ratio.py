"""The ratio study: the paper's table, planted truths, false positives, descent as a control, what must not matter."""

import math
from collections import Counter

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.rules.ratio import RatioRun, compare, lr_to_batch, ratio, sweep
from batchlab.rules.ratio_nouns import LrToBatch

CELLS = sweep([8, 16, 32, 64, 128], learning_rates=[1, 2, 4, 8, 16], examples=1024)
X, Z = (np.log([getattr(cell, name) for cell in CELLS]) for name in ("ratio", "product"))


def standard(values):
    return (values - values.mean()) / values.std()


UP, ACROSS = standard(X), standard(Z)


def study(truths, noise, random, seeds=5, cells=CELLS):
    """One run for each cell and seed, scores "y1", "y2", ... around the truths."""
    scores = np.asarray(truths)[:, None, :] + noise * random.standard_normal((len(truths), seeds, len(cells)))
    return [
        RatioRun(c.learning_rate, c.batch_size, c.steps, s, {f"y{k + 1}": y[s, i] for k, y in enumerate(scores)})
        for i, c in enumerate(cells)
        for s in range(seeds)
    ]


RECIPES = {
    "SFT-1130": (9.0e-5, 8, 11.25),
    "SFT-1207": (3.1e-6, 32, 0.097),
    "Tulu3-8B SFT": (5.0e-6, 128, 0.039),
    "Tulu3-70B SFT": (2.0e-6, 128, 0.016),
    "DPO-1130": (8.0e-7, 12, 0.067),
    "DPO-1207": (5e-7, 32, 0.016),
    "Tulu3-8B DPO": (5.0e-7, 128, 0.004),
    "Tulu3-70B DPO": (2.0e-7, 128, 0.002),
}


def test_the_ratios_of_the_published_recipes():
    for rate, size, printed in RECIPES.values():
        digits = 2 if printed > 1 else 3
        assert round(1e6 * ratio(rate, size), digits) == printed
    printed_times_1e7 = [0.667, 0.156, 0.039, 0.016]
    assert [round(1e7 * ratio(*row[:2]), 3) for row in list(RECIPES.values())[4:]] == printed_times_1e7
    assert [round(1e7 * ratio(*row), 3) for row in ((4e-5, 4), (7.5e-7, 8), (5e-7, 128))] == [100, 0.938, 0.039]


def test_the_headline_pair_moves_ratio_and_product_together():
    (a, b), (c, d) = RECIPES["SFT-1130"][:2], RECIPES["SFT-1207"][:2]
    assert round(ratio(a, b) / ratio(c, d)) == 116 and round(a * b / (c * d), 1) == 7.3


def test_planted_truths_are_told_apart():
    """20 studies, noise a tenth of the effects: those with an effect along the ratio every time. A test of something
    that is not there errs 1 time in 20; 15 of 20 has the chance 99.97 %."""
    random, verdicts, splits = np.random.default_rng(0), Counter(), Counter()
    for _ in range(20):
        found = lr_to_batch(study([UP, -UP, ACROSS, 0 * UP], 0.1, random), draws=200)
        verdicts.update((each.task, each.verdict) for each in found.tasks)
        enough = {each.task: each.sufficient for each in found.tasks}
        verdicts.update({("y1", "ratio alone"): enough["y1"] == ("ratio",)})
        verdicts.update({("y3", "product alone"): enough["y3"] == ("product",)})
        splits.update((each.first, each.second) for each in found.splits if each.found)
    assert verdicts["y1", "high"] == verdicts["y2", "low"] == splits["y1", "y2"] == 20
    assert min(verdicts["y3", "not the ratio"], verdicts["y4", "none"]) >= 15
    assert min(verdicts["y1", "ratio alone"], verdicts["y3", "product alone"]) >= 15
    assert splits["y1", "y4"] + splits["y2", "y4"] + splits["y3", "y4"] <= 3


def test_pure_noise_seldom_has_a_verdict():
    """200 studies of two tasks: a verdict for one at most 12 % of the time, a split at most 3 %."""
    random, verdicts, split = np.random.default_rng(1), 0, 0
    for _ in range(200):
        found = lr_to_batch(study([0 * UP, 0 * UP], 1.0, random), draws=100)
        verdicts += found.task("y1").verdict != "none"
        split += found.splits[0].found
    assert verdicts <= 24 and split <= 6


def test_tasks_that_are_the_same_do_not_split():
    runs = study([UP], 0.3, np.random.default_rng(2))
    twice = [run._replace(scores={"a": run.scores["y1"], "b": run.scores["y1"]}) for run in runs]
    assert [each.found for each in lr_to_batch(twice).splits] == [False]


def test_an_optimum_along_the_ratio_is_curved_and_two_of_them_split():
    """Where it is at the centre there is no slope. Curved a little across too, so that there is one best cell."""
    random = np.random.default_rng(3)
    x, z = X - X.mean(), Z - Z.mean()
    ridge, middle, low, high = -(x**2), *(-((x - shift) ** 2) - 0.2 * z**2 for shift in (0.0, -1.5, 1.5))
    found = lr_to_batch(study([ridge, middle, low, high], 0.05, random))
    assert found.task("y1").verdict == found.task("y2").verdict == "curved"
    assert found.task("y1").sufficient == ("ratio",) and found.task("y2").sufficient == ()
    assert found.task("y2").interior and found.cells[found.task("y2").best].ratio == 0.125
    split = {(each.first, each.second): each for each in found.splits}
    assert split["y2", "y4"].how == "best ratios apart" and split["y2", "y4"].apart >= 0.9
    assert split["y3", "y4"].how == "opposite slopes"


def descent(kind, chains=400, steps=2500, seed=0):
    """ln of the excess loss at stationarity on w²/2: SGD and sign descent on noise of deviation 20/√B."""
    cells = sweep([4, 8, 16, 32], learning_rates=list(np.geomspace(0.02, 0.2, 4)), steps=steps)
    rate = np.array([cell.learning_rate for cell in cells])[:, None]
    noise = 20 / np.sqrt([cell.batch_size for cell in cells])[:, None]
    random = np.random.default_rng(seed)
    runs = []
    for each in range(3):
        w = np.zeros((len(cells), chains))
        for _ in range(steps):
            gradient = w + noise * random.standard_normal(w.shape)
            w -= rate * (np.sign(gradient) if kind == "sign" else gradient)
        excess = np.log((w**2).mean(axis=1) / 2)
        runs += [RatioRun(c.learning_rate, c.batch_size, steps, each, {"loss": excess[i]}) for i, c in enumerate(cells)]
    return lr_to_batch(runs, directions={"loss": "min"}).task("loss")


def test_descent_as_a_control_the_exponent_tells_and_the_share_does_not():
    """Excess ∝ η/B for SGD, to first order in η, and ∝ η/√B for sign descent: exponents 1 and 0.5."""
    sgd, sign = descent("sgd"), descent("sign")
    assert sgd.batch_exponent.value == pytest.approx(1.0, abs=0.1)
    assert sign.batch_exponent.value == pytest.approx(0.5, abs=0.1)
    assert sgd.batch_exponent.low > 0.75 > sign.batch_exponent.high
    assert sgd.shares["ratio"] > 0.95
    assert sign.shares["ratio"] == pytest.approx(0.905, abs=0.03)
    assert sign.p_alone["ratio"] < 0.01 and sgd.verdict == sign.verdict == "low"


def test_the_share_of_the_ratio_in_closed_form():
    """y = ln η - e·ln B: corr² of y and ln ρ, on 4 rates over a decade and 4 batch sizes: 0.907 for e = 0.5."""
    cells = sweep([4, 8, 16, 32], learning_rates=list(np.geomspace(0.01, 0.1, 4)), steps=1)
    rate, size = (np.log([getattr(cell, name) for cell in cells]) for name in ("learning_rate", "batch_size"))
    for e, share in ((1.0, 1.0), (0.5, 0.9067)):
        found = lr_to_batch(study([rate - e * size], 1e-6, np.random.default_rng(0), cells=cells)).task("y1")
        assert found.shares["ratio"] == pytest.approx(share, abs=1e-4)
        assert found.batch_exponent.value == pytest.approx(e, abs=1e-4)
        assert found.shares["both"] == pytest.approx(1.0, abs=1e-9)


def test_slopes_are_those_of_least_squares_on_all_runs():
    random = np.random.default_rng(4)
    runs = study([UP + 0.5 * ACROSS**2], 0.2, random)
    found = lr_to_batch(runs).task("y1")
    x, z = (
        np.log([f(run.learning_rate, run.batch_size) for run in runs]) for f in (lambda a, b: a / b, lambda a, b: a * b)
    )
    x, z = x - x.mean(), z - z.mean()
    design = np.stack([np.ones_like(x), x, z, x * x, z * z, x * z], axis=1)
    fit = np.linalg.lstsq(design, np.array([run.scores["y1"] for run in runs]), rcond=None)[0]
    assert (found.ratio_slope.value, found.product_slope.value) == pytest.approx((fit[1], fit[2]), rel=1e-9)
    assert found.p_fit > 0.01
    kinked = lr_to_batch(study([np.abs(UP) ** 0.2 * np.sign(UP) * ACROSS], 0.01, random)).task("y1")
    assert kinked.p_fit < 1e-3


def test_order_units_and_sign_do_not_matter():
    runs = study([UP, ACROSS], 0.5, np.random.default_rng(5))
    found = lr_to_batch(runs)
    assert lr_to_batch(runs[::-1]) == found
    scaled = lr_to_batch([run._replace(learning_rate=1e-5 * run.learning_rate) for run in runs])
    assert [(t.verdict, t.best) for t in scaled.tasks] == [(t.verdict, t.best) for t in found.tasks]
    assert scaled.task("y1").p_any == pytest.approx(found.task("y1").p_any, rel=1e-6)
    turned = lr_to_batch(
        [run._replace(scores={k: -v for k, v in run.scores.items()}) for run in runs],
        directions={"y1": "min", "y2": "min"},
    )
    assert [(t.verdict, t.best) for t in turned.tasks] == [(t.verdict, t.best) for t in found.tasks]
    assert (turned.compromise, turned.splits) == (found.compromise, found.splits)
    assert turned.task("y1").ratio_slope.value == pytest.approx(-found.task("y1").ratio_slope.value)


def test_it_goes_round_as_json_and_reads_as_text():
    found = lr_to_batch(study([UP, 0 * UP], 0.2, np.random.default_rng(6)))
    assert LrToBatch.from_json(found.to_json()) == found
    assert "y1: high; what is enough to explain it: ratio" in found.summary()
    assert "with equal examples a smaller batch makes more updates" in found.summary()


def test_the_map_by_ratio_and_the_compromise_are_means_of_cells():
    runs = study([UP, -UP, ACROSS], 0.1, np.random.default_rng(7))
    found = lr_to_batch(runs)
    task = found.task("y1")
    assert [point.cells for point in task.by_ratio] == [1, 2, 3, 4, 5, 4, 3, 2, 1]
    assert task.by_ratio[0].ratio == pytest.approx(1 / 128)
    for point in task.by_ratio:
        own = [run.scores["y1"] for run in runs if run.learning_rate / run.batch_size == pytest.approx(point.ratio)]
        assert point.score.value == pytest.approx(np.mean(own))
        assert point.score.low < point.score.value < point.score.high
    assert not task.interior and found.cells[task.best].ratio == 2.0
    means = {
        k: [np.mean([r.scores[k] for r in runs if r[:2] == c[:2]]) for c in map(tuple_of, found.cells)]
        for k in ("y1", "y2", "y3")
    }
    ranks = np.mean([np.argsort(np.argsort(-np.array(v))) for v in means.values()], axis=0)
    assert found.compromise == int(np.argmin(ranks))
    assert found.prices == pytest.approx({k: max(v) - v[found.compromise] for k, v in means.items()})


def tuple_of(cell):
    return cell.learning_rate, cell.batch_size


def test_lines_of_equal_ratio_have_the_same_batch_sizes():
    cells = sweep([8, 32, 128], ratios=[1e-3, 1e-2, 1e-1], steps=100)
    assert sorted({round(cell.ratio, 12) for cell in cells}) == [1e-3, 1e-2, 1e-1] and len(cells) == 9
    assert all(cell.learning_rate == pytest.approx(cell.ratio * cell.batch_size) for cell in cells)
    truth = np.log([cell.ratio for cell in cells])
    found = lr_to_batch(study([truth], 0.01, np.random.default_rng(8), cells=cells)).task("y1")
    assert found.verdict == "high" and [point.cells for point in found.by_ratio] == [3, 3, 3]


def test_both_budgets_side_by_side():
    """What follows the number of updates alone passes for the batch under equal examples, and not under equal steps."""
    by_steps = sweep([8, 16, 32, 64, 128], learning_rates=[1, 2, 4, 8, 16], steps=100)
    random = np.random.default_rng(9)
    found = []
    for cells in (CELLS, by_steps):
        updates = np.log([float(cell.steps) for cell in cells])
        found.append(lr_to_batch(study([updates, UP], 0.1, random, cells=cells)))
    assert [each.budget for each in found] == ["examples", "steps"]
    assert compare(*found) == {"y1": ("high", "none"), "y2": ("high", "high")}
    with pytest.raises(InputError, match="equal_examples must be of cells with equal examples, got equal steps"):
        compare(found[1], found[0])


def digits_study():
    """An MLP on digits, 4 rates by 4 batch sizes by 3 seeds, 2048 examples each: accuracy and calibration error."""
    import torch
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    runs = []
    for cell in sweep([16, 32, 64, 128], learning_rates=[0.003, 0.01, 0.03, 0.1], examples=2048):
        for seed in range(3):
            torch.manual_seed(seed)
            order = torch.randint(1200, (2048,), generator=torch.Generator().manual_seed(seed)).split(cell.batch_size)
            model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
            optimizer = torch.optim.SGD(model.parameters(), lr=cell.learning_rate, momentum=0.9)
            for rows in order:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            sure, said = model(x[1200:]).detach().softmax(-1).max(-1)
            right = (said == y[1200:]).double()
            bins = (sure * 10).long().clamp(max=9)
            gaps = [abs(float((right - sure)[bins == k].sum())) for k in range(10)]
            scores = {"accuracy": float(right.mean()), "calibration": sum(gaps) / len(right)}
            runs.append(RatioRun(cell.learning_rate, cell.batch_size, cell.steps, seed, scores))
    return lr_to_batch(runs, directions={"calibration": "min"})


def test_a_study_of_digits_is_the_same_bit_for_bit():
    """No claim on the sign."""
    first, second = digits_study(), digits_study()
    assert first.to_json() == second.to_json()
    assert {each.task for each in first.tasks} == {"accuracy", "calibration"} and len(first.cells) == 16
    assert first.task("accuracy").p_any < 0.05


def line(runs):
    return [run for run in runs if run.learning_rate * 8 == run.batch_size]


RUNS = study([UP, 0 * UP], 0.1, np.random.default_rng(0), seeds=3)
LAST = RUNS[-1]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "runs must hold at least one run, got none"),
        (line(RUNS), "ratio and product are not separable: all cells lie on one line"),
        ([r for r in RUNS if r.learning_rate == 1], "ratio and product are not separable"),
        ([r for r in RUNS if r.learning_rate <= 2], "at least 3 learning rates and 3 batch sizes, crossed"),
        (RUNS[:-1], "every cell must have the same seeds: learning rate 16, batch size 128 lacks 2"),
        ([r for r in RUNS if r.seed == 0], "runs must have at least 2 seeds, got 1: one run a cell has no interval"),
        ([*RUNS, LAST], "runs hold seed 2 twice at learning rate 16, batch size 128"),
        ([*RUNS[:-3], *(r._replace(steps=9) for r in RUNS[-3:])], "all cells must have equal examples"),
        ([*RUNS[:-1], LAST._replace(steps=9)], "every cell must have the same seeds"),
        ([*RUNS[:-1], LAST._replace(scores={"y1": 1.0})], r"every run must score the tasks \['y1', 'y2'\]"),
        ([*RUNS[:-1], LAST._replace(scores={"y1": math.nan, "y2": 1.0})], "scores must be finite, got nan for 'y1' at"),
        ([*RUNS[:-1], LAST._replace(scores={"y1": 1.0, "y2": None})], "got None for 'y2' at learning rate 16"),
        ([*RUNS[:-1], LAST._replace(scores=[1.0])], r"scores must map tasks to numbers, got \[1.0\]"),
        ([{"learning_rate": 1}], "runs must hold RatioRun, got dict"),
        ([*RUNS[:-1], LAST._replace(learning_rate=0.0)], "learning_rate must be finite and > 0, got 0.0"),
        ([*RUNS[:-1], LAST._replace(batch_size=12.5)], "batch_size must be an integer of at least 1, got 12.5"),
        ([r._replace(scores={}) for r in RUNS], "scores must hold at least one task, got none"),
    ],
)
def test_bad_runs_are_refused(runs, said):
    with pytest.raises(InputError, match=said):
        lr_to_batch(runs)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sweep([8, 16, 32], examples=64), "give either learning_rates or ratios"),
        (lambda: sweep([8, 16, 32], ratios=[1, 2, 4]), "give either examples or steps"),
        (lambda: sweep([8, 16], ratios=[1, 2, 4], steps=1), "batch_sizes must be at least 3 different ones, got"),
        (lambda: sweep([8, 16, 32], ratios=[1, 1, 4], steps=1), "ratios must be at least 3 different ones"),
        (lambda: sweep([8, 16, 32], ratios=[1, 2, 0], steps=1), "ratios must be finite and > 0, got 0"),
        (lambda: sweep([8, 16, 32.5], ratios=[1, 2, 4], steps=1), "batch_sizes must be an integer of at least 1"),
        (
            lambda: sweep([8, 12, 32], ratios=[1, 2, 4], examples=64),
            r"multiple of every batch size \(of 96 for these\)",
        ),
        (lambda: sweep([8, 16, 32], ratios=[1, 2, 4], steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda: ratio(0.1, 0), "batch_size must be finite and > 0, got 0"),
        (lambda: lr_to_batch(RUNS, directions={"y9": "min"}), "directions must give .* got 'y9': 'min'"),
        (lambda: lr_to_batch(RUNS, directions={"y1": "down"}), "directions must give .* got 'y1': 'down'"),
        (lambda: lr_to_batch(RUNS, coverage=95), r"coverage must lie in \(0, 1\), got 95"),
        (lambda: lr_to_batch(RUNS, draws=0), "draws must be an integer of at least 1, got 0"),
        (lambda: lr_to_batch(RUNS).task("y9"), r"task must be one of \['y1', 'y2'\], got 'y9'"),
    ],
)
def test_bad_arguments_are_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_scores_that_do_not_vary_have_no_verdict():
    for value in (0.3, 0.0, 1e9):
        flat = [run._replace(scores={"a": value, "b": value + run.seed}) for run in RUNS]
        for each in lr_to_batch(flat).tasks:
            assert (each.verdict, each.p_any, each.sufficient) == ("none", 1.0, ())


def test_numpy_numbers_are_numbers():
    assert sweep(np.array([8, 16, 32]), ratios=np.array([1.0, 2.0, 4.0]), steps=np.int64(3))[0].steps == 3
    runs = [
        r._replace(learning_rate=np.float64(r.learning_rate), batch_size=np.int64(r.batch_size), seed=np.int64(r.seed))
        for r in RUNS
    ]
    assert lr_to_batch(runs).to_json() == lr_to_batch(RUNS).to_json()
