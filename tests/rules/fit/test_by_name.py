"""Every law by its name: one kind of result, JSON both ways, the published tables through it, and its refusals."""

import math
import subprocess
import sys

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.rules.fit import Fit, RunTable, fit, fit_laws
from batchlab.rules.fit.named_laws import LAWS
from tests.core.test_study import study_folder
from tests.measure.runs.test_data_overhead import PUBLISHED
from tests.rules.fit.tables import P, bowls, sweeps_of_rate
from tests.rules.fit.test_replicas import published
from tests.rules.fit.test_surge_runs import runs
from tests.rules.fit.test_timescales import runs_over_batches, sweeps
from tests.rules.fit.test_trajectory_parts import table_of
from tests.rules.fit.trajectory_studies import STEPS, study
from tests.spine.run_folders import trials

GRID = [2.0**k for k in range(6, 15)]


def data_overhead_table():
    """The published steps of five models at nine batches of 512-token sequences (Zhang et al. 2024)."""
    rows = [(n, b, s) for n, (steps, *_) in PUBLISHED.items() for b, s in zip(GRID, steps, strict=True)]
    params, batch, steps = zip(*rows, strict=True)
    length = [512] * len(rows)
    columns = {"params_millions": params, "batch_sequences": batch, "sequence_length": length, "steps_to_target": steps}
    return RunTable.of(columns)


def diloco_table():
    sizes, counts, losses = published()
    return RunTable.of({"params": sizes, "replicas": counts, "batch_tokens": [2**18] * len(sizes), "loss": losses})


def surge_table():
    sizes, steps, tuned = runs()
    return RunTable.of({"batch_examples": sizes, "steps_to_target": steps, "learning_rate": tuned})


def one_rate_sweep():
    table = sweeps_of_rate(settings=((1e8, 2e9),))
    return table.take(np.flatnonzero(table["batch_tokens"] == 2**18))


CASES = {
    "power_law": (lambda: data_overhead_table(), {"x": "batch_tokens", "y": "steps_to_target"}),
    "batch_optimum": (lambda: sweeps_of_rate(settings=((1e8, 2e9),)), {}),
    "learning_rate_optimum": (one_rate_sweep, {}),
    "chinchilla": (lambda: bowls(4, 5), {"draws": 3}),
    "budgets": (lambda: bowls(7, 8), {"draws": 3}),
    "timescale": (lambda: sweeps([20, 80, 200]), {}),
    "critical_batch": (surge_table, {}),
    "critical_batch_growth": (runs_over_batches, {}),
    "diloco": (diloco_table, {"starts": 2}),
    "surge": (surge_table, {}),
    "trajectory": (lambda: table_of(study(ended=False, steps=STEPS[::4])), {"draws": 20}),
}


@pytest.mark.parametrize("law", CASES)
def test_each_law_gives_one_kind_of_result(law):
    make, options = CASES[law]
    found = fit(make(), law, **options)
    assert found.law == law and found.constants and found.source and found.formula
    assert Fit.from_json(found.to_json()).to_json() == found.to_json()
    text = found.table()
    assert text.splitlines()[0] == f"{law}: {found.formula}"
    for name, constant in found.constants.items():
        assert any(line.startswith(name) and f"{constant.value:.4g}" in line for line in text.splitlines())
    assert all(f"! {warning}" in text.splitlines() for warning in found.warnings)
    assert all(math.isfinite(error) and error >= 0 for error in found.leave_one_out.values())
    assert all(len(residuals) for residuals in found.residuals.values())


def test_every_law_is_tried_and_says_what_it_is():
    assert set(fit_laws()) == set(CASES)
    assert fit_laws()["budgets"].startswith("N, D, steps and batch for a compute")
    assert list(fit_laws()) == list(LAWS)


def test_what_a_law_says_outlasts_stripped_docstrings():
    code = "from batchlab.rules.fit import fit_laws; print(fit_laws()['chinchilla'])"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fit_laws()["chinchilla"] == "loss = E + A/N^α + B/D^β"


def test_errors_are_read_as_per_cent_or_as_a_factor():
    errors = {
        "small": 0.0123,
        "half": math.log(1.5),
        "twofold": math.log(2.3),
        "tenfold": math.log(10.9),
        "wild": 800.0,
    }
    lines = Fit("chinchilla", "", "", {}, errors, {}, 3).table().splitlines()[-5:]
    said = [line.partition(": off by ")[2].removesuffix(" where it was left out") for line in lines]
    assert said == ["1.2 %", "50 %", "130 %", "990 %", "more than a factor of 10"]


def test_the_published_critical_batches_and_their_growth():
    """745.3 to 2533.4 sequences and 93.197·N^0.46828, N in millions, to 0.1 %; in tokens here, N in plain counts."""
    found = fit(data_overhead_table(), "critical_batch", by="params", base=256 * 512)
    wanted = {85: 745.3, 151: 955.2, 302: 1393.7, 604: 1888.5, 1200: 2533.4}
    for millions, sequences in wanted.items():
        size = found.constants[f"B* at params {1e6 * millions:.4g}"].value
        assert size / 512 == pytest.approx(sequences, rel=1e-3)
    assert found.constants["beta"].value == pytest.approx(0.46828, rel=1e-3)
    at_a_million = found.constants["d"].value * 1e6 ** found.constants["beta"].value
    assert at_a_million / 512 == pytest.approx(93.197, rel=1e-3)


