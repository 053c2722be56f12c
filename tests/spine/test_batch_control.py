"""A batch that moves in mid-run changes nothing but the batch, whatever moves it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.plan import Plan
from batchlab.core.run import Run
from batchlab.measure.noise.batch_tests import batch_moments
from batchlab.rules.learning_rate import sqrt
from batchlab.schedule.rates.by_examples import lr_factor
from batchlab.spine.learner import Learner
from batchlab.spine.train import train
from tests.spine.forked import in_ranks
from tests.spine.jobs import toy_job, toy_plan

NOISE = Estimate(64.0, 50.0, 80.0, "given")
STEPS = 40
MOVES = {
    "adaptive": {"noise_scale": NOISE, "batch_settings": {"patience": 3, "deadband": 1.0}},
    "decay_by_batch": {"batch_size": 16, "noise_scale": NOISE, "batch_settings": {"headroom": 100.0}},
    "norm_test": {"batch_size": 16, "batch_settings": {"eta": 0.2, "patience": 4}},
    "inner_product_test": {"batch_size": 16, "batch_settings": {"theta": 0.2, "nu": 2.0}},
    "ramp": {"batch_size": 16, "batch_settings": {"end": 100, "over": 600, "increment": 4}},
    "milestones": {"batch_settings": {"sizes": [[64, 128], [300, 64], [500, 37], [700, 111]]}},
}


def moving(name, **changes):
    settings = {"learning_rate_rule": "sqrt", "max_batch_size": 128, "steps": STEPS, "warmup_examples": 200}
    settings |= {"schedule": "linear", "ema_half_life": 500.0, "checkpoint_every": 3} | MOVES[name] | changes
    return toy_plan(batch_schedule=name, **settings)


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def run_of(plan, **options):
    learner, updates = Learner(toy_job(), plan, device="cpu", **options), []
    while learner.position < plan.examples:
        updates.append(learner.update())
    return learner, updates


@pytest.mark.parametrize("name", MOVES)
def test_only_the_batch_is_another(name):
    """The same examples in order, the rate a function of examples and batch, and the updates of such sizes."""
    plan = moving(name)
    learner, updates = run_of(plan)
    sizes = [update.batch_size for update in updates]
    assert len({*sizes}) > 1 and sum(sizes[:-1]) < plan.examples <= sum(sizes)
    fixed = Learner(toy_job(), dataclasses.replace(plan, batch_schedule="fixed", batch_settings={}), device="cpu")
    for size, update in zip(sizes, updates, strict=True):
        again = fixed.update(size)
        assert again.loss == pytest.approx(update.loss, rel=1e-12)
        share = lr_factor(update.position, total_examples=plan.examples, warmup_examples=200, schedule="linear")
        assert update.learning_rate == pytest.approx(sqrt(1e-2, plan.batch_size, size) * share, rel=1e-12)
    torch.testing.assert_close(weights(fixed), weights(learner), rtol=0, atol=1e-10)
    torch.testing.assert_close(fixed.average.state_dict(), learner.average.state_dict(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["adaptive", "decay_by_batch"])
def test_a_batch_that_follows_the_noise_measures_it_whatever_the_plan_says(name):
    """As planned for one pass an update, where there is nothing to measure the noise by."""
    plan = moving(name)
    whole = dataclasses.replace(plan, measure_noise=False, micro_batch=128, accumulation=1)
    for every in (1, 4):
        learner, updates = run_of(dataclasses.replace(whole, noise_every=every))
        assert len({update.batch_size for update in updates}) > 1
        pieces = []
        for _ in range(8):
            pieces.append(len(learner.gradient.pieces(learner.position, 64)))
            learner.update(64)
        assert sorted(pieces) == [1] * (8 - 8 // every) + [2] * (8 // every), "cut in two where it is measured alone"
    with pytest.raises(InputError, match=f"{name}' reads the noise scale, .* as 'vradam' does: choose another"):
        Learner(toy_job(), dataclasses.replace(plan, optimizer="vradam"), device="cpu")


@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_across_a_change_bit_by_bit(name, tmp_path):
    plan = moving(name)
    whole, updates = run_of(plan)
    sizes = [update.batch_size for update in updates]
    changed = [at for at, (a, b) in enumerate(itertools.pairwise(sizes)) if a != b]
    for stop in {changed[0], changed[0] + 1, changed[-1] + 1}:
        learner = Learner(toy_job(), plan, device="cpu")
        for _ in range(stop):
            learner.update()
        path = save_checkpoint(tmp_path / f"{name} {stop}", stop, learner.state_dict())
        resumed = Learner(toy_job(), plan, device="cpu")
        resumed.load_state_dict(load_checkpoint(path))
        assert [resumed.update().batch_size for _ in sizes[stop:]] == sizes[stop:]
        assert torch.equal(weights(resumed), weights(whole))


def _sizes_and_weights(folder, plan):
    learner, updates = run_of(plan)
    found = {"sizes": torch.tensor([update.batch_size for update in updates]), "weights": weights(learner)}
    torch.save(found, folder / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize("name", ["adaptive", "norm_test", "inner_product_test", "milestones"])
def test_two_ranks_move_as_one(name, tmp_path):
    plan = moving(name, micro_batch=2)  # the same pieces on two ranks as on one, but for ragged ones
    assert in_ranks(2, tmp_path, _sizes_and_weights, tmp_path, plan) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["sizes"], second["sizes"]) and torch.equal(first["weights"], second["weights"])
    if name == "milestones":
        learner, updates = run_of(plan)
        assert [update.batch_size for update in updates] == first["sizes"].tolist()
        torch.testing.assert_close(first["weights"], weights(learner), rtol=0, atol=1e-10)


def test_the_norm_test_sees_the_gradients_of_the_batchs_eighths():
    """What the controller is told, recomputed piece by piece at the weights before the update."""
    plan = moving("norm_test", batch_size=37, micro_batch=64)
    learner = Learner(toy_job(), plan, device="cpu")
    pieces = learner.gradient.pieces(0, 37, in_groups=True)
    assert [len(piece) for piece in pieces] == [4] * 7 + [3] * 3
    model, job, rows = learner.model, learner.job, []
    for piece in pieces:
        grads = torch.autograd.grad(job.loss(model, job.train[piece]), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    found = learner.gradient.backward(0, 37).moments
    assert [*found] == pytest.approx([*batch_moments([torch.stack(rows)], examples=[4] * 7 + [3] * 3)], rel=1e-9)


def test_gradients_of_groups_are_taken_only_when_a_test_is_due():
    """Not before the patience is over, and not once the batch has come to its maximum."""
    learner = Learner(toy_job(), moving("norm_test", micro_batch=64, max_batch_size=32), device="cpu")
    taken, add = [], learner.gradient._tested.add
    learner.gradient._tested.add = lambda *a, **k: (taken.append(learner.step), add(*a, **k))
    sizes = [learner.update().batch_size for _ in range(20)]
    assert sizes[-1] == 32 and {*taken} == set(range(3, sizes.index(32)))


def test_goodput_times_its_updates_and_moves(tmp_path):
    """The clock decides, so only what must hold is held: bounds, and that it was told times and a noise scale."""
    plan = dataclasses.replace(
        moving("adaptive", batch_settings={"patience": 8}, steps=60, min_batch_size=8), batch_schedule="goodput"
    )
    learner, updates = run_of(plan)
    sizes = [update.batch_size for update in updates]
    assert len({*sizes}) > 1 and min(sizes) >= 8 and max(sizes) <= 128
    assert learner.controller.times()


def test_train_ends_at_the_plans_examples_and_is_resumed(tmp_path):
    plan = moving("ramp")
    run = train(toy_job(), plan, out=tmp_path / "r", device="cpu")
    lines = list(run.steps())
    assert lines[-1]["position"] >= plan.examples > lines[-2]["position"]
    assert len(lines) < plan.steps * 1.0 or plan.batch_size < 64
    assert "valid" in lines[-1]
    with pytest.raises(InputError, match=r"cannot resume with another batch_settings: the run has \{'end': 100"):
        other = dataclasses.replace(plan, batch_settings={"end": 120, "over": 600, "increment": 4})
        train(toy_job(), other, out=tmp_path / "r", device="cpu", resume=True)
    again = Plan.from_json(plan.to_json())
    longer = dataclasses.replace(again, steps=STEPS + 10)
    assert train(toy_job(), longer, out=tmp_path / "r", device="cpu", resume=True).summary["steps"] > len(lines)
    assert Run.open(tmp_path / "r").plan == longer


@pytest.mark.parametrize("schedule", ["wsd", "power", "one_cycle"])
def test_a_plans_other_schedules_write_the_rate_and_the_momentum(schedule):
    settings = {"wsd": {"decay_share": 0.5}, "power": {"knee_share": 0.1}, "one_cycle": {"momentum": [0.9, 0.8]}}
    given = {"schedule": schedule, "schedule_settings": settings[schedule], "optimizer": "sgd"}
    learner = Learner(toy_job(), toy_plan(**given, hyperparameters={"momentum": 0.9}), device="cpu")
    for _ in range(20):
        update = learner.update()
        share = lr_factor(update.position, total_examples=1280, schedule=schedule, settings=settings[schedule])
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * share, rel=1e-12)
        if schedule == "one_cycle" and update.step == 9:
            assert learner.optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_settings": {"eta": 1}}, r'batch_schedule is "fixed", got \{\'eta\': 1\}'),
        ({"batch_schedule": "adaptive"}, r"an adaptive batch schedule needs plan.noise_scale"),
        (
            {"batch_schedule": "norm_test", "batch_settings": {"theta": 0.1}},
            r"batch_settings do not fit batch_schedule 'norm_test': got an unexpected argument 'theta'",
        ),
        ({"batch_schedule": "ramp"}, r"batch_settings do not fit batch_schedule 'ramp': missing .*'end'"),
        ({"batch_schedule": "norm_test", "batch_settings": {"eta": 0}}, r"eta must lie in \(0, 1\), got 0"),
        ({"batch_schedule": "milestones"}, r'batch_settings\["sizes"\] must be \[\[examples, size\], ...\], got None'),
        (
            {"batch_schedule": "milestones", "batch_settings": {"sizes": [[100, 1000]]}},
            r"the sizes of batch_schedule 'milestones' must lie in 1..256, got 64..1000",
        ),
        (
            {"batch_schedule": "milestones", "batch_settings": {"sizes": [[500, 128], [500, 32]]}},
            r"sizes' points must rise from one to the next, got \[500, 500\]",
        ),
        (
            {"batch_schedule": "milestones", "batch_settings": {"sizes": [[[500], 128]]}},
            r"sizes' points must be an integer of at least 1, got \[500\]",
        ),
        (
            {"batch_schedule": "milestones", "batch_settings": {"sizes": []}},
            r'batch_settings\["sizes"\] must be \[\[examples, size\], ...\], got \[\]',
        ),
        (
            {"batch_schedule": "ramp", "batch_settings": {"end": 64, "over": 100}},
            "the sizes of batch_schedule 'ramp' must differ, got 64 alone",
        ),
        (
            {"batch_schedule": "ramp", "batch_settings": {"end": 128, "over": 100, "lr_rule": "sqrt"}},
            "batch_settings must leave 'lr_rule' to the plan's learning_rate_rule, got 'sqrt'",
        ),
        (
            {"batch_schedule": "decay_by_batch", "batch_settings": {"maximum": 1000}},
            "batch_settings must leave 'maximum' to the plan's max_batch_size, got 1000",
        ),
        (
            {"batch_schedule": "norm_test", "batch_settings": {"coordinate_wise": True}},
            "batch_settings must leave 'coordinate_wise' out",
        ),
        (
            {"batch_schedule": "ramp", "batch_settings": {"end": 128, "over": 100}, "learning_rate_rule": "surge"},
            "the rule 'surge' needs noise_scale, got None",
        ),
        (
            {"batch_schedule": "adaptive", "noise_scale": NOISE, "batch_size": 1},
            "'adaptive' compares parts of a batch: batch_size must be at least 2, got 1",
        ),
        (
            {"batch_schedule": "goodput", "min_batch_size": 64, "max_batch_size": 64},
            r"'goodput' moves the batch, and batch_size 64 has no room to: .* leave 64\.\.64, of 256 examples",
        ),
        (
            {"batch_schedule": "norm_test", "max_batch_size": 64},
            r"'norm_test' only grows the batch, and batch_size 64 has no room to: .* leave 1\.\.64",
        ),
        (
            {"batch_schedule": "decay_by_batch", "schedule": "wsd", "schedule_settings": {"decay_share": 0.0}}
            | {"learning_rate_rule": "sqrt"},
            r"'decay_by_batch' needs a schedule that falls, got 'wsd' with \{'decay_share': 0.0\}",
        ),
        ({"batch_schedule": "norm_test", "optimizer": "vrsgd"}, r"'norm_test' and the optimizer 'vrsgd' both take"),
        ({"batch_schedule": "decay_by_batch", "schedule": "linear"}, r"'decay_by_batch' needs a learning_rate_rule of"),
        (
            {"batch_schedule": "decay_by_batch", "learning_rate_rule": "sqrt"},
            r"'decay_by_batch' needs a schedule that falls, got 'constant'",
        ),
        (
            {"batch_schedule": "ramp", "batch_settings": {"end": 128, "over": 1281}},
            r"must lie within the run of 1280 examples, 20 steps of 64, got the ramp's end at 1281: it would never",
        ),
        (
            {"batch_schedule": "milestones", "batch_settings": {"sizes": [[1279, 128], [1280, 64]]}},
            r"within the run of 1280 examples, 20 steps of 64, got milestone 2 at 1280: it would never come",
        ),
        ({"schedule": "power"}, r'the schedule "power" needs schedule_settings\["knee_share"\]'),
        ({"schedule": "one_cycle", "warmup_examples": 64}, r'"one_cycle" warms up by itself'),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(changes, message, tmp_path):
    plan = dataclasses.replace(toy_plan(), **changes)
    with pytest.raises(InputError, match=message):
        train(toy_job(), plan, out=tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_batch_norm_and_a_test_of_single_examples_are_refused():
    with pytest.raises(InputError, match="model must not normalise over the batch"):
        Learner(toy_job(batch_norm=True), moving("norm_test", batch_size=8), device="cpu")
    Learner(toy_job(batch_norm=True), moving("norm_test", batch_size=16), device="cpu")


def test_no_pass_is_left_with_one_example():
    """Of which batch normalisation makes nothing, and refuses it: 65 examples are 33 and 32, not 64 and 1."""
    plan = moving("milestones", micro_batch=64, batch_settings={"sizes": [[64, 65]]})
    learner = Learner(toy_job(batch_norm=True), plan, device="cpu")
    assert [learner.update().batch_size for _ in range(2)] == [64, 65]
    assert [len(piece) for piece in learner.gradient.pieces(64, 65)] == [33, 32]


def test_the_stream_is_the_same_at_any_batches():
    plan = moving("milestones")
    fixed = Learner(toy_job(), toy_plan(), device="cpu")
    moved = Learner(toy_job(), plan, device="cpu")
    assert np.array_equal(fixed.stream.indices(0, 1000), moved.stream.indices(0, 1000))
