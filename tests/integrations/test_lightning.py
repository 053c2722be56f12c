"""The callback inside the real `lightning.pytorch.Trainer`."""

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.integrations.lightning import GradientNoiseCallback
from batchlab.measure.noise.noise_pair import unbiased_pair


class _Module(lightning.LightningModule):
    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.lr = nn.Linear(5, 1), lr

    def training_step(self, batch, _):
        x, y = batch
        return (self.line(x).squeeze(1) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def _data(n=96):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 5, generator=generator), torch.randn(n, generator=generator))


def _fit(module, callbacks, folder, **changes):
    settings = {
        "max_steps": 6,
        "accumulate_grad_batches": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": callbacks,
        "gradient_clip_val": 1e-3,
    }
    trainer = lightning.Trainer(**(settings | changes))
    trainer.fit(module, DataLoader(_data(), batch_size=4))
    return trainer


def test_it_is_the_plain_estimate_also_under_clipping(tmp_path):
    module, callback = _Module(lr=0.0), GradientNoiseCallback(ema=None)
    trainer = _fit(module, [callback], tmp_path)
    x, y = _data()[:]
    traces = squares = 0.0
    for update in range(6):
        pieces = []
        for start in range(16 * update, 16 * update + 16, 4):
            loss = module.training_step((x[start : start + 4], y[start : start + 4]), 0)
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            pieces.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
        small = sum(piece.square().sum() for piece in pieces) / 4
        pair = unbiased_pair(small.item(), torch.stack(pieces).mean(0).square().sum().item(), 4, 16)
        traces, squares = traces + pair.trace, squares + pair.grad_sq
    assert callback.estimate.value == pytest.approx(traces / squares, rel=1e-4)
    assert trainer.callback_metrics["noise_scale"].item() == pytest.approx(callback.estimate.value, rel=1e-6)
    assert not any(p._backward_hooks for p in module.parameters())


def test_it_changes_no_weight(tmp_path):
    finals = []
    for callbacks in ([], [GradientNoiseCallback()]):
        module = _Module(lr=0.1)
        _fit(module, callbacks, tmp_path)
        finals.append(module.line.weight.detach().clone())
    assert torch.equal(*finals)


def test_manual_optimization_is_refused(tmp_path):
    module = _Module(lr=0.1)
    module.automatic_optimization = False
    with pytest.raises(InputError, match="in a loop of your own use GradientNoise"):
        GradientNoiseCallback().on_fit_start(lightning.Trainer(accelerator="cpu", logger=False), module)
