"""Split BatchNorm against two plain ones, the merge of their statistics, and other numbers of parts."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.nn import (
    GhostBatchNorm1d,
    GhostBatchNorm3d,
    SplitBatchNorm1d,
    SplitBatchNorm2d,
    SplitBatchNorm3d,
    convert_plain_batchnorm,
    convert_split_batchnorm,
    merge_statistics,
)


def clips(n=8, channels=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype) * 2 + 5


def steps(layer, batches):
    """Two updates; what came out, and the gradients of the input and the affine parameters."""
    found = []
    for x in batches:
        x = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found += [y, x.grad, *(p.grad.clone() for p in layer.parameters())]
    return found


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_part_is_batchnorm_bit_for_bit(momentum):
    plain, split = nn.BatchNorm3d(3, momentum=momentum), SplitBatchNorm3d(3, 1, momentum=momentum)
    batches = [clips(), clips(seed=1)]
    for ours, theirs in zip(steps(split, batches), steps(plain, batches), strict=True):
        assert torch.equal(ours, theirs)
    for name, value in plain.state_dict().items():
        assert torch.equal(split.state_dict()[name], value)
    assert torch.equal(split.eval()(clips(seed=2)), plain.eval()(clips(seed=2)))
    assert torch.equal(split.split_mean[0], plain.running_mean)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_parts_are_two_batchnorms_on_every_other_example(momentum):
    split = SplitBatchNorm3d(3, 2, momentum=momentum).double()
    nn.init.normal_(split.weight), nn.init.normal_(split.bias)
    two = [nn.BatchNorm3d(3, momentum=momentum).double() for _ in range(2)]
    for layer in two:
        layer.weight, layer.bias = split.weight, split.bias
    for seed in range(3):
        x = clips(dtype=torch.float64, seed=seed)
        y = split(x)
        for part, layer in enumerate(two):
            torch.testing.assert_close(y[part::2], layer(x[part::2]), rtol=1e-12, atol=1e-12)
    mean, var = (torch.stack([getattr(each, f"running_{name}") for each in two]) for name in ("mean", "var"))
    torch.testing.assert_close(split.split_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.split_var, var, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.running_mean, (mean[0] + mean[1]) / 2, rtol=1e-12, atol=1e-12)
    merged = (var[0] + var[1]) / 2 + ((mean[0] - mean[1]) / 2) ** 2
    torch.testing.assert_close(split.running_var, merged, rtol=1e-12, atol=1e-12)
    assert split.num_batches_tracked == 3
    frozen = copy.deepcopy(split.state_dict())
    plain = convert_plain_batchnorm(copy.deepcopy(split)).eval()
    assert type(plain) is nn.BatchNorm3d and plain.state_dict().keys() == two[0].state_dict().keys()
    assert torch.equal(split.eval()(x), plain(x))
    assert all(torch.equal(frozen[name], value) for name, value in split.state_dict().items())


def test_training_is_that_of_interleaved_ghosts():
    split, ghost = SplitBatchNorm3d(3, 4).double(), GhostBatchNorm3d(3, 2, interleaved=True).double()
    batches = [clips(dtype=torch.float64), clips(dtype=torch.float64, seed=1)]
    for ours, theirs in zip(steps(split, batches), steps(ghost, batches), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert split.num_batches_tracked == 2 and ghost.num_batches_tracked == 8
    assert not torch.allclose(split.running_mean, ghost.running_mean)


def test_equal_parts_merge_to_the_statistics_of_all():
    x = torch.randn(6, 50, 4).double()
    mean, var = merge_statistics(x.mean(1), x.var(1, correction=0))
    torch.testing.assert_close(mean, x.view(-1, 4).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, x.view(-1, 4).var(0, correction=0), rtol=1e-12, atol=1e-12)


def test_precise_statistics_are_of_all_data():
    x = torch.randn(40, 3).double() * 2 + 1
    model = nn.Sequential(SplitBatchNorm1d(3, 4)).double()
    update_bn([x[:20], x[20:]], model)
    torch.testing.assert_close(model[0].running_mean, x.mean(0), rtol=1e-12, atol=1e-12)
    parts = x.view(2, 5, 4, 3)  # batch, example, part
    means, within = parts.mean(1).mean(0), parts.var(1).mean(0)
    merged = within.mean(0) + means.var(0, correction=0)
    torch.testing.assert_close(model[0].running_var, merged, rtol=1e-12, atol=1e-12)
    assert model[0].momentum == 0.1


def test_the_number_of_parts_changes_in_mid_run():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for splits in (4, 2, 2, 1):
        before = None if isinstance(model[1], nn.BatchNorm2d) and splits == 4 else model[1].running_var.clone()
        convert_split_batchnorm(model, splits)
        assert type(model[1]) is SplitBatchNorm2d and model[1].split_var.shape == (splits, 3)
        if before is not None:
            assert torch.equal(model[1].running_var, before)
            assert all(torch.equal(part, before) for part in model[1].split_var) or splits == 2
        model(torch.randn(8, 1, 6, 6)).square().mean().backward()
        optimizer.step()
    assert len(optimizer.state) == 4 and model[1].num_batches_tracked == 4


def test_states_of_plain_layers_and_other_numbers_of_parts_load():
    plain, four, two = nn.BatchNorm3d(3), SplitBatchNorm3d(3, 4), SplitBatchNorm3d(3, 2)
    plain(clips()), four(clips(seed=1))
    two.load_state_dict(plain.state_dict())
    assert all(torch.equal(part, plain.running_mean) for part in two.split_mean)
    two.load_state_dict(four.state_dict())
    assert all(torch.equal(part, four.running_var) for part in two.split_var)
    same = SplitBatchNorm3d(3, 4)
    same.load_state_dict(four.state_dict())
    assert torch.equal(same.split_mean, four.split_mean) and not torch.equal(same.split_mean[0], same.split_mean[1])
    plain.load_state_dict(four.state_dict(), strict=False)
    assert torch.equal(plain.running_var, four.running_var)


def test_without_running_statistics_or_affine_parameters():
    layer = SplitBatchNorm1d(3, 2, affine=False, track_running_stats=False)
    x = torch.randn(8, 3)
    y = layer(x)
    torch.testing.assert_close(y[::2], nn.functional.batch_norm(x[::2], None, None, training=True))
    assert not layer.state_dict() and torch.equal(layer.eval()(x), nn.BatchNorm1d(3, affine=False)(x))
    assert type(convert_plain_batchnorm(layer)) is nn.BatchNorm1d


def test_bad_input():
    with pytest.raises(InputError, match="^num_splits must be an integer of at least 1, got 0$"):
        SplitBatchNorm1d(3, 0)
    with pytest.raises(InputError, match="^num_splits must be an integer of at least 1, got 1.5$"):
        convert_split_batchnorm(nn.BatchNorm1d(3), 1.5)
    text = "^each of 3 parts must have as many examples and 2 values a channel, got 8 examples$"
    with pytest.raises(InputError, match=text):
        SplitBatchNorm1d(3, 3)(torch.randn(8, 3))
    with pytest.raises(InputError, match="got 3 examples$"):
        SplitBatchNorm1d(3, 3)(torch.randn(3, 3))
    with pytest.raises(InputError, match="got one at '': call convert_plain_batchnorm first$"):
        convert_split_batchnorm(GhostBatchNorm1d(3, 4), 2)


def test_channels_are_told_as_the_users():
    with pytest.raises(InputError, match=r"^weight must be of shape \(3,\), as the input has channels, got \(4,\)$"):
        SplitBatchNorm2d(4, 2)(torch.randn(8, 3, 5, 5))


def test_an_empty_batch_is_what_it_is_for_a_plain_layer():
    layer, plain = SplitBatchNorm2d(4, 2), nn.BatchNorm2d(4)
    x = torch.randn(0, 4, 5, 5)
    assert layer(x).shape == plain(x).shape and torch.equal(layer.running_var, plain.running_var)


def test_statistics_written_from_outside_stay_for_evaluation():
    """As where a trainer averages those of all ranks."""
    layer = SplitBatchNorm1d(2, 2)
    layer(torch.randn(8, 2))
    layer.running_mean.fill_(7.0), layer.running_var.fill_(3.0)
    assert layer.eval().running_mean.tolist() == [7.0] * 2 and layer.running_var.tolist() == [3.0] * 2
    other = SplitBatchNorm1d(2, 2)
    other.load_state_dict(layer.state_dict())
    assert other.eval().running_mean.tolist() == [7.0] * 2


def test_statistics_may_be_tracked_from_later_on_or_no_longer():
    x, layer, plain = torch.randn(8, 2), SplitBatchNorm1d(2, 2, momentum=None), nn.BatchNorm1d(2)
    layer.track_running_stats = False
    layer(x)
    assert layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, torch.zeros(2))
    plain.load_state_dict(convert_plain_batchnorm(layer).state_dict())
    never = SplitBatchNorm1d(2, 2, track_running_stats=False)
    never.track_running_stats = True
    assert torch.equal(never(x), SplitBatchNorm1d(2, 2)(x))


def test_evaluation_has_what_activation_checkpointing_left_unmerged():
    layer = SplitBatchNorm2d(1, num_splits=2, momentum=None)
    for mean in range(10):
        x = torch.full((8, 1, 2, 2), float(mean)) + torch.linspace(-0.1, 0.1, 32).view(8, 1, 2, 2)
        checkpoint(layer, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    other = copy.deepcopy(layer)
    assert layer.eval().running_mean.item() == other.eval().running_mean.item() == pytest.approx(4.5, abs=1e-5)
    checkpoint(layer.train(), x, use_reentrant=False).square().sum().backward()
    layer.running_mean.fill_(7.0)
    assert layer.eval().running_mean.item() == 7.0
