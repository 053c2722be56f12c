"""How many sequences of each bucket a run takes, so that its tokens come out exactly (Pouransari et al. 2024).

Every step has the same tokens, so a bucket of length L gives tokens_per_step / L sequences to one. A bucket's share of
the run is its share of the data, in whole units: of a batch, or of whatever the data comes in, such as the shards of
`get_dd_params.py` in `apple/ml-dataset-decomposition`. That script leaves its search by an index of -1, after one more
change of the longest bucket, and so misses the nearest total by a unit in its own example; `released=True` does too,
with the script's own counts on 299 random data sets (on one more it leaves a bucket out, which is refused here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batchlab.core.checks import check_count, is_count
from batchlab.core.errors import InputError


@dataclass(frozen=True)
class DecompositionPlan:
    """What a run takes of each bucket, shortest first. Made by `plan_decomposition`.

    lengths: L, in tokens. units: the sequences that come together. units_per_cycle: how many of them a cycle takes.
    batch: sequences of a step, of all ranks together. available: sequences there are. cycles: of the run.
    wanted_tokens: what was asked for; None for one pass. nearest_tokens: the total that can be reached nearest to it,
    by whole units and with no bucket left out.
    """

    lengths: tuple[int, ...]
    units: tuple[int, ...]
    units_per_cycle: tuple[int, ...]
    batch: tuple[int, ...]
    available: tuple[int, ...]
    cycles: int
    wanted_tokens: int | None
    nearest_tokens: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, of all ranks together."""
        return self.lengths[0] * self.batch[0]

    @property
    def sequences_per_cycle(self) -> tuple[int, ...]:
        """Sequences of each bucket in a cycle."""
        return tuple(unit * count for unit, count in zip(self.units, self.units_per_cycle, strict=True))

    @property
    def batches_per_cycle(self) -> tuple[int, ...]:
        """Steps of each bucket in a cycle."""
        return tuple(count // batch for count, batch in zip(self.sequences_per_cycle, self.batch, strict=True))

    @property
    def tokens_per_cycle(self) -> int:
        """Tokens of a cycle: its steps times `tokens_per_step`."""
        return sum(count * length for count, length in zip(self.sequences_per_cycle, self.lengths, strict=True))

    @property
    def total_tokens(self) -> int:
        """Tokens of the run as planned."""
        return self.cycles * self.tokens_per_cycle

    @property
    def repeats(self) -> tuple[float, ...]:
        """How often the run takes a sequence of each bucket, in the mean; above 1 data comes again."""
        taken = [self.cycles * count for count in self.sequences_per_cycle]
        return tuple(many / there for many, there in zip(taken, self.available, strict=True))

    def summary(self) -> str:
        """What is planned, what was wanted, and what is nearer to it, in a sentence."""
        steps = sum(self.batches_per_cycle)
        text = f"{self.total_tokens:,} tokens in {self.cycles} cycles of {steps:,} steps of {self.tokens_per_step:,}"
        if self.wanted_tokens is not None and self.total_tokens != self.wanted_tokens:
            text += f"; {self.wanted_tokens:,} were wanted"
            if self.total_tokens != self.nearest_tokens:
                text += f", {self.nearest_tokens:,} are the nearest in whole units"
        return text


def plan_decomposition(
    available: Sequence[int],
    lengths: Sequence[int],
    *,
    tokens_per_step: int,
    cycles: int = 8,
    total_tokens: int | None = None,
    units: Sequence[int] | None = None,
    balanced: bool = False,
    released: bool = False,
) -> DecompositionPlan:
    """Plans a run over buckets of `available` sequences of these lengths, ascending.

    tokens_per_step: of all ranks together; divisible by every length. cycles: 8 is the paper's. total_tokens: of the
    run, with the buckets' shares as they are in the data; more than there are means that data comes again. By default
    one pass over the data, each bucket down to whole units a cycle. units: sequences of each bucket that must come
    together, a multiple of its batch, which is the default. balanced: every bucket gives as many steps as the one
    that has the fewest (OLMo-core's option); only without `total_tokens`. released: adjust as the released script
    does, for runs that must match it.

    The rounded counts are adjusted in the longest bucket, then in shorter ones, to the nearest total. Raises
    `InputError` that names the bucket where one has not a single unit a cycle.

    >>> plan = plan_decomposition([100, 40, 30], [64, 128, 256], tokens_per_step=512, cycles=2, total_tokens=8_192)
    >>> plan.batches_per_cycle, plan.summary()
    ((3, 2, 3), '8,192 tokens in 2 cycles of 8 steps of 512')
    """
    batch = _batches(available, lengths, tokens_per_step)
    available, lengths = _ints(available), _ints(lengths)  # Python's, which do not overflow
    units = batch if units is None else units
    _check_units(units, batch, lengths)
    units = _ints(units)
    check_count(cycles=cycles)
    cycles = int(cycles)
    tokens = [unit * length for unit, length in zip(units, lengths, strict=True)]
    if total_tokens is None:
        counts = [there // (unit * cycles) for there, unit in zip(available, units, strict=True)]
        if balanced:
            steps = min(count * unit // size for count, unit, size in zip(counts, units, batch, strict=True))
            counts = [steps * size // unit for unit, size in zip(units, batch, strict=True)]
        nearest = counts
    else:
        check_count(total_tokens=total_tokens)
        total_tokens = int(total_tokens)
        if balanced:
            raise InputError(
                "balanced and total_tokens cannot both be given: the one sets the counts, so does the other"
            )
        there = sum(count * length for count, length in zip(available, lengths, strict=True))
        counts = [
            round(total_tokens * count / (there * cycles * unit)) for count, unit in zip(available, units, strict=True)
        ]
        nearest = nearest_counts(counts, tokens, total_tokens, cycles)
        counts = released_counts(counts, tokens, total_tokens, cycles) if released else nearest
    for at, count in enumerate(counts):
        if count < 1:
            raise InputError(
                f"the bucket of length {lengths[at]} has no full batch a cycle: of its {available[at]} sequences, in "
                f"units of {units[at]}, {cycles} cycles get none; take fewer cycles or tokens a step, or leave it out"
            )
    total = cycles * sum(count * size for count, size in zip(nearest, tokens, strict=True))
    return DecompositionPlan(lengths, units, _ints(counts), batch, available, int(cycles), total_tokens, int(total))


def nearest_counts(counts: Sequence[int], tokens: Sequence[int], total_tokens: int, cycles: int) -> list[int]:
    """The counts with one of them changed, so that cycles · Σ counts · tokens comes nearest to the total.

    tokens: of a unit of each bucket. The longest bucket is changed where a shorter one does no better.
    """
    best, found = None, list(counts)
    missing = total_tokens - cycles * sum(count * size for count, size in zip(counts, tokens, strict=True))
    for at in range(len(counts) - 1, -1, -1):
        step = cycles * tokens[at]
        for change in (missing // step, missing // step + 1):
            away = abs(missing - change * step)
            if counts[at] + change >= 1 and (best is None or away < best):
                best, found = away, [count + change * (i == at) for i, count in enumerate(counts)]
    return found


def released_counts(counts: Sequence[int], tokens: Sequence[int], total_tokens: int, cycles: int) -> list[int]:
    """As `get_dd_params.py` adjusts them, by one unit at a time.

    From the longest bucket it goes to the next shorter one when counts come again, and past the shortest to -1, the
    longest once more, which is changed a last time.
    """
    counts, at, tried = list(counts), len(counts) - 1, set()
    while (
        missing := total_tokens - cycles * sum(c * size for c, size in zip(counts, tokens, strict=True))
    ) and at >= 0:
        at -= tuple(counts) in tried
        tried.add(tuple(counts))
        counts[at] += -1 if missing < 0 else 1
    return counts


def _batches(available: Sequence[int], lengths: Sequence[int], tokens_per_step: int) -> tuple[int, ...]:
    """Sequences of each bucket in a step."""
    check_count(tokens_per_step=tokens_per_step)
    if len(available) != len(lengths) or not len(lengths):
        raise InputError(
            f"available must have one count for each of the lengths, got {len(available)} and {len(lengths)}"
        )
    if not all(map(is_count, lengths)) or any(a >= b for a, b in pairwise(lengths)):
        raise InputError(f"lengths must be integers of at least 1, ascending, got {list(lengths)}")
    for length, count in zip(lengths, available, strict=True):
        if not is_count(count, 1):
            raise InputError(
                f"the bucket of length {length} must have at least 1 sequence, got {count!r}: leave it out"
            )
    for length in reversed(lengths):
        if tokens_per_step % length:
            raise InputError(
                f"tokens_per_step must be a multiple of the bucket of length {length}, got {tokens_per_step}"
            )
    return _ints([tokens_per_step // length for length in lengths])


def _ints(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(each) for each in numbers)


def _check_units(units: Sequence[int], batch: Sequence[int], lengths: Sequence[int]) -> None:
    if len(units) != len(batch):
        raise InputError(f"units must have one number for each of the {len(batch)} buckets, got {len(units)}")
    for unit, size, length in zip(units, batch, lengths, strict=True):
        if not is_count(unit) or unit % size:
            raise InputError(
                f"units must be multiples of a batch: {size} sequences in the bucket of length {length}, got {unit}"
            )
