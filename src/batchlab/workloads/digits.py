"""`digits`: 8x8 pictures of handwritten digits, ten classes, as bundled with scikit-learn."""

from __future__ import annotations

import torch

from batchlab.core.job import Job, Target
from batchlab.workloads.examples import Examples, collate
from batchlab.workloads.models import ConvNet
from batchlab.workloads.objectives import accuracy, cross_entropy
from batchlab.workloads.split import hold_out


def digits(*, optimizer: str = "adamw", target: Target | None = None) -> Job:
    """1437 training and 360 validation pictures, every digit in proportion; a CNN of 38,330 weights; accuracy.

    Pixels are standardised with the mean and deviation of all training pixels. Forward and backward of a batch of 64
    take about 3 ms on one core, so that a whole study fits in minutes.
    Data: the test set of Alpaydin and Kaynak 1998 (UCI, Optical Recognition of Handwritten Digits).

    >>> job = digits()
    >>> len(job.train), len(job.valid), tuple(job.train[0][0].shape)
    (1437, 360, (1, 8, 8))
    """
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    train, valid = hold_out([str(i) for i in range(len(labels))], 360 / 1797, strata=labels.tolist())
    inputs = torch.as_tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8)
    inputs = (inputs - inputs[train].mean()) / inputs[train].std()
    targets = torch.as_tensor(labels, dtype=torch.int64)
    return Job(
        "digits",
        lambda: ConvNet(1, 8, 10),
        cross_entropy,
        train=Examples(inputs[train], targets[train]),
        valid=Examples(inputs[valid], targets[valid]),
        metric=accuracy,
        collate=collate,
        optimizer=optimizer,
        target=target,
    )
