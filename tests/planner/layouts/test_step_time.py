"""Seconds of an update: published MFU, 1F1B simulated, communication in closed form, and every part written out."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.costs.sharding import communication_bytes
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import PRECISIONS, Block, Efficiency, ModelShape, bubble_share, mfu
from batchlab.planner.layouts.grid import Limits, grid
from batchlab.planner.layouts.memory import Costing
from batchlab.planner.layouts.step_time import step_time
from tests.planner.layouts.models import gpt, llama
from tests.planner.layouts.reference import one_forward_one_backward, rows_of, seconds_of

A100 = hardware()["A100-80"]
LLAMA = {
    "13B": ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000),
    "30B": ModelShape(layers=60, hidden=6656, heads=52, mlp=17920, vocabulary=128_000),
    "65B": ModelShape(layers=80, hidden=8192, heads=64, mlp=22016, vocabulary=128_000),
}


@pytest.mark.parametrize(
    ("model", "sequence_length", "seconds", "devices", "published"),
    [
        ("13B", 2048, 26.5395, 64, 0.7057),
        ("65B", 2048, 79.307, 128, 0.5526),
        ("30B", 2048, 22.667, 256, 0.4922),
        ("13B", 8192, 18.410, 128, 0.5941),
        ("30B", 8192, 49.435, 128, 0.5140),
    ],
)
def test_published_mfu(model, sequence_length, seconds, devices, published):
    """Sheet check 1: five rows within 0.3 %."""
    told = mfu(
        LLAMA[model],
        tokens=4_194_304,
        sequence_length=sequence_length,
        seconds=seconds,
        devices=devices,
        peak_flops=312e12,
    )
    assert told == pytest.approx(published, rel=0.003)


def test_mfu_without_the_attention_term_or_the_large_vocabulary_misses():
    """The sheet's trap: that is 5 to 10 % off."""
    shape, attention = LLAMA["13B"], 12 * 40 * 5120 * 2048
    small = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=32_000)
    assert 0.05 < attention / shape.model_flops(2048) < 0.1
    assert 0.05 < 1 - small.model_flops(2048) / shape.model_flops(2048) < 0.1


def test_bubble_of_equal_stages_equals_a_discrete_event_simulation():
    """Sheet check 3, exactly, p up to 8 and m up to 64; and the micro-batches that a stage holds."""
    for p in range(1, 9):
        for m in range(1, 65):
            ends, held = one_forward_one_backward([1] * p, [2] * p, m)
            assert ends == 3 * (m + p - 1)
            assert (p - 1) / (m + p - 1) == bubble_share(p, m) == pytest.approx(1 - 3 * m / ends, abs=1e-15)
            assert held == [min(m, p - i) for i in range(p)]


