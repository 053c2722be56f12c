"""The noise callback and a batch that moves, inside the real `transformers.Trainer` on a GPU."""

import itertools

import pytest
import torch
from torch import nn

from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.schedule.batches.goodput_batch import GoodputBatch
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import Net, Numbered, Table, by_hand, forget_accelerate, numbers, sgd, stream, weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.gpu
SIZES = [8, 16, 4, 4, 32, 8, 12, 12]


@pytest.fixture(autouse=True)
def _fresh():
    forget_accelerate()
    yield
    forget_accelerate()


def _arguments(folder, accelerator, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": accelerator.type == "cpu",
        "disable_tqdm": True,
        "seed": 0,
    }
    return transformers.TrainingArguments(**(settings | changes))


def _trainer(folder, accelerator, controller, net=None, arguments=None, **options):
    from batchlab.integrations.hugging_face import AdaptiveBatchTrainer

    net = Net() if net is None else net
    schedule = lambda optimizer: WSD(optimizer, batch=8, total=400, decay=200)  # noqa: E731
    settings = {"examples": sum(SIZES), "schedule": schedule, "lr_rule": "sqrt", "train_dataset": Numbered()} | options
    made = _arguments(folder, accelerator, **(arguments or {}))
    return AdaptiveBatchTrainer(net, made, controller=controller, optimizers=(sgd(net), None), **settings)


def _logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if "loss" in line and name in line]


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_the_loop_by_hand_at_the_sizes_that_came(accelerator, tmp_path, workers):
    arguments = {"dataloader_num_workers": workers, "max_grad_norm": 1e9}
    trainer = _trainer(tmp_path, accelerator, Table(SIZES), noise={}, arguments=arguments)
    trainer.train()
    assert all(p.device.type == accelerator.type for p in trainer.model.parameters())
    sizes = _logged(trainer, "batch_size")
    assert sizes == (SIZES if workers == 0 else [8, *SIZES])[: len(sizes)]
    assert numbers(trainer.model.met) == stream(sum(sizes))
    starts = [0, *itertools.accumulate(sizes)][:-1]
    rates = [0.1 * (size / 8) ** 0.5 * wsd_share(seen, total=400, decay=200) for seen, size in zip(starts, sizes)]
    expected, noise = by_hand(sizes, rates)
    found = [each.cpu() for each in weights(trainer.model)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert _logged(trainer, "noise_scale")[-1] == pytest.approx(noise.value, rel=1e-8)


CONTROLLERS = {
    "noise": lambda: NoiseScaleBatch(8, exchange_rate=8.0, maximum=64, multiple_of=4, patience=2, deadband=1.0),
    "norm_test": lambda: NormTestBatch(8, maximum=64, multiple_of=4, patience=2),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_resumed_run_is_the_uninterrupted_one(accelerator, tmp_path, name):
    """With dropout, whose masks are drawn on the device, and to the last bit."""
    saving, make = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1.0}, CONTROLLERS[name]
    whole = _trainer(tmp_path / "whole", accelerator, make(), Net(dropout=0.3), arguments=saving)
    whole.train()
    sizes = _logged(whole, "batch_size")
    assert len(set(sizes)) > 1
    again = _trainer(tmp_path / "again", accelerator, make(), Net(dropout=0.3), arguments=saving)
    torch.rand(3, device=accelerator)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert _logged(again, "batch_size") == sizes
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(again.model), strict=True))
    assert again.adaptive.state_dict() == whole.adaptive.state_dict()


def test_the_sizes_are_those_of_the_cpu(accelerator, tmp_path):
    found = []
    for device in (accelerator, torch.device("cpu")):
        forget_accelerate()
        trainer = _trainer(tmp_path / device.type, device, CONTROLLERS["noise"]())
        trainer.train()
        found.append(_logged(trainer, "batch_size"))
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_a_batch_by_goodput_is_told_the_devices_seconds(accelerator, tmp_path):
    controller = GoodputBatch(8, maximum=64, multiple_of=4, patience=12)
    trainer = _trainer(tmp_path, accelerator, controller, examples=392)
    trainer.train()
    assert trainer.adaptive.seen >= 392 and len(set(_logged(trainer, "batch_size"))) > 1


class _Lines(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(5, 1)
        nn.init.constant_(self.line.weight, 0.1)
        nn.init.zeros_(self.line.bias)

    def forward(self, x, y):
        return {"loss": (self.line(x).squeeze(1).float() - y).square().mean()}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_callback_gives_the_plain_estimate_also_under_clipping(accelerator, tmp_path, bf16):
    """At learning rate 0 the weights stand still, and every micro-batch of an epoch is known."""
    from batchlab.integrations.hugging_face import GradientNoiseCallback

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=generator)
    y = x.sum(1) + torch.randn(96, generator=generator)
    data, seen = [{"x": x[i], "y": y[i]} for i in range(96)], []

    class Trainer(transformers.Trainer):
        def training_step(self, model, inputs, *further):
            seen.append({name: value.cpu() for name, value in inputs.items()})
            return super().training_step(model, inputs, *further)

    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.0, "weight_decay": 0.0}
    arguments = _arguments(tmp_path, accelerator, bf16=bf16, **(settings | {"max_grad_norm": 1e-3}))
    callback = GradientNoiseCallback(ema=None)
    trainer = Trainer(_Lines(), arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    plain = _Lines()
    reference = GradientNoise(plain, ema=None)
    for update in range(6):
        plain.zero_grad()
        for inputs in seen[4 * update : 4 * update + 4]:
            with reference.micro_batch(4):
                (plain(**inputs)["loss"] / 4).backward()
        expected = reference.step()
    assert len(seen) == 24 and expected.defined
    assert callback.estimate.value == pytest.approx(expected.value, rel=0.1 if bf16 else 1e-4)
    assert _logged(trainer, "noise_scale")[-1] == callback.estimate.value
    assert not any(p._backward_hooks for p in trainer.model.parameters())
