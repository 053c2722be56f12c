"""Docstrings become reStructuredText without losing a sign."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from prose import benchmark_tables, scripts, systems_table, to_rst

from batchlab.core.systems import systems
from tests.docs.blocks import ROOT


def test_items_symbols_and_code():
    lines = ["B = tr(Σ)/|G|² of S_min.", "", "batch, micro: counts of", "    `x_`.", "rate: η.", "", ">>> 1 | 2", "3"]
    assert to_rst(lines) == [
        r"B = tr(Σ)/\|G\|² of S\_min.",
        "",
        "* **batch, micro**: counts of ``x_``.",
        "",
        "* **rate**: η.",
        "",
        ">>> 1 | 2",
        "3",
        "",
    ]


def test_every_system_is_in_the_table():
    assert len(systems_table(systems()).splitlines()) == 2 + len(systems())


def test_benchmarks_are_tables_of_what_is_one_number(tmp_path):
    row = {"model": "m", "ratio": 1.02, "low": 1.0, "high": 1.04, "holds": True, "pairs": [[1, 2]], "wall": None}
    machine = {"processor": "p", "cores": 2}
    rows = [row, row | {"every": 4}, {"raw": [1]}, {"summary": "fine"}]
    result = {"claim": "Claim: less.", "rows": rows, "machine": machine, "versions": {"torch": "2.13.0"}}
    (tmp_path / "overhead.json").write_text(json.dumps(result))
    assert benchmark_tables(tmp_path).splitlines() == [
        "## `benchmarks/overhead.py`",
        "",
        "Claim: less.",
        "",
        "Measured on: p, 2 cores, torch 2.13.0.",
        "",
        "| model | ratio | holds | wall | every |",
        "| --- | --- | --- | --- | --- |",
        "| m | 1.02 (1 to 1.04) | yes |  |  |",
        "| m | 1.02 (1 to 1.04) | yes |  | 4 |",
        "",
        "| summary |",
        "| --- |",
        "| fine |",
    ]


def test_every_committed_result_is_of_a_script_that_is_there():
    results = list((ROOT / "benchmarks/results").glob("*.json"))
    assert results
    for path in results:
        result = json.loads(path.read_text())
        assert any((ROOT / "benchmarks" / script).is_file() for script in scripts(path.stem)), path
        assert result["rows"] and result["machine"]["processor"] and result["versions"]["torch"]
