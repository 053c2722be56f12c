"""The verb `cost`: passes, what it took for granted, and counts in other units."""

import shlex

import pytest

from batchlab import planner
from batchlab.cli import main


def test_cost_takes_passes_and_says_what_it_took_for_granted(capfd):
    """7B by "full" on 64 cards, 16 sequences each: passes of one send 16 times as much and take 5.8 times as long."""
    words = "cost --params 7e9 --tokens 300e9 --device H100-80 --devices 64 --batch 1024 --price 2.5 --strategy full"
    assert main(shlex.split(words)) == 0
    said = capfd.readouterr().out
    assert "! micro_batch is not given: each device's share is taken in one pass" in said and " kWh " in said
    rows = []
    for more in ("--micro-batch 16", "--micro-batch 1 --activation-bytes 5e9 --g-per-kwh 400"):
        assert main(shlex.split(f"{words} {more} --json")) == 0
        rows += planner.CostTable.from_json(capfd.readouterr().out).rows
    assert [row.passes for row in rows] == [1, 16] and rows[1].notes == ()
    assert [round(row.step_seconds, 2) for row in rows] == [5.13, 29.94]
    assert rows[1].memory_bytes == pytest.approx(7e9 * 16 / 64 + 5e9) and rows[1].energy.kg_co2e > 0


def test_a_batch_of_more_than_the_run_is_refused(capsys):
    assert main(shlex.split("cost --params 1e9 --tokens 1e5 --device A100-80 --batch 256")) == 2
    assert "batch x sequence_length must be at most tokens 100000, got 256 x 2048" in capsys.readouterr().err
