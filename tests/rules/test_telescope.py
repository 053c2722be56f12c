"""The telescoping sweep: its counts and costs, optima that drift as 1/width, what is saved, what is refused."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.rules.telescope import Telescope, counts, telescope
from batchlab.rules.telescope_nouns import Suggestion, Telescoped

WIDTHS = [64, 128, 256, 512]
SPACE = {"lr": (2.0**-14, 1.0), "decay": (0.0, 1.4)}
MESH = {"lr": 2 * math.log(2), "decay": 0.2}
TOP = math.log(SPACE["lr"][0])


def sweep(optimum, alpha, **changes):
    """f(x, n) = |x - (x* - a/n)|², in first meshes from the lower ends. alpha: a/(2·N0), the first doubling's move."""

    def evaluate(width, values):
        places = (math.log(values["lr"]) - TOP) / MESH["lr"], values["decay"] / MESH["decay"]
        shift = 2 * WIDTHS[0] / width
        return sum((p - (x - a * shift)) ** 2 for p, x, a in zip(places, optimum, alpha, strict=True))

    return telescope(evaluate, SPACE, WIDTHS, linear=["decay"], **changes)


def places(found):
    return (math.log(found.best["lr"]) - TOP) / MESH["lr"], found.best["decay"] / MESH["decay"]


@pytest.mark.parametrize(
    ("odd", "runs", "costs"), [(False, [64, 16, 4, 1], [64] * 4), (True, [64, 25, 9, 1], [64, 100, 144, 64])]
)
def test_runs_and_costs_of_a_width(odd, runs, costs):
    found = sweep((3.3, 4.1), (0.0, 0.0), odd=odd)
    assert [stage.runs for stage in found.stages] == runs
    assert [stage.cost for stage in found.stages] == costs
    assert max(costs) / min(costs) <= 2.3 and found.cost == sum(costs)
    assert found.saved == pytest.approx(1 - sum(costs) / (64 * 64))
    assert [round(stage.mesh["decay"], 12) for stage in found.stages] == [0.2, 0.1, 0.05, 0.025]


@given(
    optimum=st.tuples(st.floats(2.0, 5.0), st.floats(2.0, 5.0)),
    alpha=st.tuples(st.floats(-0.25, 0.25), st.floats(-0.25, 0.25)),
)
def test_a_drifting_optimum_is_found_within_the_last_mesh(optimum, alpha):
    """Up to a quarter of the first mesh in the first doubling. The last grid's mesh is a quarter of the first."""
    found = sweep(optimum, alpha)
    for place, x, a, name in zip(places(found), optimum, alpha, SPACE, strict=True):
        assert abs(place - (x - a / 4)) <= 0.25 + 1e-9
        assert found.spacing[name] == pytest.approx(MESH[name] / 8)
    assert found.width == 512 and not any("space" in note for note in found.notes)


@given(
    optimum=st.tuples(st.floats(2.0, 5.0), st.floats(2.0, 5.0)),
    alpha=st.tuples(st.floats(-2.0, 2.0), st.floats(-2.0, 2.0)),
    odd=st.booleans(),
)
def test_the_bounds_of_the_drift_hold_the_truth(optimum, alpha, odd):
    """However large it is: a best at the edge of its grid bounds its optimum on one side only."""
    found = sweep(optimum, alpha, odd=odd)
    for a, name in zip(alpha, SPACE, strict=True):
        drift, true = found.drift[name], a * 2 * WIDTHS[0] * MESH[name]
        assert drift.consistent and drift.low - 1e-9 <= true <= drift.high + 1e-9
        if math.isfinite(drift.alpha):
            assert drift.alpha == pytest.approx((drift.low + drift.high) / 2)
            assert drift.to_last == pytest.approx(drift.alpha * (1 / 256 - 1 / 512))


