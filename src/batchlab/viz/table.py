"""The report's first lines as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from batchlab.viz.text import visible

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(title: str, rows: Sequence[tuple[str, str, str]], verdict: str = "") -> Table:
    """Rows of (name, value, remark) as a `rich` table, and the verdict below; no text is markup or terminal control."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.caption, table.caption_justify = Text(visible(verdict)), "left"
    table.title_style = table.caption_style = "bold"
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table
