"""The study on simulated machines whose joules are known: its errors, its power, what it ranks and what it flags."""

import math

import numpy as np
import pytest

from batchlab.core.errors import InputError
from batchlab.measure.energy.energy_study import (
    EnergyRun,
    EnergyStudy,
    TrainResult,
    compare_energy,
    summarise_energy,
)
from batchlab.measure.energy.energy_use import ComponentEnergy, EnergyUse
from tests.measure.energy.test_energy import Bench


def runs_of(joules, *, seconds=60.0, source="counter"):
    """Runs as measured elsewhere: joules by name, a number a repeat."""
    return [
        EnergyRun(
            name, repeat, 0, 0, value, EnergyUse(seconds, (ComponentEnergy("gpu", value, source),), 121), TrainResult()
        )
        for name, values in joules.items()
        for repeat, value in enumerate(values)
    ]


def study_of(joules, **options):
    return summarise_energy(runs_of(joules, **options), list(joules))


def _family_errors(count, *, effect=0.0, studies=1000, sd=3.0, repeats=5):
    """In how many of the studies any pair (with an effect: the first pair) is called different at 0.05."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(studies):
        values = random.normal(100, sd, (count, repeats))
        values[0] *= 1 + effect
        study = study_of({str(i): row.tolist() for i, row in enumerate(values)})
        hits += study.pair("0", "1").adjusted_p < 0.05 if effect else min(p.adjusted_p for p in study.pairs) < 0.05
    return hits / studies


@pytest.mark.parametrize("count", [2, 3])
def test_equal_configurations_are_rarely_called_different(count):
    """The family's rate: 0.03 to 0.07, where the standard error of 1000 studies is 0.007."""
    assert 0.03 <= _family_errors(count) <= 0.07


def test_ten_per_cent_is_found_by_five_repeats_where_runs_scatter_by_three():
    assert _family_errors(2, effect=0.1, studies=400) > 0.95
    assert _family_errors(3, effect=0.1, studies=400) > 0.95


class Machine(Bench):
    """A device that draws 20 + 80·u(b) watts and takes (1 + 100/b) seconds for an example, with noise a run."""

    def __init__(self, noise=0.0):
        super().__init__({"gpu": lambda t: self.watts}, kind="joules", source="counter", unit=1e-3)
        self.watts, self.random, self.noise = 20.0, np.random.default_rng(0), noise
        self.order, self.seeds = [], []

    def train(self, batch, seed, examples=640):
        self.order.append(batch)
        self.seeds.append(seed)
        u = batch / (batch + 100)
        self.watts = (20 + 80 * u) * (1 + self.noise * self.random.standard_normal())
        self.sleep((1 + 100 / batch) * examples * 1e-2)
        self.watts = 20.0
        return TrainResult(steps=examples / batch, examples=examples, progress=0.5)

    def options(self):
        return {"meter": self, "interval": None, "clock": self.clock, "sleep": self.sleep}


def test_the_least_watts_are_not_the_least_joules_and_that_is_flagged():
    machine = Machine(noise=0.01)
    configs = {f"b{b}": b for b in (16, 64, 256)}
    study = compare_energy(configs, machine.train, per="example", **machine.options())
    assert study.ranking == ("b256", "b64", "b16")
    by_watts = sorted(study.summaries, key=lambda each: each.watts.value)
    assert [each.name for each in by_watts] == ["b16", "b64", "b256"]
    assert study.watts_disagree and "b16 draws the least power but b256 uses the least energy" in study.note
    truth = {b: (20 + 80 * b / (b + 100)) * (1 + 100 / b) * 1e-2 for b in (16, 64, 256)}
    for each in study.summaries:
        assert each.joules.value == pytest.approx(truth[configs[each.name]], rel=0.03)
    assert study.pair("b16", "b256").adjusted_p < 1e-3
    assert study.pair("b16", "b256").ratio.low > 1 and study.anova_p < 1e-3


def test_no_disagreement_is_flagged_where_there_is_none():
    assert not study_of({"a": [1.0, 1.1], "b": [2.0, 2.1]}).watts_disagree
    assert not study_of({"a": [1.0, 1.0], "b": [1.0, 1.0]}).watts_disagree


