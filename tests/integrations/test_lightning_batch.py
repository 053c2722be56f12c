"""A batch that moves inside the real Lightning `Trainer`, against the loop by hand."""

import itertools
import os
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from batchlab.core.errors import InputError
from batchlab.integrations.lightning import AdaptiveBatchCallback
from batchlab.schedule.batches.noise_scale_batch import NoiseScaleBatch
from batchlab.schedule.batches.norm_test_batch import NormTestBatch
from batchlab.schedule.rates.wsd import WSD, wsd_share
from tests.integrations.by_hand import Net, Numbered, Table, by_hand, numbers, sgd, stream, weights
from tests.spine.forked import in_ranks

SIZES = [8, 16, 4, 4, 32, 8, 12, 12]
LATE = [8, *SIZES]  # Lightning looks one micro-batch ahead, so that a size comes an update late


class _Module(lightning.LightningModule):
    def __init__(self, callback=None, optimizers=1, scheduler=False):
        super().__init__()
        self.net, self.callback, self.optimizers_, self.scheduler = Net(), callback, optimizers, scheduler

    def training_step(self, batch, _):
        return self.net(**batch)["loss"]

    def validation_step(self, batch, _):
        self.log("seen", float(self.callback.adaptive.seen if self.callback.adaptive else 0))

    def train_dataloader(self):
        return self.callback.loader(Numbered())

    def configure_optimizers(self):
        made = [sgd(self.net) for _ in range(self.optimizers_)]
        if self.scheduler:
            return made, [torch.optim.lr_scheduler.ConstantLR(made[0])]
        return made


class _Later(lightning.Callback):
    """Changes the accumulation in mid-run, as `GradientAccumulationScheduler` does."""

    def on_train_batch_end(self, trainer, *_):
        trainer.accumulate_grad_batches = 2


class _Record(lightning.Callback):
    """Every update, once."""

    def __init__(self, callback):
        self.callback, self.updates, self.metrics = callback, [], []

    def on_train_batch_end(self, trainer, *_):
        last = self.callback.last_update
        if last is not None and last not in self.updates:
            self.updates.append(last)


def _callback(controller, **options):
    settings = {"examples": sum(SIZES), "accumulation": 4, "schedule": _schedule, "lr_rule": "sqrt"} | options
    return AdaptiveBatchCallback(controller, **settings)


def _schedule(optimizer):
    return WSD(optimizer, batch=8, total=400, decay=200)


def _trainer(folder, callbacks, **changes):
    settings = {
        "max_epochs": -1,
        "accumulate_grad_batches": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": callbacks,
    }
    return lightning.Trainer(**(settings | changes))


def _fit(folder, callback, *, loader=None, ckpt_path=None, more=(), module=None, **changes):
    record, module = _Record(callback), _Module(callback) if module is None else module
    trainer = _trainer(folder, [callback, record, *more], **changes)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module, record


def _rates(sizes, factor=lambda size: (size / 8) ** 0.5):
    starts = [0, *itertools.accumulate(sizes)][:-1]
    return [0.1 * factor(size) * wsd_share(seen, total=400, decay=200) for seen, size in zip(starts, sizes)]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_loop_by_hand_at_the_sizes_that_came(tmp_path, workers):
    callback = _callback(Table(SIZES), noise={})
    loader = callback.loader(Numbered(), num_workers=workers)
    trainer, module, record = _fit(tmp_path, callback, loader=loader, gradient_clip_val=1e9)
    sizes = [update.batch_size for update in record.updates]
    assert sizes == (LATE if workers == 0 else [8, *LATE])[: len(sizes)]
    assert sum(sizes[:-1]) < sum(SIZES) <= sum(sizes) == callback.adaptive.seen
    assert numbers(module.net.met) == stream(sum(sizes))
    assert [update.learning_rate for update in record.updates] == pytest.approx(_rates(sizes), rel=1e-12)
    expected, noise = by_hand(sizes, _rates(sizes))
    torch.testing.assert_close(weights(module.net), expected, rtol=1e-10, atol=1e-10)
    assert record.updates[-1].noise.value == pytest.approx(noise.value, rel=1e-8)
    logged = {name: trainer.callback_metrics[name].item() for name in record.updates[-1].log()}
    assert logged == pytest.approx(record.updates[-1].log(), rel=1e-6)
    assert logged.keys() == {"batch_size", "examples", "learning_rate", "noise_scale"}
    assert trainer.global_step == len(sizes) and not any(p._backward_hooks for p in module.parameters())


def test_clipping_comes_after_measuring(tmp_path):
    callback = _callback(Table([8]), noise={}, examples=80, lr_rule=None)
    _, _, record = _fit(tmp_path, callback, gradient_clip_val=1e-9)
    _, still = by_hand([8] * 10, [0.0] * 10)
    assert record.updates[-1].noise.value == pytest.approx(still.value, rel=1e-4)


def _noisy():
    return NoiseScaleBatch(8, exchange_rate=8.0, maximum=64, multiple_of=4, patience=2, deadband=1.0)


