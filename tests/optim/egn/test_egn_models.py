"""Which models EGN takes, and which it refuses as their examples have no rows of their own."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchlab.core.errors import InputError
from batchlab.optim.egn.egn import EGN
from tests.optim.egn.problems import batch, naive, network, primal, relative, taken


def test_frozen_parameters_and_buffers_stay_and_count_as_constants():
    """The step is that of the small system of what is trained; a layer frozen later is left out from then on."""
    model, (x, y) = nn.Sequential(network(), nn.BatchNorm1d(3).double()), batch("mse")
    model[1].eval()
    model[0][0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = EGN(model, damping=0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(f, trained, retain_graph=True) for f in model(x).flatten()]
    J = torch.stack([torch.cat([each.flatten() for each in row]) for row in rows])
    error = (model(x) - y).detach().flatten()
    want = primal(2 / 15 * J.T @ error, 2 / 15 * J.T @ J, 0.3)
    delta, _ = taken(model, optimizer, x, y)
    assert relative(delta[delta != 0], want) < 1e-12
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["0.2.weight", "0.2.bias", "1.weight", "1.bias"]
    assert all(p.grad is None for p in model.parameters())
    model[0].requires_grad_(False)
    model[0][0].requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step(x, y)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model, (x, y) = Tied().double(), batch("mse", c=4)
    _, g, H = naive(model, "mse", x, y)
    delta, _ = taken(model, EGN(model), x, y)
    assert len(delta) == 16 and relative(delta, primal(g, H, 1.0)) < 1e-12


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_outputs_of_any_shape(shape):
    """One number an example with no dimension of its own, or a matrix: the outputs are counted flat."""

    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(math.prod(shape))

        def forward(self, x):
            return self.inner(x).reshape(len(x), *shape)

    model, (x, _) = Shaped(), batch("mse")
    y = torch.randn(5, *shape, dtype=torch.float64)
    value, g, H = naive(model, "mse", x, y)
    delta, loss = taken(model, EGN(model), x, y)
    assert relative(delta, primal(g, H, 1.0)) < 1e-12 and loss.item() == pytest.approx(value.item())


class Calls(nn.Module):
    """A linear layer, and what is done to its outputs."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.function = network(), function
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.function(self, self.inner(x))


def count(module, f):
    module.calls.copy_(module.calls + 1)
    return f


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(network(), nn.BatchNorm1d(3)), r"1 is a BatchNorm1d in training mode.*call its .eval\(\)"),
        (nn.Sequential(network(), nn.BatchNorm1d(3, track_running_stats=False)).eval(), "1 is a BatchNorm1d"),
        (nn.Sequential(nn.Dropout(0.5), network()), "0 is a Dropout in training mode"),
        (nn.Sequential(nn.Embedding(9, 3, sparse=True)), "0.weight would have sparse gradients"),
        (Calls(lambda _, f: F.dropout(f)), "cannot be differentiated example by example"),
        (Calls(lambda _, f: f - f.mean(0)), "must treat the examples of a batch on their own"),
        (Calls(lambda _, f: [f]), "model must return a tensor, got list"),
        (Calls(lambda _, f: f.sum()), r"model must give a row an example, got \(\) for 5 examples"),
        (Calls(lambda _, f: f[:2]), r"model must give a row an example, got \(2, 3\) for 5 examples"),
        (Calls(count), "in-place changes of buffers"),
        (
            nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
            r"model changes its buffer 0.parametrizations.weight.0._u in forward.*call .eval\(\) on it",
        ),
    ],
    ids=["norm", "untracked", "dropout", "sparse", "functional", "mixed", "list", "scalar", "rows", "counter", "power"],
)
def test_models_whose_examples_have_no_rows_of_their_own_are_refused(model, message):
    model = model.double()
    at = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        EGN(model).step(*batch("mse"))
    assert all(torch.equal(value, at[name]) for name, value in model.state_dict().items())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.tokens(x)).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_searched_along_momentum(training):
    """Its fast kernels have no forward mode, and in eval torch has a fast path without derivatives."""
    model, x, y = Attends().double().train(training), torch.arange(12).view(4, 3) % 9, torch.arange(4) % 3
    optimizer = EGN(model, "cross_entropy", damping=0.1, momentum=0.5, line_search="armijo")
    losses = [optimizer.step(x, y).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_a_recurrent_layer_steps_but_has_no_forward_mode():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    model, (x, y) = Recurrent(), batch("mse", inputs=8)
    x, y = x.float().view(5, 4, 2), y.float()
    optimizer = EGN(model, line_search="armijo", adaptive_damping="trust_region")
    losses = [optimizer.step(x, y).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(InputError, match="need forward-mode differentiation, which this model has not"):
        EGN(model, momentum=0.5, line_search="armijo").step(x, y)


def test_dropout_that_is_off_and_outputs_near_zero_are_not_refused():
    model, (x, _) = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.Dropout(0.5).eval()), batch("mse")
    optimizer = EGN(model, damping=1e-8)
    for _ in range(3):
        loss = optimizer.step(x.float(), torch.zeros(5, 3))
    assert loss < 1e-10
