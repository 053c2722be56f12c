"""The gradient noise scale B_simple = tr(Σ)/|G|², with an interval, in any training loop (McCandlish et al. 2018, A.1).

The mean gradient g_n of n independent examples has E|g_n|² = |G|² + tr(Σ)/n. A step that works through its batch in
pieces knows |g_n|² at two sizes: of each piece, and of the whole batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.ratio import RatioOfMeans


class NoisePair(NamedTuple):
    """grad_sq estimates |G|² and trace estimates tr(Σ), both without bias: either can come out negative."""

    grad_sq: float
    trace: float


def unbiased_pair(small_sq_norm: float, big_sq_norm: float, small: float, big: float) -> NoisePair:
    """Solves E|g_n|² = |G|² + tr(Σ)/n for n = small and n = big.

    small_sq_norm: mean of the pieces' |g|². big_sq_norm: |g|² of their mean gradient. small, big: examples in them;
    for ragged pieces n_i, small is their harmonic mean, 1/mean(1/n_i), which keeps both parts unbiased.

    >>> unbiased_pair(3.0, 1.5, 4, 16)
    NoisePair(grad_sq=1.0, trace=8.0)
    """
    if not 1 <= small < big:
        raise InputError(f"the two sizes must satisfy 1 <= small < big, got small={small!r}, big={big!r}")
    trace = (small_sq_norm - big_sq_norm) / (1 / small - 1 / big)
    return NoisePair(big_sq_norm - trace / big, trace)


def noise_scale(grad_sq: float, trace: float) -> float:
    """tr(Σ)/|G|², in examples; NaN where |G|² is not positive. Average both parts first: a mean of ratios is biased."""
    return trace / grad_sq if grad_sq > 0 else math.nan


class GradientNoise:
    """Measures the noise scale of a model in any training loop, from the pieces of each batch.

        noise = GradientNoise(model)
        for piece in batch:                          # micro-batches, of any sizes
            with noise.micro_batch(len(piece)):
                (loss_mean(piece) * len(piece) / len(batch)).backward()
        estimate = noise.step()                      # before clipping and before optimizer.step()
        noise.close()

    model: its parameters that require a gradient are watched, a shared one once. method: "micro_batch", or "ranks",
    which is the same with one piece a rank. ema: weight kept at each step, in [0, 1); the default 0.98 remembers about
    50 steps (the field uses 0.99 to 0.9998); None keeps all steps alike. coverage: of the interval.

    What `.grad` must hold at `step`: the exact mean over all examples of the batch, each piece's mean loss weighted
    by its share (and, under DDP, which averages over ranks, by the number of ranks); no loss scale, no clipping, no
    decay in it. A loss divided by the number of equal pieces is that. Then a piece's own |g|² follows from the
    gradient that it adds, seen by a hook before it is added: no copy of any gradient is kept, and no bit changed.

    Under an initialised process group the pieces of all ranks count. One piece in all gives an undefined estimate:
    there is nothing to compare. A step that is not finite is skipped on all ranks and counted in `skipped`.
    `pair` holds the last step's own two parts, None where it gave none.

    An example is whatever is drawn independently: for language models a sequence. With batch normalisation the
    pieces' gradients depend on each other, and the estimate with them.
    """

    def __init__(
        self, model: nn.Module, method: str = "micro_batch", *, ema: float | None = 0.98, coverage: float = 0.95
    ) -> None:
        if method not in ("micro_batch", "ranks"):
            raise InputError(f'method must be "micro_batch" or "ranks", got {method!r}')
        self.statistics = RatioOfMeans(ema=ema, coverage=coverage)
        self.method, self.skipped = method, 0
        self.pair: NoisePair | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("the model has no parameter that requires a gradient")
        self._hooks = [p.register_hook(self._see) for p in self._parameters]  # type: ignore[no-untyped-call]
        self._seen: list[Tensor] | None = None
        self._pieces: list[tuple[int, list[Tensor]]] = []

    @contextlib.contextmanager
    def micro_batch(self, examples: int) -> Iterator[None]:
        """Around the backward pass of one piece of `examples` examples."""
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise InputError(f"examples must be an integer of at least 1, got {examples!r}")
        if self._seen is not None:
            raise InputError("micro_batch must not be entered twice at once")
        self._seen = []
        try:
            yield
            self._pieces.append((examples, self._seen))
        finally:
            self._seen = None

    def _see(self, gradient: Tensor) -> None:
        if self._seen is not None:
            self._seen.append(sq_norm(gradient))

    def step(self, grad_sq_norm: float | Tensor | None = None) -> Estimate:
        """The noise scale in examples, after the last piece's backward pass, before clipping and the optimizer.

        grad_sq_norm: |g|² of the whole batch's mean gradient if the caller knows it, so that no pass is spent on it.
        """
        pieces, self._pieces, self.pair = self._pieces, [], None
        if not pieces:
            raise InputError("step needs at least one micro_batch before it")
        if grad_sq_norm is None:
            grad_sq_norm = self._batch_sq_norm()
        big_sq = float(grad_sq_norm)
        shares, inverse, count, examples = self._over_ranks(pieces)
        if count < 2:
            return self._undefined("undefined: one piece a step has nothing to be compared with")
        if not (math.isfinite(shares) and math.isfinite(big_sq)):
            self.skipped += 1
            return self.estimate()
        self.pair = unbiased_pair(shares * examples**2 / count, big_sq, count / inverse, examples)
        self.statistics.update(self.pair.trace, self.pair.grad_sq)
        return self.estimate()

    def _over_ranks(self, pieces: list[tuple[int, list[Tensor]]]) -> tuple[float, float, int, int]:
        """Σ|wᵢgᵢ|²/nᵢ² with wᵢ = nᵢ/N, Σ1/nᵢ, the pieces and N, over all ranks."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        squares = torch.stack([torch.stack(norms).sum() if norms else torch.zeros(()) for _, norms in pieces])
        sizes = torch.tensor([size for size, _ in pieces], dtype=torch.float64)
        scaled = squares.double().cpu() / (sizes * world) ** 2
        sums = torch.stack([scaled.sum(), (1 / sizes).sum(), torch.tensor(float(len(pieces))).double(), sizes.sum()])
        if world > 1:
            device = self._parameters[0].device
            sums = sums.to(device)
            dist.all_reduce(sums)
        shares, inverse, count, examples = sums.tolist()
        return shares, inverse, round(count), round(examples)

    def _batch_sq_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            raise InputError("no parameter has a gradient: call step after backward and before zero_grad")
        return torch.stack([sq_norm(gradient) for gradient in gradients]).double().sum()

    def skip(self) -> None:
        """Forgets the pieces of a step that the caller will not apply, and counts it."""
        self._pieces = []
        self.skipped += 1

    def estimate(self) -> Estimate:
        """The noise scale from all steps so far."""
        estimate = self.statistics.ratio(lowest=0.0)
        method = f"tr(Σ)/|G|² from {self.method.replace('_', '-')} norms, {estimate.method}"
        return Estimate(estimate.value, estimate.low, estimate.high, method, estimate.coverage)

    def _undefined(self, reason: str) -> Estimate:
        return Estimate(math.nan, 0.0, math.inf, reason, self.statistics.coverage)

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the count of skipped steps, as plain numbers."""
        return {"statistics": self.statistics.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.statistics.load_state_dict(state["statistics"])
        self.skipped = state["skipped"]


def sq_norm(gradient: Tensor) -> Tensor:
    """|g|² in the gradient's own precision, float32 at least."""
    flat = gradient.detach().reshape(-1)
    if flat.dtype in (torch.float32, torch.float64):
        return torch.dot(flat, flat)
    norm: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float32)
    return norm.square()
