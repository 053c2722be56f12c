"""Data that lie on a GPU, and batches on their way to it and back."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from batchlab.data.documents.documents import Documents
from batchlab.data.documents.pack import pack
from batchlab.data.documents.packed_batch import cu_seqlens, document_block_mask, document_mask, packed_batch
from batchlab.data.fetch import fetch, to_device
from batchlab.data.mining.b3_measures import loss_gap, purity
from batchlab.data.mining.similarity_graph import rank_windows
from batchlab.data.multigrid.resample import resample
from tests.data.test_fetch import Labelled

pytestmark = pytest.mark.gpu


def test_a_data_set_on_the_device_gives_batches_on_it(accelerator):
    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    there = TensorDataset(x.to(accelerator), y.to(accelerator))
    batch = fetch(there, [4, 1, 3])
    assert [part.device.type for part in batch] == [accelerator.type] * 2
    assert batch[0].tolist() == x[[4, 1, 3]].tolist() and batch[1].tolist() == [4, 1, 3]
    one_by_one = fetch([(a, b) for a, b in there], [4, 1])
    assert one_by_one[0].device.type == accelerator.type and one_by_one[1].tolist() == [4, 1]


def test_batches_come_back_whole(accelerator):
    """A copy to the CPU must be over when it is handed on: it would be read while the device still works."""
    big = torch.full((2**24,), 2.0, device=accelerator)
    for _ in range(20):
        big = big.sqrt().square()
    batch = {"x": big * 3, "rest": (Labelled(big[:4] + 1, [big[4:6]]), "name")}
    found = to_device(batch, torch.device("cpu"))
    assert bool((found["x"] - 6 < 1e-3).all() and (found["x"] > 5.9).all())
    assert found["rest"][0].x.is_cpu and found["rest"][0].parts[0].is_cpu and found["rest"][1] == "name"
    again = to_device(found, accelerator)
    assert again["x"].device.type == again["rest"][0].parts[0].device.type == accelerator.type
    assert torch.equal(again["x"].cpu(), found["x"])


def test_pinned_batches_of_a_loader_arrive(accelerator):
    pinned = accelerator.type == "cuda"
    data = TensorDataset(torch.arange(64.0).view(16, 4), torch.arange(16))
    loader = DataLoader(data, batch_size=8, pin_memory=pinned)
    for at, batch in enumerate(loader):
        assert batch[0].is_pinned() == pinned
        x, y = to_device(batch, accelerator)
        assert (x[:, 0] / 4).tolist() == y.tolist() == list(range(8 * at, 8 * at + 8))


def documents(device):
    tokens = torch.arange(1, 30)
    return Documents(tokens.to(device), [5, 3, 9, 2, 10])


def test_documents_on_the_device_are_packed_as_those_of_the_cpu(accelerator):
    packing = pack([5, 3, 9, 2, 10], 12)
    found, right = (packed_batch(documents(each), packing, range(len(packing))) for each in (accelerator, "cpu"))
    for ours, theirs in zip(found, right, strict=True):
        assert ours.is_cpu and torch.equal(ours, theirs)
    rows = documents(accelerator).rows([0, 4], 3)
    assert rows.device.type == accelerator.type and rows.tolist() == [[1, 2, 3], [5, 6, 7]]


def packed(device):
    packing = pack([40, 70, 9, 100, 30, 60], 128)
    whole = Documents(torch.arange(309), [40, 70, 9, 100, 30, 60])
    return to_device(packed_batch(whole, packing, range(len(packing))), device)


def test_masks_keep_documents_apart_on_the_device(accelerator):
    batch, right = packed(accelerator), packed(torch.device("cpu"))
    mask = document_mask(batch.document_ids)
    assert torch.equal(mask.cpu(), document_mask(right.document_ids))
    edges, longest = cu_seqlens(batch.position_ids)
    assert edges.device.type == accelerator.type
    assert (edges.tolist(), longest) == (cu_seqlens(right.position_ids)[0].tolist(), cu_seqlens(right.position_ids)[1])
    q, k, v = torch.randn(3, len(mask), 2, 128, 16, generator=torch.Generator().manual_seed(0)).to(accelerator)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ids = right.document_ids[0]
    at = (ids == ids[0]).nonzero().flatten().tolist()
    own = [each[:1, :, at] for each in (q, k, v)]
    torch.testing.assert_close(
        whole[:1, :, at], F.scaled_dot_product_attention(*own, is_causal=True), rtol=1e-3, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_block_masks_leave_out_what_no_query_may_look_at(accelerator):
    from torch.nn.attention.flex_attention import flex_attention

    batch = packed(accelerator)
    blocks = document_block_mask(batch.document_ids, BLOCK_SIZE=16)
    dense = document_mask(batch.document_ids)
    n = len(dense)
    some = dense.view(n, 1, 8, 16, 8, 16).any(5).any(3)
    assert torch.equal(blocks.to_dense().bool(), some)
    q, k, v = torch.randn(3, n, 2, 128, 16, generator=torch.Generator().manual_seed(0)).to(accelerator)
    found = flex_attention(q, k, v, block_mask=blocks)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=dense), rtol=1e-3, atol=1e-3)


def embeddings(device):
    generator = torch.Generator().manual_seed(0)
    query, target = torch.randn(2, 200, 12, generator=generator)
    target[150:160] = target[:10]
    return query.to(device), target.to(device)


@pytest.mark.parametrize("block", [7, 1024])
def test_hard_negatives_are_those_of_the_cpu(accelerator, block):
    labels = torch.arange(200) // 4
    right = rank_windows(*embeddings("cpu"), p=3, m=20, labels=labels)
    found = rank_windows(*embeddings(accelerator), p=3, m=20, labels=labels.to(accelerator), block=block)
    assert np.array_equal(found, right)


def test_measures_of_mined_batches_are_those_of_the_cpu(accelerator):
    query, target = embeddings("cpu")
    scores, batches = query @ target.T, np.arange(200).reshape(10, 20).tolist()
    assert loss_gap(scores.to(accelerator), batches, k=5) == pytest.approx(loss_gap(scores, batches, k=5), rel=1e-9)
    labels = torch.arange(200) // 30
    assert purity(batches, labels.to(accelerator)) == purity(batches, labels)


@pytest.mark.parametrize("scales", [None, (36, 40)])
def test_pieces_of_clips_are_those_of_the_cpu(accelerator, scales):
    clip = torch.randn(3, 32, 40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = lambda x: resample(  # noqa: E731
        x, (4, 16, 16), (16, 32, 32), scales=scales, stride=2, generator=torch.Generator().manual_seed(1)
    )
    found = cut(clip.to(accelerator))
    assert found.device.type == accelerator.type
    torch.testing.assert_close(found.cpu(), cut(clip), rtol=1e-9, atol=1e-10)
    if accelerator.type == "cuda":
        drawn = torch.Generator(accelerator).manual_seed(1)
        assert resample(clip.to(accelerator), (4, 16, 16), (16, 32, 32), stride=2, generator=drawn).shape == found.shape
