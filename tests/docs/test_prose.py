"""Docstrings become reStructuredText without losing a sign."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from prose import systems_table, to_rst

from batchlab.core.systems import systems


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
