"""Multigrid against the plain run on moving blobs, over three seeds: accuracy, operations and updates."""

import sys

import pytest
import torch

from tests.docs.blocks import ROOT


@pytest.mark.slow
def test_as_right_as_the_plain_run_at_less_than_half_of_its_operations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("multigrid", None)
    import multigrid

    torch.set_num_threads(1)
    rows = [multigrid.compared(seed) for seed in range(3)]
    assert sorted(row["points"] for row in rows)[1] > -1.5
    assert all(0.6 < row["baseline"] < 0.99 for row in rows)  # neither out of reach nor at the ceiling
    assert all(row["operations_ratio"] <= 0.5 and row["updates_ratio"] < 0.45 for row in rows)
