"""Which examples should meet in a batch: ranks just below the top, by a teacher, both ways (B3, arXiv 2505.11293).

  s_ij = <t(x_i), t(y_j)>                        the teacher's score of query i and target j
  R_i  = targets but the golden ones by s_ij, best first, equals by index
  S_i  = R_i[p : p + m]                          p ranks skipped: likely false negatives
  edge {i, j}  iff  j in S_i and i in S_j

Scores are computed in float64 and rounded to float32, so that two equal targets tie whatever the block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from batchlab.core.checks import check_count, holds
from batchlab.core.errors import InputError

BLOCK = 1024  # queries scored at a time: about 30 bytes for each of them and each target


class Graph(NamedTuple):
    """An undirected graph in compressed rows: node i's neighbours, sorted, are indices[indptr[i] : indptr[i + 1]].

    Each edge is there twice, once from either end.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]

    @property
    def nodes(self) -> int:
        """How many."""
        return len(self.indptr) - 1

    @property
    def edges(self) -> int:
        """How many, each counted once."""
        return len(self.indices) // 2

    def neighbours(self, node: int) -> NDArray[np.int64]:
        """Of one node."""
        return self.indices[self.indptr[node] : self.indptr[node + 1]]


def rank_windows(
    query: Tensor,
    target: Tensor,
    *,
    p: int,
    m: int,
    labels: Tensor | Sequence[int] | None = None,
    block: int = BLOCK,
) -> NDArray[np.int32]:
    """S_i for each of N queries: the m targets after the best p, the golden one left out first. (N, m), best first.

    query, target: the teacher's embeddings (N, d) of x_i and y_i, normalised or not; on a device that has float64.
    labels: classes, of N examples; then all targets of the query's own class are golden, and left out. block: queries
    at a time; it does not change the result. Cost: 2·N²·d operations, N·m·4 bytes for the result.
    Raises `InputError` for shapes that differ, embeddings that are not finite, and p + m > N - 1, or more than a query
    has left.
    """
    _check_embeddings(query, target)
    n = len(query)
    check_count(m=m, block=block)
    check_count(0, p=p)
    if p + m > n - 1:
        raise InputError(f"p + m must be at most N - 1 = {n - 1}, got p={p}, m={m}")
    if labels is None:
        of = torch.arange(n, device="cpu")
    elif holds(lambda each: torch.as_tensor(each) is not None, labels):
        of = torch.as_tensor(labels, device="cpu")
    else:
        raise InputError(f"labels must be {n} integers, one for each example, got {labels!r:.80}")
    if of.shape != (n,):
        raise InputError(f"labels must have shape ({n},), got {tuple(of.shape)}")
    if of.is_floating_point() or of.is_complex():
        raise InputError(f"labels must be {n} integers, one for each example, got {of.dtype}")
    most = int(np.unique(of.numpy(), return_counts=True)[1].max())
    if p + m > n - most:
        raise InputError(f"p + m must be at most the {n - most} targets of other labels, got p={p}, m={m}")
    of, targets = of.to(query.device), target.double()
    found = np.empty((n, m), dtype=np.int32)
    for start in range(0, n, block):
        scores = (query[start : start + block].double() @ targets.T).float()
        keys = _order_keys(scores)
        keys[of[start : start + block, None] == of] = torch.iinfo(torch.int64).min
        best = keys.topk(p + m, dim=1).indices[:, p:]
        found[start : start + block] = best.cpu().numpy()
    return found


def _check_embeddings(query: Tensor, target: Tensor) -> None:
    for name, embedding in (("query", query), ("target", target)):
        if not isinstance(embedding, Tensor) or embedding.ndim != 2 or not embedding.is_floating_point():
            raise InputError(f"{name} must be a floating-point tensor (N, d), got {_shape(embedding)}")
    if query.shape != target.shape:
        raise InputError(f"query and target must have one shape (N, d), got {_shape(query)} and {_shape(target)}")
    for name, embedding in (("query", query), ("target", target)):
        bad = (~embedding.isfinite()).any(1)
        if bad.any():
            raise InputError(
                f"{name} must be finite, got {int(bad.sum())} rows that are not, the first at {int(bad.nonzero()[0])}"
            )


def _shape(value: object) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _order_keys(scores: Tensor) -> Tensor:
    """Distinct integers in the order of the float32 scores of a row, of equals the smaller index the greater."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0 equals 0
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(scores.shape[1], device=scores.device)
    return (monotone.long() << 32) + (2**32 - 1 - index)


def mutual_graph(windows: NDArray[np.int32]) -> Graph:
    """The edges {i, j} with j in S_i and i in S_j, of windows (N, m).

    >>> mutual_graph(np.array([[1], [0], [0]])).indices.tolist()
    [1, 0]
    """
    n, m = windows.shape
    ones = np.ones(n * m, dtype=np.int8)
    directed = sparse.csr_array((ones, windows.ravel().astype(np.int64), np.arange(0, n * m + 1, m)), shape=(n, n))
    mutual = directed.multiply(directed.T.tocsr()).tocsr()
    mutual.sort_indices()
    return Graph(mutual.indptr.astype(np.int64), mutual.indices.astype(np.int64))


def inside_edges(graph: Graph, groups: Sequence[NDArray[np.int64]] | NDArray[np.int64]) -> int:
    """How many edges have both ends in one group. groups: disjoint sets of nodes, clusters or batches."""
    member = np.full(graph.nodes, -1, dtype=np.int64)
    for at, group in enumerate(groups):
        member[np.asarray(group)] = at
    start = np.repeat(np.arange(graph.nodes), np.diff(graph.indptr))
    inside = (member[start] == member[graph.indices]) & (member[start] >= 0)
    return int(inside.sum()) // 2
