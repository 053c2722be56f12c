"""Norms of lists, held until there are enough, are those of each; the hooks that take them do so on GPUs alone."""

import pytest
import torch

from batchlab.measure.noise import device_norms
from batchlab.measure.noise.device_norms import DeviceNorms
from batchlab.measure.noise.pieces import PieceNorms

SHAPES = [(3,), (), (0, 2), (40, 30), (5, 4, 3), (2000,)]


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("held", [0, 5000, 2**25])
def test_squares_by_place_whatever_is_held(monkeypatch, held):
    monkeypatch.setattr(device_norms, "HELD", held)
    norms, gradients = DeviceNorms(), [*drawn(), *drawn(torch.float64), *drawn(torch.bfloat16)]
    for place, gradient in enumerate(gradients):
        norms.see(place, gradient, keeps=place % 3 != 0)
    found = norms.squares()
    assert sorted(found) == list(range(len(gradients)))
    for place, gradient in enumerate(gradients):
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        assert found[place].dtype == wide
        torch.testing.assert_close(found[place].double(), gradient.double().square().sum(), rtol=1e-6, atol=0)
    assert norms.squares() == {}


def test_no_more_is_held_than_said(monkeypatch):
    monkeypatch.setattr(device_norms, "HELD", 1000)
    norms = DeviceNorms()
    for place in range(40):
        norms.see(place, torch.ones(100), keeps=True)
        assert sum(each.nbytes for _, each in norms._held) <= 1000
    assert {int(square) for square in norms.squares().values()} == {100}


def test_what_was_seen_before_clearing_is_forgotten():
    norms = DeviceNorms()
    norms.see(0, torch.ones(2), keeps=True)
    norms.see(1, torch.ones(2), keeps=False)
    norms.clear()
    assert norms.squares() == {}


def test_a_gradient_that_waits_does_not_become_that_of_another_leaf():
    """Two leaves may be handed one tensor, which autograd gives away as `.grad` where nobody else holds it."""
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    b.grad, norms = torch.zeros(3), DeviceNorms()
    a.register_hook(lambda g: norms.see(0, g, keeps=a.grad is not None))
    b.register_hook(lambda g: norms.see(1, g, keeps=b.grad is not None))

    def taken(leaf):
        leaf.grad.zero_()

    a.register_post_accumulate_grad_hook(taken)
    ((a + b) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert {place: float(square) for place, square in norms.squares().items()} == pytest.approx({0: 14.0, 1: 14.0})


@pytest.mark.gpu
@pytest.mark.parametrize("merged", [False, True])
def test_hooks_see_the_norms_of_each_piece_or_of_their_sum(accelerator, merged):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1)).double()
    x = torch.randn(12, 300, dtype=torch.float64)
    expected = []
    for part in (x[:8],) if merged else (x[:4], x[4:8]):
        model.zero_grad()
        model(part).square().sum().backward()
        expected.append([p.grad.square().sum() for p in model.parameters()])
    model.zero_grad()
    model.to(accelerator)
    pieces = PieceNorms(list(model.parameters()), merged=merged)
    for part in (x[:4], x[4:8]):
        with pieces.watch(4):
            model(part.to(accelerator)).square().sum().backward()
    with pytest.raises(ZeroDivisionError), pieces.watch(4):
        model(x[8:].to(accelerator)).square().sum().backward()
        raise ZeroDivisionError
    taken = pieces.take()
    assert len(taken) == len(expected)
    for piece, squares in zip(taken, expected, strict=True):
        for place, square in enumerate(squares):
            assert float(piece.squares[place]) == pytest.approx(float(square), rel=1e-10)
