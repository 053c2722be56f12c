"""How much of an update the optimizer's own step takes, and the batch from which on that is little.

  share = t / (k·(a + b·B) + t)

t: seconds of one optimizer step, the same whatever the batch. a + b·B: seconds of a forward and backward pass over a
micro-batch of B, a per pass and b per example. k: passes an update. All are of one device; with sharded optimizer state
t is that of the rank's share. Elementwise optimizers take a per cent or so; learned ones, second-order ones and small
batches are what this is for (PyLO, Janson et al. 2025, arXiv 2506.10315: a plain learned optimizer at batch 32 took
four fifths of the time).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from batchlab.core.checks import check_count, check_inside, check_not_negative, check_positive
from batchlab.core.errors import InputError
from batchlab.optim.learned.features import FEATURES, factored_dims

STATE_ELEMENTS = {"sgd": 0, "sgd_momentum": 1, "lars": 1, "adam": 2, "adamw": 2, "lamb": 2}


def optimizer_share(
    optimizer_seconds: float,
    micro_batch: float,
    *,
    fixed_seconds: float = 0.0,
    example_seconds: float,
    accumulation: int = 1,
) -> float:
    """The optimizer's share of an update, in [0, 1).

    optimizer_seconds: t, of one step. micro_batch: B, examples of a pass. fixed_seconds, example_seconds: a, b.
    accumulation: k, passes an update. It falls with B and with k. Raises `InputError` for what is out of range.

    >>> optimizer_share(0.1, 32, fixed_seconds=0.02, example_seconds=0.0025)
    0.5
    >>> optimizer_share(0.1, 32, fixed_seconds=0.02, example_seconds=0.0025, accumulation=9)
    0.1
    """
    _check(optimizer_seconds, fixed_seconds, example_seconds)
    check_positive(micro_batch=micro_batch)
    check_count(accumulation=accumulation)
    return optimizer_seconds / (accumulation * (fixed_seconds + example_seconds * micro_batch) + optimizer_seconds)


def least_accumulation(
    share: float, optimizer_seconds: float, micro_batch: float, *, fixed_seconds: float = 0.0, example_seconds: float
) -> int:
    """The fewest passes an update for the optimizer to take at most `share` of it; `share` in (0, 1).

    >>> least_accumulation(0.1, 0.1, 32, fixed_seconds=0.02, example_seconds=0.0025)
    9
    """
    check_inside(share=share)
    _check(optimizer_seconds, fixed_seconds, example_seconds)
    check_positive(micro_batch=micro_batch)
    seconds = fixed_seconds + example_seconds * micro_batch
    return _least(_wanted(share, optimizer_seconds) / seconds, lambda k: k * seconds, share, optimizer_seconds)


def least_batch(
    share: float,
    optimizer_seconds: float,
    *,
    fixed_seconds: float = 0.0,
    example_seconds: float,
    micro_batch: int | None = None,
) -> int:
    """The smallest batch, in examples, of which the optimizer's step takes at most `share`, in (0, 1).

    micro_batch: the batch is whole passes of this size, by `least_accumulation`; None: one pass. With the micro-batch
    left free the smallest product would be many passes of one example, slow enough for the optimizer not to show:
    give the size at which the passes run well.

    >>> least_batch(0.1, 0.1, fixed_seconds=0.02, example_seconds=0.0025)
    352
    >>> least_batch(0.1, 0.1, fixed_seconds=0.02, example_seconds=0.0025, micro_batch=32)
    288
    """
    times = {"fixed_seconds": fixed_seconds, "example_seconds": example_seconds}
    if micro_batch is not None:
        check_count(micro_batch=micro_batch)
        return micro_batch * least_accumulation(share, optimizer_seconds, micro_batch, **times)
    check_inside(share=share)
    _check(optimizer_seconds, fixed_seconds, example_seconds)
    wanted = (_wanted(share, optimizer_seconds) - fixed_seconds) / example_seconds
    return _least(wanted, lambda b: fixed_seconds + example_seconds * b, share, optimizer_seconds)


def state_elements(shapes: Iterable[Sequence[int]], optimizer: str = "learned") -> float:
    """Numbers of state a parameter, over tensors of these shapes; for bytes, times 4 where it is float32.

    optimizer: "learned" for `LearnedOptimizer`, 4 and its factored averages, or one of `STATE_ELEMENTS`. The counters
    of steps are left out. Raises `InputError` for another name or no parameters.

    >>> state_elements([(512, 512), (512,)], "adamw")
    2.0
    >>> round(state_elements([(512, 512), (512,)]), 4)
    4.0175
    """
    sizes = [tuple(shape) for shape in shapes]
    parameters = sum(math.prod(shape) for shape in sizes)
    if not parameters:
        raise InputError(f"shapes must hold a parameter, got {sizes!r}")
    if optimizer == "learned":
        return sum(_learned(shape) for shape in sizes) / parameters
    if optimizer not in STATE_ELEMENTS:
        raise InputError(f"optimizer must be one of {['learned', *STATE_ELEMENTS]}, got {optimizer!r}")
    return float(STATE_ELEMENTS[optimizer])


def learned_temporary_bytes(chunk: int, hidden: int = 32, element_bytes: int = 4) -> int:
    """The most that `LearnedOptimizer` holds for a chunk: its features, and what they are made of or two hidden layers.

    Apart from it there is the tensor's g².

    >>> learned_temporary_bytes(4096)
    1507328
    """
    check_count(chunk=chunk, hidden=hidden, element_bytes=element_bytes)
    return element_bytes * chunk * (FEATURES + max(FEATURES, 2 * hidden))


def _learned(shape: tuple[int, ...]) -> int:
    """Three momenta and an average of squares; three averages of squares by rows and columns, or in full."""
    size, dims = math.prod(shape), factored_dims(shape)
    if dims is None:
        return 7 * size
    return 4 * size + sum(3 * (size // shape[d]) for d in dims if shape[d])


def _wanted(share: float, optimizer_seconds: float) -> float:
    return optimizer_seconds * (1 - share) / share


def _least(wanted: float, seconds: Callable[[int], float], share: float, optimizer_seconds: float) -> int:
    """The smallest count from 1 on that reaches the share: the ceiling, put right for rounding."""
    count = max(1, math.ceil(wanted))
    if count > 1 and optimizer_seconds / (seconds(count - 1) + optimizer_seconds) <= share:
        return count - 1
    return count if optimizer_seconds / (seconds(count) + optimizer_seconds) <= share else count + 1


def _check(optimizer_seconds: float, fixed_seconds: float, example_seconds: float) -> None:
    check_not_negative(optimizer_seconds=optimizer_seconds, fixed_seconds=fixed_seconds)
    check_positive(example_seconds=example_seconds)
    if math.inf in (optimizer_seconds, fixed_seconds):
        raise InputError(f"seconds must be finite, got {optimizer_seconds!r} and {fixed_seconds!r}")
