"""The callback inside the real `transformers.Trainer`."""

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from batchlab.core.errors import InputError
from batchlab.integrations.hugging_face import GradientNoiseCallback
from batchlab.measure.noise.noise_pair import unbiased_pair


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(5, 1)

    def forward(self, x, y):
        return {"loss": (self.line(x).squeeze(1) - y).square().mean()}


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def _data(n):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 5, generator=generator), torch.randn(n, generator=generator)
    return [{"x": x[i], "y": y[i]} for i in range(n)]


def _arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(settings | changes))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_it_is_the_plain_estimate_also_under_clipping(tmp_path, max_grad_norm):
    """At learning rate 0 the weights stand still, so that each update's pieces can be recomputed by hand."""
    data, model, callback = _data(96), _Net(), GradientNoiseCallback(ema=None)
    trainer = _InOrder(
        model, _arguments(tmp_path, max_grad_norm=max_grad_norm), train_dataset=data, callbacks=[callback]
    )
    trainer.train()
    traces = squares = 0.0
    for update in range(6):
        pieces = []
        for start in range(16 * update, 16 * update + 16, 4):
            batch = {name: torch.stack([row[name] for row in data[start : start + 4]]) for name in ("x", "y")}
            gradients = torch.autograd.grad(model(**batch)["loss"], list(model.parameters()))
            pieces.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
        small = sum(piece.square().sum() for piece in pieces) / 4
        pair = unbiased_pair(small.item(), torch.stack(pieces).mean(0).square().sum().item(), 4, 16)
        traces, squares = traces + pair.trace, squares + pair.grad_sq
    assert callback.estimate.value == pytest.approx(traces / squares, rel=1e-4)
    logged = [line["noise_scale"] for line in trainer.state.log_history if "noise_scale" in line]
    assert len(logged) >= 2 and logged[-1] == callback.estimate.value
    assert not any(p._backward_hooks for p in model.parameters())


def test_it_changes_no_weight(tmp_path):
    finals = []
    for callbacks in ([], [GradientNoiseCallback()]):
        model = _Net()
        arguments = _arguments(tmp_path, learning_rate=1e-2)
        _InOrder(model, arguments, train_dataset=_data(96), callbacks=callbacks).train()
        finals.append(model.line.weight.detach().clone())
    assert torch.equal(*finals)


def test_without_accumulation_it_says_why_there_is_nothing(tmp_path):
    callback = GradientNoiseCallback()
    arguments = _arguments(tmp_path, gradient_accumulation_steps=1)
    _InOrder(_Net(), arguments, train_dataset=_data(96), callbacks=[callback]).train()
    assert not callback.estimate.defined and "one piece a step" in callback.estimate.method


def test_a_loss_scale_is_refused(tmp_path):
    arguments = _arguments(tmp_path)
    arguments.fp16 = True
    with pytest.raises(InputError, match="use bf16=True"):
        GradientNoiseCallback().on_train_begin(arguments, None, None, model=_Net())