def test_a_drift_in_the_middle_of_its_grids_is_bounded_on_both_sides():
    """Half a mesh in the first doubling: α from 3/4 of a first mesh either way, over 1/64 - 1/128, and then closer."""
    found = sweep((4.0, 4.0), (0.5, 0.0)).drift["lr"]
    assert found.high - found.low <= 1.5 * MESH["lr"] * 128 and math.isfinite(found.alpha)


@given(optimum=st.tuples(st.floats(1.0, 6.0), st.floats(1.0, 6.0)))
def test_without_a_drift_even_counts_end_within_half_the_last_grids_mesh(optimum):
    found = sweep(optimum, (0.0, 0.0), odd=False)
    assert all(abs(place - x) <= 0.125 + 1e-9 for place, x in zip(places(found), optimum, strict=True))


@given(optimum=st.tuples(st.floats(3.0, 4.0), st.floats(3.0, 4.0)), alpha=st.floats(0.25, 1.5))
def test_a_drift_that_is_too_large_is_said(optimum, alpha):
    """Wherever the answer is off by more than the last mesh, some best lies at the edge of its grid."""
    found = sweep(optimum, (alpha, 0.0))
    off = abs(places(found)[0] - (optimum[0] - alpha / 4)) > 0.25 + 1e-9
    edge = any("lr" in stage.at_edge for stage in found.stages)
    assert edge or not off
    assert edge == any(
        "the best lr lies at the edge of its grid: its optimum may lie beyond" in note for note in found.notes
    )


@pytest.mark.parametrize(("axes", "odd", "expected"), [
    (1, True, [8, 3, 1, 1]), (1, False, [8, 2, 1, 1]), (2, True, [8, 5, 3, 1]), (3, False, [8, 5, 3, 2]),
    (4, True, [16, 11, 9, 5]),
])  # fmt: skip
def test_counts(axes, odd, expected):
    assert counts(expected[0], axes, 4, odd=odd) == expected


@given(st.integers(2, 12), st.integers(1, 5), st.booleans())
def test_counts_never_rise_much_and_end_at_one(points, axes, odd):
    found = counts(points, axes, 30, odd=odd)
    assert found[0] == points and found[-1] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(found))
    assert all(each % 2 for each in found[1:]) or not odd


def test_one_at_a_time_in_any_order_saved_at_every_step():
    def loss(values):
        return (math.log(values["lr"]) + 3) ** 2

    whole = telescope(lambda width, values: loss(values), {"lr": (1e-4, 1.0)}, [8, 16, 32], points=9)
    sweep, order = Telescope({"lr": (1e-4, 1.0)}, [8, 16, 32], points=9), np.random.default_rng(0)
    runs = 0
    while not sweep.done:
        sweep = Telescope.from_json(sweep.to_json())
        offered = sweep.suggest()
        each = Suggestion.from_json(offered[order.integers(len(offered))].to_json())
        sweep.observe(each, loss(each.values))
        runs += 1
        assert each not in sweep.suggest()
    again = Telescope.from_json(sweep.to_json())
    assert again.result().to_json() == sweep.result().to_json() == whole.to_json()
    assert runs == 13 and sweep.suggest() == ()
    assert Telescoped.from_json(whole.to_json()).to_json() == whole.to_json()


def test_the_first_grid_goes_from_end_to_end_and_later_ones_stay_inside():
    sweep = Telescope({"lr": (1e-3, 1e-1), "momentum": (0.0, 0.9)}, [8, 16], points=4, linear=["momentum"])
    first = sweep.suggest()
    assert first[0].values == {"lr": 1e-3, "momentum": 0.0} and first[-1].values == {"lr": 1e-1, "momentum": 0.9}
    assert len(first) == 16 and {each.width for each in first} == {8}
    for each in first:
        sweep.observe(each, -each.values["momentum"] - each.values["lr"])
    second = sweep.suggest()
    assert len(second) == 9 and max(each.values["momentum"] for each in second) == 0.9
    assert min(each.values["momentum"] for each in second) == pytest.approx(0.6)
    result = sweep.result()
    assert result.stages[0].at_edge == ("lr", "momentum") and result.width == 8
    assert "width 8: the best lr lies at the edge of the space: widen it" in result.notes
    assert math.isnan(result.drift["lr"].alpha) and result.drift["lr"].consistent


