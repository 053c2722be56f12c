from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch, to_device


class _Many:
    def __init__(self):
        self.asked = []

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return i, 2.0 * i

    def __getitems__(self, indices):
        self.asked.append(indices)
        return [self[i] for i in indices]


def test_a_batch_is_what_torchs_loader_makes():
    tensors = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    plain = [{"x": torch.full((2,), float(i)), "y": i} for i in range(6)]
    for data in (tensors, plain, _Many()):
        expected = next(iter(DataLoader(data, sampler=[4, 1, 3], batch_size=3)))
        got = fetch(data, [4, 1, 3])
        assert repr(got) == repr(expected)


@pytest.mark.parametrize(
    "examples", [[(torch.ones(1),), (torch.ones(2),)], [object(), object()], [[1, 2], [1]], [{"a": None}] * 2]
)
def test_examples_that_cannot_be_put_together_want_a_collate(examples):
    with pytest.raises(InputError, match=r"^examples cannot be put together \(.*\): give a collate"):
        fetch(examples, [0, 1])


def test_an_error_of_memory_is_none_of_the_examples():
    def collate(_):
        raise RuntimeError("stack expects each tensor to be equal size")

    with pytest.raises(RuntimeError, match="^stack expects"):
        fetch([1, 2], [0, 1], collate)


def test_many_are_asked_for_at_once_and_collated_by_the_job():
    data = _Many()
    assert fetch(data, [2, 5], lambda examples: examples[::-1]) == [(5, 10.0), (2, 4.0)]
    assert data.asked == [[2, 5]]


def test_a_default_device_elsewhere_changes_nothing():
    with torch.device("meta"):
        assert fetch(TensorDataset(torch.arange(6, device="cpu")), [4, 1])[0].tolist() == [4, 1]


def test_containers_keep_their_type_on_the_way_to_a_device():
    pair = namedtuple("pair", "a b")
    batch = {"t": torch.ones(2), "n": [pair(torch.ones(1), 3), (torch.zeros(1), "text")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["t"].device.type == moved["n"][0].a.device.type == "meta"
    assert isinstance(moved["n"][0], pair) and moved["n"][0].b == 3 and moved["n"][1][1] == "text"


@dataclass(frozen=True)
class Labelled:
    x: torch.Tensor
    parts: list
    name: str = "a"


def test_dataclasses_are_moved_with_what_they_hold():
    batch = Labelled(torch.ones(2), [torch.ones(1)])
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, Labelled) and moved.name == "a"
    assert moved.x.device.type == moved.parts[0].device.type == "meta" and batch.x.device.type == "cpu"
