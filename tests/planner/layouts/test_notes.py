"""What is said of a ranking's peak, batch and sequences, and which kinds and sizes are refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import Efficiency, Measured, ModelShape, Precision, layout
from batchlab.planner.layouts.grid import divisors
from tests.planner.layouts.models import gpt, llama

H100, T4 = (Cluster(8, hardware()[name]) for name in ("H100-80", "T4"))
SIZES = {"global_batch": 64, "sequence_length": 128}


def told(model=None, cluster=H100, **changes):
    return layout(model or llama(), cluster, **(SIZES | changes)).notes[2:]


@pytest.mark.parametrize("precision", ["float32", Precision(4, 4, 8, 4)])
def test_float32_is_not_ranked_from_a_half_peak_unsaid(precision):
    (note,) = told(precision=precision)
    assert note == (
        "Times and MFU are reckoned from H100-80's 989.4 TFLOP/s in bfloat16; products in float32 reach a small part "
        "of it, so of these rows only the memory holds. Measure, or give an efficiency whose matmul is float32's share."
    )
    assert told(precision=precision, efficiency=Efficiency(matmul=0.05)) == ()
    run = Measured(1, 1, 1, 1.0)
    assert not any("peak" in note or "float32" in note for note in told(precision=precision, measured=[run]))


@pytest.mark.parametrize("precision", ["bf16", "bf16-float32-gradients", "autocast"])
def test_bfloat16_where_a_chip_has_none(precision):
    (note,) = told(cluster=T4, precision=precision)
    assert note == (
        "Times and MFU hold for float16, of the same bytes: T4 has no bfloat16 matrix units, and its 65 TFLOP/s are "
        "float16's."
    )
    assert told(precision=precision) == ()


def test_a_batch_that_may_be_in_tokens():
    assert told(global_batch=2**19) == ()
    (note,) = told(global_batch=2**20)
    assert note == (
        "An update takes 1.34e+08 tokens, 1,048,576 sequences of 128: is the batch in tokens? It is to be in sequences."
    )


def test_sequences_beyond_the_context():
    assert told(llama(context=128)) == ()
    assert told(llama(context=127)) == ("Sequences of 128 tokens are beyond the 127 that the model was made for.",)
    assert told(gpt(positions=128)) == ()
    with pytest.raises(InputError, match="sequence_length must be at most the 127 learned positions of the model, got"):
        told(gpt(positions=127))


def test_batches_of_any_size_end():
    """A prime near the largest batch, one with many divisors, and what is beyond."""
    for batch in (10**11 + 3, 97_772_875_200):
        assert layout(llama(), Cluster(1, H100.device), global_batch=batch, sequence_length=64, keep=1).best
    with pytest.raises(InputError, match="global_batch must be in sequences: 1000000000000000000 of 128 tokens are"):
        told(global_batch=10**18)


@given(st.integers(1, 5000))
def test_divisors(number):
    assert divisors(number) == tuple(k for k in range(1, number + 1) if number % k == 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"precision": ["bf16"]}, r"precision must be a Precision or one of .* got \['bf16'\]"),
        ({"measured": None}, "measured must hold Measured rows, got None"),
        ({"efficiency": 0.4}, r"efficiency must be an Efficiency, such as Efficiency\(matmul=0.5\), got 0.4"),
        ({"block": 3}, r"block must be a Block, such as Block.of\(model\), or None, got 3"),
    ],
)
def test_other_kinds_are_refused_by_name(changes, text):
    with pytest.raises(InputError, match=text):
        told(**changes)


def test_a_shape_of_numpys_integers_goes_through_json():
    shape = replace(llama(), kv_heads=np.int64(2), positions=np.int32(9), norms=np.int8(3), context=np.int64(9))
    assert ModelShape.from_json(shape.to_json()) == shape
    with pytest.raises(InputError, match="context must be an integer of at least 1, got 0"):
        llama(context=0)
