"""Efficiency constants found again from step times that they made, and what cannot be told apart."""

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import (
    PRECISIONS,
    Block,
    Efficiency,
    FittedEfficiency,
    Measured,
    ModelShape,
    fit_efficiency,
    layout,
)
from batchlab.planner.layouts.calibration import as_grid
from batchlab.planner.layouts.memory import Costing
from batchlab.planner.layouts.step_time import step_time

SHAPE = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000)
CLUSTER = Cluster(64, hardware()["A100-80"])
SIZES = {"global_batch": 2048, "sequence_length": 2048}
RUNS = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 1, 2), (2, 2, 2), (4, 2, 4), (8, 1, 4)]


def runs(truth, noise=0.0, which=RUNS):
    rows = [Measured(tp, pp, b, 1.0) for tp, pp, b in which]
    costs = Costing(2048, Block.of(SHAPE), PRECISIONS["bf16"], False)
    seconds = np.sum(list(step_time(SHAPE, as_grid(rows, 64, 2048), costs, CLUSTER, truth).values()), axis=0)
    seconds = seconds * np.exp(noise * np.random.default_rng(0).normal(size=len(rows)))
    return [Measured(r.tp, r.pp, r.micro_batch, float(s)) for r, s in zip(rows, seconds, strict=True)]


@pytest.mark.parametrize("truth", [Efficiency(matmul=0.5, half_width=400.0), Efficiency(matmul=0.9, half_width=50.0)])
def test_constants_are_found_again(truth):
    found = fit_efficiency(SHAPE, CLUSTER, runs(truth), **SIZES)
    assert found.fitted == ("matmul", "half_width")
    assert found.efficiency.matmul == pytest.approx(truth.matmul, rel=1e-4)
    assert found.efficiency.half_width == pytest.approx(truth.half_width, rel=1e-3)
    assert found.error < 1e-6
    assert FittedEfficiency.from_json(found.to_json()) == found


def test_with_noise_the_error_is_the_noise():
    """Seven runs of 3 % noise less two constants: the residual is 3 % times √(5/7), and χ² of five degrees of freedom
    lies within a factor of 4 either way but for one time in a thousand."""
    found = fit_efficiency(SHAPE, CLUSTER, runs(Efficiency(), noise=0.03), **SIZES)
    assert 0.03 * np.sqrt(5 / 7) / 4 < found.error < 0.03 * np.sqrt(5 / 7) * 4
    assert found.efficiency.matmul == pytest.approx(Efficiency().matmul, rel=0.12)


def test_one_width_tells_one_constant():
    alone = runs(Efficiency(matmul=0.5), which=[(1, 1, 1), (1, 2, 1), (1, 4, 1)])
    found = fit_efficiency(SHAPE, CLUSTER, alone, **SIZES)
    assert found.fitted == ("matmul",)
    assert found.efficiency.matmul == pytest.approx(0.5, rel=1e-6)
    assert found.efficiency.half_width == Efficiency().half_width


def test_runs_out_of_memory_are_passed_over_and_what_is_fitted_serves_the_search():
    rows = [*runs(Efficiency(matmul=0.4)), Measured(1, 1, 8, None)]
    found = fit_efficiency(SHAPE, CLUSTER, rows, **SIZES)
    best = layout(SHAPE, CLUSTER, **SIZES, efficiency=found.efficiency).best
    assert best.seconds == pytest.approx(rows[0].seconds, rel=1e-3)


def test_a_machine_faster_than_its_peak_is_held_at_it():
    rows = [Measured(r.tp, r.pp, r.micro_batch, r.seconds / 3) for r in runs(Efficiency())]
    found = fit_efficiency(SHAPE, CLUSTER, rows, **SIZES)
    assert 0.99 < found.efficiency.matmul <= 1
    assert found.error > 0.1


def test_all_three_constants_are_found_again():
    truth = Efficiency(matmul=0.8, half_width=300.0, half_tokens=400.0)
    names = ("matmul", "half_width", "half_tokens")
    found = fit_efficiency(SHAPE, CLUSTER, runs(truth), **SIZES, constants=names)
    assert found.fitted == names
    for name in names:
        assert getattr(found.efficiency, name) == pytest.approx(getattr(truth, name), rel=1e-3)


@pytest.mark.parametrize(
    ("which", "constants", "text"),
    [
        (
            RUNS,
            ("link",),
            r"constants must be some of \['matmul', 'half_width', 'half_tokens'\], each once, got \('link',\)",
        ),
        (RUNS, "matmul", "constants must be some of .* got 'matmul'"),
        (RUNS, (), r"constants must be some of .* got \(\)"),
        ([(1, 1, 1), (1, 2, 2)], ("half_width",), "measured must hold two sizes of tp to tell half_width, got one"),
        ([(1, 1, 1), (2, 2, 1)], ("half_tokens",), "measured must hold two sizes of micro_batch to tell half_tokens"),
        (RUNS[1:3], ("matmul", "half_width"), r"measured must hold 3 layouts that ran to tell \['matmul', .* got 2"),
    ],
)
def test_constants_that_cannot_be_told_are_refused(which, constants, text):
    with pytest.raises(InputError, match=text):
        fit_efficiency(SHAPE, CLUSTER, runs(Efficiency(), which=which), **SIZES, constants=constants)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "measured must hold a layout that ran, got none"),
        ([Measured(1, 1, 1, None)], "measured must hold a layout that ran, got none"),
        ([Measured(3, 1, 1, 1.0)], r"measured must divide 64 devices and a global batch of 2048, got Measured\(tp=3"),
        ([Measured(1, 1, 64, 1.0)], "measured must divide 64 devices and a global batch of 2048"),
    ],
)
def test_bad_input(rows, text):
    with pytest.raises(InputError, match=text):
        fit_efficiency(SHAPE, CLUSTER, rows, **SIZES)
