"""Kernels over lists take the steps of the forms for lists; without a GPU by Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


from batchlab.optim import lamb, lars, on_gpu
from batchlab.optim.moments import adam_numbers, scalar
from batchlab.optim.on_gpu.lamb import lamb_lists_
from batchlab.optim.on_gpu.lars import lars_lists_
from batchlab.optim.on_gpu.lists import BLOCK, squares
from batchlab.optim.rule import alone
from batchlab.optim.tables import addresses

SHAPES = [(64, 3, 7, 7), (5,), (), (0, 3), (1, BLOCK), (3, BLOCK + 1), (BLOCK - 1,)]


def drawn(count, seed, *, shift=0):
    """Lists of tensors; from the last on they are never negative. shift: elements by which none begins at 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for index in range(count):
        row = []
        for shape in SHAPES:
            numel = torch.Size(shape).numel()
            flat = torch.randn(numel + shift, generator=generator) * 0.1
            flat = flat.square() if index == 3 else flat
            row.append(flat.to(DEVICE)[shift:].view(shape))
        lists.append(row)
    return lists


def agree(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("adapt", [True, False])
def test_lamb(adapt, decay, shift):
    ours, theirs = drawn(4, 0, shift=shift), drawn(4, 0, shift=shift)
    given = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": decay, "t": 3}
    numbers = adam_numbers(ours[0][0], **given) | {"clamp": (0.0, 2.0), "max_ratio": None, "adapt": adapt}
    found = alone(lamb_lists_, *ours, **numbers)
    told = alone(lamb.lamb_foreach_, *theirs, **numbers)
    for one, other in zip(ours, theirs, strict=True):
        agree(one, other)
    if adapt:
        torch.testing.assert_close(found["trust_ratio"], told["trust_ratio"])
    else:
        assert found is told is None


def test_without_epsilon_places_beyond_the_end_count_for_nothing():
    (w, g, m, v), numbers = [[torch.ones(3, device=DEVICE)] for _ in range(4)], {}
    numbers = adam_numbers(w[0], lr=0.1, betas=(0.9, 0.9), eps=0.0, weight_decay=0.0, t=2)
    found = alone(lamb_lists_, w, g, m, v, **numbers, clamp=None, max_ratio=None, adapt=True)
    assert found["trust_ratio"].isfinite().all()
    torch.testing.assert_close(w[0], torch.full((3,), 0.9, device=DEVICE))


@pytest.mark.parametrize(("clamp", "most"), [(None, None), ((0.5, 2.0), None), (None, 0.5), ((0.01, 0.5), 3.0)])
def test_limits_of_lambs_ratio_where_norms_are_zero_and_none(clamp, most):
    ours, theirs = odd(4), odd(4)
    given = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "t": 3}
    numbers = adam_numbers(ours[0][0], **given) | {"clamp": clamp, "max_ratio": most, "adapt": True}
    found, told = alone(lamb_lists_, *ours, **numbers), alone(lamb.lamb_foreach_, *theirs, **numbers)
    torch.testing.assert_close(found["trust_ratio"], told["trust_ratio"], equal_nan=True)
    assert found["trust_ratio"].isnan().tolist() == [False, False, False, True]
    assert all(torch.allclose(*pair, rtol=2e-5, equal_nan=True) for pair in zip(ours[0], theirs[0], strict=True))


@pytest.mark.parametrize("clip", [True, False])
def test_larss_ratio_where_norms_are_zero_and_none(clip):
    ours, theirs = odd(3), odd(3)
    values = {"rate": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust": 0.01, "eps": 0.0}
    numbers = {name: scalar(value, torch.float32, ours[0][0].device) for name, value in values.items()}
    numbers |= {"clip": clip, "adapt": True, "decays": True, "lr_in_momentum": False}
    found, told = alone(lars_lists_, *ours, **numbers), alone(lars.lars_foreach_, *theirs, **numbers)
    torch.testing.assert_close(found["trust_ratio"], told["trust_ratio"], equal_nan=True)
    assert found["trust_ratio"].isnan().tolist() == [False, False, False, True]


def odd(count):
    """Four tensors a list: the weights of the second are zeros, the gradient of the third, of the fourth it is NaN."""
    lists = [[torch.full((70,), 0.1 + index, device=DEVICE) for _ in range(4)] for index in range(count)]
    lists[0][1].zero_()
    for row in lists[1:]:
        row[2].zero_()
    lists[1][3][5] = torch.nan
    return lists


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("adapt", "clip", "decay"), [(True, False, 0.01), (True, True, 0.0), (False, False, 0.01)])
def test_lars(adapt, clip, decay, inside, shift):
    ours, theirs = drawn(3, 1, shift=shift), drawn(3, 1, shift=shift)
    kind = ours[0][0].dtype, ours[0][0].device
    values = {"rate": 0.3, "momentum": 0.9, "weight_decay": decay, "trust": 0.01, "eps": 1e-8}
    numbers = {name: scalar(value, *kind) for name, value in values.items()}
    numbers |= {"clip": clip, "adapt": adapt, "decays": decay != 0, "lr_in_momentum": inside}
    alone(lars_lists_, *ours, **numbers)
    alone(lars.lars_foreach_, *theirs, **numbers)
    for one, other in zip(ours, theirs, strict=True):
        agree(one, other)


def test_sums_of_squares_of_every_length():
    rows = drawn(2, 2)
    for found, row in zip(squares(*rows), rows, strict=True):
        torch.testing.assert_close(found, torch.stack([each.double().square().sum().float() for each in row]))


def test_addresses_tell_where_four_numbers_may_be_read_at_once():
    assert addresses(drawn(1, 0)[0]).aligned
    assert not addresses(drawn(1, 0, shift=1)[0]).aligned


def test_what_the_kernels_take():
    assert not on_gpu.takes([torch.ones(2)], [torch.ones(2)])
    assert not on_gpu.takes([], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_that_of_the_sums(dtype):
    rows = drawn(1, 2)
    expected = squares(*rows)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(squares(*rows), expected)
    finally:
        torch.set_default_dtype(torch.float32)
