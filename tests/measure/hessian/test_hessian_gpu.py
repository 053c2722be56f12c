"""Curvature on a GPU: the CPU's in float64, in float32 unspoilt by TF32, and through layers with own kernels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.measure.hessian.lanczos import lanczos
from batchlab.measure.hessian.loss_surface import LossSurface

pytest.importorskip("curvlinops")

from batchlab.measure.hessian.cauchy import cauchy_learning_rate
from batchlab.measure.hessian.curvature import curvature

pytestmark = pytest.mark.gpu
CPU, DOUBLE = torch.device("cpu"), torch.float64
close = pytest.approx


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.block(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


def network(kind):
    torch.manual_seed(0)
    if kind == "conv":
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(288, 3)]
        return nn.Sequential(*layers).to(DOUBLE), (8, 8)
    return {"attention": Attention, "lstm": Recurrent}[kind]().to(DOUBLE), (5,)


def batches(places, sizes=(12, 7)):
    generator = torch.Generator().manual_seed(1)
    shape = (3, *places) if len(places) == 2 else (*places, 8)
    return [
        [torch.randn(n, *shape, generator=generator, dtype=DOUBLE), torch.randint(3, (n,), generator=generator)]
        for n in sizes
    ]


@pytest.mark.parametrize("kind", ["conv", "attention", "lstm"])
def test_gradients_and_products_are_those_of_the_cpu(accelerator, kind):
    """The batches stay on the CPU: each is taken to the model's device."""
    model, places = network(kind)
    data, found = batches(places), []
    for device in (CPU, accelerator):
        surface = LossSurface(copy.deepcopy(model).to(device), cross_entropy)
        pieces = [(batch, len(batch[1])) for batch in data]
        with surface.still():
            g = surface.mean_gradient(pieces)
            H = surface.hessian(pieces)
            v = torch.linspace(-1, 1, surface.size, dtype=DOUBLE).to(device)
            found.append([each.cpu() for each in (g, H @ v, H @ g)])
            assert g.device.type == device.type
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_curvature_is_that_of_the_cpu_and_leaves_the_model_and_generators_alone(accelerator):
    model, places = network("conv")
    data = batches(places, (24, 16))
    right = curvature(model, cross_entropy, data, top=2, steps=12, probes=2, batch_sizes=(4, 10), repeats=3)
    model.to(accelerator)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3, device=accelerator)
    torch.manual_seed(5)
    found = curvature(model, cross_entropy, data, top=2, steps=12, probes=2, batch_sizes=(4, 10), repeats=3)
    assert torch.equal(torch.rand(3, device=accelerator), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and model.training
    assert [each.value for each in found.largest] == close([each.value for each in right.largest], rel=1e-7)
    assert [each.value for each in found.smallest] == close([each.value for each in right.smallest], rel=1e-6)
    assert found.trace.value == close(right.trace.value, rel=1e-7)
    for ours, theirs in zip(found.batches, right.batches, strict=True):
        assert ours.samples == close(theirs.samples, rel=1e-7)
        assert ours.noise_kappa_sq.value == close(theirs.noise_kappa_sq.value, rel=1e-6)
    models = [copy.deepcopy(model).to(device) for device in (CPU, accelerator)]
    rates = [cauchy_learning_rate(each, cross_entropy, data, keep=1.0) for each in models]
    assert rates[1] == close(rates[0], rel=1e-9) and rates[0] != 1.0


def test_float32_convolutions_are_not_rounded_to_tf32(accelerator):
    """With TF32's 2^-11 the products are off by 1e-4 or more; float32 is off by 1e-6."""
    model, places = network("conv")
    data = batches(places)
    pieces, found = [(batch, len(batch[1])) for batch in data], []
    for dtype in (DOUBLE, torch.float32):
        own = copy.deepcopy(model).to(accelerator, dtype)
        surface = LossSurface(own, cross_entropy)
        cast = [([batch[0].to(dtype), batch[1]], n) for batch, n in pieces]
        with torch.autocast(accelerator.type, torch.bfloat16), surface.still():
            v = torch.linspace(-1, 1, surface.size, dtype=DOUBLE).to(accelerator, dtype)
            found.append((surface.hessian(cast) @ v).double())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 2e-5


class Diagonal:
    def __init__(self, values):
        self.values, self.device, self.dtype = values, values.device, values.dtype
        self.shape = (len(values), len(values))

    def __matmul__(self, vector):
        return self.values * vector


def test_lanczos_on_the_device_finds_a_known_spectrum(accelerator):
    values = torch.tensor([-2.0, 0.0, 0.5, 3.0, 3.0], dtype=DOUBLE, device=accelerator)
    run = lanczos(Diagonal(values), 5, torch.Generator().manual_seed(0))
    assert run.values.is_cpu and run.basis.device.type == accelerator.type
    torch.testing.assert_close(run.values, values.cpu().sort().values, rtol=1e-10, atol=1e-10)