@pytest.mark.parametrize("early", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, early):
    """Across changes of the size, to the last bit, whether the loader is made before or by the module."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = _callback(_noisy())
    _, module, every = _fit(tmp_path, whole, more=[keep])
    sizes = [update.batch_size for update in every.updates]
    assert len(set(sizes)) > 1
    for at in (1, 3, 4, len(sizes)):
        again = _callback(_noisy())
        loader = again.loader(Numbered()) if early else None
        _, resumed, rest = _fit(tmp_path, again, loader=loader, ckpt_path=tmp_path / f"step={at}.ckpt")
        assert rest.updates == every.updates[at:]
        assert numbers(resumed.net.met) == numbers(module.net.met)[sum(sizes[:at]) :]
        assert all(torch.equal(a, b) for a, b in zip(weights(module.net), weights(resumed.net), strict=True))
        assert again.adaptive.state_dict() == whole.adaptive.state_dict()


def test_the_norm_test_moves_the_batch(tmp_path):
    callback = _callback(NormTestBatch(8, maximum=64, multiple_of=4, eta=0.5), lr_rule=None, examples=120)
    _, module, record = _fit(tmp_path, callback)
    sizes = [update.batch_size for update in record.updates]
    assert sizes[0] == sizes[1] < sizes[2]
    expected, _ = by_hand(sizes, _rates(sizes, lambda size: 1.0))
    torch.testing.assert_close(weights(module.net), expected, rtol=1e-10, atol=1e-10)


def test_validation_by_batches_and_the_end_by_steps(tmp_path):
    callback = _callback(Table([8]), examples=400)
    module = _Module(callback)
    module.val_dataloader = lambda: DataLoader(Numbered(4), batch_size=4)
    more = {"max_steps": 5, "val_check_interval": 8, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    trainer, _, _ = _fit(tmp_path, callback, module=module, **more)
    assert callback.adaptive.seen == 40 and trainer.callback_metrics["seen"].item() == 32


@pytest.mark.parametrize(
    "changes, module, message",
    [
        ({"accumulate_grad_batches": 2}, {}, "accumulate_grad_batches must be accumulation 4, got 2"),
        ({}, {"scheduler": True}, "the module's schedulers count batches: give AdaptiveBatchCallback schedule"),
        ({}, {"optimizers": 2}, "one optimizer is needed|multiple optimizers"),
    ],
)
def test_bad_set_ups(tmp_path, changes, module, message):
    callback = _callback(Table([8]))
    with pytest.raises((InputError, RuntimeError), match=message):
        _fit(tmp_path, callback, module=_Module(callback, **module), **changes)


def test_more_bad_set_ups(tmp_path):
    with pytest.raises(InputError, match="controller must be a BatchController, got int"):
        AdaptiveBatchCallback(8, examples=1)
    callback = _callback(Table([8]), accumulation=1)
    manual = _Module(callback)
    manual.automatic_optimization = False
    with pytest.raises(InputError, match="in a loop of your own use AdaptiveBatch"):
        _fit(tmp_path, callback, module=manual, accumulate_grad_batches=1)
    with pytest.raises(InputError, match="AdaptiveBatchCallback.loader made, .* batch_sampler is a BatchSampler"):
        _fit(tmp_path, _callback(Table([8])), loader=DataLoader(Numbered(), batch_size=2))
    with pytest.raises(InputError, match="for one fit: make another one, or resume by ckpt_path"):
        callback = _callback(Table([8]), examples=8)
        for _ in range(2):
            _fit(tmp_path, callback)
    with pytest.raises(InputError, match="leave the accumulation as it is"):
        _fit(tmp_path, _callback(Table([8])), more=[_Later()])
    with pytest.raises(InputError, match="one endless epoch: .* got 8 batches an epoch"):
        _fit(tmp_path, _callback(Table([8])), limit_train_batches=8)
    with pytest.raises(InputError, match="max_micro_batch 3 x ranks 1 = 12, got 32"):
        _fit(tmp_path, _callback(Table([8, 32]), max_micro_batch=3))
    with pytest.raises(InputError, match='"16-mixed" scales the loss'):
        strategy = SimpleNamespace(handles_gradient_accumulation=False)
        told = {"optimizers": [None], "lr_scheduler_configs": [], "accumulate_grad_batches": 4, "strategy": strategy}
        _callback(_noisy()).on_fit_start(SimpleNamespace(precision="16-mixed", **told), _Module())


def _rank(folder):
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    here = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in here.items()})
    ddp = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    callback = _callback(Table([8, 16, 8, 32, 8], multiple_of=8), noise={}, examples=80)
    _, module, record = _fit(folder, callback, **ddp)
    torch.save({"met": numbers(module.net.met), "weights": weights(module.net)}, folder / f"{rank}.pt")
    assert [update.batch_size for update in record.updates] == [8, 8, 16, 8, 32, 8]
    callback = _callback(Table([8], multiple_of=4), noise={}, examples=80)
    loader = callback.loader(Numbered())
    loader.batch_sampler.world_size = 1
    with pytest.raises(InputError, match=f"the loader is of rank {rank} of 1, the trainer's is {rank} of 2"):
        _fit(folder, callback, loader=loader, **ddp)


def test_two_processes_are_one(tmp_path, monkeypatch):
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(found.getsockname()[1]))
    assert in_ranks(2, tmp_path, _rank, tmp_path) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    sizes, at, order, shares = [8, 8, 16, 8, 32, 8], 0, stream(80), ([], [])
    for size in sizes:
        shares[0].extend(order[at : at + size // 2])
        shares[1].extend(order[at + size // 2 : at + size])
        at += size
    expected, _ = by_hand(sizes, _rates(sizes), pieces=8)
    for rank, share in zip(ranks, shares):
        assert rank["met"] == share
        torch.testing.assert_close(rank["weights"], expected, rtol=1e-10, atol=1e-10)


def test_the_state_before_a_run_is_empty():
    assert _callback(Table([8])).state_dict() == {}
