"""What every batch sampler must keep: call each check with a subject that makes yours.

    from batchlab.testing import samplers
    subject = samplers.Subject(lambda n, **given: MySampler(n, batch_size=16, **given))
    for check in samplers.CHECKS:
        check(subject)

A check raises `AssertionError` that says what was broken. `ranks_share` is for the ranks of a process group.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from batchlab.core.errors import InputError
from batchlab.data.batch_sampler import BatchSampler
from batchlab.data.stream import SampleStream


@dataclass(frozen=True)
class Subject:
    """A sampler to be held to the contract.

    make: `make(n, seed=, rank=, world_size=)` gives one over n examples, each of the three to be left out too.
    visits: how often an index comes in an epoch. "most" is at most once, as where a last batch is dropped.
    n: examples of the small checks, at least 30. huge: a number of examples at which drawing or storing all would
    be impossible; None where the sampler holds a number for each example.
    moves: whether a state loads into another world size.
    """

    make: Callable[..., BatchSampler]
    visits: Literal["once", "most", "any"] = "once"
    n: int = 240
    huge: int | None = 10**13
    moves: bool = True


class Numbers(Dataset[int]):
    """A data set of its own indices; `collate_fn=list` gives a batch as it was asked for."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def following(sampler: BatchSampler, count: int | None = None) -> list[list[int]]:
    """The next `count` batches, over as many epochs as they take; by default to the end of the present one."""
    if count is None and not endless(sampler):
        return list(sampler)

    def through() -> Iterator[list[int]]:
        while True:
            before = sampler.taken
            yield from sampler
            assert sampler.taken > before, "an epoch has no batch"

    return list(islice(through(), 12 if count is None else count))


def endless(sampler: BatchSampler) -> bool:
    """Whether its first epoch never ends."""
    return sampler.epoch_length(sampler.epoch) is None


def on_ranks(subject: Subject, world_size: int, **given: Any) -> list[BatchSampler]:
    """One for each rank."""
    return [subject.make(subject.n, rank=rank, world_size=world_size, **given) for rank in range(world_size)]


def visits_hold(found: list[int], subject: Subject, what: str) -> None:
    """Raises where the indices of an epoch are not those promised."""
    assert all(type(index) is int and 0 <= index < subject.n for index in found), f"{what}: no index of {subject.n}"
    if subject.visits != "any":
        assert len(set(found)) == len(found), f"{what}: an index comes twice in an epoch"
    if subject.visits == "once":
        assert len(found) == subject.n, f"{what}: {subject.n - len(found)} indices never come"


def epochs_are_whole(subject: Subject) -> None:
    """In each epoch the ranks' batches are equal in number, not empty, disjoint, and together what was promised."""
    for world_size in (1, 2, 3):
        samplers = on_ranks(subject, world_size)
        for epoch in range(2):
            what = f"world size {world_size}, epoch {epoch}"
            length = None if endless(samplers[0]) else len(samplers[0])
            ranks = [following(sampler) for sampler in samplers]
            assert len({len(batches) for batches in ranks}) == 1, f"{what}: ranks have unequally many batches"
            assert length in (None, len(ranks[0])), f"{what}: len() is {length}, there were {len(ranks[0])} batches"
            assert all(batch for batches in ranks for batch in batches), f"{what}: a batch is empty"
            if length is not None:
                visits_hold([index for batches in ranks for batch in batches for index in batch], subject, what)


def seeds_and_epochs_differ(subject: Subject) -> None:
    """Two samplers of one seed are equal; another seed and the next epoch give other batches."""
    one, again, other = (subject.make(subject.n, seed=seed) for seed in (3, 3, 4))
    first = following(one)
    assert first == following(again), "two samplers of one seed differ"
    assert first != following(other), "the seed changes nothing"
    assert first != following(one, len(first)), "the second epoch is the first"


