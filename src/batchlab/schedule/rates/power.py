"""The power schedule: η(n) = min(η_max, β·a·n^b) of tokens n and batch β (Shen et al. 2024, arXiv 2408.13359).

The best rate of a warm-up-stable-decay run of T tokens is β·a·T^b in their sweeps: 12M, 36M and 121M parameters under
μP, 2 to 256 billion tokens, 16 to 512 sequences of 4,096 tokens; γ = η/β = 4.6·T^-0.51 over all three, from the
three best batch sizes of each T. Written over the tokens so far it needs no T, and one (a, b) serves any run length and
batch; they run a = 4, b = -0.51, η_max = 0.02, warm-up 10^9 tokens, and cool down exponentially to 0.

β counts sequences, n tokens. In tokens β·a·n^b would never leave the cap. The code they released (IBM's lm-engine)
multiplies by no batch: its `a` is βa here. It has no cool-down branch either: that is a second run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from batchlab.core.checks import check_count, check_not_negative, check_positive, holds
from batchlab.core.errors import InputError
from batchlab.rules.fit.power_laws import PowerLaw, power_law
from batchlab.schedule.rates.cooled import Cooled, Shape, check_shape, check_span, cool_down

A, B, LR_MAX = 4.0, -0.51, 0.02


def power_rate(
    tokens: float,
    *,
    batch: float,
    a: float = A,
    b: float = B,
    lr_max: float = LR_MAX,
    warmup: float = 0,
    total: float | None = None,
    decay: float | None = None,
    shape: Shape = "exponential",
    floor: float = 0.0,
) -> float:
    """The rate after `tokens`, with p(n) = min(η_max, β·a·n^b).

    n/W·p(W) in the warm-up, p(n), then f·p(N - D) over the last `decay` tokens: the cool-down multiplies the rate it
    began at, not p(n). The cap holds for p, and the warm-up multiplies what is capped. p(0) is the cap.

    batch: β, in sequences. warmup, total, decay: W, N and D, in tokens. shape, floor: f, see `cooled`.

    >>> round(power_rate(1e12, batch=1024), 8), power_rate(1e10, batch=1024), power_rate(0, batch=1024)
    (0.00310713, 0.02, 0.02)
    """
    check_not_negative(tokens=tokens)
    _check_law(a, b)
    check_positive(batch=batch, lr_max=lr_max)
    check_span(warmup, total, decay)
    check_shape(shape, floor)
    if tokens < warmup:
        return tokens / warmup * _capped(warmup, batch * a, b, lr_max)
    if total is None or decay is None or tokens <= total - decay:
        return _capped(tokens, batch * a, b, lr_max)
    start = total - decay
    return cool_down((tokens - start) / decay, shape, floor) * _capped(start, batch * a, b, lr_max)


def _capped(tokens: float, amplitude: float, b: float, lr_max: float) -> float:
    if tokens == 0:
        return lr_max
    try:
        return min(lr_max, amplitude * math.pow(tokens, b))
    except OverflowError:
        return lr_max


def _check_law(a: float, b: float) -> None:
    check_positive(a=a)
    if not holds(lambda value: -math.inf < value < 0, b):
        raise InputError(f"b must be finite and < 0, got {b!r}")


class Power(Cooled):
    """`power_rate` over the tokens seen, for AdamW and its like.

    optimizer: the rate of its first group is the cap η_max, which the paper sets to 0.02; every other group keeps its
    ratio to it, as with μP's η/width for hidden matrices. lr_max: the η_max that those ratios are taken to, where the
    first group is one of those. a, b: of the paper, by default; a law of your own comes from `fit_power_law`.
    batch: β, sequences of an update over all ranks and micro-batches. tokens_per_sequence: so that `step()` counts
    batch·tokens_per_sequence tokens; `step(count)` takes the tokens where they differ. Set `schedule.batch` when the
    batch changes: the next update has the rate of the new β at once.
    warmup, total, decay, shape, floor: as `power_rate`'s; without total and decay `start_decay(over=...)` ends the run.

    The law is of μP's base rate and of batches below the critical one; far above it a rate in proportion to β is too
    high, and the cap is all that holds it. Not for SGD, of which it was not measured.

    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    >>> schedule = Power(optimizer, batch=256, tokens_per_sequence=4096)
    >>> schedule.step(10**12)
    >>> round(schedule.get_last_lr()[0], 9)
    0.000776783
    >>> schedule.batch = 512
    >>> round(schedule.get_last_lr()[0], 9)
    0.001553567
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch: int,
        tokens_per_sequence: int,
        a: float = A,
        b: float = B,
        lr_max: float | None = None,
        warmup: int = 0,
        total: int | None = None,
        decay: int | None = None,
        shape: Shape = "exponential",
        floor: float = 0.0,
    ) -> None:
        _check_law(a, b)
        check_count(tokens_per_sequence=tokens_per_sequence)
        if lr_max is not None:
            check_positive(lr_max=lr_max)
        self.a, self.b, self._lr_max = a, b, lr_max
        self.tokens_per_sequence = operator.index(tokens_per_sequence)
        super().__init__(optimizer, batch=batch, warmup=warmup, total=total, decay=decay, shape=shape, floor=floor)

    @property
    def lr_max(self) -> float:
        """η_max, to which the groups' own rates are in proportion."""
        return float(self.base_lrs[0]) if self._lr_max is None else self._lr_max

    @property
    def units(self) -> int:
        """The tokens of an update of `batch` sequences."""
        return self._batch * self.tokens_per_sequence

    def rate(self, seen: int, base_lr: float) -> float:
        """`power_rate` times the group's own rate over η_max."""
        lr_max = self.lr_max
        rate = power_rate(
            seen,
            batch=self._batch,
            a=self.a,
            b=self.b,
            lr_max=lr_max,
            warmup=self.warmup,
            total=self.total,
            decay=self.decay,
            shape=self.shape,
            floor=self.floor,
        )
        return base_lr / lr_max * rate

    def _rebatch(self, batch: int) -> None:
        super()._rebatch(batch)
        self._write()


