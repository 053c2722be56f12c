"""ConAdv in real gloo ranks: DDP, and a model spread by fully_shard."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchlab.core.errors import InputError
from batchlab.optim.adversarial.concurrent_adversarial import ConcurrentAdversarial
from batchlab.optim.adversarial.dual_batchnorm import convert_dual_batchnorm, use_bn
from tests.optim.adversarial.small_network import (
    RHO,
    assert_same,
    by_hand,
    cross_entropy,
    data,
    network,
    ours,
)
from tests.spine.forked import in_ranks


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    """What the first step of an optimizer loads is loaded once, not in each rank."""
    ours(plain(), data(2), 1)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def mine(batches):
    """This rank's half of each batch."""
    part = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    return [(x[part], y[part]) for x, y in batches]


def _joined(find_unused, norm, executor):
    one, each = plain(), plain()
    ours(one, data(10), 2, norm=norm)
    ours(
        DistributedDataParallel(each, find_unused_parameters=find_unused),
        mine(data(10)),
        2,
        norm=norm,
        executor=executor,
    )
    assert_same(one, each)


@pytest.mark.parametrize(
    ("find_unused", "norm", "executor"),
    [(False, "linf", "inline"), pytest.param(True, "l2", "thread", marks=pytest.mark.slow)],
)
def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path, find_unused, norm, executor):
    assert in_ranks(2, tmp_path, _joined, find_unused, norm, executor, timeout=300) == [0, 0]


def _dual(find_unused):
    """The mean over ranks of each rank's own two-pass gradient, in the clean first step too."""
    model = network()
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    adversarial = ConcurrentAdversarial(wrapped, cross_entropy, rho=RHO)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stale = network()
    for t, batch in enumerate(adversarial.batches(mine(data(4)))):
        now = network()
        now.load_state_dict(model.state_dict())
        for buffer in now.buffers():
            dist.broadcast(buffer, 0)
        cross_entropy(now, batch).backward()
        if t:
            torch.testing.assert_close(adversarial.adversarial, by_hand(stale, batch), rtol=1e-12, atol=1e-12)
            with use_bn(now, "aux"):
                cross_entropy(now, (adversarial.adversarial, batch[1])).backward()
        stale.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        adversarial.backward(batch)
        for (name, p), q in zip(model.named_parameters(), now.named_parameters(), strict=True):
            expected = torch.zeros_like(p) if q[1].grad is None else q[1].grad
            dist.all_reduce(expected)
            got = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(got, expected / 2, rtol=1e-12, atol=1e-14, msg=name)
        optimizer.step()


@pytest.mark.parametrize("find_unused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_both_terms_are_averaged_over_ranks(tmp_path, find_unused):
    assert in_ranks(2, tmp_path, _dual, find_unused, timeout=300) == [0, 0]


def _sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one, each = plain(), plain()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (each[1], each[3], each):
        fully_shard(layer, mesh=mesh)
    with pytest.raises(
        InputError, match=r'^a model of DTensors \(fully_shard\) has no copy on one rank: use executor "inl'
    ):
        ConcurrentAdversarial(each, cross_entropy, rho=RHO, executor="thread")
    ours(one, data(10), 2)
    ours(each, mine(data(10)), 2)
    for p, q in zip(one.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-12, atol=1e-12)


def test_a_model_spread_over_ranks_is_one_process_on_the_joined_batch(tmp_path):
    assert in_ranks(2, tmp_path, _sharded, timeout=300) == [0, 0]


def _refused():
    wrapped = DistributedDataParallel(plain(), static_graph=True)
    with pytest.raises(
        InputError, match=r"^model must be wrapped without static_graph=True: clean and adversarial passe"
    ):
        ConcurrentAdversarial(wrapped, cross_entropy, rho=RHO)
    wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(InputError, match=r"^model must have an auxiliary BatchNorm beside each, but 1 has none"):
        ConcurrentAdversarial(wrapped, cross_entropy, rho=RHO)
    ConcurrentAdversarial(DistributedDataParallel(convert_dual_batchnorm(nn.BatchNorm1d(2))), cross_entropy, rho=RHO)


def test_wrappers_that_do_not_fit_are_refused(tmp_path):
    assert in_ranks(1, tmp_path, _refused, timeout=300) == [0]
