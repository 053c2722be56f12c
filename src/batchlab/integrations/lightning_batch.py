"""A Lightning run whose batch size moves, as a callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.integrations.adaptive_batch import AdaptiveBatch, BatchUpdate, resume_sampler
from batchlab.integrations.batch_rate import HeldRate, LrFactor
from batchlab.integrations.measured_update import MeasuredUpdate
from batchlab.integrations.micro_batches import MicroBatches, examples_in, micro_batch_loader
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.scheduled_batch import LrRule
from batchlab.schedule.rates.counted import Counted

_SHARDED = ("FSDPStrategy", "ModelParallelStrategy")


class AdaptiveBatchCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Moves the batch size of a Lightning run by a controller, and the learning rate with it.

        batch = AdaptiveBatchCallback(controller, examples=1_000_000, accumulation=4, lr_rule="sqrt")
        trainer = Trainer(
            max_epochs=-1, accumulate_grad_batches=4, use_distributed_sampler=False, callbacks=[batch]
        )
        trainer.fit(module, batch.loader(data))

    Lightning decides by a count of micro-batches when to update, so that `accumulate_grad_batches` stands and the
    micro-batch moves: B / (accumulation x processes) on each process. The controller's sizes are B, in examples, and
    its `multiple_of` a multiple of accumulation x processes. The loader has no end and no length: the run stops at the
    first update at which `examples` were seen, or at a `max_steps` before that.

    controller: a `BatchController`. accumulation: the trainer's `accumulate_grad_batches`. seed: of the sample stream.
    schedule: makes the learning rate's schedule for the optimizer, `Counted` in examples; None holds the rate. The
        module's `configure_optimizers` gives one optimizer and no scheduler, for those count batches.
    lr_rule, lr_batch, max_micro_batch: of `AdaptiveBatch`. noise: options of `GradientNoise`, where it is not to be as
        the controller needs it. count: the examples in a batch of one process, by default the first dimension of the
        first tensor in it.

    Logs "batch_size" of the last update, "examples" so far, "learning_rate" and, where measured, "noise_scale".
    `last_update` holds them too.

    As the loader has no length, Lightning fetches one micro-batch ahead: a new size holds from the update after the
    next. A `DataLoader`'s workers add their prefetching to that. With several processes call `loader` in the module's
    `train_dataloader` hook, when the ranks are known. Epochs are not Lightning's: validate by `val_check_interval` in
    batches, with `check_val_every_n_epoch=None`.

    A checkpoint holds the callback's state, and a resumed run goes on as the uninterrupted one would have; it must be
    of the end of an update (`every_n_train_steps`). One callback is for one `fit`, resumed or not.

    Refused by name: limits on the batches of an epoch, manual optimization, several optimizers, schedulers of the
    module, another accumulation or loader than this one's, strategies that accumulate by themselves (DeepSpeed);
    "16-mixed" and sharded strategies where gradients are measured; batch tests in several processes.
    """

    def __init__(
        self,
        controller: BatchController,
        *,
        examples: int,
        accumulation: int = 1,
        schedule: Callable[[torch.optim.Optimizer], Counted] | None = None,
        lr_rule: LrRule | LrFactor | None = None,
        lr_batch: int | None = None,
        max_micro_batch: int | None = None,
        noise: Mapping[str, Any] | None = None,
        count: Callable[[Any], int] = examples_in,
        seed: int = 0,
    ) -> None:
        if not isinstance(controller, BatchController):
            raise InputError(f"controller must be a BatchController, got {type(controller).__name__}")
        check_count(examples=examples, accumulation=accumulation)
        self.controller, self.examples, self.accumulation, self.seed = controller, examples, accumulation, seed
        self._start = controller.batch_size
        self._schedule, self._noise, self._count, self._max_micro_batch = schedule, noise, count, max_micro_batch
        self._lr: dict[str, Any] = {"lr_rule": lr_rule, "lr_batch": self._start if lr_batch is None else lr_batch}
        self.adaptive: AdaptiveBatch | None = None
        self.last_update: BatchUpdate | None = None
        self._sampler: MicroBatches | None = None
        self._loader: DataLoader[Any] | None = None
        self._measured: MeasuredUpdate | None = None
        self._piece: Any = None
        self._moments: Any = None
        self._begun = 0.0
        self._saved: dict[str, Any] | None = None

    def loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        """The loader to fit with. options: of `DataLoader`: num_workers, collate_fn and the like."""
        self._sampler = MicroBatches(len(dataset), self._start, self.seed, accumulation=self.accumulation)
        if self._saved is not None:
            resume_sampler(self._saved, self.controller, self._sampler)
        self._loader = micro_batch_loader(dataset, self._sampler, **options)
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """As of the last update."""
        return {} if self.adaptive is None else self.adaptive.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on there: the sampler at once, for Lightning looks ahead, the rest when there is an optimizer."""
        self._saved = state_dict or None
        if self._saved is not None and self._sampler is not None:
            resume_sampler(self._saved, self.controller, self._sampler)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses by name what cannot work."""
        _check_trainer(trainer, pl_module, self.controller, self.accumulation, self._noise)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Joins controller, loader, noise and schedule."""
        if self.adaptive is not None and self._saved is None:
            raise InputError("an AdaptiveBatchCallback is for one fit: make another one, or resume by ckpt_path")
        sampler = self._sampler
        used = getattr(trainer.train_dataloader, "batch_sampler", None)
        ours = used is sampler
        if sampler is None or not ours:
            raise InputError(
                "the loader must be the one that AdaptiveBatchCallback.loader made, and use_distributed_sampler False, "
                f"got a loader whose batch_sampler is a {type(used).__name__}"
            )
        if trainer.num_training_batches != math.inf:
            raise InputError(
                "an AdaptiveBatchCallback's run is one endless epoch: leave limit_train_batches, overfit_batches and "
                f"fast_dev_run as they are, got {trainer.num_training_batches} batches an epoch"
            )
        if (sampler.rank, sampler.world_size) != (trainer.global_rank, trainer.world_size):
            raise InputError(
                f"the loader is of rank {sampler.rank} of {sampler.world_size}, the trainer's is {trainer.global_rank} "
                f"of {trainer.world_size}: call AdaptiveBatchCallback.loader in the module's train_dataloader"
            )
        optimizer = trainer.optimizers[0]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        made = HeldRate(optimizer, batch=self._start) if self._schedule is None else self._schedule(optimizer)
        self._measured = MeasuredUpdate(
            self.controller,
            pl_module,
            optimizer,
            accumulation=self.accumulation,
            world_size=trainer.world_size,
            noise=self._noise,
        )
        self.adaptive = AdaptiveBatch(
            self.controller,
            sampler,
            noise=self._measured.noise,
            schedule=made,
            max_micro_batch=self._max_micro_batch,
            trained=0 if self._saved is None else self._saved["updates"],
            **self._lr,
        )
        if self._saved is not None:
            self.adaptive.load_state_dict(self._saved, with_sampler=False)
            self._saved = None
        trainer.should_stop = trainer.should_stop or self.adaptive.seen >= self.examples

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins a micro-batch."""
        measured = self._measured
        if measured is None:
            return
        if trainer.accumulate_grad_batches != self.accumulation or batch_idx % self.accumulation != measured.pieces:
            raise InputError(
                f"an update must have {self.accumulation} micro-batches from its first on, got "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} and batch {batch_idx} as micro-batch "
                f"{measured.pieces}: save at the end of updates, and leave the accumulation as it is"
            )
        if measured.pieces == 0:
            self._begun = time.perf_counter()
        self._piece = measured.micro_batch(self._count(batch))
        self._piece.__enter__()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """After each micro-batch's backward pass."""
        self._end_piece()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """After an update's last micro-batch, before clipping."""
        self._end_piece()
        if self._measured is not None:
            self._moments = self._measured.finish()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an update: the next batch size and learning rate."""
        self._end_piece()
        measured, adaptive = self._measured, self.adaptive
        if measured is None or adaptive is None or not measured.whole:
            return
        seconds = None
        if "seconds" in self.controller.needs:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            seconds = time.perf_counter() - self._begun
        self.last_update = adaptive.step(batch_test=self._moments, seconds=seconds, examples=measured.examples)
        measured.begin()
        for name, value in self.last_update.log().items():
            pl_module.log(name, float(value), batch_size=1)
        if adaptive.seen >= self.examples:
            trainer.should_stop = True

    def _end_piece(self) -> None:
        if self._piece is not None:
            piece, self._piece = self._piece, None
            piece.__exit__(None, None, None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Takes everything off the module."""
        if self._measured is not None:
            self._measured.close()
            self._measured = None


def _check_trainer(
    trainer: Any, module: Any, controller: BatchController, accumulation: int, noise: Mapping[str, Any] | None
) -> None:
    measures = bool(controller.needs & {"noise_scale", "batch_test"}) or noise is not None
    strategy = type(trainer.strategy).__name__
    refused = {
        "automatic optimization is needed; in a loop of your own use AdaptiveBatch": not module.automatic_optimization,
        f"one optimizer is needed, got {len(trainer.optimizers)}": len(trainer.optimizers) != 1,
        "the module's schedulers count batches: give AdaptiveBatchCallback schedule instead": (
            trainer.lr_scheduler_configs
        ),
        f"accumulate_grad_batches must be accumulation {accumulation}, got {trainer.accumulate_grad_batches}": (
            trainer.accumulate_grad_batches != accumulation
        ),
        f"{strategy} accumulates by itself: use DDP": trainer.strategy.handles_gradient_accumulation,
        '"16-mixed" scales the loss, through which gradients cannot be measured: use "bf16-mixed"': (
            measures and trainer.precision == "16-mixed"
        ),
        f"{strategy} is not measured here: take a controller that needs no gradients, or DDP": (
            measures and strategy in _SHARDED
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise InputError(f"AdaptiveBatchCallback: {reason}")
