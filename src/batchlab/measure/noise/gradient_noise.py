"""The gradient noise scale B_simple = tr(Σ)/|G|², with an interval, in any training loop (McCandlish et al. 2018, A.1).

The mean gradient g_n of n independent examples has E|g_n|² = |G|² + tr(Σ)/n. A step that works through its batch in
pieces knows |g_n|² at two sizes: of each piece, and of the whole batch.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchlab.core.checks import check_count, is_count
from batchlab.core.errors import InputError
from batchlab.core.facts import Estimate
from batchlab.measure.examples.projected_norms import ENOUGH
from batchlab.measure.noise.example_pieces import ExamplePieces
from batchlab.measure.noise.noise_pair import NoisePair, unbiased_pair
from batchlab.measure.noise.norm_layers import SETTLED, NormLayers
from batchlab.measure.noise.norm_pieces import NormPieces
from batchlab.measure.noise.pieces import PieceNorms
from batchlab.measure.noise.preconditioner import Preconditioner
from batchlab.measure.noise.self_timed import WARM_UP, SelfTimed
from batchlab.measure.noise.step_sums import StepSums, step_sums
from batchlab.measure.ratio import RatioOfMeans
from batchlab.parallel.agree import agree_min

METHODS = ("micro_batch", "per_example", "norm_layers", "ranks")
WEIGHTINGS = ("none", "preconditioned")
LARGEST = 1e80  # of |g|², in a run of float64 that diverges


class GradientNoise:
    """Measures the noise scale of a model in any training loop, from the pieces of each batch.

        noise = GradientNoise(model)
        for piece in batch:                          # micro-batches, of any sizes
            with noise.micro_batch(len(piece)):
                (loss_mean(piece) * len(piece) / len(batch)).backward()
        estimate = noise.step()                      # before clipping and before optimizer.step()
        noise.close()

    model: its parameters that require a gradient when this is made are watched, a shared one once. method, what a piece
    is: "micro_batch": each micro-batch of each rank; "ranks": each rank's sum over all its micro-batches, which must
    then not be averaged before the last one (DDP's `no_sync`, in which nothing is measured where `model` is the DDP
    module itself; `set_requires_gradient_sync(False)`); "per_example": each example, by `ExampleNorms` and with its
    limits; "norm_layers": each example, but only in the normalisation layers, whose share of tr(Σ) is measured at some
    steps (`NormLayers`). The last two need the forward pass inside `micro_batch`, and one micro-batch is enough.
    ema: weight kept at each step, in [0, 1); the default 0.98 remembers about 50 steps (the field uses 0.99 to 0.9998);
    None keeps all steps alike. coverage: of the interval.
    process_group: the ranks over which `.grad` is averaged; the default group where one is initialised. Where a model
    is also split over tensor-parallel ranks, it must be given.
    weighting: "none" for B_simple, which weighs all coordinates alike as SGD does; "preconditioned" for
    tr(P⁻¹Σ)/(GᵀP⁻¹G) in the geometry of the Adam-like `optimizer` (see `Preconditioner`), from its second update on;
    not with single examples.
    every: measures one step in so many, the first among them; the others run without hooks and cost nothing. Where a
    step takes milliseconds, a measured one costs a tenth of it; from some 50 ms on, a few hundredths. "auto": so many
    that measuring takes about 2 % of the loop's time, which the first 38 steps tell, of norm layers 96 (`SelfTimed`);
    all ranks take the same. What is measured then depends on the clock, so a run repeats exactly only with a number.
    projections: of single examples' gradients; their norms are then not exact but right on average (`ExampleNorms`).
    By default 0, exact, for "per_example", and 8 for the steps at which "norm_layers" measures all layers. With 8 a
    step of a language model costs a tenth more and not a third, and the estimate spreads some 4 % more. Where the noise
    scale is far below one example they tell little: their error is in proportion to |G|² too.

    What `.grad` must hold at `step`: the exact mean over all examples of the batch, each piece's mean loss weighted
    by its share (and, under DDP, which averages over ranks, by the number of ranks); no clipping and no decay in it. A
    loss divided by the number of equal pieces is that. Then a piece's own |g|² follows from the gradient that it
    adds, seen by a hook before it is added: no copy of any gradient is kept, and no bit changed. A common factor on
    all pieces that `.grad` no longer has at `step` (a loss scale, a division after the backward passes) is found from
    one small parameter's gradient and taken out; where the pieces are no multiple of `.grad` at all, `step` refuses,
    and where `.grad` was clipped, at the second step that was. These checks need `.grad` as the norm has it, so they
    are left out where the caller gives the norm.

    The pieces of all ranks count. One piece in all tells nothing: there is nothing to compare it with. A step that is
    not finite, or whose |g|² is over 1e80, is skipped on all ranks and counted in `skipped`. `steps` counts `step` and
    `skip`. `pair` holds the last step's own two parts, None where it gave none.

    An example is whatever is drawn independently: for language models a sequence. With batch normalisation the
    pieces' gradients depend on each other, and the estimate with them. A loss scale is taken out by `scaler.unscale_`
    before `step`: left in, steps of a larger scale would weigh more.

    Parameters may be spread over ranks (`fully_shard`, tensor parallel, both), but not for single examples: norms are
    of whole tensors, and the number is that of one process. Attach after sharding; the modules that hold such
    parameters must be called as modules. Preconditioned, each piece gathers the weights of one parameter at a time,
    which costs as much as a forward pass's gathering: measure one step in many.
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
        every: int | Literal["auto"] = 1,
        projections: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
        if weighting not in WEIGHTINGS or (weighting == "preconditioned") != (optimizer is not None):
            raise InputError(f'weighting must be "none", or "preconditioned" with an optimizer, got {weighting!r}')
        if optimizer is not None and method not in ("micro_batch", "ranks"):
            raise InputError(f'weighting "preconditioned" needs method "micro_batch" or "ranks", got {method!r}')
        if every != "auto" and not is_count(every):
            raise InputError(f'every must be an integer of at least 1, or "auto", got {every!r}')
        if projections and method not in ("per_example", "norm_layers"):
            raise InputError(f'projections need method "per_example" or "norm_layers", got {method!r}')
        self.statistics = RatioOfMeans(ema=ema, coverage=coverage)
        self.method, self.weighting, self.skipped, self.steps = method, weighting, 0, 0
        self._closed = False
        self._every, self._turn, self._examples = 1 if every == "auto" else operator.index(every), 0, 1.0
        self._latest: Estimate | None = None
        self.pair: NoisePair | None = None
        self._group = process_group
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("the model has no parameter that requires a gradient")
        if any(p.is_complex() for p in self._parameters):
            raise InputError("the noise of complex parameters is not defined here: view them as real ones")
        warm_up = SETTLED if method == "norm_layers" else WARM_UP
        self._timed = SelfTimed(self._parameters[0].device, warm_up=warm_up) if every == "auto" else None
        self._weights = None if optimizer is None else Preconditioner(optimizer, self._parameters)
        self._norm_layers = NormLayers(model, coverage=coverage) if method == "norm_layers" else None
        self._all: PieceNorms | ExamplePieces
        if method in ("micro_batch", "ranks"):
            merged = method == "ranks"
            self._all = PieceNorms(self._parameters, merged=merged, weights=self._weights, model=model)
        else:
            usual = ENOUGH if method == "norm_layers" else 0
            self._all = ExamplePieces(
                model, self._parameters, projections=usual if projections is None else projections
            )

    @property
    def _source(self) -> PieceNorms | ExamplePieces | NormPieces:
        """What this step's pieces are told by."""
        few = self._norm_layers is not None and not self._norm_layers.calibrates
        return self._norm_layers.source if few and self._norm_layers is not None else self._all

    @property
    def due(self) -> bool:
        """Whether the coming step is one to measure, for a loop that would not cut its batch otherwise."""
        return self._turn == 0 and not self._closed

    def micro_batch(self, examples: int) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of one piece of `examples` examples; the forward pass may be inside too."""
        if self._closed:
            raise InputError("this GradientNoise was closed: make another one")
        examples = _count(examples)
        if self._turn:
            return contextlib.nullcontext()
        if self._weights is not None and self._all.empty:
            self._weights.refresh()
        if self._norm_layers is not None and self._norm_layers.calibrates:
            return self._norm_layers.beside(self._all.watch(examples), examples)
        return self._source.watch(examples)

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
        self.steps += 1
        self._turn = (self._turn + 1) % self._every
        if self._timed is not None:
            self._timed.ended()
            self._turn = 0 if self._timed.measures else 1
            if self._timed.settled:
                (least,) = agree_min([-self._timed.every], self._group)
                self._every, self._timed, self._turn = int(-least), None, 0
        self._hook_if_due()

    def _hook_if_due(self) -> None:
        (self._all.close if self._turn or self._closed else self._all.listen)()

    def _measured(self, grad_sq_norm: float | Tensor | None) -> Estimate:
        known = None if self._weights is not None else grad_sq_norm
        small, big = [range(len(self._source.parameters))], [range(len(self._parameters))]
        if self._norm_layers is not None:
            return self._from_norm_layers(self._norm_layers, known)
        sums = step_sums(
            self._all, self._parameters, small=small, big=big, known=known, weights=self._weights, group=self._group
        )
        if not _finite(sums):
            self.skipped += 1
        elif sums.number > 1 and (self._weights is None or self._weights.known):
            self._add(_pair(sums, 0, 0) if sums.told else None, sums)
        elif sums.number == 1 and not self.statistics.count:
            return self._undefined("undefined: one piece a step has nothing to be compared with")
        return self.estimate()

    def _from_norm_layers(self, layers: NormLayers, known: float | Tensor | None) -> Estimate:
        """All layers at some steps, and the normalisation layers' share of tr(Σ) with the whole |g|² at the others."""
        source, calibrates = self._source, layers.calibrates
        places = {parameter: place for place, parameter in enumerate(self._parameters)}
        norms, every = [places[p] for p in layers.parameters], range(len(self._parameters))
        small = [norms, every] if calibrates else [range(len(source.parameters))]
        if calibrates and isinstance(self._all, ExamplePieces):
            layers.compare(self._all.square(frozenset(norms)))
        sums = step_sums(
            source, self._parameters, small=small, big=[frozenset(norms), every], known=known, group=self._group
        )
        if not _finite(sums):
            self.skipped += 1
        elif sums.number > 1 and calibrates and not sums.told:
            return self.estimate()
        elif sums.number > 1:
            layers.turn += 1
            own = _pair(sums, 0, 0)
            if calibrates:
                layers.calibrate(_pair(sums, 1, 1).trace, own.trace)
            told = layers.pair(own.trace, sums.big[1], sums.examples) if sums.told else None
            self._add(_pair(sums, 1, 1) if calibrates else told, sums)
        elif not self.statistics.count:
            return self._undefined("undefined: one example a step has nothing to be compared with")
        return self.estimate()

    def _add(self, pair: NoisePair | None, sums: StepSums) -> None:
        self.pair, self._examples = pair, sums.examples
        if pair is not None:
            self.statistics.update(pair.trace, pair.grad_sq)

    def skip(self) -> None:
        """Forgets the pieces of a step that the caller will not apply, and counts it."""
        self._source.take()
        self._source.witness.forget()
        if self._norm_layers is not None and self._norm_layers.calibrates:
            self._norm_layers.forget()
        self.pair = None
        self.skipped += 1
        self._go_on()

    def estimate(self) -> Estimate:
        """The noise scale from all steps so far."""
        estimate = self.statistics.ratio(lowest=0.0)
        ratio = "tr(Σ)/|G|²" if self._weights is None else "tr(P⁻¹Σ)/(GᵀP⁻¹G)"
        method = f"{ratio} from {self.method.replace('_', '-')} norms, {estimate.method}"
        found = Estimate(estimate.value, estimate.low, estimate.high, method, estimate.coverage)
        return found if self._norm_layers is None else self._norm_layers.widened(found, self._examples)

    def _undefined(self, reason: str) -> Estimate:
        return Estimate(math.nan, 0.0, math.inf, reason, self.statistics.coverage)

    def close(self) -> None:
        """Takes the hooks off the model; what was found stays."""
        self._closed = True
        self._all.close()

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the count of skipped steps, as plain numbers; pieces of a step under way are not in it.

        With `every="auto"` its timing is not in it either, and begins anew.
        """
        state: dict[str, Any] = {"method": self.method, "weighting": self.weighting}
        state |= {"statistics": self.statistics.state_dict(), "skipped": self.skipped, "turn": self._turn}
        if isinstance(self._all, ExamplePieces):
            state |= {"single": self._all.state_dict()}
        if self._norm_layers is not None:
            state |= {"norm_layers": self._norm_layers.state_dict(), "examples": self._examples}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; `InputError` if that was of another method or weighting."""
        for name, own in (("method", self.method), ("weighting", self.weighting)):
            if state[name] != own:
                raise InputError(f"state is of {name} {state[name]!r}, this is of {own!r}")
        self.statistics.load_state_dict(state["statistics"])
        self.skipped, self._latest = state["skipped"], None
        if self._norm_layers is not None:
            self._norm_layers.load_state_dict(state["norm_layers"])
            self._examples = state["examples"]
        if isinstance(self._all, ExamplePieces):
            self._all.load_state_dict(state.get("single", {"passes": 0}))
        self._turn = state.get("turn", 0) % self._every
        self._hook_if_due()


def _count(examples: Any) -> int:
    """As `int` where it is an integer of any library."""
    check_count(examples=examples)
    return operator.index(examples)


def _pair(sums: StepSums, small: int, big: int) -> NoisePair:
    return unbiased_pair(sums.small[small], sums.big[big], sums.examples / sums.number, sums.examples)


def _finite(sums: StepSums) -> bool:
    """Whether the statistics can hold it: they sum cubes."""
    return all(abs(each) < LARGEST for each in [*sums.small, *sums.big])
