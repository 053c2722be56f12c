"""The table of μP: as published, its two forms as one network, and what a tensor is by its shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchlab.core.errors import InputError
from batchlab.rules.mup import kind_of, muon_rate_factor, table, tensor_rule, width_factors

fans = st.floats(1, 1e5)


@pytest.mark.parametrize(
    ("kind", "published", "plain"),
    [
        ("input", (16.0, 1 / 256, 1 / 16), (1.0, 1.0, 1.0)),
        ("hidden", (1.0, 1 / 64, 1 / 64), (1.0, 1 / 64, 1 / 64)),
        ("output", (1 / 8, 1 / 64, 1 / 8), (1.0, 1 / 64**2, 1 / 64)),
        ("fixed", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    ],
)
def test_the_rows_with_fan_in_64_and_fan_out_256(kind, published, plain):
    assert tensor_rule(kind, 64, 256) == pytest.approx(published)
    assert tensor_rule(kind, 64, 256, multipliers=False) == pytest.approx(plain)


@given(fans, fans, st.sampled_from(["input", "hidden", "output", "fixed"]))
def test_both_forms_start_and_move_the_product_alike(fan_in, fan_out, kind):
    """Multiplier times standard deviation, and multiplier times Adam's step."""
    a, b = tensor_rule(kind, fan_in, fan_out), tensor_rule(kind, fan_in, fan_out, multipliers=False)
    assert a.multiplier**2 * a.variance == pytest.approx(b.variance)
    assert a.multiplier * a.learning_rate == pytest.approx(b.learning_rate)


def test_both_forms_are_one_network_under_adam():
    """Twenty updates in float64, the same draws scaled: outputs equal to 1e-9. Adam's ε is below all gradients."""
    kinds, sizes = ("input", "hidden", "output"), ((5, 48), (48, 48), (48, 3))
    random = torch.Generator().manual_seed(0)
    draws = [torch.randn(out, into, generator=random, dtype=torch.float64) for into, out in sizes]
    x, y = (torch.randn(32, n, generator=random, dtype=torch.float64) for n in (5, 3))
    outputs = []
    for multipliers in (True, False):
        rules = [tensor_rule(k, *fan, multipliers=multipliers) for k, fan in zip(kinds, sizes, strict=True)]
        weights = [nn.Parameter(draw * rule.variance**0.5) for draw, rule in zip(draws, rules, strict=True)]
        rates = [{"params": [w], "lr": 0.02 * rule.learning_rate} for w, rule in zip(weights, rules, strict=True)]
        adam, seen = torch.optim.Adam(rates, eps=1e-30), []
        for _ in range(20):
            h = x
            for w, rule, last in zip(weights, rules, (False, False, True), strict=True):
                h = rule.multiplier * h @ w.T
                h = h if last else h.tanh()
            seen.append(h.detach())
            adam.zero_grad()
            (h - y).square().mean().backward()
            adam.step()
        outputs.append(torch.stack(seen))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert (outputs[0][-1] - outputs[0][0]).abs().max() > 0.1


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(["input", "hidden", "output"]), st.booleans())
def test_factors_compose_over_widths(a, b, kind, multipliers):
    first, second, both = (width_factors(kind, 2**n, 2**n, multipliers=multipliers) for n in (a, b, a + b))
    assert [x * y for x, y in zip(first, second, strict=True)] == pytest.approx(list(both))


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


class Small(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.attention = nn.MultiheadAttention(width, 1)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 2 * width, 3)
        self.head = nn.Linear(width, 11)
        self.scale = nn.Parameter(torch.ones(()))


def test_the_table_of_a_model():
    rules = table(shapes(Small(8)), shapes(Small(32)), embeddings=["embed.weight"])
    hidden, vector, output = (1.0, 0.25, 0.25), (1.0, 1.0, 1.0), (1.0, 1 / 16, 0.25)
    expected = dict.fromkeys(rules, vector)
    expected |= dict.fromkeys(("attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"), hidden)
    expected["head.weight"] = output
    assert rules == expected
    assert rules["scale"] == rules["head.bias"] == vector
    mistaken = table(shapes(Small(8)), shapes(Small(32)))
    assert mistaken["embed.weight"] == output
    with_multipliers = table(shapes(Small(8)), shapes(Small(32)), embeddings=["embed.weight"], multipliers=True)
    assert with_multipliers["embed.weight"] == with_multipliers["norm.bias"] == (2.0, 0.25, 0.5)
    assert with_multipliers["head.weight"] == (0.5, 0.25, 0.5) and with_multipliers["scale"] == vector


def test_the_base_itself_changes_nothing():
    assert set(table(shapes(Small(8)), shapes(Small(8))).values()) == {(1.0, 1.0, 1.0)}


def test_unequal_growth_goes_by_the_fan_in():
    rules = table({"w": (8, 4)}, {"w": (64, 8)})
    assert rules["w"].learning_rate == rules["w"].variance == 0.5


def test_muon_needs_no_width_or_its_root():
    """The spectral norm of the step, lr·scale: constant, as μP has it for matrices whose fans grow alike."""
    for ratio in (1, 4, 16):
        original, matched = (muon_rate_factor(ratio, ratio, scale=s) for s in ("original", "match_rms_adamw"))
        assert original == 1.0 and matched * (ratio**0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: tensor_rule("bias", 4, 4),
            r"kind must be one of \['input', 'hidden', 'output', 'fixed'\], got 'bias'",
        ),
        (lambda: tensor_rule("hidden", 0, 4), "fan_in must be finite and > 0, got 0"),
        (lambda: kind_of((8, 8), (16,)), r"as many dimensions as base_shape, got \(8, 8\) and \(16,\)"),
        (lambda: kind_of((8, 8, 3), (16, 16, 5)), "only the first two dimensions may grow with width"),
        (lambda: kind_of((8, 0), (16, 0)), "shape must be an integer of at least 1, got 0"),
        (lambda: kind_of((8, 8), (16, 16), embedding=True), "an embedding must have the shape"),
        (lambda: table({"a": (8,)}, {"b": (8,)}), "shapes must have the same names as the other model, and lacks 'a'"),
        (lambda: table({"a": (8,)}, {"a": (8,), "b": (8,)}), "base_shapes must have the same names .* lacks 'b'"),
        (lambda: table({"a": (8,)}, {"a": (8,)}, embeddings=["e"]), "embeddings must be names of parameters, got 'e'"),
        (lambda: muon_rate_factor(4, 4, scale="adam"), 'scale must be "original" or "match_rms_adamw", got'),
        (lambda: muon_rate_factor(4, 2, scale="original"), "both fans must grow alike, got ratios of 4 and 2"),
    ],
)
def test_bad_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
