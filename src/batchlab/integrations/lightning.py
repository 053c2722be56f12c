"""The noise scale inside a Lightning `Trainer`, and a batch size that moves, as callbacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from batchlab.core.errors import BatchlabError, InputError
from batchlab.core.facts import Estimate
from batchlab.integrations.micro_batches import examples_in
from batchlab.measure import GradientNoise

try:
    from lightning.pytorch.callbacks import Callback

    from batchlab.integrations.lightning_batch import AdaptiveBatchCallback as AdaptiveBatchCallback
except ImportError as error:
    raise BatchlabError("the Lightning callback needs lightning: pip install 'batchlab[lightning]'") from error


class GradientNoiseCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Measures the gradient noise scale of a Lightning run and logs it as "noise_scale", in examples.

        trainer = Trainer(accumulate_grad_batches=4, callbacks=[GradientNoiseCallback()])

    Needs two micro-batches an update: `accumulate_grad_batches` of 2 or more, or several processes under DDP. Clipping
    comes after it and does no harm. For automatic optimization with one optimizer; not for precision "16-mixed",
    whose loss scale hides the gradient, nor for sharded strategies.

    options: of `batchlab.measure.GradientNoise`. `estimate` is the latest one, None before the first.
    """

    def __init__(self, **options: Any) -> None:
        self.estimate: Estimate | None = None
        self._options = options
        self._noise: GradientNoise | None = None
        self._piece: Any = None
        self._examples = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches to the module."""
        if trainer.precision == "16-mixed":
            raise InputError('GradientNoiseCallback cannot see through the loss scale of "16-mixed": use "bf16-mixed"')
        if not pl_module.automatic_optimization:
            raise InputError(
                "GradientNoiseCallback needs automatic optimization: in a loop of your own use GradientNoise"
            )
        self._noise = GradientNoise(pl_module, **self._options)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Counts the examples of the micro-batch."""
        self._examples = examples_in(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Before each micro-batch's backward pass."""
        if self._noise is not None:
            self._piece = self._noise.micro_batch(self._examples)
            self._piece.__enter__()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """After each micro-batch's backward pass."""
        if self._piece is not None:
            self._piece.__exit__(None, None, None)
            self._piece = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """After an update's last micro-batch, before clipping."""
        if self._noise is None:
            return
        self.estimate = self._noise.step()
        if self.estimate.defined:
            pl_module.log("noise_scale", self.estimate.value, batch_size=1)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Takes everything off the module."""
        if self._noise is not None:
            self._noise.close()
            self._noise = None