def test_diverged_runs_lose_and_optima_that_jump_are_said():
    sweep = Telescope({"lr": (0.01, 1.0)}, [8, 16], points=5)
    losses = [math.nan, 3.0, 2.0, math.inf, math.inf]
    for each, loss in zip(sweep.suggest(), losses, strict=True):
        sweep.observe(each, loss)
    assert sweep.result().best == {"lr": pytest.approx(0.1)} and sweep.result().stages[0].diverged == 3

    def jumping(width, values):
        return abs(values["x"] - {8: 4.0, 16: 4.75, 32: 4.625, 64: 4.625}[width]) + abs(values["y"] - 4)

    found = telescope(jumping, {"x": (0.0, 8.0), "y": (0.0, 8.0)}, [8, 16, 32, 64], points=17, linear=["x", "y"])
    assert not found.drift["x"].consistent and found.drift["y"].consistent
    assert found.notes == ("x: its optima do not move as 1/width within their meshes",)


OK = {"lr": (1e-3, 1.0)}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Telescope({}, [8]), "space must map at least one hyper-parameter"),
        (lambda: Telescope({"lr": (1.0, 1e-3)}, [8]), r"lowest < highest, both finite, for 'lr', got \(1.0, 0.001\)"),
        (lambda: Telescope({"lr": 0.1}, [8]), "space must have lowest < highest, both finite, for 'lr', got 0.1"),
        (lambda: Telescope({"lr": (0.0, 1.0)}, [8]), "space must be > 0 for 'lr', or 'lr' be named in linear"),
        (lambda: Telescope({"lr": (0.1, math.nan)}, [8]), "space must have lowest < highest"),
        (lambda: Telescope(OK, [8], linear=["wd"]), "linear must name hyper-parameters of the space, got 'wd'"),
        (lambda: Telescope(OK, []), r"widths must each be twice the one before, got \[\]"),
        (lambda: Telescope(OK, [8, 24]), r"widths must each be twice the one before, got \[8, 24\]"),
        (lambda: Telescope(OK, 32), "widths must be a sequence, got 32"),
        (lambda: Telescope(OK, [8], linear=1), "linear must be a sequence, got 1"),
        (
            lambda: Telescope(OK, [8]).observe("x", 1),
            r"suggestion must be of those that suggest\(\) gives now, got 'x'",
        ),
        (lambda: Telescope(OK, [8.5]), "widths must be an integer of at least 1, got 8.5"),
        (lambda: Telescope(OK, [8], points=1), "points must be an integer of at least 2, got 1"),
        (lambda: Telescope(OK, [8]).result(), "the first width is not swept yet"),
        (lambda: telescope(lambda n, x: math.inf, OK, [8, 16]), "all 8 runs of a width diverged: move the space"),
        (lambda: telescope(lambda n, x: "low", OK, [8]), "loss must be a number, got 'low'"),
        (lambda: telescope(lambda n, x: None, OK, [8]), "loss must be a number, got None"),
        (lambda: Telescope.from_json("[]"), "telescope: expected an object"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_a_run_is_observed_once_and_only_in_its_turn():
    sweep = Telescope(OK, [8, 16], points=3)
    first, *others = sweep.suggest()
    sweep.observe(first, np.float64(1.0))
    with pytest.raises(InputError, match="suggestion has a loss already"):
        sweep.observe(first, 2.0)
    for each in others:
        sweep.observe(each, 3)
    with pytest.raises(InputError, match="suggestion must be of those that suggest"):
        sweep.observe(others[0], 1.0)
    saved = sweep.to_json().replace('"points": 3', '"points": 4')
    with pytest.raises(InputError, match="telescope: a width of 4 runs has 3 losses"):
        Telescope.from_json(saved)
