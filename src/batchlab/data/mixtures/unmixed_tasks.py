"""Unmixed task sampling: each batch is of one task, on all ranks (Li et al. 2023, Uni-Perceiver v2, arXiv 2211.09808).

At step t one task k is drawn for all ranks, with the probability s_k, and has the global batch to itself: contrastive
tasks then have all of it as negatives. The paper draws independently; here the tasks' order is that of `SourceOrder`:
the same share at each step, counts that stray less, and a formula for how many steps each task had before. The mode
"turn" is the round robin of the first Uni-Perceiver's code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from batchlab.core.checks import as_count, check_count, check_positive
from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.batch_sampler import BatchSampler, share_of
from batchlab.data.fetch import fetch
from batchlab.data.mixtures.source_order import SourceOrder
from batchlab.data.stream import SampleStream


class UnmixedTasks(BatchSampler):
    """Endless batches, each of one task, the same one on all ranks at each step.

        tasks = UnmixedTasks({"caption": 9000, "retrieval": 3000}, {"caption": 64, "retrieval": 256},
                             ratios={"caption": 0.75, "retrieval": 0.25})
        data = TaskData({"caption": captions, "retrieval": pairs})
        optimizer = MTAdamW(model.parameters(), lr=1e-3, ratios=tasks.ratios)
        for task, batch in DataLoader(data, batch_sampler=tasks, collate_fn=data.collate):
            losses[task](model, batch).backward()
            optimizer.step(task=task)
            optimizer.zero_grad()

    sizes: the examples of each task's data; indices are those of a `TaskData` or `ConcatDataset` in this order.
    batch_sizes: B_k over all ranks, in examples: one for all tasks, or one for each. Rank r gets its contiguous share.
    ratios: s_k, normalised, with a warning, where they do not sum to 1; equal by default. mode: "draw" by ratios, or
    "turn": one task after the other, ratios equal. micro_batch_sizes: the most examples of a rank's micro-batch, for
    `pieces`; one for all tasks or for each, by default the rank's whole share.

    Each task's examples come without replacement, and begin anew, shuffled, where they end: within a batch if need be,
    which may then hold an example twice. drop_last: never so; what fills no batch sits its data's epoch out. Take it
    for contrastive tasks, where a twin is a false negative, and gather features over ranks for their loss. All
    micro-batches of a step are of its task.

    Not where all tasks fit one batch and none needs the whole of it: mixed batches update each task at each step.

    >>> tasks = UnmixedTasks({"a": 6, "b": 3}, {"a": 4, "b": 2}, mode="turn", micro_batch_sizes=3)
    >>> batches = iter(tasks)
    >>> [(tasks.task_at(step), len(next(batches))) for step in range(3)], tasks.pieces("a")
    ([('a', 4), ('b', 2), ('a', 4)], [3, 1])
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int] | int,
        seed: int = 0,
        *,
        ratios: Mapping[str, float] | None = None,
        mode: Literal["draw", "turn"] = "draw",
        micro_batch_sizes: Mapping[str, int] | int | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        if not isinstance(sizes, Mapping) or not sizes:
            right = 'the examples of each task, as {"caption": 9000, "retrieval": 3000}'
            raise InputError(f"sizes must give {right}, got {sizes!r}")
        if mode not in ("draw", "turn"):
            raise InputError(f'mode must be "draw" or "turn", got {mode!r}')
        self.sizes = _each("sizes", sizes, sizes, 1)
        self.batch_sizes = _each("batch_sizes", batch_sizes, sizes, self.world_size)
        micro = self.batch_sizes if micro_batch_sizes is None else micro_batch_sizes
        self.micro_batch_sizes = _each("micro_batch_sizes", micro, sizes, 1)
        self.mode, self.drop_last = mode, bool(drop_last)
        for task, size in self.sizes.items() if drop_last else ():
            if self.batch_sizes[task] > size:
                batch = self.batch_sizes[task]
                raise InputError(
                    f"batch_sizes[{task!r}] must be at most its {size} examples with drop_last, got {batch}"
                )
        self.ratios = _ratios(ratios, self.sizes, mode)
        self._names = list(self.sizes)
        self._starts_of = np.cumsum([0, *self.sizes.values()])
        self._order = SourceOrder(list(self.ratios.values()), derive_seed(self.seed, "unmixed"))
        self._streams = [SampleStream(size, derive_seed(self.seed, "task", name)) for name, size in self.sizes.items()]

    def epoch_length(self, epoch: int) -> None:
        """The run of batches has no end."""
        return None

    def identity(self) -> dict[str, Any]:
        """Sizes, batch sizes, ratios and mode; micro-batches may change."""
        given = {"sizes": self.sizes, "batch_sizes": self.batch_sizes, "ratios": self.ratios}
        return given | {"mode": self.mode, "drop_last": self.drop_last, "tasks": self._names}

    def plan(self, epoch: int, first: int) -> Iterator[NDArray[np.int64]]:
        """This rank's share of each batch."""
        step = first
        while True:
            task, before = self._task(step)
            size = self.batch_sizes[self._names[task]]
            low, high = share_of(size, self.rank, self.world_size)
            yield self._starts_of[task] + self._streams[task].indices(self._start(task, before) + low, high - low)
            step += 1

    def task_at(self, step: int) -> str:
        """The task of the batch after `step` batches of the run: of all ranks."""
        return self._names[self._task(as_count(0, step=step))[0]]

    def pieces(self, task: str, examples: int | None = None) -> list[int]:
        """The sizes of a batch's micro-batches on this rank, for `torch.split`: all full but the last.

        examples: of the batch, by default this rank's share. Weigh each micro-batch's mean loss by its examples.
        """
        if task not in self.sizes:
            raise InputError(f"task must be one of {self._names}, got {task!r}")
        if examples is None:
            low, high = share_of(self.batch_sizes[task], self.rank, self.world_size)
            examples = high - low
        examples = as_count(examples=examples)
        most = self.micro_batch_sizes[task]
        return [min(most, examples - start) for start in range(0, examples, most)]

    def steps(self, batches: int | None = None) -> dict[str, int]:
        """Each task's steps among the run's first batches; by default among those handed out."""
        batches = self.taken if batches is None else as_count(0, batches=batches)
        if self.mode == "turn":
            return {name: (batches - at - 1) // len(self.sizes) + 1 for at, name in enumerate(self._names)}
        return dict(zip(self._names, self._order.before(batches).tolist(), strict=True))

    def epochs(self, batches: int | None = None) -> dict[str, float]:
        """Examples drawn of each task over those there are."""
        return {name: n * self.batch_sizes[name] / self.sizes[name] for name, n in self.steps(batches).items()}

    def _start(self, task: int, before: int) -> int:
        """The position in a task's stream of its batch after `before` of them."""
        name = self._names[task]
        if not self.drop_last:
            return before * self.batch_sizes[name]
        epoch, number = divmod(before, self.sizes[name] // self.batch_sizes[name])
        return epoch * self.sizes[name] + number * self.batch_sizes[name]

    def _task(self, step: int) -> tuple[int, int]:
        """The task of a step, and its steps before."""
        if self.mode == "turn":
            before, task = divmod(step, len(self.sizes))
            return task, before
        which, number = self._order.span(step, 1)
        return int(which[0]), int(number[0])


class TaskData(Dataset[tuple[str, Any]]):
    """The data of several tasks, one after the other; an example is (its task, the example).

    datasets: with lengths, by task. collates: of each task's examples; torch's own where a task has none.

    >>> data = TaskData({"a": [1, 2], "b": ["x"]})
    >>> len(data), data[2], data.collate([data[0], data[1]])
    (3, ('b', 'x'), ('a', tensor([1, 2])))
    """

    def __init__(
        self, datasets: Mapping[str, Any], collates: Mapping[str, Callable[[list[Any]], Any]] | None = None
    ) -> None:
        if not isinstance(datasets, Mapping):
            raise InputError(f"datasets must give each task's data, as {{'caption': data}}, got {datasets!r:.80}")
        if not datasets:
            raise InputError("datasets must hold one task at least, got none")
        if unknown := sorted(set(collates or {}) - set(datasets)):
            raise InputError(f"collates must name tasks of datasets, {list(datasets)}, got {unknown[0]!r}")
        self.datasets, self.collates = dict(datasets), dict(collates or {})
        self.sizes = {task: len(data) for task, data in self.datasets.items()}
        self._names = list(self.datasets)
        self._starts = np.cumsum([0, *self.sizes.values()])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[str, Any]]:
        """The examples, those of one task asked for at once where its data can."""
        task, within = self._place(indices)
        return [(task, example) for example in fetch(self.datasets[task], within, list)]

    def collate(self, examples: list[tuple[str, Any]]) -> tuple[str, Any]:
        """The task and its batch."""
        tasks = {task for task, _ in examples}
        if len(tasks) != 1:
            names = sorted(tasks, key=str)
            raise InputError(f"a batch must be of one task, got {names}: take batches from UnmixedTasks")
        (task,) = tasks
        return task, self.collates.get(task, default_collate)([example for _, example in examples])

    def _place(self, indices: Sequence[int]) -> tuple[str, list[int]]:
        """The one task of all indices, and their places in its data."""
        wrong = [index for index in indices if not 0 <= index < len(self)]
        if wrong:
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {wrong[0]}")
        tasks = {int(task) for task in np.searchsorted(self._starts, np.asarray(indices), side="right") - 1}
        if len(tasks) != 1:
            names = [self._names[task] for task in sorted(tasks)]
            raise InputError(f"a batch must be of one task, got {names}: take batches from UnmixedTasks")
        (task,) = tasks
        return self._names[task], [int(index) - int(self._starts[task]) for index in indices]


def _each(name: str, given: Mapping[str, int] | int, tasks: Mapping[str, int], least: int) -> dict[str, int]:
    if isinstance(given, Mapping):
        if given.keys() != tasks.keys():
            raise InputError(f"{name} must name the tasks {list(tasks)}, got {list(given)}")
        check_count(least, **{f"{name}[{task!r}]": count for task, count in given.items()})
        return {task: int(given[task]) for task in tasks}
    check_count(least, **{name: given})
    return dict.fromkeys(tasks, int(given))


def _ratios(ratios: Mapping[str, float] | None, tasks: Mapping[str, int], mode: str) -> dict[str, float]:
    if ratios is None:
        return dict.fromkeys(tasks, 1 / len(tasks))
    if not isinstance(ratios, Mapping) or ratios.keys() != tasks.keys():
        raise InputError(f"ratios must name the tasks {list(tasks)}, got {list(ratios)}")
    check_positive(**{f"ratios[{task!r}]": ratio for task, ratio in ratios.items()})
    ratios = {task: float(ratio) for task, ratio in ratios.items()}
    if mode == "turn" and len(set(ratios.values())) > 1:
        raise InputError(f'ratios must be equal with mode "turn", got {dict(ratios)}')
    total = sum(ratios.values())
    if not np.isclose(total, 1.0, rtol=1e-6):
        warnings.warn(f"ratios sum to {total:g}, not 1: they were divided by it", stacklevel=4)
    return {task: ratios[task] / total for task in tasks}
