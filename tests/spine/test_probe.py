"""What a probe measures of a job, what it leaves alone, and what it refuses."""

import dataclasses
import json
import math
import random
import statistics
import time

import numpy as np
import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate, Facts
from batchlab.core.job import Job, Target
from batchlab.core.run import Run
from batchlab.spine import gather
from batchlab.spine.plan import plan
from batchlab.spine.probe import probe
from batchlab.spine.reference import FEWEST_STEPS, derived_target, flattened
from batchlab.spine.train import train
from tests.spine.forked import in_ranks
from tests.spine.jobs import squared_error, toy_data, toy_job

BUDGET = 3.0


class Counted:
    """A data set that keeps the sizes in which it was asked for examples."""

    def __init__(self, data, seconds=0.0):
        self.data, self.seconds, self.sizes = data, seconds, set()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]

    def __getitems__(self, indices):
        self.sizes.add(len(indices))
        time.sleep(self.seconds * len(indices))
        return [self.data[index] for index in indices]


@pytest.fixture(scope="module")
def measured():
    data, heard, models = Counted(toy_data(256)), [], []

    def model():
        models.append(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double())
        return models[-1]

    job = Job("toy", model, squared_error, data, toy_data(40, seed=1))
    facts = probe(
        job, budget=3 * BUDGET, device="cpu", progress=lambda *said: heard.append(said)
    )  # if all else is slow
    return job, facts, data, heard


def test_every_size_that_it_names_was_run(measured):
    _, facts, data, _ = measured
    sizes = [point.examples for point in facts.micro_batches]
    assert sizes == sorted(set(sizes)) and set(sizes) <= data.sizes and facts.max_micro_batch in data.sizes
    assert all(0 <= point.seconds.low <= point.seconds.value <= point.seconds.high for point in facts.micro_batches)


def test_the_facts_go_round_and_make_a_plan(measured):
    job, facts, _, _ = measured
    assert Facts.from_json(facts.to_json()) == facts
    json.loads(facts.to_json(), parse_constant=pytest.fail)
    made = plan(job, facts)
    assert made.target == facts.target and made.predicted_steps.low <= made.predicted_steps.value


def test_the_target_is_what_the_reference_runs_reach(measured):
    _, facts, _, _ = measured
    run = facts.reference
    assert facts.target_origin == "reference run" and any("the job has no target" in note for note in facts.notes)
    initial, least = run.evaluations[0][1], min(value for _, value in run.evaluations)
    assert least < facts.target.value < initial
    if len(run.steps_by_seed) == 1:  # of several the lowest start and the one that came least far set it
        assert facts.target.value == pytest.approx(least + 0.05 * (initial - least), abs=1e-12)
    known = [steps for steps in run.steps_by_seed if steps is not None]
    assert len(known) == len(run.steps_by_seed)  # the run that came least far set it, so that all reach it
    assert run.steps_to_target == statistics.median_high(known)
    assert run.steps_by_seed[0] == next(step for step, value in run.evaluations if value <= facts.target.value)


def test_progress_names_each_phase_and_ends_at_one(measured):
    *_, heard = measured
    phases = list(dict.fromkeys(phase for phase, _ in heard))
    assert phases == ["memory and speed", "learning rate", "reference run", "more runs"]
    for phase in phases:
        shares = [share for name, share in heard if name == phase]
        assert all(0 <= share <= 1 for share in shares) and shares == sorted(shares), phase


def test_the_noise_scale_bounds_what_was_measured(measured):
    _, facts, _, _ = measured
    noise = facts.noise_scale
    assert noise.low <= noise.value <= noise.high and "run-level" in noise.method
    assert [point.steps for point in facts.noise] == sorted({point.steps for point in facts.noise})


def test_the_run_with_the_same_seed_is_another_one(measured, tmp_path):
    job, facts, _, _ = measured
    run = train(job, plan(job, facts), out=tmp_path / "r", seed=facts.seed, device="cpu", facts=facts)
    assert run.meta["initial"]["loss"] != facts.reference.evaluations[0][1]
    assert Run.open(run.path).facts == facts


def test_the_callers_generators_are_kept():
    def states():
        return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    probe(toy_job(dropout=0.1), budget=1.0, device="cpu")
    assert states() == before


def test_a_model_that_normalises_over_the_batch_is_probed_planned_and_trained(tmp_path):
    """BatchNorm1d refuses a single example in training: nothing may ask it for one."""
    job = toy_job(batch_norm=True)
    facts = probe(job, budget=6.0, device="cpu")
    assert facts.batch_norm and min(point.examples for point in facts.micro_batches) == 2
    made = dataclasses.replace(plan(job, facts), steps=3)
    train(job, made, out=tmp_path / "run", device="cpu")
    only = probe(job, budget=2.0, device="cpu", only=["memory", "noise"])
    assert only.memory.size >= 2 and only.noise.batch_size >= 2
    assert min(size for size, *_ in only.memory.tries) >= 2


def test_the_jobs_own_target_is_kept_and_counted():
    target = Target("loss", 1.0)
    facts = probe(toy_job(target=target), budget=8.0, device="cpu")
    assert facts.target == target and facts.target_origin == "job"
    reached = facts.reference.steps_to_target
    assert reached is not None and min(loss for _, loss in facts.reference.evaluations) <= 1.0


