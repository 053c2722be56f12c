"""How hard a contrastive batch is: hard-negative rate, purity, and B3's bound (arXiv 2505.11293)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchlab.core.checks import check_count, check_positive, is_count
from batchlab.core.errors import InputError

Groups = Iterable[Sequence[int] | NDArray[np.int64]]


def hard_negative_rate(batches: Groups, windows: NDArray[np.int32]) -> float:
    """The share of all in-batch negatives (i, j), i ≠ j, with j in query i's window S_i; in [0, 1].

    batches: examples of each, all of the batch over ranks. windows: (N, m). Random batches have about m/N.

    >>> hard_negative_rate([[0, 1], [2, 3]], np.array([[1], [0], [0], [1]]))
    0.5
    """
    hard = pairs = 0
    inside = np.zeros(len(windows), dtype=bool)
    for batch in batches:
        members = _places(batch, len(windows), "batches", "examples of windows")
        if len(np.unique(members)) < len(members):
            raise InputError(f"batches must hold an example once, got {batch!r:.80}")
        inside[members] = True
        hard += int(inside[windows[members]].sum())
        inside[members] = False
        pairs += len(members) * (len(members) - 1)
    if not pairs:
        raise InputError("batches must hold one of two examples at least")
    return hard / pairs


def purity(groups: Groups, labels: Sequence[int] | NDArray[np.int64] | Tensor) -> float:
    """The mean over groups, clusters or batches, of the share of a group's most frequent label; in (0, 1].

    >>> purity([[0, 1], [2, 3]], [5, 5, 5, 6])
    0.75
    """
    of = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    members = [_places(group, len(of), "groups", "labels") for group in groups]
    if not all(map(len, members)):
        raise InputError("groups must hold one place each at least, got an empty one")
    shares = [np.unique(of[each], return_counts=True)[1].max() / len(each) for each in members]
    if not shares:
        raise InputError("groups must hold one group at least, got none")
    return math.fsum(shares) / len(shares)


def _places(group: Sequence[int] | NDArray[np.int64], count: int, name: str, what: str) -> NDArray[np.int64]:
    found = np.asarray(group).reshape(-1)
    if not all(is_count(each, 0) and each < count for each in found):
        raise InputError(f"{name} must hold places among the {count} {what}, from 0, got {group!r:.80}")
    return found.astype(np.int64)


class LossGap(NamedTuple):
    """Sums over examples. gap: L_global - L_B. bound: Σ log(N·H_i^K / (K·H_B,i^K)), never below the gap."""

    gap: float
    bound: float


def loss_gap(scores: Tensor, batches: Sequence[Sequence[int]], k: int, temperature: float = 1.0) -> LossGap:
    """How much larger InfoNCE is against all targets than against the batch's, and B3's bound of it.

        L_global,i - L_B,i = log(Σ_{j in all} e^{s_ij/τ} / Σ_{j in B(i)} e^{s_ij/τ})
                          <= log(N·H_i^K / (K·H_B,i^K)),   H^K: the sum of the K largest of these terms

    The bound is smallest where H_B,i^K is largest: where each query has its hard negatives in its batch.

    scores: (N, N), s_ij of query i and target j, the golden one on the diagonal. batches: disjoint, together all N
    examples. k: K, at most the smallest batch. temperature: τ; 1 as in the paper's derivation, 0.02 in its training.
    """
    check_count(k=k)
    check_positive(temperature=temperature)
    n = len(scores)
    if scores.shape != (n, n) or sorted(example for batch in batches for example in batch) != list(range(n)):
        raise InputError("scores must be (N, N), and batches hold each of the N examples once")
    if k > min(map(len, batches)):
        raise InputError(f"k must be at most the smallest batch of {min(map(len, batches))}, got {k}")
    if not scores.isfinite().all():
        raise InputError("scores must be finite, got some that are not")
    logits = scores.double() / temperature
    everywhere = logits.logsumexp(1)
    hardest = logits.topk(k, dim=1).values.logsumexp(1)
    gap = bound = 0.0
    for batch in batches:
        rows = torch.as_tensor(list(batch), device=scores.device)
        inside = logits[rows[:, None], rows]
        gap += float((everywhere[rows] - inside.logsumexp(1)).sum())
        within = inside.topk(k, dim=1).values.logsumexp(1)
        bound += float((math.log(n / k) + hardest[rows] - within).sum())
    return LossGap(gap, bound)
