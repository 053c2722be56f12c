"""The search: all that divides, ranked as brute force ranks it; measured rows; what is said where nothing fits."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import PRECISIONS, Block, Efficiency, Layouts, Measured, ModelShape, layout
from batchlab.planner.layouts.grid import Limits, grid
from batchlab.planner.layouts.memory import Costing
from batchlab.planner.layouts.rows import as_long, why_lost
from tests.planner.layouts.models import gpt, llama
from tests.planner.layouts.reference import SHARDINGS, bytes_of, rows_of, seconds_of, triples

A100 = hardware()["A100-80"]
LLAMA_13B = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000)

SHAPES = st.sampled_from(
    [gpt(layers=6, heads=8), llama(layers=6, heads=8, kv_heads=2), llama(layers=5, heads=4, kv_heads=1, mlp=96)]
)
SMALL = st.sampled_from([(1, 8), (6, 8), (8, 8), (12, 4), (16, 8)]).map(
    lambda sizes: Cluster(sizes[0], replace(A100, devices_per_node=sizes[1]))
)


@given(SHAPES, SMALL, st.sampled_from([12, 48]), st.sampled_from([3, 128]), st.booleans())
def test_the_grid_is_every_layout_that_divides(shape, cluster, batch, length, uneven):
    """Sheet check 2: equal to trying all integers; the products hold."""
    expected = triples(shape, cluster, global_batch=batch, sequence_length=length, uneven=uneven)
    if not expected:
        return
    every = grid(shape, cluster, global_batch=batch, sequence_length=length, limits=Limits(uneven_stages=uneven))
    rows = rows_of(every)
    assert set(rows) == expected
    assert len(rows) == len(expected)
    assert (every.dp * every.tp * every.pp == cluster.devices).all()
    assert (every.dp * every.micro_batch * every.accumulation == batch).all()


@settings(max_examples=25)
@given(SHAPES, SMALL, st.floats(2e6, 1e9), st.booleans())
def test_the_ranking_is_brute_forces(shape, cluster, memory_bytes, uneven):
    device = replace(cluster.device, memory_bytes=memory_bytes)
    cluster = replace(cluster, device=device)
    costs = Costing(128, Block.of(shape), PRECISIONS["bf16"], False)
    every = triples(shape, cluster, global_batch=48, sequence_length=128, uneven=uneven)
    fitting = {row: bytes_of(shape, row, costs) for row in every}
    fitting = {row: size for row, size in fitting.items() if size + 1e6 <= memory_bytes}

    def search():
        return layout(
            shape,
            cluster,
            global_batch=48,
            sequence_length=128,
            uneven_stages=uneven,
            reserve_bytes=1e6,
            keep=10_000,
        )

    if not fitting:
        with pytest.raises(InputError, match="no layout fits"):
            search()
        return
    found = search()
    assert (found.considered, found.fitting, len(found.rows)) == (len(every), len(fitting), len(fitting))
    seconds = sorted(seconds_of(shape, row, costs, cluster, Efficiency()) for row in fitting)
    np.testing.assert_allclose([row.seconds for row in found.rows], seconds, rtol=1e-9)
    for row in found.rows:
        plain = (row.dp, row.tp, row.pp, row.micro_batch, row.accumulation, row.checkpointing, row.sequence_parallel)
        assert row.memory.total - 1e6 == pytest.approx(fitting[(*plain, SHARDINGS.index(row.sharding))], rel=1e-12)
        assert row.time.total == pytest.approx(row.seconds, rel=1e-12)
        assert row.tokens_per_second == pytest.approx(48 * 128 / row.seconds, rel=1e-12)


@given(SHAPES, st.floats(1e7, 1e9), st.floats(1, 10))
def test_more_memory_never_worsens_the_best(shape, memory_bytes, more):
    """Sheet check 6."""
    sizes = dict(global_batch=48, sequence_length=128, reserve_bytes=0.0)
    small, large = (Cluster(8, replace(A100, memory_bytes=memory_bytes * times)) for times in (1, more))
    try:
        best = layout(shape, small, **sizes).best.seconds
    except InputError:
        return
    assert layout(shape, large, **sizes).best.seconds <= best * (1 + 1e-9)


def test_13b_on_64_gpus():
    """Sheet check 5: (1, 1, 1) is taken and micro-batch 4 needs recomputing there; the paper's own winner wins."""
    cluster, sizes = Cluster(64, A100), dict(global_batch=2048, sequence_length=2048)
    best = layout(LLAMA_13B, cluster, **sizes).best
    assert (best.micro_batch, best.tp, best.pp, best.checkpointing, best.sharding) == (1, 1, 1, False, "optimizer")
    alone = dict(tensor_parallel=[1], pipeline_parallel=[1], sharding=["optimizer"])
    with pytest.raises(InputError, match="no layout fits 64 x 85.9 GB: the least is .* bound by activations; "):
        layout(LLAMA_13B, cluster, **sizes, **alone, micro_batch=[4], checkpointing=[False])
    assert layout(LLAMA_13B, cluster, **sizes, **alone, micro_batch=[4]).best.checkpointing


