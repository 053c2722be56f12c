"""One model in training, in memory: the exact batch gradient, its noise, the update, the average, the evaluation.

`train` adds files, signals and targets; `probe` and `sweep` use it bare.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.core.job import Job
from batchlab.core.model import least_examples, make_model
from batchlab.core.modes import evaluating
from batchlab.core.plan import Plan
from batchlab.core.random import derive_seed, reseed
from batchlab.data.fetch import fetch, to_device
from batchlab.data.stream import SampleStream
from batchlab.measure.course.learning_rate import set_momentum
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.optim.average import WeightAverage
from batchlab.optim.by_name import create, group_as_saved
from batchlab.optim.watch import watched_step
from batchlab.rules.learning_rate import rescale
from batchlab.schedule.batches.controller import StepFacts
from batchlab.schedule.rates.by_examples import lr_factor, momentum_at
from batchlab.spine.batch_control import make_controller
from batchlab.spine.batch_gradient import BatchGradient
from batchlab.spine.evaluate import evaluate, scalar


@dataclass(frozen=True)
class Update:
    """What one update did. step: updates so far, this one included. position: examples seen so far.

    loss: mean over the batch's units before the update. grad_norm: of the batch gradient, before clipping.
    noise: the running noise scale, in examples. skipped: nothing was changed, for the loss or gradient was not finite.
    tensors: what the step did to each tensor, where it was watched (`optim.watch`). capped: a larger batch was wanted
    than the plan's `max_batch_size`, or the data set, allows.
    """

    step: int
    position: int
    batch_size: int
    learning_rate: float
    loss: float
    grad_norm: float
    noise: Estimate | None
    skipped: bool
    seconds: float
    tensors: dict[str, dict[str, float]] | None = None
    capped: bool = False


class Learner:
    """Everything that training changes, and the one way to change it.

    job, plan: what and how. seed: of the weights, of the sample stream and of every update's randomness.
    device: where; the first GPU if there is one. Under an initialised default process group every rank makes
    one Learner, and a batch is spread over the ranks in contiguous shares that differ by at most one example.

    preconditioned: whether the noise is measured in the geometry of an Adam-like optimizer; by default only where an
    adaptive batch follows it, for it costs some passes over the parameters.

    The global generators are set at each update from (seed, step, rank): nothing random outlives an update.
    """

    def __init__(
        self,
        job: Job,
        plan: Plan,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        preconditioned: bool | None = None,
    ) -> None:
        self.job, self.plan, self.seed = job, plan, seed
        self.device = pick_device(device)
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.stream = SampleStream(len(job.train), derive_seed(seed, "stream"))
        reseed(derive_seed(seed, "weights"))
        self.model = make_model(job).to(self.device).train()
        self.optimizer = self._made()
        averages = {"half_life": plan.ema_half_life, "power": plan.average_power}
        self.average = WeightAverage(self.model, **averages) if any(v is not None for v in averages.values()) else None
        self.controller = make_controller(plan, len(job.train), self.world)
        needs = self.controller.needs if self.controller is not None else frozenset[str]()
        in_geometry = "noise_scale" in needs if preconditioned is None else preconditioned
        self._times = "seconds" in needs
        self.gradient = BatchGradient(
            job, plan, self.model, self.optimizer, self.stream, device=self.device, in_geometry=in_geometry, needs=needs
        )
        self.step, self.position, self.batch_size = 0, 0, plan.batch_size
        self.skipped_in_a_row = 0
        self._last_noise: Estimate | None = None
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._has_buffers = any(True for _ in self.model.buffers())
        self._set_learning_rate(plan.batch_size)  # refuses a schedule's bad settings while nothing is written yet

    def _made(self) -> torch.optim.Optimizer:
        settings: dict[str, Any] = dict(self.plan.hyperparameters)
        if self.plan.optimizer == "mkor" and self.world > 1:
            settings["process_group"] = dist.group.WORLD
        return create(self.plan.optimizer, self.model, lr=self.plan.learning_rate, **settings)

    def update(self, batch_size: int | None = None, *, watch: bool = False) -> Update:
        """One update with the next `batch_size` examples of the stream (the learner's own size if None).

        watch: notes what it does to each tensor.

        The gradient is the exact mean over all units of the batch, whatever the micro-batches and ranks.
        """
        started = time.perf_counter()
        size = self.batch_size if batch_size is None else batch_size
        if size < self.world:
            raise InputError(f"batch_size {size} is smaller than the {self.world} ranks: each needs an example")
        reseed(derive_seed(self.seed, "update", self.step, self.rank))
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self._has_buffers else []
        due = self.controller is None or self.controller.due
        capped = self.controller is not None and self.controller.capped
        loss, norm, moments = self.gradient.backward(self.position, size, test=due)
        self.step += 1
        self.position += size
        learning_rate = self._set_learning_rate(size)
        finite = math.isfinite(loss) and math.isfinite(norm)
        tensors = None
        if finite:
            tensors = self._apply(norm, size, watch=watch)
        else:
            self._undo(buffers)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        if self._times:
            self.wait()
        seconds = time.perf_counter() - started
        noise = self._last_noise if self.noise is not None else None
        if self.controller is not None:
            told = StepFacts(self.position, size, loss, noise, moments, seconds, skipped=not finite)
            self.batch_size = self.controller.next_batch(self.step, told.agreed() if self._times else told)
        done = (self.step, self.position, size, learning_rate, loss, norm, noise, not finite, seconds, tensors)
        return Update(*done, capped)

    @property
    def nearly_done(self) -> bool:
        """Whether the next update is the last."""
        return self.position + self.batch_size >= self.plan.examples

    def _set_learning_rate(self, size: int) -> float:
        plan = self.plan
        named: dict[str, Any] = {"schedule": plan.schedule, "settings": plan.schedule_settings}
        factor = lr_factor(self.position, total_examples=plan.examples, warmup_examples=plan.warmup_examples, **named)
        momentum = momentum_at(self.position, total_examples=plan.examples, **named)
        if momentum is not None:
            set_momentum(self.optimizer, momentum)
        peak = plan.learning_rate
        if size != plan.batch_size:
            noise_scale = plan.noise_scale.value if plan.noise_scale else None
            peak = rescale(peak, plan.batch_size, size, rule=plan.learning_rate_rule, noise_scale=noise_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = peak * factor
        return peak * factor

    def _apply(self, norm: float, size: int, *, watch: bool) -> dict[str, dict[str, float]] | None:
        if self.noise is not None:
            self._last_noise = self.noise.step(grad_sq_norm=norm**2)
        if self.plan.clip_norm is not None and norm > self.plan.clip_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self.plan.clip_norm, torch.tensor(norm))
        tensors = None
        if watch:
            named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            tensors = watched_step(self.optimizer.step, self.optimizer, named)
        else:
            self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, size)
        return tensors

    def _undo(self, buffers: list[Tensor]) -> None:
        """Puts back what a forward pass changed, and forgets the pieces it measured."""
        if self.noise is not None:
            self.noise.skip()
        for buffer, before in zip(self.model.buffers() if buffers else (), buffers, strict=True):
            buffer.copy_(before)

    @property
    def noise(self) -> GradientNoise | None:
        """What measures the noise scale, where the plan says so."""
        return self.gradient.noise

    @property
    def evaluated(self) -> nn.Module:
        """The module that evaluation sees: the average where there is one, else the model itself."""
        return self.model if self.average is None or self.average.empty else self.average.module

    def wait(self) -> None:
        """Until all that was asked of the device is done: an update's last kernels may still run when it returns."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def first_loss(self) -> float:
        """The loss on this rank's first micro-batch, in evaluation mode; changes nothing."""
        piece = self.gradient.pieces(self.position, max(self.batch_size, self.world))[0]
        reseed(derive_seed(self.seed, "first loss"))
        with evaluating(self.model), torch.no_grad():
            batch = to_device(fetch(self.job.train, piece, self.job.collate), self.device)
            return float(scalar(self.job.loss(self.model, batch)))

    def lacks_variance(self) -> bool:
        """Whether a pass of the first update has one example, and batch normalisation one value a channel of it."""
        piece = min(self.gradient.pieces(self.position, max(self.batch_size, self.world)), key=len)
        if len(piece) > 1 or least_examples(self.model) == 1:
            return False
        batch = to_device(fetch(self.job.train, piece, self.job.collate), self.device)
        try:
            with torch.no_grad():
                self.job.loss(copy.deepcopy(self.model), batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            return True
        return False

    def evaluate(self) -> dict[str, float]:
        """Means over the units of the validation data: "loss" and the job's metrics, the same on every rank."""
        reseed(derive_seed(self.seed, "evaluation", self.step, self.rank))
        size, precision = self.plan.evaluation_batch or self.plan.micro_batch, self.plan.precision
        return evaluate(self.job, self.evaluated, batch_size=size, device=self.device, precision=precision)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, as nested dicts of tensors and plain values."""
        return {
            "step": self.step,
            "position": self.position,
            "batch_size": self.batch_size,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "noise": None if self.noise is None else self.noise.state_dict(),
            "last_noise": None if self._last_noise is None else self._last_noise.to_json(),
            "controller": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, on any number of ranks and with any micro-batch."""
        if state["seed"] != self.seed:
            raise InputError(f"seed must be {state['seed']}, with which the state was made, got {self.seed}")
        self.step, self.position = state["step"], state["position"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.batch_size = self.plan.batch_size if self.controller is None else state["batch_size"]
        self.model.load_state_dict(state["model"])
        group_as_saved(self.optimizer, state["optimizer"]["param_groups"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        if self.noise is not None and state["noise"] is not None:
            self.noise.load_state_dict(state["noise"])
            self._last_noise = Estimate.from_json(state["last_noise"]) if state["last_noise"] else None
        if self.controller is not None and state["controller"] is not None:
            self.controller.load_state_dict(state["controller"])
            self.batch_size = self.controller.batch_size

    def close(self) -> None:
        """Takes the hooks off the model."""
        if self.noise is not None:
            self.noise.close()