@given(
    st.integers(2, 8),
    st.integers(1, 64),
    st.integers(0, 7),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_unequal_stages_are_exact_where_the_last_is_the_slowest_and_bounded_elsewhere(p, m, longer, layers, loss):
    forward = [layers + (i < longer % p) for i in range(p)]
    forward[-1] += loss
    stages = [3 * seconds for seconds in forward]
    ends, _ = one_forward_one_backward(forward, [2 * seconds for seconds in forward], m)
    formula = sum(stages) + (m - 1) * max(stages)
    assert ends <= formula
    if stages[-1] == max(stages):
        assert ends == formula


SHAPES = st.sampled_from(
    [gpt(layers=6, heads=8), llama(layers=6, heads=8, kv_heads=2), llama(layers=7, mlp=344, tied=True), LLAMA["13B"]]
)
CLUSTERS = st.sampled_from([1, 4, 8, 16, 24]).map(lambda devices: Cluster(devices, A100))
SHARES = st.floats(0.05, 1.0)
EFFICIENCIES = st.builds(
    Efficiency,
    matmul=SHARES,
    half_width=st.floats(0, 500),
    half_tokens=st.floats(0, 500),
    memory=SHARES,
    link=SHARES,
    network=SHARES,
    host_seconds=st.floats(0, 1e-3),
    tensor_overlap=st.floats(0, 1),
    data_overlap=st.floats(0, 1),
    pipeline_overlap=st.floats(0, 1),
)


@settings(max_examples=25)
@given(SHAPES, CLUSTERS, EFFICIENCIES, st.sampled_from(list(PRECISIONS.values())), st.booleans(), st.booleans())
def test_arrays_equal_the_plain_sum(shape, cluster, efficiency, precision, flash, parallel):
    make = Block.llama if shape.gated else Block.gpt
    costs = Costing(256, make(shape, bytes_each=precision.activation, flash=flash), precision, parallel)
    every = grid(shape, cluster, global_batch=48, sequence_length=256, limits=Limits(uneven_stages=True))
    parts = step_time(shape, every, costs, cluster, efficiency)
    assert all((part >= -1e-12).all() for part in parts.values())
    plain = [seconds_of(shape, row, costs, cluster, efficiency) for row in rows_of(every)]
    np.testing.assert_allclose(np.sum(list(parts.values()), axis=0), plain, rtol=1e-9)


def parts_of(shape, cluster, efficiency=None, *, global_batch=48, sequence_length=256, **limits):
    costs = Costing(sequence_length, Block.of(shape), PRECISIONS["bf16"], False)
    every = grid(shape, cluster, global_batch=global_batch, sequence_length=sequence_length, limits=Limits(**limits))
    return rows_of(every), step_time(shape, every, costs, cluster, efficiency or Efficiency())


@pytest.mark.parametrize(
    ("sharding", "strategy"), [("none", "ddp"), ("gradients", "grad_optimizer"), ("weights", "full")]
)
def test_data_parallel_bytes_are_those_of_ddp_and_fsdp(sharding, strategy):
    """Sheet 42: 2, 2 and 3 times (n - 1)/n·P·bytes in an update of one micro-batch. In more, sharded weights go round
    in each, and whole weights are gathered once."""
    cluster = Cluster(8, A100, link_latency=0.0)
    shape, speed = LLAMA["13B"], A100.link_bandwidth * Efficiency().link
    for m in (1, 4):
        rows, parts = parts_of(
            shape,
            cluster,
            global_batch=8 * m,
            tp=[1],
            pp=[1],
            micro_batch=[1],
            checkpointing=[False],
            sharding=[sharding],
        )
        assert [row[4] for row in rows] == [m]
        sent = communication_bytes(shape.parameters, strategy, 8, passes=m)
        if sharding == "gradients":
            sent -= (m - 1) * 2 * shape.parameters * 7 / 8
        assert parts["data"][0] == pytest.approx(sent / speed, rel=1e-12)


def test_tensor_parallel_all_reduces_in_closed_form():
    """Sheet 40: 4 all-reduces of 2·s·b·h bytes a layer and micro-batch, ring volume 2(t-1)/t; recomputing adds 2."""
    shape = LLAMA["13B"]
    rows, parts = parts_of(shape, Cluster(8, A100, link_latency=0.0), pp=[1], sharding=["optimizer"])
    speed = A100.link_bandwidth * Efficiency().link
    for row, seconds in zip(rows, parts["tensor"], strict=True):
        _, t, _, b, m, checkpointing, _, _ = row
        volume = 2 * (t - 1) / t * 2 * 256 * b * 5120
        assert seconds == pytest.approx(m * 40 * (6 if checkpointing else 4) * volume / speed, rel=1e-12)


def test_checkpointing_does_four_thirds_of_a_layers_work():
    shape = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=1)
    rows, parts = parts_of(shape, Cluster(8, A100), sequence_length=2048, global_batch=8, tp=[8], pp=[1])
    work = dict(zip(rows, parts["compute"], strict=True))
    for row, seconds in work.items():
        if row[5]:
            assert seconds == pytest.approx(4 / 3 * work[(*row[:5], False, *row[6:])], rel=1e-4)