def test_the_row_and_its_reasons():
    found = layout(LLAMA_13B, Cluster(64, A100), global_batch=2048, sequence_length=2048, keep=3)
    first, second, third = found.rows
    assert first.name == "dp 64 x tp 1 x pp 1, micro-batch 1, optimizer sharded"
    assert first.reason == (
        f"least predicted time of {found.fitting:,} layouts that fit, of 1,920 that divide: {first.seconds:.4g} s an "
        f"update, {first.memory.total / 1e9:.1f} GB a device, of which weights 35%"
    )
    bubble, data = second.time.bubble - first.time.bubble, second.time.data - first.time.data
    assert second.pp == 2 and second.reason == (
        f"{second.seconds / first.seconds - 1:.1%} slower, {second.seconds:.4g} s against {first.seconds:.4g} s: "
        f"computing {second.time.compute - first.time.compute:+.3g} s, pipeline bubble {bubble:+.3g} s, "
        f"data-parallel communication {data:+.3g} s"
    )
    assert third.seconds >= second.seconds
    assert first.memory.largest == "weights"
    lines = found.table().splitlines()
    assert lines[0].split() == ["#", "layout", "s/update", "MFU", "GB/device", "tokens/s"]
    assert [line[:2] for line in lines[1:5]] == ["1 ", "2 ", "3 ", ""] and max(map(len, lines)) <= 100
    assert " ".join(" ".join(lines[5:]).split()) == " ".join(f"{k} {row.reason}" for k, row in enumerate(found.rows, 1))
    assert found.notes[0] == "Memory counts 2.15 GB a device for what is not modelled."
    assert Layouts.from_json(found.to_json()) == found


def test_layouts_that_take_as_long_come_by_memory_and_say_so():
    """Where the host's launches bound a layer, sequence parallelism changes memory alone."""
    limits = dict(micro_batch=[1], tensor_parallel=[2], pipeline_parallel=[1], checkpointing=[False])
    found = layout(llama(), Cluster(2, A100), global_batch=4, sequence_length=128, **limits)
    first, second = found.rows
    assert (first.sequence_parallel, second.sequence_parallel, first.seconds) == (True, False, second.seconds)
    more = (second.memory.total - first.memory.total) / 1e6
    assert more > 0 and second.reason == f"takes as long and needs {more:.2g} MB more a device"


def test_times_that_differ_in_the_last_bit_are_as_long():
    """Micro-batches 1, 2 and 3 of a Llama 7B take equal times that are summed in different orders."""
    llama_7b = ModelShape(layers=32, hidden=4096, heads=32, mlp=11008, vocabulary=32_000)
    cluster = Cluster(4, hardware()["H100-80"])
    found = layout(llama_7b, cluster, global_batch=24, sequence_length=2048, keep=1000)
    assert [row.micro_batch for row in found.rows[:3]] == [1, 2, 3]
    assert found.rows[2].reason == "takes as long and needs 22.05 GB more a device"
    for one, other in pairwise(found.rows):
        assert other.seconds >= one.seconds * (1 - 1e-9)
        if other.seconds <= one.seconds * (1 + 1e-12):
            assert other.memory.total >= one.memory.total - 1
    less = why_lost(found.rows[0], replace(found.rows[2], seconds=found.best.seconds))
    assert less == "takes as long and needs 22.05 GB less a device"


@given(st.lists(st.sampled_from([1.0, 1.0 + 2**-52, 2.0, 2.0 - 2**-52, 3.0]), min_size=1))
def test_ranks_of_times(seconds):
    assert list(as_long(np.array(seconds))) == [sorted({round(t) for t in seconds}).index(round(t)) for t in seconds]