def test_rounds_are_interleaved_shuffled_and_each_run_has_its_own_seed():
    machine = Machine()
    study = compare_energy({f"b{b}": b for b in (1, 2, 3, 4)}, machine.train, repeats=6, seed=3, **machine.options())
    rounds = [tuple(machine.order[i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(each) == [1, 2, 3, 4] for each in rounds) and len(set(rounds)) > 1
    assert len(set(machine.seeds)) == 24 and all(0 <= seed < 2**32 for seed in machine.seeds)
    assert [(run.repeat, run.place) for run in study.runs] == [(r, p) for r in range(6) for p in range(4)]
    again = Machine()
    compare_energy({f"b{b}": b for b in (1, 2, 3, 4)}, again.train, repeats=6, seed=3, **again.options())
    assert (again.order, again.seeds) == (machine.order, machine.seeds)


def test_net_of_idle_power_where_it_is_measured():
    machine = Machine()
    study = compare_energy({"a": 16, "b": 64}, machine.train, repeats=2, idle_seconds=10.0, **machine.options())
    for run, batch in zip(study.runs, machine.order, strict=True):
        assert run.joules == pytest.approx(80 * batch / (batch + 100) * (1 + 100 / batch) * 6.4, rel=1e-4)
        assert run.use.net_joules == run.joules < run.use.joules


def test_one_repeat_gives_no_p_values():
    machine = Machine()
    study = compare_energy({"a": 16, "b": 64}, machine.train, repeats=1, **machine.options())
    assert study.pairs == () and math.isnan(study.anova_p) and math.isnan(study.detectable)
    assert study.ranking == ("b", "a") and "fewer than 2 repeats: no p-values" in study.note
    assert study.summaries[0].joules.high == math.inf


def test_a_configuration_that_missed_its_target_has_no_energy_to_it():
    machine = Machine(noise=0.01)

    def train(batch, seed):
        return TrainResult(reached=machine.train(batch, seed) is not None and batch != 16)

    study = compare_energy({"a": 16, "b": 64, "c": 256}, train, **machine.options())
    assert study.ranking[-1] == "a" and math.isnan(study.summaries[0].joules.value)
    assert study.summaries[0].missed == 5 and "a: 5 of 5 runs missed the target" in study.note
    assert [(pair.first, pair.second) for pair in study.pairs] == [("b", "c")]


def test_estimates_and_short_runs_are_said():
    runs = runs_of({"a": [1.0, 1.1], "b": [2.0, 2.1]}, source="estimated")
    note = summarise_energy(runs, ["a", "b"]).note
    assert "all joules are estimated from the hardware, not measured" in note and "read fewer" not in note
    machine = Machine()
    note = compare_energy({"a": 16, "b": 64}, machine.train, repeats=2, **machine.options()).note
    assert "4 of 4 runs were read fewer than 20 times" in note and "estimated" not in note


def test_joules_that_are_unknown_are_not_ranked():
    study = study_of({"a": [math.nan, 1.0], "b": [2.0, 2.1], "c": [3.0, 3.2]})
    assert study.ranking == ("b", "c", "a") and len(study.pairs) == 1
    assert study_of({"a": [math.nan] * 2, "b": [math.nan] * 2}).pairs == ()


def test_net_joules_around_zero_do_not_break_the_study():
    study = study_of({"a": [-1.0, -1.2], "b": [2.0, 2.1]})
    assert math.isnan(study.pairs[0].ratio.value) and study.pairs[0].p < 0.05


def test_json_both_ways():
    study = study_of({"a": [1.0, 1.1], "b": [2.0, 2.1], "c": [3.0, 3.5]})
    assert EnergyStudy.from_json(study.to_json()) == study


def _compare(configs=None, train=lambda config, seed: None, **options):
    machine = Machine()
    return compare_energy(configs or {"a": 1, "b": 2}, train, **(machine.options() | options))


def test_every_run_waits_for_the_machine_to_cool():
    order = []
    _compare(
        train=lambda config, seed: order.append("train"), repeats=3, cool_down_seconds=2.0, interval=None,
        sleep=lambda seconds: order.append(seconds),
    )  # fmt: skip
    assert order == [2.0, "train"] * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _compare({"a": 1}), "configs must hold at least 2 configurations by name, got 1"),
        (lambda: _compare(repeats=0), "repeats must be an integer of at least 1, got 0"),
        (lambda: _compare(per="batch"), "per must be one of .*, got 'batch'"),
        (lambda: _compare(cool_down_seconds=-1), "cool_down_seconds must be finite and >= 0, got -1"),
        (lambda: _compare(g_per_kwh=-1), "g_per_kwh must be finite"),
        (lambda: _compare(per="example"), 'per="example" needs the examples of each run in its TrainResult'),
        (lambda: _compare(train=lambda config, seed: 3.0), "train_fn must return a TrainResult or None, got float"),
        (lambda: summarise_energy([], ["a"]), "names must be those of runs, got 'a' without any"),
        (lambda: study_of({"a": [1.0, 2.0], "b": [1.0, 2.0]}).pair("b", "a"), "no pair 'b', 'a'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
