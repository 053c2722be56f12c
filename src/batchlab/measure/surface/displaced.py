"""A model moved to other weights and given back bit for bit, and its mean loss where it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.modes import evaluating
from batchlab.core.random import derive_seed, preserved_generators, reseed
from batchlab.data.fetch import to_device
from batchlab.measure.batch_rows import check_batches, row_count
from batchlab.measure.norms import to_floats
from batchlab.measure.surface.directions import Direction, bare, check_whole, wide

Loss = Callable[[nn.Module, Any], Tensor]


class Weights:
    """The model's parameters and buffers by name, each once, and copies of them as they were.

    They are written through `.data`, which autograd does not see: a graph that the caller still holds stays valid,
    as all values are back before it is used.
    """

    def __init__(self, model: nn.Module) -> None:
        inside = bare(model)
        own = [*inside.named_parameters(), *inside.named_buffers()]
        self.tensors = {name: tensor.data for name, tensor in own}
        self.origin = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def move(self, steps: Sequence[float], directions: Sequence[Direction]) -> None:
        """To θ + Σ a_k·d_k, in float32 at least; a step of 0 along all is θ itself, bit for bit."""
        names = list(dict.fromkeys(name for d in directions for name in d))
        goal = {name: self.origin[name] for name in names}
        if any(steps):
            goal = {name: start.to(wide(start.dtype), copy=True) for name, start in goal.items()}
            for step, d in zip(steps, directions, strict=True):
                if step and d:
                    torch._foreach_add_([goal[name] for name in d], list(d.values()), alpha=step)
        if names:
            torch._foreach_copy_([self.tensors[name] for name in names], list(goal.values()))

    def put_back(self) -> None:
        """All parameters and buffers as they were."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self.origin[name])


@contextlib.contextmanager
def displaceable(model: nn.Module) -> Iterator[Weights]:
    """The model in evaluation mode, to be moved about; after it weights, buffers, modes and generators are as before.

    It holds one copy of the weights meanwhile, and another one while it moves them.
    """
    check_whole(model)
    weights = Weights(model)
    with preserved_generators(), evaluating(model):
        try:
            yield weights
        finally:
            weights.put_back()


class MeanLoss:
    """L(θ) = Σ n_i·L_i / Σ n_i over batches of n_i examples, where L_i is the mean loss of batch i.

    loss: `(model, batch) ->` scalar mean over the batch's examples. data: batches that can be gone through many times,
    the same ones each time. count: the examples of a batch, or whatever `loss` is the mean over; by default its
    tensors' first dimension. A batch of none counts nothing. seed: a loss that draws random numbers gets the same
    ones at every pass. Sums are in float64 in the order of the batches.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, data: Iterable[Any], count: Callable[[Any], int] | None, seed: int
    ) -> None:
        check_data(data)
        check_whole(model)
        self.model = bare(model) if _has_ddp(model) else model  # DDP's forward may wait for other ranks
        self.loss, self.data, self.seed = loss, data, seed
        self.count = row_count if count is None else count
        self.device = next(model.parameters()).device
        self.examples = 0
        self._draws = _generators(data)
        self._drawn = [generator.get_state() for generator in self._draws]

    def batches(self) -> Generator[tuple[Any, int], None, None]:
        """Each batch on the model's device, with its count; the generators of a data loader start anew."""
        reseed(derive_seed(self.seed, "loss"))
        for generator, state in zip(self._draws, self._drawn, strict=True):
            generator.set_state(state)
        examples = 0
        try:
            for batch in self.data:
                n = int(self.count(batch))
                if n < 0:
                    raise InputError(f"count must return the examples of a batch, at least 0, got {n}")
                if n:
                    examples += n
                    yield to_device(batch, self.device), n
        finally:
            for generator, state in zip(self._draws, self._drawn, strict=True):
                generator.set_state(state)
        if not examples and not self.examples:
            raise InputError("data must hold at least one batch with at least one example, got none")
        if self.examples not in (0, examples):
            raise InputError(
                f"data must hold the same examples at every pass, got {examples} after {self.examples}: a list of "
                "batches or a loader, not an iterator"
            )
        self.examples = examples

    @torch.no_grad()
    def __call__(self) -> float:
        """The mean loss at the weights that the model has now; infinite where that of any batch is not finite."""
        losses, counts = [], []
        with contextlib.closing(self.batches()) as batches:
            for batch, n in batches:
                losses.append(scalar(self.loss(self.model, batch)).detach())
                counts.append(n)
        values = to_floats(losses)
        if not all(map(math.isfinite, values)):
            return math.inf
        total = 0.0
        for value, n in zip(values, counts, strict=True):
            total += value * n
        mean = total / self.examples
        return mean if math.isfinite(mean) else math.inf


def scalar(value: Any) -> Tensor:
    """The loss itself, if it is a scalar tensor."""
    if not isinstance(value, Tensor) or value.ndim:
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss must return a scalar tensor, the mean over the batch's examples, got {shown}")
    return value


def check_data(data: Any) -> None:
    """Refuses what is no collection of batches, or can be gone through once only."""
    check_batches(data)
    if isinstance(data, Iterator):
        raise InputError(
            f"data must be there at every pass, as a list of batches or a DataLoader is, got a {type(data).__name__} "
            "that ends after one: give list(data)"
        )


def _has_ddp(model: nn.Module) -> bool:
    return any(isinstance(part, nn.parallel.DistributedDataParallel) for part in model.modules())


def _generators(data: Any) -> list[torch.Generator]:
    """Those from which a data loader draws its order."""
    holders = [data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
