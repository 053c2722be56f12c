"""What MKOR's hooks see of each kind of layer, by hand, and which layers it leaves to its base."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from batchlab.core.errors import InputError
from batchlab.optim.mkor.factors import input_sums, output_sum
from batchlab.optim.mkor.mkor import MKOR
from tests.optim.mkor.small_mlp import DOUBLE, batch, close, drawn, flat, made, mlp, run


def by_hand(layer, x):
    """ā and ḡ of a layer in a loss that is a mean over rows, from saved tensors and autograd alone."""
    output = layer(x)
    (g,) = torch.autograd.grad(output.sin().sum() / (output.numel() / layer.weight.shape[0]), output)
    if isinstance(layer, nn.Linear):
        a, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    else:
        a, g = patches(layer, x), g.movedim(1, -1).reshape(-1, g.shape[1])
    assert len(a) == len(g)
    return a, torch.stack([len(g) * row for row in g]).mean(0)


def patches(layer, x):
    """Each patch that a filter is laid on, read off by what a convolution with one-hot filters gives."""
    size = layer.weight[0].numel()
    probe = nn.Conv2d(
        layer.in_channels, size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,
        padding_mode=layer.padding_mode, dtype=DOUBLE,
    )  # fmt: skip
    probe.weight.data = torch.eye(size, dtype=DOUBLE).reshape(size, *layer.weight.shape[1:])
    return probe(x).detach().movedim(1, -1).reshape(-1, size)


LAYERS = {
    "rows": (lambda: nn.Linear(5, 4, dtype=DOUBLE), (6, 5)),
    "tokens": (lambda: nn.Linear(5, 4, bias=False, dtype=DOUBLE), (6, 3, 5)),
    "maps of rows": (lambda: nn.Linear(5, 4, dtype=DOUBLE), (6, 3, 2, 5)),
    "images": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2, dtype=DOUBLE), (6, 2, 7, 5)),
    "dilated": (lambda: nn.Conv2d(2, 4, (3, 2), dilation=2, padding="same", bias=False, dtype=DOUBLE), (6, 2, 7, 5)),
    "reflected": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect", dtype=DOUBLE), (6, 2, 7, 5)),
    "circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", dtype=DOUBLE), (6, 2, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", [(6,), (1, 2, 3)])
def test_means_are_those_taken_by_hand(name, cut):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), drawn(*shape)
    rows, g_mean = by_hand(layer, x)
    optimizer = made(layer)
    for part in x.split(cut):
        output = layer(part)
        (output.sin().sum() / (output.numel() / layer.weight.shape[0]) * len(part) / len(x)).backward()
    (passes,) = [one.take() for one in optimizer._layers]
    assert passes.inputs.rows == len(rows)
    close(passes.inputs.total / passes.inputs.rows, rows.mean(0))
    close(passes.inputs.energy, rows.square().sum())
    close(passes.output, g_mean)
    if layer.bias is not None:
        close(passes.output, layer.bias.grad)


@pytest.mark.parametrize("name", ["rows", "tokens", "images"])
def test_the_released_means_are_those_of_the_packages_rows(name):
    """Of a convolution an example's mean patch, and its positions' gradients summed over their number; N times a row's
    gradient, and both cut to [-100, 100].
    """
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), drawn(*shape) * 60
    output = layer(x)
    scale = 1e3 * torch.linspace(-1, 1, output.numel(), dtype=DOUBLE).view_as(output) / len(output)
    optimizer = made(layer, variant="released")
    (layer(x) * scale).sum().backward()
    if name == "images":
        a, g = patches(layer, x).view(len(x), -1, layer.weight[0].numel()).mean(1), scale.mean((2, 3))
    else:
        a, g = x.reshape(-1, 5), scale.reshape(-1, 4)
    assert (x.abs() > 100).any() and (g.abs() * len(g) > 100).any()
    (passes,) = [one.take() for one in optimizer._layers]
    assert passes.inputs.rows == len(a) == len(g)
    close(passes.inputs.total, a.clamp(-100, 100).sum(0))
    close(passes.output, (len(g) * g).clamp(-100, 100).mean(0))


def test_a_convolution_of_one_pixel_is_a_linear_layer():
    linear, conv = nn.Linear(5, 4, dtype=DOUBLE), nn.Conv2d(5, 4, 1, dtype=DOUBLE)
    conv.weight.data, conv.bias.data = linear.weight.data.clone()[..., None, None], linear.bias.data.clone()
    images = drawn(6, 5, 3, 2)
    tokens = images.flatten(2).mT
    for layer, x in ((linear, tokens), (conv, images)):
        optimizer = made(layer, inv_freq=1)
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).sin().mean().backward()
            optimizer.step()
    close(conv.weight[..., 0, 0], linear.weight)


class Twice(nn.Module):
    """One layer called twice, on inputs of different lengths."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=DOUBLE)

    def forward(self, x, way=lambda layer, x: layer(x)):
        return way(self.layer, way(self.layer, x).relu_()[:3])


