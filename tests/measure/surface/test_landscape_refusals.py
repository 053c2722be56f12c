"""Data, axes, directions and losses that make no landscape: each is named."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.surface.landscape import landscape
from tests.measure.surface.small import LINE, ONES


def mean_of(model, batch):
    return model(batch).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": iter(ONES)}, "ends after one: give list"),
        ({"data": (b for b in ONES)}, "got a generator that ends after one"),
        ({"data": torch.ones(2, 2)}, r"data must be a list of batches or a DataLoader, got one batch: give \[batch\]"),
        ({"data": (torch.ones(2, 2), torch.ones(2))}, r"got one batch: give \[batch\]"),
        ({"data": 3}, "data must be a list of batches or a DataLoader, got int"),
        ({"data": []}, "data must hold at least one batch with at least one example, got none"),
        ({"data": [(torch.ones(2), torch.ones(3))]}, "first dimension"),
        ({"count": lambda batch: -1}, "count must return the examples of a batch, at least 0, got -1"),
        ({"dimensions": 3}, "dimensions must be 1 or 2, got 3"),
        ({"points": 50}, "points must be an odd integer of at least 3, so that one of them is 0, got 50"),
        ({"points": 1}, "points must be an odd integer of at least 3"),
        ({"span": math.nan}, "span must be finite and > 0, got nan"),
        ({"norm": "l2"}, "norm must be one of"),
        ({"directions": 0}, "directions must be at least 1, got 0"),
        ({"directions": []}, "directions must be at least 1, got 0"),
        ({"dimensions": 2, "directions": 3}, "directions must be 2, got 3"),
        ({"directions": ["weight"]}, "a direction must be a mapping of name to tensor, got str"),
        ({"directions": [{"w": torch.ones(1)}]}, "'w' has .*, the model no trainable parameter of this name"),
        ({"directions": [{"weight": torch.ones(2)}]}, r"'weight' has \(2,\), the model \(1, 2\)"),
        ({"directions": [{"weight": torch.tensor([[1.0, math.nan]])}]}, "a direction must be finite"),
        ({"coordinates": [0.0, 0.0]}, "coordinates must be at least 2 finite ascending numbers"),
        ({"coordinates": [0.0, math.inf]}, "coordinates must be at least 2 finite ascending numbers"),
        ({"coordinates": ([0.0, 1.0], [0.0])}, "coordinates must be one axis"),
        ({"coordinates": [0.0, 1.0], "dimensions": 2}, "coordinates must be a pair of axes"),
        ({"loss": lambda m, b: m(b).squeeze(1)}, r"loss must return a scalar tensor, .* got shape \(2,\)"),
        ({"loss": lambda m, b: 1.0}, "loss must return a scalar tensor, .* got float"),
        ({"model": nn.ReLU()}, "the model has no parameter"),
    ],
)
def test_bad_input_is_named(options, message):
    given = {"model": LINE, "loss": mean_of, "data": ONES, "points": 3} | options
    with pytest.raises(InputError, match=message):
        landscape(given.pop("model"), given.pop("loss"), given.pop("data"), **given)


def test_data_that_shrinks_between_passes_is_refused():
    class Shrinking:
        left = 3

        def __iter__(self):
            self.left -= 1
            return iter([torch.ones(self.left, 2)])

    with pytest.raises(InputError, match="the same examples at every pass, got 1 after 2"):
        landscape(LINE, mean_of, Shrinking(), points=3)