def test_the_link_between_the_published_laws():
    """With N = D/20 the growth law is 22.94·D^0.468, D in millions: within 2 % of 22.91·D^0.47, which is rounded."""
    found = fit(data_overhead_table(), "critical_batch", by="params", base=256 * 512)
    d, beta = found.constants["d"].value / 512, found.constants["beta"].value
    for millions in (1e3, 5e3, 3e4):
        ours = d * (millions * 1e6 / 20) ** beta
        assert ours == pytest.approx(22.91 * millions**0.47, rel=0.02)


def test_a_study_and_its_folder_are_fitted_as_they_are(tmp_path):
    study = study_folder(tmp_path, trials())
    for given in (study, tmp_path, str(tmp_path)):
        found = fit(given, "critical_batch")
        assert found.constants["b_crit"].value == pytest.approx(80, rel=0.1)
        assert found.formula.startswith("batch_examples B* = ")
    rates = fit(study, "surge")
    assert set(rates.constants) == {"B_noise", "ε_max", "ε_max, saturating, α = 1", "ε_max, saturating, α = ½"}


def test_a_csv_is_fitted_by_its_path(tmp_path):
    file = tmp_path / "runs.csv"
    lines = [f"{d:g},{3.24e3 * d**P:.9g}" for d in (1e9, 1e10, 1e11)]
    file.write_text("\n".join(["tokens,batch_tokens", *lines]))
    found = fit(file, "power_law", x="tokens", y="batch_tokens")
    assert found.constants["b"].value == pytest.approx(P, abs=1e-6)
    assert found.constants["a"].value == pytest.approx(3.24e3, rel=1e-4)


def test_notes_of_the_table_and_of_the_law_are_warnings():
    table = RunTable.of({"params": [10, 20, 40], "loss": [3.0, 2.9, 2.81]})
    found = fit(table, "power_law", x="params", y="loss")
    assert found.warnings == (
        "params of at most 40: if these are no plain counts, name the column by its unit: params_thousands, "
        "params_millions, params_billions, params_trillions",
    )
    edge = fit(RunTable.of({"batch_tokens": [1e5, 2e5, 4e5], "loss": [3, 2, 1]}), "batch_optimum")
    assert edge.warnings[0].startswith("not bracketed") and math.isnan(edge.constants["batch_tokens_opt"].value)


@pytest.mark.parametrize(
    ("law", "options", "message"),
    [
        ("chinchila", {}, "law must be one of power_law, batch_optimum, .*surge, trajectory, got 'chinchila'"),
        ("surge", {"draw": 3}, "surge takes the options form, coverage, got 'draw'"),
        ("timescale", {}, "timescale needs the column params, got batch_examples, steps_to_target, learning_rate"),
        ("power_law", {"x": "tokens", "y": "loss"}, "power_law needs the column tokens, got batch_examples"),
        ("critical_batch", {"by": "foo"}, "critical_batch needs the column foo, got batch_examples"),
        ("critical_batch", {"overhead": "x"}, "overhead must be finite and > 0, as 0.2 for 20 %, got 'x'"),
        (["surge"], {}, r"law must be one of .* got \['surge'\]"),
        ("power_law", {"x": "learning_rate"}, "power_law needs the options y"),
    ],
)
def test_what_cannot_be_fitted_is_named(law, options, message):
    with pytest.raises(InputError, match=message):
        fit(surge_table(), law, **options)


WRONG_OPTIONS = [
    ({"cells": 50.0}, "cells must be an integer of at least 2, got 50.0"),
    ({"draws": "abc"}, "draws must be an integer of at least 2, got 'abc'"),
    ({"seed": 1.0}, "seed must be an integer of at least 0, got 1.0"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"coverage": 95}, r"coverage must lie in \(0, 1\), got 95"),
    ({"within": 0.5}, "within must be finite and > 1, a factor, got 0.5"),
    ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_a_wrong_option_is_no_property_of_the_runs(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        fit(bowls(4, 5), "budgets", **options)


@pytest.mark.parametrize("law", ["batch_optimum", "timescale", "diloco", "budgets"])
def test_a_reach_is_a_factor_in_every_law(law):
    with pytest.raises(InputError, match="^within must be finite and > 1, a factor, got 0.5"):
        fit(CASES[law][0](), law, within=0.5)


@pytest.mark.parametrize("law", ["chinchilla", "trajectory", "diloco"])
def test_a_seed_is_a_count(law):
    with pytest.raises(InputError, match="^seed must be an integer of at least 0, got 1.5"):
        fit(CASES[law][0](), law, seed=1.5, **CASES[law][1])


def test_target_losses_are_one_or_several():
    table = runs_over_batches()
    first = fit(table, "critical_batch_growth").constants
    target = float(next(iter(first)).split("loss ")[1].split(",")[0])
    one, several = (fit(table, "critical_batch_growth", target_losses=given) for given in (target, (target,)))
    assert one.constants == several.constants and f"B_crit at loss {target:.4g}" in next(iter(one.constants))
    for wrong, message in [("low", "be a sequence of numbers"), ((), "at least one loss"), (-3, "> 0, got -3")]:
        with pytest.raises(InputError, match=f"^target_losses must .*{message}"):
            fit(table, "critical_batch_growth", target_losses=wrong)


def test_a_law_of_one_setting_refuses_several():
    with pytest.raises(InputError, match="batch_optimum is for runs of one params, got 7 different"):
        fit(bowls(7, 8), "batch_optimum")
    with pytest.raises(InputError, match="table must be a RunTable, a Study or a path, got dict"):
        fit({"params": [1]}, "budgets")