@settings(max_examples=25)
@given(SHAPES, CLUSTERS)
def test_a_larger_micro_batch_never_has_a_smaller_bubble(shape, cluster):
    """Sheet check 6."""
    rows, parts = parts_of(shape, cluster, uneven_stages=True)
    groups = {}
    for row, bubble, total in zip(rows, parts["bubble"], np.sum(list(parts.values()), axis=0), strict=True):
        groups.setdefault(row[:3] + row[5:], []).append((row[3], bubble / total, bubble_share(row[2], row[4])))
    for group in groups.values():
        shares = [share for _, _, share in sorted(group)]
        assert shares == sorted(shares)


@given(CLUSTERS)
def test_bubble_seconds_grow_with_the_micro_batch(cluster):
    """In seconds too, at sizes where no launch time hides it."""
    rows, parts = parts_of(LLAMA["13B"], cluster, sequence_length=2048)
    groups = {}
    for row, bubble in zip(rows, parts["bubble"], strict=True):
        groups.setdefault(row[:3] + row[5:], []).append((row[3], bubble))
    for group in groups.values():
        seconds = [bubble for _, bubble in sorted(group)]
        assert all(a <= b + 1e-9 for a, b in pairwise(seconds))


def test_small_layers_wait_for_the_host_so_larger_micro_batches_pay():
    """Micro-batch 1 is not built in: a small model's update is shorter with a larger one, a large model's is not."""
    rows, parts = parts_of(llama(layers=12, hidden=512, mlp=1376, heads=8), Cluster(1, A100), checkpointing=[False])
    total = dict(zip((row[3] for row in rows), np.sum(list(parts.values()), axis=0), strict=True))
    assert total[1] > 3 * total[8] > 3 * total[48]


def test_a_measured_table_replaces_the_curve():
    shape, cluster = LLAMA["13B"], Cluster(8, A100)
    table = Efficiency(table=((2, 4, 0.2),))
    rows, slow = parts_of(shape, cluster, table)
    _, plain = parts_of(shape, cluster)
    for row, a, b in zip(rows, slow["compute"], plain["compute"], strict=True):
        assert (a > 1.5 * b) == (row[3] == 2 and row[1] == 4)
        assert a == b or (row[3], row[1]) == (2, 4)


def test_rings_that_span_nodes_share_adapters():
    """dp 16 over two nodes: with tp 1 a node's eight adapters serve one ring, with tp 4 two serve each."""
    cluster = Cluster(64, A100, link_latency=0.0, inter_node_latency=0.0)
    rows, parts = parts_of(LLAMA["13B"], cluster, global_batch=64, pp=[1], micro_batch=[1], sharding=["optimizer"])
    seconds = {(row[0], row[1]): s for row, s in zip(rows, parts["data"], strict=True)}
    network, link = 25e9 * 0.9, 300e9 * 0.65
    for (dp, tp), spent in seconds.items():
        shape = LLAMA["13B"]
        split = shape.parameters - 81 * 5120
        parameters = split / tp + 81 * 5120
        speed = min(link, network * min(dp, 8 // tp))
        assert spent == pytest.approx(4 * parameters * (dp - 1) / dp / speed, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Efficiency(matmul=0), r"matmul must lie in \(0, 1\], got 0"),
        (lambda: Efficiency(link=1.1), r"link must lie in \(0, 1\], got 1.1"),
        (lambda: Efficiency(memory=math.nan), r"memory must lie in \(0, 1\], got nan"),
        (lambda: Efficiency(half_width=-1), "half_width must be >= 0, got -1"),
        (lambda: Efficiency(data_overlap=2), r"data_overlap must lie in \[0, 1\], got 2"),
        (lambda: Efficiency(table=((1, 1, 2.0),)), r"table must hold rows \(micro_batch, tp, share in \(0, 1\]\), got"),
        (lambda: Efficiency(table=((1, 0.5),)), r"table must hold rows"),
        (lambda: bubble_share(0, 1), "stages must be an integer of at least 1, got 0"),
        (
            lambda: mfu(llama(), tokens=1, sequence_length=1, seconds=0, devices=1, peak_flops=1),
            "seconds must be finite and > 0, got 0",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(InputError, match=text):
        call()