class Trial(NamedTuple):
    """One run of a sweep. batch: sequences. tokens: of the whole run. loss: its last, inf or NaN if it diverged."""

    batch: float
    tokens: float
    learning_rate: float
    loss: float


def fit_power_law(trials: Iterable[Trial | tuple[float, float, float, float]], *, best_batches: int = 3) -> PowerLaw:
    """η/β = a·T^b through the best rate of each batch and run length: `.a.value` and `.exponent.value` are `Power`'s.

    trials: warm-up-stable-decay runs, as (batch, tokens, learning_rate, loss), over at least three run lengths. Several
    of one batch, length and rate count by their mean loss; where one of them diverged, the rate is out.
    best_batches: of each run length only so many batch sizes of least loss are fitted, 3 in the paper: batches far
    above the critical one do not follow the law. The paper averages their η/β; here each is a point.

    Read the intervals. `a` is the value at one token, far from any data: over 2 to 128 billion tokens a scatter of 5 %
    leaves it 14 % of uncertainty, so hand on a and b of one fit together. The note says where a best rate lies at an
    end of those that were tried: such a point bounds the law and does not measure it.

    >>> runs = [(beta, t, beta * 4 * t**-0.5, 1.0) for beta in (32, 64) for t in (1e9, 4e9, 16e9)]
    >>> law = fit_power_law(runs)
    >>> round(law.a.value, 6), round(law.exponent.value, 6)
    (4.0, -0.5)
    """
    check_count(best_batches=best_batches)
    rows = sorted(Trial(*trial) for trial in trials)
    for row in rows:
        check_positive(batch=row.batch, tokens=row.tokens, learning_rate=row.learning_rate)
    best: dict[float, list[Trial]] = {}
    at_an_end = []
    for _, each in groupby(rows, key=lambda row: (row.batch, row.tokens)):
        rates = [_mean(list(runs)) for _, runs in groupby(each, key=lambda row: row.learning_rate)]
        finite = [run for run in rates if math.isfinite(run.loss)]
        if finite:
            least = min(finite, key=lambda run: run.loss)
            best.setdefault(least.tokens, []).append(least)
            if len(rates) > 1 and least in (rates[0], rates[-1]):
                at_an_end.append(least)
    kept = [run for runs in best.values() for run in sorted(runs, key=lambda run: run.loss)[:best_batches]]
    law = power_law(
        [run.tokens for run in kept],
        [run.learning_rate / run.batch for run in kept],
        x_name="tokens",
        y_name="learning_rate_per_sequence",
    )
    ends = [f"batch {run.batch:g} at {run.tokens:g} tokens" for run in kept if run in at_an_end]
    if not ends:
        return law
    return replace(law, note="the best rate is an end of those tried for " + ", ".join(ends))


def _mean(runs: list[Trial]) -> Trial:
    return runs[0]._replace(loss=sum(run.loss for run in runs) / len(runs))
