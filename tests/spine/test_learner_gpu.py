"""The learner on a GPU takes the CPU's steps: in float64 with every optimizer and moving batch; its state moves too."""

import math

import pytest
import torch

from batchlab.core.checkpoint import load_checkpoint, save_checkpoint
from batchlab.core.facts import Estimate
from batchlab.optim.by_name import names
from batchlab.spine.learner import Learner
from tests.spine.jobs import squared_error, toy_job, toy_plan
from tests.spine.test_learner import words_job

pytestmark = pytest.mark.gpu
NOISE = Estimate(64.0, 50.0, 80.0, "given")
ADAPTIVE = {"batch_schedule": "adaptive", "noise_scale": NOISE, "max_batch_size": 256}
SOON = {"batch_settings": {"patience": 4}}
# Whose step has bfloat16 products, or a network in float32 of its own.
COARSE = {"muon": 2e-2, "dmuon": 2e-2, "small_fc_lopt": 1e-3}


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()]).cpu()


def trained(job, plan, device, steps=8, **options):
    learner = Learner(job, plan, device=device, **options)
    return learner, [learner.update() for _ in range(steps)]


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_half_life": 200.0, "clip_norm": 0.5, "accumulation": 5, "micro_batch": 13},
        {"average_power": 3.0, "optimizer": "sgd", "schedule": "cosine", "warmup_examples": 128},
        {"measure_noise": False, "optimizer": "adam"},
    ],
)
def test_the_cpus_updates_noise_average_and_evaluation(accelerator, changes):
    metric = lambda module, batch: {"mae": (module(batch[0]).squeeze(1) - batch[1]).abs().mean(), "two": 2.0}  # noqa: E731
    job, plan = toy_job(batch_norm=True, metric=metric), toy_plan(**changes)
    there, said = trained(job, plan, accelerator, preconditioned=plan.optimizer == "adamw")
    here, expected = trained(job, plan, "cpu", preconditioned=plan.optimizer == "adamw")
    assert all(p.device.type == accelerator.type for p in there.model.parameters())
    for mine, theirs in zip(said, expected, strict=True):
        assert (mine.step, mine.position, mine.skipped) == (theirs.step, theirs.position, False)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-10)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-9)
        assert mine.learning_rate == theirs.learning_rate
    if plan.measure_noise:
        assert said[-1].noise.defined and said[-1].noise.value == pytest.approx(expected[-1].noise.value, rel=1e-6)
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-9, atol=1e-9)
    averages = [[p.cpu() for p in each.evaluated.parameters()] for each in (there, here)]
    torch.testing.assert_close(*averages, rtol=1e-9, atol=1e-9)
    assert there.evaluate() == pytest.approx(here.evaluate(), rel=1e-9)
    assert there.first_loss() == pytest.approx(here.first_loss(), rel=1e-9)


@pytest.mark.parametrize("optimizer", names())
def test_every_optimizer_steps_as_on_the_cpu_and_goes_on_from_its_state(accelerator, tmp_path, optimizer):
    job, plan = toy_job(), toy_plan(optimizer=optimizer, learning_rate=1e-3)
    fresh = weights(Learner(job, plan, device="cpu"))
    there, _ = trained(job, plan, accelerator, steps=3)
    saved = save_checkpoint(tmp_path, 3, there.state_dict())
    updates = [there.update() for _ in range(3)]
    here, expected = trained(job, plan, "cpu", steps=6)
    assert not any(update.skipped for update in updates)
    apart, moved = (weights(there) - weights(here)).norm(), (weights(here) - fresh).norm()
    assert moved > 0 and apart <= COARSE.get(optimizer, 1e-6) * moved
    again = Learner(job, plan, device=accelerator)
    again.load_state_dict(load_checkpoint(saved))
    for _ in range(3):
        again.update()
    assert torch.equal(weights(again), weights(there))
    crossed = Learner(job, plan, device="cpu")
    crossed.load_state_dict(load_checkpoint(saved))
    for _ in range(3):
        update = crossed.update()
    assert (weights(crossed) - weights(here)).norm() <= COARSE.get(optimizer, 1e-6) * moved
    assert update.loss == pytest.approx(expected[-1].loss, rel=max(1e-6, COARSE.get(optimizer, 0)))


@pytest.mark.parametrize(
    "moves",
    [
        ADAPTIVE | {"learning_rate_rule": "sqrt"},
        {"batch_schedule": "decay_by_batch", "schedule": "linear", "learning_rate_rule": "linear", "steps": 60}
        | {"noise_scale": NOISE, "batch_settings": {"patience": 4, "headroom": 100.0}},
        {"batch_schedule": "norm_test"} | SOON,
        {"batch_schedule": "inner_product_test"} | SOON,
        {"batch_schedule": "ramp", "batch_settings": {"end": 192, "over": 640, "increment": 32}},
        {"batch_schedule": "milestones", "batch_settings": {"sizes": [[320, 128], [900, 32]]}},
    ],
    ids=lambda moves: moves["batch_schedule"],
)
def test_a_moving_batch_takes_the_sizes_of_the_cpu(accelerator, moves):
    job, plan = toy_job(), toy_plan(**({"steps": 200} | moves))
    there, said = trained(job, plan, accelerator, steps=40)
    here, expected = trained(job, plan, "cpu", steps=40)
    assert [update.batch_size for update in said] == [update.batch_size for update in expected]
    assert len({update.batch_size for update in said}) > 1
    assert [update.learning_rate for update in said] == pytest.approx([update.learning_rate for update in expected])
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-8, atol=1e-9)


