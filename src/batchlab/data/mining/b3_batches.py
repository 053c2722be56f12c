"""B3, smart batch mining for contrastive training (Thirukovalluru et al. 2025, arXiv 2505.11293).

A teacher's ranks just below the top say which examples should meet; METIS cuts that graph into clusters of K; a batch
is |B|/K whole clusters, drawn anew each epoch. In-batch negatives become hard ones at no further forward pass.

  S_i = R_i[p : p + m],  edge {i, j} iff j in S_i and i in S_j       `similarity_graph`
  N // K parts, few edges cut, made equal                            `partition`
  batch = |B|/K clusters at random without replacement, each epoch    `B3Batches`

The golden target is taken out of R_i first, then p ranks are skipped; the paper does not say which comes first. It does
not say either how uneven parts are made equal, nor what becomes of the N mod K examples that fill no cluster: here they
take the places of as many others, drawn anew each epoch, so that all are seen in time and no batch is short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from batchlab.core.checks import as_count, check_count
from batchlab.core.errors import InputError
from batchlab.core.files import existing, replace_atomic
from batchlab.core.jsonio import JsonNoun
from batchlab.core.random import derive_seed
from batchlab.data.batch_sampler import BatchSampler, share_of
from batchlab.data.mining.partition import Method, check_method, partition
from batchlab.data.mining.similarity_graph import BLOCK, inside_edges, mutual_graph, rank_windows
from batchlab.data.stream import SampleStream


@dataclass(frozen=True)
class B3Header(JsonNoun):
    """How an index was made. n: examples. edges: of the mutual graph; inside: those with both ends in one cluster.

    labelled: whether golden labels were left out instead of golden targets alone. method: "metis" or "louvain".
    """

    n: int
    cluster_size: int
    p: int
    m: int
    labelled: bool
    method: str
    seed: int
    edges: int
    inside: int


@dataclass(frozen=True, eq=False)
class B3Index:
    """Mined once, used in every run: one row a cluster.

    clusters: (N // K, K) examples. leftover: (N mod K,). windows: (N, m), each query's S_i, or None where it was not
    kept; B3++ and the hard-negative rate need it.
    """

    header: B3Header
    clusters: NDArray[np.int64]
    leftover: NDArray[np.int64]
    windows: NDArray[np.int32] | None = None

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file: int32 tensors, the header as JSON in its metadata."""
        tensors = {"clusters": self.clusters.astype(np.int32), "leftover": self.leftover.astype(np.int32)}
        if self.windows is not None:
            tensors["windows"] = np.ascontiguousarray(self.windows)
        metadata = {"b3_index": self.header.to_json(indent=None)}
        return replace_atomic(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @staticmethod
    def load(path: str | Path) -> B3Index:
        """The index that `save` wrote; `InputError` where it is none."""
        try:
            with safe_open(existing(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{path} is no safetensors file: {error}") from None
        if "b3_index" not in metadata or not {"clusters", "leftover"} <= tensors.keys():
            raise InputError(f"{path} is no index that B3Index.save wrote")
        header = B3Header.from_json(metadata["b3_index"], source=str(path))
        clusters, leftover = (tensors[name].astype(np.int64) for name in ("clusters", "leftover"))
        count, left = divmod(header.n, header.cluster_size)
        if clusters.shape != (count, header.cluster_size) or leftover.shape != (left,):
            raise InputError(f"{path} is damaged: its clusters do not fit n={header.n}, K={header.cluster_size}")
        if not np.array_equal(np.sort(np.concatenate([clusters.ravel(), leftover])), np.arange(header.n)):
            raise InputError(f"{path} is damaged: its clusters do not hold each of {header.n} examples once")
        windows = tensors.get("windows")
        if windows is not None and (
            windows.ndim != 2 or len(windows) != header.n or windows.min() < 0 or windows.max() >= header.n
        ):
            raise InputError(f"{path} is damaged: its windows are not of {header.n} examples")
        return B3Index(header, clusters, leftover, windows)

    def fingerprint(self) -> str:
        """A hash of header and clusters."""
        found = hashlib.blake2b(self.header.to_json(indent=None).encode(), digest_size=16)
        for array in (self.clusters, self.leftover):
            found.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return found.hexdigest()


def b3_batches(
    query: Tensor,
    target: Tensor,
    *,
    cluster_size: int = 32,
    p: int | None = None,
    m: int = 100,
    labels: Tensor | Sequence[int] | None = None,
    method: Method = "auto",
    seed: int = 0,
    keep_windows: bool = True,
    block: int = BLOCK,
) -> B3Index:
    """Mines clusters from a teacher's embeddings of one data set (one task: mine each alone).

    query, target: (N, d), of x_i and its y_i, on any device. cluster_size: K; 32 is the authors' default at a batch
    of 1024, chosen on held-out data. p: ranks skipped as likely false negatives: 30 by default, the paper's for
    retrieval (70 for visual question answering); more where the same thing is said in many targets, and 0 with labels.
    m: ranks taken, 100 is the paper's. labels: of a classification; golden labels are then left out instead.
    method, seed: of `partition`. keep_windows: 4·N·m bytes of the index, for B3++.

    Cost: 2·N²·d operations for scores, O(N·(p + m)) memory, then about linear.
    Not for a teacher that was trained on other data, with p too small for its mistakes: what it ranks high are then
    false negatives. Not for a loss of high temperature, nor where a batch is large beside the number of topics: in a
    miniature mined batches of 32 won by 0.14 top-1 at a temperature of 0.02 (the paper's), and lost by 0.08 at 0.1.

    >>> import torch
    >>> points = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    >>> index = b3_batches(points, points, cluster_size=8, p=2, m=10, method="louvain")
    >>> index.clusters.shape, index.header.inside > 3 * index.header.edges * 7 / 95
    ((12, 8), True)
    """
    p = (30 if labels is None else 0) if p is None else p
    cluster_size, seed = as_count(2, cluster_size=cluster_size), as_count(0, seed=seed)
    check_method(method)
    if isinstance(query, Tensor) and len(query) < cluster_size:
        raise InputError(f"cluster_size must be at most the {len(query)} examples, got {cluster_size}")
    windows = rank_windows(query, target, p=p, m=m, labels=labels, block=block)
    graph = mutual_graph(windows)
    found = partition(graph, cluster_size, method=method, seed=seed)
    header = B3Header(
        n=len(query),
        cluster_size=cluster_size,
        p=int(p),
        m=int(m),
        labelled=labels is not None,
        method=found.method,
        seed=seed,
        edges=graph.edges,
        inside=inside_edges(graph, found.clusters),
    )
    return B3Index(header, found.clusters, found.leftover, windows if keep_windows else None)


def extra_negatives(
    batch: NDArray[np.int64], windows: NDArray[np.int32], count: int, seed: int = 0
) -> NDArray[np.int64]:
    """B3++: `count` further targets, no two alike, drawn by how often they are in the windows of the batch's queries.

    batch: the examples of a batch. windows: (N, m), `B3Index.windows`. Each is to be contrasted with all queries. Not
    drawn: the batch's own targets, which are negatives already (ours). Where the windows hold too few others, the rest
    is drawn uniformly from all (ours).
    """
    check_count(0, count=count, seed=seed)
    if count > len(windows) - len(batch):
        raise InputError(f"count must be at most the {len(windows) - len(batch)} other targets, got {count}")
    weight = np.bincount(windows[batch].ravel(), minlength=len(windows)).astype(np.float64)
    weight[batch] = -1.0
    draw = np.random.default_rng(derive_seed(seed, "extra negatives"))
    waits = draw.standard_exponential(len(windows))  # the first to ring of clocks of these rates: a weighted draw
    waits = np.where(weight > 0, waits / np.maximum(weight, 1.0), waits + 1e9)
    waits[weight < 0] = np.inf
    return np.argpartition(waits, count - 1)[:count] if count else np.empty(0, dtype=np.int64)


class B3Batches(BatchSampler):
    """Batches of whole clusters: an epoch takes each cluster once, in another order and company than the last.

    indexes: a mined index, or one for each task, whose examples follow each other as in a `ConcatDataset`; a batch is
    of one task, and tasks come in random order, each as often as it has batches. batch_size: |B| over all ranks, a
    multiple of K. Clusters that do not fill a batch sit an epoch out, others each time.

    Each rank yields its contiguous share of the batch: whole clusters where K divides |B|/ranks, as it must where
    negatives are the rank's own; with negatives gathered over ranks any share will do. Do not wrap it in a
    `DistributedSampler` or shuffle its examples: both make random batches of it.
    extra: h; B3++ yields h·|B| further indices after the batch's own, on each rank its share of both, of which only the
    target is to be used. The paper's h is 5. Needs `windows`. As long as |B| is small, B3 without them comes first.

    A negative in another micro-batch is none: accumulate by cached gradients, not by plain accumulation.

    >>> header = B3Header(n=8, cluster_size=2, p=0, m=1, labelled=False, method="metis", seed=0, edges=4, inside=4)
    >>> index = B3Index(header, np.arange(8).reshape(4, 2), np.arange(0))
    >>> [sorted(batch) for batch in B3Batches(index, batch_size=4, seed=1)]
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    def __init__(
        self,
        indexes: B3Index | Sequence[B3Index],
        batch_size: int,
        seed: int = 0,
        *,
        extra: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(seed, rank=rank, world_size=world_size)
        check_count(batch_size=batch_size)
        check_count(0, extra=extra)
        if not isinstance(indexes, Sequence | B3Index):
            raise InputError(f"indexes must be a B3Index or several, got {indexes!r:.80}")
        self.indexes = (indexes,) if isinstance(indexes, B3Index) else tuple(indexes)
        self.batch_size, self.extra = int(batch_size), int(extra)
        if not self.indexes:
            raise InputError("indexes must hold one index at least, got none")
        if batch_size % self.world_size:
            raise InputError(f"batch_size must be a multiple of the {self.world_size} ranks, got {batch_size}")
        for index in self.indexes:
            if not isinstance(index, B3Index):
                raise InputError(f"indexes must be of B3Index, got {type(index).__name__}")
            self._check(index)
        self._starts_of = np.cumsum([0, *(index.header.n for index in self.indexes)])
        batches = [len(index.clusters) // (self.batch_size // index.header.cluster_size) for index in self.indexes]
        self._first_of = np.cumsum([0, *batches])
        self._order = SampleStream(int(self._first_of[-1]), derive_seed(self.seed, "b3 order"))
        self._shuffles = [
            SampleStream(len(index.clusters), derive_seed(self.seed, "b3 clusters", task))
            for task, index in enumerate(self.indexes)
        ]

    def _check(self, index: B3Index) -> None:
        size, n = index.header.cluster_size, index.header.n
        if self.batch_size % size:
            raise InputError(f"batch_size must be a multiple of the index's cluster_size {size}, got {self.batch_size}")
        if self.batch_size > index.clusters.size:
            raise InputError(
                f"batch_size must be at most the {index.clusters.size} examples in clusters of an index, "
                f"got {self.batch_size}"
            )
        if self.extra and index.windows is None:
            raise InputError(f"extra must be 0 for an index without windows, got {self.extra}")
        if (1 + self.extra) * self.batch_size > n:
            raise InputError(
                f"(1 + extra)·batch_size must be at most the {n} examples of an index, "
                f"got {(1 + self.extra) * self.batch_size}"
            )

    def identity(self) -> dict[str, Any]:
        """Batch size, extra negatives and which indexes."""
        prints = [index.fingerprint() for index in self.indexes]
        return {"batch_size": self.batch_size, "extra": self.extra, "indexes": prints}

    def epoch_length(self, epoch: int) -> int:
        """The sum over tasks of the batches that its clusters fill."""
        return int(self._first_of[-1])

    def task_of(self, batches: int) -> int:
        """Which index the batch after `batches` batches of the run is of."""
        return self._place(batches)[0]

    def _place(self, batches: int) -> tuple[int, int]:
        which = int(self._order.indices(batches, 1)[0])
        task = int(np.searchsorted(self._first_of, which, side="right")) - 1
        return task, which - int(self._first_of[task])

    def plan(self, epoch: int, first: int) -> Iterator[list[int]]:
        """This rank's share of each batch."""
        for at in range(first, self.epoch_length(epoch)):
            batches = epoch * self.epoch_length(epoch) + at
            task, number = self._place(batches)
            whole = self._batch(task, epoch, number)
            mine = whole[slice(*share_of(len(whole), self.rank, self.world_size))]
            if self.extra:
                windows = self.indexes[task].windows
                assert windows is not None
                seed = derive_seed(self.seed, "b3 extra", batches)
                more = extra_negatives(whole, windows, self.extra * self.batch_size, seed)
                mine = np.concatenate([mine, more[slice(*share_of(len(more), self.rank, self.world_size))]])
            yield (mine + self._starts_of[task]).tolist()

    def _batch(self, task: int, epoch: int, number: int) -> NDArray[np.int64]:
        """The whole batch, in the task's own numbers; left-over examples stand in for as many of the epoch's others."""
        index = self.indexes[task]
        count, size = index.clusters.shape
        take = self.batch_size // size
        chosen = self._shuffles[task].indices(epoch * count + number * take, take)
        batch = index.clusters[chosen]
        if len(index.leftover):
            cells = SampleStream(count * size, derive_seed(self.seed, "b3 leftover", task))
            for cell, example in zip(
                cells.indices(epoch * count * size, len(index.leftover)), index.leftover, strict=True
            ):
                batch[chosen == cell // size, cell % size] = example
        return batch.ravel()
