"""One indexing operation, single examples and torch's own loader must give the same batch."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch, to_device
from batchlab.workloads.corpus import Windows
from batchlab.workloads.examples import Batch, Examples, collate

EXAMPLES = Examples(torch.randn(12, 1, 3, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12))
WINDOWS = Windows(torch.arange(100, dtype=torch.uint8), context=7)
CHOSEN = [5, 0, 11, 5]


@pytest.mark.parametrize("data", [EXAMPLES, WINDOWS], ids=["examples", "windows"])
def test_every_way_to_a_batch_is_the_same(data):
    at_once = fetch(data, CHOSEN, collate)
    one_by_one = collate([data[i] for i in CHOSEN])
    loader = next(iter(DataLoader(Subset(data, CHOSEN), batch_size=4, collate_fn=collate)))
    for other in (one_by_one, loader):
        assert isinstance(other, Batch)
        for ours, theirs in zip(at_once, other, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_batch_keeps_its_type_on_its_way_to_a_device():
    assert isinstance(to_device(fetch(EXAMPLES, CHOSEN, collate), torch.device("cpu")), Batch)


def test_inputs_and_targets_must_be_equally_many():
    with pytest.raises(InputError, match="equally many, got 2 and 3"):
        Examples(torch.zeros(2), torch.zeros(3))


def test_windows_predict_every_byte_but_the_first_once():
    assert torch.cat([WINDOWS[i][1] for i in range(len(WINDOWS))]).tolist() == list(range(1, 99))  # 99 is left over
    assert torch.cat([WINDOWS[i][0] for i in range(len(WINDOWS))]).tolist() == list(range(98))


@pytest.mark.parametrize("length, windows", [(0, 0), (1, 0), (7, 0), (8, 1), (14, 1), (15, 2)])
def test_an_unfinished_window_is_left_out(length, windows):
    assert len(Windows(torch.zeros(length, dtype=torch.uint8), context=7)) == windows


def test_windows_that_are_kept_are_evenly_spaced():
    kept = Windows(torch.arange(101, dtype=torch.uint8), context=10, at_most=4)
    assert [kept[i][0][0].item() for i in range(len(kept))] == [0, 20, 50, 70]
    assert len(Windows(torch.arange(101, dtype=torch.uint8), context=10, at_most=10)) == 10
