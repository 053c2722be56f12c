import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from batchlab.core.errors import InputError
from batchlab.core.random import derive_seed
from batchlab.data.documents.decompose import PieceDataset, decompose, drawn_exponents
from batchlab.data.documents.documents import Documents


def by_document(pieces):
    """(start, k) of each document's pieces, by place."""
    exponents = np.repeat(np.arange(pieces.i_min, pieces.i_max + 1), pieces.counts)
    found = {}
    for document, start, k in zip(pieces.document.tolist(), pieces.start.tolist(), exponents.tolist(), strict=True):
        found.setdefault(document, []).append((start, k))
    return {document: sorted(each) for document, each in found.items()}


def one_by_one(n, i_min, i_max, draw=None):
    """The paper's loop, on one document."""
    found, start = [], 0
    while n > 1:
        k = int(math.log2(n - 1))
        if k < i_min:
            break
        if k > i_max:
            k = i_max if draw is None else draw(len(found))
        found.append((start, k))
        start, n = start + 2**k + 1, n - 2**k - 1
    return found, n


def test_lengths_are_cut_as_the_loop_cuts_them():
    lengths = np.random.default_rng(0).integers(2, 100_001, 10_000)
    pieces = decompose(lengths, randomize=False)
    found = by_document(pieces)
    loop = [one_by_one(int(n), 8, 13) for n in lengths]
    assert all(found.get(at, []) == cut for at, (cut, _) in enumerate(loop))
    assert pieces.dropped_tokens == sum(rest for _, rest in loop)


@given(
    lengths=st.lists(st.integers(0, 700), max_size=8),
    i_min=st.integers(0, 3),
    more=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_drawn_lengths_follow_the_loop_too(lengths, i_min, more, seed):
    i_max, key = i_min + more, derive_seed(seed, "decompose")
    pieces = decompose(lengths, i_min, i_max, seed=seed)
    found = by_document(pieces)
    for document, n in enumerate(lengths):

        def draw(number, document=document):
            return int(drawn_exponents(np.array([document]), np.array([number]), i_min, i_max, key)[0])

        cut, rest = one_by_one(n, i_min, i_max, draw)
        assert found.get(document, []) == cut
        ends = [start + 2**k + 1 for start, k in cut]
        assert [start for start, _ in cut] == [0, *ends][: len(cut)]  # no gap, no overlap
        assert 0 <= rest < 2**i_min + 1 and (ends or [0])[-1] == n - rest
    assert pieces.counts == tuple(np.bincount([k - i_min for c in found.values() for _, k in c], minlength=more + 1))


def test_without_draws_exponents_are_binary_digits():
    """Σ(2^k + 1) = n - rest: with the +1 of each piece taken away, what is left is a sum of distinct powers of two."""
    lengths = np.arange(0, 2**13)
    for document, cut in by_document(decompose(lengths, 2, 13)).items():
        total = sum(2**k + 1 for _, k in cut)
        assert 0 <= lengths[document] - total <= 4
        assert [k for _, k in cut] == [i for i in range(13, -1, -1) if (total - len(cut)) >> i & 1]


def test_drawn_pieces_give_every_length_as_many_tokens():
    """Chi-square of 100,000 draws against P(j) ∝ 2^(i_max - j): 5 degrees of freedom."""
    k = drawn_exponents(np.zeros(1, dtype=np.int64), np.arange(100_000), 8, 13, 12345)
    share = 2.0 ** np.arange(5, -1, -1)
    expected = 100_000 * share / share.sum()
    assert ((np.bincount(k - 8) - expected) ** 2 / expected).sum() < 25.7  # the 0.9999 quantile
    tokens = decompose([2**30], seed=3)
    each = np.array(tokens.counts) * np.array(tokens.lengths)
    assert np.abs(each / each.mean() - 1).max() < 0.03  # 20,000 pieces of the longest: 4 sigma


def test_a_document_is_cut_by_its_place_and_length_alone():
    whole = by_document(decompose([5000, 300, 90_000], 4, 6))
    assert by_document(decompose([5000, 300, 90_000, 77], 4, 6))[2] == whole[2]
    assert by_document(decompose([1, 1, 90_000], 4, 6))[2] == whole[2]
    assert by_document(decompose([5000, 300, 90_000], 4, 6, seed=1))[2] != whole[2]


def test_pieces_give_the_documents_back():
    documents = Documents.of([np.arange(n) + 1000 * at for at, n in enumerate((37, 3, 120, 1))])
    pieces = decompose(documents.lengths, 1, 4)
    data, found = PieceDataset(documents, pieces), {}
    for index in range(len(pieces)):
        inputs, targets = data[index]
        length = pieces.lengths[pieces.bucket_of(index)]
        assert inputs.shape == targets.shape == (length,) and torch.equal(inputs[1:], targets[:-1])
        found.setdefault(int(pieces.document[index]), []).append(
            (int(pieces.start[index]), [*inputs.tolist(), int(targets[-1])])
        )
    for document, rows in found.items():
        joined = [token for _, row in sorted(rows) for token in row]
        assert joined == [1000 * document + at for at in range(len(joined))]
        assert documents.lengths[document] - len(joined) <= 2
    assert sorted(found) == [0, 1, 2]


def test_torchs_loader_stacks_a_bucket_and_no_two():
    documents = Documents.of([range(100)] * 4)
    pieces = decompose(documents.lengths, 2, 4)
    data = PieceDataset(documents, pieces)
    long = list(range(int(pieces.first[2]), int(pieces.first[2]) + 3))
    inputs, targets = next(iter(DataLoader(data, batch_sampler=[long])))
    assert inputs.shape == (3, 16) and torch.equal(inputs + 1, targets)
    with pytest.raises(InputError, match=r"pieces of one length, got lengths \[4, 16\]"):
        data.__getitems__([0, long[0]])


def test_bad_input_is_refused():
    for i_min, i_max in ((3, 3), (4, 3), (8, 41)):
        with pytest.raises(InputError, match=f"i_min < i_max <= 40, got i_min={i_min}, i_max={i_max}"):
            decompose([10], i_min, i_max)
    with pytest.raises(InputError, match="i_min must be an integer of at least 0, got 1.5"):
        decompose([10], 1.5, 3)
    with pytest.raises(InputError, match="documents must be those that were cut, got 1 of them"):
        PieceDataset(Documents.of([range(9)]), decompose([9, 9], 1, 2))
    empty = decompose([], 1, 2)
    assert len(empty) == 0 and empty.counts == (0, 0) and decompose([0, 1, 2], 1, 2).dropped_tokens == 3


def test_other_documents_than_those_that_were_cut_are_refused():
    pieces = decompose([3, 9], 1, 3, randomize=False)
    with pytest.raises(InputError, match="cut: document 1 had 9 tokens at least, got one of 3"):
        PieceDataset(Documents.of([[1] * 9, [2] * 3]), pieces)
    with pytest.raises(InputError, match="documents must be those that were cut, got 1 of them"):
        PieceDataset(Documents.of([[1] * 9]), decompose([9, 3, 3], 1, 3, randomize=False))


def test_other_libraries_integers_are_integers():
    same = decompose([40] * 8, 2, 4)
    for kind in (torch.tensor, np.uint8):
        found = decompose([40] * 8, kind(2), kind(4))
        assert (found.start == same.start).all() and found.i_max == 4
