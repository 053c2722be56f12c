"""Factored dimensions, and chunks that change no bit."""

import pytest
import torch

from batchlab.optim.learned import learned
from batchlab.optim.learned.features import factored_dims, pieces
from tests.optim.learned.parameters import after, parameters


def test_squares_and_ties_take_the_last_dimensions():
    assert factored_dims((6, 6)) == (0, 1)
    assert factored_dims((3, 9, 3, 9)) == (1, 3)
    assert factored_dims((2,) * 20) == (18, 19)  # numpy's default sort is not stable here


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_no_bit(dtype, monkeypatch):
    """The network never sees more than a chunk, and sums do not depend on it."""
    monkeypatch.setitem(learned.BLOCK, "cpu", 64)  # as if these tensors were large
    widths = []

    def watched(layers, x):
        widths.append(x.shape[1])
        return learned_network(layers, x)

    learned_network = learned.network
    monkeypatch.setattr(learned, "network", watched)
    shapes = [(301,), (13, 11), (2, 150), (3, 4, 5, 3), (9, 1), ()]
    whole = after(parameters(shapes, dtype=dtype), 3, chunk=10_000)
    for chunk in (7, 64, 100, 299):
        widths.clear()
        for ours, theirs in zip(after(parameters(shapes, dtype=dtype), 3, chunk=chunk), whole, strict=True):
            assert torch.equal(ours, theirs), f"chunk {chunk}, shape {tuple(ours.shape)}"
        assert max(widths) <= chunk


CUT = [((7,), 3), ((2, 150), 7), ((3, 4, 5, 7), 30), ((5, 3), 100), ((), 1), ((4, 0), 1)]


@pytest.mark.parametrize("shape, most", CUT)
def test_pieces_make_up_the_tensor_once(shape, most):
    counted, sizes = torch.zeros(shape), []
    for piece in pieces(shape, most):
        part = counted[piece] if piece else counted
        part += 1
        sizes.append(part.numel())
    assert (counted == 1).all() and max(sizes) <= most
