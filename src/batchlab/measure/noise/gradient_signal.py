"""The gradient signal-to-noise ratio in any training loop, from the groups that each batch is worked through in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.checks import check_count
from batchlab.core.errors import InputError
from batchlab.measure.noise.signal_to_noise import (
    FEWEST_GROUPS,
    Gsnr,
    LayerGsnr,
    Moments,
    Sums,
    layer_of,
    quantiles_of,
    summed,
)
from batchlab.parallel.shards import is_spread


class GradientSignal:
    """Measures the gradient signal-to-noise ratio of a model in any training loop, from the groups of each batch.

        signal = GradientSignal(model)
        for group in batch:
            with signal.group(len(group)):
                (loss_mean(group) * len(group) / len(batch)).backward()
        found = signal.step()                        # before optimizer.step() or after
        signal.close()

    model: its parameters that require a gradient when this is made are watched, a shared one once. process_group: the
    ranks whose groups count too, the default group where one is initialised; all must call `step` alike.

    Each group's loss must be weighted by its share of the batch, or all groups be of one size: a common factor (a
    loss scale, a number of ranks) cancels. A parameter that a group gives no gradient counts as 0 there. Two float32
    tensors as large as the parameters are held, and no gradient: `gsnr` takes stacked ones. Recommended are 8 groups
    or more; two are the least. Under DDP the hooks see each rank's own gradient, before it is averaged.

    A diagnostic. Not for parameters sharded over ranks, and not with batch normalisation, which makes the examples of
    a group depend on each other. Differences below 1e-19 vanish when squared in float32: use float64 there.
    """

    def __init__(self, model: nn.Module, *, process_group: dist.ProcessGroup | None = None) -> None:
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
        if not self._named:
            raise InputError("the model has no parameter that requires a gradient")
        if any(p.is_complex() for _, p in self._named):
            raise InputError("the ratio of complex parameters is not defined here: view them as real ones")
        if any(is_spread(p) for _, p in self._named):
            raise InputError("parameters sharded over ranks are not supported: no rank sees a group's whole gradient")
        self._process_group = process_group
        self._examples: int | None = None
        self.ratios: dict[str, Tensor] = {}
        self._forget()
        self._hooks = [p.register_hook(self._hook(i)) for i, (_, p) in enumerate(self._named)]  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self._moments: list[Moments | None] = [None] * len(self._named)
        self._sizes: list[int] = []
        self._seen: set[int] = set()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            if self._examples is None:
                return
            if index in self._seen:
                name = self._named[index][0]
                raise InputError(f"{name} got two gradients in one group: give each backward pass a group of its own")
            self._seen.add(index)
            self._of(index).add(gradient, self._examples, 1 / self._examples)

        return see

    def _of(self, index: int) -> Moments:
        moments = self._moments[index]
        if moments is None:
            moments = self._moments[index] = Moments.like(self._named[index][1].detach())
            for size in self._sizes:
                moments.skip(size)
        return moments

    @contextlib.contextmanager
    def group(self, examples: int) -> Iterator[None]:
        """Around the backward pass of one group; if it raises, the groups of this step so far are forgotten."""
        check_count(examples=examples)
        if self._examples is not None:
            raise InputError("group must not be entered twice at once")
        self._examples, self._seen = examples, set()
        try:
            yield
            for index, moments in enumerate(self._moments):
                if moments is not None and index not in self._seen:
                    moments.skip(examples)
            self._sizes.append(examples)
        except BaseException:
            self._forget()
            raise
        finally:
            self._examples = None

    @torch.no_grad()
    def step(self, *, keep: bool = False) -> Gsnr:
        """The ratios of the groups since the last step, which are then forgotten.

        keep: leaves each parameter's r, coordinate by coordinate, in `ratios`, by name.
        """
        groups, examples = self._counted()
        if groups < FEWEST_GROUPS:
            self._forget()
            raise InputError(f"a step needs at least two groups, got {groups}")
        found: list[LayerGsnr] = []
        sums: list[Sums] = []
        self.ratios = {}
        for index, (name, _) in enumerate(self._named):
            moments = self._of(index)
            if self._ranks > 1:
                moments.over_ranks(examples, self._process_group)
            r = moments.ratio()
            sums.append(summed(r, moments))
            found.append(layer_of(name, sums[-1], groups, quantiles_of(r)))
            if keep:
                self.ratios[name] = r
            self._moments[index] = None
        self._forget()
        pooled = Sums(*(sum(column) for column in zip(*sums, strict=True)))
        return Gsnr(tuple(found), layer_of("", pooled, groups, ()), groups, examples / groups)

    @property
    def _ranks(self) -> int:
        return dist.get_world_size(self._process_group) if dist.is_initialized() else 1

    def _counted(self) -> tuple[int, int]:
        """Groups and examples over all ranks."""
        counts = torch.tensor([len(self._sizes), sum(self._sizes)], device=self._named[0][1].device)
        if self._ranks > 1:
            dist.all_reduce(counts, group=self._process_group)
        groups, examples = counts.tolist()
        return int(groups), int(examples)

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
