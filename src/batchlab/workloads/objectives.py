"""Losses and metrics of the ready jobs: each is a mean over the batch's examples, or over its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchlab.workloads.examples import Batch


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """-log p(target), in nats, mean over all targets: logits (..., classes), targets (...)."""
    logits: Tensor = model(batch.inputs)
    return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())


def accuracy(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The share of targets whose class has the largest logit, 0 to 1."""
    return {"accuracy": (model(batch.inputs).argmax(-1) == batch.targets).double().mean()}


def bits_per_byte(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy in bits, mean over all predicted bytes; 8 is a uniform guess."""
    return {"bits_per_byte": cross_entropy(model, batch) / math.log(2)}


def reconstruction_error(model: nn.Module, batch: Batch) -> Tensor:
    """(output - target)², mean over all numbers of all examples."""
    output: Tensor = model(batch.inputs)
    return F.mse_loss(output, batch.targets)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """(prediction - target)², mean over examples: predictions (n, 1), targets (n,), in standard deviations.

    One minus it is the share of the training variance that is explained.
    """
    prediction: Tensor = model(batch.inputs)
    return F.mse_loss(prediction.squeeze(1), batch.targets)


def errors(scale: float) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """A metric with the mean absolute ("mae") and mean squared ("mse") error in the target's own unit.

    scale: the target's standard deviation, by which it was divided. Both are means over examples, so that they can
    be averaged over batches; a root mean square or an R² cannot.
    """

    def metric(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        error = (model(batch.inputs).squeeze(1) - batch.targets).to(torch.float64) * scale
        return {"mae": error.abs().mean(), "mse": error.square().mean()}

    return metric
