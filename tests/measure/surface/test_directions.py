"""Every filter of a direction is as long as the model's own, along the axis that its layer has."""

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.measure.surface.directions import NORMS, ignored, random_direction


def lengths(tensor, *kept):
    """The norm over all dimensions but those kept."""
    reduced = [dim for dim in range(tensor.ndim) if dim not in kept]
    return torch.linalg.vector_norm(tensor.detach(), dim=reduced)


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (0,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (0,)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (0,)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (0,)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (0,)),
    "linear": (lambda: nn.Linear(5, 7), (0,)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), (0,)),
    "embedding": (lambda: nn.Embedding(9, 4), (0,)),
    "bag": (lambda: nn.EmbeddingBag(9, 4), (0,)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (1,)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (1,)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (1,)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_filter_has_the_length_of_the_models_own(name, dtype):
    make, kept = LAYERS[name]
    layer = make().to(dtype)
    with torch.no_grad():  # filters of very different lengths
        layer.weight.mul_(torch.logspace(-3, 3, layer.weight.shape[kept[0]], dtype=dtype).view(
            [-1 if dim == kept[0] else 1 for dim in range(layer.weight.ndim)]))  # fmt: skip
    d = random_direction(layer, seed=3)
    torch.testing.assert_close(lengths(d["weight"], *kept), lengths(layer.weight, *kept), rtol=1e-6, atol=0)
    assert d["weight"].dtype == dtype and d["weight"].shape == layer.weight.shape
    other = 1 - kept[0]
    if layer.weight.shape[other] > 1:
        assert not torch.allclose(lengths(d["weight"], other), lengths(layer.weight, other), rtol=1e-2)
    if "bias" in d:
        assert torch.equal(d["bias"], torch.zeros_like(layer.bias))


def test_a_grouped_transposed_convolution_has_a_filter_for_each_group_and_channel():
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2).double()
    with torch.no_grad():
        layer.weight[:3] *= 100.0
    d = random_direction(layer)["weight"]
    for half in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(lengths(d[half], 1), lengths(layer.weight[half], 1), rtol=1e-6, atol=0)


def test_attention_has_rows_and_its_biases_of_three_dimensions_stay():
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=5, vdim=6)
    d = random_direction(model)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
        weight = dict(model.named_parameters())[name]
        torch.testing.assert_close(lengths(d[name], 0), lengths(weight, 0), rtol=1e-6, atol=0)
    assert not any(d[name].any() for name in ("bias_k", "bias_v", "in_proj_bias", "out_proj.bias"))
    model = nn.MultiheadAttention(8, 2)
    d = random_direction(model)["in_proj_weight"]
    torch.testing.assert_close(lengths(d, 0), lengths(model.in_proj_weight, 0), rtol=1e-6, atol=0)


def test_normalisation_layers_of_any_shape_and_biases_stay():
    layers = [nn.LayerNorm((3, 4)), nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.RMSNorm((3, 4))]
    model = nn.Sequential(*layers, nn.LSTM(3, 4), nn.Linear(4, 2))
    d = random_direction(model)
    still = {name for name, each in d.items() if not each.any()}
    assert still == ignored(model) == {name for name in d if "bias" in name or name[0] in "0123"}
    torch.testing.assert_close(lengths(d["4.weight_hh_l0"], 0), lengths(model[4].weight_hh_l0, 0), rtol=1e-6, atol=0)
    scaled = random_direction(model, ignore=None)
    for name, parameter in model.named_parameters():
        assert torch.equal(scaled[name], parameter) == (name in still)


def test_hugging_faces_conv1d_has_its_outputs_in_columns():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)
    d = random_direction(layer)
    torch.testing.assert_close(lengths(d["weight"], 1), lengths(layer.weight, 1), rtol=1e-6, atol=0)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5) * torch.logspace(-2, 2, 5))


