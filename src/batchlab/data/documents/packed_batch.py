"""Packed sequences as a batch: targets, positions and masks that let no document see another."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from batchlab.core.checks import is_whole
from batchlab.core.errors import InputError
from batchlab.data.documents.documents import Documents, check_within
from batchlab.data.documents.pack import Packing

IGNORED = -100  # the target that torch's cross_entropy leaves out by default
NO_DOCUMENT = -1


class PackedBatch(NamedTuple):
    """Packed sequences side by side, int64 each, shape (sequences, capacity), on the CPU.

    input_ids: the tokens, then padding. labels: what each place predicts, -100 for nothing. position_ids: from 0 in
    each part of a document, and in the padding. document_ids: the document of each token, -1 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor


def packed_batch(
    documents: Documents, packing: Packing, sequences: ArrayLike, *, pad: int = 0, shifted: bool = True
) -> PackedBatch:
    """These sequences of a packing, as tensors. Parts are apart under every strategy, "wrapped" too, unlike in TRL.

    shifted: labels[t] is the token after t in the same part, and its last place predicts nothing. False: labels[t] is
    token t itself, but -100 where a part begins, for models that shift by themselves (Hugging Face's). Either way no
    target is of another document, and a part of m tokens has m - 1 targets: take the mean over targets, `labels !=
    -100`, of which batches do not have equally many.

    >>> from batchlab.data.documents.pack import pack
    >>> documents = Documents.of([[7, 8, 9], [5, 6]])
    >>> batch = packed_batch(documents, pack(documents.lengths, 6), [0])
    >>> batch.input_ids.tolist(), batch.labels.tolist()
    ([[7, 8, 9, 5, 6, 0]], [[8, 9, -100, 6, -100, -100]])
    >>> batch.position_ids.tolist(), batch.document_ids.tolist()
    ([[0, 1, 2, 0, 1, 0]], [[0, 0, 0, 1, 1, -1]])
    """
    if not is_whole(pad):
        raise InputError(f"pad must be an integer, got {pad!r}")
    rows = np.atleast_1d(np.asarray(sequences))
    rows = rows.astype(np.int64) if not rows.size else rows
    if (
        rows.ndim != 1
        or rows.dtype.kind not in "iu"
        or (rows.size and not 0 <= rows.min() <= rows.max() < len(packing))
    ):
        raise InputError(f"sequences must be a row of numbers in [0, {len(packing)}), got {sequences!r}")
    many = packing.first[rows + 1] - packing.first[rows]
    parts = np.repeat(packing.first[rows] - (np.cumsum(many) - many), many) + np.arange(many.sum())
    length, row = packing.length[parts], np.repeat(np.arange(len(rows)), many)
    position = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    used = np.bincount(row, length, minlength=len(rows)).astype(np.int64)
    column = np.arange(length.sum()) - np.repeat(np.cumsum(used) - used, used)
    at = torch.from_numpy(np.repeat(row, length)), torch.from_numpy(column)
    check_within(documents, packing.document[parts], packing.start[parts] + length, "packed")
    begin = documents.offsets[packing.document[parts]] + packing.start[parts]
    tokens = documents.at(np.repeat(begin, length) + position).cpu()
    starts, last = torch.from_numpy(position == 0), torch.from_numpy(position == np.repeat(length, length) - 1)
    shape = (len(rows), packing.capacity)
    padding = torch.from_numpy((np.arange(packing.capacity) - used[:, None]).clip(min=0))
    ids, labels, owners = (torch.full(shape, each, device="cpu") for each in (pad, IGNORED, NO_DOCUMENT))
    batch = PackedBatch(ids, labels, padding, owners)
    batch.input_ids[at] = tokens
    batch.labels[at] = torch.where(last, IGNORED, tokens.roll(-1)) if shifted else torch.where(starts, IGNORED, tokens)
    batch.position_ids[at] = torch.from_numpy(position)
    batch.document_ids[at] = torch.from_numpy(np.repeat(packing.document[parts], length))
    return batch


def document_mask(document_ids: Tensor) -> Tensor:
    """For `scaled_dot_product_attention`'s `attn_mask`: True where a query may look, causally, at its own document.

    document_ids: (n, length); returns bool (n, 1, length, length), for any number of heads. Padding looks at padding,
    so that no row is empty and none is NaN. Use no `is_causal` beside it. Its memory is quadratic: on GPUs take
    `document_block_mask`, or `cu_seqlens` with a kernel for ragged sequences.

    >>> document_mask(torch.tensor([[4, 4, 7]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    _check_ids(document_ids)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def document_block_mask(document_ids: Tensor, **options: Any) -> Any:
    """The same for `torch.nn.attention.flex_attention`: a `BlockMask`, which leaves out blocks with nothing in them.

    options: of `create_block_mask`, such as `BLOCK_SIZE`. On CPUs flex attention has no backward pass (torch 2.13):
    take `document_mask` there.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    _check_ids(document_ids)

    def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids[batch, query] == document_ids[batch, key]) & (query >= key)

    n, length = document_ids.shape
    return create_block_mask(may_look, n, None, length, length, device=str(document_ids.device), **options)


def cu_seqlens(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where each part begins in the flattened batch, and its end: int32, and the longest part's length.

    As kernels for ragged sequences take them (flash attention's `varlen` form); each sequence's padding is a part too.

    >>> cu_seqlens(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]))
    (tensor([0, 3, 4, 6, 8], dtype=torch.int32), 3)
    """
    flat = position_ids.reshape(-1)
    begins = torch.nonzero(flat == 0).reshape(-1)
    edges = torch.cat([begins, begins.new_tensor([len(flat)])]).to(torch.int32)
    return edges, int(edges.diff().max()) if len(begins) else 0


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """The sequences of a packing as examples: the fields of `PackedBatch` by name, shape (capacity,) each.

    torch's own `default_collate` stacks them. pad, shifted: as in `packed_batch`.
    """

    def __init__(self, documents: Documents, packing: Packing, *, pad: int = 0, shifted: bool = True) -> None:
        check_within(documents, packing.document, packing.start + packing.length, "packed")
        self.documents, self.packing, self.pad, self.shifted = documents, packing, pad, shifted

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):  # by which Python's own loop over it ends
            raise IndexError(f"index must lie in [0, {len(self)}), got {index}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """As `DataLoader` asks for a batch."""
        batch = packed_batch(self.documents, self.packing, indices, pad=self.pad, shifted=self.shifted)
        return [dict(zip(batch._fields, row, strict=True)) for row in zip(*batch, strict=True)]


def _check_ids(document_ids: Tensor) -> None:
    if document_ids.ndim != 2:
        raise InputError(f"document_ids must have shape (sequences, length), got {tuple(document_ids.shape)}")
