"""The grid: every cell is there once, the front is the brute force one, and b* its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import InputError
from batchlab.planner.costs.cost_table import CostTable, cost_table, pareto
from batchlab.planner.costs.run_cost import cost
from batchlab.planner.costs.training import Training
from batchlab.planner.hardware import Device

FAST = Device("fast", 80e9, 400e12, 2e12, 100e9, 8, 700.0, "by hand", "2026-01-01")
SMALL = Device("small", 40e9, 100e12, 1e12, 50e9, 8, 300.0, "by hand", "2026-01-01", 0.5, "a list", "2025-12-24")
MODEL = Training(parameters=1e9, tokens=1e9, sequence_length=1000, activation_bytes=1e9)
LINES = {"fast": (0.05, 0.02), "small": (0.05, 0.08)}
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)


def grid(**changes):
    settings = {"batches": BATCHES, "devices": [FAST, SMALL], "counts": [1, 2, 8], "step_time": LINES}
    settings |= {"strategies": ["ddp", "full"], "prices": {"fast": 3.0}}
    return cost_table(MODEL, **(settings | changes))


def test_every_cell_is_a_row_or_has_a_reason():
    found = grid()
    cells = [(row.device, row.devices, row.strategy, row.batch) for row in (*found.rows, *found.pruned)]
    assert len(set(cells)) == len(cells) == 2 * 3 * 2 * len(BATCHES)
    reasons = {(cell.device, cell.devices, cell.strategy, cell.batch): cell.reason for cell in found.pruned}
    assert reasons["fast", 2, "ddp", 1].startswith("batch must be at least devices")
    assert "does not fit: ddp on 1 small at micro-batch 32 takes 48 GB" in reasons["small", 1, "ddp", 32]
    assert all(row.memory_bytes <= 80 * 1e9 for row in found.rows)
    row = next(
        row for row in found.rows if (row.device, row.devices, row.strategy, row.batch) == ("fast", 8, "ddp", 64)
    )
    assert row == cost(MODEL, batch=64, device=FAST, devices=8, step_time=LINES["fast"], price_per_hour=3.0)
    assert {str(row.price) for row in found.rows} == {"3 USD/h, given", "0.5 USD/h, a list, 2025-12-24"}
    assert CostTable.from_json(found.to_json()) == found


def beats(one, other):
    """Only at one batch: loss for a token is another at another."""
    faster = one.tokens_per_second >= other.tokens_per_second and one.dollars <= other.dollars
    faster = faster and one.batch == other.batch
    return faster and (one.tokens_per_second, one.dollars) != (other.tokens_per_second, other.dollars)


def test_the_front_is_what_nothing_beats():
    found = grid()
    brute = [row for row in found.rows if not any(beats(other, row) for other in found.rows)]
    assert {id(row) for row in found.front} == {id(row) for row in brute} and len(brute) > 2
    assert [row.dollars for row in found.front] == [
        row.dollars for row in sorted(brute, key=lambda row: (row.batch, row.dollars))
    ]
    assert {row.batch for row in found.front} == set(BATCHES)
    assert found.cheapest.dollars == min(row.dollars for row in found.rows)
    assert found.fastest.tokens_per_second == max(row.tokens_per_second for row in found.rows)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8))
def test_equal_rows_are_both_on_the_front(cells):
    """t0 and price chosen so that few values meet often: ties in one, in both, in neither."""
    rows = [cost(MODEL, batch=1, device=FAST, step_time=(0.0, each), price_per_hour=price) for each, price in cells]
    brute = [row for row in rows if not any(beats(other, row) for other in rows)]
    assert {id(row) for row in pareto(rows)} == {id(row) for row in brute}


def test_saturation_is_the_smallest_batch_within_5_percent_of_the_best():
    """One fast device, t0/t1 = 2.5: the smallest b with b/(b + 2.5) >= 0.95 of 64/66.5, and with half of it."""
    found = grid(counts=[1], strategies=["ddp"], devices=[FAST], step_time=(0.05, 0.02), batches=range(1, 65))
    best = 0.95 * 64 / 66.5
    closed = next(b for b in range(1, 65) if b / (b + 2.5) >= best)
    assert found.saturation() == {("fast", 1, "ddp"): closed}
    assert found.saturation(0.5)["fast", 1, "ddp"] == next(b for b in range(1, 65) if b / (b + 2.5) >= 0.5 * 64 / 66.5)


def test_the_cheapest_batch_need_not_be_the_largest_that_fits():
    """What the paper found: on one device 95 % of the speed is there at a quarter of the batch that fits."""
    found = grid(
        counts=[1], strategies=["ddp"], devices=[FAST], step_time=(0.005, 0.02), batches=[1, 2, 4, 8, 16, 32, 64]
    )
    assert found.saturation()["fast", 1, "ddp"] == 8 and max(row.batch for row in found.rows) == 64


def test_the_table_is_text():
    found = grid(counts=[1], strategies=["ddp"], batches=[16, 32])
    lines = found.table().splitlines()
    assert " ".join(lines[0].split()) == (
        "device count strategy batch micro passes step s tokens/s hours USD tokens/USD kWh GB bound by"
    )
    assert lines[1].split()[:6] == ["fast", "1", "ddp", "16", "16", "1"] and len(lines) == 1 + 3 + 3 + 2 + 1
    assert lines[4].startswith("front: at its batch no other row") and lines[5].startswith("tokens/s and USD are of")
    assert lines[6].startswith("kWh: estimated: the devices' maximum board power")
    assert lines[7:9] == ["price: fast 3 USD/h, given", "price: small 0.5 USD/h, a list, 2025-12-24"]
    assert lines[9].startswith("not: small x 1, ddp, batch 32: does not fit")


def test_passes_and_carbon_are_in_the_table():
    """A share of 16 in passes of 4; 400 g/kWh change the carbon of every row, and only where they are given."""
    shared = {"devices": [FAST], "step_time": LINES["fast"], "counts": [1], "strategies": ["full"], "batches": [16]}
    found = grid(**shared, micro_batch=4, g_per_kwh=400.0)
    head, line = (
        text.split() for text in found.table().replace("kg CO2e", "kg").replace("step s", "step").split("\n")[:2]
    )
    cells = dict(zip(head[:-2], line, strict=False))
    assert (cells["micro"], cells["passes"]) == ("4", "4")
    kwh = 700 * found.rows[0].seconds / 3.6e6
    assert float(cells["kWh"]) == pytest.approx(kwh, rel=1e-3) and float(cells["kg"]) == pytest.approx(
        0.4 * kwh, rel=1e-3
    )
    assert "CO2e" not in grid(**shared).table()


def test_batches_are_not_set_against_each_other():
    """t0 makes the larger batch faster and cheaper for the same tokens; each still has its front."""
    found = grid(devices=[FAST], step_time=LINES["fast"], counts=[1], strategies=["ddp"], batches=[8, 16])
    small, large = found.rows
    assert large.dollars < small.dollars and large.tokens_per_second > small.tokens_per_second
    assert found.front == (small, large) and found.cheapest == found.fastest == large
    assert found.table().count("tokens/s and USD are of the same tokens at every batch") == 1
    one = grid(devices=[FAST], step_time=LINES["fast"], counts=[1], strategies=["ddp"], batches=[8])
    assert "at every batch" not in one.table()


def test_axes_may_be_any_iterable():
    axes = {"batches": (b for b in (8, 16)), "counts": np.array([1, 2]), "strategies": iter(["ddp"])}
    found = grid(**axes, devices={"fast": FAST}.values(), step_time=LINES["fast"])
    plain = {"batches": [8, 16], "counts": [1, 2], "strategies": ["ddp"]}
    assert found == grid(**plain, devices=[FAST], step_time=LINES["fast"])
    assert CostTable.from_json(found.to_json()) == found


def test_without_prices_there_is_no_front():
    found = grid(prices=None, devices=[FAST], step_time=LINES["fast"])
    assert found.front == () and found.fastest.dollars is None and " - " in found.table()
    with pytest.raises(InputError, match=r"dollars need a price: give prices, for no device of the table has one"):
        found.cheapest  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, r"batches must hold one or more, got \[\]"),
        ({"counts": ()}, r"counts must hold one or more, got \(\)"),
        ({"devices": "fast"}, r"devices must hold one or more, got 'fast'"),
        ({"batches": 8}, r"batches must hold one or more, got 8"),
        ({"prices": {"fats": 3.0}}, r"prices must be by names of the devices \['fast', 'small'\], got 'fats'"),
        ({"prices": {"fast": -3.0}}, r"price_per_hour must be finite and > 0, got -3.0"),
        ({"step_time": {"fast": (0.1, 0.1)}}, r"step_time must be given for every device, got none for 'small'"),
        ({"overlap": 2.0}, r"overlap must lie in \[0, 1\], got 2.0"),
        ({"strategies": ["zero9"]}, r"strategy must be one of"),
        ({"batches": [4096], "counts": [1]}, r"no cell of the grid can be; the first: does not fit: ddp on 1 fast at"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        grid(**changes)