def test_a_batch_by_goodput_moves_by_seconds_that_are_the_devices(accelerator):
    plan = toy_plan(steps=200, batch_schedule="goodput", batch_settings={"patience": 12})
    _, updates = trained(toy_job(), plan, accelerator, steps=60)
    assert len({update.batch_size for update in updates}) > 1
    assert all(0 < update.seconds < math.inf and math.isfinite(update.loss) for update in updates)


def test_one_bad_micro_batch_changes_nothing_but_the_position(accelerator):
    calls = []

    def loss(module, batch):
        calls.append(None)
        value = squared_error(module, batch)
        return value * math.nan if len(calls) == 4 * 3 + 2 else value

    learner, _ = trained(toy_job(loss=loss, batch_norm=True), toy_plan(ema_half_life=100.0), accelerator, steps=3)
    before = [t.clone() for name in ("model", "optimizer", "average") for t in tensors(learner.state_dict()[name])]
    assert learner.update().skipped
    after = [t for name in ("model", "optimizer", "average") for t in tensors(learner.state_dict()[name])]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert learner.position == 4 * 64 and not learner.update().skipped


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_state_goes_through_a_file_and_training_goes_on_the_same(accelerator, tmp_path, precision):
    """With dropout and batch norm, bit for bit: the masks are drawn on the device, from (seed, step)."""
    job = toy_job(dropout=0.2, batch_norm=True, dtype=torch.float32)
    plan = toy_plan(ema_half_life=200.0, precision=precision)
    whole, _ = trained(job, plan, accelerator, steps=9)
    first, _ = trained(job, plan, accelerator, steps=4)
    second = Learner(job, plan, device=accelerator)
    torch.rand(7, device=accelerator)
    second.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 4, first.state_dict())))
    for _ in range(5):
        second.update()
    mine, theirs = list(tensors(second.state_dict())), list(tensors(whole.state_dict()))
    assert len(mine) > 8 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    other, _ = trained(job, plan, accelerator, steps=9, seed=1)
    assert not torch.equal(weights(other), weights(whole))


def test_a_moving_batch_goes_on_the_same(accelerator, tmp_path):
    job, plan = toy_job(dropout=0.2), toy_plan(steps=200, **ADAPTIVE)
    whole, expected = trained(job, plan, accelerator, steps=50)
    first, _ = trained(job, plan, accelerator, steps=23)
    second = Learner(job, plan, device=accelerator)
    second.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 23, first.state_dict())))
    sizes = [second.update().batch_size for _ in range(27)]
    assert sizes == [update.batch_size for update in expected[23:]] and len(set(sizes)) > 1
    assert torch.equal(weights(second), weights(whole))


def test_bf16_computes_in_bf16_and_stays_near_float32(accelerator):
    seen = set()

    def loss(module, batch):
        x, y = batch
        output = module(x)
        seen.add(output.dtype)
        return (output.squeeze(1).float() - y).square().mean()

    job = toy_job(dtype=torch.float32, loss=loss)
    rough, updates = trained(job, toy_plan(precision="bf16", clip_norm=0.5), accelerator, steps=60)
    assert seen == {torch.bfloat16}
    fine, expected = trained(job, toy_plan(clip_norm=0.5), accelerator, steps=60)
    assert seen == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())
    assert updates[0].loss == pytest.approx(expected[0].loss, rel=2e-2)
    start = Learner(job, toy_plan(), device=accelerator).evaluate()["loss"]
    assert rough.evaluate()["loss"] < 0.5 * start
    assert rough.evaluate()["loss"] == pytest.approx(fine.evaluate()["loss"], abs=0.05 * start)


def test_units_are_counted_by_a_function_of_the_batch(accelerator):
    """A micro-batch without units is left out, on the device too."""
    job, plan = words_job(), toy_plan(16, micro_batch=1, optimizer="sgd")
    there, said = trained(job, plan, accelerator, steps=3)
    here, expected = trained(job, plan, "cpu", steps=3)
    assert [update.loss for update in said] == pytest.approx([update.loss for update in expected], rel=1e-10)
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-9, atol=1e-10)
    assert there.evaluate() == pytest.approx(here.evaluate(), rel=1e-10)


def test_compiled_training_takes_the_same_steps(accelerator):
    job = toy_job(dtype=torch.float32)
    compiled, plain = (trained(job, toy_plan(compile=flag), accelerator, steps=5)[0] for flag in (True, False))
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-4, atol=1e-5)
