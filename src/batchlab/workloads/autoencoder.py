"""`autoencoder`: the handwritten digits of scikit-learn through eight numbers and back."""

from __future__ import annotations

from batchlab.core.job import Job, Target
from batchlab.workloads.digits import digits
from batchlab.workloads.examples import Examples
from batchlab.workloads.models import autoencoder_of
from batchlab.workloads.objectives import reconstruction_error


def autoencoder(*, code: int = 8, hidden: int = 64, optimizer: str = "adamw", target: Target | None = None) -> Job:
    """The pictures of `digits`, each its own target; an MLP 64-64-8-64-64 of 9,416 weights; mean squared error.

    The loss is the squared error per pixel in units of the training pixels' variance, mean over pixels and examples:
    1 is what a constant would leave. code, hidden: widths of the bottleneck and of the layer on either side.

    >>> job = autoencoder()
    >>> len(job.train), tuple(job.train[0][0].shape), tuple(job.train[0][1].shape)
    (1437, (64,), (64,))
    """
    pictures = digits()
    pixels = [part.inputs.flatten(1) for part in (pictures.train, pictures.valid) if isinstance(part, Examples)]
    train, valid = (Examples(part, part) for part in pixels)
    return Job(
        "autoencoder",
        lambda: autoencoder_of(64, code, hidden=hidden),
        reconstruction_error,
        train=train,
        valid=valid,
        collate=pictures.collate,
        optimizer=optimizer,
        target=target,
    )
