"""What ConAdv refuses: settings, models, data and losses."""

import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.input import adversarial_input
from tests.optim.adversarial.small_network import RHO, cross_entropy, data, network


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": -1}, r"tau must be an integer of at least 0, got -1"),
        ({"tau": 1.0}, r"tau must be an integer of at least 0, got 1.0"),
        ({"rho": -0.1}, r"rho must be finite and >= 0, in the unit of the input, got -0.1"),
        ({"rho": math.inf}, r"rho must be finite and >= 0, in the unit of the input, got inf"),
        ({"rho": "8/255"}, r"rho must be finite and >= 0, in the unit of the input, got '8/255'"),
        ({"rho": torch.ones(3), "norm": "l2"}, r'rho must be one number for norm "l2", got a tensor of shape \(3,\)'),
        ({"norm": "l1"}, r"""norm must be "linf" or "l2", got 'l1'"""),
        ({"weights": (0, 0)}, r"weights must be two finite numbers >= 0, not both 0, got \(0, 0\)"),
        ({"weights": (1.0, math.nan)}, r"weights must be two finite numbers >= 0, not both 0, got \(1.0, nan\)"),
        ({"weights": 1.0}, r"weights must be two finite numbers >= 0, not both 0, got 1.0"),
        ({"clip": (1.0, 0.0)}, r"clip must be None or \(low, high\) with low < high, got \(1.0, 0.0\)"),
        ({"clip": 1.0}, r"clip must be None or \(low, high\) with low < high, got 1.0"),
        ({"executor": "gpu"}, r"executor must be one of inline, thread, process, stream, got 'gpu'"),
        ({"executor": "stream"}, r"executor 'stream' is for models on cuda, 0.weight is on cpu: use \"thread\", "),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        ConcurrentAdversarial(network(), cross_entropy, **{"rho": RHO} | settings)


def test_settings_that_turn_bad_are_refused_at_the_step():
    """Given anew, or changed where they are."""
    rho, high = torch.full((1, 1, 1), RHO), torch.tensor(9.0)
    adversarial = ConcurrentAdversarial(network(), cross_entropy, rho=rho, clip=(torch.tensor(-9.0), high))
    batches = adversarial.batches(data(6))
    adversarial.backward(next(batches))
    for change, message in (
        (lambda: rho.neg_(), "rho must be finite and >= 0"),
        (lambda: high.neg_().sub_(1.0), "clip must be None or"),
        (lambda: setattr(adversarial, "rho", torch.tensor(-RHO)), "rho must be finite and >= 0"),
    ):
        adversarial.backward(next(batches))
        change()
        with pytest.raises(InputError, match=message):
            next(batches)
        rho.abs_()
        high.abs_()
        adversarial.rho = rho
        batches = adversarial.batches(data(6))


def test_bad_models_data_and_losses_are_refused():
    with pytest.raises(InputError, match=r"^model must be a torch.nn.Module, got function$"):
        ConcurrentAdversarial(network, cross_entropy, rho=RHO)
    with pytest.raises(
        InputError, match=r"^model must have an auxiliary BatchNorm beside each, but 1 has none: call co"
    ):
        ConcurrentAdversarial(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), cross_entropy, rho=RHO)
    adversarial = ConcurrentAdversarial(network(), cross_entropy, rho=RHO, tau=3)
    with pytest.raises(InputError, match=r"^tau must be less than the number of batches, got tau=3 for 3$"):
        next(adversarial.batches(data(3)))
    assert list(adversarial.batches([])) == []
    with pytest.raises(InputError, match=r"^loader must be an iterable of batches, got one batch$"):
        adversarial.batches(data(1)[0])
    with pytest.raises(InputError, match=r"^loader must be an iterable of batches, got <class 'int'>$"):
        adversarial.batches(3)
    with pytest.raises(
        InputError, match=r"^backward\(\) must be called inside `for batch in adversarial.batches\(load"
    ):
        adversarial.backward(data(1)[0])
    for batch, got in (
        ((torch.ones(3, dtype=torch.long),), r"torch.int64, torch.strided, shape \(3,\)"),
        (("text",), "str"),
        ((torch.ones(0, 2),), r"torch.float32, torch.strided, shape \(0, 2\)"),
        ((torch.ones(2, 2, dtype=torch.complex64),), r"torch.complex64"),
        ((torch.eye(2).to_sparse(),), r"torch.float32, torch.sparse_coo"),
    ):
        with pytest.raises(
            InputError, match=r"^the input, batch\[0\], must be a dense floating-point tensor .* got " + got
        ):
            next(adversarial.batches([batch] * 5))
    with pytest.raises(InputError, match=r"^input_key must say where the input is in a batch, got 0 for keys \['x'\]$"):
        next(adversarial.batches([{"x": torch.ones(2)}] * 5))
    with pytest.raises(InputError, match=r"^clip must hold the inputs themselves, got \(0.0, 1.0\) for inputs from -"):
        next(ConcurrentAdversarial(network(), cross_entropy, rho=RHO, clip=(0.0, 1.0)).batches(data(3)))
    batch, linear = (torch.ones(2, 3),), nn.Linear(3, 3)
    with pytest.raises(
        InputError, match=r"^loss_fn must return a scalar tensor, the mean over the batch's examples, got"
    ):
        adversarial_input(linear, lambda m, b: m(b[0]), batch, rho=RHO)
    with pytest.raises(InputError, match=r"^loss_fn must depend on the input, batch\[0\], got a loss that does not$"):
        adversarial_input(linear, lambda m, b: m.weight.sum(), batch, rho=RHO)
    with pytest.raises(InputError, match=r"^rho must broadcast against an example of shape \(3,\), got \(2,\)$"):
        adversarial_input(linear, lambda m, b: m(b[0]).mean(), batch, rho=torch.ones(2))
    batches = adversarial.batches(data(5))
    with pytest.raises(InputError, match=r"^scale must be finite or a function, got nan$"):
        adversarial.backward(next(batches), scale=math.nan)
