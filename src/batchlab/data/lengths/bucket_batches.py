"""Batches of examples of like length, a batch size for each range of lengths, the same range on all ranks at each step.

Buckets and sizes after Żelasko et al. 2024 (EMMeTT, arXiv 2409.13523), several data sets after Chen et al. 2024 (BGE
M3-Embedding, arXiv 2402.03216, section 3.4): there as here a step has one data set and one range on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchlab.core.checks import check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.batch_sampler import BatchSampler
from batchlab.data.lengths.length_buckets import REJECTED, LengthBuckets
from batchlab.data.stream import SampleStream

_MOST_GROUPS = 10**7  # buckets times data sets, of 40 bytes and more each


class BucketBatchSampler(BatchSampler):
    """Each batch from one bucket, of that bucket's size; buckets come in random order, in proportion to their batches.

    lengths: shape (n,), or (n, 2) for input and output, in the unit of the buckets; what makes an example long is
    yours to say, as the longest of its texts. buckets: see `LengthBuckets`. Padding falls with their number (log-normal
    lengths: 30 leave 7 %, 60 leave 3.5 %); each costs one smaller batch in an epoch.
    sizes: examples of a batch on each rank, one for each bucket, or shape (data sets, buckets): `table.sizes` of
    `find_micro_batch(buckets=...)`, or `sizes_for_budget`. A batch over all ranks has world_size times as many.
    datasets: the data set of each example, integers from 0; a batch is then of one data set and one bucket.
    drop_last: leave out each bucket's last, smaller batch. Else every example that has a bucket comes once an epoch,
    but where a bucket's rest cannot give each rank an example and its size is 1 or it has no full batch: then these, at
    most world_size - 1 and others in each epoch, stay out of it. `report` counts them.

    Examples that no bucket takes are left out for good: `rejected` has them. Where all are rejected, or no bucket fills
    a batch, `InputError` is raised.

    Batches differ in size, so that a mean over each weighs short examples less than long ones, in a mean over batches.
    Let the loss of a step be the sum over all ranks' tokens divided by a constant, as `mean_tokens`, and report it by
    token. The learning rate is not changed by a table; it was tuned for the mean batch. Losses that depend on the batch
    size, as contrastive ones, cannot be compared between ranges.

    The state is a few integers a bucket. In memory there are 4 bytes an example (8 from 2^31 examples on) and 8 more of
    shuffles at most. Loaded into another world size, the rest of the epoch is planned anew, so that each example still
    comes once in it. Not for packed sequences, which have no padding, nor where the batch size must not vary.

    >>> sampler = BucketBatchSampler([3, 1, 9, 2, 8, 2], LengthBuckets([3, 9]), sizes=[2, 1])
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 1], [2], [3, 5], [4]]
    """

    EQUAL_EPOCHS = False

    def __init__(
        self,
        lengths: ArrayLike,
        buckets: LengthBuckets,
        sizes: Sequence[int] | Sequence[Sequence[int]],
        seed: int = 0,
        *,
        datasets: ArrayLike | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        _check_buckets(buckets)
        bucket = buckets.choose(lengths)
        group, kinds = _with_datasets(bucket, datasets, len(buckets))
        self.n, self.buckets, self.drop_last = len(bucket), buckets, bool(drop_last)
        self.sizes = _checked_sizes(sizes, kinds, len(buckets))
        narrow = np.int32 if self.n < 2**31 else np.int64
        order = np.argsort(group, kind="stable").astype(narrow)
        self.rejected: NDArray[Any] = order[: int((group == REJECTED).sum())]
        self._members = order[len(self.rejected) :]
        self._counts = np.bincount(group[group != REJECTED], minlength=len(self.sizes))
        self._begins = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
        of_each = np.asarray(lengths, dtype=np.float64).reshape(self.n, -1).sum(1)[group != REJECTED]
        self._tokens = np.bincount(group[group != REJECTED], weights=of_each, minlength=len(self.sizes))
        self._streams: dict[int, SampleStream] = {}
        self._since = _Since(0, 0, np.zeros_like(self._counts))
        self._kept: tuple[Any, NDArray[Any]] = (None, np.empty(0))
        if not self._batches(0).sum():
            why = f"{len(self.rejected)} of {self.n} examples are rejected"
            raise InputError(f"lengths must fill at least one batch of {self.world_size} ranks: {why}")

    def epoch_length(self, epoch: int) -> int:
        """Batches of the epoch; after a change of world size, of what was left of it."""
        return int(self._batches(epoch).sum())

    def start_of(self, epoch: int) -> int:
        """Batches of the run before the epoch, or before the world size changed in it."""
        since = self._since
        if epoch < since.epoch:
            raise InputError(f"epoch must be at least {since.epoch}, where the world size changed, got {epoch}")
        if epoch == since.epoch:
            return since.batch
        return since.batch + self.epoch_length(since.epoch) + (epoch - since.epoch - 1) * self.epoch_length(epoch)

    def locate(self, batches: int) -> tuple[int, int]:
        """The epoch and the place within it, or since the world size changed, of the batch after `batches` batches."""
        since = self._since
        ahead = batches - since.batch
        if ahead < 0:
            raise InputError(f"batches must be at least {since.batch}, where the world size changed, got {batches}")
        if ahead < (rest := self.epoch_length(since.epoch)):
            return since.epoch, ahead
        epochs, place = divmod(ahead - rest, self.epoch_length(since.epoch + 1))
        return since.epoch + 1 + epochs, place

    def plan(self, epoch: int, first: int) -> Iterator[NDArray[Any]]:
        """This rank's share of each batch, every world_size-th example of it."""
        order = self._order(epoch)
        done = np.bincount(order[:first], minlength=len(self.sizes)).tolist()
        used = self._used(epoch).tolist()
        for group in order[first:].tolist():
            start, end = self._span(group, done[group], used[group])
            done[group] += 1
            stream = self._streams.get(group)
            if stream is None:
                count = int(self._counts[group])
                stream = self._streams[group] = SampleStream(count, derive_seed(self.seed, "bucket", group))
            places = stream.indices(epoch * stream.n + start, end - start)[self.rank :: self.world_size]
            yield self._members[self._begins[group] + places]

    def _used(self, epoch: int) -> NDArray[Any]:
        return self._since.used if epoch == self._since.epoch else np.zeros_like(self._counts)

    def _batches(self, epoch: int) -> NDArray[Any]:
        """Of each group in the epoch."""
        return batches_of(self._counts - self._used(epoch), self.sizes, self.world_size, drop_last=self.drop_last)

    def _span(self, group: int, batch: int, used: int) -> tuple[int, int]:
        """Where the group's batch begins and ends among its shuffled members."""
        count, size = int(self._counts[group]) - used, int(self.sizes[group]) * self.world_size
        start, end = batch * size, min((batch + 1) * size, count)
        short = self.world_size - count % size if 0 < count % size < self.world_size else 0
        if short and not self.drop_last and int(self.sizes[group]) > 1:  # the last but one lends the last what it lacks
            start -= short if batch == count // size else 0
            end -= short if batch == count // size - 1 else 0
        return used + start, used + end

    def _order(self, epoch: int) -> NDArray[Any]:
        """The group of each batch of the epoch, or of what was left of it when the world size changed."""
        counts = self._batches(epoch)
        total, changed = int(counts.sum()), self._since.batch if epoch == self._since.epoch else 0
        if self._kept[0] != (key := (epoch, changed, self.world_size)):
            groups = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            shuffled = SampleStream(total, derive_seed(self.seed, "order", changed)).indices(epoch * total, total)
            self._kept = (key, groups[shuffled])
        return self._kept[1]

    @property
    def mean_tokens(self) -> float:
        """The mean length in all of a batch over all ranks, input and output together: to divide a sum of losses by.

        Of a bucket that leaves out a part of its examples, the mean over epochs.
        """
        shares = self._visited() / np.maximum(self._counts, 1)
        return float((self._tokens * shares).sum()) / self.epoch_length(self._since.epoch + 1)

    def _visited(self) -> NDArray[Any]:
        """Examples of each group in a whole epoch."""
        batches = self._batches(self._since.epoch + 1).tolist()
        return np.array([self._span(group, count - 1, 0)[1] if count else 0 for group, count in enumerate(batches)])

    def report(self) -> dict[str, Any]:
        """What an epoch is made of: examples, rejected, left out, batches; and a row for each bucket in use."""
        batches, visited = self._batches(self._since.epoch + 1), self._visited().tolist()
        rows = []
        for group in np.flatnonzero(self._counts).tolist():
            dataset, bucket = divmod(group, len(self.buckets))
            count, size, edge = int(self._counts[group]), int(self.sizes[group]), self.buckets.edges[bucket]
            row = {"dataset": dataset, "up_to": edge, "examples": count, "left_out": count - visited[group]}
            rows.append(row | {"size": size, "size_over_ranks": size * self.world_size, "batches": int(batches[group])})
        left_out = int(self._counts.sum()) - sum(visited)
        found = {"examples": self.n, "rejected": len(self.rejected), "left_out": left_out}
        return found | {"batches": int(batches.sum()), "buckets": rows}

    def identity(self) -> dict[str, Any]:
        """What a state must have in common: the number of examples in each bucket stands for the lengths."""
        groups = {"counts": self._counts.tolist(), "sizes": self.sizes.tolist()}
        return {"n": self.n, "drop_last": self.drop_last, **groups}

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """As of every batch sampler; with the world size, and where in the run another was before."""
        since = {"batch": self._since.batch, "epoch": self._since.epoch, "used": self._since.used.tolist()}
        state = super().state_dict(batches)
        self.locate(state["batches"])
        return state | {"world_size": self.world_size, "since": since}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where the state was taken; with another world size, with the rest of that epoch planned anew."""
        before = self._taken, self._since, self.world_size
        self._kept = (None, np.empty(0))
        super().load_state_dict(state_dict)
        try:
            since = state_dict["since"]
            used = np.asarray(since["used"], dtype=self._counts.dtype)
            if used.shape != self._counts.shape or (used < 0).any() or (used > self._counts).any():
                raise ValueError("used examples of other buckets")
            self._since = _Since(since["batch"], since["epoch"], used)
            check_count(world_size=state_dict["world_size"])
            self.world_size = int(state_dict["world_size"])
            epoch, place = self.locate(self._taken)
            if self.world_size != before[2]:
                done = np.bincount(self._order(epoch)[:place], minlength=len(self.sizes))
                used = self._used(epoch).copy()
                for group in np.flatnonzero(done).tolist():
                    used[group] = self._span(group, int(done[group]) - 1, int(used[group]))[1]
                self._since = _Since(self._taken, epoch, used)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            self._taken, self._since = before[:2]
            raise InputError("state_dict must hold 'world_size' and 'since' of a BucketBatchSampler") from error
        finally:
            self.world_size = before[2]


class _Since:
    """From which batch of the run on the present world size holds, in which epoch, and what was used of it before."""

    def __init__(self, batch: int, epoch: int, used: NDArray[Any]) -> None:
        self.batch, self.epoch, self.used = batch, epoch, used


def _check_buckets(buckets: LengthBuckets) -> None:
    if not isinstance(buckets, LengthBuckets):
        raise InputError(f"buckets must be LengthBuckets, as LengthBuckets(table.buckets), got {buckets!r}")


def _with_datasets(
    bucket: NDArray[np.int64], datasets: ArrayLike | None, buckets: int
) -> tuple[NDArray[np.int64], int]:
    """The group of each example, data set by data set and within it by bucket; and the number of data sets."""
    if datasets is None:
        return bucket, 1
    which = _array(datasets)
    if which.shape != bucket.shape or which.dtype.kind not in "iu" or which.min() < 0:
        raise InputError(f"datasets must be an integer >= 0 for each of {len(bucket)} examples, got {datasets!r}")
    kinds = int(which.max()) + 1
    if kinds * buckets > _MOST_GROUPS:
        raise InputError(f"datasets must be numbered from 0 on, got {kinds - 1}: memory grows with the largest number")
    return np.where(bucket == REJECTED, REJECTED, which.astype(np.int64) * buckets + bucket), kinds


def _checked_sizes(sizes: ArrayLike, kinds: int, buckets: int) -> NDArray[np.int64]:
    """One for each group."""
    table = _array(sizes)
    if table.shape not in ((buckets,), (kinds, buckets)):
        right = f"{buckets} numbers, one for each bucket" + (f", or {kinds} rows of them" if kinds > 1 else "")
        raise InputError(f"sizes must be {right}, got shape {table.shape}")
    if table.dtype.kind not in "iu" or table.min() < 1:
        raise InputError(f"sizes must be integers of at least 1, got {sizes!r}")
    return np.broadcast_to(table, (kinds, buckets)).reshape(-1).astype(np.int64)


def _array(given: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(given)
    except ValueError:  # rows of several lengths: of no shape that is asked for
        return np.empty((0, 0, 0))


def batches_of(counts: ArrayLike, sizes: ArrayLike, world_size: int, *, drop_last: bool) -> NDArray[Any]:
    """Batches over all ranks that `counts` examples of each bucket give, at `sizes` on each rank.

    >>> batches_of([10, 8, 9, 3], [2, 2, 1, 4], world_size=4, drop_last=False)
    array([2, 1, 2, 0])
    """
    count, size = np.asarray(counts), np.asarray(sizes)
    full, rest = np.divmod(count, size * world_size)
    if drop_last:
        return full
    shared = (rest >= world_size) | ((rest > 0) & (full > 0) & (size > 1))
    return full + shared


def sizes_for_budget(buckets: LengthBuckets, tokens: float, quadratic: float | None = None) -> list[int]:
    """Examples of a batch for each bucket, so that count x longest stays within `tokens`, on each rank.

    The longest is the bucket's edge, of pairs the sum of both. quadratic: a length L counts as L + L²/quadratic, for
    models whose cost grows with L² (lhotse advises 15 to 40 seconds of speech); None counts L.

    >>> sizes_for_budget(LengthBuckets([100, 500, 1000]), tokens=4000)
    [40, 8, 4]
    """
    _check_buckets(buckets)
    check_positive(tokens=tokens)
    if quadratic is not None:
        check_positive(quadratic=quadratic)
    sizes = []
    for edge in buckets.edges:
        longest = sum(edge) if isinstance(edge, tuple) else edge
        cost = longest + (longest * longest / quadratic if quadratic else 0)
        if cost > tokens:
            raise InputError(
                f"tokens must suffice for one example of every bucket: {edge} takes {cost:g}, got {tokens}"
            )
        if not cost:
            raise InputError(f"edges must be > 0 for a budget, got {edge}")
        sizes.append(int(tokens // cost))
    return sizes