def test_axes_of_own_layers_are_named():
    model = Experts()
    d = random_direction(model, axes={"weight": (0, -1)})["weight"]
    torch.testing.assert_close(lengths(d, 0, 2), lengths(model.weight, 0, 2), rtol=1e-6, atol=0)
    every = random_direction(model, axes={"weight": (0, 1, 2)})["weight"]
    torch.testing.assert_close(every.abs(), model.weight.detach().abs())
    with pytest.raises(InputError, match=r"axes of weight must be dimensions of its shape \(3, 4, 5\), got 3"):
        random_direction(model, axes={"weight": 3})
    with pytest.raises(InputError, match="axes must name trainable parameters of the model, got 'wieght'"):
        random_direction(model, axes={"wieght": 0})


def test_the_other_norms():
    layer = nn.Linear(5, 7).double()
    raw = random_direction(layer, norm="none")["weight"]
    got = {norm: random_direction(layer, norm=norm)["weight"] for norm in NORMS}
    weight = layer.weight.detach()
    torch.testing.assert_close(got["layer"], raw * weight.norm() / raw.norm())
    torch.testing.assert_close(got["weight"], raw * weight)
    torch.testing.assert_close(got["dfilter"], raw / raw.norm(dim=1, keepdim=True))
    torch.testing.assert_close(got["dlayer"], raw / raw.norm())
    torch.testing.assert_close(got["filter"], raw * (weight.norm(dim=1) / raw.norm(dim=1))[:, None])
    values = torch.cat([random_direction(nn.Linear(100, 100), norm="none", seed=s)["weight"] for s in range(2)])
    assert abs(values.mean()) < 4 / 20_000**0.5 and abs(values.var() - 1) < 4 * (2 / 20_000) ** 0.5


def test_a_filter_of_zeros_gets_no_direction():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0.0
    for norm in ("filter", "layer", "weight"):
        d = random_direction(layer, norm=norm)["weight"]
        assert d.isfinite().all() and (norm == "layer" or not d[1].any()) and d[0].any()
    with torch.no_grad():
        layer.weight.zero_()
    assert not random_direction(layer, norm="layer")["weight"].any()


def test_the_draw_is_one_of_seed_name_and_shape():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    first = random_direction(model, seed=5)
    torch.testing.assert_close(random_direction(model.double(), seed=5), first, check_dtype=False, rtol=1e-6, atol=0)
    model.float()
    model[0].weight.requires_grad_(False)
    part = random_direction(model, seed=5)
    assert set(first) - set(part) == {"0.weight"} and torch.equal(part["1.weight"], first["1.weight"])
    other = random_direction(model, seed=6)["1.weight"]
    cosine = torch.nn.functional.cosine_similarity(part["1.weight"], other, dim=1)
    assert (cosine.abs() < 1 - 1e-3).all()
    before = torch.get_rng_state()
    random_direction(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_shared_parameter_has_one_direction_under_its_first_name():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert set(random_direction(model)) == {"embedding.weight"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {"norm": "filters"}, "norm must be one of .*'none'.*, got 'filters'"),
        (nn.Linear(2, 2), {"ignore": "bias"}, "ignore must be \"biasbn\" or None, got 'bias'"),
        (nn.ReLU(), {}, "no parameter that requires a gradient: there is no weight to move"),
        (nn.Linear(2, 2).requires_grad_(False), {}, "no parameter that requires a gradient"),
        (nn.Linear(2, 2, dtype=torch.complex64), {}, "needs real parameters, weight is torch.complex64"),
        ("model", {}, "model must be a torch.nn.Module, got str"),
    ],
)
def test_bad_input_is_named(model, options, message):
    with pytest.raises(InputError, match=message):
        random_direction(model, **options)


def test_half_precision_gets_directions_in_float32():
    layer = nn.Linear(6, 4, dtype=torch.bfloat16)
    d = random_direction(layer)["weight"]
    assert d.dtype == torch.float32
    torch.testing.assert_close(lengths(d, 0), lengths(layer.weight.float(), 0), rtol=1e-6, atol=0)
