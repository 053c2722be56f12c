"""The gradient and the moments of a batch from its micro-batches' gradients, over ranks too."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.batch_tests import batch_moments
from batchlab.measure.noise.group_gradients import GroupGradients
from tests.spine.forked import in_ranks

SIZES = [3, 1, 4, 2]


class Parts(nn.Module):
    """One layer that all groups use, one that only the first does, one that none does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.first, self.never = (nn.Linear(3, 1).double() for _ in range(3))

    def forward(self, x, index):
        return (self.always(x) + (self.first(x) if index == 0 else 0)).square().mean()


def pieces():
    x = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(enumerate(x.split(SIZES)))


def measured(mine, scale=1.0, group=None):
    model = Parts()
    groups = GroupGradients(model.parameters(), group)
    for index, piece in mine:
        share = scale * len(piece) / sum(SIZES)
        (model(piece, index) * share).backward()
        groups.add(len(piece), share=share)
    return groups.finish(), [p.grad for p in model.parameters()]


def naive():
    """The moments of the groups' own mean gradients, and what backward passes add up to."""
    model, rows = Parts(), []
    for index, piece in pieces():
        (model(piece, index) * len(piece) / sum(SIZES)).backward()
        own = torch.autograd.grad(model(piece, index), list(model.parameters()), allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), own, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return batch_moments([torch.stack(rows)], examples=SIZES), [p.grad for p in model.parameters()]


def check(moments, gradients):
    expected, plain = naive()
    assert list(moments) == pytest.approx(list(expected), rel=1e-9)
    assert plain[-1] is None and plain[2] is not None
    torch.testing.assert_close(gradients, plain, rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_plain_passes_and_none_where_nothing_was_used():
    """Else an optimizer would decay a parameter at the updates where a test is due, and leave it at the others."""
    check(*measured(pieces()))


def _on_a_rank():
    mine = pieces()[:2] if dist.get_rank() == 0 else pieces()[2:]
    check(*measured(mine, 2.0, dist.group.WORLD))


def test_ranks_give_what_one_process_gives(tmp_path):
    assert in_ranks(2, tmp_path, _on_a_rank) == [0, 0]


def test_bad_use_is_named():
    table = nn.Embedding(5, 2, sparse=True)
    groups = GroupGradients(table.parameters())
    with pytest.raises(InputError, match="finish needs at least one add before it"):
        groups.finish()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="gradients must be dense, got a sparse one"):
        groups.add(1, share=1.0)
    with pytest.raises(InputError, match="parameters must hold at least one tensor that requires a gradient"):
        GroupGradients([])
    with pytest.raises(InputError, match="share must be finite and > 0, got 0"):
        groups.add(1, share=0.0)
