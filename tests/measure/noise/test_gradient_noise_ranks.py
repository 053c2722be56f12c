"""Over ranks: what one process gives, one look a step, and averages that come too early are refused."""

import contextlib
import math

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from batchlab.measure.noise.noise_pair import unbiased_pair
from tests.measure.noise.small import naive_pair, small_batch, small_model
from tests.spine.forked import in_ranks


def _rank_pairs(folder, method, per_rank):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    model = small_model(dtype=torch.float64)
    noise = GradientNoise(model, method=method)
    wrapped = DistributedDataParallel(model)
    x, y = (part.split(sum(per_rank))[rank] for part in small_batch(2 * sum(per_rank), torch.float64))
    for index, (part_x, part_y) in enumerate(zip(x.split(per_rank), y.split(per_rank), strict=True)):
        sync = contextlib.nullcontext() if index == len(per_rank) - 1 else wrapped.no_sync()
        with sync, noise.micro_batch(len(part_x)):
            ((wrapped(part_x).squeeze(1) - part_y).square().mean() * len(part_x) / sum(per_rank)).backward()
    noise.step()
    torch.save(torch.tensor(noise.pair, dtype=torch.float64), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("method", "per_rank"), [("ranks", [16]), ("ranks", [5, 4, 7]), ("micro_batch", [8, 8]), ("micro_batch", [5, 11])]
)
def test_ranks_give_what_one_process_gives(tmp_path, method, per_rank):
    assert in_ranks(2, tmp_path, _rank_pairs, tmp_path, method, per_rank) == [0, 0]
    pieces = [sum(per_rank)] if method == "ranks" else per_rank
    expected = naive_pair(small_model(dtype=torch.float64), pieces * 2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True).tolist()
        assert got == pytest.approx(list(expected), rel=1e-9)


class _Halves(nn.Module):
    """Its second half is used where an example says so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x, both):
        return self.first(x).sum(1) + (self.second(x).sum(1) if both else 0)


def _passes_in_no_sync(folder, both):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(_Halves(), find_unused_parameters=True)
    noise, told, x = GradientNoise(wrapped, method="ranks"), [], small_batch(12, torch.float64)[0][:, :3]
    rank, looked_at = dist.get_rank(), []
    for _ in range(3):
        wrapped.zero_grad()
        for index, part in enumerate(x.chunk(2)[rank].split(2)):
            with noise.micro_batch(2), contextlib.nullcontext() if index == 2 else wrapped.no_sync():
                (wrapped(part, both[index]).square().mean() / 3).backward()
                looked_at.append(len(noise._all._seen))
        noise.step()
        told.append([math.nan] * 2 if noise.pair is None else list(noise.pair))
    torch.save((torch.tensor(told, dtype=torch.float64), noise.skipped, looked_at), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("both", "looked_at", "skipped"),
    [([True] * 3, [0, 0, 4] * 3, 0), ([True, True, False], [0, 0, 2, 4, 4, 4, 4, 4, 4], 1)],
    ids=["all in the last pass", "one half not in the last"],
)
def test_under_ddp_only_the_pass_that_ends_the_sum_is_looked_at(tmp_path, both, looked_at, skipped):
    assert in_ranks(2, tmp_path, _passes_in_no_sync, tmp_path, both) == [0, 0]
    model, x = _Halves(), small_batch(12, torch.float64)[0][:, :3]
    sums = []
    for half in x.chunk(2):
        model.zero_grad()
        for index, part in enumerate(half.split(2)):
            (model(part, both[index]).square().mean() / 3).backward()
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    small, big = sum(s.square().sum().item() for s in sums) / 2, (sum(sums) / 2).square().sum().item()
    for rank in range(2):
        told, missed, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (missed, seen) == (skipped, looked_at)
        assert told[:skipped].isnan().all()
        for pair in told[skipped:].tolist():
            assert pair == pytest.approx(unbiased_pair(small, big, 6, 12), rel=1e-9)


def _averaged_too_early(said):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = small_model(dtype=torch.float64)
    noise = GradientNoise(model, method="ranks")
    wrapped = DistributedDataParallel(model)
    x, y = (part.split(16)[dist.get_rank()] for part in small_batch(32, torch.float64))
    for part_x, part_y in zip(x.split(8), y.split(8), strict=True):
        with noise.micro_batch(8):
            ((wrapped(part_x).squeeze(1) - part_y).square().mean() / 2).backward()
    with pytest.raises(InputError, match=said):
        noise.step()


def test_ranks_whose_gradients_were_averaged_between_micro_batches_are_refused(tmp_path):
    said = r"needs each rank's own sum over its micro-batches.*no_sync\(\) on all but the last"
    assert in_ranks(2, tmp_path, _averaged_too_early, said) == [0, 0]