def test_a_slow_job_still_gets_fifteen_updates():
    job = Job(
        "slow", lambda: nn.Linear(6, 1).double(), squared_error, Counted(toy_data(200), seconds=6e-3), toy_data(8)
    )
    facts = probe(job, budget=3.0, device="cpu")
    assert facts.reference.steps >= FEWEST_STEPS
    assert any("the budget ended the reference run" in note for note in facts.warnings)
    assert any("common default, not measured" in note for note in facts.warnings)


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [(50.0, 90.0, 200.0, None), (29.0, 90.0, 200.0, "29 to 200"), (50.0, 90.0, 271.0, "50 to 271"), (0, 0, 0, None)],
)
def test_a_wide_noise_scale_is_warned_of(low, value, high, said):
    warned = gather._unsure(Estimate(value, low, high, "by hand"))
    assert (said is None and not warned) or said in warned[0]
    assert gather._unsure(Estimate(math.nan, 0.0, math.inf, "undefined")) == []


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"budget": 0}, "budget must be finite and > 0 seconds, got 0"),
        ({}, {"budget": math.nan}, "budget must be finite and > 0 seconds, got nan"),
        ({}, {"seed": True}, "seed must be an integer, got True"),
        ({"optimizer": "lamp"}, {}, "lamp"),
        ({"train": toy_data(1)}, {}, "job train has 1 examples: the noise scale needs at least 2"),
        ({"target": Target("loss", 1e6)}, {}, "is met before any update"),
        ({"target": Target("accuracy", 0.9, "max")}, {}, "target metric 'accuracy' is not among the measured"),
        ({"loss": lambda m, b: squared_error(m, b) * math.nan}, {}, "job loss is nan on the first micro-batch"),
        ({"loss": lambda m, b: (m(b[0]) - b[1]).square()}, {}, "job loss must return a scalar tensor"),
        ({"loss": lambda m, b: squared_error(m, b).detach()}, {}, "job loss does not depend on the model's weights"),
        ({"metric": lambda m, b: 0.5}, {}, "job metric must return a dict of name to mean, got float"),
        ({}, {"device": "foo"}, "device must be one that torch finds here"),
    ],
)
def test_what_cannot_be_probed_is_said(changes, arguments, message):
    with pytest.raises(InputError, match=message):
        probe(toy_job(**changes), **({"budget": 1.0, "device": "cpu"} | arguments))


def test_a_model_that_is_not_fresh_is_refused_and_not_trained():
    shared = nn.Linear(6, 1).double()
    before = shared.weight.clone()
    job = Job("shared", lambda: shared, squared_error, toy_data(64), toy_data(16))
    with pytest.raises(InputError, match="job model must return fresh weights at each call"):
        probe(job, budget=1.0, device="cpu")
    with pytest.raises(InputError, match="job model must be a function that returns a fresh module, got a Linear"):
        Job("shared", shared, squared_error, toy_data(64), toy_data(16))
    assert torch.equal(shared.weight, before)


def test_a_target_of_the_jobs_own_is_not_given_up_on_a_plateau():
    target = Target("loss", 0.02)
    job = Job("line", lambda: nn.Linear(6, 1).double(), _linear_error, toy_data(400), toy_data(64), optimizer="sgd")
    facts = probe(dataclasses.replace(job, target=target), budget=6.0, device="cpu")
    assert facts.reference.steps_to_target is not None and facts.reference.evaluations[-1][1] <= 0.02


def _linear_error(module, batch):
    x, _ = batch
    return (module(x).squeeze(1) - 3 * x.sum(1)).square().mean()


def test_what_is_no_job_is_said():
    with pytest.raises(InputError, match=r"job must be a batchlab\.Job, got str"):
        probe("digits")


def _probe_on_a_rank(folder):
    facts = probe(toy_job(), budget=3 * BUDGET, device="cpu")  # on a machine that does other things too
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(facts.to_json())


def test_ranks_get_the_same_facts(tmp_path):
    assert in_ranks(2, tmp_path, _probe_on_a_rank, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in range(2))
    assert first == second and Facts.from_json(first).reference.steps >= FEWEST_STEPS


def test_flat_is_little_gained_in_the_last_half():
    loss = Target("loss", 0.0)
    falling = [(step, 1.0 - step / 100) for step in range(101)]
    assert not flattened(falling, loss)
    assert flattened([*falling, *((step, 0.0) for step in range(101, 203))], loss)
    assert flattened([(step, -value) for step, value in falling] + [(202, 0.0)], Target("accuracy", 1.0, "max"))


def test_a_loss_that_does_not_fall_sets_no_target():
    with pytest.raises(InputError, match="did not lower the validation loss below 1 in 5 updates"):
        derived_target([[(0, 1.0), (5, 1.0)]])


def test_a_derived_target_is_met_by_all_runs_and_begun_with_by_none():
    target = derived_target([[(0, 3.0), (9, 0.0)], [(0, 2.0), (9, 1.0)]])
    assert target.value == pytest.approx(1.05)
    with pytest.raises(InputError, match="did not lower"):
        derived_target([[(0, 3.0), (9, 0.0)], [(0, 2.0), (9, 2.5)]])
