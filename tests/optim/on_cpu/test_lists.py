"""C kernels over lists take the steps of the forms for lists; what they cannot take goes another way."""

import pytest
import torch

from batchlab.optim import LAMB, LARS, lamb, lars, on_cpu
from batchlab.optim.moments import adam_numbers, scalar
from batchlab.optim.on_cpu import lists as c_lists
from batchlab.optim.on_cpu.lamb import lamb_lists_
from batchlab.optim.on_cpu.lars import lars_lists_
from batchlab.optim.on_cpu.lists import BLOCK, Lists
from batchlab.optim.rule import alone
from batchlab.testing.optimizers import CHECKS, compiled_equals_the_loop
from tests.optim.cases import LISTED

SHAPES = [(64, 3, 7, 7), (5,), (), (0, 3), (2, BLOCK), (3, BLOCK + 1), (BLOCK - 1,)]
WITH_KERNELS = ("lamb", "lamb_clipped", "lars", "lars_plain_momentum", "vr_lars")


def drawn(count, dtype, seed=0):
    """Lists of tensors; the fourth's are never negative."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(shape, generator=generator).to(dtype) * 0.1 for shape in SHAPES] for _ in range(count)]
    return [[each.square() for each in row] if index == 3 else row for index, row in enumerate(rows)]


def agree(ours, theirs):
    wide = ours[0].dtype == torch.float64
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12 if wide else 1e-5, atol=1e-14 if wide else 1e-7)


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("adapt", [True, False])
def test_lamb(adapt, decay, dtype, threads):
    ours, theirs = drawn(4, dtype), drawn(4, dtype)
    given = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": decay, "t": 3}
    numbers = adam_numbers(ours[0][0], **given) | {"clamp": (0.0, 2.0), "max_ratio": None, "adapt": adapt}
    found = alone(lamb_lists_, *ours, ratio_of=lamb._ratio, **numbers)
    told = alone(lamb.lamb_foreach_, *theirs, **numbers)
    for one, other in zip(ours, theirs, strict=True):
        agree(one, other)
    if adapt:
        torch.testing.assert_close(found["trust_ratio"], told["trust_ratio"])
    else:
        assert found is told is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("adapt", "clip", "decay"), [(True, False, 0.01), (True, True, 0.0), (False, False, 0.01)])
def test_lars(adapt, clip, decay, inside, dtype, threads):
    ours, theirs = drawn(3, dtype, 1), drawn(3, dtype, 1)
    values = {"rate": 0.3, "momentum": 0.9, "weight_decay": decay, "trust": 0.01, "eps": 1e-8}
    numbers = {name: scalar(value, dtype, ours[0][0].device) for name, value in values.items()}
    numbers |= {"clip": clip, "adapt": adapt, "decays": decay != 0, "lr_in_momentum": inside}
    alone(lars_lists_, *ours, ratio_of=lars._ratio, **numbers)
    alone(lars.lars_foreach_, *theirs, **numbers)
    for one, other in zip(ours, theirs, strict=True):
        agree(one, other)


def test_sums_over_ten_million_float32_are_exact_to_their_rounding():
    x = torch.rand(10**7, generator=torch.Generator().manual_seed(0)) + 1.0
    lists = Lists([x], [x])
    parts = lists.parts(2)
    lists.run("squares", parts)
    torch.testing.assert_close(
        lists.summed(parts)[:, 0].double(), x.double().square().sum().expand(2), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_contract(name, check):
    check(lambda params, **options: LISTED[name](params, fused=True, **options))


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_fused_equals_the_loop(name):
    compiled_equals_the_loop(LISTED[name])


def test_nothing_is_compiled_unless_it_is_asked_for(monkeypatch):
    """And where it is, before any step."""
    monkeypatch.setattr(on_cpu, "library", lambda source, dtype: pytest.fail("compiled"))
    monkeypatch.setattr(c_lists, "library", lambda source, dtype: pytest.fail("compiled"))
    for make in (LAMB, LARS):
        w = torch.nn.Parameter(torch.ones(200, 200))
        w.grad = torch.ones(200, 200)
        make([w], lr=0.1).step()
        make([w], lr=0.1, foreach=True).step()
        with pytest.raises(pytest.fail.Exception, match="compiled"):
            make([w], lr=0.1, fused=True)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("make", [LAMB, LARS])
def test_a_state_of_another_size_is_an_error_and_no_walk_past_its_end(make, fused):
    small, large = (torch.nn.Parameter(torch.ones(rows, 64)) for rows in (4, 2000))
    saved = make([small], lr=0.1)
    small.grad = torch.ones_like(small)
    saved.step()
    optimizer = make([large], lr=0.1, fused=fused)
    optimizer.state[large] = saved.state[small]
    large.grad = torch.ones_like(large)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


def test_what_is_in_memory_otherwise_than_it_is_goes_another_way():
    ends = []
    for fused in (True, False):
        w = torch.nn.Parameter(torch.linspace(1, 2, 40_000).view(200, 200))
        optimizer = LAMB([w], lr=0.1, fused=fused, foreach=None if fused else False)
        for g in (torch._neg_view(torch.ones(200, 200)), torch._efficientzerotensor(200, 200)):
            w.grad = g
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("make", [LAMB, LARS])
def test_autograd_is_told_that_weights_moved(make):
    w = torch.nn.Parameter(torch.ones(200, 200))
    loss = (w**2).sum()
    loss.backward(retain_graph=True)
    make([w], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_memory_orders_go_by_the_form_for_lists():
    """A state that is laid out otherwise than its weights, as after a checkpoint, cannot be walked beside them."""
    ends = []
    for fused in (True, False):
        w = torch.nn.Parameter(torch.linspace(-1, 1, 96).view(2, 3, 4, 4).to(memory_format=torch.channels_last))
        optimizer = LAMB([w], lr=0.1, fused=fused)
        for step in range(3):
            w.grad = (torch.arange(96.0).view(2, 3, 4, 4) + step).cos()
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends)


class Other(torch.Tensor):
    pass


def test_what_the_kernels_take():
    assert on_cpu.takes([torch.ones(2)], [torch.ones(2)])
    assert not on_cpu.takes([], [])
    assert not on_cpu.takes([torch.ones(2)], [torch.ones(3)])
    assert not on_cpu.takes([torch.ones(2)], [torch.ones(2).as_subclass(Other)])
    assert not on_cpu.takes([torch.ones(2)], [torch.ones(2).double()])
    assert not on_cpu.takes(*[[torch.ones(2).bfloat16()]] * 2)
    assert not on_cpu.takes(*[[torch.ones(3, 2).t()]] * 2)
