"""The gradient noise scale B_simple = tr(Σ)/|G|², with an interval, in any training loop (McCandlish et al. 2018, A.1).

The mean gradient g_n of n independent examples has E|g_n|² = |G|² + tr(Σ)/n. A step that works through its batch in
pieces knows |g_n|² at two sizes: of each piece, and of the whole batch.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.norms import sq_norm as sq_norm
from batchlab.measure.norms import to_floats, total
from batchlab.measure.pieces import Piece, PieceNorms
from batchlab.measure.preconditioner import Preconditioner
from batchlab.measure.ratio import RatioOfMeans
from batchlab.measure.shards import Mesh, over_meshes, share, whole

METHODS = ("micro_batch", "ranks")
WEIGHTINGS = ("none", "preconditioned")


class NoisePair(NamedTuple):
    """grad_sq estimates |G|² and trace estimates tr(Σ), both without bias: either can come out negative."""

    grad_sq: float
    trace: float


def unbiased_pair(small_sq_norm: float, big_sq_norm: float, small: float, big: float) -> NoisePair:
    """Solves E|g_n|² = |G|² + tr(Σ)/n for n = small and n = big.

    small_sq_norm: mean of the pieces' |g|². big_sq_norm: |g|² of their mean gradient. small, big: examples in them.
    For ragged pieces n_1..n_k of N examples both parts stay unbiased with the plain mean of |g_i|² and
    small = 1/mean(1/n_i), or with the mean weighted by n_i/N and small = N/k. The second is the analysis of variance:
    its tr(Σ) = Σ n_i|g_i - g|²/(k-1) is never negative, depends on no piece's size alone, and varies less.

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

    model: its parameters that require a gradient when this is made are watched, a shared one once. method:
    "micro_batch": each micro-batch of each rank is a piece; "ranks": each rank's gradient over all its micro-batches
    is one (with a micro-batch a rank the two are the same); with `fully_shard`, where the gradients must not be averaged
    before the last one. ema: weight kept at each step, in [0, 1); the default 0.98
    remembers about 50 steps (the field uses 0.99 to 0.9998); None keeps all steps alike. coverage: of the interval.
    process_group: the ranks over which `.grad` is averaged; the default group where one is initialised. Where a model is
    also split over tensor-parallel ranks, it must be given.
    weighting: "none" for B_simple, which weighs all coordinates alike as SGD does; "preconditioned" for
    tr(P⁻¹Σ)/(GᵀP⁻¹G) in the geometry of the Adam-like `optimizer` (see `Preconditioner`), from its second update on.
    every: measures one step in so many, the first among them; the others run without hooks and cost nothing. Where a
    step takes milliseconds, a measured one costs a tenth of it; from some 50 ms on, under 3 %.

    What `.grad` must hold at `step`: the exact mean over all examples of the batch, each piece's mean loss weighted
    by its share (and, under DDP, which averages over ranks, by the number of ranks); no clipping and no decay in it. A
    loss divided by the number of equal pieces is that. Then a piece's own |g|² follows from the gradient that it
    adds, seen by a hook before it is added: no copy of any gradient is kept, and no bit changed. A common factor on
    all pieces that `.grad` no longer has at `step` (a loss scale, a division after the backward passes) is found from
    one small parameter's gradient and taken out; where the pieces are no multiple of `.grad` at all, `step` refuses.
    That check needs `.grad` as the norm has it, so it is left out where the caller gives the norm.

    The pieces of all ranks count. One piece in all tells nothing: there is nothing to compare it with. A step that is
    not finite is skipped on all ranks and counted in `skipped`. `pair` holds the last step's own two parts, None where
    it gave none.

    An example is whatever is drawn independently: for language models a sequence. With batch normalisation the
    pieces' gradients depend on each other, and the estimate with them. A loss scale is taken out by `scaler.unscale_`
    before `step`: left in, steps of a larger scale would weigh more.

    Parameters may be spread over ranks (`fully_shard`, tensor parallel, both): norms are of whole tensors, and the number
    is that of one process. Attach after sharding; the modules that hold such parameters must be called as modules.
    Preconditioned, each piece gathers the weights of one parameter at a time, which costs as much as a forward pass's
    gathering: measure one step in many.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "micro_batch",
        *,
        ema: float | None = 0.98,
        coverage: float = 0.95,
        process_group: dist.ProcessGroup | None = None,
        weighting: str = "none",
        optimizer: torch.optim.Optimizer | None = None,
        every: int = 1,
    ) -> None:
        if method not in METHODS:
            raise InputError(f'method must be "micro_batch" or "ranks", got {method!r}')
        if weighting not in WEIGHTINGS or (weighting == "preconditioned") != (optimizer is not None):
            raise InputError(f'weighting must be "none", or "preconditioned" with an optimizer, got {weighting!r}')
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every must be an integer of at least 1, got {every!r}")
        self.statistics = RatioOfMeans(ema=ema, coverage=coverage)
        self.method, self.skipped = method, 0
        self._every, self._turn = every, 0
        self._latest: Estimate | None = None
        self.pair: NoisePair | None = None
        self._group = process_group
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("the model has no parameter that requires a gradient")
        if any(p.is_complex() for p in self._parameters):
            raise InputError("the noise of complex parameters is not defined here: view them as real ones")
        self._weights = None if optimizer is None else Preconditioner(optimizer, self._parameters)
        self._norms = PieceNorms(self._parameters, merged=method == "ranks", weights=self._weights, model=model)

    def micro_batch(self, examples: int) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of one piece of `examples` examples; the forward pass may be inside too."""
        if self._turn:
            return contextlib.nullcontext()
        if self._weights is not None and self._norms.empty:
            self._weights.refresh()
        return self._norms.watch(examples)

    def step(self, grad_sq_norm: float | Tensor | None = None) -> Estimate:
        """The noise scale in examples, after the last piece's backward pass, before clipping and the optimizer.

        grad_sq_norm: |g|² of the whole batch's mean gradient if the caller knows it, so that no pass is spent on it.
        Every rank must give it, or none; with weights it is of no use and left aside.
        """
        self.pair = None
        if self._turn == 0 or self._latest is None:
            self._latest = self.estimate() if self._turn else self._measured(grad_sq_norm)
        self._go_on()
        return self._latest

    def _go_on(self) -> None:
        """To the next step, with hooks only if it is one to measure."""
        self._turn = (self._turn + 1) % self._every
        if self._every > 1:
            (self._norms.close if self._turn else self._norms.listen)()

    def _measured(self, grad_sq_norm: float | Tensor | None) -> Estimate:
        if self._weights is not None:
            grad_sq_norm = None
        pieces, witness = self._norms.take(), self._take_witness(grad_sq_norm is None)
        world = dist.get_world_size(self._group) if dist.is_initialized() else 1
        if not pieces and world == 1:
            raise InputError("step needs at least one micro_batch before it")
        squares, big = self._sq_norms(pieces, grad_sq_norm)
        sums = [squares, big / world, float(sum(piece.examples for piece in pieces)), float(len(pieces))]
        (squares, big, examples, count), witness = self._over_ranks(sums, witness)
        if not count:
            raise InputError("step needs at least one micro_batch before it")
        if not any(p.grad is not None for p in self._parameters) and grad_sq_norm is None:
            raise InputError("no parameter has a gradient: call step after backward and before zero_grad")
        if not (math.isfinite(squares) and math.isfinite(big)):
            self.skipped += 1
        elif count > 1 and (self._weights is None or self._weights.known):
            factor = self._norms.witness.factor(witness, int(count), world) if len(witness) else world
            weighted = squares * examples / factor**2
            self.pair = unbiased_pair(weighted, big, examples / count, examples)
            self.statistics.update(self.pair.trace, self.pair.grad_sq)
        elif count == 1 and not self.statistics.count:
            return self._undefined("undefined: one piece a step has nothing to be compared with")
        return self.estimate()

    def _sq_norms(self, pieces: list[Piece], grad_sq_norm: float | Tensor | None) -> tuple[float, float]:
        """Σ|c_i|²/n_i over this rank's pieces, where c_i is what piece i adds to `.grad`, and |g|².

        c_i = f·(n_i/N)·g_i, f = 1 or the ranks, so that Σ n_i|g_i|²/N = N/f²·Σ|c_i|²/n_i.
        """
        if pieces and (unmet := self._norms.unmet(pieces)):
            raise InputError(
                f"{len(unmet)} sharded parameters have a gradient that no micro_batch saw: every backward pass must be "
                "in one, and the modules that hold parameters must be called, not their weights alone"
            )
        self._refuse_tensor_ranks()
        squares = to_floats([square for piece in pieces for square in piece.squares.values()])
        examples_and_places = [(piece.examples, place) for piece in pieces for place in piece.squares]
        sums: dict[Mesh | None, tuple[list[float], list[float]]] = {None: ([], [])}
        for square, (examples, place) in zip(squares, examples_and_places, strict=True):
            sums.setdefault(self._norms.meshes.get(place), ([], []))[0].append(square / examples)
        if grad_sq_norm is None:
            for norm, mesh in self._batch_sq_norms():
                sums.setdefault(mesh, ([], []))[1].append(norm)
        both = over_meshes({mesh: (total(parts), total(wholes)) for mesh, (parts, wholes) in sums.items()})
        return both[0], both[1] if grad_sq_norm is None else float(whole(torch.as_tensor(grad_sq_norm)))

    def _refuse_tensor_ranks(self) -> None:
        """Ranks that share the work on one example must not count as ranks with examples of their own."""
        ours = set(dist.get_process_group_ranks(self._group)) if self._norms.meshes else set()
        for mesh in self._norms.meshes.values():
            for group in mesh.get_all_groups():
                if len(ours & set(dist.get_process_group_ranks(group))) > 1:
                    raise InputError(
                        "process_group must hold the data-parallel ranks alone where a model is also split over "
                        f"tensor-parallel ones, got one with ranks of the mesh {mesh}"
                    )

    def _over_ranks(self, sums: list[float], witness: Tensor) -> tuple[list[float], Tensor]:
        """The sums, and what the witness saw, over all ranks of the group."""
        if not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            return sums, witness
        both = torch.cat([torch.tensor(sums, dtype=torch.float64, device=witness.device), witness])
        dist.all_reduce(both, group=self._group)
        return both[: len(sums)].tolist(), both[len(sums) :]

    def _take_witness(self, wanted: bool) -> Tensor:
        """What the witness saw in this step; nothing if it is not wanted, as after a step in which it was not."""
        witness = self._norms.witness
        listened, witness.wanted = witness.wanted, wanted
        if wanted and listened:
            return witness.take()
        witness.forget()
        return witness.nothing

    def _batch_sq_norms(self) -> list[tuple[float, Mesh | None]]:
        """|g|² of each parameter's gradient, this rank's share of it where it is spread over a mesh."""
        places = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        if not places:
            raise InputError("no parameter has a gradient: call step after backward and before zero_grad")
        shares = [share(gradient) for i in places if (gradient := self._parameters[i].grad) is not None]
        known = self._weights is not None and self._weights.known
        weights = [share(self._weights[i]).part if known and self._weights is not None else None for i in places]
        norms = [sq_norm(held.part, weight) / held.holders for held, weight in zip(shares, weights, strict=True)]
        return list(zip(to_floats(norms), [held.mesh for held in shares], strict=True))

    def skip(self) -> None:
        """Forgets the pieces of a step that the caller will not apply, and counts it."""
        self._norms.take()
        self._norms.witness.forget()
        self.pair = None
        self.skipped += 1
        self._go_on()

    def estimate(self) -> Estimate:
        """The noise scale from all steps so far."""
        estimate = self.statistics.ratio(lowest=0.0)
        ratio = "tr(Σ)/|G|²" if self._weights is None else "tr(P⁻¹Σ)/(GᵀP⁻¹G)"
        method = f"{ratio} from {self.method.replace('_', '-')} norms, {estimate.method}"
        return Estimate(estimate.value, estimate.low, estimate.high, method, estimate.coverage)

    def _undefined(self, reason: str) -> Estimate:
        return Estimate(math.nan, 0.0, math.inf, reason, self.statistics.coverage)

    def close(self) -> None:
        """Takes the hooks off the model."""
        self._norms.close()

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the count of skipped steps, as plain numbers; pieces of a step under way are not in it."""
        return {"statistics": self.statistics.state_dict(), "skipped": self.skipped, "turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.statistics.load_state_dict(state["statistics"])
        self.skipped, self._latest = state["skipped"], None
        self._turn = (state.get("turn", 0) - 1) % self._every
        self._go_on()
