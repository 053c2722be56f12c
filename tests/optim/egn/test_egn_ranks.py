"""EGN on several ranks is EGN in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.egn.egn import EGN
from tests.optim.egn.problems import batch, flat, network
from tests.spine.forked import in_ranks

OPTIONS = dict(damping=0.1, lr=20.0, momentum=0.5, line_search="armijo", adaptive_damping="trust_region")
COUNTS = [4, 2, 3]


def ranks_steps(model, loss, group, of_rank, limits):
    """Five steps; of each the loss, the share and λ, and the weights at the end."""
    optimizer, told = EGN(model, loss, process_group=group, **OPTIONS, **limits), []
    for t in range(5):
        x, y = of_rank(*batch(loss, b=9, seed=t))
        told += [optimizer.step(x, y).item(), optimizer.last.share, optimizer.param_groups[0]["damping"]]
    return torch.cat([torch.tensor(told, dtype=torch.float64), flat(model)])


def _in_rank(folder, loss, limits):
    rank = dist.get_rank()

    def part(x, y):
        mine = x.split(COUNTS)[rank], y.split(COUNTS)[rank]
        return [each.split([1, len(each) - 1]) for each in mine] if rank == 0 else mine

    torch.save(ranks_steps(network(), loss, dist.group.WORLD, part, limits), folder / f"{rank}.pt")


@pytest.mark.parametrize(("loss", "limits"), [("mse", {"memory_bytes": 9 * 3 * 8 * 11}), ("cross_entropy", {})])
def test_ranks_take_the_step_of_one_process_with_the_whole_batch(loss, limits, tmp_path):
    """Three ranks with 4, 2 and 3 examples, the first in two micro-batches; alike to the last bit."""
    whole = ranks_steps(network(), loss, None, lambda x, y: (x, y), {})
    assert in_ranks(3, tmp_path, _in_rank, tmp_path, loss, limits) == [0, 0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], whole, rtol=1e-10, atol=1e-10)
    assert whole[1:15:3].min() < 1 and len(set(whole[2:15:3].tolist())) > 1


def _refused(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    rank, messages = dist.get_rank(), []
    for attempt in (
        lambda: EGN(distribute_module(network(), init_device_mesh("cpu", (2,)))),
        lambda: EGN(nn.parallel.DistributedDataParallel(network())),
        lambda: EGN(network(), process_group=dist.group.WORLD).step(torch.zeros(rank, 4), torch.zeros(rank, 3)),
    ):
        try:
            attempt()
        except InputError as error:
            messages.append(str(error))
    (folder / f"{rank}.txt").write_text("\n".join(messages))


def test_spread_parameters_wrapped_models_and_ranks_without_examples_are_refused(tmp_path):
    assert in_ranks(2, tmp_path, _refused, tmp_path) == [0, 0]
    for rank in range(2):
        spread, wrapped, empty = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert spread.endswith("holds whole, 0.weight is a DTensor: EGN needs whole parameters")
        assert wrapped.endswith("got DistributedDataParallel: give model.module, and process_group")
        assert empty == "every rank must have at least 1 example, got [0, 1] examples on the ranks"


def _told_two(folder):
    dist.barrier()
    model = network()
    optimizer = EGN(model, momentum=0.9, process_group=dist.group.WORLD)
    optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    x, y = batch("mse", b=6, seed=9)
    rows = slice(0, 2) if dist.get_rank() == 0 else slice(2, 6)
    optimizer.step(x[rows], y[rows])
    torch.save(flat(model), folder / f"{dist.get_rank()}.pt")


def test_a_run_goes_on_with_other_ranks(tmp_path):
    """State of one process, read by two: it holds nothing of how the batch was spread."""
    model = network()
    optimizer = EGN(model, momentum=0.9)
    optimizer.step(*batch("mse", b=6))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    optimizer.step(*batch("mse", b=6, seed=9))
    assert in_ranks(2, tmp_path, _told_two, tmp_path) == [0, 0]
    for rank in range(2):
        torch.testing.assert_close(
            torch.load(tmp_path / f"{rank}.pt", weights_only=True), flat(model), rtol=1e-12, atol=1e-12
        )
