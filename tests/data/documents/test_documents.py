import numpy as np
import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.data.documents.documents import Documents, as_lengths


def test_tensors_arrays_and_files_give_the_same_rows(tmp_path):
    tokens = np.arange(300, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens")
    file = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    expected = torch.tensor([[7, 8, 9], [250, 251, 252]])
    for held in (tokens, file, torch.arange(300), torch.arange(300).to(torch.uint16)):
        rows = Documents(held, [100, 200]).rows([7, 250], 3)
        assert rows.dtype == torch.int64 and torch.equal(rows, expected)


def test_documents_are_joined_with_their_end():
    documents = Documents.of([np.array([1, 2]), torch.tensor([], dtype=torch.int64), [3]], end=9)
    assert documents.tokens.tolist() == [1, 2, 9, 9, 3, 9]
    assert documents.offsets.tolist() == [0, 3, 4, 6] and len(documents) == 3
    assert len(Documents.of([])) == 0


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([[1, 2]], "lengths must have one dimension, got shape (1, 2)"),
        ([1, [2]], "lengths must have one dimension, got rows of unequal length"),
        ([1.0, 2.0], "lengths must be integers of at least 0, got float64"),
        ([True], "lengths must be integers of at least 0, got bool"),
        ([4, -3, 1], "lengths must be integers of at least 0, got -3 at place 1"),
        ([4, 2**60], f"lengths must be integers below 2^52, got {2**60} at place 1"),
    ],
)
def test_lengths_that_are_none_are_refused(lengths, message):
    with pytest.raises(InputError) as error:
        as_lengths(lengths)
    assert str(error.value) == message


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"must be of one dimension and 5 long, the sum of lengths, got shape \(4,\)"):
        Documents(torch.arange(4), [2, 3])
    with pytest.raises(InputError, match="tokens must be integers, got torch.float32"):
        Documents(torch.zeros(2), [2])
    with pytest.raises(InputError, match="tokens must be integers, got float64"):
        Documents(np.zeros(2), [2])
    with pytest.raises(InputError, match="tokens must be integers, got torch.bool"):
        Documents(torch.zeros(2, dtype=torch.bool), [2])
    with pytest.raises(InputError, match="tokens must be a tensor or an array, got list: see Documents.of"):
        Documents([1, 2], [2])
    with pytest.raises(InputError, match="documents must be of integers, got float64 at 1"):
        Documents.of([[1, 2], [0.5]])


def test_tokens_of_any_size_stay_what_they_are():
    large = np.array([2**53 + 1, 2**63 - 1])
    for given in (large, large.astype(np.uint64), large.tolist()):
        assert Documents.of([given], end=2**53 + 1).tokens.tolist() == [2**53 + 1, 2**63 - 1, 2**53 + 1]


@pytest.mark.parametrize(
    ("documents", "end", "message"),
    [
        ([[1]], 2.5, "end must be an integer, got 2.5"),
        ([[1]], True, "end must be an integer, got True"),
        ([[1]], "x", "end must be an integer, got 'x'"),
        ([[1], [[2]]], 0, r"documents must be rows of integers, got shape \(1, 1\) at 1"),
        ([3], 0, r"documents must be rows of integers, got shape \(\) at 0"),
        ([[[1], [2, 3]]], 0, "documents must be rows of integers, got rows of unequal length at 0"),
        (
            [np.array([2**63], dtype=np.uint64)],
            0,
            r"documents must be of integers below 2\^63, got 9223372036854775808 at 0",
        ),
    ],
)
def test_what_is_no_document_is_refused(documents, end, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Documents.of(documents, end=end)