def recomputed(layer, x, reentrant):
    return checkpoint(layer, x, use_reentrant=reentrant)


@pytest.mark.parametrize("way", [None, True, False])
def test_a_layer_called_twice_counts_all_its_rows(way):
    """Also where its passes are checkpointed, and so made twice."""
    model, x = Twice(), drawn(8, 4).requires_grad_()
    optimizer = made(model)
    with torch.no_grad():
        model(x)
    how = {} if way is None else {"way": functools.partial(recomputed, reentrant=way)}
    model(x, **how).square().sum().backward()
    (passes,) = [layer.take() for layer in optimizer._layers]
    second = model.layer(x).relu()[:3].detach()
    assert passes.inputs.rows == 8 + 3
    close(passes.inputs.total, x.detach().sum(0) + second.sum(0))
    close(passes.output, model.layer.bias.grad)


def test_an_input_given_by_name_and_a_single_row_are_seen():
    layer = nn.Linear(4, 2, dtype=DOUBLE)
    optimizer = made(layer)
    layer(input=drawn(4)).sum().backward()
    (passes,) = [one.take() for one in optimizer._layers]
    assert passes.inputs.rows == 1
    image = nn.Conv2d(1, 2, 2, dtype=DOUBLE)
    assert input_sums(image, drawn(1, 3, 3), DOUBLE).rows == 4
    assert output_sum(image, drawn(2, 2, 2), DOUBLE).shape == (2,)


def test_what_a_discarded_pass_told_is_forgotten():
    model = mlp()
    optimizer, other = made(model), made(twin := mlp())
    F.cross_entropy(model(drawn(8, 5, seed=9) * math.inf), batch(0)[1]).backward()
    assert torch.equal(torch.cat([p.flatten() for p in run(model, optimizer, 3)]), flat(run(twin, other, 3)))


def test_frozen_late_and_foreign_layers_are_left_to_whom_they_belong():
    model = mlp(sizes=(5, 6, 6, 3))
    model[0].requires_grad_(False)
    base = torch.optim.SGD(model[2].parameters(), lr=0.1)
    optimizer = MKOR(model, base, factor_dtype=DOUBLE, inv_freq=1)
    assert optimizer.left_to_base == {"0": "its weight is not in base", "4": "its weight is not in base"}
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    foreign = model[4].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[4].weight.grad, foreign) and model[0].weight.grad is None
    optimizer.add_param_group({"params": [*model[4].parameters(), *model[0].parameters()]})
    model[4].bias.requires_grad_(False)
    optimizer.zero_grad()
    model[4].bias.grad = None
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    foreign = model[4].weight.grad.clone()
    optimizer.step()
    assert optimizer.left_to_base == {"0": "its weight is frozen"}
    assert [(row.name, row.updates) for row in optimizer.report()] == [("0", 0), ("2", 2), ("4", 1)]
    changed = model[4].weight.grad
    assert changed.norm().item() == pytest.approx(foreign.norm().item()) and not torch.allclose(changed, foreign)


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(2, 4, 1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.tied = nn.Linear(4, 10)
        self.tied.weight = self.embed.weight
        self.head = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        self.body = nn.Linear(4, 4)


def test_layers_without_support_are_left_to_the_base_with_a_note():
    optimizer = made(model := Mixed(), ignore=["head", model.normed])
    assert optimizer.left_to_base == {
        "embed": "Embedding is neither Linear nor Conv2d",
        "conv": "its filters are in 2 groups",
        "norm": "LayerNorm is neither Linear nor Conv2d",
        "normed": "in ignore",
        "normed.parametrizations.weight": "in ignore",
        "tied": "its weight or bias is also that of 'embed'",
        "head.0": "in ignore",
        "head.1": "in ignore",
    }
    assert made(model).left_to_base["normed"] == "its weight or bias is parametrised"
    assert [row.name for row in optimizer.report()] == ["body"]


def test_the_report_tells_inputs_of_zero_mean():
    model = nn.Sequential(nn.LayerNorm(32, elementwise_affine=False), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = made(model, factor_dtype=torch.float32)
    model(drawn(512, 32).float()).square().mean().backward()
    optimizer.step()
    normed, rectified = optimizer.report()
    assert 0.2 / 512 < normed.mean_share < 5 / 512 and rectified.mean_share > 0.2


def test_the_projection_that_attention_never_calls_is_told_of():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "l": nn.Linear(4, 2)})
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.left_to_base["a.out_proj"] == "MultiheadAttention reads its weight and never calls it"
    assert [row.name for row in optimizer.report()] == ["l"]
    with pytest.raises(InputError, match="model must be a torch.nn.Module, got NoneType"):
        MKOR(None, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_step_at_rate_0_without_a_gradient_is_a_step():
    model = nn.Linear(2, 1)
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(3):
        (model(torch.ones(4, 2)).sum() * 0).backward()
        optimizer.step()
    assert optimizer.steps == 3
