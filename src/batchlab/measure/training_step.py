"""One training step of a job at any micro-batch size, on a model of its own: what memory and time are measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.core.model import make_model
from batchlab.core.random import derive_seed, reseed
from batchlab.data.fetch import fetch, to_device
from batchlab.data.stream import SampleStream
from batchlab.optim.by_name import create, step_alone


class TrainingStep:
    """Forward, backward and optimizer step of `job` on a fresh model; no other process takes part but by the model.

    Calling it with a size runs one whole step with so many examples. `phase` says what it is at: "data", "forward",
    "backward", "step" or "evaluation", and when an error came. The learning rate is 0, so that every step is the same
    work. The optimizer's state is allocated before the first step and gradients before each, as they are held while
    all but the first of accumulated micro-batches run. `copies` more copies of the trained weights are held: what an
    average of the weights or the buckets of DDP will take.
    make_batch: makes the batch of a size, in place of the job's data; that of the evaluation too.
    seed: of the weights and the examples. It sets the global generators: wrap it in `preserved_generators`.
    """

    def __init__(
        self,
        job: Job,
        *,
        device: torch.device,
        seed: int = 0,
        copies: int = 0,
        make_batch: Callable[[int], Any] | None = None,
    ) -> None:
        self.job, self.device, self.phase, self.make_batch = job, device, "model", make_batch
        reseed(derive_seed(seed, "weights"))
        self.model = make_model(job).to(device).train()
        self.optimizer = create(job.optimizer, self.model, lr=0.0)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._held: list[Tensor] = []
        self.hold_copies(copies)
        self._stream = SampleStream(len(job.train), derive_seed(seed, "stream"))
        self._allocate_state()

    def hold_copies(self, copies: int) -> None:
        """Holds so many more copies of the trained weights, written to, without which a CPU gives them no memory."""
        self._held += [torch.zeros_like(p, requires_grad=False) for p in self.trained for _ in range(copies)]

    def hold_gradients(self) -> None:
        """Zeros where a trained weight has no gradient."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _allocate_state(self) -> None:
        self.phase = "step"
        self.hold_gradients()
        step_alone(self.optimizer)

    def __call__(self, size: int) -> None:
        """One whole step with `size` examples, the last micro-batch of an update that accumulates."""
        self.phase = "backward"
        self.hold_gradients()
        self.forward_backward(size)
        self.step()

    def forward_backward(self, size: int) -> Tensor:
        """Adds the mean gradient over `size` examples to `.grad`; returns the loss, which may still be computing."""
        self.phase = "data"
        return self.backward_on(self.batch(size))

    def backward_on(self, batch: Any, share: float = 1.0) -> Tensor:
        """The same for a batch that is on the device; the gradient, and not the loss returned, times `share`."""
        self.phase = "forward"
        loss = self.job.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            raise InputError(f"job loss must return a scalar tensor, the mean over the batch, got {loss!r:.80}")
        if not loss.requires_grad:
            raise InputError("job loss does not depend on the model's weights: it has no gradient")
        self.phase = "backward"
        (loss if share == 1 else loss * share).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        """The optimizer's step, and the gradients dropped."""
        self.phase = "step"
        step_alone(self.optimizer)
        self.clear()

    def reset_optimizer(self, **hyperparameters: Any) -> None:
        """A fresh optimizer without state, for training in earnest: set its learning rate at each step."""
        self.optimizer = create(self.job.optimizer, self.model, lr=0.0, **hyperparameters)

    def batch(self, size: int) -> Any:
        """The first `size` examples of the stream, on the device; epoch after epoch where they are more than it has."""
        if self.make_batch is not None:
            return to_device(self.make_batch(size), self.device)
        return to_device(fetch(self.job.train, self._stream.indices(0, size).tolist(), self.job.collate), self.device)

    @torch.no_grad()
    def evaluate(self, size: int) -> None:
        """Loss and metrics of the first `size` validation examples, or of all where they are fewer; see `batch`."""
        self.phase = "evaluation"
        self.model.eval()
        try:
            if self.make_batch is not None:
                batch = self.batch(size)
            else:
                count = min(size, len(self.job.valid))
                batch = to_device(fetch(self.job.valid, list(range(count)), self.job.collate), self.device)
            self.job.loss(self.model, batch)
            if self.job.metric is not None:
                self.job.metric(self.model, batch)
        finally:
            self.model.train()

    def clear(self) -> None:
        """Drops the gradients; after a failed step too."""
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
