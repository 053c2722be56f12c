"""Bytes of a device: counted on a real model, tracked through a real update, written out naively, and how they move."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import PRECISIONS, Block, Measured, Precision
from batchlab.planner.layouts.calibration import as_grid
from batchlab.planner.layouts.grid import Limits, grid
from batchlab.planner.layouts.memory import PARTS, Costing, memory, precision_named
from tests.planner.layouts.models import Living, Transformer, gpt, llama, loss_of
from tests.planner.layouts.reference import bytes_of, rows_of

A100 = hardware()["A100-80"]
BF16_ADAM = Precision(2, 2, 4, 2)


def costing(shape, precision, *, sequence_length=128, flash=True, fused=False, loss_parallel=False):
    kind = Block.llama if shape.gated else Block.gpt
    extra = {"fused_norm": fused} if shape.gated else {}
    block = kind(shape, bytes_each=precision.activation, flash=flash, **extra)
    return Costing(sequence_length, block, precision, loss_parallel)


def alone(batch, checkpointing, accumulation=2):
    """One device, so many micro-batches."""
    return as_grid([Measured(1, 1, batch, 1.0, checkpointing)], 1, batch * accumulation)


@pytest.mark.parametrize("shape", [gpt(), gpt(tied=False), llama(), llama(tied=True)])
def test_parameters_gradients_and_adams_state_are_counted_exactly(shape):
    """Sheet check 4, on one device."""
    model = Transformer(shape)
    optimizer = torch.optim.Adam(model.parameters())
    tokens = torch.randint(0, shape.vocabulary, (2, 16))
    loss_of(model(tokens), tokens).backward()
    optimizer.step()
    parts = memory(shape, alone(2, False), costing(shape, PRECISIONS["float32"]))
    assert parts["weights"][0] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"][0] == sum(p.grad.nbytes for p in model.parameters())
    moments = [m for state in optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
    assert parts["optimizer"][0] == sum(moment.nbytes for moment in moments)


def tracked_peak(model, optimizer, batch, accumulation=2):
    """Bytes of all tensors at the fullest moment of an update, the layers' mask buffers not."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *states]
    with Living(*held) as living:
        for _ in range(accumulation):
            logits = model(batch)
            (loss_of(logits, batch) / accumulation).backward()
        optimizer.step()
    return living.peak - sum(buffer.nbytes for buffer in model.buffers())


def test_the_tracker_counts_what_lives():
    x = torch.ones(100)
    with Living() as living:
        for _ in range(3):
            y = x.exp()
            z = y.view(10, 10).sin()
            del y, z
    assert living.peak == 3 * 400
    assert living.bytes == 400


