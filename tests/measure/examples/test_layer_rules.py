"""Each layer's rule, alone and where a parameter has several uses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.measure.examples.per_example import per_example_sq_norms
from tests.measure.examples.naive import Called, ids, one_by_one, watched_norms

LAYERS = {
    "linear without leading dims": (lambda: nn.Linear(4, 3), (4,)),
    "linear with two": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "long and narrow: the gradient is the cheaper": (lambda: nn.Linear(4, 3), (40, 4)),
    "a gram in halves": (lambda: nn.Linear(260, 260), (128, 260)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), (4, 11)),
    "conv1d valid": (lambda: nn.Conv1d(4, 6, 3, padding="valid", stride=2), (4, 11)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 6)),
    "conv2d reflect, uneven": (lambda: nn.Conv2d(4, 2, (3, 2), (2, 1), (1, 0), padding_mode="reflect"), (4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), 1, (2, 1, 1), 2), (2, 5, 6, 4)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance norm by statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        (4, 3, 3),
    ),
    "batch norm by statistics": (lambda: nn.BatchNorm1d(4).eval(), (4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_rules(name):
    make, shape = LAYERS[name]
    layer = make().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(7, *shape, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).sin().flatten(1).sum(1).mean()

    got = per_example_sq_norms(layer, loss, [x])
    torch.testing.assert_close(got.values, one_by_one(layer, loss, [x]), rtol=1e-10, atol=1e-12)
    assert not set(got.rules.values()) & {"functional", "loop"}
    small = per_example_sq_norms(layer, loss, [x], memory_bytes=1)
    torch.testing.assert_close(small.values, got.values, rtol=1e-12, atol=0)


COVERED = {
    "the same matrix twice": lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w),
    "and once transposed": lambda m, x: F.linear(x, m.w).tanh() @ m.w + (x @ m.w.t()).cos() @ m.w.mT,
    "addmm of flat rows": lambda m, x: torch.addmm(m.v, x.reshape(-1, 4), m.w).view_as(x) * m.v,
    "an embedding at both ends": lambda m, x: F.linear(F.embedding(ids(x), m.e) + x, m.e),
    "an embedding twice at both ends": lambda m, x: F.linear(
        F.embedding(ids(x), m.e) * x + F.embedding(ids(x).flip(1), m.e), m.e
    ),
    "two outputs and an embedding": lambda m, x: F.linear(F.embedding(ids(x), m.e) * x, m.e) * F.linear(x, m.e),
    "padding": lambda m, x: F.embedding(ids(x), m.e, padding_idx=2) * x,
    "positions": lambda m, x: F.linear(x, m.w) + F.embedding(torch.arange(x.shape[1]), m.e),
    "positions for a batch of one": lambda m, x: x + F.embedding(torch.arange(x.shape[1])[None], m.e),
    "positions, twice added": lambda m, x: (lambda p: (x + p).tanh() + p)(F.embedding(torch.arange(x.shape[1]), m.e)),
    "a slice": lambda m, x: (F.linear(x, m.w) + m.e[: x.shape[1]]).tanh() * m.v,
    "slices that lie apart": lambda m, x: F.linear(x, m.w[:1]) * F.linear(x.tanh(), m.w[1:3]).sum(-1, keepdim=True),
    "chunks": lambda m, x: (lambda a, b: F.linear(x, a) * F.linear(x.cos(), b))(*m.w.chunk(2)),
    "added, subtracted, multiplied": lambda m, x: (m.v - x).tanh() * m.v + (x - m.v).sin() + (m.v + x) * m.v,
    "split by name": lambda m, x: F.linear(x, m.w.split(split_size=2, dim=0)[1]) * F.linear(x, m.w.chunk(2, 0)[0]),
    "in place": lambda m, x: x.clone().add_(m.v).tanh(),
    "sequence first": lambda m, x: F.layer_norm(F.linear(x.transpose(0, 1), m.w, m.v), (4,), m.v).transpose(0, 1),
    "not contiguous": lambda m, x: F.linear(x.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2], m.w[:, ::2][:2]),
    "an output that is not used": lambda m, x: (F.linear(x, m.w), F.linear(x.tanh(), m.w))[1],
    "checkpointed": lambda m, x: checkpoint(lambda x: F.linear(x, m.w).tanh(), x, use_reentrant=False) * m.v,
    "no gradient for some": lambda m, x: F.linear(x, m.w) + F.linear(x, m.w.detach()),
}


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("name", COVERED)
def test_every_use_of_a_parameter_counts_with_the_terms_between_uses(name, length):
    """length 5 is as long as the batch: the two dimensions must not be taken for each other."""
    model, x = Called(COVERED[name]), torch.randn(5, length, 4, dtype=torch.float64)

    def loss(model, batch):
        return model(batch[0]).sin().flatten(1).sum(1).mean()

    want = one_by_one(model, loss, [x])
    if name == "not contiguous":  # a step in a slice has no rule
        assert "functional" in per_example_sq_norms(model, loss, [x]).rules.values()
    elif name == "sequence first" and length == 5:
        with pytest.raises(InputError, match="examples and positions are equally many"):
            watched_norms(model, loss, [x])
    else:
        torch.testing.assert_close(watched_norms(model, loss, [x]).sq_norms(), want, rtol=1e-10, atol=0)
    torch.testing.assert_close(per_example_sq_norms(model, loss, [x]).values, want, rtol=1e-10, atol=0)
