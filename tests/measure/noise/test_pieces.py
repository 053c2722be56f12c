"""What hooks see of each backward pass, and the factor by which that differs from `.grad`."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.pieces import PieceNorms
from batchlab.measure.noise.witness import WITNESS, Witness
from batchlab.measure.norms import CHUNK


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def loss(net, size, seed):
    return net(torch.randn(size, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).square().mean()


def squares(value, parameters):
    return [g.square().sum().item() for g in torch.autograd.grad(value, parameters)]


@pytest.mark.parametrize("merged", [False, True])
def test_pieces_are_of_each_pass_or_of_all_together(merged):
    net = model()
    parameters = list(net.parameters())
    norms = PieceNorms(parameters, merged=merged)
    loss(net, 9, 99).backward()  # not watched
    net.zero_grad()
    sizes = [5, 2, 7]
    for seed, size in enumerate(sizes):
        assert norms.empty == (seed == 0)
        with norms.watch(size):
            assert not norms.empty
            loss(net, size, seed).backward()
    each = [squares(loss(net, size, seed), parameters) for seed, size in enumerate(sizes)]
    whole = squares(sum(loss(net, size, seed) for seed, size in enumerate(sizes)), parameters)
    expected = [(sum(sizes), whole)] if merged else list(zip(sizes, each, strict=True))
    for piece, (examples, of_each) in zip(norms.take(), expected, strict=True):
        assert piece.examples == examples
        assert sorted(piece.squares.values()) == pytest.approx(sorted(of_each), rel=1e-12)
    assert norms.empty and norms.take() == []
    norms.close()
    assert not any(p._backward_hooks for p in parameters)


class _Kinds(nn.Module):
    """Parameters of every way to take a norm: short, longer than a chunk, half precision, sparse."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(5))
        self.matrix = nn.Parameter(torch.randn(3, 5))
        self.long = nn.Parameter(torch.randn(CHUNK + 5))
        self.coarse = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.table = nn.Embedding(10, 2, sparse=True)

    def forward(self):
        rows = self.table(torch.tensor([1, 3, 3]))
        return sum(p.float().pow(3).sum() for p in (self.vector, self.matrix, self.long, self.coarse, rows))


def test_every_kind_of_parameter_gives_its_square():
    net = _Kinds()
    norms = PieceNorms(list(net.parameters()))
    with norms.watch(1):
        net().backward()
    expected = [p.grad.to_dense().double().square().sum().item() for p in net.parameters()]
    assert sorted(norms.take()[0].squares.values()) == pytest.approx(sorted(expected), rel=1e-5)
    assert norms.witness.parameter is net.table.weight
    assert norms.witness.take()[:-1].tolist() == net.table.weight.grad.to_dense().flatten().tolist()


def test_a_pass_that_raises_is_forgotten():
    net = model()
    norms = PieceNorms(list(net.parameters()))
    with pytest.raises(ZeroDivisionError), norms.watch(3):
        loss(net, 3, 0).backward()
        raise ZeroDivisionError
    assert norms.empty
    with norms.watch(2):
        loss(net, 2, 1).backward()
    expected = squares(loss(net, 2, 1), list(net.parameters()))
    (piece,) = norms.take()
    assert piece.examples == 2 and sorted(piece.squares.values()) == pytest.approx(sorted(expected), rel=1e-12)


def test_a_pass_of_a_rank_that_raises_before_the_sum_ends_is_forgotten():
    net = model()
    norms = PieceNorms(list(net.parameters()), merged=True)
    norms._ddp = SimpleNamespace(require_backward_grad_sync=False)
    with pytest.raises(ZeroDivisionError), norms.watch(3):
        loss(net, 3, 0).backward()
        raise ZeroDivisionError
    assert norms.take() == [] and norms.empty


def test_what_cannot_be_told_apart_is_refused():
    net = model()
    norms = PieceNorms(list(net.parameters()))
    with pytest.raises(InputError, match="micro_batch must not be entered twice at once"), norms.watch(2):
        norms.watch(2).__enter__()
    with pytest.raises(InputError, match="a parameter got two gradients in one micro_batch"), norms.watch(2):
        [loss(net, 2, seed).backward() for seed in (0, 1)]
    for examples in (0, 1.5, True):
        with pytest.raises(InputError, match=f"examples must be an integer of at least 1, got {examples}"):
            norms.watch(examples).__enter__()
    assert norms.empty


@pytest.mark.parametrize(
    ("sizes", "chosen"), [([5000, 3, WITNESS, 7], 2), ([5000, WITNESS + 1, 3000], 1), ([1, 1025], 1), ([1, 1], 0)]
)
def test_the_witness_is_the_largest_of_the_small(sizes, chosen):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    assert Witness(parameters).parameter is parameters[chosen]


def witnessed(gradients, grad):
    """A witness that saw these gradients and whose `.grad` is `grad`."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    witness = Witness([parameter])
    for gradient in gradients:
        witness.see(gradient)
    parameter.grad = grad
    return witness


@given(
    seed=st.integers(0, 2**32),
    pieces=st.integers(2, 6),
    factor=st.floats(1e-3, 1e5),
    expected=st.sampled_from([1.0, 4.0]),
)
def test_a_common_factor_is_found(seed, pieces, factor, expected):
    """A loss scale that was taken out of `.grad`; one within the rounding of what is expected is that, exactly."""
    seen = 1.0 + torch.randn(pieces, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    witness = witnessed(seen, seen.sum(0) / factor)
    taken = witness.take()
    assert taken[:-1].tolist() == pytest.approx(seen.sum(0).tolist())
    assert taken[-1].item() == pytest.approx(seen.square().sum().item())
    found = witness.factor(taken, pieces, expected)
    assert found == pytest.approx(factor, rel=1e-9 if abs(factor / expected - 1) > 1e-3 else 1e-2)
    witness.parameter.grad = seen.sum(0) / expected * (1 + 1e-6)
    assert witness.factor(taken, pieces, expected) == expected
    assert witness.take().tolist() == [0.0] * 21


def test_gradients_that_are_no_multiple_are_refused():
    seen = torch.eye(4, dtype=torch.float64)[:2] + 1
    witness = witnessed(seen, seen[0] + seen[1].flip(0))
    with pytest.raises(InputError, match="the gradients seen in micro_batch do not add up to .grad"):
        witness.factor(witness.take(), 2, 1.0)


def test_where_nothing_can_be_told_it_is_what_is_expected():
    """No gradient at all, and pieces that cancel to far below their own size."""
    witness = witnessed(torch.ones(2, 4, dtype=torch.float64), None)
    assert witness.factor(witness.take(), 2, 3.0) == 3.0
    one = torch.ones(4, dtype=torch.float64)
    witness = witnessed([one, -one + 1e-5], one * 1e-5 / 300)
    assert witness.factor(witness.take(), 2, 3.0) == 3.0