def workers_change_nothing(subject: Subject) -> None:
    """A `DataLoader` gives the sampler's batches, with none and with two workers."""
    whole = following(subject.make(subject.n))
    for workers in (0, 2):
        sampler = subject.make(subject.n)
        loader = DataLoader(Numbers(subject.n), batch_sampler=sampler, collate_fn=list, num_workers=workers)
        found = list(islice(loader, len(whole)))
        assert found == whole, f"{workers} workers give other batches"
        state = json.loads(json.dumps(sampler.state_dict(batches=5)))
        resumed = subject.make(subject.n)
        resumed.load_state_dict(state)
        assert following(resumed, len(whole) - 5) == whole[5:], f"state_dict(batches=5) with {workers} workers"


def what_was_fetched_ahead_comes_back(subject: Subject) -> None:
    """Where a loop breaks off, a state of the batches trained on gives back what workers had fetched ahead; they may
    live on from loop to loop.
    """
    whole = following(subject.make(subject.n))
    for persistent in (False, True):
        sampler, numbers = subject.make(subject.n), Numbers(subject.n)
        ahead: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 3, "persistent_workers": persistent}
        loader = DataLoader(numbers, batch_sampler=sampler, collate_fn=list, **ahead)
        for trained in (0, 2):
            found = list(islice(loader, 2))
            assert found == whole[trained : trained + 2], f"persistent_workers={persistent}, after {trained} batches"
            assert sampler.taken > trained + 2, "nothing was fetched ahead, and so nothing was tested"
            sampler.load_state_dict(sampler.state_dict(batches=trained + 2))
        assert list(islice(loader, len(whole) - 4)) == whole[4:], f"persistent_workers={persistent}, the rest"


def other_libraries_integers_are_integers(subject: Subject) -> None:
    """NumPy's and torch's, which overflow and are no JSON, give the same batches and states as Python's."""
    for kind in (np.int16, torch.tensor):
        one, plain = subject.make(subject.n), subject.make(subject.n)
        for batches in (3, 1):
            found = json.dumps(one.state_dict(batches=kind(batches)))  # type: ignore[arg-type]
            assert found == json.dumps(plain.state_dict(batches=batches)), f"state_dict of {kind.__name__}"
        if not endless(plain):
            one.set_epoch(kind(1))  # type: ignore[arg-type]
            plain.set_epoch(1)
            assert json.dumps(one.state_dict()) == json.dumps(plain.state_dict()), f"set_epoch of {kind.__name__}"


def state_goes_round(subject: Subject) -> None:
    """Stopped anywhere, in the second epoch too, a fresh sampler goes on from the saved state; saved in JSON."""
    length = len(following(subject.make(subject.n)))
    draw = random.Random(0)
    for stop in (0, 1, length - 1, length, *draw.sample(range(2 * length), 3)):
        sampler = subject.make(subject.n)
        following(sampler, stop)
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = subject.make(subject.n)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == sampler.state_dict(), f"after {stop} batches: the state does not come back"
        assert following(resumed, length + 2) == following(sampler, length + 2), f"after {stop} batches"


def leaving_is_no_loss(subject: Subject) -> None:
    """A loop that breaks off, and `set_epoch` to the present epoch, lose no batch."""
    whole = following(subject.make(subject.n))
    sampler = subject.make(subject.n)
    found = []
    for batch in sampler:
        found.append(batch)
        if len(found) == 3:
            break
    sampler.set_epoch(0)
    assert found + following(sampler, len(whole) - 3) == whole, "a loop that breaks off loses a batch"
    if not endless(sampler):
        sampler.set_epoch(2)
        ahead = subject.make(subject.n)
        assert [following(ahead) for _ in range(3)][2] == following(sampler), "set_epoch(2) is not the third epoch"


