"""The weight decay by a grid of short runs at the cycle's rate, refined by bisecting the exponent (Smith 2018).

arXiv 1803.09820, section 4.4. One significant figure is enough. The best decay at a constant rate is not the best under
a cycle, so that each run has the whole schedule; it is chosen by the loss on validation data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from batchlab.core.checks import check_count, check_positive, holds, is_count
from batchlab.core.device import pick_device
from batchlab.core.errors import InputError
from batchlab.core.job import Job
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.data.stream import SampleStream
from batchlab.measure.course.learning_rate import set_momentum
from batchlab.measure.course.short_runs import loss_on, spread_evenly, train_on
from batchlab.measure.restore import restored
from batchlab.measure.training_step import TrainingStep

GRID = (1e-3, 1e-4, 1e-5, 0.0)


class DecayTrial(NamedTuple):
    """One short run: its weight decay and the validation loss it ended with, not finite where it diverged."""

    weight_decay: float
    loss: float


class DecayChoice(NamedTuple):
    """weight_decay: of the least loss. trials: in the order of their decays. at_edge: whether it is the largest or, but
    for 0, the least of those that were tried: widen the grid.
    """

    weight_decay: float
    trials: tuple[DecayTrial, ...]
    at_edge: bool


def choose_decay(run: Callable[[float], float], values: Sequence[float] = GRID, *, refine: int = 2) -> DecayChoice:
    """The weight decay of the least loss on a grid, and `refine` times in the middle, by exponent, between the best and
    the better of its neighbours.

    run: trains equally much at a decay and returns the validation loss. values: Smith's; 1e-2, 1e-3, 1e-4 for shallow
    nets, 1e-4, 1e-5, 1e-6, 0 for deep ones and complex data. Beside 0 there is no exponent: half a factor of the grid's
    smallest decay is taken. Of equal losses the larger decay. Raises `InputError` where every run diverged.

    >>> found = choose_decay(lambda decay: abs(math.log10(decay + 1e-9) + 3.3))
    >>> [f"{trial.weight_decay:.1e}" for trial in found.trials], f"{found.weight_decay:.1e}"
    (['0.0e+00', '1.0e-05', '1.0e-04', '3.2e-04', '5.6e-04', '1.0e-03'], '5.6e-04')
    """
    check_count(0, refine=refine)
    grid = list(values)
    if not grid or not all(holds(lambda value: 0 <= value < math.inf, value) for value in grid):
        raise InputError(f"values must be weight decays, finite and >= 0, got {grid!r:.80}")
    losses = {decay: run(decay) for decay in map(float, grid)}
    for _ in range(refine):
        between = _between(losses)
        if between is None:
            break
        losses[between] = run(between)
    finite = {decay: loss for decay, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise InputError(f"the loss is not finite at any weight decay that was tried: {sorted(losses)}")
    best = min(finite, key=lambda decay: (finite[decay], -decay))
    least = min((decay for decay in losses if decay > 0), default=0.0)
    at_edge = best == max(losses) or (best == least and 0.0 not in losses)
    trials = tuple(DecayTrial(decay, loss) for decay, loss in sorted(losses.items()))
    return DecayChoice(best, trials, at_edge)


def _between(losses: Mapping[float, float]) -> float | None:
    """The next decay to try; None where the best has no neighbour, or none that a factor parts it from."""
    tried = sorted(losses)
    known = {decay: loss if math.isfinite(loss) else math.inf for decay, loss in losses.items()}
    best = min(tried, key=lambda decay: (known[decay], -decay))
    at = tried.index(best)
    near = [tried[place] for place in (at - 1, at + 1) if 0 <= place < len(tried)]
    if not near:
        return None
    low, high = sorted((best, min(near, key=lambda decay: (known[decay], -decay))))
    if low > 0:
        return math.sqrt(low * high)
    factors = [b / a for a, b in pairwise(tried) if a > 0]
    return high / math.sqrt(max(factors, default=10.0))


def weight_decay_grid(
    job: Job,
    *,
    learning_rate: float,
    batch_size: int = 64,
    steps: int = 200,
    values: Sequence[float] = GRID,
    refine: int = 2,
    schedule: str = "one_cycle",
    schedule_settings: Mapping[str, Any] | None = None,
    shared: int = 0,
    validation: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> DecayChoice:
    """`choose_decay` of a job at its peak rate and batch size, each run on the same weights and batches.

    learning_rate: the schedule's peak, as a range test gives it. steps: updates of a run, laid over the whole schedule.
    schedule, schedule_settings: as a plan has them (`schedule.rates.by_examples`). shared: updates at first that all
    runs have in common, at the middle of the values: Smith's cheaper grid, from a snapshot at the plateau.
    validation: so many examples, spread evenly over the validation data, are what is read; all where it is None.

    Biases and norms have no decay, as in `optim.groups`. The result holds for this rate, batch and length: small data
    and shallow nets like more, long runs and large rates less, and a larger batch by itself regularises less. On a
    fresh model in this process; the caller's generators are kept.
    """
    from batchlab.schedule.rates.by_examples import lr_factor, momentum_at

    check_positive(learning_rate=learning_rate)
    check_count(steps=steps)
    if not (is_count(shared, 0) and shared < steps):
        raise InputError(f"shared must lie in 0..{steps - 1}, below the steps, got {shared!r}")
    if not (is_count(batch_size) and batch_size <= len(job.train)):
        raise InputError(f"batch_size must lie in 1..{len(job.train)}, the training examples, got {batch_size!r}")
    read = len(job.valid) if validation is None else validation
    if not (is_count(read) and read <= len(job.valid)):
        raise InputError(f"validation must lie in 1..{len(job.valid)}, the validation examples, got {validation!r}")
    where, fixed = pick_device(device), spread_evenly(len(job.valid), read)
    course: dict[str, Any] = {"total_examples": steps, "schedule": schedule, "settings": schedule_settings}
    with preserved_generators():
        step = TrainingStep(job, device=where, seed=seed)
        step.reset_optimizer(weight_decay=1.0)
        cycled = momentum_at(0, **course) is not None
        if cycled and not all({"betas", "momentum"} & group.keys() for group in step.optimizer.param_groups):
            raise InputError(
                f"the schedule {schedule!r} cycles a momentum, which {job.optimizer} has not: give schedule_settings="
                '{"momentum": None}, or schedule="constant"'
            )
        decayed = [group for group in step.optimizer.param_groups if group["weight_decay"]]
        stream = SampleStream(len(job.train), derive_seed(seed, "stream"))

        def train(decay: float, first: int, last: int) -> bool:
            for group in decayed:
                group["weight_decay"] = decay
            for done in range(first, last):
                reseed(derive_seed(seed, "update", done * batch_size))
                for group in step.optimizer.param_groups:
                    group["lr"] = learning_rate * lr_factor(done, **course)
                if (momentum := momentum_at(done, **course)) is not None:
                    set_momentum(step.optimizer, momentum)
                indices = stream.indices(done * batch_size, batch_size).tolist()
                if not math.isfinite(train_on(step, indices)):
                    return False
            return True

        def run(decay: float) -> float:
            with restored(step.model, step.optimizer):
                trained = train(decay, shared, steps)
                return loss_on(job, step.model, fixed, batch_size, where) if trained else math.inf

        if shared and not train(sorted(map(float, values))[len(values) // 2], 0, shared):
            raise InputError(f"the loss is not finite within the {shared} shared updates: lower learning_rate")
        return choose_decay(run, values, refine=refine)