def test_measured_rows_stand_in_place_of_predictions():
    cluster, sizes = Cluster(64, A100), dict(global_batch=2048, sequence_length=2048)
    plain = layout(LLAMA_13B, cluster, **sizes, keep=2000)
    by_name = {row.name: row for row in plain.rows}
    runs = [
        Measured(1, 1, 1, None),
        Measured(2, 1, 2, 1.2 * by_name["dp 32 x tp 2 x pp 1, micro-batch 2, optimizer sharded"].seconds),
        Measured(1, 2, 1, 1.4 * by_name["dp 32 x tp 1 x pp 2, micro-batch 1, optimizer sharded"].seconds),
        Measured(1, 2, 2, 1.3 * by_name["dp 32 x tp 1 x pp 2, micro-batch 2, optimizer sharded"].seconds),
    ]
    found = layout(LLAMA_13B, cluster, **sizes, measured=runs, keep=2000)
    assert found.scale == pytest.approx(1.3, rel=1e-12)
    assert found.fitting == plain.fitting - 1
    assert "dp 64 x tp 1 x pp 1, micro-batch 1, optimizer sharded" not in {row.name for row in found.rows}
    for row in found.rows:
        expected = 1.3 * by_name[row.name].seconds
        for run in runs[1:]:
            if row.measured and (row.tp, row.pp, row.micro_batch) == (run.tp, run.pp, run.micro_batch):
                expected = run.seconds
        assert row.seconds == pytest.approx(expected, rel=1e-12)
    assert sum(row.measured for row in found.rows) == 3
    assert all(one.seconds <= other.seconds * (1 + 1e-9) for one, other in pairwise(found.rows))
    against = [row for row in found.rows[1:] if row.measured != found.best.measured]
    assert against and all(
        row.reason.endswith(("measured against predicted", "predicted against measured")) for row in against
    )
    assert found.notes[1:] == (
        "Layouts with measured times: 3; predictions of the others are multiplied by 1.3, the median of measured over "
        "predicted.",
        "Layouts left out because they ran out of memory when measured: 1.",
    )


def test_the_seconds_of_a_reason_add_up_after_scaling():
    cluster, sizes = Cluster(64, A100), dict(global_batch=2048, sequence_length=2048)
    plain = layout(LLAMA_13B, cluster, **sizes)
    last = plain.rows[-1]
    run = Measured(last.tp, last.pp, last.micro_batch, 2 * last.seconds, last.checkpointing, last.sequence_parallel)
    assert (last.sharding, last.name) == ("none", "dp 16 x tp 1 x pp 4, micro-batch 1")
    found = layout(LLAMA_13B, cluster, **sizes, measured=[replace(run, sharding=last.sharding)])
    assert (found.scale, found.best.seconds) == (pytest.approx(2), pytest.approx(2 * plain.best.seconds))
    for row in found.rows[1:]:
        if not row.measured:
            told = [float(part.split()[-2]) for part in row.reason.split(": ")[1].split(", ")]
            assert sum(told) == pytest.approx(row.seconds - found.best.seconds, rel=0.15)


def test_two_measured_rows_are_compared_as_measured():
    runs = [Measured(1, 1, 1, 20.0), Measured(2, 1, 1, 30.0)]
    limits = dict(tensor_parallel=[1, 2], pipeline_parallel=[1], micro_batch=[1], checkpointing=[False])
    found = layout(
        LLAMA_13B,
        Cluster(64, A100),
        global_batch=2048,
        sequence_length=2048,
        measured=runs,
        sharding=["optimizer"],
        sequence_parallel=[False],
        **limits,
    )
    assert [row.reason for row in found.rows[1:]] == ["50.0% slower, 30 s against 20 s, both measured"]
    assert found.best.reason.startswith("least measured time of 2 layouts that fit, of 2 that divide: 20 s an update")


def test_a_measured_layout_fits_whatever_is_predicted():
    run = Measured(1, 1, 4, 100.0)
    limits = dict(tensor_parallel=[1], pipeline_parallel=[1], micro_batch=[4], checkpointing=[False])
    found = layout(
        LLAMA_13B,
        Cluster(64, A100),
        global_batch=2048,
        sequence_length=2048,
        measured=[run],
        sharding=["optimizer"],
        **limits,
    )
    assert found.best.measured and found.best.memory.total > A100.memory_bytes


def test_one_value_is_a_list_of_one():
    several = dict(tensor_parallel=[2], pipeline_parallel=[1], micro_batch=[1], checkpointing=[False])
    one = {name: values[0] for name, values in several.items()}
    sizes = dict(global_batch=2048, sequence_length=2048, sequence_parallel=True, sharding="optimizer")
    found = layout(LLAMA_13B, Cluster(64, A100), **sizes, **one)
    assert found == layout(LLAMA_13B, Cluster(64, A100), **sizes, **several)
    assert found.considered == 1


def test_numpys_integers_are_integers():
    best = layout(
        LLAMA_13B, Cluster(np.int64(64), A100), global_batch=np.int64(2048), sequence_length=np.int32(2048), keep=1
    ).best
    assert (type(best.dp), type(best.seconds), best.dp) == (int, float, 64)


def test_over_a_million_layouts():
    """Exhaustive all the same, in about 4 s on one core of the machine that it was written on."""
    device = replace(A100, devices_per_node=2520)
    shape = ModelShape(layers=2520, hidden=5040, heads=2520, mlp=20160, vocabulary=32_000)
    cluster = Cluster(2520 * 6, device)
    found = layout(shape, cluster, global_batch=2520 * 6 * 60, sequence_length=2520, uneven_stages=True)
    assert found.considered == 1_573_736
