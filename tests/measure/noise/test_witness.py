"""Parameters that are unused, frozen, single numbers or stale mislead no check of the backward pass."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.noise.gradient_noise import GradientNoise
from tests.measure.noise.small import TwoHeads, small_batch, small_model, two_heads_step


@pytest.mark.parametrize("method", ["micro_batch", "per_example"])
def test_a_parameter_that_is_never_used_hides_no_loss_scale(method):
    """The first step finds that the witness has no gradient, takes another, and tells nothing."""
    model, plain = TwoHeads(), TwoHeads()
    scaled, expected = GradientNoise(model, method), GradientNoise(plain.body, method)
    for seed in range(4):
        two_heads_step(model, scaled, seed, scale=1024.0)
        two_heads_step(plain, expected, seed)
        assert scaled.pair is None if seed == 0 else scaled.pair == pytest.approx(expected.pair, rel=1e-6)
    assert scaled.skipped == 0 and scaled.statistics.count == 3


def test_a_parameter_that_is_never_used_hides_no_backward_pass_outside():
    model = TwoHeads()
    noise = GradientNoise(model)
    two_heads_step(model, noise, 0)
    with pytest.raises(InputError, match="do not add up to .grad"):
        two_heads_step(model, noise, 1, outside=(2,))


def _normalise(parameters, norm):
    gradients = [p.grad for p in parameters]
    length = nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient.mul_(norm / length)


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 200).double(), nn.Linear(200, 6).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).sum(1, keepdim=True) * self.scale


@pytest.mark.parametrize("method", ["micro_batch", "per_example"])
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, _normalise])
def test_a_gradient_clipped_before_step_is_refused(method, clip):
    """Else a clipped step's norms shrink by the square of its factor, and the ratio of means hardly sees it."""
    model = small_model(dtype=torch.float64)
    noise, x, y = GradientNoise(model, method), *small_batch(64, torch.float64)

    def step(which, limit):
        model.zero_grad()
        for at in (0, 8):
            with noise.micro_batch(8):
                part = slice(16 * which + at, 16 * which + at + 8)
                ((model(x[part]).squeeze(1) - y[part]).square().mean() / 2).backward()
        clip(model.parameters(), limit)
        return noise.step()

    step(0, 0.1)
    with pytest.raises(InputError, match="clipped or normalised before step"):
        step(1, 0.1)
    for limit in (0.2, 0.4, 0.7):  # another norm each time: no one can tell that from a loss scale
        step(0, limit)


def test_a_loss_scale_that_grew_between_equal_steps_is_no_clipping():
    model, scale = small_model(dtype=torch.float64), 2.0**10
    noise, (x, y) = GradientNoise(model), small_batch(16, torch.float64)
    for _ in range(3):
        model.zero_grad()
        for part in (slice(8), slice(8, 16)):
            with noise.micro_batch(8):
                (scale * (model(x[part]).squeeze(1) - y[part]).square().mean() / 2).backward()
        for parameter in model.parameters():
            parameter.grad.div_(scale)
        assert noise.step().method
        scale *= 2
    assert noise.statistics.count == 3


@pytest.mark.parametrize("method", ["micro_batch", "per_example"])
def test_a_sum_over_examples_gives_the_scale_of_the_mean(method):
    """Divided by their number after the backward passes, or not at all: a factor common to all pieces."""
    found = []
    for weight, after in ((1 / 32, 1.0), (1.0, 1 / 32), (1.0, 1.0)):
        model = small_model(dtype=torch.float64)
        noise = GradientNoise(model, method)
        for seed in range(20):
            model.zero_grad()
            x, y = small_batch(32, torch.float64, seed=seed)
            for part in (slice(12), slice(12, 32)):
                with noise.micro_batch(len(x[part])):
                    (weight * (model(x[part]).squeeze(1) - y[part]).square().sum()).backward()
            for parameter in model.parameters():
                parameter.grad.mul_(after)
            noise.step()
        found.append(noise.estimate().value)
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


def test_a_single_number_is_no_witness_where_there_is_another():
    model = _Scaled()
    noise = GradientNoise(model)
    assert noise._all.witness.parameter.numel() > 1
    with pytest.raises(InputError, match="do not add up to .grad"):
        two_heads_step(model, noise, 0, outside=(1,))


def test_a_parameter_of_no_dimension_has_its_norms_too():
    pairs = []
    for method, sizes in (("per_example", [32]), ("micro_batch", [1] * 32)):
        model = _Scaled()
        noise = GradientNoise(model, method)
        two_heads_step(model, noise, 0, sizes=sizes)
        pairs.append(noise.pair)
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-9)


@pytest.mark.parametrize("method", ["micro_batch", "per_example"])
@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_what_was_frozen_since_is_left_out_whatever_lies_in_its_grad(method, frozen):
    """The witness too."""
    model, fresh = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    noise = GradientNoise(model, method)
    two_heads_step(model, noise, 0)
    for net in (model, fresh):
        list(net.parameters())[frozen].requires_grad_(False)
    stale = list(model.parameters())[frozen]
    expected = GradientNoise(fresh, method)
    for seed in (1, 2):
        stale.grad = torch.full_like(stale, 1e3)
        x, y = small_batch(32, torch.float64, seed)
        for net, each in ((model, noise), (fresh, expected)):
            for p in net.parameters():
                p.grad = p.grad if p is stale else None
            for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
                with each.micro_batch(8):
                    ((net(part_x).squeeze(1) - part_y).square().mean() / 4).backward()
            each.step()
    assert noise.pair == pytest.approx(expected.pair, rel=1e-9)  # the first of the two may have changed its witness


def test_a_gradient_that_no_micro_batch_saw_is_refused():
    model = TwoHeads()
    noise = GradientNoise(model)
    two_heads_step(model, noise, 0)
    with pytest.raises(InputError, match="1 parameters have a gradient that no micro_batch saw"):
        model.head.bias.grad = torch.ones(16, dtype=torch.float64)
        for part_x, part_y in zip(*(part.chunk(2) for part in small_batch(32, torch.float64)), strict=True):
            with noise.micro_batch(16):
                ((model(part_x).squeeze(1) - part_y).square().mean() / 2).backward()
        noise.step()
