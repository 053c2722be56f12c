"""Optimizers that are no Adam, options and limits that make no sense: each is named."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.course.adam_reading import AlarmLimits
from batchlab.measure.course.adam_stability import AdamStability


def test_an_optimizer_that_is_no_adam_is_named():
    ps = [nn.Parameter(torch.ones(3))]
    for make in (lambda: torch.optim.SGD(ps, lr=0.1), lambda: torch.optim.RMSprop(ps), lambda: torch.optim.Adagrad(ps)):
        with pytest.raises(TypeError, match=r'keeps no "exp_avg_sq" in its state: its updates are not Adam\'s'):
            AdamStability(make())
    optimizer = torch.optim.Adamax(ps)
    AdamStability(optimizer, every=1)
    ps[0].grad = torch.ones(3)
    with pytest.raises(TypeError, match='Adamax keeps no "exp_avg_sq" in its state'):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "tensor"}, 'by must be "parameter" or "layer", got \'tensor\''),
        ({"by": "layer"}, 'by="layer" needs the parameters. names: give model'),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"coordinates": 1.5}, "coordinates must be an integer of at least 1, got 1.5"),
        ({"lag_memory": 1.1}, r"lag_memory must lie in \[0, 1\], got 1.1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        AdamStability(torch.optim.Adam([nn.Parameter(torch.ones(3))]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sarle": 0.0}, "sarle must be > 0, got 0.0"),
        ({"consecutive": 0}, "consecutive must be an integer of at least 1, got 0"),
        ({"cosine": 2.0}, r"cosine must lie in \[-1, 1\], got 2.0"),
    ],
)
def test_bad_limits_are_named(options, message):
    with pytest.raises(InputError, match=message):
        AlarmLimits(**options)