@pytest.mark.parametrize(
    ("shape", "flash", "checkpointing", "precision"),
    [
        (gpt(), True, False, PRECISIONS["float32"]),
        (gpt(), False, True, BF16_ADAM),
        (gpt(tied=False, positions=0), True, True, PRECISIONS["float32"]),
        (gpt(tied=False, positions=0), False, False, BF16_ADAM),
        (llama(), False, True, PRECISIONS["float32"]),
        (llama(), True, False, BF16_ADAM),
        (llama(tied=True, mlp=300), True, True, BF16_ADAM),
        (llama(tied=True, mlp=300), False, False, PRECISIONS["float32"]),
    ],
)
def test_a_real_updates_peak_is_told_within_a_tenth(shape, flash, checkpointing, precision):
    """All tensors that live at once in a whole update with accumulation, on a real model."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[precision.activation]
    model = Transformer(shape, flash, checkpointing).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    batch = torch.randint(0, shape.vocabulary, (8, 128))
    loss_of(model(batch), batch).backward()
    optimizer.step()
    parts = memory(shape, alone(8, checkpointing), costing(shape, precision, flash=flash))
    assert sum(part[0] for part in parts.values()) == pytest.approx(tracked_peak(model, optimizer, batch), rel=0.1)


SHAPES = st.builds(
    lambda make, layers, heads, kv, mlp, tied: make(layers=layers, heads=heads, kv_heads=kv, mlp=8 * mlp, tied=tied),
    st.sampled_from([gpt, llama]),
    st.integers(1, 7),
    st.sampled_from([4, 8]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 40),
    st.booleans(),
)
CLUSTERS = st.sampled_from([1, 4, 8, 16, 24]).map(lambda devices: Cluster(devices, A100))
NUMBERS = st.sampled_from([*PRECISIONS.values(), BF16_ADAM])


@given(SHAPES, CLUSTERS, NUMBERS, st.sampled_from([24, 48]), st.booleans(), st.booleans())
def test_arrays_equal_the_plain_count_over_all_stages(shape, cluster, precision, batch, flash, parallel):
    """Every layout of a small search against the largest of all its stages, one at a time."""
    costs = costing(shape, precision, flash=flash, fused=True, loss_parallel=parallel)
    every = grid(shape, cluster, global_batch=batch, sequence_length=128, limits=Limits(uneven_stages=True))
    total = np.sum(list(memory(shape, every, costs).values()), axis=0)
    plain = [bytes_of(shape, row, costs) for row in rows_of(every)]
    np.testing.assert_allclose(total, plain, rtol=1e-12)


def test_zero_divides_what_it_says():
    """Sheet 42: DDP keeps 16P, gradients and optimizer sharded 2P + 14P/n, all sharded 16P/n; plus what is gathered."""
    shape = llama(layers=24)
    cluster = Cluster(8, A100)
    limits = Limits(tp=[1], pp=[1], micro_batch=[1], checkpointing=[False])
    every = grid(shape, cluster, global_batch=8, sequence_length=128, limits=limits)
    parts = memory(shape, every, costing(shape, PRECISIONS["bf16"]))
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    p, layer = shape.parameters, shape.layer_parameters
    outside = p - 24 * layer
    expected = [16 * p, 4 * p + 12 * p / 8, 2 * p + 14 * p / 8 + 2 * layer]
    expected.append(16 * p / 8 + 2 * (outside + 2 * layer) + 2 * layer)
    np.testing.assert_allclose(states, expected, rtol=1e-12)


def test_autocast_holds_a_copy_of_the_weights():
    shape = llama()
    parts = memory(shape, alone(1, False), costing(shape, precision_named("autocast")))
    assert parts["weights"][0] == 6 * shape.parameters
    assert parts["optimizer"][0] == 8 * shape.parameters


@settings(max_examples=25)
@given(SHAPES, CLUSTERS, st.booleans())
def test_a_larger_micro_batch_never_takes_less(shape, cluster, flash):
    """Sheet check 6, at a layout that is otherwise the same."""
    costs = costing(shape, PRECISIONS["bf16"], flash=flash)
    every = grid(shape, cluster, global_batch=48, sequence_length=128, limits=Limits(uneven_stages=True))
    total = np.sum(list(memory(shape, every, costs).values()), axis=0)
    groups = {}
    for row, size in zip(rows_of(every), total, strict=True):
        groups.setdefault(row[:3] + row[5:], []).append((row[3], size))
    for sizes in groups.values():
        ordered = [size for _, size in sorted(sizes)]
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(ordered))


@given(SHAPES, CLUSTERS)
def test_what_sharding_checkpointing_and_sequence_parallelism_save(shape, cluster):
    """Sequence parallelism never takes more. Sharding and checkpointing save what they divide, less what they gather
    or recompute at once: they never take more than that on top."""
    costs = costing(shape, PRECISIONS["bf16"])
    every = grid(shape, cluster, global_batch=48, sequence_length=128, limits=Limits())
    parts = memory(shape, every, costs)
    total = dict(zip(rows_of(every), np.sum(list(parts.values()), axis=0), strict=True))
    for row, size in total.items():
        if row[6]:
            assert size <= total[(*row[:6], False, row[7])] * (1 + 1e-12)
        if row[7] == 1:
            assert size <= total[(*row[:7], 0)] * (1 + 1e-12)


def test_logits_dominate_the_last_stage_of_a_small_model_with_a_large_vocabulary():
    shape = llama(vocabulary=128_000)
    limits = Limits(tp=[1], pp=[4], micro_batch=[1], checkpointing=[False])
    every = grid(shape, Cluster(4, A100), global_batch=8, sequence_length=2048, limits=limits)
    parts = memory(shape, every, costing(shape, PRECISIONS["bf16"], sequence_length=2048))
    assert parts["logits"][0] > 0.9 * 2048 * 128_000 * 14
    assert parts["logits"][0] > 0.5 * sum(parts[part][0] for part in PARTS)


def test_loss_parallel_divides_the_logits():
    shape = llama(kv_heads=4)
    limits = Limits(tp=[4], pp=[1], micro_batch=[1], checkpointing=[False], sequence_parallel=[False])
    every = grid(shape, Cluster(4, A100), global_batch=8, sequence_length=128, limits=limits)
    whole, divided = (
        memory(shape, every, costing(shape, PRECISIONS["bf16"], loss_parallel=parallel))["logits"][0]
        for parallel in (False, True)
    )
    norm = 128 * (4 * shape.hidden + 4)
    assert whole - norm == pytest.approx(4 * (divided - norm), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: precision_named("fp8"), r"precision must be a Precision or one of \['autocast', .* got 'fp8'"),
        (lambda: replace(BF16_ADAM, weight=0), "weight must be finite and > 0, got 0"),
        (lambda: replace(BF16_ADAM, state=float("nan")), "state must be >= 0, got nan"),
    ],
)
def test_bad_precisions(call, text):
    with pytest.raises(InputError, match=text):
        call()
