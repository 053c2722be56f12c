"""The attention operator's kept bytes against tensors that autograd saves, each storage once."""

import math

import pytest
import torch
import torch.nn.functional as F

from batchlab.core.errors import InputError
from batchlab.planner.costs.attention import Attention


def kept_bytes(function, *inputs):
    """Bytes of the storages that `function(*inputs)` saves for its backward pass."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs)
    return sum(storages.values())


def vanilla(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(mask, -math.inf).softmax(-1) @ v


def flash(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads_of(s, sequences=1, heads=4, hidden=128):
    return [torch.randn(sequences, heads, s, hidden // heads, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("s", [128, 256, 512, 1024])
@pytest.mark.parametrize("sequences", [1, 2])
def test_bytes_are_what_autograd_saves(s, sequences):
    """float32, d 128, 4 heads. Vanilla saves its boolean mask of s² bytes too."""
    shape = {"layers": 1, "hidden": 128, "heads": 4, "element_bytes": 4}
    inputs = heads_of(s, sequences)
    assert kept_bytes(vanilla, *inputs) == Attention("vanilla", **shape).bytes(s, sequences) + s**2
    saved = kept_bytes(flash, *inputs)
    assert (
        Attention("flash", **shape).bytes(s, sequences) <= saved <= Attention("flash", **shape).bytes(s, sequences) + 64
    )


def test_the_ratio_grows_with_the_length():
    """arXiv 2410.19456 by the sheet: 1.80, 2.85, 4.96, 9.18 at s = 128, 256, 512, 1024; 19.4 and 2.1 MB at 1024."""
    shape = {"layers": 1, "hidden": 128, "heads": 4, "element_bytes": 4}
    pairs = [
        (Attention("vanilla", **shape).bytes(s) + s**2, Attention("flash", **shape).bytes(s))
        for s in (128, 256, 512, 1024)
    ]
    assert [a / b for a, b in pairs] == pytest.approx([1.80, 2.85, 4.96, 9.18], abs=0.006)
    assert (round(pairs[-1][0] / 1e6, 1), round(pairs[-1][1] / 1e6, 1)) == (19.4, 2.1)


def test_dropout_in_half_precision_is_5as2():
    """Korthikanti et al. 2022: 5·a·s² bytes a layer for the softmax, its mask and what is left of it."""
    plain = {"kind": "vanilla", "layers": 3, "hidden": 64, "heads": 8}
    scores = Attention(**plain, dropout=True).bytes(100) - 3 * 2 * 100 * 64 * 3
    assert scores == 3 * 5 * 8 * 100**2


def test_shared_keys_and_layers():
    """kv_heads = heads/4: queries and output whole, keys and values a quarter."""
    shared = Attention("flash", layers=2, hidden=64, heads=8, kv_heads=2)
    assert shared.bytes(10) == 2 * (2 * 10 * 64 * (2 + 2 / 4) + 4 * 8 * 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sparse"}, r'kind must be "vanilla" or "flash", got \'sparse\''),
        ({"kv_heads": 3}, r"kv_heads must divide heads 8, got 3"),
        ({"hidden": 6.4}, r"hidden must be an integer of at least 1, got 6.4"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        Attention(**{"kind": "flash", "layers": 2, "hidden": 64, "heads": 8, **changes})
