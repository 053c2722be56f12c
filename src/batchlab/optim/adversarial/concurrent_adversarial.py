"""Adversarial inputs as a regulariser at very large batches, made steps ahead with stale weights (ConAdv).

Liu, Chen, Cheng, Hsieh and You, Concurrent Adversarial Learning for Large-Batch Training, ICLR 2022
(arXiv 2106.00221), Algorithm 1. At step t, with the clean batch B_t of examples (x_i, y_i) and a staleness of τ:

    A  train:   g_t = ∇_θ [ w₁·mean_i l(θ_t; x_i, y_i) + w₂·mean_i l(θ_t; x̂_i(θ_{t-τ}), y_i) ]
    B  prepare: x̂_i(θ_t) = x_i + perturbation(∇_x l(θ_t; x_i, y_i)) for the batch B_{t+τ}

The clean mean goes through the main BatchNorms, the adversarial one through the auxiliary ones. For τ ≥ 1 nothing in A
waits for B, so that B can run beside it; τ = 0 makes x̂ with θ_t, two passes one after the other (the paper's DisAdv).
The first τ steps have no adversarial term.

What the printed algorithm leaves open is settled here: the perturbation is one step, ρ·sign(g) or ρ·g/|g|₂, and B is
in evaluation mode, through the auxiliary BatchNorms, so that nothing in the model changes and no rank waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError
from batchlab.optim.adversarial.dual_batchnorm import Branch, branch_parameters, single_batchnorms, unwrapped, use_bn
from batchlab.optim.adversarial.executors import EXECUTORS, Executor
from batchlab.optim.adversarial.input import (
    Bounds,
    Loss,
    Norm,
    check_inside,
    check_perturbation,
    checked_loss,
    input_of,
    moved_input,
    with_input,
)


class Terms(NamedTuple):
    """A batch's losses, detached scalars: w₁·clean + w₂·adversarial, and the two means.

    adversarial: None where the batch had no adversarial input.
    """

    total: Tensor
    clean: Tensor
    adversarial: Tensor | None


class _Ahead(NamedTuple):
    """A batch that was drawn: the step it is for, its input, and the input's version when it was drawn."""

    step: int
    batch: Any
    x: Tensor
    version: int


class _Made(NamedTuple):
    """An x̂, perhaps under way: the step it is for, the mark of the clean input, whether it was loaded from a state."""

    step: int
    result: Callable[[], Tensor]
    mark: Callable[[], int]
    loaded: bool


