"""What MKOR refuses: settings, bases, gradients, passes that no hook saw."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.optim.mkor.mkor import MKOR
from batchlab.optim.vrgd.optimizers import VRSGD
from tests.optim.mkor.small_mlp import batch, made, mlp, run


def test_passes_that_no_hook_saw_are_told_of():
    model = mlp()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer = made(model)
    with pytest.raises(InputError, match="no pass through a layer was seen, but there are gradients: make MKOR before"):
        optimizer.step()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gamma": 1.0}, r"gamma must lie in \(0, 1\), got 1.0"),
        ({"gamma": 0}, r"gamma must lie in \(0, 1\), got 0"),
        ({"inv_freq": 0}, "inv_freq must be an integer of at least 1, got 0"),
        ({"inv_freq": 2.5}, "inv_freq must be an integer of at least 1, got 2.5"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"eps": 0.0}, "eps must be > 0, infinity for never, got 0.0"),
        ({"eps": math.nan}, "eps must be > 0, infinity for never, got nan"),
        ({"zeta": 1.5}, r"zeta must lie in \[0, 1\], got 1.5"),
        ({"factor_dtype": torch.int8}, "factor_dtype must be a floating-point dtype of torch, got torch.int8"),
        ({"variant": "paper"}, r"variant must be one of \['exact', 'printed', 'released'\], got 'paper'"),
        ({"switch": "never"}, 'switch must be "none", "knee" or a number of steps of at least 1, got \'never\''),
        ({"switch": 0}, 'switch must be "none", "knee" or a number of steps of at least 1, got 0'),
        ({"ignore": ["1.x"]}, r"ignore must hold layers of the model or their names, as \['', '0', .*got '1.x'"),
        ({"ignore": [nn.Linear(1, 1)]}, "ignore must hold layers of the model or their names"),
        ({"ignore": [""]}, "model and base share no layer to precondition; left to base: {'0': 'in ignore', '2': 'in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        made(mlp(), **settings)


def test_bases_that_cannot_work_are_refused():
    model = mlp()
    with pytest.raises(InputError, match="base must be a torch.optim.Optimizer, got list"):
        MKOR(model, list(model.parameters()))
    with pytest.raises(InputError, match="base must step without a closure, got LBFGS"):
        MKOR(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="base must have differentiable=False"):
        MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))
    with pytest.raises(InputError, match="base must take its gradient from .grad, got VRSGD, which takes it in groups"):
        MKOR(model, VRSGD(model.parameters(), lr=0.1))


def test_gradients_and_weights_that_cannot_be_preconditioned_are_refused_by_name():
    model = mlp()
    optimizer = made(model)
    run(model, optimizer, 1)
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(
        InputError, match=r"the gradient of 2.weight is sparse, MKOR needs dense ones: put '2' in ignore"
    ):
        optimizer.step()
    with pytest.raises(InputError, match="the weight of layer '' is complex, MKOR needs real ones"):
        made(nn.Linear(2, 2, dtype=torch.complex64))
    optimizer.loss_scale, optimizer.inv_freq = 0.0, 1
    with pytest.raises(InputError, match="loss_scale must be finite and > 0, got 0.0"):
        model(batch(0)[0])
    lazy = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    with pytest.raises(InputError, match="layer '0' is lazy: run one forward pass before MKOR is made"):
        MKOR(lazy, torch.optim.SGD(lazy[1].parameters(), lr=0.1))
