import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from batchlab.core.errors import InputError
from batchlab.data.documents.decompose import PieceDataset, decompose
from batchlab.data.documents.documents import Documents
from batchlab.data.documents.pack import pack
from batchlab.data.documents.packed_batch import (
    IGNORED,
    PackedDocuments,
    cu_seqlens,
    document_block_mask,
    document_mask,
    packed_batch,
)

WIDTH, TOKENS = 8, 50


class Attention(nn.Module):
    """Two layers of attention with learned positions, in float64: from embeddings, so that these have gradients."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, WIDTH), nn.Embedding(64, WIDTH)
        self.mixed = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, TOKENS)
        self.double()

    def forward(self, x, positions, mask=None):
        x = x + self.positions(positions)
        for each in self.mixed:
            q, k, v = each(x)[:, None].chunk(3, dim=-1)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[:, 0]
        return self.out(x)


@pytest.fixture
def documents():
    generator = torch.Generator().manual_seed(0)
    return Documents.of([torch.randint(TOKENS, (n,), generator=generator) for n in (11, 4, 20, 1, 7, 33, 5)])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention()


def losses(model, batch, mask):
    x = model.tokens(batch.input_ids).detach().requires_grad_()
    logits = model(x, batch.position_ids, mask)
    each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return x, each.view_as(batch.labels)


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit", "wrapped"])
def test_no_documents_loss_moves_with_another_document(documents, model, strategy):
    packing = pack(documents.lengths, 24, strategy)
    batch = packed_batch(documents, packing, range(len(packing)))
    x, each = losses(model, batch, document_mask(batch.document_ids))
    assert each.isfinite().all()
    for document in range(7):
        mine = batch.document_ids == document
        (moved,) = torch.autograd.grad(each[mine].sum(), x, retain_graph=True)
        assert (moved[~mine] == 0).all()
        assert (moved[mine] != 0).any() == (documents.lengths[document] > 1)
    plain, each = losses(model, batch, torch.ones(1, 1, 24, 24).tril().bool())
    mine = batch.document_ids == int(batch.document_ids[0, -1]) if strategy == "wrapped" else batch.document_ids == 1
    (moved,) = torch.autograd.grad(each[mine].sum(), plain)
    assert (moved[~mine] != 0).any()  # without the mask it does


def test_a_packed_document_has_the_loss_that_it_has_alone(documents, model):
    packing = pack(documents.lengths, 40)
    batch = packed_batch(documents, packing, range(len(packing)))
    _, each = losses(model, batch, document_mask(batch.document_ids))
    for document in range(7):
        tokens = documents.rows([documents.offsets[document]], int(documents.lengths[document]))
        logits = model(model.tokens(tokens), torch.arange(tokens.shape[1])[None])
        alone = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        found = each[(batch.document_ids == document) & (batch.labels != IGNORED)]
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_no_pieces_loss_moves_with_another_piece(documents, model):
    pieces = decompose(documents.lengths, 1, 4, randomize=False)
    data = PieceDataset(documents, pieces)
    inputs, targets = next(iter(DataLoader(data, batch_sampler=[range(int(pieces.first[1]), int(pieces.first[2]))])))
    x = model.tokens(inputs).detach().requires_grad_()
    logits = model(x, torch.arange(inputs.shape[1]).expand_as(inputs))
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    assert len(inputs) >= 3
    for row in range(len(inputs)):
        (moved,) = torch.autograd.grad(each[row].sum(), x, retain_graph=True)
        others = torch.arange(len(inputs)) != row
        assert (moved[others] == 0).all() and (moved[row] != 0).any()


def test_targets_positions_and_bounds(documents):
    packing = pack(documents.lengths, 24)
    batch = packed_batch(documents, packing, range(len(packing)), pad=49)
    unshifted = packed_batch(documents, packing, range(len(packing)), pad=49, shifted=False).labels
    ids, positions = batch.document_ids, batch.position_ids
    starts = positions == 0
    expected = torch.where(starts | (ids < 0), IGNORED, batch.input_ids)
    assert torch.equal(unshifted, expected)
    assert torch.equal(batch.labels[:, :-1], expected[:, 1:]) and (batch.labels[:, -1] == IGNORED).all()
    assert (batch.input_ids[ids < 0] == 49).all() and (ids >= 0).sum() == documents.lengths.sum()
    flat, longest = cu_seqlens(positions)
    assert flat[-1] == positions.numel() and flat.dtype == torch.int32 and longest == 24
    for begin, end in zip(flat[:-1].tolist(), flat[1:].tolist(), strict=True):
        assert positions.flatten()[begin:end].tolist() == list(range(end - begin))
        assert len(set(ids.flatten()[begin:end].tolist())) == 1
    assert (batch.labels != IGNORED).sum() == documents.lengths.sum() - len(packing.document)
    assert cu_seqlens(positions[:0])[0].tolist() == [0]


def test_some_sequences_are_what_they_are_among_all(documents):
    packing = pack(documents.lengths, 24)
    all_, some = (packed_batch(documents, packing, rows) for rows in (range(len(packing)), [2, 0]))
    for whole, part in zip(all_, some, strict=True):
        assert torch.equal(whole[[2, 0]], part)
    assert torch.equal(packed_batch(documents, packing, 1).input_ids, all_.input_ids[1:2])
    rows = next(iter(DataLoader(PackedDocuments(documents, packing), batch_sampler=[[2, 0]])))
    for name, part in some._asdict().items():
        assert torch.equal(rows[name], part)
    assert torch.equal(PackedDocuments(documents, packing)[2]["labels"], some.labels[0])


def test_a_default_device_elsewhere_changes_nothing(documents):
    packing = pack(documents.lengths, 24)
    expected = packed_batch(documents, packing, [0, 1])
    with torch.device("meta"):
        found = packed_batch(documents, packing, [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow  # importing it takes seconds
def test_flex_attention_sees_what_the_mask_sees(documents):
    from torch.nn.attention.flex_attention import flex_attention

    packing = pack(documents.lengths, 40)
    ids = packed_batch(documents, packing, range(len(packing))).document_ids
    q, k, v = torch.randn(3, len(ids), 2, 40, 16)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask(ids))
    found = flex_attention(q, k, v, block_mask=document_block_mask(ids))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # importing it takes seconds
def test_hugging_face_gives_the_same_row(documents):
    collator = pytest.importorskip("transformers").DataCollatorWithFlattening(return_tensors="pt")
    packing = pack(documents.lengths[:3], 35)
    rows = [{"input_ids": documents.at(np.arange(b, e)).tolist()} for b, e in ((15, 35), (0, 11), (11, 15))]
    expected = collator(rows)
    batch = packed_batch(documents, packing, [0], shifted=False)
    assert torch.equal(batch.input_ids, expected["input_ids"]) and torch.equal(batch.labels, expected["labels"])
    assert torch.equal(batch.position_ids, expected["position_ids"])


def test_bad_input_is_refused(documents):
    packing = pack(documents.lengths, 24)
    for rows in ([len(packing)], [-1], [[0]], [0.5]):
        with pytest.raises(InputError, match=r"sequences must be a row of numbers in \[0, 4\)"):
            packed_batch(documents, packing, rows)
    with pytest.raises(InputError, match="documents must be those that were packed, got 1 of them"):
        PackedDocuments(Documents.of([[1]]), packing)
    with pytest.raises(InputError, match=r"document_ids must have shape \(sequences, length\), got \(3,\)"):
        document_mask(torch.zeros(3))


def test_other_documents_than_those_that_were_packed_are_refused():
    packing = pack([4, 2], 4)
    with pytest.raises(InputError, match="packed: document 0 had 4 tokens at least, got one of 1"):
        PackedDocuments(Documents.of([[1], [2], [3, 4, 5, 6]]), packing)
    with pytest.raises(InputError, match="packed: document 0 had 4 tokens at least, got one of 1"):
        packed_batch(Documents.of([[1], [2, 3]]), packing, [0])
    with pytest.raises(InputError, match="documents must be those that were packed, got 1 of them"):
        PackedDocuments(Documents.of([[1, 2, 3, 4]]), packing)


def test_a_loop_over_the_examples_ends():
    assert len(list(PackedDocuments(Documents.of([[1, 2, 3, 4], [5, 6]]), pack([4, 2], 4)))) == 2