class ConcurrentAdversarial:
    """The loss on a batch plus the loss on its adversarial form made τ steps ago, for any model and any optimizer.

    model: with every BatchNorm converted by `convert_dual_batchnorm`, or without any. DDP, `torch.compile` and, with
        executor "inline", `fully_shard` come after that.
    loss_fn: `(model, batch) -> scalar`, the mean over the batch's examples.
    rho: the step's size in the unit of the input, per number ("linf") or in |·|₂ per example ("l2"). For inputs
        normalised by channel, a tensor ρ/std that broadcasts against one example. The paper's is not known.
    tau: how many batches ahead B works; 0 for two passes in sequence. 1, the least at which B is beside A, is the
        default: the paper bounds the error by a multiple of τ·lr·|gradient|.
    norm: "linf" or "l2". clip: the range (low, high) of valid inputs, numbers or tensors; None leaves x̂ free.
    weights: (w₁, w₂). (1, 1) is the paper's, a sum of two means: its gradient is about twice the clean one, which a
        trust ratio takes out and SGD does not. (0.5, 0.5) keeps the scale.
    executor: where B runs: "inline", "thread", "process" (a second process, CPU), "stream" (CUDA). The inputs are the
        same bit for bit, if the model in evaluation mode and loss_fn draw no random numbers.
    input_key: where the input is in a batch, an index or a key; it must be of floating point.

    `rho`, `clip` and `weights` are read at each step. With k micro-batches an update τ counts micro-batches: give k
    times the steps, and B uses the weights at the start of the update. Under DDP B is each rank's own, nothing is sent.
    Memory beside training: τ + 1 batches, τ adversarial inputs and, but for "inline", max(τ, 1) copies of the model.
    Time: 3 forward and backward passes to each clean one; the batch size counts clean examples.
    When not to use it: on one device it only costs time; where batches are small enough to regularise by themselves;
    for inputs that are tokens. Raises `InputError` for arguments that are out of range, and at the step in question.

    >>> model = nn.Linear(2, 1)
    >>> adversarial = ConcurrentAdversarial(model, lambda m, b: (m(b[0]) - b[1]).square().mean(), rho=0.1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for batch in adversarial.batches([(torch.ones(4, 2), torch.ones(4, 1))] * 3):
    ...     optimizer.zero_grad()
    ...     terms = adversarial.backward(batch)
    ...     optimizer.step()
    >>> adversarial.step, tuple(adversarial.adversarial.shape)
    (3, (4, 2))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        *,
        rho: float | Tensor,
        tau: int = 1,
        norm: Norm = "linf",
        weights: tuple[float, float] = (1.0, 1.0),
        executor: str = "inline",
        clip: Bounds | None = None,
        input_key: Any = 0,
    ) -> None:
        check_count(0, tau=tau)
        if executor not in EXECUTORS:
            raise InputError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
        _check_model(model)
        if not callable(loss_fn):
            raise InputError(f"loss_fn must be a function (model, batch) -> scalar, got {loss_fn!r}")
        self.model, self.loss_fn, self.tau, self.norm, self.input_key = model, loss_fn, tau, norm, input_key
        self.rho, self.weights, self.clip = rho, weights, clip
        self._checked: tuple[tuple[Any, ...], list[int]] = ((None, None, None), [])
        self._check()
        self.step = 0
        self._executor: Executor = EXECUTORS[executor](unwrapped(model), partial(_make, loss_fn), max(tau, 1))
        self._made: deque[_Made] = deque()  # oldest first
        self._now: tuple[_Ahead, Tensor | None] | None = None
        self._resumes = self._inside = False
        self._run: object = None

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, unchanged and in order, each given out when its x̂ is in hand.

        Looks τ batches ahead and keeps them, so that A and B see one draw of the augmentation. One call is one run:
        chain epochs into one iterable, else the first τ batches of each have no adversarial term, and an epoch of τ
        batches or fewer is refused. Augmentation, mixup with its targets too, and the move to the model's device
        belong in the loader, and no batch may be changed once drawn. A loop that is left early has drawn τ batches
        more than it was given.
        """
        single = isinstance(loader, tuple) and len(loader) > 0 and all(isinstance(part, Tensor) for part in loader)
        if single or isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
            raise InputError(f"loader must be an iterable of batches, got {'one batch' if single else type(loader)}")
        return self._given_out(iter(loader))

    def _given_out(self, source: Iterator[Any]) -> Iterator[Any]:
        self._begin()
        run = self._run = object()
        drawn = map(self._look, itertools.count(self.step), source)
        ahead = deque(itertools.islice(drawn, self.tau))
        newest = next(drawn, None)
        if newest is None and ahead and not self._made:
            raise InputError(f"tau must be less than the number of batches, got tau={self.tau} for {len(ahead)}")
        while newest is not None or ahead:
            if newest is not None:
                ahead.append(newest)
            now = ahead.popleft()
            if not self.tau:
                self._submit(now)
            self._now = now, self._collect(now)
            if self.tau and newest is not None:
                self._submit(newest)
            self.step = now.step + 1
            yield now.batch
            if self._run is not run:
                raise InputError("batches() was called again: only its latest loop can go on")
            newest = next(drawn, None)

    def backward(self, batch: Any, scale: float | Callable[[Tensor], Tensor] = 1.0) -> Terms:
        """Adds the gradient of w₁·clean + w₂·adversarial to `.grad`: two backward passes, one after the other.

        batch: the one that `batches` gave out last, as often as a closure needs. scale: what the sum is multiplied
        with, as a micro-batch's share of the update's examples, or a function, as a `GradScaler`'s `scale`; the terms
        returned are free of it. Raises `InputError` for another batch than that, or one changed since it was drawn.
        """
        self._check()
        x_hat = self._of(batch)
        if not callable(scale) and not holds(lambda value: math.isfinite(value), scale):
            raise InputError(f"scale must be finite or a function, got {scale!r}")
        w_clean, w_adversarial = self.weights
        clean = self._term("main", batch, w_clean, scale, last=x_hat is None)
        if x_hat is None:
            return Terms(w_clean * clean, clean, None)
        moved = with_input(batch, self.input_key, x_hat)
        adversarial = self._term("aux", moved, w_adversarial, scale, last=True)
        return Terms(w_clean * clean + w_adversarial * adversarial, clean, adversarial)

    @property
    def adversarial(self) -> Tensor | None:
        """x̂ of the batch that `batches` gave out last; None in the first τ steps."""
        return None if self._now is None else self._now[1]

    def state_dict(self) -> dict[str, Any]:
        """τ, the step, and x̂ of the batches to come with marks of their clean inputs; waits for those under way.

        Each rank has its own. Settings are not in it.
        """
        return {
            "tau": self.tau,
            "step": self.step,
            "steps": [made.step for made in self._made],
            "adversarial": [made.result() for made in self._made],
            "marks": [made.mark() for made in self._made],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave: the next `batches` begins with the batch that would have come next.

        To begin with τ clean steps instead, as on other data or another number of ranks, do not load. Raises
        `InputError` for another τ; `batches` raises it for a batch that is not the one its x̂ was made of.
        """
        missing = [key for key in ("tau", "step", "steps", "adversarial", "marks") if key not in state]
        if missing:
            raise InputError(f"state must be what state_dict() gave, it lacks {', '.join(missing)}")
        if state["tau"] != self.tau:
            raise InputError(f"tau must be {state['tau']} as in the state, got {self.tau}")
        self._resumes = False
        self._begin()
        self.step, self._resumes = state["step"], True
        for step, x_hat, mark in zip(state["steps"], state["adversarial"], state["marks"], strict=True):
            self._made.append(_Made(step, partial(_same, x_hat), partial(_same, mark), True))

    def close(self) -> None:
        """Ends the thread or process; what is under way is lost."""
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Drops what an earlier loop left under way, but not what was just loaded."""
        if not self._resumes:
            for made in self._made:
                with contextlib.suppress(Exception):  # nobody asks for it any more, but its copy must be free again
                    made.result()
            self._made.clear()
        self._resumes = self._inside = False
        self._now = self._run = None

    def _look(self, step: int, batch: Any) -> _Ahead:
        x = input_of(batch, self.input_key)
        return _Ahead(step, batch, x, x._version)

    def _submit(self, ahead: _Ahead) -> None:
        self._check()
        if self.clip is not None and not self._inside:  # one batch tells: on a GPU each look would wait for it
            check_inside(ahead.x, self.clip)
            self._inside = True
        settings = {"rho": self.rho, "norm": self.norm, "clip": self.clip, "input_key": self.input_key}
        result = self._executor.submit(ahead.batch, ahead.x, settings)
        self._made.append(_Made(ahead.step, result, partial(_mark, ahead.x), False))

    def _collect(self, now: _Ahead) -> Tensor | None:
        """x̂ of the batch whose turn it is; None where there is none."""
        if now.x._version != now.version:
            raise InputError(
                f"batch {now.step} was changed after it was drawn: the loader must give each batch tensors of its own"
            )
        if not self._made or self._made[0].step != now.step:
            return None
        made = self._made.popleft()
        if made.loaded and made.mark() != _mark(now.x):
            raise InputError(
                f"batch {now.step} is not the one that the loaded adversarial input was made of: give batches() the "
                "data from where the state was saved, in that order and augmentation, or do not load the state"
            )
        return made.result().to(now.x.device)

    def _of(self, batch: Any) -> Tensor | None:
        if self._now is None:
            raise InputError("backward() must be called inside `for batch in adversarial.batches(loader)`")
        now, x_hat = self._now
        x = input_of(batch, self.input_key)
        same = x is now.x or (
            (x.shape, x.dtype, x.device) == (now.x.shape, now.x.dtype, now.x.device) and x.equal(now.x)
        )
        if not same or now.x._version != now.version:
            raise InputError(
                f"batch must be the one that batches() gave out for step {now.step}, got another or a changed one: "
                "shuffle, augment and move to the device inside the loader that batches() is given"
            )
        return x_hat

    def _term(self, branch: Branch, batch: Any, weight: float, scale: Any, *, last: bool) -> Tensor:
        """One mean's forward and backward pass; under DDP the last one sends the gradients of both."""
        model: Any = self.model
        distributed = isinstance(model, DistributedDataParallel)
        quiet = model.no_sync() if distributed and not last else contextlib.nullcontext()
        with quiet, use_bn(model, branch):
            loss = checked_loss(self.loss_fn(model, batch))
            total = weight * loss
            if distributed and last and not model.find_unused_parameters:
                total = total + _touch(branch_parameters(model, "main" if branch == "aux" else "aux"))
            (scale(total) if callable(scale) else scale * total).backward()
        return loss.detach()

    def _check(self) -> None:
        ends = self.clip if isinstance(self.clip, tuple) else ()
        versions = [each._version for each in (self.rho, *ends) if isinstance(each, Tensor)]
        now = (self.rho, self.norm, self.clip)
        if not versions or versions != self._checked[1] or any(map(operator.is_not, now, self._checked[0])):
            check_perturbation(*now)  # of tensors on a GPU, each look would wait for it
            self._checked = now, [] if isinstance(self.clip, list) else versions
        if not holds(lambda w: len(w) == 2 and min(w) >= 0 and 0 < sum(w) < math.inf, self.weights):
            raise InputError(f"weights must be two finite numbers >= 0, not both 0, got {self.weights!r}")


def _make(loss_fn: Loss, model: nn.Module, batch: Any, settings: dict[str, Any]) -> Tensor:
    return moved_input(model, loss_fn, batch, **settings)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    single = single_batchnorms(unwrapped(model))
    if single:
        raise InputError(
            f"model must have an auxiliary BatchNorm beside each, but {single[0] or 'it'} has none: call "
            "convert_dual_batchnorm(model) before the optimizer and any wrapper are made"
        )
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise InputError("model must be wrapped without static_graph=True: clean and adversarial passes differ")


def _touch(parameters: Iterable[Tensor]) -> Tensor:
    """0, with a gradient of 0 for each parameter: DDP waits for all of them."""
    return sum((p.flatten()[:0].sum() for p in parameters if p.requires_grad), start=torch.zeros(()))


def _mark(x: Tensor) -> int:
    """A number that tells one input from another, by its bytes."""
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "little")


def _same(value: Any) -> Any:
    return value
