"""Examples out of batches in any containers."""

from typing import NamedTuple

import pytest
import torch

from batchlab.core.errors import InputError
from batchlab.measure.batch_rows import join, row_count, take_rows


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


BATCHES = [
    torch.arange(5),
    (torch.arange(10).view(5, 2), torch.arange(5)),
    [torch.arange(5), {"mask": torch.ones(5, 3), "scale": 0.5, "none": None}],
    Pair(torch.arange(5), torch.arange(5) * 2),
]


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_joined_again_are_the_batch(batch):
    assert row_count(batch) == 5
    (whole,) = join([take_rows(batch, [0, 1]), take_rows(batch, [2, 3, 4])])
    assert type(whole) is type(batch) and repr(whole) == repr(batch)
    swapped = take_rows(batch, [4, 0])
    assert row_count(swapped) == 2


def test_pieces_of_other_shapes_stay_apart():
    pieces = [torch.zeros(2, 3), torch.zeros(1, 4)]
    assert join(pieces) == pieces
    assert len(join([(torch.zeros(2), 1.0), (torch.zeros(2), 2.0)])) == 2
    assert len(join([torch.zeros(2), torch.zeros(2, dtype=torch.float64)])) == 2


@pytest.mark.parametrize("batch", [(torch.zeros(3), torch.zeros(2)), torch.zeros(()), [], {"x": 1.0}])
def test_a_batch_without_one_number_of_examples_is_refused(batch):
    with pytest.raises(InputError, match="as their first dimension, or `count` must be given, got shapes"):
        row_count(batch)


def test_what_cannot_be_cut_is_named():
    with pytest.raises(InputError, match="examples cannot be drawn out of a batch that holds a str"):
        take_rows((torch.zeros(2), "ab"), [0])


def test_pieces_with_a_tensor_that_has_no_examples_stay_apart():
    pieces = [{"x": torch.arange(2), "scale": torch.tensor(0.5)}, {"x": torch.arange(3), "scale": torch.tensor(0.5)}]
    assert join(pieces) == pieces
