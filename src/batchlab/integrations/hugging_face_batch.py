"""A Hugging Face `Trainer` whose batch size moves."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.integrations.adaptive_batch import AdaptiveBatch, BatchUpdate
from batchlab.integrations.batch_rate import HeldRate, LrFactor
from batchlab.integrations.measured_update import MeasuredUpdate
from batchlab.integrations.micro_batches import MicroBatches, examples_in, loader_like
from batchlab.schedule.batches.controller import BatchController
from batchlab.schedule.batches.scheduled_batch import LrRule
from batchlab.schedule.rates.counted import Counted

_SAVED = "batchlab.AdaptiveBatch"


class AdaptiveBatchTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A `Trainer` whose batch size a controller moves, and the learning rate with it.

        trainer = AdaptiveBatchTrainer(
            model, args, train_dataset=data,
            controller=NoiseScaleBatch(64, exchange_rate=16.0, maximum=1024, multiple_of=4), examples=1_000_000,
            schedule=lambda optimizer: WSD(optimizer, batch=64, total=1_000_000, decay=200_000), lr_rule="sqrt",
        )

    The Trainer decides by a count of micro-batches when to update, so that `gradient_accumulation_steps` stands and the
    micro-batch moves: B / (accumulation x processes) on each process. The controller's sizes are B, in examples, its
    `multiple_of` a multiple of accumulation x processes, and its start what the arguments say
    (per_device_train_batch_size x accumulation x processes).

    controller: a `BatchController`. Every `train` that does not resume begins with it as it was given.
    examples: the run ends with the first update at which so many were seen; None for num_train_epochs of the data, or
        for max_steps where that is above 0. With both, what comes first ends it. How many updates there will be is not
        known beforehand.
    schedule: makes the learning rate's schedule for the optimizer, `Counted` in examples; it stands in for
        `lr_scheduler_type` and the warmup of the arguments. None, with lr_scheduler_type="constant", holds the rate.
    lr_rule, lr_batch, max_micro_batch: of `AdaptiveBatch`.
    noise: options of `GradientNoise`, where it is not to be as the controller needs it.
    count: the examples in what the collator gave, on one process; the default is the first tensor's first dimension.
    arguments: of `Trainer`; another subclass of it may come after this one among a class's bases.

    `adaptive` is the run's `AdaptiveBatch`, `last_update` its last `BatchUpdate`.

    Logs, beside the loss: "batch_size" of the last update, "examples" so far, "noise_scale", and as ever
    "learning_rate". "epoch" is examples over the data set's length.

    Which example comes when is a function of the data seed alone, whatever the sizes, processes and interruptions
    (`MicroBatches`). `dataloader_num_workers` w with a prefetch factor f fetch w·f micro-batches ahead, and a new size
    comes as much later; without workers it holds from the next update on. The state is in the checkpoint's
    trainer_state.json, and a resumed run goes on as the uninterrupted one would have.

    The Trainer's loss is the mean over equal micro-batches; where the model takes `num_items_in_batch` it is the mean
    over tokens, and the noise scale then assumes that micro-batches have about equally many. Measuring comes before
    clipping, of any process.

    Refused by name: iterable data, sampling strategies other than "random", steps by epoch, `auto_find_batch_size`,
    DeepSpeed, several GPUs in one process, tensor, context and sequence parallelism; fp16 and FSDP where gradients are
    measured.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *further: Any,
        controller: BatchController,
        examples: int | None = None,
        schedule: Callable[[torch.optim.Optimizer], Counted] | None = None,
        lr_rule: LrRule | LrFactor | None = None,
        lr_batch: int | None = None,
        max_micro_batch: int | None = None,
        noise: Mapping[str, Any] | None = None,
        count: Callable[[Any], int] = examples_in,
        **arguments: Any,
    ) -> None:
        if not isinstance(args, TrainingArguments):
            raise InputError(f"args must be TrainingArguments, got {type(args).__name__}")
        if not isinstance(controller, BatchController):
            raise InputError(f"controller must be a BatchController, got {type(controller).__name__}")
        data = further[1] if len(further) > 1 else arguments.get("train_dataset")
        if data is not None and not hasattr(data, "__len__"):
            raise InputError(f"{type(self).__name__}: train_dataset must be a map-style dataset with a length")
        args = copy.copy(args)
        args.ignore_data_skip = True  # the sampler itself goes on where it was
        super().__init__(model, args, *further, **arguments)
        self.controller, self._controller_start = controller, controller.state_dict()
        self._schedule, self._noise, self._count, self._max_micro_batch = schedule, noise, count, max_micro_batch
        self._lr: dict[str, Any] = {
            "lr_rule": lr_rule,
            "lr_batch": controller.batch_size if lr_batch is None else lr_batch,
        }
        _check_arguments(self, controller, schedule)
        self.examples = self._default_examples() if examples is None else examples
        check_count(examples=self.examples)
        self.adaptive: AdaptiveBatch | None = None
        self.last_update: BatchUpdate | None = None
        self._measured: MeasuredUpdate | None = None
        self._sampler: MicroBatches | None = None
        self._counted: Counted | None = None
        self._moments: Any = None
        self._begun, self._seen_before = 0.0, 0
        self.add_callback(_Steps(self))

    def _default_examples(self) -> int:
        data: Any = self.train_dataset
        if self.args.max_steps > 0:
            return int(self.args.max_steps * self.controller.maximum)
        return math.ceil(self.args.num_train_epochs * len(data))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of the sample stream, collated and fetched as the arguments say."""
        found = super().get_train_dataloader()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = self._controller_start["batch_size"]
        self._sampler = MicroBatches(
            len(found.dataset),  # type: ignore[arg-type, unused-ignore]
            size,
            seed,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return loader_like(found, self._sampler)

    def set_initial_training_values(self, args: Any, dataloader: Any, *further: Any) -> tuple[Any, ...]:
        """With the most updates that the run can have: those of the controller's least size."""
        bounded = copy.copy(args)
        most = math.ceil(self.examples / self.controller.minimum)
        bounded.max_steps = min(most, args.max_steps) if args.max_steps > 0 else most
        return tuple(super().set_initial_training_values(bounded, dataloader, *further))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule in examples; the Trainer may read and save it, and the batch steps it."""
        target: Any = self.optimizer if optimizer is None else optimizer
        size = self._controller_start["batch_size"]
        self._counted = HeldRate(target, batch=size) if self._schedule is None else self._schedule(target)
        if not isinstance(self._counted, Counted):
            raise InputError(f"schedule must make a Counted, got {type(self._counted).__name__}: steps are not known")
        followed: Any = _Followed(self._counted)
        self.lr_scheduler = followed
        return followed

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *further: Any, **named: Any) -> Any:
        """The micro-batches of the next update; none once the examples are used up."""
        self._begun = time.perf_counter()
        if self.adaptive is not None and self.adaptive.seen >= self.examples:
            return [], None
        return super().get_batch_samples(epoch_iterator, *further, **named)

    def training_step(self, model: nn.Module, inputs: Any, *further: Any, **named: Any) -> Tensor:
        """A micro-batch, measured; after an update's last the measurement is closed, for clipping comes next."""
        measured = self._measured
        if measured is None:
            raise InputError("training_step measures updates of train(), and none is under way")
        with measured.micro_batch(self._count(inputs)):
            loss: Tensor = super().training_step(model, inputs, *further, **named)
        if measured.whole:
            self._moments = measured.finish()
        return loss

    def log(self, logs: dict[str, float], *further: Any, **named: Any) -> None:
        """Adds what the batch was to the training logs, and tells the speed by the examples that there were."""
        if "loss" in logs and self.last_update is not None:
            logs |= {name: value for name, value in self.last_update.log().items() if name != "learning_rate"}
        if "train_samples_per_second" in logs and self.adaptive is not None:
            speed = (self.adaptive.seen - self._seen_before) / logs["train_runtime"]
            logs["train_samples_per_second"] = round(speed, 3)
        super().log(logs, *further, **named)

    def _begin_run(self, state: Any, model: nn.Module) -> None:
        if self._sampler is None or self._counted is None:
            raise InputError("a run must begin with get_train_dataloader and create_scheduler, as Trainer's does")
        self.controller.load_state_dict(self._controller_start)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        self._measured = MeasuredUpdate(
            self.controller,
            model,
            optimizer,
            accumulation=self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
            noise=self._noise,
        )
        self.last_update = None
        self.adaptive = AdaptiveBatch(
            self.controller,
            self._sampler,
            noise=self._measured.noise,
            schedule=self._counted,
            max_micro_batch=self._max_micro_batch,
            **self._lr,
        )
        if state.global_step > 0:
            if _SAVED not in state.stateful_callbacks:
                raise InputError("the checkpoint holds no state of an adaptive batch: it is of another Trainer")
            self.adaptive.load_state_dict(state.stateful_callbacks[_SAVED])
        self._seen_before = self.adaptive.seen
        self._foresee_end(state, self._sampler.batch_size)

    def _end_update(self, state: Any) -> None:
        adaptive, measured = self.adaptive, self._measured
        if adaptive is None or measured is None:
            return
        seconds = None
        if "seconds" in self.controller.needs:
            if self.args.device.type == "cuda":
                torch.cuda.synchronize(self.args.device)
            seconds = time.perf_counter() - self._begun
        self.last_update = adaptive.step(
            batch_test=self._moments,
            seconds=seconds,
            skipped=self.accelerator.optimizer_step_was_skipped,
            examples=measured.examples,
        )
        measured.begin()
        state.epoch = adaptive.seen / adaptive.sampler.n
        state.stateful_callbacks[_SAVED] = adaptive.state_dict()
        self._foresee_end(state, self.last_update.next_size)

    def _foresee_end(self, state: Any, size: int) -> None:
        """Makes the next update the last one where it is: the Trainer then logs, evaluates and saves as at any end."""
        if self.adaptive is not None and self.adaptive.seen + size >= self.examples:
            done = self.adaptive.seen >= self.examples
            state.max_steps = min(state.max_steps, state.global_step + (0 if done else 1))


class _Followed:
    """A schedule as the Trainer may have it: to be read and saved, for it is the batch's to step and to load."""

    def __init__(self, schedule: Counted) -> None:
        self.schedule = schedule
        self.get_last_lr, self.state_dict = schedule.get_last_lr, schedule.state_dict

    def step(self, *_: Any) -> None:
        """Nothing: `AdaptiveBatch.step` counts the examples that the update really had."""

    def load_state_dict(self, state: Any) -> None:
        """Nothing: the state comes with that of the batch."""


class _Steps(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Where a Trainer's run begins, updates and ends."""

    def __init__(self, trainer: AdaptiveBatchTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._trainer._begin_run(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._end_update(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer._measured is not None:
            self._trainer._measured.close()


def _check_arguments(trainer: Any, controller: BatchController, schedule: Any) -> None:
    """Refuses by name what cannot work."""
    args, accelerator = trainer.args, trainer.accelerator
    measures = controller.needs & {"noise_scale", "batch_test"} or trainer._noise is not None
    by_epoch = [name for name in ("eval", "save", "logging") if str(_value(args, f"{name}_strategy")) == "epoch"]
    strategy = getattr(args, "train_sampling_strategy", "random")
    micro, rest = divmod(controller.batch_size, args.gradient_accumulation_steps * args.world_size)
    parallel = getattr(accelerator, "parallelism_config", None)
    split = [n for n in ("tp", "cp", "sp") if parallel is not None and getattr(parallel, f"{n}_size", 1) > 1]
    refused = {
        "train_dataset must be a map-style dataset with a length": not hasattr(trainer.train_dataset, "__len__")
        or isinstance(trainer.train_dataset, IterableDataset),
        f'train_sampling_strategy must be "random", got {strategy!r}': strategy != "random",
        "optimizers must hold no scheduler: give schedule": trainer.lr_scheduler is not None,
        'lr_scheduler_type must be "constant" without schedule, for others count updates, whose number is not known': (
            schedule is None and str(_value(args, "lr_scheduler_type")) != "constant"
        ),
        f'the strategy of {", ".join(by_epoch)} must be "steps" or "no": the loader is one endless epoch': by_epoch,
        "auto_find_batch_size must be False: the controller sets the size, up to max_micro_batch": (
            args.auto_find_batch_size
        ),
        "DeepSpeed fixes the micro-batch in its own configuration: use DDP": trainer.is_deepspeed_enabled,
        "several GPUs in one process share a micro-batch out again: start with torchrun": args.n_gpu > 1,
        f"ranks must each have examples of their own, got {', '.join(split)} parallelism": split,
        "fp16 scales the loss, through which gradients cannot be measured: use bf16=True": args.fp16 and measures,
        "FSDP is not measured here: take a controller that needs no gradients, or DDP": (
            trainer.is_fsdp_enabled and measures
        ),
        f"the controller must start at per_device_train_batch_size {args.per_device_train_batch_size} x "
        f"gradient_accumulation_steps {args.gradient_accumulation_steps} x processes {args.world_size}, got "
        f"{controller.batch_size}": rest or micro != args.per_device_train_batch_size,
    }
    for reason, holds in refused.items():
        if holds:
            raise InputError(f"AdaptiveBatchTrainer: {reason}")


def _value(args: Any, name: str) -> Any:
    found = getattr(args, name)
    return getattr(found, "value", found)