def world_size_may_change(subject: Subject) -> None:
    """A state of two ranks loads into one and into three; the rest of the epoch is still what was promised."""
    if not subject.moves or endless(subject.make(subject.n)):
        return
    for world_size in (1, 3):
        before = on_ranks(subject, 2)
        seen = [index for sampler in before for batch in following(sampler, 4) for index in batch]
        after = on_ranks(subject, world_size)
        for sampler in after:
            sampler.load_state_dict(json.loads(json.dumps(before[0].state_dict())))
        ranks = [following(sampler) for sampler in after]
        assert len({len(batches) for batches in ranks}) == 1, f"2 to {world_size}: ranks have unequally many batches"
        rest = [index for batches in ranks for batch in batches for index in batch]
        visits_hold(seen + rest, subject, f"2 to {world_size}")


def resuming_is_no_work(subject: Subject) -> None:
    """A state of far ahead costs no more of the sample stream than the start; where it can be, among 10^13 examples."""
    drawn: list[int] = []
    real = SampleStream.indices

    def counting(self: SampleStream, start: int, count: int) -> Any:
        drawn.append(count)
        return real(self, start, count)

    with patch.object(SampleStream, "indices", counting):
        costs = []
        for batches in (0, 10**6 + 7):
            drawn.clear()
            sampler = subject.make(subject.n)
            sampler.load_state_dict(sampler.state_dict() | {"batches": batches})
            following(sampler, 1)
            costs.append(sum(drawn))
    assert costs[1] <= costs[0] + 2 * subject.n, f"the first batch draws {costs[0]}, that of a late state {costs[1]}"
    if subject.huge is not None:
        far = subject.make(subject.huge)
        length = far.epoch_length(0) or 10**12
        far.load_state_dict(far.state_dict(batches=length // 2))
        assert len({index for batch in following(far, 2) for index in batch}) > 1, "no batch in the middle"


def refusals(subject: Subject) -> None:
    """A rank beyond the ranks, no ranks, a negative seed, no examples and another's state are refused by name."""
    refused(lambda: subject.make(subject.n, rank=2, world_size=2), "rank")
    refused(lambda: subject.make(subject.n, world_size=0), "world_size")
    refused(lambda: subject.make(subject.n, seed=-1), "seed")
    refused(lambda: subject.make(0), "")
    sampler = subject.make(subject.n, seed=1)
    refused(lambda: sampler.load_state_dict(subject.make(subject.n, seed=2).state_dict()), "seed")
    refused(lambda: sampler.load_state_dict(subject.make(subject.n + 30, seed=1).state_dict()), "")
    refused(lambda: sampler.load_state_dict({}), "state_dict")
    refused(lambda: sampler.state_dict(batches=-1), "batches")


def refused(call: Callable[[], Any], word: str) -> None:
    """`call` must raise `ValueError` with a message that holds `word`."""
    try:
        call()
    except (InputError, ValueError) as error:
        assert word in str(error), f"the refusal does not name {word}: {error}"
    else:
        raise AssertionError(f"nothing was refused; it had to name {word or 'what is wrong'}")


def ranks_share(subject: Subject) -> None:
    """Made in each rank of the default process group, with neither rank nor size given, they share the epoch."""
    batches = following(subject.make(subject.n))
    flat = [index for batch in batches for index in batch]
    mine = torch.full((1 + 2 * subject.n,), -1)
    mine[0] = len(batches)
    mine[1 : 1 + len(flat)] = torch.tensor(flat)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    assert len({int(part[0]) for part in parts}) == 1, "ranks have unequally many batches"
    if not endless(subject.make(subject.n)):
        visits_hold([index for part in parts for index in part[1:].tolist() if index >= 0], subject, "real ranks")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    epochs_are_whole,
    seeds_and_epochs_differ,
    workers_change_nothing,
    what_was_fetched_ahead_comes_back,
    other_libraries_integers_are_integers,
    state_goes_round,
    leaving_is_no_loss,
    world_size_may_change,
    resuming_is_no_work,
    refusals,
)
