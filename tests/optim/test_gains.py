"""Gains and biases of any shape: no decay, no Newton-Schulz."""

import warnings

import pytest
import torch
from torch import nn

from batchlab.core.errors import InputError
from batchlab.optim.by_name import create, group_as_saved, groups
from batchlab.optim.gains import gains_of
from batchlab.optim.muon import muon_groups


def names_in(found):
    return [[name for name, _ in group["params"]] for group in found]


def picture():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 4, 4]), nn.Flatten(), nn.Linear(128, 10))


def test_a_norm_over_pictures_is_not_decayed_nor_orthogonalised():
    plain = [["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]]
    assert names_in(groups(picture(), 0.1)) == plain
    assert names_in(muon_groups(picture())) == [["0.weight"], ["3.weight"], plain[1]]
    model = nn.LayerNorm([2, 2])
    optimizer = create("adamw", model, lr=0.1, weight_decay=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model.weight, torch.ones(2, 2))


@pytest.mark.parametrize("old", [False, True])
def test_magnitudes_of_weight_norm_are_gains(old):
    normed = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(normed(nn.Linear(4, 8)), nn.Linear(8, 2))
    hidden, head, vectors = names_in(muon_groups(model))
    assert len(hidden) == 1 and hidden[0].endswith("weight_v" if old else "original1") and head == ["1.weight"]
    assert any(name.endswith("weight_g" if old else "original0") for name in vectors)


def test_biases_of_attention_and_other_norms():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert {id(attention.bias_k), id(attention.bias_v)} <= gains_of(attention)
    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm([2, 2]), nn.InstanceNorm1d(4, affine=True)):
        assert gains_of(norm) == {id(p) for p in norm.parameters()}


def test_what_is_no_model_or_no_decay_is_refused_by_name():
    model = nn.Linear(4, 2)
    with pytest.raises(InputError, match=r"model must be a torch.nn.Module, got generator: LAMB\(params, ...\)"):
        create("lamb", model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="model must have its weights, but 0.weight is lazy: send a batch through it"):
        create("lamb", nn.Sequential(nn.LazyLinear(3)), lr=0.1)
    for decay in (-5.0, float("nan"), float("inf"), "a"):
        for make in (create, lambda name, model, lr, weight_decay: groups(model, weight_decay)):
            with pytest.raises(InputError, match="weight_decay must be finite and >= 0, got"):
                make("adamw", model, lr=0.1, weight_decay=decay)
        with pytest.raises(InputError, match="weight_decay must be finite and >= 0, got"):
            muon_groups(model, weight_decay=decay)


def test_a_norm_whose_scale_is_parametrised():
    layer = nn.LayerNorm([2, 2])
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert gains_of(layer) == {id(p) for p in layer.parameters()} and len(gains_of(layer)) == 2


def test_groups_are_put_as_a_saved_state_has_them():
    model = picture()
    optimizer = create("adamw", model, lr=0.1)
    one_then_other = [["0.weight", "1.weight", "1.bias", "3.weight"], ["0.bias", "3.bias"]]
    group_as_saved(optimizer, [{"param_names": names} for names in one_then_other])
    assert [group["param_names"] for group in optimizer.param_groups] == one_then_other
    named = dict(model.named_parameters())
    assert all(named[n] is p for group in optimizer.param_groups for n, p in zip(group["param_names"], group["params"]))
    group_as_saved(optimizer, [{"param_names": ["other"]}])
    assert [group["param_names"] for group in optimizer.param_groups] == one_then_other
