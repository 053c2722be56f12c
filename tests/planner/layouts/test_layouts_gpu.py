"""What a block keeps for its backward pass, measured and by the presets, on a GPU."""

import pytest
import torch
from torch import nn

from batchlab.planner.layouts import Block, ModelShape, activation_bytes
from tests.planner.layouts.models import Layer, Transformer, gpt, llama

pytestmark = pytest.mark.gpu
B, S = 2, 64


def kept(block, shape, batch=B, length=S):
    return batch * length * (block.whole + block.split) + batch * block.scores * shape.heads * length**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_preset_of_gpt_is_what_a_real_layer_keeps(accelerator, dtype, flash, dropout):
    """To 10 %. The preset counts a byte for each number of a mask, which are as wide as the numbers on a CPU."""
    shape = gpt()
    layer = Layer(shape, flash, dropout=dropout).to(accelerator, dtype)
    measured = activation_bytes(layer, torch.randn(B, S, shape.hidden, dtype=dtype, device=accelerator))
    expected = kept(Block.gpt(shape, bytes_each=dtype.itemsize, flash=flash, dropout=dropout > 0), shape)
    if accelerator.type == "cpu" and dropout:
        masked = 2 * B * S * shape.hidden + (0 if flash else B * shape.heads * S**2)
        expected += (dtype.itemsize - 1) * masked
    assert measured == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("shape", [gpt(), llama()], ids=["gpt", "llama"])
def test_a_measured_block_foretells_other_sizes(accelerator, shape):
    layer = Layer(shape, False).to(accelerator)
    block = Block.measured(layer, shape, sequence_length=48)
    assert block.scores > 0
    for batch, length in ((3, 100), (1, 64)):
        measured = activation_bytes(layer, torch.randn(batch, length, shape.hidden, device=accelerator))
        assert kept(block, shape, batch, length) == pytest.approx(measured, rel=0.02)


def test_a_storage_counts_once_and_weights_do_not(accelerator):
    x, linear = torch.randn(8, 16, device=accelerator), nn.Linear(16, 4).to(accelerator)
    assert activation_bytes(lambda y: y.exp() * y.exp(), x) == 2 * x.nbytes
    assert activation_bytes(linear, x) == x.nbytes


def test_a_shape_is_read_off_a_module_wherever_it_lies(accelerator):
    model = Transformer(gpt())
    expected = ModelShape.of(model)
    assert ModelShape.of(model.to(accelerator)) == expected
