"""Predictions against the published sweep of Hagemann et al. 2023 (sheet 40), as far as the sheet carries it.

Two efficiency constants were fitted to the 65B sweep's 13 runs, of which two are among these rows; that a third is 0
was chosen with 13B in sight. Nothing else was fitted to anything, and the memory of all five is a prediction.
"""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from batchlab.core.errors import InputError
from batchlab.planner.hardware import Cluster, hardware
from batchlab.planner.layouts import PRECISIONS, Block, Efficiency, Measured, ModelShape, layout, mfu
from batchlab.planner.layouts.calibration import as_grid
from batchlab.planner.layouts.memory import Costing, memory
from batchlab.planner.layouts.step_time import step_time

A100 = hardware()["A100-80"]
SHAPES = {
    "13B": ModelShape(layers=40, hidden=5120, heads=40, mlp=13824, vocabulary=128_000),
    "30B": ModelShape(layers=60, hidden=6656, heads=52, mlp=17920, vocabulary=128_000),
    "65B": ModelShape(layers=80, hidden=8192, heads=64, mlp=22016, vocabulary=128_000),
}
# (model, sequence length, devices): best MFU of each micro-batch, as (micro_batch, tp, pp, checkpointing, MFU in %)
BEST = {
    ("13B", 2048, 64): [(1, 1, 1, 0, 70.6), (2, 2, 1, 0, 63.0), (4, 1, 1, 1, 51.0), (8, 2, 1, 1, 43.3)],
    ("13B", 8192, 128): [(1, 2, 2, 0, 59.4), (2, 4, 4, 0, 46.3)],
    ("30B", 2048, 256): [(1, 2, 4, 0, 49.2), (2, 2, 4, 0, 46.0), (4, 4, 4, 0, 44.5)],
    ("30B", 8192, 128): [(1, 4, 4, 0, 51.4), (2, 2, 4, 1, 38.1)],
    ("65B", 2048, 128): [(1, 2, 4, 0, 55.3), (2, 4, 4, 0, 52.9), (4, 2, 4, 1, 40.2)],
}
GRIDS = {
    ("13B", 2048, 64): ([1, 2], [1, 2], [1, 2, 4, 8]),
    ("13B", 8192, 128): ([1, 2, 4], [1, 2, 4], [1, 2, 4]),
    ("30B", 2048, 256): ([1, 2, 4], [1, 2, 4], [1, 2, 4]),
    ("30B", 8192, 128): ([2, 4], [2, 4, 8, 16], [1, 2, 4]),
    ("65B", 2048, 128): ([2, 4, 8], [2, 4, 8], [1, 2, 4]),
}


def predict(setting, row):
    """MFU in % and bytes of a device. The rows with checkpointing were run without the fused norm."""
    model, length, devices = setting
    micro_batch, tp, pp, checkpointing, _ = row
    shape, cluster = SHAPES[model], Cluster(devices, A100)
    one = as_grid([Measured(tp, pp, micro_batch, 1.0, bool(checkpointing))], devices, 2**22 // length)
    costs = Costing(length, Block.llama(shape, fused_norm=not checkpointing), PRECISIONS["bf16"], False)
    seconds = sum(part[0] for part in step_time(shape, one, costs, cluster, Efficiency()).values())
    share = mfu(shape, tokens=2**22, sequence_length=length, seconds=seconds, devices=devices, peak_flops=312e12)
    return 100 * share, sum(part[0] for part in memory(shape, one, costs).values())


def predicted(settings):
    return [predict(setting, row)[0] for setting in settings for row in BEST[setting]]


def published(settings):
    return [row[-1] for setting in settings for row in BEST[setting]]


def test_rank_correlation_with_the_published_best_rows():
    """Spearman's of predicted and published MFU: 0.91 over all 14 rows, 0.88 over the 11 that were not fitted to, each
    as it came out. A model that knew nothing has a standard deviation of 1/√13 and 1/√10, 0.28 and 0.32."""
    assert spearmanr(predicted(BEST), published(BEST)).statistic == pytest.approx(0.908, abs=0.005)
    others = [setting for setting in BEST if setting[0] != "65B"]
    assert spearmanr(predicted(others), published(others)).statistic == pytest.approx(0.882, abs=0.005)


@pytest.mark.parametrize("setting", BEST)
def test_every_settings_order_is_the_published_one(setting):
    """The published MFU falls with the micro-batch in each."""
    told = predicted([setting])
    assert told == sorted(told, reverse=True)


def test_mfu_is_within_an_eighth():
    """Root mean square error of ln(MFU) 5.8 %, largest 11.9 % (30B at 2k, where the network was slower)."""
    errors = np.log(np.array(predicted(BEST)) / np.array(published(BEST)))
    assert np.abs(errors).max() < 1 / 8
    assert math.sqrt(np.mean(errors**2)) == pytest.approx(0.058, abs=0.002)


def test_all_that_ran_is_predicted_to_fit():
    assert all(predict(setting, row)[1] < A100.memory_bytes for setting, rows in BEST.items() for row in rows)


@pytest.mark.parametrize("setting", [("13B", 8192, 128), ("30B", 8192, 128)])
def test_micro_batch_4_at_8k_runs_out_of_memory(setting):
    """As published: without checkpointing nothing of the grid held it."""
    for tp in GRIDS[setting][0]:
        for pp in (2, 4):
            assert predict(setting, (4, tp, pp, 0, None))[1] > A100.memory_bytes


@pytest.mark.parametrize("setting", BEST)
def test_micro_batch_1_without_checkpointing_wins_each_setting(setting):
    """Sheet check 5, on the paper's own grids; for 13B and 65B at 2k the winner is the published one."""
    model, length, devices = setting
    tensor, pipeline, batches = GRIDS[setting]
    best = layout(
        SHAPES[model],
        Cluster(devices, A100),
        global_batch=2**22 // length,
        sequence_length=length,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        micro_batch=batches,
        sequence_parallel=[False],
        sharding=["optimizer"],
        uneven_stages=True,
    ).best
    assert (best.micro_batch, best.checkpointing) == (1, False)
    if setting in (("13B", 2048, 64), ("65B", 2048, 128)):
        assert (best.micro_batch, best.tp, best.pp) == BEST[setting][0][:3]


def test_uneven_stages_must_be_asked_for():
    """The paper's 30B has 60 layers on 8 and 16 stages."""
    with pytest.raises(InputError, match=r"pipeline_parallel must divide the 60 layers \(or give uneven_stages=True\)"):
        layout(
            SHAPES["30B"], Cluster(128, A100), global_batch=512, sequence_length=8192, pipeline_parallel=[2, 4, 8, 16]
        )


def test_what_a_fused_norm_is_worth():
    """13B at 2k, one stage more than the best: published 60.3 % with it and 55.5 % without, 8.5 % longer. Predicted
    from the bytes that its kernels move, fitted to nothing: 6.0 % longer, as it came out."""
    shape, cluster = SHAPES["13B"], Cluster(64, A100)
    one = as_grid([Measured(1, 2, 1, 1.0)], 64, 2048)

    def seconds(fused):
        costs = Costing(2048, Block.llama(shape, fused_norm=fused), PRECISIONS["bf16"], False)
        return sum(part[0] for part in step_time(shape, one, costs, cluster, Efficiency()).values())

    assert seconds(False) / seconds(True) == pytest.approx(1.060, abs=0.002)
