"""Progressive training on weight decay, PTWD: λ by phases of tokens (Shen et al. 2023, arXiv 2309.10818).

The paper trains its 7B model with a very large batch in three phases: λ = 0, to converge fast; 0.5, against the large
batch's overfitting; 0.1 to the end. Rate, batch and the optimizer's moments are left alone at a switch. Where it
switched is in no source that we could read.

Decoupled decay shrinks a weight that nothing drives by 1 - ηλ an update, so by ηλ/B a token (`decay_per_token`): a
batch k times as large shrinks k times less a token at the same ηλ, which is why it may want a larger λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from batchlab.core.checks import check_count, check_not_negative, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.rules.optimizer_family import decay_kind, plain_name
from batchlab.schedule.rates.counted import Counting, put, taken

PTWD = (0.0, 0.5, 0.1)


class Phase(NamedTuple):
    """tokens: how long it lasts. weight_decay: λ of the groups whose `wd_scale` is 1."""

    tokens: int
    weight_decay: float


class PhaseDecay(NamedTuple):
    """What a phase did. tokens, updates: in it so far. log_shrink: for each parameter group
    Σ ln(1 - ηλ), the logarithm of what decay alone left of a weight. per_token: that over the tokens, with its sign
    turned, of the group that shrinks most.
    """

    weight_decay: float
    tokens: int
    updates: int
    per_token: float
    log_shrink: tuple[float, ...]


def equal_phases(tokens: int, weight_decays: Sequence[float] = PTWD) -> tuple[Phase, ...]:
    """The run cut into equal phases. The values are the paper's; equal lengths are ours, for want of the paper's.

    >>> equal_phases(100)
    (Phase(tokens=33, weight_decay=0.0), Phase(tokens=33, weight_decay=0.5), Phase(tokens=34, weight_decay=0.1))
    """
    if not len(weight_decays):
        raise InputError("weight_decays must hold one phase's at least, got none")
    check_count(len(weight_decays), tokens=tokens)
    ends = [tokens * i // len(weight_decays) for i in range(len(weight_decays) + 1)]
    return _checked(Phase(b - a, each) for a, b, each in zip(ends, ends[1:], weight_decays, strict=False))


def phase_at(phases: Sequence[Phase | tuple[int, float]], seen: int) -> int:
    """The index of the phase of an update that starts after `seen` tokens; past the last one, the last.

    >>> [phase_at([(100, 0.0), (50, 0.5)], seen) for seen in (0, 99, 100, 1000)]
    [0, 0, 1, 1]
    """
    check_count(0, seen=seen)
    end = 0
    for index, (tokens, _) in enumerate(phases):
        end += tokens
        if seen < end:
            return index
    return len(phases) - 1


def decay_per_token(*, learning_rate: float, weight_decay: float, batch: float) -> float:
    """-ln(1 - ηλ)/B: how fast decay alone shrinks a weight, per token. batch: tokens of an update. ηλ < 1.

    >>> round(decay_per_token(learning_rate=0.01, weight_decay=0.1, batch=1000) * 1e6, 4)
    1.0005
    """
    check_not_negative(learning_rate=learning_rate, weight_decay=weight_decay)
    check_positive(batch=batch)
    product = learning_rate * weight_decay
    if not product < 1:
        raise InputError(f"learning_rate*weight_decay must be < 1, or a weight changes sign, got {product!r}")
    return -math.log1p(-product) / batch


class ProgressiveWeightDecay(Counting):
    """Writes λ of the phase that holds into the optimizer's groups, in place, for every update.

    optimizer: one whose decay is decoupled and multiplied by the rate, AdamW's way; an L2 penalty in the gradient is
    refused, for it behaves otherwise. decoupled: True vouches for an optimizer of yours that is not known here.
    phases: (tokens, weight_decay), at least one, as `equal_phases` gives PTWD's; the last goes on past its end. An
    update belongs to the phase of its first token. batch: tokens of an update over all ranks.

    A group's λ is the phase's times its `wd_scale`. A group without one gets 1, or 0 where its own weight decay is 0,
    as biases and norms have it; at least one must decay. The scale is kept in the group, and so in the optimizer's
    state. Call `step` once after each update, beside that of a learning-rate schedule. No schedule of λ may run on
    top, and nothing that scales λ by η/η₀. Not with a step that is captured in a CUDA graph: that keeps the λ it was
    captured with. An update at ηλ >= 1 is refused before it is taken, and parameters of an unknown decay at the start:
    `InputError`.

    State: tokens seen, batch and the report, plain numbers. Loading writes λ of that place at once.

    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    >>> schedule = ProgressiveWeightDecay(optimizer, [(100, 0.0), (200, 0.5), (100, 0.1)], batch=100)
    >>> decays = []
    >>> for update in range(4):
    ...     decays.append(optimizer.param_groups[0]["weight_decay"])
    ...     optimizer.step()
    ...     schedule.step()
    >>> decays
    [0.0, 0.5, 0.5, 0.1]
    >>> schedule.report()[1].updates, f"{schedule.report()[1].per_token:.2e}"
    (2, '5.01e-05')
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        phases: Iterable[Phase | tuple[int, float]],
        *,
        batch: int,
        decoupled: bool | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.phases = _checked(phases)
        if not decoupled:
            _check_decoupled(optimizer)
        self.optimizer = optimizer
        self.batch = batch
        self._tokens, self._updates = [0] * len(self.phases), [0] * len(self.phases)
        self._log_shrink: list[list[float]] = [[] for _ in self.phases]
        self._per_update: list[float] | None = None
        self._write()
        if not any(group["wd_scale"] for group in optimizer.param_groups):
            raise InputError(
                "no parameter group decays: give those that should wd_scale=1.0, or a weight_decay other than 0"
            )
        optimizer.register_step_pre_hook(self._before_step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.optimizer.register_step_pre_hook(self._before_step)  # which no optimizer's copy keeps

    @property
    def phase(self) -> int:
        """The index of the phase that the next update belongs to."""
        return phase_at(self.phases, self._seen)

    def step(self, count: int | None = None) -> None:
        """Counts one update of `count` tokens, `batch` by default, and writes the λ of the next."""
        before, index = self._seen, self.phase
        self._add(count)
        self._tokens[index] += self._seen - before
        if self._per_update is not None:
            self._updates[index] += 1
            shrunk = self._log_shrink[index]
            shrunk += [0.0] * (len(self._per_update) - len(shrunk))
            for group, each in enumerate(self._per_update):
                shrunk[group] += each
            self._per_update = None
        self._write()

    def report(self) -> list[PhaseDecay]:
        """For each phase what its decay has done so far, by the rates that the optimizer's steps had.

        Updates that were skipped count tokens and no decay.
        """
        return [
            PhaseDecay(
                phase.weight_decay,
                tokens,
                updates,
                abs(min(shrunk, default=0.0)) / tokens if tokens else 0.0,
                tuple(shrunk),
            )
            for phase, tokens, updates, shrunk in zip(
                self.phases, self._tokens, self._updates, self._log_shrink, strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            **self._counts(),
            "tokens": list(self._tokens),
            "updates": list(self._updates),
            "log_shrink": [list(each) for each in self._log_shrink],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; the phases are the constructor's and must be as many."""
        columns = [taken(state_dict, name) for name in ("tokens", "updates", "log_shrink")]
        if any(len(column) != len(self.phases) for column in columns):
            raise InputError(f"phases must be as many as the state's {len(columns[0])}, got {len(self.phases)}")
        self._take_counts(state_dict)
        self._tokens, self._updates = list(columns[0]), list(columns[1])
        self._log_shrink = [list(each) for each in columns[2]]
        self._write()

    def _write(self) -> None:
        decay = self.phases[self.phase].weight_decay
        for group in self.optimizer.param_groups:
            scale = group.setdefault("wd_scale", 0.0 if float(group["weight_decay"]) == 0 else 1.0)
            if not holds(lambda value: 0 <= value < math.inf, scale):
                raise InputError(f"wd_scale of parameter groups must be finite and >= 0, got {scale!r}")
            put(group, "weight_decay", decay * scale)

    def _before_step(self, *_: Any) -> None:
        """Notes ln(1 - ηλ) of the step that follows: by the time of `step` a rate may have moved on."""
        groups = self.optimizer.param_groups
        products = [float(group["lr"]) * float(group["weight_decay"]) for group in groups]
        for group, product in zip(groups, products, strict=True):
            if not product < 1:
                lr, decay = float(group["lr"]), float(group["weight_decay"])
                raise InputError(
                    f"lr*weight_decay must be < 1, or a weight changes sign, got {product:g} of lr {lr:g} and "
                    f"weight_decay {decay:g}: nothing has moved"
                )
        self._per_update = [math.log1p(-each) for each in products]


def _checked(phases: Iterable[Phase | tuple[int, float]]) -> tuple[Phase, ...]:
    given: list[Any] = list(phases)
    if not given or not all(holds(lambda pair: len(pair) == 2, phase) for phase in given):
        raise InputError(f"phases must hold at least one (tokens, weight_decay) and nothing else, got {given!r:.80}")
    found = tuple(Phase(*phase) for phase in given)
    for phase in found:
        check_count(tokens=phase.tokens)
        if not holds(lambda value: 0 <= value < math.inf, phase.weight_decay):
            raise InputError(f"weight_decay of a phase must be finite and >= 0, got {phase.weight_decay!r}")
    return found


def _check_decoupled(optimizer: torch.optim.Optimizer) -> None:
    if any("weight_decay" not in group for group in optimizer.param_groups):
        raise InputError(f"optimizer must have a weight_decay in every group, got {type(optimizer).__name__}")
    flags = [group.get("decoupled_weight_decay") for group in optimizer.param_groups]
    if all(flag is True for flag in flags):
        return
    known = [each for each in map(_kind, type(optimizer).__mro__) if each is not None]
    found = known[0] if known else "unknown"
    if found != "decoupled" or False in flags:
        why = (
            "is not known here: decoupled=True vouches for it" if found == "unknown" else "is an L2 penalty or joins it"
        )
        raise InputError(
            "optimizer must decay its weights apart from the gradient, as torch.optim.AdamW does, got "
            f"{type(optimizer).__name__}, whose decay {why}"
        )


def _kind(base: type) -> str | None:
    try:
        return decay_kind(plain_name(base.__name__))
    except InputError:
        return None
