"""What `layout` refuses, and what it says where nothing fits."""

import math
from dataclasses import replace

import pytest

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import PRECISIONS, Block, Measured, ModelShape, layout
from batchlab.planner.layouts.memory import Costing
from tests.planner.layouts.reference import bytes_of

A100 = hardware()["A100-80"]
LLAMA_13B = ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000)


def test_where_nothing_fits_the_least_and_the_nearest_are_named():
    """Sheet check 7."""
    with pytest.raises(InputError) as refused:
        layout(LLAMA_13B, Cluster(1, A100), global_batch=2048, sequence_length=2048)
    text = str(refused.value)
    costs = Costing(2048, Block.of(LLAMA_13B), PRECISIONS["bf16"], False)
    least = bytes_of(LLAMA_13B, (1, 1, 1, 1, 2048, True, False, 0), costs) + 2**31
    assert text.startswith(
        f"no layout fits 1 x 85.9 GB: the least is {least / 1e9:.1f} GB a device, dp 1 x tp 1 x pp 1, "
        "micro-batch 1, checkpointing (optimizer 168.0, weights 28.0, gradients 28.0, "
    )
    assert text.endswith("bound by optimizer state; 4 devices would do, 3 more")
    assert layout(LLAMA_13B, Cluster(4, A100), global_batch=2048, sequence_length=2048).fitting > 0
    with pytest.raises(InputError, match="no layout fits 2 x 85.9 GB: .* 4 devices would do, 2 more"):
        layout(LLAMA_13B, Cluster(2, A100), global_batch=2048, sequence_length=2048)


def test_where_no_number_of_devices_would_do():
    tiny = replace(A100, memory_bytes=1e9)
    with pytest.raises(InputError, match="nor does any fit 256 times as many devices: shorten sequences"):
        layout(LLAMA_13B, Cluster(1, tiny), global_batch=256, sequence_length=8192)


def test_where_every_layout_ran_out_of_memory():
    limits = dict(tensor_parallel=[1], pipeline_parallel=[1], micro_batch=[1], checkpointing=[False])
    with pytest.raises(
        InputError, match="measured must leave a layout to rank: every one that was to be tried ran out"
    ):
        layout(
            LLAMA_13B,
            Cluster(64, A100),
            global_batch=2048,
            sequence_length=2048,
            measured=[Measured(1, 1, 1, None)],
            sharding=["optimizer"],
            **limits,
        )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tensor_parallel": [3]}, "tensor_parallel must divide the 8 devices of a node, got 3"),
        ({"tensor_parallel": [16]}, "tensor_parallel must divide the 8 devices of a node, got 16"),
        ({"pipeline_parallel": [3]}, "pipeline_parallel must divide the 64 devices, got 3"),
        (
            {"pipeline_parallel": [16]},
            r"pipeline_parallel must divide the 40 layers \(or give uneven_stages=True\), got 16",
        ),
        ({"pipeline_parallel": [64]}, "pipeline_parallel must be at most the 40 layers, got 64"),
        ({"pipeline_parallel": []}, r"pipeline_parallel must hold integers of at least 1, got \[\]"),
        (
            {"global_batch": 7, "tensor_parallel": [1], "pipeline_parallel": [1, 2]},
            r"global_batch must be divisible by one of the data-parallel sizes \[32, 64\] that are left by .* got 7",
        ),
        (
            {"micro_batch": [3]},
            "micro_batch must hold a divisor of a data-parallel rank's share of global_batch 2048, with data-parallel",
        ),
        ({"global_batch": 0}, "global_batch must be an integer of at least 1, got 0"),
        ({"sequence_length": 2048.5}, "sequence_length must be an integer of at least 1, got 2048.5"),
        ({"reserve_bytes": math.nan}, "reserve_bytes must be finite and >= 0, got nan"),
        ({"keep": 0}, "keep must be an integer of at least 1, got 0"),
        ({"precision": "fp4"}, "precision must be a Precision or one of"),
        ({"sharding": ["zero"]}, r"sharding must hold some of \['none', 'optimizer', 'gradients', 'weights'\], got"),
        ({"sharding": "zero"}, "sharding must hold some of .* got 'zero'"),
        ({"tensor_parallel": "2"}, "tensor_parallel must hold integers of at least 1, got '2'"),
        ({"micro_batch": [1, True]}, r"micro_batch must hold integers of at least 1, got \[1, True\]"),
        ({"checkpointing": 1}, "checkpointing must hold True or False, got 1"),
        ({"sequence_parallel": []}, r"sequence_parallel must hold True or False, got \[\]"),
        ({"reserve_bytes": math.inf}, "reserve_bytes must be finite and >= 0, got inf"),
        (
            {"measured": [Measured(5, 1, 1, 1.0)]},
            r"measured must hold layouts that divide and are among those to try, got",
        ),
        ({"measured": [(1, 1, 1, 1.0)]}, r"measured must hold Measured rows, got \(1, 1, 1, 1.0\)"),
    ],
)
def test_bad_input(changes, text):
    sizes = {"global_batch": 2048, "sequence_length": 2048}
    with pytest.raises(InputError, match=text):
        layout(LLAMA_13B, Cluster(64, A100), **(sizes | changes))


@pytest.mark.parametrize(
    ("shape", "t", "text"),
    [
        (replace(LLAMA_13B, heads=52, hidden=6656, head_dim=128, kv_heads=52), 8, "divide the 52 heads, got 8"),
        (replace(LLAMA_13B, mlp=13825), 2, "divide the MLP's width 13825, got 2"),
        (
            replace(LLAMA_13B, heads=24, kv_heads=3, head_dim=128),
            4,
            "divide or be a multiple of the 3 heads of keys and values, got 4",
        ),
    ],
)
def test_what_tensor_parallelism_does_not_divide_is_named(shape, t, text):
    """Sheet check 7."""
    with pytest.raises(InputError, match=f"tensor_parallel must {text}"):
        layout(shape, Cluster(64, A100), global_batch=2048, sequence_length=2048, tensor_parallel=[t])


def test_devices_must_be_whole_nodes_and_types_right():
    with pytest.raises(InputError, match="model must be a ModelShape and cluster a Cluster, got 'llama'"):
        layout("llama", Cluster(8, A100), global_batch=8, sequence_length=8)
    with pytest.raises(InputError, match="seconds must be finite and > 0, got -1.0"):
        Measured(1, 1, 1, -1.0)
    with pytest.raises(InputError, match="tp must be an integer of at least 1, got 0"):
        Measured(0, 1, 1, 1.0)
    with pytest.raises(InputError, match="sharding must be one of"):
        Measured(1, 1, 1, 1.0, sharding="zero")
