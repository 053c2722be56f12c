"""The noise callback and a batch that moves, inside the real Lightning `Trainer` on a GPU."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import Net, Numbered, Table, by_hand, numbers, sgd, stream, weights

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.gpu
SIZES = [8, 16, 4, 4, 32, 8, 12, 12]
LATE = [8, *SIZES]  # Lightning looks one micro-batch ahead, so that a size comes an update late


class _Module(lightning.LightningModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.net, self.devices = Net(dropout), set()

    def training_step(self, batch, _):
        self.devices.add((batch["x"].device.type, self.device.type))
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return sgd(self.net)


class _Record(lightning.Callback):
    """Every update, once."""

    def __init__(self, callback):
        self.callback, self.updates = callback, []

    def on_train_batch_end(self, trainer, *_):
        last = self.callback.last_update
        if last is not None and last not in self.updates:
            self.updates.append(last)


def _trainer(folder, accelerator, callbacks, **changes):
    settings = {
        "max_epochs": -1,
        "accumulate_grad_batches": 4,
        "accelerator": "gpu" if accelerator.type == "cuda" else "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": callbacks,
    }
    return lightning.Trainer(**(settings | changes))


def _fit(folder, accelerator, controller, *, dropout=0.0, pin=False, more=(), ckpt_path=None, noise=None):
    from batchlab.integrations.lightning import AdaptiveBatchCallback

    schedule = lambda optimizer: WSD(optimizer, batch=8, total=400, decay=200)  # noqa: E731
    callback = AdaptiveBatchCallback(
        controller, examples=sum(SIZES), accumulation=4, schedule=schedule, lr_rule="sqrt", noise=noise
    )
    record, module = _Record(callback), _Module(dropout)
    loader = callback.loader(Numbered(), pin_memory=pin)
    trainer = _trainer(folder, accelerator, [callback, record, *more], enable_checkpointing=bool(more))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    assert module.devices == {(accelerator.type, accelerator.type)}
    return module.net, record.updates, callback


@pytest.mark.parametrize("pin", [False, True])
def test_it_is_the_loop_by_hand_at_the_sizes_that_came(accelerator, tmp_path, pin):
    net, updates, _ = _fit(tmp_path, accelerator, Table(SIZES), noise={}, pin=pin and accelerator.type == "cuda")
    sizes = [update.batch_size for update in updates]
    assert sizes == LATE[: len(sizes)] and numbers(net.met) == stream(sum(sizes))
    starts = [0, *itertools.accumulate(sizes)][:-1]
    rates = [0.1 * (size / 8) ** 0.5 * wsd_share(seen, total=400, decay=200) for seen, size in zip(starts, sizes)]
    expected, noise = by_hand(sizes, rates)
    torch.testing.assert_close([each.cpu() for each in weights(net)], expected, rtol=1e-10, atol=1e-10)
    assert updates[-1].noise.value == pytest.approx(noise.value, rel=1e-8)


CONTROLLERS = {
    "noise": lambda: NoiseScaleBatch(8, exchange_rate=8.0, maximum=64, multiple_of=4, patience=2, deadband=1.0),
    "norm_test": lambda: NormTestBatch(8, maximum=64, multiple_of=4, patience=2),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_resumed_run_is_the_uninterrupted_one(accelerator, tmp_path, name):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=3, save_top_k=-1)
    whole, updates, callback = _fit(tmp_path, accelerator, CONTROLLERS[name](), more=[saving])
    assert len({update.batch_size for update in updates}) > 1
    kept = sorted((tmp_path / "kept").glob("*step=3.ckpt"))
    again, rest, resumed = _fit(tmp_path, accelerator, CONTROLLERS[name](), ckpt_path=str(kept[0]))
    assert rest == updates[3:] and resumed.state_dict() == callback.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))


def test_the_sizes_are_those_of_the_cpu(accelerator, tmp_path):
    found = [
        [update.batch_size for update in _fit(tmp_path, device, CONTROLLERS["noise"]())[1]]
        for device in (accelerator, torch.device("cpu"))
    ]
    assert found[0] == found[1] and len(set(found[0])) > 1


class _Lines(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.line, self.seen = nn.Linear(5, 1), []
        nn.init.constant_(self.line.weight, 0.1)
        nn.init.zeros_(self.line.bias)

    def training_step(self, batch, _):
        x, y = batch
        self.seen.append((x.cpu(), y.cpu()))
        return (self.line(x).squeeze(1).float() - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_callback_gives_the_plain_estimate_also_under_clipping(accelerator, tmp_path, precision):
    from batchlab.integrations.lightning import GradientNoiseCallback

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=generator)
    data = TensorDataset(x, x.sum(1) + torch.randn(96, generator=generator))
    module, callback = _Lines(), GradientNoiseCallback(ema=None)
    settings = {"max_steps": 6, "gradient_clip_val": 1e-3, "precision": precision}
    _trainer(tmp_path, accelerator, [callback], **settings).fit(module, DataLoader(data, batch_size=4))
    plain = _Lines()
    reference, seen = GradientNoise(plain.line, ema=None), list(module.seen)
    for update in range(6):
        plain.zero_grad()
        for batch in seen[4 * update : 4 * update + 4]:
            with reference.micro_batch(4):
                (plain.training_step(batch, 0) / 4).backward()
        expected = reference.step()
    assert len(seen) == 24 and expected.defined
    assert callback.estimate.value == pytest.approx(expected.value, rel=0.1 if precision != "32-true" else 1e-4)
